// The row kernel, included once per instruction set inside a namespace of its own. The includer
// defines MIDSTREAM_TARGET (the function attribute that enables the set) and a struct Vec with
//
//   Register, kLanes, kUnroll         a vector of kLanes floats, kUnroll of them per sum
//   zero(), load(const T*), fma(a, b, c), add(a, b), store(float*, Register)
//
// A sum runs over kUnroll * kLanes partial sums in an order that only `width` determines. kBlock
// probes share the loads of a row; a probe that is computed alone goes through the same adds.

constexpr int kBlock = 4;
constexpr int kChunk = Vec::kLanes * Vec::kUnroll;

MIDSTREAM_TARGET inline float horizontal_sum(const Vec::Register (&partial)[Vec::kUnroll]) {
  Vec::Register total[Vec::kUnroll];
  for (int u = 0; u < Vec::kUnroll; ++u) total[u] = partial[u];
  for (int n = Vec::kUnroll; n > 1; n /= 2) {
    for (int u = 0; u < n / 2; ++u) total[u] = Vec::add(total[u], total[u + n / 2]);
  }
  float lanes[Vec::kLanes];
  Vec::store(lanes, total[0]);
  for (int n = Vec::kLanes; n > 1; n /= 2) {
    for (int i = 0; i < n / 2; ++i) lanes[i] += lanes[i + n / 2];
  }
  return lanes[0];
}

template <int kProbes, bool kSquare, class X, class W>
MIDSTREAM_TARGET inline void add_chunk(const X* x, const W* w, std::int64_t w_stride,
                                       Vec::Register (&dot)[kProbes][Vec::kUnroll],
                                       Vec::Register (&square)[Vec::kUnroll]) {
  Vec::Register value[Vec::kUnroll];
  for (int u = 0; u < Vec::kUnroll; ++u) value[u] = Vec::load(x + u * Vec::kLanes);
  if (kSquare) {
    for (int u = 0; u < Vec::kUnroll; ++u) square[u] = Vec::fma(value[u], value[u], square[u]);
  }
  for (int p = 0; p < kProbes; ++p) {
    for (int u = 0; u < Vec::kUnroll; ++u) {
      const Vec::Register weight = Vec::load(w + p * w_stride + u * Vec::kLanes);
      dot[p][u] = Vec::fma(value[u], weight, dot[p][u]);
    }
  }
}

/// Dot products of one row with kProbes weight rows; returns the row's sum of squares if kSquare.
template <int kProbes, bool kSquare, class X, class W>
MIDSTREAM_TARGET float dot_block(const X* x, const W* w, std::int64_t width, float* out) {
  Vec::Register dot[kProbes][Vec::kUnroll];
  Vec::Register square[Vec::kUnroll];
  for (int u = 0; u < Vec::kUnroll; ++u) {
    square[u] = Vec::zero();
    for (int p = 0; p < kProbes; ++p) dot[p][u] = Vec::zero();
  }
  std::int64_t i = 0;
  for (; i + kChunk <= width; i += kChunk) {
    add_chunk<kProbes, kSquare>(x + i, w + i, width, dot, square);
  }
  if (i < width) {  // the rest, padded with zeros on both sides
    X x_tail[kChunk] = {};
    W w_tail[kProbes * kChunk] = {};
    const std::size_t rest = static_cast<std::size_t>(width - i);
    std::memcpy(x_tail, x + i, rest * sizeof(X));
    for (int p = 0; p < kProbes; ++p) {
      std::memcpy(w_tail + p * kChunk, w + p * width + i, rest * sizeof(W));
    }
    add_chunk<kProbes, kSquare>(x_tail, w_tail, kChunk, dot, square);
  }
  for (int p = 0; p < kProbes; ++p) out[p] = horizontal_sum(dot[p]);
  return kSquare ? horizontal_sum(square) : 0.0f;
}

template <class X, class W>
MIDSTREAM_TARGET void score_rows(const ScoreArgs& args) {
  const X* hidden = static_cast<const X*>(args.hidden);
  const W* weight = static_cast<const W*>(args.weight);
  for (std::int64_t n = 0; n < args.rows; ++n) {
    const X* x = hidden + n * args.hidden_stride;
    float* out = args.out + n * args.out_stride;
    float scale = 1.0f;
    for (std::int64_t p = 0; p < args.probes;) {
      const W* w = weight + p * args.width;
      const bool block = args.probes - p >= kBlock;
      const std::int64_t end = p + (block ? kBlock : 1);
      if (args.rms_norm && p == 0) {
        const float sum = block ? dot_block<kBlock, true>(x, w, args.width, out)
                                : dot_block<1, true>(x, w, args.width, out);
        scale = rms_scale(sum, args.width, args.eps);
      } else if (block) {
        dot_block<kBlock, false>(x, w, args.width, out + p);
      } else {
        dot_block<1, false>(x, w, args.width, out + p);
      }
      for (; p < end; ++p) out[p] = (args.rms_norm ? out[p] * scale : out[p]) + args.bias[p];
    }
  }
}

inline ScoreRows kernel(DType hidden, DType weight) {
  static constexpr ScoreRows kTable[3][3] = {
      {score_rows<float, float>, score_rows<float, Half>, score_rows<float, BFloat16>},
      {score_rows<Half, float>, score_rows<Half, Half>, score_rows<Half, BFloat16>},
      {score_rows<BFloat16, float>, score_rows<BFloat16, Half>, score_rows<BFloat16, BFloat16>},
  };
  return kTable[static_cast<int>(hidden)][static_cast<int>(weight)];
}
