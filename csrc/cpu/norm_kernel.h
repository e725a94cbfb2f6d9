// Addition and normalisation of a row; included after dot_kernel.h, see there.

template <class X>
MIDSTREAM_INLINE Vec::Register add_sixteen(const X* x, X* residual, Vec::Register square) {
  const auto rounded = Vec::narrow(Vec::add(Vec::load(x), Vec::load(residual)), X{});
  Vec::store(residual, rounded);
  const Vec::Register value = Vec::widen(rounded);
  return Vec::fma(value, value, square);
}

/// residual += x, rounded; returns the sum of squares, which `width` alone puts in order.
template <class X>
MIDSTREAM_TARGET float add_row(const void* x_row, void* residual_row, std::int64_t width) {
  const X* x = static_cast<const X*>(x_row);
  X* residual = static_cast<X*>(residual_row);
  Vec::Register square[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  std::int64_t i = 0;
  for (; i + 4 * kWideStep <= width; i += 4 * kWideStep) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const std::int64_t at = i + c * kWideStep;
      square[c] = add_sixteen(x + at, residual + at, square[c]);
    }
  }
  for (; i + kWideStep <= width; i += kWideStep) {
    square[0] = add_sixteen(x + i, residual + i, square[0]);
  }
  float sums[4];
  Vec::reduce(square[0], square[1], square[2], square[3], sums);
  float total = (sums[0] + sums[2]) + (sums[1] + sums[3]);
  for (; i < width; ++i) {
    residual[i] = midstream::narrow(midstream::widen(x[i]) + midstream::widen(residual[i]), X{});
    const float value = midstream::widen(residual[i]);
    total += value * value;
  }
  return total;
}

/// x = gamma * round(residual * scale).
template <class X>
MIDSTREAM_TARGET void norm_row(const void* residual_row, const void* gamma_row, float scale,
                               void* x_row, std::int64_t width) {
  const X* residual = static_cast<const X*>(residual_row);
  const X* gamma = static_cast<const X*>(gamma_row);
  X* x = static_cast<X*>(x_row);
  const Vec::Register factor = Vec::splat(scale);
  std::int64_t i = 0;
  for (; i + kWideStep <= width; i += kWideStep) {
    const auto normed = Vec::narrow(Vec::mul(Vec::load(residual + i), factor), X{});
    const Vec::Register product = Vec::mul(Vec::load(gamma + i), Vec::widen(normed));
    Vec::store(x + i, Vec::narrow(product, X{}));
  }
  for (; i < width; ++i) {
    const X normed = midstream::narrow(midstream::widen(residual[i]) * scale, X{});
    x[i] = midstream::narrow(midstream::widen(gamma[i]) * midstream::widen(normed), X{});
  }
}

constexpr Family kFamily = {
    {score_rows<WideDot<float>>, score_rows<WideDot<Half>>, score_rows<WideDot<BFloat16>>},
    {add_row<float>, add_row<Half>, add_row<BFloat16>},
    {norm_row<float>, norm_row<Half>, norm_row<BFloat16>},
};
