// A few threads that wait for work. Rows are shared out among them, so bits do not depend on it.
#pragma once

#include <cstdint>

namespace midstream {

/// Runs body(context, begin, end) over [0, rows), cut into at most `threads` ranges whose borders
/// are multiples of `grain`. The caller takes the first range. Runs everything itself where the
/// pool is busy with another caller or a thread cannot be had.
void parallel_rows(std::int64_t rows, int threads, std::int64_t grain,
                   void (*body)(const void* context, std::int64_t begin, std::int64_t end),
                   const void* context);

}  // namespace midstream
