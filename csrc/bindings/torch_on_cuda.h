// One CUDA device as the place of a call's tensors: its guard, its stream, its memory.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "../cuda/launch.h"
#include "torch_layers.h"

namespace {

// Of the call under way on this thread; bindings do not call each other.
inline thread_local int32_t call_device = -1;

inline std::string cuda_name(int32_t index) { return "cuda:" + std::to_string(index); }

inline void check_place(const char* function, const char* name, const Tensor& t) {
  if (!t.is_cuda()) fail(function, name, " is not on ", cuda_name(call_device), "; move every tensor of the call to one device");
  if (t.get_device_index() != call_device) {
    fail(function, name, " is on ", cuda_name(t.get_device_index()), ", the first argument on ", cuda_name(call_device),
         "; move every tensor of the call to one device");
  }
}

// From torch's caching allocator: safe on this thread's current stream, and inside a CUDA graph.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  return empty_at(sizes, type, aoti_torch_device_type_cuda(), call_device);
}

inline void check_cuda(const char* function, int error) {
  if (error) throw std::runtime_error(std::string(function) + ": " + tersor::cuda::error_text(error));
}

// torch's current stream, out of the libtorch_cuda that this process has loaded: linked, this library would ask for one.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);
inline CurrentStream find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch_cuda ? reinterpret_cast<CurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

inline CurrentStream current_stream(const char* function) {
  static const CurrentStream found = find_current_stream();  // torch loads it before there is a CUDA tensor
  if (found) return found;
  throw std::runtime_error(std::string(function) +
                           ": got a CUDA tensor, but this torch is a build without CUDA (libtorch_cuda.so is not loaded); install "
                           "one with CUDA, see pytorch.org, or move module and inputs to the CPU");
}

// Everything one call needs of its device; the device of the first argument. Nothing here waits for the GPU.
class CudaCall {
 public:
  CudaCall(const char* function, const Tensor& first)
      : function_(function),
        stream_of_(current_stream(function)),
        guard_((check_first(function, first), first.get_device_index())) {
    call_device = first.get_device_index();
    check_cuda(function, tersor::cuda::use_device(call_device, &gpu));
    STABLE_TORCH_ERROR_CODE_CHECK(stream_of_(call_device, &stream));
  }

  // Bytes that live until the kernels which read them are done: torch gives them out again in stream order.
  void* scratch(int64_t bytes) {
    if (bytes == 0) return nullptr;
    keep.push_back(empty({bytes}, ScalarType::Byte));
    return keep.back().mutable_data_ptr();
  }
  void check(int error) const { check_cuda(function_, error); }

  tersor::cuda::Gpu gpu{};
  void* stream = nullptr;
  Keep keep;

 private:
  static void check_first(const char* function, const Tensor& first) {
    if (!first.is_cuda()) fail(function, "the first argument is not on a CUDA device; move every tensor of the call to one device");
  }

  const char* function_;
  CurrentStream stream_of_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace
