// How the kernels are launched: pure functions of sizes, looked at by the tests without a GPU.
//
// What changes a result's bits (warps, and with them the split of d) is chosen by d alone. What N
// chooses (rows per block, blocks) changes none.
#pragma once

#include <cstdint>

#include "midstream/advance.h"

namespace midstream::cuda {

/// Blocks that fill a large GPU: an H100 has 132 processors, a B200 has 148.
constexpr std::int64_t kBlocksToFill = 128;
/// Without asking for more, a block has 48 KiB of shared memory.
constexpr int kSharedLimit = 48 * 1024;
constexpr int kMostWarps = 16;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Columns a warp takes at a time: one 128-byte line of 16-bit rows, four of the fp32 path.
constexpr int kTensorCoreColumns = 64;
constexpr int kFmaColumns = 128;

/// Warps that share a row, each with its own columns. 16 warps keep 48 KiB of loads in flight, more
/// than the 64 bytes a clock that one processor gets from L2 need at a latency of 600 clocks.
constexpr int score_warps(int width, int columns) {
  const std::int64_t chunks = ceil_div(width, columns);
  return chunks < kMostWarps ? static_cast<int>(chunks) : kMostWarps;
}

/// Rows per block, a power of two up to `most`. A block reads all weights of its probes (P = 8,
/// d = 4096 in bf16: 64 KiB, about 1000 clocks from L2) and its rows (8 KiB each), so the fewest
/// rows that still leave no processor with two blocks are fastest: 1 in decode, 16 or 32 in
/// prefill, where the traffic of the weights counts.
constexpr int rows_per_block(std::int64_t rows, int most) {
  int per_block = 1;
  while (per_block < most && ceil_div(rows, per_block) > kBlocksToFill) per_block *= 2;
  return per_block;
}

/// Rows that a block of add_rms_norm_score keeps in shared memory.
struct NormTile {
  int per_block;
  int kept_stride;  // numbers from row to row; 0 where not even one row fits
};

/// As rows_per_block, and no more than fit `limit` bytes. Rows are padded to 16 bytes, and by 16
/// more so that the eight rows that a warp reads at once lie in different banks.
constexpr NormTile norm_tile(std::int64_t rows, int most, int width, int size, std::int64_t limit) {
  const int vector = 16 / size;
  const int stride = static_cast<int>(ceil_div(width, vector) + 1) * vector;
  const std::int64_t fit = limit / (static_cast<std::int64_t>(stride) * size);
  int per_block = rows_per_block(rows, most);
  if (fit == 0) return {per_block, 0};
  while (per_block > fit) per_block /= 2;
  return {per_block, stride};
}

/// Threads of a block of advance. A warp is enough for decode and needs no real barriers; a long
/// prefill has 32 rows at a time to load, smooth and write out.
constexpr int advance_threads(std::int64_t rows) { return rows <= 256 ? 32 : 128; }

/// Bytes of shared memory that a chunk of `chunk` rows takes; see run_memory.cuh.
constexpr std::int64_t advance_bytes(const Sizes& sizes, int chunk) {
  const std::int64_t fixed = 7 * sizes.probes + 2 * sizes.states + 10;
  return 4 * (fixed + chunk * (2 * sizes.probes + sizes.states + 8));
}

/// Rows of a stream folded at a time: as many as fit `limit`, at most one per lane; 0 if none does.
constexpr int advance_chunk(const Sizes& sizes, int most, std::int64_t limit) {
  int chunk = most;
  while (chunk > 0 && advance_bytes(sizes, chunk) > limit) --chunk;
  return chunk;
}

}  // namespace midstream::cuda
