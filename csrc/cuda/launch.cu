// The only file with launches.
#include <cuda_runtime.h>

#include "run.cuh"

namespace tersor::cuda {
namespace {

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

 private:
  // The error is reported by us; left behind, it would be blamed on the next call of somebody else.
  static int forget(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error;
  }
};

}  // namespace

int quantize(const QuantizeParams& p, Stream stream) { return run_quantize(p, Launch{static_cast<cudaStream_t>(stream)}); }
int binarize(const BinarizeParams& p, Stream stream) { return run_binarize(p, Launch{static_cast<cudaStream_t>(stream)}); }
int linear(const LinearCall& call, const Plan& plan, Stream stream) {
  return run_linear(call, plan, Launch{static_cast<cudaStream_t>(stream)});
}

int multiprocessors(int device, int* count) { return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device); }

const char* error_text(int error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "the NVIDIA driver is older than the CUDA runtime of this build (CUDA 35); update the driver";
    case cudaErrorNoKernelImageForDevice:
      return "this build has no kernels for the GPU (CUDA 209); it needs compute capability 8.0 or higher";
    case cudaErrorInvalidConfiguration:
      return "the shape is beyond the largest grid (CUDA 9)";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
}

}  // namespace tersor::cuda
