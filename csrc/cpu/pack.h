// Weights in the order in which the kernels read them; families.h says which. The targets are zero
// before.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "dtypes.h"
#include "families.h"

namespace midstream {

/// Numbers in a packed array for `probes` x `width`.
inline std::int64_t wide_size(std::int64_t probes, std::int64_t width) {
  return ceil_div(probes, kPanel) * kPanel * ceil_div(width, kWideStep) * kWideStep;
}

inline std::int64_t narrow_size(std::int64_t probes, std::int64_t width) {
  return ceil_div(probes, kPanel) * kPanel * ceil_div(width, kNarrowStep) * kNarrowStep;
}

inline std::int64_t tiles_size(std::int64_t probes, std::int64_t width) {
  return ceil_div(probes, kTile) * kTile * ceil_div(width, kNarrowStep) * kNarrowStep;
}

template <class W>
void pack_wide(const W* weight, std::int64_t probes, std::int64_t width, float* packed) {
  const std::int64_t steps = ceil_div(width, kWideStep);
  for (std::int64_t p = 0; p < probes; ++p) {
    const W* row = weight + p * width;
    float* panel = packed + p / kPanel * steps * kPanel * kWideStep + p % kPanel * kWideStep;
    for (std::int64_t i = 0; i < width; i += kWideStep) {
      const std::int64_t columns = std::min<std::int64_t>(kWideStep, width - i);
      for (std::int64_t c = 0; c < columns; ++c) panel[i * kPanel + c] = widen(row[i + c]);
    }
  }
}

inline void pack_narrow(const BFloat16* weight, std::int64_t probes, std::int64_t width,
                        BFloat16* packed) {
  const std::int64_t steps = ceil_div(width, kNarrowStep);
  for (std::int64_t p = 0; p < probes; ++p) {
    BFloat16* panel = packed + p / kPanel * steps * kPanel * kNarrowStep + p % kPanel * kNarrowStep;
    for (std::int64_t i = 0; i < width; i += kNarrowStep) {
      const std::int64_t columns = std::min<std::int64_t>(kNarrowStep, width - i);
      std::memcpy(panel + i * kPanel, weight + p * width + i,
                  static_cast<std::size_t>(columns) * sizeof *weight);
    }
  }
}

inline void pack_tiles(const BFloat16* weight, std::int64_t probes, std::int64_t width,
                       BFloat16* packed) {
  const std::int64_t row_size = ceil_div(width, kNarrowStep) * kNarrowStep;
  for (std::int64_t p = 0; p < probes; ++p) {
    BFloat16* tiles = packed + p / kTile * kTile * row_size + p % kTile * 2;
    for (std::int64_t i = 0; i < width; ++i) {
      tiles[i / 2 * 2 * kTile + i % 2] = weight[p * width + i];
    }
  }
}

}  // namespace midstream
