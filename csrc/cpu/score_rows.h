// The kernel for rows of a dtype, and the weights that it reads.
#pragma once

#include "families.h"
#include "midstream/score.h"

namespace midstream {

/// Multiply-adds that one thread should at least have: some 15 us on one AVX-512 core, a few times
/// what waking another one takes.
constexpr std::int64_t kWorkPerThread = std::int64_t{1} << 21;
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
