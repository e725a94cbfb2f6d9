// What the emulator must find, one kernel each. Prints what it said.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <functional>

#include "midstream/cuda/device.cuh"

namespace {

float* floats() { return reinterpret_cast<float*>(emulator::shared_memory()); }

void expect(const char* name, unsigned threads, const std::function<void()>& kernel) {
  try {
    emulator::run(dim3(1), dim3(threads), 4 * threads, kernel);
    std::printf("%s: nothing found\n", name);
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", name, error.what());
  }
}

}  // namespace

int main() {
  int sum = 0;
  emulator::run(dim3(1), dim3(64), 0, [&] {
    int value = static_cast<int>(threadIdx.x) % 32;
    for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
    __syncthreads();
    if (threadIdx.x == 63) sum = value;
  });
  std::printf("sum %d\n", sum);

  expect("divergent barrier", 64, [] {
    if (threadIdx.x < 32) __syncthreads();
  });
  expect("divergent warp", 32, [] {
    if (threadIdx.x > 0) __syncwarp();
  });
  expect("two operations", 32, [] {
    if (threadIdx.x == 0) {
      __syncwarp();
    } else {
      __ballot_sync(~0u, true);
    }
  });
  expect("overrun", 32, [] { floats()[32 + threadIdx.x] = 0.0f; });

  float seen[2];
  for (float& value : seen) {
    emulator::run(dim3(1), dim3(64), 4 * 64, [&] {
      floats()[threadIdx.x] = 1.0f;
      if (threadIdx.x == 0) value = floats()[63];  // no barrier between
    });
  }
  std::printf("missing barrier: results %s\n", seen[0] == seen[1] ? "agree" : "differ");

  // d = a b with a[i][k] = i + 16 k and b[k][n] = 1 at k = n: d[i][n] = i + 16 n.
  bool right = true;
  emulator::run(dim3(1), dim3(32), 0, [&] {
    const int group = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    const auto two = [](float low, float high) {
      return static_cast<std::uint32_t>(midstream::cuda::float_to_half(low)) |
             static_cast<std::uint32_t>(midstream::cuda::float_to_half(high)) << 16;
    };
    const auto a = [&](int row, int k) {
      return two(static_cast<float>(row + 16 * k), static_cast<float>(row + 16 * (k + 1)));
    };
    const auto b = [&](int k) { return two(k == group, k + 1 == group); };
    float d[4] = {};
    midstream::cuda::mma_f16(d, {a(group, 2 * t), a(group, 2 * t + 8)},
                             {a(group + 8, 2 * t), a(group + 8, 2 * t + 8)},
                             {b(2 * t), b(2 * t + 8)});
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? group : group + 8, n = 2 * t + i % 2;
      right = right && d[i] == static_cast<float>(row + 16 * n);
    }
  });
  std::printf("mma: %s\n", right ? "right" : "wrong");
  return 0;
}
