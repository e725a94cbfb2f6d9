// Dot products of rows with panels of probes; included once per instruction set, in a namespace of
// its own, after Vec, MIDSTREAM_TARGET (the function attribute that enables the set) and
// MIDSTREAM_INLINE (the same, and inline).
//
// `Dot` says how one step of columns is multiplied: Input and Weight (element types), Operand, Sum,
// kStep, load(const Input*), load(const Weight*), mac(x, w, sum). Each (row, probe) has one Sum,
// whatever block it is computed in, so blocks are a matter of speed and never of bits.

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

/// Sums of kRows rows with kPanels panels, and of the rows' squares if kSquare.
template <class Dot, int kRows, int kPanels, bool kSquare>
MIDSTREAM_TARGET void dot_block(const typename Dot::Input* x, std::int64_t x_stride,
                                const typename Dot::Weight* w, std::int64_t width,
                                float (&sums)[kRows][kPanels * kPanel], float (&squares)[kRows]) {
  using Input = typename Dot::Input;
  constexpr std::int64_t kStep = Dot::kStep;
  const std::int64_t panel_size = ceil_div(width, kStep) * kStep * kPanel;
  typename Dot::Sum dot[kRows][kPanels * kPanel];
  typename Dot::Sum square[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    square[r] = Vec::zero();
#pragma GCC unroll 16
    for (int p = 0; p < kPanels * kPanel; ++p) dot[r][p] = Vec::zero();
  }
  std::int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    add_step<Dot, kRows, kPanels, kSquare>(x + i, x_stride, w + i * kPanel, panel_size, dot,
                                           square);
  }
  if (i < width) {  // the rest, padded with zeros
    Input tail[kRows * kStep] = {};
    const std::size_t rest = static_cast<std::size_t>(width - i) * sizeof(Input);
    for (int r = 0; r < kRows; ++r) std::memcpy(tail + r * kStep, x + r * x_stride + i, rest);
    add_step<Dot, kRows, kPanels, kSquare>(tail, kStep, w + i * kPanel, panel_size, dot, square);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels * kPanel; p += kPanel) {
      Vec::reduce(dot[r][p], dot[r][p + 1], dot[r][p + 2], dot[r][p + 3], &sums[r][p]);
    }
    if (kSquare) {
      float lanes[kPanel];
      Vec::reduce(square[r], square[r], square[r], square[r], lanes);
      squares[r] = lanes[0];
    }
  }
}

template <class Dot, int kRows, int kPanels, bool kSquare>
MIDSTREAM_TARGET void score_block(const Packed& packed, const RowBlock& rows, std::int64_t n,
                                  std::int64_t p, float (&scale)[kRows]) {
  const auto* x = static_cast<const typename Dot::Input*>(rows.x) + n * rows.x_stride;
  const std::int64_t row_size = ceil_div(packed.width, Dot::kStep) * Dot::kStep;
  const auto* w = static_cast<const typename Dot::Weight*>(packed.weight) + p * row_size;
  float sums[kRows][kPanels * kPanel];
  float squares[kRows];
  dot_block<Dot, kRows, kPanels, kSquare>(x, rows.x_stride, w, packed.width, sums, squares);
  const std::int64_t count = std::min<std::int64_t>(packed.probes - p, kPanels * kPanel);
  for (int r = 0; r < kRows; ++r) {
    if (kSquare) scale[r] = rms_scale(squares[r], packed.width, packed.eps);
    finish(sums[r], packed.bias + p, packed.rms_norm, scale[r], count,
           rows.out + (n + r) * rows.out_stride + p);
  }
}

/// All probes for kRows rows. The last panel may stand alone.
template <class Dot, int kRows, int kPanels>
MIDSTREAM_TARGET void score_row_block(const Packed& packed, const RowBlock& rows, std::int64_t n) {
  float scale[kRows] = {};
  std::int64_t p = 0;
  for (; p + (kPanels - 1) * kPanel < packed.probes; p += kPanels * kPanel) {
    if (p == 0 && packed.rms_norm) {
      score_block<Dot, kRows, kPanels, true>(packed, rows, n, p, scale);
    } else {
      score_block<Dot, kRows, kPanels, false>(packed, rows, n, p, scale);
    }
  }
  if (kPanels == 1 || p >= packed.probes) return;
  if (p == 0 && packed.rms_norm) {
    score_block<Dot, kRows, 1, true>(packed, rows, n, p, scale);
  } else {
    score_block<Dot, kRows, 1, false>(packed, rows, n, p, scale);
  }
}

/// Rows in blocks of Vec::kRows; each of those left goes with Vec::kPanels panels at a time.
template <class Dot>
MIDSTREAM_TARGET void score_rows(const Packed& packed, const RowBlock& rows) {
  std::int64_t n = 0;
  if (Vec::kRows > 1) {
    for (; n + Vec::kRows <= rows.rows; n += Vec::kRows) {
      score_row_block<Dot, Vec::kRows, 1>(packed, rows, n);
    }
  }
  for (; n < rows.rows; ++n) score_row_block<Dot, 1, Vec::kPanels>(packed, rows, n);
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
