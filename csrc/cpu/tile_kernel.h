// Score by tiles of 16 rows x 16 probes: the order of work, on whatever multiplies the tiles. The
// tests run it on plain arrays, where there is no AMX.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "families.h"

namespace midstream {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a tile row: 32 bf16 or 16 fp32

/// Sums of up to 32 rows with 16 probes. Even and odd steps go to two tiles, because tdpbf16ps
/// takes 16 cycles to issue and 52 to finish; with two row tiles, four are under way. A tile
/// multiplies each row by itself, so that how many rows there are, or which, changes no bits.
template <class Tiles, int kHalves>
void tile_sums(const BFloat16* x, std::int64_t x_stride, const BFloat16* w, std::int64_t width,
               const BFloat16* tail, float* sums) {
  constexpr int kFirst = 4, kSecond = 5, kWeights = 6;  // and 0 to 3: half * 2 + step % 2
  Tiles::template zero<0>();
  Tiles::template zero<1>();
  if (kHalves == 2) {
    Tiles::template zero<2>();
    Tiles::template zero<3>();
  }
  const std::int64_t steps = ceil_div(width, kNarrowStep);
  for (std::int64_t k = 0; k < steps; ++k) {
    const bool whole = (k + 1) * kNarrowStep <= width;
    const BFloat16* from = whole ? x + k * kNarrowStep : tail;
    const std::int64_t stride = whole ? x_stride : kNarrowStep;
    const std::int64_t bytes = stride * static_cast<std::int64_t>(sizeof(BFloat16));
    Tiles::template load<kWeights>(w + k * kNarrowStep * kTile, kTileBytes);
    Tiles::template load<kFirst>(from, bytes);
    if (k % 2 == 0) {
      Tiles::template multiply<0, kFirst, kWeights>();
    } else {
      Tiles::template multiply<1, kFirst, kWeights>();
    }
    if (kHalves == 2) {
      Tiles::template load<kSecond>(from + kTileRows * stride, bytes);
      if (k % 2 == 0) {
        Tiles::template multiply<2, kSecond, kWeights>();
      } else {
        Tiles::template multiply<3, kSecond, kWeights>();
      }
    }
  }
  float even[kHalves * kTileRows * kTile] = {};
  float odd[kHalves * kTileRows * kTile] = {};
  Tiles::template store<0>(even, kTileBytes);
  Tiles::template store<1>(odd, kTileBytes);
  if (kHalves == 2) {
    Tiles::template store<2>(even + kTileRows * kTile, kTileBytes);
    Tiles::template store<3>(odd + kTileRows * kTile, kTileBytes);
  }
  for (int i = 0; i < kHalves * kTileRows * kTile; ++i) sums[i] = even[i] + odd[i];
}

template <class Tiles, class SumOfSquares>
void score_tiles(const Packed& packed, const RowBlock& rows, SumOfSquares sum_of_squares) {
  constexpr std::int64_t kBlock = 2 * kTileRows;
  const std::int64_t width = packed.width;
  const std::int64_t rest = width % kNarrowStep,
                     row_size = ceil_div(width, kNarrowStep) * kNarrowStep;
  for (std::int64_t n = 0; n < rows.rows; n += kBlock) {
    const std::int64_t count = std::min(kBlock, rows.rows - n);
    const BFloat16* x = static_cast<const BFloat16*>(rows.x) + n * rows.x_stride;
    BFloat16 tail[kBlock * kNarrowStep] = {};
    float scale[kBlock] = {};
    for (std::int64_t r = 0; r < count; ++r) {
      std::memcpy(tail + r * kNarrowStep, x + r * rows.x_stride + width - rest,
                  static_cast<std::size_t>(rest) * sizeof(BFloat16));
      if (packed.rms_norm) {
        scale[r] = rms_scale(sum_of_squares(x + r * rows.x_stride, width), width, packed.eps);
      }
    }
    // Tiles are as high as there are rows: nothing is read beyond the last one.
    const int first = static_cast<int>(std::min<std::int64_t>(count, kTileRows));
    const int second = static_cast<int>(count) - first;
    Tiles::configure(first, second);
    for (std::int64_t p = 0; p < packed.probes; p += kTile) {
      const BFloat16* w = static_cast<const BFloat16*>(packed.weight) + p * row_size;
      float sums[kBlock * kTile];
      if (second > 0) {
        tile_sums<Tiles, 2>(x, rows.x_stride, w, width, tail, sums);
      } else {
        tile_sums<Tiles, 1>(x, rows.x_stride, w, width, tail, sums);
      }
      const std::int64_t probes = std::min<std::int64_t>(kTile, packed.probes - p);
      for (std::int64_t r = 0; r < count; ++r) {
        finish(sums + r * kTile, packed.bias + p, packed.rms_norm, scale[r], probes,
               rows.out + (n + r) * rows.out_stride + p);
      }
    }
  }
  Tiles::release();
}

}  // namespace midstream
