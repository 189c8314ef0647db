// The only file with launches.
#include <cuda_runtime.h>

#include "run.cuh"

namespace tersor::cuda {
namespace {

// The error is reported by us; left behind, it would be blamed on the next call of somebody else.
int forget(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

struct Launch {
  cudaStream_t stream;

  template <typename Params>
  int operator()(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, const Params& params) const {
    if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
    if (shared_bytes > 48 * 1024) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      if (error != cudaSuccess) return forget(error);
    }
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    kernel<<<blocks, threads, shared_bytes, stream>>>(params);
    return forget(cudaPeekAtLastError());
  }
};

}  // namespace

int quantize(const QuantizeParams& p, Stream stream) { return run_quantize(p, Launch{static_cast<cudaStream_t>(stream)}); }
int binarize(const BinarizeParams& p, Stream stream) { return run_binarize(p, Launch{static_cast<cudaStream_t>(stream)}); }
int normalize(const NormParams& p, Stream stream) { return run_norm(p, Launch{static_cast<cudaStream_t>(stream)}); }
int linear(const LinearCall& call, const Plan& plan, Stream stream) {
  return run_linear(call, plan, Launch{static_cast<cudaStream_t>(stream)});
}

int use_device(int device, Gpu* gpu) {
  int current = -1, major = 0, minor = 0;
  // Setting a device makes a context on it: not done where it is the current one anyway.
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&gpu->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  gpu->sm = 10 * major + minor;
  return forget(error);
}

const char* error_text(int error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "no NVIDIA driver, or one older than the CUDA runtime of this build (error 35); install or update the driver";
    case cudaErrorNoDevice:
      return "no NVIDIA GPU is visible (error 100); see nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorNoKernelImageForDevice:
      return "this build has no kernels for the GPU (error 209); it needs compute capability 8.0 or higher";
    case cudaErrorInvalidConfiguration:
      return "the shape is beyond the largest grid (error 9)";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
}

}  // namespace tersor::cuda
