// Launching and loading kernels, in one place.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace midstream::cuda {

/// Launch on `stream`. Programmatic dependent launch stays off: a kernel that started early would
/// have to wait before it reads hidden rows or tables, which is nearly all it does, and kernels of
/// other libraries that follow would have to know that this one is not done.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::int64_t shared,
                   cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

/// Load a kernel onto the current device. CUDA does it lazily, at the first launch.
template <class... Parameters>
cudaError_t preload(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

}  // namespace midstream::cuda
