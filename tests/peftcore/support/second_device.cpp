// A device of its own for tests without a GPU: "second". Its memory is the host's and its arithmetic is the CPU's, but an
// operation of one of its tensors and a CPU tensor with dimensions is an error, as with a GPU.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <string>

namespace {

using c10::SymInt;
using c10::SymIntArrayRef;
using std::optional;

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device SECOND(TYPE, 0);

// -- memory, streams and random numbers --------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* start = c10::alloc_cpu(bytes ? bytes : 1);
    return {start, start, &c10::free_cpu, SECOND};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(TYPE, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return SECOND; }
  c10::Device getDevice() const override { return SECOND; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, SECOND); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct SecondGenerator : at::CPUGeneratorImpl {
  explicit SecondGenerator(uint64_t seed = c10::default_rng_seed_val) : at::CPUGeneratorImpl(seed) {
    device_ = SECOND;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::make_generator<SecondGenerator>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<SecondGenerator>(); }
  at::Device getDeviceFromPtr(void*) const override { return SECOND; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = memory.allocate(bytes);
    std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    auto& changed = const_cast<c10::Storage&>(storage);
    changed.set_data_ptr_noswap(std::move(fresh));
    changed.set_nbytes(bytes);
  }
};

// -- tensors, views and copies -----------------------------------------------------------------------------------

at::Tensor on_cpu(const at::Tensor& tensor) {  // the same memory as a CPU tensor
  if (tensor.device().type() != TYPE) return tensor;
  auto* start = static_cast<char*>(tensor.storage().mutable_data()) + tensor.storage_offset() * tensor.itemsize();
  auto options = tensor.options().device(at::kCPU).requires_grad(false);
  auto alias = at::from_blob(start, tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
  alias._set_conj(tensor.is_conj());
  alias._set_neg(tensor.is_neg());
  return alias;
}

at::Tensor on_second(const at::Tensor& tensor) {  // a copy; undefined stays undefined
  if (!tensor.defined()) return tensor;
  auto copy = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(SECOND));
  on_cpu(copy).copy_(tensor);
  return copy;
}

at::Tensor empty(SymIntArrayRef size, optional<at::ScalarType> type, optional<at::Layout>, optional<at::Device>,
                 optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, optional<at::ScalarType> type,
                         optional<at::Layout>, optional<at::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(type));
}

at::Tensor as_strided(const at::Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, optional<SymInt> offset) {
  auto start = offset ? optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor view(const at::Tensor& self, SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& self) { return on_cpu(self).item(); }

const at::Tensor& resize(const at::Tensor& self, SymIntArrayRef size, optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, storage, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  return at::native::set_storage_cpu_(self, storage, 0, {static_cast<int64_t>(storage.nbytes() / self.itemsize())}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return at::native::set_storage_cpu_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// -- convolutions, which have no fallback ------------------------------------------------------------------------

void check_same(const at::Tensor& one, const at::Tensor& other) {
  TORCH_CHECK(one.device() == other.device(), "Expected all tensors to be on the same device, but found ", one.device(),
              " and ", other.device());
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const optional<at::Tensor>& bias,
                       SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed,
                       SymIntArrayRef output_padding, SymInt groups) {
  check_same(x, weight);
  optional<at::Tensor> bias_on_cpu;
  if (bias && bias->defined()) {
    check_same(x, *bias);
    bias_on_cpu = on_cpu(*bias);
  }
  return on_second(at::convolution(on_cpu(x), on_cpu(weight), bias_on_cpu, C10_AS_INTARRAYREF_SLOW(stride),
                                   C10_AS_INTARRAYREF_SLOW(padding), C10_AS_INTARRAYREF_SLOW(dilation), transposed,
                                   C10_AS_INTARRAYREF_SLOW(output_padding), groups.expect_int()));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, SymIntArrayRef stride,
    SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups,
    std::array<bool, 3> wanted) {
  std::vector<int64_t> biases = {gradient.size(1)};
  auto [of_x, of_weight, of_bias] = at::convolution_backward(
      on_cpu(gradient), on_cpu(x), on_cpu(weight), at::OptionalIntArrayRef(biases), C10_AS_INTARRAYREF_SLOW(stride),
      C10_AS_INTARRAYREF_SLOW(padding), C10_AS_INTARRAYREF_SLOW(dilation), transposed,
      C10_AS_INTARRAYREF_SLOW(output_padding), groups.expect_int(), wanted);
  return {on_second(of_x), on_second(of_weight), on_second(of_bias)};
}

// -- all other operations, by the CPU ----------------------------------------------------------------------------

const std::set<std::string> INDEXING = {  // a GPU takes indices from the CPU, too
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::_unsafe_index.Tensor", "aten::index_put",
    "aten::index_put_",   "aten::_index_put_impl_"};

void check_not_on_cpu(const at::Tensor& tensor, const std::string& operation) {
  TORCH_CHECK(!tensor.defined() || !tensor.device().is_cpu() || !tensor.dim() || INDEXING.count(operation),
              "Expected all tensors to be on the same device, but ", operation, " was given a CPU tensor of shape ",
              tensor.sizes());
}

void by_cpu(const c10::OperatorHandle& operation, c10::DispatchKeySet, torch::jit::Stack* stack) {
  std::string name = toString(operation.schema().operator_name());
  auto count = operation.schema().arguments().size();
  for (size_t place = stack->size() - count; place < stack->size(); place++) {
    auto& value = (*stack)[place];
    if (value.isTensor()) check_not_on_cpu(value.toTensor(), name);
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorVector()) check_not_on_cpu(tensor, name);
    if (value.isOptionalTensorList())
      for (const optional<at::Tensor>& tensor : value.toOptionalTensorVector())
        if (tensor) check_not_on_cpu(*tensor, name);
    if (value.isGenerator() && value.toGenerator().defined()) {
      auto given = value.toGenerator();
      TORCH_CHECK(given.device().type() == TYPE, "Expected a generator of the second device, found ", given.device());
      auto same = at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val);
      same.set_state(given.get_state());
      value = same;
      at::native::cpu_fallback(operation, stack);
      given.set_state(same.get_state());
      return;
    }
  }
  at::native::cpu_fallback(operation, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("view_as_real", &at::native::view_as_real);
  library.impl("view_as_complex", &at::native::view_as_complex);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &item);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }
TORCH_LIBRARY_IMPL(aten, Conjugate, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

namespace at::native {
int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                        std::optional<double>, bool) {
  return 0;
}
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &plain_attention)
}  // namespace at::native

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  module.def("default_generator", [] { return at::globalContext().defaultGenerator(SECOND); });
}
