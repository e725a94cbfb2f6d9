// advance: fold one row per token into its stream's evidence, belief, risk and verdict.
//
// The fields mirror kernels/tables.py, which says what each one means; kernels/reference.py is the
// definition of correct.
#pragma once

#include <cstdint>

namespace midstream {

enum class Verdict : std::uint8_t { proceed = 0, hold = 1, halt = 2 };
enum class Rule : std::int32_t { last, ema, mean, cusum, count, run, max };
enum class Phase : std::int32_t { prompt, response };
enum class OnUnscored : std::int32_t { pass, hold, halt };

constexpr std::int16_t kNoCause = -1;
constexpr std::int16_t kUnscoredCause = -2;
constexpr int kGapBits = 20;

/// Belief lives on the stack while a row is folded, so the number of states has a limit.
constexpr std::int64_t kMaxStates = 64;
/// Belief left by a step power below which fp32 has lost too much of it.
constexpr float kLeastMass = 1e-30f;
/// Positions are below this, so that a gap and its end fit int32.
constexpr std::int32_t kMaxPosition = 1 << 30;

struct Sizes {
  std::int64_t slots;        // S
  std::int64_t probes;       // P
  std::int64_t states;       // K + 1, at most kMaxStates
  std::int64_t bins;         // O
  std::int64_t prompt_bins;  // O'
  std::int64_t window;       // M, 0 where no probe averages
  std::int64_t trace;        // L, 0 without a trace
  std::int64_t policies;     // T
};

struct SlotTable {
  std::int32_t* position;        // [S]
  std::int32_t* start;           // [S]
  std::int32_t* policy;          // [S]
  float* evidence;               // [S, P]
  std::int32_t* folds;           // [S, P]
  float* ring;                   // [S, P, M]
  float* belief;                 // [S, K+1]
  float* risk;                   // [S]
  float* peak;                   // [S]
  std::uint8_t* verdict;         // [S]
  std::int16_t* cause;           // [S]
  std::int32_t* halted_at;       // [S]
  std::int32_t* scored;          // [S]
  std::int32_t* unscored;        // [S]
  std::int32_t* trace_position;  // [S, L]
  float* trace_risk;             // [S, L]
  std::uint8_t* trace_verdict;   // [S, L]
  float* trace_logits;           // [S, L, P]
};

struct EvidenceTable {
  const std::int32_t* rule;    // [P]
  const float* parameter;      // [P]
  const std::int32_t* window;  // [P]
  const float* center;         // [P]
  const std::int32_t* phase;   // [P]
};

struct ChainTable {
  const float* step_powers;      // [kGapBits, K+1, K+1]
  const float* emission;         // [K+1, O]
  const float* edges;            // [O-1]
  const float* prior;            // [K+1]
  const float* prompt_emission;  // [K+1, O']
  const float* prompt_edges;     // [O'-1]
};

struct PolicyTable {
  const float* ahead;               // [T, K+1]
  const float* halt_at;             // [T]
  const float* hold_at;             // [T]
  const float* release_at;          // [T]
  const std::int32_t* on_unscored;  // [T]
};

struct Tables {
  Sizes sizes;
  SlotTable slots;
  EvidenceTable evidence;
  ChainTable chain;
  PolicyTable policy;
};

struct Rows {
  float* logits;  // [count, P] with a free row stride in elements; NaN afterwards
  std::int64_t logits_stride;
  const std::int32_t* slot;      // [count], -1 = padding
  const std::int32_t* position;  // [count], ascending within a stream
  std::int64_t count;
};

/// Index of the first row whose slot, or whose slot's policy row, is outside its table; else -1.
std::int64_t first_bad_row(const Rows& rows, const Tables& tables);

/// Fold the rows in order. first_bad_row(rows, tables) must be -1.
void advance(const Rows& rows, const Tables& tables);

}  // namespace midstream
