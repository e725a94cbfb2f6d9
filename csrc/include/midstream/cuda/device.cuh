// What a kernel asks of the device beyond C++ and CUDA's own functions. The emulator of the tests
// puts another file of this name first on its include path; nothing else differs there.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace midstream::cuda {

/// Shared memory of the block, as large as the launch asked for.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ float half_to_float(std::uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ std::uint16_t float_to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

/// Two registers of four that one 16-byte load brings: columns as mma.m16n8k16 wants them.
struct Pair {
  std::uint32_t low, high;
};

// d += a b for a 16 x 16 and b 16 x 8. With group = lane / 4 and t = lane % 4, a lane holds of a
// the rows group (`top`) and group + 8 (`bottom`), columns 2t, 2t+1 (low) and 2t+8, 2t+9 (high); of
// b the column group, rows likewise; of d the columns 2t, 2t+1 of row group, then of group + 8.
// All lanes must come together: __syncwarp() stands before the first one after a branch.

__device__ __forceinline__ void mma_bf16(float (&d)[4], Pair top, Pair bottom, Pair b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(top.low), "r"(bottom.low), "r"(top.high), "r"(bottom.high), "r"(b.low), "r"(b.high));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], Pair top, Pair bottom, Pair b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(top.low), "r"(bottom.low), "r"(top.high), "r"(bottom.high), "r"(b.low), "r"(b.high));
}

}  // namespace midstream::cuda
