// Dot products of rows with panels of probes; included once per instruction set, in a namespace of
// its own, after Vec, MIDSTREAM_TARGET (the function attribute that enables the set) and
// MIDSTREAM_INLINE (the same, and inline).
//
// `Dot` says how one step of columns is multiplied: Input and Weight (element types), Operand, Sum,
// kStep, load(const Input*), load(const Weight*), mac(x, w, sum). Each (row, probe) has one Sum,
// whatever block it is computed in, so blocks are a matter of speed and never of bits.

/// Steps, over all panels, of weights that are worked off together: 16 KiB, which stay in the level
/// 1 cache while rows pass by. Level 2 gives a Zen 5 core a line in about 1.8 cycles: where weights
/// came from there as well as rows, vdpbf16ps ran at 4 per ns, and else at 6.4 of 7.2 possible.
constexpr std::int64_t kSliceSteps = 64;
constexpr int kSlicePanels = 4;
/// Blocks of rows that pass by before the next slice. Their sums are 34 KiB of stack. 64 rows of
/// 4096 bf16 x 8 probes take 10.4 us on a Zen 5 core; with 8 blocks 11.4, with 4 of 4 rows 11.6.
constexpr int kBlocksAtOnce = 16;
/// Up to here rows are taken to be in a level 2 cache, where to fetch them ahead only costs: 64
/// rows x 8 probes took 11.8 us with it.
constexpr std::int64_t kWarmBytes = std::int64_t{1} << 19;

template <class Dot, int kRows>
struct Sums {
  typename Dot::Sum dot[kRows][kSlicePanels * kPanel];
  typename Dot::Sum square[kRows];
};

/// What to fetch meanwhile, as many columns of `rows` rows each: `near`, which is read next, and
/// `far`, which is read 32 rows later. Memory takes longer than until `near` is read, and of lines
/// fetched once, 1 to 16 % were still not there: each line is asked for twice.
template <class Input>
struct Ahead {
  const Input* near;
  const Input* far;
  int rows;
};

template <class Dot, int kRows, int kPanels, bool kSquare>
MIDSTREAM_INLINE void add_step(const typename Dot::Input* x, std::int64_t x_stride,
                               const typename Dot::Weight* w, std::int64_t panel_size,
                               typename Dot::Sum (&dot)[kRows][kPanels * kPanel],
                               typename Dot::Sum (&square)[kRows]) {
  typename Dot::Operand value[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    value[r] = Dot::load(x + r * x_stride);
    if (kSquare) square[r] = Dot::mac(value[r], value[r], square[r]);
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPanels * kPanel; ++p) {
    const typename Dot::Operand weight =
        Dot::load(w + (p / kPanel) * panel_size + (p % kPanel) * Dot::kStep);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) dot[r][p] = Dot::mac(value[r], weight, dot[r][p]);
  }
}

/// Adds `width` columns of kRows rows and kPanels panels, from probe `q` on, to their sums, and
/// fetches kFetch rows.
template <class Dot, int kRows, int kPanels, bool kSquare, int kFetch>
MIDSTREAM_TARGET void add_columns(const typename Dot::Input* x, std::int64_t x_stride,
                                  const typename Dot::Weight* w, std::int64_t panel_size,
                                  std::int64_t width, Ahead<typename Dot::Input> ahead, int q,
                                  Sums<Dot, kRows>& sums) {
  using Input = typename Dot::Input;
  constexpr std::int64_t kStep = Dot::kStep;
  typename Dot::Sum dot[kRows][kPanels * kPanel];
  typename Dot::Sum square[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    square[r] = sums.square[r];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels * kPanel; ++p) dot[r][p] = sums.dot[r][q + p];
  }
  std::int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    add_step<Dot, kRows, kPanels, kSquare>(x + i, x_stride, w + i * kPanel, panel_size, dot,
                                           square);
#pragma GCC unroll 8
    for (int r = 0; r < kFetch; ++r) {
      __builtin_prefetch(ahead.near + r * x_stride + i);
      __builtin_prefetch(ahead.far + r * x_stride + i, 0, 2);  // into the level 2 cache
    }
  }
  if (i < width) {  // the rest, padded with zeros
    Input tail[kRows * kStep] = {};
    const std::size_t rest = static_cast<std::size_t>(width - i) * sizeof(Input);
    for (int r = 0; r < kRows; ++r) std::memcpy(tail + r * kStep, x + r * x_stride + i, rest);
    add_step<Dot, kRows, kPanels, kSquare>(tail, kStep, w + i * kPanel, panel_size, dot, square);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    sums.square[r] = square[r];
#pragma GCC unroll 16
    for (int p = 0; p < kPanels * kPanel; ++p) sums.dot[r][q + p] = dot[r][p];
  }
}

template <class Dot, int kRows, int kPanels, bool kSquare, int kFetch, class... Arguments>
MIDSTREAM_INLINE void add_and_fetch(int fetch, Arguments&&... arguments) {
  if constexpr (kFetch > 0) {
    if (fetch < kFetch) {
      add_and_fetch<Dot, kRows, kPanels, kSquare, kFetch - 1>(fetch, arguments...);
      return;
    }
  }
  add_columns<Dot, kRows, kPanels, kSquare, kFetch>(arguments...);
}

/// Adds `width` columns of kRows rows and `probes` probes, kPanels panels at a time; fetches
/// what is ahead.
template <class Dot, int kRows, int kPanels, bool kSquare>
MIDSTREAM_INLINE void add_slice(const typename Dot::Input* x, std::int64_t x_stride,
                                const typename Dot::Weight* w, std::int64_t row_size, int probes,
                                std::int64_t width, Ahead<typename Dot::Input> ahead,
                                Sums<Dot, kRows>& sums) {
  const std::int64_t panel_size = row_size * kPanel;
  const int passes = (probes + kPanels * kPanel - 1) / (kPanels * kPanel);
  const int share = (kRows + passes - 1) / passes;
  for (int q = 0; q < probes;) {
    const int fetch = std::min(share, ahead.rows);
    const auto* panel = w + q * row_size;
    const bool wide = kPanels > 1 && q + kPanel < probes;
    if (wide && kSquare && q == 0) {
      add_and_fetch<Dot, kRows, kPanels, true, kRows>(fetch, x, x_stride, panel, panel_size, width,
                                                      ahead, q, sums);
    } else if (wide) {
      add_and_fetch<Dot, kRows, kPanels, false, kRows>(fetch, x, x_stride, panel, panel_size, width,
                                                       ahead, q, sums);
    } else if (kSquare && q == 0) {
      add_and_fetch<Dot, kRows, 1, true, kRows>(fetch, x, x_stride, panel, panel_size, width, ahead,
                                                q, sums);
    } else {
      add_and_fetch<Dot, kRows, 1, false, kRows>(fetch, x, x_stride, panel, panel_size, width,
                                                 ahead, q, sums);
    }
    q += wide ? kPanels * kPanel : kPanel;
    ahead.near += fetch * x_stride;
    ahead.far += fetch * x_stride;
    ahead.rows -= fetch;
  }
}

/// Logits of kRows rows with `probes` probes, from probe `p` on.
template <class Dot, int kRows, bool kSquare>
MIDSTREAM_INLINE void finish_rows(const Packed& packed, const RowBlock& rows, std::int64_t n,
                                  std::int64_t p, int probes, const Sums<Dot, kRows>& sums,
                                  float* scale) {
  for (int r = 0; r < kRows; ++r) {
    float lanes[kPanel];
    if (kSquare) {
      const typename Dot::Sum square = sums.square[r];
      Vec::reduce(square, square, square, square, lanes);
      scale[r] = rms_scale(lanes[0], packed.width, packed.eps);
    }
    for (int q = 0; q < probes; q += kPanel) {
      const typename Dot::Sum* dot = &sums.dot[r][q];
      Vec::reduce(dot[0], dot[1], dot[2], dot[3], lanes);
      finish(lanes, packed.bias + p + q, packed.rms_norm, scale[r], std::min(kPanel, probes - q),
             rows.out + (n + r) * rows.out_stride + p + q);
    }
  }
}

/// Logits of `blocks` blocks of kRows rows with up to kSlicePanels panels, from probe `p` on.
template <class Dot, int kRows, int kPanels, bool kSquare>
MIDSTREAM_TARGET void score_panels(const Packed& packed, const RowBlock& rows, std::int64_t n,
                                   int blocks, std::int64_t p, float* scale) {
  constexpr std::int64_t kStep = Dot::kStep;
  const std::int64_t width = packed.width, stride = rows.x_stride;
  const std::int64_t row_size = ceil_div(width, kStep) * kStep;
  const auto* x = static_cast<const typename Dot::Input*>(rows.x) + n * stride;
  const auto* w = static_cast<const typename Dot::Weight*>(packed.weight) + p * row_size;
  const auto probes =
      static_cast<int>(std::min<std::int64_t>(packed.probes - p, kSlicePanels * kPanel));
  const std::int64_t slice = kSliceSteps / ceil_div(probes, kPanel) * kStep;
  const bool cold = rows.rows * width * static_cast<std::int64_t>(sizeof *x) > kWarmBytes;
  Sums<Dot, kRows> sums[kBlocksAtOnce];
  for (int b = 0; b < blocks; ++b) {
    for (int r = 0; r < kRows; ++r) {
      sums[b].square[r] = Vec::zero();
      for (int q = 0; q < ceil_div(probes, kPanel) * kPanel; ++q) sums[b].dot[r][q] = Vec::zero();
    }
  }
  for (std::int64_t i = 0; i < width; i += slice) {
    const std::int64_t columns = std::min(width - i, slice);
    for (int b = 0; b < blocks; ++b) {
      const auto* from = x + b * kRows * stride + i;
      const auto* next = from + kRows * stride;
      if (b + 1 == blocks) next = i + slice < width ? x + i + slice : next - i;
      const bool more = cold && n + (blocks + b + 1) * kRows <= rows.rows;
      add_slice<Dot, kRows, kPanels, kSquare>(
          from, stride, w + i * kPanel, row_size, probes, columns,
          {next, from + blocks * kRows * stride, more ? kRows : 0}, sums[b]);
    }
  }
  for (int b = 0; b < blocks; ++b) {
    finish_rows<Dot, kRows, kSquare>(packed, rows, n + b * kRows, p, probes, sums[b],
                                     scale + b * kRows);
  }
}

template <class Dot, int kRows>
MIDSTREAM_TARGET void score_blocks(const Packed& packed, const RowBlock& rows, std::int64_t n,
                                   int blocks) {
  constexpr int kPanels = Vec::kPanels;
  float scale[kBlocksAtOnce * kRows] = {};
  for (std::int64_t p = 0; p < packed.probes; p += kSlicePanels * kPanel) {
    if (p == 0 && packed.rms_norm) {
      score_panels<Dot, kRows, kPanels, true>(packed, rows, n, blocks, p, scale);
    } else {
      score_panels<Dot, kRows, kPanels, false>(packed, rows, n, blocks, p, scale);
    }
  }
}

template <class Dot>
MIDSTREAM_TARGET void score_rows(const Packed& packed, const RowBlock& rows) {
  std::int64_t n = 0;
  while (n + Vec::kRows <= rows.rows) {
    const auto blocks =
        static_cast<int>(std::min<std::int64_t>((rows.rows - n) / Vec::kRows, kBlocksAtOnce));
    score_blocks<Dot, Vec::kRows>(packed, rows, n, blocks);
    n += blocks * Vec::kRows;
  }
  if (n < rows.rows) score_blocks<Dot, 1>(packed, rows, n, 1);
}

/// fp32 weights with rows of any dtype: products are exact in no narrower format.
template <class X>
struct WideDot {
  using Input = X;
  using Weight = float;
  using Operand = Vec::Register;
  using Sum = Vec::Register;
  static constexpr int kStep = kWideStep;
  template <class T>
  MIDSTREAM_INLINE static Operand load(const T* from) {
    return Vec::load(from);
  }
  MIDSTREAM_INLINE static Sum mac(Operand x, Operand w, Sum sum) { return Vec::fma(x, w, sum); }
};
