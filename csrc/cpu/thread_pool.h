// A few threads that wait for work. Each row is computed alone, so bits do not depend on it.
#pragma once

#include <cstdint>

namespace midstream {

/// Runs body(context, begin, end) over ranges that cover [0, rows), on `threads` threads at most,
/// the caller among them; the borders are multiples of `grain`. Threads take ranges as they come:
/// one that is late or is kept from its core delays nobody. Runs everything itself where the
/// threads serve another caller or cannot be had.
void parallel_rows(std::int64_t rows, int threads, std::int64_t grain,
                   void (*body)(const void* context, std::int64_t begin, std::int64_t end),
                   const void* context);

}  // namespace midstream
