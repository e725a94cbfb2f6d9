#include "launching.h"
#include "midstream/cuda/launch.h"
#include "midstream/cuda/score.h"
#include "probes.h"
#include "score_tile.cuh"

namespace midstream::cuda {
namespace {

/// Rows to change in place, as the kernel takes them.
template <class Format>
struct Residual {
  typename Format::Bits* x;
  std::int64_t x_stride;
  typename Format::Bits* sum;  // the residual stream
  std::int64_t sum_stride;
  const typename Format::Bits* gamma;
  std::int64_t count;
  float norm_eps;
  bool aligned;  // x, sum and gamma allow 16-byte accesses
};

template <class Format>
__device__ __forceinline__ void store_vector(typename Format::Bits* row, int column, int width,
                                             bool aligned, const Vector<Format>& v) {
  if (aligned && column + kVector<Format> <= width) {
    *reinterpret_cast<uint4*>(row + column) = v.words;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector<Format>; ++i) {
    if (column + i < width) row[column + i] = v.at[i];
  }
}

/// Blocks for a processor at once, by registers: one loads while the other stands at a barrier.
/// Where a weight is one number that takes no spills.
template <class Kind>
constexpr int kBlocks = 1;
template <class F, int kRowTiles, int kProbeTiles>
constexpr int kBlocks<TensorCores<F, 1, kRowTiles, kProbeTiles>> = 2;

/// A block adds its rows, keeps the sums in shared memory, scores them there as score_kernel would
/// in global memory, and normalises them from there: x and residual are read and written once.
/// `kept_stride` is 0 for rows too wide for that; they are read again from the residual stream.
template <class Kind>
__global__ void __launch_bounds__(32 * kMostWarps, kBlocks<Kind>)
    add_rms_norm_score_kernel(Residual<typename Kind::Format> rows, int per_block, int kept_stride,
                              Weights weights, float* out, std::int64_t out_stride) {
  using Format = typename Kind::Format;
  using Bits = typename Format::Bits;
  constexpr int kStep = kVector<Format>;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * per_block;
  const int count =
      rows.count - first < per_block ? static_cast<int>(rows.count - first) : per_block;
  const int width = weights.width;
  const int warps = blockDim.x / 32, steps = (width + kStep - 1) / kStep;
  auto* kept = reinterpret_cast<Bits*>(dynamic_shared());
  const Partials<Kind> partials(reinterpret_cast<float*>(kept + per_block * kept_stride), warps);

  for (int i = threadIdx.x; i < count * steps; i += blockDim.x) {
    const int r = i / steps, column = i % steps * kStep;
    Bits* sum_row = rows.sum + (first + r) * rows.sum_stride;
    const Bits* x_row = rows.x + (first + r) * rows.x_stride;
    const Vector<Format> x = load_vector<Format>(x_row, column, width, rows.aligned);
    Vector<Format> sum = load_vector<Format>(sum_row, column, width, rows.aligned);
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      sum.at[j] = Format::round(Format::load(x.at[j]) + Format::load(sum.at[j]));
    }
    store_vector<Format>(sum_row, column, width, rows.aligned, sum);
    if (kept_stride > 0) *reinterpret_cast<uint4*>(kept + r * kept_stride + column) = sum.words;
  }
  __syncthreads();

  Tile<Format> tile = {kept, kept_stride, count, true, width, true};
  if (kept_stride == 0) {
    tile.row = rows.sum + first * rows.sum_stride;
    tile.stride = rows.sum_stride;
    tile.aligned = rows.aligned;
  }
  for (int probe = 0; probe < weights.probes; probe += Kind::kProbes) {
    const int left = weights.probes - probe, here = left < Kind::kProbes ? left : Kind::kProbes;
    if (probe > 0) __syncthreads();  // the partial sums before have been read
    partials.write(tile, weights, probe);
    __syncthreads();
    for (int i = threadIdx.x; i < count * here; i += blockDim.x) {
      const int row = i / here, p = i % here;
      out[(first + row) * out_stride + probe + p] = partials.logit(weights, row, probe, p);
    }
  }

  for (int r = 0; r < count; ++r) {
    const float mean = partials.sum_of_squares(r) / static_cast<float>(width);
    const float scale = 1.0f / sqrtf(mean + rows.norm_eps);
    Bits* x_row = rows.x + (first + r) * rows.x_stride;
    for (int i = threadIdx.x; i < steps; i += blockDim.x) {
      const int column = i * kStep;
      Vector<Format> v =
          load_vector<Format>(tile.row + r * tile.stride, column, width, tile.aligned);
      const Vector<Format> gamma = load_vector<Format>(rows.gamma, column, width, rows.aligned);
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        const typename Format::Bits normed = Format::round(Format::load(v.at[j]) * scale);
        v.at[j] = Format::round(Format::load(gamma.at[j]) * Format::load(normed));
      }
      store_vector<Format>(x_row, column, width, rows.aligned, v);
    }
  }
}

template <class Kind>
cudaError_t launch_norm(const Weights& weights, const NormRows& given, float* out,
                        std::int64_t out_stride, cudaStream_t stream) {
  using Format = typename Kind::Format;
  using Bits = typename Format::Bits;
  const int warps = score_warps(weights.width, Kind::kColumns);
  const std::int64_t partial = 4 * partial_floats<Kind>(warps);
  const NormTile tile =
      norm_tile(given.count, Kind::kRows, weights.width, sizeof(Bits), kSharedLimit - partial);
  const Residual<Format> rows = {static_cast<Bits*>(given.x),
                                 given.x_stride,
                                 static_cast<Bits*>(given.residual),
                                 given.residual_stride,
                                 static_cast<const Bits*>(given.gamma),
                                 given.count,
                                 given.norm_eps,
                                 is_aligned<Format>(given.x, given.x_stride) &&
                                     is_aligned<Format>(given.residual, given.residual_stride) &&
                                     is_aligned<Format>(given.gamma, 0)};
  const std::int64_t kept = static_cast<std::int64_t>(tile.per_block) * tile.kept_stride;
  return launch(add_rms_norm_score_kernel<Kind>,
                dim3(static_cast<unsigned>(ceil_div(given.count, tile.per_block))), 32 * warps,
                kept * static_cast<std::int64_t>(sizeof(Bits)) + partial, stream, rows,
                tile.per_block, tile.kept_stride, weights, out, out_stride);
}

}  // namespace

cudaError_t add_rms_norm_score(const Probes& probes, const NormRows& rows, float* out,
                               std::int64_t out_stride, cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  return with_kind<1, 1, 4>(probes, rows.dtype, [&](auto kind, const Weights& weights) {
    return launch_norm<typename decltype(kind)::type>(weights, rows, out, out_stride, stream);
  });
}

cudaError_t load_add_rms_norm_score_kernels() {
  return for_each_kind<1, 1, 4>(
      [](auto kind) { return preload(add_rms_norm_score_kernel<typename decltype(kind)::type>); });
}

}  // namespace midstream::cuda
