// Stands in for csrc/include/midstream/cuda/device.cuh.
#pragma once

#include <cuda_runtime.h>
#include <immintrin.h>

#include <cstdint>

namespace midstream::cuda {

inline unsigned char* dynamic_shared() { return emulator::shared_memory(); }

inline float half_to_float(std::uint16_t bits) { return _cvtsh_ss(bits); }
inline std::uint16_t float_to_half(float value) {
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}

struct Pair {
  std::uint32_t low, high;
};

inline void emulated_mma(emulator::Operation operation, float (&d)[4], Pair top, Pair bottom,
                         Pair b) {
  auto& lane = emulator::lane();
  // Registers in the order of the PTX instruction.
  lane.a[0] = top.low, lane.a[1] = bottom.low, lane.a[2] = top.high, lane.a[3] = bottom.high;
  lane.b[0] = b.low, lane.b[1] = b.high;
  for (int i = 0; i < 4; ++i) lane.d[i] = d[i];
  emulator::wait(operation, ~0u);
  for (int i = 0; i < 4; ++i) d[i] = lane.d[i];
}
inline void mma_bf16(float (&d)[4], Pair top, Pair bottom, Pair b) {
  emulated_mma(emulator::Operation::mma_bf16, d, top, bottom, b);
}
inline void mma_f16(float (&d)[4], Pair top, Pair bottom, Pair b) {
  emulated_mma(emulator::Operation::mma_f16, d, top, bottom, b);
}

}  // namespace midstream::cuda
