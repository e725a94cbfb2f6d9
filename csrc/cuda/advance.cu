#include "advance_run.cuh"
#include "launching.h"
#include "midstream/cuda/advance.h"
#include "midstream/cuda/launch.h"

namespace midstream::cuda {
namespace {

/// One block per row. The block of a run's first row folds the whole run, every other one leaves at
/// once: nothing is sorted or counted beforehand, and decode and prefill are the same launch.
__global__ void __launch_bounds__(128, 1) advance_kernel(Rows rows, Tables tables, int chunk) {
  const std::int64_t first = blockIdx.x;
  const int probes = static_cast<int>(tables.sizes.probes);
  if (!known(tables, rows.slot[first])) {
    for (int p = threadIdx.x; p < probes; p += blockDim.x) {
      rows.logits[first * rows.logits_stride + p] = quiet_nan();
    }
    return;
  }
  if (!leads(rows, first)) return;
  const auto load = [&](const RunMemory& m, std::int64_t begin, int count) {
    for (int i = threadIdx.x; i < count * probes; i += blockDim.x) {
      float* logit = rows.logits + (begin + i / probes) * rows.logits_stride + i % probes;
      m.z[i] = *logit;
      *logit = quiet_nan();
    }
  };
  advance_run(rows, tables, first, chunk, dynamic_shared(), load);
}

}  // namespace

bool fits(const Sizes& sizes) { return advance_chunk(sizes, 1, kSharedLimit) == 1; }

cudaError_t advance(const Rows& rows, const Tables& tables, cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  const int most = rows.count < 32 ? static_cast<int>(rows.count) : 32;
  const int chunk = advance_chunk(tables.sizes, most, kSharedLimit);
  return launch(advance_kernel, dim3(static_cast<unsigned>(rows.count)),
                advance_threads(rows.count), advance_bytes(tables.sizes, chunk), stream, rows,
                tables, chunk);
}

cudaError_t load_advance_kernels() { return preload(advance_kernel); }

}  // namespace midstream::cuda
