// The few operators that torch_npu's C++ code runs past PyTorch's dispatcher. Any other is an
// error, so that nothing goes on with memory that nobody wrote.

#include "fake.h"

enum { DIMS = 16, NO_SUCH_OPERATOR = 100024 };

struct aclTensorDesc {
    aclDataType type;
    aclFormat format;
    int dims;
    int64_t size[DIMS];
};

struct aclDataBuffer {
    char *data;
    size_t bytes;
};

typedef struct {
    const aclTensorDesc *desc;
    const aclDataBuffer *buffer;
} Operand;

aclTensorDesc *aclCreateTensorDesc(aclDataType type, int dims, const int64_t *size,
                                   aclFormat format) {
    if (dims > DIMS) return NULL;
    aclTensorDesc *desc = calloc(1, sizeof *desc);
    *desc = (aclTensorDesc){.type = type, .format = format, .dims = dims};
    if (dims) memcpy(desc->size, size, (size_t)dims * sizeof *size);
    return desc;
}

void aclDestroyTensorDesc(const aclTensorDesc *desc) { free((void *)desc); }
void aclSetTensorDescName(aclTensorDesc *desc, const char *name) { (void)desc, (void)name; }
aclDataType aclGetTensorDescType(const aclTensorDesc *desc) { return desc->type; }
aclFormat aclGetTensorDescFormat(const aclTensorDesc *desc) { return desc->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc *desc) { return (size_t)desc->dims; }

aclError aclGetTensorDescDimV2(const aclTensorDesc *desc, size_t index, int64_t *size) {
    *size = desc->size[index];
    return ACL_SUCCESS;
}

aclDataBuffer *aclCreateDataBuffer(void *data, size_t bytes) {
    aclDataBuffer *buffer = malloc(sizeof *buffer);
    *buffer = (aclDataBuffer){.data = data, .bytes = bytes};
    return buffer;
}

aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) {
    free((void *)buffer);
    return ACL_SUCCESS;
}

static size_t bytes_of(aclDataType type) {
    switch (type) {
        case ACL_BOOL: case ACL_INT8: case ACL_UINT8: return 1;
        case ACL_FLOAT16: case ACL_BF16: case ACL_INT16: return 2;
        case ACL_FLOAT: case ACL_INT32: return 4;
        case ACL_DOUBLE: case ACL_INT64: return 8;
        default: return 0;
    }
}

static int64_t elements(const aclTensorDesc *desc) {
    int64_t product = 1;
    for (int i = 0; i < desc->dims; i++) product *= desc->size[i];
    return product;
}

// Every element of `to` is `value`, or zero where that is missing or of another type.
static void fill(Operand to, const Operand *value) {
    size_t item = bytes_of(to.desc->type);
    if (!value || value->desc->type != to.desc->type) {
        memset(to.buffer->data, 0, (size_t)elements(to.desc) * item);
        return;
    }
    for (int64_t i = 0; i < elements(to.desc); i++)
        memcpy(to.buffer->data + (size_t)i * item, value->buffer->data, item);
}

// `from` into `to`, which is larger: `margins` holds (before, after) of every dimension.
static void pad(Operand from, Operand margins, Operand to) {
    size_t item = bytes_of(to.desc->type);
    for (int64_t i = 0; i < elements(from.desc); i++) {
        int64_t rest = i, place = 0, stride = 1;
        for (int d = from.desc->dims - 1; d >= 0; d--) {
            int64_t before = margins.desc->type == ACL_INT32
                                 ? ((const int32_t *)margins.buffer->data)[2 * d]
                                 : ((const int64_t *)margins.buffer->data)[2 * d];
            place += (rest % from.desc->size[d] + before) * stride;
            rest /= from.desc->size[d];
            stride *= to.desc->size[d];
        }
        memcpy(to.buffer->data + (size_t)place * item, from.buffer->data + (size_t)i * item, item);
    }
}

aclError aclopCompileAndExecute(const char *name, int input_count,
                                const aclTensorDesc *const input_desc[],
                                const aclDataBuffer *const inputs[], int output_count,
                                const aclTensorDesc *const output_desc[],
                                aclDataBuffer *const outputs[], const aclopAttr *attributes,
                                aclopEngineType engine, aclopCompileType compile,
                                const char *path, aclrtStream stream) {
    (void)attributes, (void)engine, (void)compile, (void)path, (void)stream;
    if (input_count > 3 || output_count != 1) goto unknown;

    Operand in[3] = {{0}};
    for (int i = 0; i < input_count; i++) in[i] = (Operand){input_desc[i], inputs[i]};
    Operand out = {output_desc[0], outputs[0]};
    if (!bytes_of(out.desc->type)) goto unknown;

    if (!strcmp(name, "Fill")) {
        fill(out, &in[1]);
    } else if (!strcmp(name, "ZerosLike")) {
        fill(out, NULL);
    } else if (!strcmp(name, "Identity") || !strcmp(name, "TensorMove")) {
        size_t bytes = (size_t)elements(out.desc) * bytes_of(out.desc->type);
        memmove(out.buffer->data, in[0].buffer->data, bytes);
    } else if (!strcmp(name, "PadV3")) {
        fill(out, input_count > 2 ? &in[2] : NULL);
        pad(in[0], in[1], out);
    } else {
        goto unknown;
    }
    return ACL_SUCCESS;

unknown:
    fprintf(stderr, "simulated NPU: operator %s is not emulated\n", name);
    return NO_SUCH_OPERATOR;
}
