// Dot products of rows with panels of probes; included once per instruction set, in a namespace of
// its own, after Vec, MIDSTREAM_TARGET (the function attribute that enables the set) and
// MIDSTREAM_INLINE (the same, and inline).
//
// `Dot` says how one step of columns is multiplied: Input and Weight (element types), Operand, Sum,
// kStep, load(const Input*), load(const Weight*), mac(x, w, sum). Each (row, probe) has one Sum,
// whatever block it is computed in, so blocks are a matter of speed and never of bits.

/// Steps and panels that are worked off together: 4 rows x 32 steps of bf16 are 8 KiB, which stay
/// in the level 1 cache while the panels pass by.
constexpr int kGroupSteps = 32;
constexpr int kGroupPanels = 4;

template <class Dot, int kRows>
struct Sums {
  typename Dot::Sum dot[kRows][kGroupPanels * kPanel];
  typename Dot::Sum square[kRows];
};

/// What will be read next, to be fetched meanwhile: as many columns of `rows` rows.
template <class Input>
struct Ahead {
  const Input* x;
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

/// Adds `width` columns of kRows rows and kPanels panels, from probe `q` on, to their sums.
template <class Dot, int kRows, int kPanels, bool kSquare>
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
    for (int r = 0; r < ahead.rows; ++r) __builtin_prefetch(ahead.x + r * x_stride + i);
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

/// Logits of kRows rows with up to kGroupPanels panels, from probe `p` on.
template <class Dot, int kRows, int kPanels, bool kSquare>
MIDSTREAM_TARGET void score_group(const Packed& packed, const RowBlock& rows, std::int64_t n,
                                  std::int64_t p, float (&scale)[kRows]) {
  constexpr std::int64_t kStep = Dot::kStep;
  constexpr std::int64_t kColumns = kGroupSteps * kStep;
  const std::int64_t width = packed.width, stride = rows.x_stride;
  const std::int64_t row_size = ceil_div(width, kStep) * kStep, panel_size = row_size * kPanel;
  const auto* x = static_cast<const typename Dot::Input*>(rows.x) + n * stride;
  const auto* w = static_cast<const typename Dot::Weight*>(packed.weight) + p * row_size;
  const auto probes =
      static_cast<int>(std::min<std::int64_t>(packed.probes - p, kGroupPanels * kPanel));
  const int passes = (probes + kPanel - 1) / kPanel;
  const int rows_per_pass = (kRows + passes - 1) / passes;  // of those to come
  Sums<Dot, kRows> sums;
  for (int r = 0; r < kRows; ++r) {
    sums.square[r] = Vec::zero();
    for (int q = 0; q < passes * kPanel; ++q) sums.dot[r][q] = Vec::zero();
  }
  for (std::int64_t i = 0; i < width; i += kColumns) {
    const std::int64_t columns = std::min(width - i, kColumns);
    const bool last = i + kColumns >= width;
    const bool none_left = last && n + 2 * kRows > rows.rows;
    const auto* next = last ? x + kRows * stride : x + i + kColumns;
    for (int q = 0; q < probes;) {
      const int first = q / kPanel * rows_per_pass;
      const int to_fetch = none_left ? 0 : std::clamp(kRows - first, 0, rows_per_pass);
      const Ahead<typename Dot::Input> ahead{next + first * stride, to_fetch};
      const auto* panel = w + i * kPanel + q * row_size;
      const bool wide = kPanels > 1 && q + kPanel < probes;
      if (wide && kSquare && q == 0) {
        add_columns<Dot, kRows, kPanels, true>(x + i, stride, panel, panel_size, columns, ahead, q,
                                               sums);
      } else if (wide) {
        add_columns<Dot, kRows, kPanels, false>(x + i, stride, panel, panel_size, columns, ahead, q,
                                                sums);
      } else if (kSquare && q == 0) {
        add_columns<Dot, kRows, 1, true>(x + i, stride, panel, panel_size, columns, ahead, q, sums);
      } else {
        add_columns<Dot, kRows, 1, false>(x + i, stride, panel, panel_size, columns, ahead, q,
                                          sums);
      }
      q += wide ? kPanels * kPanel : kPanel;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float lanes[kPanel];
    if (kSquare) {
      const typename Dot::Sum square = sums.square[r];
      Vec::reduce(square, square, square, square, lanes);
      scale[r] = rms_scale(lanes[0], width, packed.eps);
    }
    for (int q = 0; q < probes; q += kPanel) {
      const typename Dot::Sum* dot = &sums.dot[r][q];
      Vec::reduce(dot[0], dot[1], dot[2], dot[3], lanes);
      finish(lanes, packed.bias + p + q, packed.rms_norm, scale[r], std::min(kPanel, probes - q),
             rows.out + (n + r) * rows.out_stride + p + q);
    }
  }
}

template <class Dot, int kRows, int kPanels>
MIDSTREAM_TARGET void score_block(const Packed& packed, const RowBlock& rows, std::int64_t n) {
  float scale[kRows] = {};
  for (std::int64_t p = 0; p < packed.probes; p += kGroupPanels * kPanel) {
    if (p == 0 && packed.rms_norm) {
      score_group<Dot, kRows, kPanels, true>(packed, rows, n, p, scale);
    } else {
      score_group<Dot, kRows, kPanels, false>(packed, rows, n, p, scale);
    }
  }
}

/// Rows in blocks of Vec::kRows; each of those left goes with Vec::kPanels panels at a time.
template <class Dot>
MIDSTREAM_TARGET void score_rows(const Packed& packed, const RowBlock& rows) {
  std::int64_t n = 0;
  for (; n + Vec::kRows <= rows.rows; n += Vec::kRows) {
    score_block<Dot, Vec::kRows, 1>(packed, rows, n);
  }
  for (; n < rows.rows; ++n) score_block<Dot, 1, Vec::kPanels>(packed, rows, n);
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
