// A device of torch whose memory is the host's: each operation is the CPU's, on the same bytes.
//
// As on a GPU, an operation does not take tensors of the host and of the device together.

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdlib>
#include <string>

namespace {

constexpr auto DEVICE = c10::DeviceType::PrivateUse1;
constexpr int COUNT = 8;
thread_local c10::DeviceIndex current = 0;

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {data, data, &std::free, c10::Device(DEVICE, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(DEVICE, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto before = getDevice();
    uncheckedSetDevice(d);
    return before;
  }
  c10::Device getDevice() const override { return {DEVICE, current}; }
  void setDevice(c10::Device d) const override { uncheckedSetDevice(d); }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(c10::Device d) const override { return getStream(d); }
  c10::Stream getNewStream(c10::Device d, int) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return getStream(s.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return COUNT; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex i) const override { current = i; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = at::globalContext().defaultGenerator(c10::Device(c10::kCPU));
    return generator;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    auto fresh = allocator.allocate(bytes);
    std::memcpy(fresh.mutable_get(), impl->data(), std::min(bytes, impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(fresh));
    impl->set_nbytes(bytes);
  }
};

bool on_device(const at::Tensor& t) { return t.defined() && t.device().type() == DEVICE; }

// The same bytes as a tensor of the CPU, which keeps them alive.
at::Tensor host(const at::Tensor& t) {
  auto storage = t.storage();
  if (!storage.nbytes()) return at::empty_strided(t.sizes(), t.strides(), t.options().device(c10::kCPU));
  auto* base = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data(), base, [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::Device(c10::kCPU));
  c10::Storage mine(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(mine), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) result._set_conj(true);
  if (t.is_neg()) result._set_neg(true);
  return result;
}

// And the other way about.
at::Tensor device(const at::Tensor& t, c10::DeviceIndex index) {
  auto storage = t.storage();
  auto* base = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data(), base, [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::Device(DEVICE, index));
  c10::Storage mine(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), &allocator, true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(mine), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return result;
}

struct Swapped { at::Tensor original, alias; };

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.operator_name().name;
  const auto count = schema.arguments().size(), begin = stack->size() - count;
  std::vector<Swapped> swapped;
  bool from_host = false;
  c10::DeviceIndex index = current;
  auto swap = [&](const at::Tensor& t) -> at::Tensor {
    if (!on_device(t)) {
      from_host |= t.defined() && t.dim() > 0;
      return t;
    }
    index = t.device().index();
    swapped.push_back({t, host(t)});
    return swapped.back().alias;
  };
  for (size_t i = begin; i < begin + count; ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = swap(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(swap(t));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional<at::Tensor>(swap(*t)) : t);
      value = list;
    } else if (value.isList() && value.toListRef().size() && value.toListRef()[0].isTensorList()) {
      c10::List<c10::List<at::Tensor>> lists;
      for (const auto& each : value.toListRef()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& t : each.toTensorVector()) list.push_back(swap(t));
        lists.push_back(list);
      }
      value = lists;
    } else if (value.isDevice() && value.toDevice().type() == DEVICE) {
      value = c10::Device(c10::kCPU);
    }
  }
  const bool indexes = name.find("index") != std::string::npos;
  TORCH_CHECK(!from_host || indexes || swapped.empty(), name,
              ": Expected all tensors to be on the same device, but found the host's beside the device's");
  op.callBoxed(stack);
  for (auto& each : swapped) {  // what the operation has given another size
    if (each.alias.sizes() == each.original.sizes()) continue;
    at::AutoDispatchBelowADInplaceOrView below;
    each.original.resize_(each.alias.sizes());
    host(each.original).copy_(each.alias);
  }
  auto back = [&](const at::Tensor& t) -> at::Tensor {
    if (!t.defined() || !t.is_cpu()) return t;
    for (auto& each : swapped)
      if (each.alias.is_same(t)) return each.original;
    return swapped.empty() && from_host ? t : device(t, index);
  };
  const auto returned = schema.returns().size();
  for (size_t i = stack->size() - returned; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(back(t));
      value = list;
    } else if (value.isList() && value.toListRef().size() && value.toListRef()[0].isTensorList()) {
      c10::List<c10::List<at::Tensor>> lists;
      for (const auto& each : value.toListRef()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& t : each.toTensorVector()) list.push_back(back(t));
        lists.push_back(list);
      }
      value = lists;
    }
  }
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> where, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(where.value_or(c10::Device(DEVICE, current)));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::kFloat), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> where, std::optional<bool>) {
  c10::DeviceGuard guard(where.value_or(c10::Device(DEVICE, current)));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::kFloat));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  auto target = on_device(to) ? host(to) : to;
  target.copy_(on_device(self) ? host(self) : self);
  return to;
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  const auto bytes = at::detail::computeStorageNbytesContiguous(sizes, self.dtype().itemsize(), self.storage_offset());
  if (self.storage().nbytes() < bytes) Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  return self;
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> at_offset;
  if (offset) at_offset = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at_offset);
}
at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }
at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto strides = C10_AS_INTARRAYREF_SLOW(stride);
  const auto start = offset.guard_int(__FILE__, __LINE__);
  if (strides.size() == sizes.size()) impl->set_sizes_and_strides(sizes, strides, start);
  else { impl->set_storage_offset(start); impl->set_sizes_contiguous(sizes); }
  return self;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("resize_", &resize);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage", &at::native::set_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  // Composites of operations that other backends bring.
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&compute>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&compute>());
}

// Some of what autocast does on CUDA.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
}

// Which look up a backend of the device: gloo computes on the same bytes.
TORCH_LIBRARY_IMPL(c10d, PrivateUse1, m) {
  for (auto name : {"allreduce_", "allreduce_coalesced_", "broadcast_", "allgather_", "_allgather_base_",
                    "allgather_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_",
                    "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_",
                    "alltoall_", "alltoall_base_", "send", "recv_", "recv_any_source_", "barrier"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute>());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("register_hooks", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  m.def("set_device", [](int index) { current = static_cast<c10::DeviceIndex>(index); });
  m.def("current_device", [] { return static_cast<int>(current); });
}
