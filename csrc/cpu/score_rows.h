// The kernel for rows of a dtype, and the weights that it reads.
#pragma once

#include "families.h"
#include "midstream/score.h"

namespace midstream {

/// Multiply-adds that one thread should at least have: 120 us with AVX512-BF16 on a Zen 5 core. To
/// wake another thread took some 60 us there when other programs kept the cores busy.
constexpr std::int64_t kWorkPerThread = std::int64_t{1} << 24;
/// Rows that threads take at a time: a block of every kernel.
constexpr std::int64_t kRowGrain = 32;

struct RowKernel {
  ScoreRows run;
  Packed packed;
};

RowKernel row_kernel(const Probes& probes, DType rows);

const Family& family(Isa isa);

/// At most `threads`, fewer where the work is small.
int threads_for(const Probes& probes, std::int64_t rows, int threads);

}  // namespace midstream
