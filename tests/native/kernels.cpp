// All entry points of csrc/include/midstream with odd sizes and pointers, to be built with
// sanitizers. Every buffer ends where its last element does and starts one element off.

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "dtypes.h"
#include "hazard.h"
#include "midstream/add_rms_norm_score.h"
#include "midstream/advance.h"
#include "midstream/score.h"
#include "midstream/score_advance.h"
#include "pack.h"
#include "tile_kernel.h"

using namespace midstream;

namespace {

std::mt19937 generator;

float normal() { return std::normal_distribution<float>()(generator); }

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

void demand(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

bool same_bits(const float* a, const float* b, std::size_t count) {
  return count == 0 || std::memcmp(a, b, count * sizeof *a) == 0;
}

/// `count` numbers in a format, one element off any alignment.
struct Array {
  DType dtype;
  std::size_t size;
  std::vector<std::byte> bytes;

  Array(DType type, std::int64_t count)
      : dtype(type), size(type == DType::float32 ? 4 : 2), bytes(size * (count + 1)) {
    bytes.shrink_to_fit();
    for (std::int64_t i = 0; i < count; ++i) set(i, normal());
  }
  void* at(std::int64_t i) { return bytes.data() + size * (i + 1); }
  double get(std::int64_t i) {
    if (dtype == DType::float32) return read<float>(i);
    return dtype == DType::float16 ? widen(read<Half>(i)) : widen(read<BFloat16>(i));
  }
  void set(std::int64_t i, float value) {
    if (dtype == DType::float32) return write(i, value);
    if (dtype == DType::float16) return write(i, narrow(value, Half{}));
    write(i, narrow(value, BFloat16{}));
  }
  template <class T>
  T read(std::int64_t i) {
    T value;
    std::memcpy(&value, at(i), sizeof value);
    return value;
  }
  template <class T>
  void write(std::int64_t i, T value) {
    std::memcpy(at(i), &value, sizeof value);
  }
};

struct Bank {
  Array weight;
  std::vector<float> bias;
  std::int64_t count, width;

  Bank(DType type, std::int64_t probes, std::int64_t columns)
      : weight(type, probes * columns), bias(probes), count(probes), width(columns) {
    for (float& b : bias) b = normal();
  }
  ProbeTable table(bool rms_norm) {
    return {weight.at(0), weight.dtype, bias.data(), count, width, rms_norm, 1e-6f};
  }
  /// Logit of a row in fp64, and the sum of the absolute terms.
  double exact(Array& rows, std::int64_t start, std::int64_t p, bool rms_norm, double* size) {
    double sum = 0, absolute = 0, square = 0;
    for (std::int64_t i = 0; i < width; ++i) {
      const double x = rows.get(start + i), w = weight.get(p * width + i);
      sum += x * w, absolute += std::fabs(x * w), square += x * x;
    }
    const double scale = rms_norm ? 1 / std::sqrt(square / width + 1e-6) : 1;
    *size = absolute * scale + std::fabs(bias[p]);
    return sum * scale + bias[p];
  }
};

void check_logits(Bank& bank, Array& rows, std::int64_t count, std::int64_t stride, bool rms_norm,
                  const std::vector<float>& got, const std::string& what) {
  for (std::int64_t n = 0; n < count; ++n) {
    for (std::int64_t p = 0; p < bank.count; ++p) {
      double size = 0;
      const double truth = bank.exact(rows, n * stride, p, rms_norm, &size);
      const double bound = size * (bank.width / 16 + 8) * 0x1p-24;
      demand(std::fabs(got[n * bank.count + p] - truth) <= bound, what);
    }
  }
}

std::string label(const char* op, Isa set, DType rows, DType weight, std::int64_t n, Bank& bank) {
  return std::string(op) + " " + isa_name(set) + " rows " + std::to_string(int(rows)) + " weight " +
         std::to_string(int(weight)) + " " + std::to_string(n) + "x" + std::to_string(bank.count) +
         "x" + std::to_string(bank.width);
}

void scores(Isa set, DType type, DType weight_type) {
  for (const std::int64_t width : {1, 7, 16, 33, 64, 769, 1100}) {
    for (const std::int64_t probes : {1, 4, 9, 21}) {
      Bank bank(weight_type, probes, width);
      const bool rms_norm = between(0, 1) == 1;
      const Probes packed(bank.table(rms_norm));
      const std::int64_t count = between(0, 11), stride = width + between(0, 3);
      Array rows(type, std::max<std::int64_t>(0, (count - 1) * stride + width));
      std::vector<float> out(count * probes);
      score(packed, {rows.at(0), type, count, stride}, {out.data(), probes}, 1);
      const std::string what = label("score", set, type, weight_type, count, bank);
      check_logits(bank, rows, count, stride, rms_norm, out, what);
      for (std::int64_t n = 0; n < count; ++n) {
        std::vector<float> alone(probes);
        score(packed, {rows.at(n * stride), type, 1, stride}, {alone.data(), probes}, 1);
        demand(same_bits(alone.data(), &out[n * probes], probes), what + " alone");
      }
    }
  }
}

void norms(Isa set, DType type) {
  for (const std::int64_t width : {1, 15, 16, 70, 769}) {
    Bank bank(type, 5, width);
    const Probes packed(bank.table(true));
    const std::int64_t count = between(0, 7), x_stride = width + 2, stride = width + 1;
    Array x(type, std::max<std::int64_t>(0, (count - 1) * x_stride + width)), gamma(type, width);
    Array residual(type, std::max<std::int64_t>(0, (count - 1) * stride + width));
    std::vector<double> sums;
    for (std::int64_t n = 0; n < count; ++n) {
      for (std::int64_t i = 0; i < width; ++i) {
        Array sum(type, 1);
        sum.set(0, static_cast<float>(x.get(n * x_stride + i)) +
                       static_cast<float>(residual.get(n * stride + i)));
        sums.push_back(sum.get(0));
      }
    }
    std::vector<float> out(count * 5), alone(count * 5);
    add_rms_norm_score(packed,
                       {x.at(0), x_stride, residual.at(0), stride, gamma.at(0), type, count, 1e-5f},
                       {out.data(), 5}, 1);
    const std::string what = label("norm", set, type, type, count, bank);
    score(packed, {residual.at(0), type, count, stride}, {alone.data(), 5}, 1);
    demand(same_bits(out.data(), alone.data(), out.size()), what + " logits");
    const double step = type == DType::float32 ? 0x1p-22 : type == DType::float16 ? 0x1p-9 : 0x1p-6;
    for (std::int64_t n = 0; n < count; ++n) {
      double square = 0;
      for (std::int64_t i = 0; i < width; ++i) {
        demand(residual.get(n * stride + i) == sums[n * width + i], what + " sum");
        square += sums[n * width + i] * sums[n * width + i];
      }
      const double scale = 1 / std::sqrt(square / width + 1e-5);
      for (std::int64_t i = 0; i < width; ++i) {
        const double truth = gamma.get(i) * sums[n * width + i] * scale;
        const double off = std::fabs(x.get(n * x_stride + i) - truth);
        demand(off <= std::fabs(truth) * step + 1e-6, what + " normed");
      }
    }
  }
}

void threads(Isa set) {
  Bank bank(DType::bfloat16, 9, 2048);
  const Probes packed(bank.table(true));
  constexpr std::int64_t kRows = 1900;  // enough work for two threads
  Array rows(DType::bfloat16, kRows * 2048);
  std::vector<float> one(kRows * 9), many(kRows * 9);
  const Hidden hidden{rows.at(0), DType::bfloat16, kRows, 2048};
  score(packed, hidden, {one.data(), 9}, 1);
  for (const int count : {2, 64}) {
    std::fill(many.begin(), many.end(), 0.0f);
    score(packed, hidden, {many.data(), 9}, count);
    demand(one == many, label("threads", set, DType::bfloat16, DType::bfloat16, kRows, bank));
  }
  const pid_t child = fork();  // which has none of the threads
  if (child == 0) {
    std::fill(many.begin(), many.end(), 0.0f);
    score(packed, hidden, {many.data(), 9}, 2);
    _exit(one == many ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  demand(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child of fork() scores too");
}

/// The tile registers as plain arrays, multiplied as tdpbf16ps does, but for flushing.
struct PlainTiles {
  static inline int rows[8];
  static inline float sums[8][16][16];
  static inline BFloat16 operands[8][16][32];

  static void configure(int first, int second) {
    const int shapes[8] = {first, first, second, second, first, second, 16, 0};
    std::copy_n(shapes, 8, rows);
  }
  static void release() {}
  template <int tile>
  static void zero() {
    std::memset(sums[tile], 0, sizeof sums[tile]);
  }
  template <int tile>
  static void load(const void* from, std::int64_t stride) {
    for (int r = 0; r < rows[tile]; ++r) {
      std::memcpy(operands[tile][r], static_cast<const std::byte*>(from) + r * stride, kTileBytes);
    }
  }
  template <int tile>
  static void store(void* to, std::int64_t stride) {
    for (int r = 0; r < rows[tile]; ++r) {
      std::memcpy(static_cast<std::byte*>(to) + r * stride, sums[tile][r], kTileBytes);
    }
  }
  template <int sum, int left, int right>
  static void multiply() {
    for (int m = 0; m < rows[sum]; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 16; ++n) {
          for (int half = 0; half < 2; ++half) {
            sums[sum][m][n] +=
                widen(operands[left][m][2 * k + half]) * widen(operands[right][k][2 * n + half]);
          }
        }
      }
    }
  }
};

float sum_of_squares(const BFloat16* x, std::int64_t width) {
  double sum = 0;
  for (std::int64_t i = 0; i < width; ++i) sum += double(widen(x[i])) * widen(x[i]);
  return static_cast<float>(sum);
}

void tiles() {
  for (const std::int64_t width : {1, 31, 32, 65, 769}) {
    for (const std::int64_t probes : {1, 16, 21}) {
      for (const std::int64_t count : {1, 15, 16, 17, 32, 33, 70}) {
        Bank bank(DType::bfloat16, probes, width);
        std::vector<BFloat16> weight(tiles_size(probes, width));
        pack_tiles(static_cast<const BFloat16*>(bank.weight.at(0)), probes, width, weight.data());
        const bool rms_norm = between(0, 1) == 1;
        const Packed packed{weight.data(), bank.bias.data(), probes, width, rms_norm, 1e-6f};
        const std::int64_t stride = width + 1;
        Array rows(DType::bfloat16, (count - 1) * stride + width);
        std::vector<float> out(count * probes), alone(probes);
        score_tiles<PlainTiles>(packed, {rows.at(0), stride, count, out.data(), probes},
                                sum_of_squares);
        check_logits(bank, rows, count, stride, rms_norm, out, "tiles");
        const std::int64_t n = between(0, static_cast<int>(count) - 1);
        score_tiles<PlainTiles>(packed, {rows.at(n * stride), stride, 1, alone.data(), probes},
                                sum_of_squares);
        demand(same_bits(alone.data(), &out[n * probes], probes), "tiles alone");
      }
    }
  }
}

/// Memory of random tables, kept to the end.
template <class T>
T* filled(std::int64_t count, T value) {
  static std::deque<std::vector<T>> kept;
  kept.emplace_back(count, value);
  return kept.back().data();
}

Tables random_tables(std::int64_t probes, std::int64_t states, std::int64_t window,
                     std::int64_t trace) {
  const std::int64_t s = 5, bins = 6, prompt_bins = 1, tiers = 3;
  Tables t{};
  t.sizes = {s, probes, states, bins, prompt_bins, window, trace, tiers};
  t.slots = {filled(s, 0),
             filled(s, 3),
             filled(s, 0),
             filled(s * probes, 0.0f),
             filled(s * probes, 0),
             filled(s * probes * window, 0.0f),
             filled(s * states, 1.0f / static_cast<float>(states)),
             filled(s, 0.0f),
             filled(s, 0.0f),
             filled<std::uint8_t>(s, 0),
             filled<std::int16_t>(s, kNoCause),
             filled(s, -1),
             filled(s, 0),
             filled(s, 0),
             filled(s * trace, -1),
             filled(s * trace, 0.0f),
             filled<std::uint8_t>(s * trace, 0),
             filled(s * trace * probes, 0.0f)};
  auto* rule = filled(probes, 0);
  auto* phase = filled(probes, 1);
  for (std::int64_t p = 0; p < probes; ++p) rule[p] = static_cast<int>(p % 7), phase[p] = p % 3 > 0;
  auto* step = filled(kGapBits * states * states, 0.0f);
  for (std::int64_t i = 0; i < kGapBits * states * states; ++i) step[i] = std::fabs(normal());
  auto* edges = filled(bins - 1, 0.0f);
  for (std::int64_t b = 0; b < bins - 1; ++b) edges[b] = 0.7f * static_cast<float>(b + 1);
  t.evidence = {rule, filled(probes, 0.3f), filled(probes, 4), filled(probes, 1.0f), phase};
  t.chain = {step,   filled(states * bins, 0.2f), edges, filled(states, 0.1f), filled(states, 1.0f),
             nullptr};
  t.policy = {filled(tiers * states, 0.5f), filled(tiers, 0.9f), filled(tiers, 0.6f),
              filled(tiers, 0.4f), filled(tiers, 1)};
  return t;
}

void streams() {
  for (const std::int64_t states : {1, 2, 5, 6, 9, 64}) {
    const std::int64_t probes = between(1, 12), window = between(0, 4), trace = between(0, 3);
    const Tables one = random_tables(probes, states, window, trace);
    Bank bank(DType::float32, probes, 19);
    const Probes packed(bank.table(false));
    for (int round = 0; round < 40; ++round) {
      const std::int64_t count = between(0, 9);
      std::vector<std::int32_t> slot(count), position(count);
      for (std::int64_t n = 0; n < count; ++n) {
        slot[n] = between(-1, 4);
        position[n] = round * 3 + static_cast<std::int32_t>(n) + (between(0, 9) == 0 ? 70000 : 0);
      }
      Array hidden(DType::float32, count * 19);
      if (count > 0 && between(0, 3) == 0) hidden.set(between(0, 18), std::nanf(""));
      std::vector<float> logits(count * probes);
      const Rows rows{logits.data(), probes, slot.data(), position.data(), count};
      const std::int64_t bad =
          score_advance(packed, {hidden.at(0), DType::float32, count, 19}, rows, one, 1);
      demand(bad == -1, "all rows are good");
      for (const float z : logits) demand(std::isnan(z), "logits are consumed");
    }
    std::int32_t beyond = 5, first = 0;
    float logit[12] = {};
    const Rows rows{logit, probes, &beyond, &first, 1};
    demand(first_bad_row(rows, one) == 0, "a slot outside the table is refused");
  }
}

/// The table must never name another bin than the exact sum does.
void hazards() {
  int told = 0;
  for (int trial = 0; trial < 200000; ++trial) {
    float edges[7];
    for (float& edge : edges) edge = 20.0f * std::fabs(normal());
    std::sort(edges, edges + 7);
    LogHazard quick;
    float exact = 0.0f;
    for (int p = between(1, 9); p > 0; --p) {
      const float x = trial % 50 == 0 ? 1e38f * normal() : 8.0f * normal();
      quick.add(x);
      exact += softplus(x);
    }
    if (trial % 3 == 0 && std::isfinite(exact)) {  // as near as can be
      edges[3] = trial % 2 == 0 ? exact : std::nextafter(exact, trial % 4 == 1 ? 0.0f : 1e9f);
      std::sort(edges, edges + 7);
    }
    const std::int64_t bin = quick.bin(edges, 8);
    demand(bin == -1 || bin == bin_of(exact, edges, 8), "the bin of the exact sum");
    told += bin >= 0;
  }
  demand(told > 100000, "the table answers most of the time");
}

void formats() {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const Half half{static_cast<std::uint16_t>(bits)};
    const BFloat16 brain{static_cast<std::uint16_t>(bits)};
    const bool number = !std::isnan(widen(half)), brain_number = !std::isnan(widen(brain));
    demand(!number || narrow(widen(half), Half{}).bits == bits, "half there and back");
    demand(!brain_number || narrow(widen(brain), BFloat16{}).bits == bits, "bf16 there and back");
    if (bits >= 0x7bff) continue;
    // Ties between neighbours go to the even one.
    const Half above{static_cast<std::uint16_t>(bits + 1)};
    const float middle = (widen(half) + widen(above)) / 2;
    demand(narrow(middle, Half{}).bits == bits + bits % 2, "half, a tie");
    demand(narrow(std::nextafter(middle, 1e9f), Half{}).bits == bits + 1, "half, above a tie");
  }
  demand(narrow(65520.0f, Half{}).bits == 0x7c00, "half, infinity");
  demand(narrow(65519.0f, Half{}).bits == 0x7bff, "half, the largest");
  demand(narrow(std::nanf(""), BFloat16{}).bits == 0x7fc0, "bf16, NaN");
}

}  // namespace

int main(int argc, char** argv) {
  generator.seed(argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 0);
  formats();
  hazards();
  tiles();
  streams();
  const Isa widest = detected_isa();
  for (int set = 0; set <= static_cast<int>(widest); ++set) {
    set_isa_cap(isa_name(static_cast<Isa>(set)));
    demand(isa() == static_cast<Isa>(set), "the cap holds");
    for (int rows = 0; rows < 3; ++rows) {
      for (int weight = 0; weight < 3; ++weight) {
        scores(isa(), static_cast<DType>(rows), static_cast<DType>(weight));
      }
      norms(isa(), static_cast<DType>(rows));
    }
    threads(isa());
  }
  std::printf("ok, up to %s\n", isa_name(widest));
  return 0;
}
