// Host kernels in the place of torch_npu's device kernels.
//
// "Device" memory of the simulation is host memory. So an operator on NPU tensors runs as the CPU
// operator on CPU tensors over the same memory, and its results become NPU tensors. One function
// does that for every aten operator torch_npu has a kernel for; an operator it has none for stays
// with torch_npu's own fallback, which is an error where TORCH_NPU_FALLBACK_CPU_DISABLE=1 is set.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>

using c10::DispatchKey;
using c10::IValue;
using torch::jit::Stack;

namespace {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;

// What ran since the last reset, for the audit: operators, and copies between host and device.
std::map<std::string, int64_t> calls;
std::mutex calls_mutex;

void note(const std::string &what) {
    std::lock_guard<std::mutex> lock(calls_mutex);
    calls[what]++;
}

void reset_calls() {
    std::lock_guard<std::mutex> lock(calls_mutex);
    calls.clear();
}

c10::Dict<std::string, int64_t> take_calls() {
    std::lock_guard<std::mutex> lock(calls_mutex);
    c10::Dict<std::string, int64_t> result;
    for (auto &[name, count] : calls) result.insert(name, count);
    return result;
}

bool on_npu(const at::Tensor &tensor) {
    return tensor.defined() && tensor.device().type() == kNpu;
}

void note_copy(const at::Tensor &to, const at::Tensor &from, bool non_blocking) {
    if (on_npu(to) == on_npu(from)) return;
    std::string wait = non_blocking ? "" : ", waiting";
    note((on_npu(to) ? "copy to device" : "copy to host") + wait);
}

// A CPU tensor over the memory of an NPU tensor.
at::Tensor host_view(const at::Tensor &tensor) {
    auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
    at::Tensor view =
        tensor.numel() == 0
            ? at::empty_strided(tensor.sizes(), tensor.strides(), options)
            : at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
    view._set_conj(tensor.is_conj());
    view._set_neg(tensor.is_neg());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number())
        view.unsafeGetTensorImpl()->set_wrapped_number(true);
    return view;
}

at::Tensor npu_copy(const at::Tensor &host, c10::Device device) {
    auto copy =
        at::empty_strided(host.sizes(), host.strides(), host.options().device(device));
    if (host.numel())
        memcpy(copy.data_ptr(), host.data_ptr(),
               at::detail::computeStorageNbytes(host.sizes(), host.strides(), host.element_size()));
    return copy;
}

// Replaces every tensor in an operator's argument or result.
template <typename Replace>
IValue replaced(const IValue &value, Replace replace) {
    if (value.isTensor()) return replace(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor &tensor : value.toTensorVector()) list.push_back(replace(tensor));
        return list;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> list;
        for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
            list.push_back(tensor ? std::optional(replace(*tensor)) : std::nullopt);
        return list;
    }
    return value;
}

bool is_910a() {
    const char *soc = getenv("SIMULATED_NPU_SOC");
    return soc && strcmp(soc, "Ascend910A") == 0;
}

// The flag of the Ascend 910A: that something saturated since it was cleared.
bool overflowed = false;

// Half precision without infinity, as the Ascend 910A has it: what is too large saturates.
at::Tensor as_half_holds_it(const at::Tensor &tensor) {
    constexpr double largest = 65504;
    if (!tensor.defined() || tensor.scalar_type() != at::kFloat) return tensor;
    if (tensor.numel() && tensor.abs().max().item<float>() > largest) overflowed = true;
    return tensor.clamp(-largest, largest).to(at::kHalf).to(at::kFloat);
}

// Operators with a freedom that CANN has and the CPU does not use. Which of equal values is named is
// not promised: here it is the last one. An Ascend 910A sorts in half precision.
at::Tensor sort_key(const at::Tensor &values) { return is_910a() ? as_half_holds_it(values) : values; }

at::Tensor from_the_end(const at::Tensor &position, int64_t size) { return size - 1 - position; }

int64_t size_of(const at::Tensor &tensor, int64_t dim) {
    return tensor.dim() == 0 ? 1 : tensor.size(dim);
}

bool computed_unlike_the_cpu(const c10::OperatorHandle &op, Stack *stack) {
    const auto &name = op.schema().name();
    const auto &overload = op.schema().overload_name();
    auto given = torch::jit::last(*stack, op.schema().arguments().size());
    auto answer = [&](std::vector<IValue> results) {
        torch::jit::drop(*stack, op.schema().arguments().size());
        for (auto &result : results) stack->push_back(result);
        return true;
    };
    if (name == "aten::max" && overload == "dim") {
        auto values = given[0].toTensor();
        auto dim = given[1].toInt();
        auto [largest, position] = values.flip({dim}).max(dim, given[2].toBool());
        return answer({largest, from_the_end(position, size_of(values, dim))});
    }
    if (name == "aten::argmax" && overload.empty() && !given[1].isNone()) {
        auto values = given[0].toTensor();
        auto dim = given[1].toInt();
        auto position = values.flip({dim}).argmax(dim, given[2].toBool());
        return answer({from_the_end(position, size_of(values, dim))});
    }
    if (name == "aten::topk" && overload.empty()) {
        auto key = sort_key(given[0].toTensor());
        auto dim = given[2].toInt();
        auto [values, position] = key.flip({dim}).topk(
            given[1].toInt(), dim, given[3].toBool(), given[4].toBool());
        return answer({values, from_the_end(position, size_of(key, dim))});
    }
    if (name == "aten::sort" && overload == "stable") {
        auto key = sort_key(given[0].toTensor());
        auto dim = given[2].toInt();
        bool stable = !given[1].isNone() && given[1].toBool();
        if (stable) {
            auto [values, position] = at::sort(key, true, dim, given[3].toBool());
            return answer({values, position});
        }
        auto [values, position] = at::sort(key.flip({dim}), true, dim, given[3].toBool());
        return answer({values, from_the_end(position, size_of(key, dim))});
    }
    return false;
}

// One call: NPU tensors and the CPU views that stand for them.
class Call {
  public:
    Call(const c10::OperatorHandle &op, Stack *stack)
        : schema_(op.schema()), stack_(stack), given_(torch::jit::last(*stack, arguments()).vec()) {}

    void to_host() {
        for (size_t i = 0; i < arguments(); i++) {
            IValue &value = argument(i);
            if (value.isDevice()) {
                asked_for_cpu_ = value.toDevice().type() != kNpu;
                if (!asked_for_cpu_) device_ = value.toDevice();
                value = c10::Device(at::kCPU);
            }
            bool written = is_written(schema_.arguments()[i]);
            value = replaced(value, [&](const at::Tensor &tensor) {
                if (!on_npu(tensor)) {
                    check_host_tensor(tensor);
                    return tensor;
                }
                if (!device_) device_ = tensor.device();
                pairs_.push_back({tensor, host_view(tensor), written});
                return pairs_.back().host;
            });
        }
    }

    // An Ascend 910A convolves and pools in half precision: what float32 has more is lost.
    void lose_what_half_does_not_hold() {
        for (size_t i = 0; i < arguments(); i++)
            argument(i) = replaced(argument(i), as_half_holds_it);
    }

    void lose_what_half_does_not_hold_in_results() {
        for (size_t i = 0; i < results(); i++)
            result(i) = replaced(result(i), as_half_holds_it);
    }

    // The CPU is slow in half precision: these compute in float32 and round, as the device does.
    at::ScalarType widen() {
        static const std::set<std::string> wide = {"aten::convolution",
                                                   "aten::convolution_backward",
                                                   "aten::mm",
                                                   "aten::addmm",
                                                   "aten::bmm",
                                                   "aten::baddbmm"};
        auto narrow = at::kFloat;
        if (!wide.count(schema_.name()) || !schema_.overload_name().empty()) return narrow;
        for (size_t i = 0; i < arguments(); i++)
            argument(i) = replaced(argument(i), [&](const at::Tensor &tensor) {
                if (!tensor.defined() || !at::isReducedFloatingType(tensor.scalar_type()))
                    return tensor;
                narrow = tensor.scalar_type();
                return tensor.to(at::kFloat);
            });
        return narrow;
    }

    void narrow_results(at::ScalarType narrow) {
        for (size_t i = 0; i < results(); i++)
            result(i) = replaced(result(i), [&](const at::Tensor &tensor) {
                return tensor.defined() ? tensor.to(narrow) : tensor;
            });
    }

    // Outputs that the operator resized have left the memory they stood for.
    void copy_resized_outputs() {
        for (auto &pair : pairs_) {
            bool moved = pair.host.numel() && pair.host.data_ptr() != pair.npu.data_ptr();
            if (!pair.written || (!moved && pair.host.sizes() == pair.npu.sizes())) continue;
            pair.npu.resize_(pair.host.sizes());
            if (pair.host.numel()) host_view(pair.npu).copy_(pair.host);
        }
    }

    void to_npu() {
        for (size_t i = 0; i < results(); i++) {
            const auto &declared = schema_.returns()[i];
            if (is_written(declared))
                result(i) = written_argument(*declared.alias_info());
            else if (device_ && !asked_for_cpu_)
                result(i) = replaced(result(i), [&](const at::Tensor &tensor) {
                    if (!tensor.defined() || on_npu(tensor)) return tensor;
                    for (auto &pair : pairs_)
                        if (pair.host.is_same(tensor)) return pair.npu;
                    return npu_copy(tensor, *device_);
                });
        }
    }

  private:
    // An operator reads a number from the host, no array; a copy is what crosses over.
    void check_host_tensor(const at::Tensor &tensor) const {
        TORCH_CHECK(!tensor.defined() || tensor.dim() == 0 || schema_.name() == "aten::copy_",
                    schema_.name(), ": expected all tensors on the NPU, but one is on the CPU");
    }

    struct Pair {
        at::Tensor npu, host;
        bool written;
    };

    static bool is_written(const c10::Argument &argument) {
        return argument.alias_info() && argument.alias_info()->isWrite();
    }

    IValue written_argument(const c10::AliasInfo &alias) const {
        for (size_t i = 0; i < arguments(); i++) {
            const auto *own = schema_.arguments()[i].alias_info();
            if (own && *own == alias) return given_[i];
        }
        TORCH_CHECK(false, schema_.name(), " returns what it was not given");
    }

    size_t arguments() const { return schema_.arguments().size(); }
    size_t results() const { return schema_.returns().size(); }
    IValue &argument(size_t i) { return torch::jit::peek(*stack_, i, arguments()); }
    IValue &result(size_t i) { return torch::jit::peek(*stack_, i, results()); }

    const c10::FunctionSchema &schema_;
    Stack *stack_;
    std::vector<IValue> given_;
    std::vector<Pair> pairs_;
    std::optional<c10::Device> device_;
    bool asked_for_cpu_ = false;
};

void host_kernel(const c10::OperatorHandle &op, c10::DispatchKeySet, Stack *stack) {
    note(toString(op.operator_name()));
    if (op.schema().name() == "aten::copy_") {
        auto given = torch::jit::last(*stack, 3);
        note_copy(given[0].toTensor(), given[1].toTensor(), given[2].toBool());
    }
    static const std::set<std::string> half_on_910a = {
        "aten::convolution", "aten::convolution_backward", "aten::max_pool2d_with_indices"};
    bool loses = is_910a() && half_on_910a.count(op.schema().name());
    Call call(op, stack);
    call.to_host();
    auto narrow = call.widen();
    if (loses) call.lose_what_half_does_not_hold();
    if (!computed_unlike_the_cpu(op, stack)) op.callBoxed(stack);
    if (loses) call.lose_what_half_does_not_hold_in_results();
    if (narrow != at::kFloat) call.narrow_results(narrow);
    call.copy_resized_outputs();
    call.to_npu();
}

// The kernel of an operator that works on any device, such as _to_copy, which is empty_strided and
// copy_.
void composite_kernel(const c10::OperatorHandle &op, c10::DispatchKeySet, Stack *stack) {
    note(toString(op.operator_name()));
    op.callBoxedForDispatchKey(DispatchKey::CompositeExplicitAutograd, *stack);
}

// torch_npu differentiates some operators in its own way, for its own kernels. This is PyTorch's.
void autograd_kernel(const c10::OperatorHandle &op, c10::DispatchKeySet, Stack *stack) {
    bool has_derivative = op.hasKernelForDispatchKey(DispatchKey::Autograd);
    op.callBoxedForDispatchKey(
        has_derivative ? DispatchKey::Autograd : DispatchKey::CompositeImplicitAutograd, *stack);
}

at::Tensor copy_from_and_resize(const at::Tensor &from, const at::Tensor &to) {
    to.resize_(from.sizes());
    to.copy_(from);
    return to;
}

at::Tensor npu_get_float_status(const at::Tensor &status, int64_t) {
    host_view(status).fill_(overflowed ? 1 : 0);
    return status;
}

at::Tensor npu_clear_float_status(const at::Tensor &status, int64_t) {
    overflowed = false;
    return status;
}

// torch_npu's memory and storage functions work as they are.
const std::set<std::string> kept = {
    "aten::empty",         "aten::empty_strided",        "aten::resize_",
    "aten::set_",          "aten::record_stream",        "aten::is_pinned",
    "aten::_pin_memory",   "aten::pin_memory",           "aten::_local_scalar_dense",
    "aten::is_set_to",     "aten::_copy_from_and_resize", "aten::_has_compatible_shallow_copy_type",
};

bool returns_view(const c10::FunctionSchema &schema) {
    for (const auto &value : schema.returns())
        if (value.alias_info() && !value.alias_info()->isWrite()) return true;
    return false;
}

}  // namespace

// Called once by the fake CANN's aclInit.
extern "C" void install_host_kernels() {
    static torch::Library kernels(torch::Library::IMPL, "aten", DispatchKey::PrivateUse1, __FILE__,
                                  __LINE__);
    static torch::Library autograd(torch::Library::IMPL, "aten", DispatchKey::AutogradPrivateUse1,
                                   __FILE__, __LINE__);
    auto &dispatcher = c10::Dispatcher::singleton();
    for (const auto &name : dispatcher.getAllOpNames()) {
        auto op = dispatcher.findSchema(name);
        if (!op || name.name.rfind("aten::", 0) != 0 || kept.count(name.name)) continue;
        std::string own_name = toString(name).substr(strlen("aten::"));
        if (op->hasKernelForDispatchKey(DispatchKey::PrivateUse1) && !returns_view(op->schema()))
            kernels.impl(own_name.c_str(),
                         name.name == "aten::_to_copy"
                             ? torch::CppFunction::makeFromBoxedFunction<&composite_kernel>()
                             : torch::CppFunction::makeFromBoxedFunction<&host_kernel>());
        if (op->hasKernelForDispatchKey(DispatchKey::AutogradPrivateUse1))
            autograd.impl(own_name.c_str(),
                          torch::CppFunction::makeFromBoxedFunction<&autograd_kernel>());
    }
    kernels.impl("_copy_from_and_resize", copy_from_and_resize);
    static torch::Library own(torch::Library::IMPL, "npu", DispatchKey::PrivateUse1, __FILE__,
                              __LINE__);
    own.impl("npu_get_float_status", npu_get_float_status);
    own.impl("npu_clear_float_status", npu_clear_float_status);
}

TORCH_LIBRARY(simulated_npu, library) {
    library.def("reset_calls", &reset_calls);
    library.def("take_calls", &take_calls);
}
