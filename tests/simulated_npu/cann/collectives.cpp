// HCCL over shared memory (C++, as hccl.h is). Every communicator is a segment with a barrier and
// one slot a rank; a collective goes through it in chunks. Reductions take the ranks in order, so
// every rank gets the same bits.
//
// HCCL_EXEC_TIMEOUT  seconds to wait for a rank that does not come, as with the real library

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include "third_party/hccl/inc/hccl/hccl.h"

namespace {

constexpr size_t kSlot = 1 << 20;
constexpr size_t kHeader = 4096;

struct Barrier {
    std::atomic<unsigned> arrived, generation;
};

struct Communicator {
    std::string name;
    uint32_t ranks, rank;
    char *memory;

    char *slot(uint32_t of) const { return memory + kHeader + of * kSlot; }
    size_t bytes() const { return kHeader + ranks * kSlot; }

    // Wait for all ranks.
    HcclResult meet() const {
        auto &barrier = *reinterpret_cast<Barrier *>(memory);
        unsigned generation = barrier.generation;
        if (++barrier.arrived == ranks) {
            barrier.arrived = 0;
            ++barrier.generation;
            return HCCL_SUCCESS;
        }
        const char *seconds = getenv("HCCL_EXEC_TIMEOUT");
        time_t limit = time(nullptr) + (seconds ? atoi(seconds) : 1800);
        for (int turn = 0; barrier.generation == generation; turn++) {
            if (turn < 200) sched_yield();
            else usleep(50);
            if (time(nullptr) > limit) {
                fprintf(stderr, "simulated NPU: HCCL_EXEC_TIMEOUT, a rank did not come\n");
                return HCCL_E_TIMEOUT;
            }
        }
        return HCCL_SUCCESS;
    }
};

Communicator &of(HcclComm handle) { return *static_cast<Communicator *>(handle); }

// Numbers.

size_t bytes_of(HcclDataType type) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_UINT8: return 1;
        case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_BFP16: return 2;
        case HCCL_DATA_TYPE_INT32: case HCCL_DATA_TYPE_FP32: return 4;
        case HCCL_DATA_TYPE_INT64: case HCCL_DATA_TYPE_UINT64: case HCCL_DATA_TYPE_FP64: return 8;
        default: return 0;
    }
}

struct BFloat16 {
    uint16_t bits;

    BFloat16(float value) {
        uint32_t wide;
        memcpy(&wide, &value, sizeof wide);
        bits = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // to nearest, ties to even
    }

    operator float() const {
        uint32_t wide = uint32_t{bits} << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
};

// `to` becomes the combination of itself and `from`.
template <typename T>
HcclResult combine(void *to, const void *from, size_t count, HcclReduceOp op) {
    auto result = static_cast<T *>(to);
    auto other = static_cast<const T *>(from);
    for (size_t i = 0; i < count; i++) {
        T a = result[i], b = other[i];
        switch (op) {
            case HCCL_REDUCE_SUM: result[i] = a + b; break;
            case HCCL_REDUCE_PROD: result[i] = a * b; break;
            case HCCL_REDUCE_MAX: result[i] = std::max(a, b); break;
            case HCCL_REDUCE_MIN: result[i] = std::min(a, b); break;
            default: return HCCL_E_NOT_SUPPORT;
        }
    }
    return HCCL_SUCCESS;
}

HcclResult reduce(void *to, const void *from, size_t count, HcclDataType type, HcclReduceOp op) {
    switch (type) {
        case HCCL_DATA_TYPE_INT8: return combine<int8_t>(to, from, count, op);
        case HCCL_DATA_TYPE_UINT8: return combine<uint8_t>(to, from, count, op);
        case HCCL_DATA_TYPE_INT16: return combine<int16_t>(to, from, count, op);
        case HCCL_DATA_TYPE_INT32: return combine<int32_t>(to, from, count, op);
        case HCCL_DATA_TYPE_INT64: return combine<int64_t>(to, from, count, op);
        case HCCL_DATA_TYPE_FP16: return combine<_Float16>(to, from, count, op);
        case HCCL_DATA_TYPE_BFP16: return combine<BFloat16>(to, from, count, op);
        case HCCL_DATA_TYPE_FP32: return combine<float>(to, from, count, op);
        default: return HCCL_E_NOT_SUPPORT;  // float64 among them: the real library has none
    }
}

// One collective: in chunks of a slot, `fill` the own slot, meet, `take` what is needed, meet.
template <typename Fill, typename Take>
HcclResult exchange(const Communicator &comm, size_t bytes, Fill fill, Take take) {
    HcclResult result = HCCL_SUCCESS;
    for (size_t start = 0; start < bytes && result == HCCL_SUCCESS; start += kSlot) {
        size_t part = std::min(kSlot, bytes - start);
        fill(start, part);
        result = comm.meet();
        if (result == HCCL_SUCCESS) result = take(start, part);
        if (result == HCCL_SUCCESS) result = comm.meet();
    }
    return result;
}

}  // namespace

extern "C" {

// Communicators. The root's "address", which torch_npu hands to all ranks, is the segment's name.

HcclResult HcclGetRootInfo(HcclRootInfo *root) {
    static std::atomic<int> count{0};
    memset(root, 0, sizeof *root);
    snprintf(root->internal, sizeof root->internal, "/simulated_npu.%d.%ld.%d", getpid(),
             static_cast<long>(time(nullptr)), count++);
    return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo *root, uint32_t rank,
                                HcclComm *result) {
    auto comm = new Communicator{root->internal, ranks, rank, nullptr};
    int file = shm_open(root->internal, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, comm->bytes())) return HCCL_E_SYSCALL;
    void *memory = mmap(nullptr, comm->bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return HCCL_E_MEMORY;
    comm->memory = static_cast<char *>(memory);
    *result = comm;
    HcclResult met = comm->meet();
    if (rank == 0) shm_unlink(root->internal);  // all have it open, or never will
    return met;
}

HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo *root, uint32_t rank,
                                      const HcclCommConfig *, HcclComm *result) {
    return HcclCommInitRootInfo(ranks, root, rank, result);
}

HcclResult HcclCommDestroy(HcclComm handle) {
    if (handle) munmap(of(handle).memory, of(handle).bytes());
    delete static_cast<Communicator *>(handle);
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm handle, char *name) {
    strcpy(name, of(handle).name.c_str());
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm handle, uint32_t *ranks) {
    *ranks = of(handle).ranks;
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm handle, uint32_t *rank) {
    *rank = of(handle).rank;
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm, HcclResult *error) {
    *error = HCCL_SUCCESS;
    return HCCL_SUCCESS;
}

HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }

uint32_t HcclGetCommConfigCapability() { return 0; }

const char *HcclGetErrorString(HcclResult code) {
    return code == HCCL_E_TIMEOUT ? "a rank did not come in time" : "error of the simulated HCCL";
}

// Collectives. Point-to-point and all-to-all are not emulated.

HcclResult HcclAllReduce(void *from, void *to, uint64_t count, HcclDataType type, HcclReduceOp op,
                         HcclComm handle, aclrtStream) {
    auto &comm = of(handle);
    size_t item = bytes_of(type);
    if (item == 0) return HCCL_E_NOT_SUPPORT;
    auto fill = [&](size_t start, size_t part) {
        memcpy(comm.slot(comm.rank), static_cast<char *>(from) + start, part);
    };
    auto take = [&](size_t start, size_t part) {
        char *target = static_cast<char *>(to) + start;
        memcpy(target, comm.slot(0), part);
        HcclResult result = HCCL_SUCCESS;
        for (uint32_t rank = 1; rank < comm.ranks && result == HCCL_SUCCESS; rank++)
            result = reduce(target, comm.slot(rank), part / item, type, op);
        return result;
    };
    return exchange(comm, count * item, fill, take);
}

HcclResult HcclAllGather(void *from, void *to, uint64_t count, HcclDataType type, HcclComm handle,
                         aclrtStream) {
    auto &comm = of(handle);
    size_t bytes = count * bytes_of(type);
    auto fill = [&](size_t start, size_t part) {
        memcpy(comm.slot(comm.rank), static_cast<char *>(from) + start, part);
    };
    auto take = [&](size_t start, size_t part) {
        for (uint32_t rank = 0; rank < comm.ranks; rank++)
            memcpy(static_cast<char *>(to) + rank * bytes + start, comm.slot(rank), part);
        return HCCL_SUCCESS;
    };
    return exchange(comm, bytes, fill, take);
}

HcclResult HcclBroadcast(void *data, uint64_t count, HcclDataType type, uint32_t root,
                         HcclComm handle, aclrtStream) {
    auto &comm = of(handle);
    auto fill = [&](size_t start, size_t part) {
        if (comm.rank == root) memcpy(comm.slot(0), static_cast<char *>(data) + start, part);
    };
    auto take = [&](size_t start, size_t part) {
        if (comm.rank != root) memcpy(static_cast<char *>(data) + start, comm.slot(0), part);
        return HCCL_SUCCESS;
    };
    return exchange(comm, count * bytes_of(type), fill, take);
}

HcclResult HcclReduce(void *from, void *to, uint64_t count, HcclDataType type, HcclReduceOp op,
                      uint32_t root, HcclComm handle, aclrtStream stream) {
    std::vector<char> all(count * bytes_of(type));
    HcclResult result = HcclAllReduce(from, all.data(), count, type, op, handle, stream);
    if (result == HCCL_SUCCESS && of(handle).rank == root) memcpy(to, all.data(), all.size());
    return result;
}

HcclResult HcclReduceScatter(void *from, void *to, uint64_t count, HcclDataType type,
                             HcclReduceOp op, HcclComm handle, aclrtStream stream) {
    auto &comm = of(handle);
    size_t bytes = count * bytes_of(type);
    std::vector<char> all(bytes * comm.ranks);
    HcclResult result =
        HcclAllReduce(from, all.data(), count * comm.ranks, type, op, handle, stream);
    if (result == HCCL_SUCCESS) memcpy(to, all.data() + comm.rank * bytes, bytes);
    return result;
}

HcclResult HcclScatter(void *from, void *to, uint64_t count, HcclDataType type, uint32_t root,
                       HcclComm handle, aclrtStream stream) {
    auto &comm = of(handle);
    size_t bytes = count * bytes_of(type);
    std::vector<char> all(bytes * comm.ranks);
    if (comm.rank == root) memcpy(all.data(), from, all.size());
    HcclResult result =
        HcclBroadcast(all.data(), count * comm.ranks, type, root, handle, stream);
    if (result == HCCL_SUCCESS) memcpy(to, all.data() + comm.rank * bytes, bytes);
    return result;
}

HcclResult HcclBarrier(HcclComm handle, aclrtStream) { return of(handle).meet(); }

HcclResult HcclAlltoAllV(const void *, const void *, const void *, HcclDataType, const void *,
                         const void *, const void *, HcclDataType, HcclComm, aclrtStream) {
    return HCCL_E_NOT_SUPPORT;
}

HcclResult HcclSend(void *, uint64_t, HcclDataType, uint32_t, HcclComm, aclrtStream) {
    return HCCL_E_NOT_SUPPORT;
}

HcclResult HcclRecv(void *, uint64_t, HcclDataType, uint32_t, HcclComm, aclrtStream) {
    return HCCL_E_NOT_SUPPORT;
}

HcclResult HcclCommInitAll(uint32_t, int32_t *, HcclComm *) { return HCCL_E_NOT_SUPPORT; }

}  // extern "C"
