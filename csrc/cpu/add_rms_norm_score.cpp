#include "midstream/add_rms_norm_score.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "score_rows.h"
#include "thread_pool.h"

namespace midstream {
namespace {

/// Rows that are added, scored and normalised before the next: four of 4096 bf16 fit a level 1
/// cache, so that memory is read and written once.
constexpr std::int64_t kRowsAtOnce = 4;

struct Call {
  RowKernel kernel;
  AddRow add;
  NormRow norm;
  std::int64_t row_bytes_x;
  std::int64_t row_bytes_residual;
  const NormRows& rows;
  const Logits& logits;
};

void run(const void* context, std::int64_t begin, std::int64_t end) {
  const Call& call = *static_cast<const Call*>(context);
  const NormRows& rows = call.rows;
  const std::int64_t width = call.kernel.packed.width;
  for (std::int64_t first = begin; first < end; first += kRowsAtOnce) {
    const std::int64_t count = std::min(kRowsAtOnce, end - first);
    std::byte* x = static_cast<std::byte*>(rows.x) + first * call.row_bytes_x;
    std::byte* residual = static_cast<std::byte*>(rows.residual) + first * call.row_bytes_residual;
    float squares[kRowsAtOnce];
    for (std::int64_t r = 0; r < count; ++r) {
      squares[r] =
          call.add(x + r * call.row_bytes_x, residual + r * call.row_bytes_residual, width);
    }
    call.kernel.run(call.kernel.packed,
                    {residual, rows.residual_stride, count,
                     call.logits.data + first * call.logits.stride, call.logits.stride});
    for (std::int64_t r = 0; r < count; ++r) {
      const float scale = 1.0f / std::sqrt(squares[r] / static_cast<float>(width) + rows.eps);
      call.norm(residual + r * call.row_bytes_residual, rows.gamma, scale, x + r * call.row_bytes_x,
                width);
    }
  }
}

}  // namespace

void add_rms_norm_score(const Probes& probes, const NormRows& rows, const Logits& logits,
                        int threads) {
  const Family& kernels = family(probes.isa());
  const int dtype = static_cast<int>(rows.dtype);
  const std::int64_t size = rows.dtype == DType::float32 ? 4 : 2;
  const Call call{row_kernel(probes, rows.dtype),
                  kernels.add[dtype],
                  kernels.norm[dtype],
                  rows.x_stride * size,
                  rows.residual_stride * size,
                  rows,
                  logits};
  parallel_rows(rows.rows, threads_for(probes, rows.rows, threads), kRowGrain, run, &call);
}

}  // namespace midstream
