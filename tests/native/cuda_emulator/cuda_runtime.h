// CUDA's language and device functions, for a C++ compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::isfinite;
using std::isinf;

struct alignas(8) uint2 {
  std::uint32_t x, y;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
  return {x, y, z, w};
}

template <class To, class From>
To emulator_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &value, sizeof to);
  return to;
}
inline float __uint_as_float(std::uint32_t bits) { return emulator_bits<float>(bits); }
inline std::uint32_t __float_as_uint(float value) { return emulator_bits<std::uint32_t>(value); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }

inline void __syncthreads() { emulator::wait(emulator::Operation::block_barrier, ~0u); }
inline void __syncwarp(unsigned mask = ~0u) {
  emulator::wait(emulator::Operation::warp_barrier, mask);
}

template <class T>
T emulator_shuffle(unsigned mask, T value, int source) {
  auto& lane = emulator::lane();
  lane.word = emulator_bits<std::uint32_t>(value);
  lane.source = source;
  emulator::wait(emulator::Operation::shuffle, mask);
  return emulator_bits<T>(lane.word);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator_shuffle(mask, value, source % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return emulator_shuffle(mask, value, static_cast<int>(threadIdx.x % 32) ^ with);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int lane = static_cast<int>(threadIdx.x % 32), source = lane - static_cast<int>(by);
  return emulator_shuffle(mask, value, source < 0 ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, bool set) {
  emulator::lane().word = set;
  emulator::wait(emulator::Operation::ballot, mask);
  return emulator::lane().word;
}
inline bool __any_sync(unsigned mask, bool set) { return __ballot_sync(mask, set) != 0; }
inline unsigned __match_any_sync(unsigned mask, int value) {
  emulator::lane().word = static_cast<std::uint32_t>(value);
  emulator::wait(emulator::Operation::match, mask);
  return emulator::lane().word;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};
struct cudaFuncAttributes {};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                [&] { kernel(arguments...); });
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Parameters...)) {
  return cudaSuccess;
}
