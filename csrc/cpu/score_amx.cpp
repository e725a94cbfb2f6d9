// Score on AMX. One path for every number of rows: a stream must not change its bits when the batch
// around it grows.

#include "families.h"

#if MIDSTREAM_HAS_AMX

#include "tile_kernel.h"

namespace midstream {
namespace {

/// The tile registers. In assembly, because the intrinsics take no template argument as a number.
struct AmxTiles {
  /// Rows of the two halves; the second may be 0.
  static void configure(int first, int second) {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64, "what ldtilecfg reads");
    const auto shape = [&config](int tile, int rows) {
      config.rows[tile] = static_cast<std::uint8_t>(rows);
      config.row_bytes[tile] = rows > 0 ? kTileBytes : 0;
    };
    shape(0, first), shape(1, first), shape(4, first);
    shape(2, second), shape(3, second), shape(5, second);
    shape(6, kNarrowStep / 2);
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  static void release() { __asm__ volatile("tilerelease"); }
  template <int tile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  static void load(const void* from, std::int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(stride), "i"(tile)
                     : "memory");
  }
  template <int tile>
  static void store(void* to, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(to), "r"(stride), "i"(tile)
                     : "memory");
  }
  template <int sum, int rows, int weights>
  static void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "i"(sum), "i"(rows), "i"(weights));
  }
};

}  // namespace

void score_rows_amx(const Packed& packed, const RowBlock& rows) {
  score_tiles<AmxTiles>(packed, rows, sum_of_squares_avx512bf16);
}

}  // namespace midstream

#endif  // MIDSTREAM_HAS_AMX
