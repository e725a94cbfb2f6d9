#include "launching.h"
#include "midstream/cuda/score.h"
#include "probes.h"
#include "score_tile.cuh"

namespace midstream::cuda {
namespace {

template <class Kind>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    score_kernel(Tile<typename Kind::Format> x, std::int64_t rows, int per_block, Weights weights,
                 float* out, std::int64_t out_stride) {
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * per_block;
  const int first_probe = static_cast<int>(blockIdx.y) * Kind::kProbes;
  x.row += first_row * x.stride;
  x.count = rows - first_row < per_block ? static_cast<int>(rows - first_row) : per_block;
  const Partials<Kind> partials(reinterpret_cast<float*>(dynamic_shared()), blockDim.x / 32);
  partials.write(x, weights, first_probe);
  __syncthreads();
  const int left = weights.probes - first_probe;
  const int probes = left < Kind::kProbes ? left : Kind::kProbes;
  for (int i = threadIdx.x; i < x.count * probes; i += blockDim.x) {
    const int row = i / probes, p = i % probes;
    out[(first_row + row) * out_stride + first_probe + p] =
        partials.logit(weights, row, first_probe, p);
  }
}

template <class Kind>
cudaError_t launch_score(const HiddenRows& hidden, const Weights& weights, float* out,
                         std::int64_t out_stride, cudaStream_t stream) {
  using Format = typename Kind::Format;
  const int warps = score_warps(weights.width, Kind::kColumns);
  const int per_block = rows_per_block(hidden.count, Kind::kRows);
  const Tile<Format> x = {
      static_cast<const typename Format::Bits*>(hidden.data), hidden.stride, 0,
      is_aligned<Format>(hidden.data, hidden.stride),         weights.width, weights.rms_norm};
  const dim3 grid(static_cast<unsigned>(ceil_div(hidden.count, per_block)),
                  static_cast<unsigned>(ceil_div(weights.probes, Kind::kProbes)));
  return launch(score_kernel<Kind>, grid, 32 * warps, 4 * partial_floats<Kind>(warps), stream, x,
                hidden.count, per_block, weights, out, out_stride);
}

/// Call `use` with the tile for this many probes and rows: more rows share the weights in prefill.
/// Of 9 to 16 probes a tile of 32 would read as many zeros as weights: 256 KiB for 16 rows that are
/// 128 KiB themselves, at d = 4096 in bf16. Weights in three parts have 16 probes in that tile.
template <class Use>
cudaError_t with_tile(const Probes& probes, DType dtype, std::int64_t rows, Use use) {
  const bool prefill = rows > kBlocksToFill * 16;
  const bool in_parts = dtype == DType::bfloat16 && probes.bfloat16_parts > 1;
  if (probes.probes > (in_parts ? 8 : 16)) return with_kind<1, 4, 4>(probes, dtype, use);
  if (probes.probes > 8 && prefill) return with_kind<2, 2, 4>(probes, dtype, use);
  if (probes.probes > 8) return with_kind<1, 2, 4>(probes, dtype, use);
  if (prefill) return with_kind<2, 1, 4>(probes, dtype, use);
  return with_kind<1, 1, 1>(probes, dtype, use);
}

}  // namespace

cudaError_t score(const Probes& probes, const HiddenRows& hidden, float* out,
                  std::int64_t out_stride, cudaStream_t stream) {
  if (hidden.count == 0) return cudaSuccess;
  return with_tile(probes, hidden.dtype, hidden.count, [&](auto kind, const Weights& weights) {
    return launch_score<typename decltype(kind)::type>(hidden, weights, out, out_stride, stream);
  });
}

cudaError_t load_score_kernels() {
  const auto load = [](auto kind) { return preload(score_kernel<typename decltype(kind)::type>); };
  cudaError_t error = for_each_kind<1, 1, 1>(load);
  if (error == cudaSuccess) error = for_each_kind<2, 1, 4>(load);
  if (error == cudaSuccess) error = for_each_kind<1, 2, 4>(load);
  if (error == cudaSuccess) error = for_each_kind<2, 2, 4>(load);
  if (error == cudaSuccess) error = for_each_kind<1, 4, 4>(load);
  return error;
}

}  // namespace midstream::cuda
