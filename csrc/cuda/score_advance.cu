#include "advance_run.cuh"
#include "launching.h"
#include "midstream/cuda/launch.h"
#include "midstream/cuda/score.h"
#include "probes.h"
#include "score_tile.cuh"

namespace midstream::cuda {
namespace {

/// Blocks and runs as in advance_kernel; a run's logits are computed where they are needed, by the
/// code of score_kernel, and never stand in global memory.
template <class Kind>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    score_advance_kernel(Tile<typename Kind::Format> hidden, Weights weights, Rows rows,
                         Tables tables, int chunk) {
  const std::int64_t first = blockIdx.x;
  const int probes = weights.probes;
  if (!known(tables, rows.slot[first])) {
    for (int p = threadIdx.x; p < probes; p += blockDim.x) {
      rows.logits[first * rows.logits_stride + p] = quiet_nan();
    }
    return;
  }
  if (!leads(rows, first)) return;
  const int warps = blockDim.x / 32;
  auto* sums = reinterpret_cast<float*>(dynamic_shared());
  const Partials<Kind> partials(sums, warps);
  auto* memory = reinterpret_cast<unsigned char*>(sums + partial_floats<Kind>(warps));

  const auto load = [&](const RunMemory& m, std::int64_t begin, int count) {
    for (int done = 0; done < count; done += Kind::kRows) {
      Tile<typename Kind::Format> x = hidden;
      x.row += (begin + done) * x.stride;
      x.count = count - done < Kind::kRows ? count - done : Kind::kRows;
      for (int probe = 0; probe < probes; probe += Kind::kProbes) {
        const int here = probes - probe < Kind::kProbes ? probes - probe : Kind::kProbes;
        partials.write(x, weights, probe);
        __syncthreads();
        for (int i = threadIdx.x; i < x.count * here; i += blockDim.x) {
          const int row = i / here, p = i % here;
          m.z[(done + row) * probes + probe + p] = partials.logit(weights, row, probe, p);
        }
        __syncthreads();
      }
    }
    for (int i = threadIdx.x; i < count * probes; i += blockDim.x) {
      rows.logits[(begin + i / probes) * rows.logits_stride + i % probes] = quiet_nan();
    }
  };
  advance_run(rows, tables, first, chunk, memory, load);
}

template <class Kind>
cudaError_t launch_score_advance(const Weights& weights, const HiddenRows& hidden, const Rows& rows,
                                 const Tables& tables, cudaStream_t stream) {
  using Format = typename Kind::Format;
  const int warps = score_warps(weights.width, Kind::kColumns);
  const std::int64_t partial = 4 * partial_floats<Kind>(warps);
  const int most = rows.count < 16 ? static_cast<int>(rows.count) : 16;
  const int chunk = advance_chunk(tables.sizes, most, kSharedLimit - partial);
  const Tile<Format> x = {
      static_cast<const typename Format::Bits*>(hidden.data), hidden.stride, 0,
      is_aligned<Format>(hidden.data, hidden.stride),         weights.width, weights.rms_norm};
  return launch(score_advance_kernel<Kind>, dim3(static_cast<unsigned>(rows.count)), 32 * warps,
                partial + advance_bytes(tables.sizes, chunk), stream, x, weights, rows, tables,
                chunk);
}

}  // namespace

bool fits_score_advance(const Sizes& sizes) {
  // The most that partial sums take: 16 warps with 16 rows and 8 probes.
  constexpr int kPartial = 4 * kMostWarps * 16 * 9;
  return advance_chunk(sizes, 1, kSharedLimit - kPartial) == 1;
}

cudaError_t score_advance(const Probes& probes, const HiddenRows& hidden, const Rows& rows,
                          const Tables& tables, cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  return with_kind<1, 1, 1>(probes, hidden.dtype, [&](auto kind, const Weights& weights) {
    using Kind = typename decltype(kind)::type;
    return launch_score_advance<Kind>(weights, hidden, rows, tables, stream);
  });
}

cudaError_t load_score_advance_kernels() {
  return for_each_kind<1, 1, 1>(
      [](auto kind) { return preload(score_advance_kernel<typename decltype(kind)::type>); });
}

}  // namespace midstream::cuda
