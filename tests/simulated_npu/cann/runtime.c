// AscendCL's runtime on the host: device memory is host memory, and whatever is issued to a stream
// is done before the call returns, so streams and events only need to exist.
//
// SIMULATED_NPU_COUNT  devices of the host (8)
// SIMULATED_NPU_SOC    their name (Ascend910B3); Ascend910A has neither bf16 nor Inf and NaN

#include <dlfcn.h>

#include "fake.h"

enum { UNSUPPORTED = 207000, OUT_OF_MEMORY = 207001, TEXT = 256 };
#define OPTIONS 64
static const size_t DEVICE_MEMORY = (size_t)32 << 30;

static _Thread_local int32_t current_device = 0;

// Start: CANN would load its kernels, here host kernels replace those of torch_npu.

aclError aclInit(const char *config) {
    (void)config;
    void *library = dlopen("libhost_kernels.so", RTLD_NOW | RTLD_LOCAL);
    void (*install)(void) = library ? (void (*)(void))dlsym(library, "install_host_kernels") : NULL;
    if (!install) {
        fprintf(stderr, "simulated NPU: %s\n", dlerror());
        return UNSUPPORTED;
    }
    install();
    return ACL_SUCCESS;
}

const char *aclGetRecentErrMsg(void) { return "the simulated NPU has no more to say"; }

void aclAppLog(aclLogLevel level, const char *func, const char *file, uint32_t line,
               const char *fmt, ...) {
    (void)level, (void)func, (void)file, (void)line, (void)fmt;
}

// Devices.

aclError aclrtGetDeviceCount(uint32_t *count) {
    *count = (uint32_t)atoi(setting("SIMULATED_NPU_COUNT", "8"));
    return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
    current_device = device;
    return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t *device) {
    *device = current_device;
    return ACL_SUCCESS;
}

const char *aclrtGetSocName(void) { return setting("SIMULATED_NPU_SOC", "Ascend910B3"); }

aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo info, int64_t *value) {
    (void)device, (void)info;
    *value = 0;
    return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext *context) {
    *context = &current_device;
    return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
    (void)context;
    return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    (void)device;
    if (flags) *flags = 0;
    if (active) *active = 1;
    return ACL_SUCCESS;
}

// Memory.

static aclError allocate(void **memory, size_t size) {
    const size_t alignment = 512;
    *memory = aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
    return *memory ? ACL_SUCCESS : OUT_OF_MEMORY;
}

aclError aclrtMalloc(void **memory, size_t size, aclrtMemMallocPolicy policy) {
    (void)policy;
    return allocate(memory, size);
}

aclError aclrtMallocAlign32(void **memory, size_t size, aclrtMemMallocPolicy policy) {
    (void)policy;
    return allocate(memory, size);
}

aclError aclrtMallocHost(void **memory, size_t size) { return allocate(memory, size); }

aclError aclrtFree(void *memory) {
    free(memory);
    return ACL_SUCCESS;
}

aclError aclrtFreeHost(void *memory) { return aclrtFree(memory); }

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind) {
    (void)room, (void)kind;
    memcpy(to, from, size);
    return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size,
                          aclrtMemcpyKind kind, aclrtStream stream) {
    (void)stream;
    return aclrtMemcpy(to, room, from, size, kind);
}

aclError aclrtMemset(void *memory, size_t room, int32_t value, size_t size) {
    (void)room;
    memset(memory, value, size);
    return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr kind, size_t *free_bytes, size_t *total) {
    (void)kind;
    *free_bytes = *total = DEVICE_MEMORY;
    return ACL_SUCCESS;
}

// Streams and events: a handle of each is all there is, and everything has been done.

static void *new_handle(void) {
    static _Atomic intptr_t handles = 0;
    return (void *)(64 * ++handles);
}

aclError aclrtCreateStream(aclrtStream *stream) {
    *stream = new_handle();
    return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) {
    (void)priority, (void)flag;
    return aclrtCreateStream(stream);
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
    (void)stream;
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtCreateEvent(aclrtEvent *event) {
    *event = new_handle();
    return ACL_SUCCESS;
}

aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) {
    (void)flag;
    return aclrtCreateEvent(event);
}

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) {
    return aclrtCreateEventWithFlag(event, flag);
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    (void)event;
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    (void)event;
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

// Former spellings, which torch_npu still looks up.
aclError aclQueryEventRecordedStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    return aclrtQueryEventStatus(event, status);
}

aclError aclQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    return aclrtQueryEventWaitStatus(event, status);
}

aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end) {
    (void)start, (void)end;
    *milliseconds = 0.01f;
    return ACL_SUCCESS;
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t *timestamp) {
    (void)event;
    *timestamp = 0;
    return ACL_SUCCESS;
}

// Options: kept and given back.

static char compile_options[OPTIONS][TEXT];
static int64_t system_options[OPTIONS];

size_t aclGetCompileoptSize(aclCompileOpt option) {
    (void)option;
    return TEXT;
}

aclError aclSetCompileopt(aclCompileOpt option, const char *value) {
    if (option >= 0 && option < OPTIONS) snprintf(compile_options[option], TEXT, "%s", value);
    return ACL_SUCCESS;
}

aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t length) {
    const char *found = option >= 0 && option < OPTIONS ? compile_options[option] : "";
    const char *otherwise = option == ACL_OP_JIT_COMPILE ? "disable" : "1";
    snprintf(value, length, "%s", *found ? found : otherwise);
    return ACL_SUCCESS;
}

aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    if (option >= 0 && option < OPTIONS) system_options[option] = value;
    return ACL_SUCCESS;
}

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    *value = option >= 0 && option < OPTIONS ? system_options[option] : 0;
    return ACL_SUCCESS;
}

aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    return aclrtSetSysParamOpt(option, value);
}

aclError aclrtCtxGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    return aclrtGetSysParamOpt(option, value);
}

// Overflow as the Ascend 910A reports it: it has never happened.

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) {
    (void)mode;
    return ACL_SUCCESS;
}

aclError aclrtGetDeviceSatMode(aclrtFloatOverflowMode *mode) {
    *mode = ACL_RT_OVERFLOW_MODE_INFNAN;
    return ACL_SUCCESS;
}

aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag) {
    (void)stream;
    *flag = 0;
    return ACL_SUCCESS;
}

aclError aclrtGetOverflowStatus(void *status, size_t size, aclrtStream stream) {
    (void)stream;
    memset(status, 0, size);
    return ACL_SUCCESS;
}
