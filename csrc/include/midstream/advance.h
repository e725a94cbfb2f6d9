// advance: fold one row per token into its stream's evidence, belief, risk and verdict.
//
// midstream.h and kernels/tables.py say what each field means; kernels/reference_advance.py is the
// definition of correct.
#pragma once

#include <cstdint>
#include <string>

#include "midstream/midstream.h"

namespace midstream {

enum class Verdict : std::uint8_t {
  proceed = MIDSTREAM_CONTINUE,
  hold = MIDSTREAM_HOLD,
  halt = MIDSTREAM_HALT
};
enum class Rule : std::int32_t { last, ema, mean, cusum, count, run, max };
enum class Phase : std::int32_t { prompt, response };
enum class OnUnscored : std::int32_t { pass, hold, halt };

constexpr std::int16_t kNoCause = MIDSTREAM_NO_CAUSE;
constexpr std::int16_t kUnscoredCause = MIDSTREAM_UNSCORED_CAUSE;
constexpr int kGapBits = MIDSTREAM_GAP_BITS;

/// Belief lives on the stack while a row is folded, so the number of states has a limit.
constexpr std::int64_t kMaxStates = MIDSTREAM_MAX_STATES;
/// Belief left by a step power below which fp32 has lost too much of it.
constexpr float kLeastMass = 1e-30f;
/// Positions are below this, so that a gap and its end fit int32.
constexpr std::int32_t kMaxPosition = MIDSTREAM_MAX_POSITION;

// The tables are plain C, so that the C interface hands them on as they are.
using Sizes = midstream_sizes;
using SlotTable = midstream_slot_table;
using EvidenceTable = midstream_evidence_table;
using ChainTable = midstream_chain_table;
using PolicyTable = midstream_policy_table;
using Tables = midstream_tables;
using Rows = midstream_rows;

/// Index of the first row whose slot, or whose slot's policy row, is outside its table; else -1.
std::int64_t first_bad_row(const Rows& rows, const Tables& tables);

/// What is wrong with it, in words.
std::string explain_bad_row(const Rows& rows, const Tables& tables, std::int64_t bad);

/// Fold the rows in order. first_bad_row(rows, tables) must be -1.
void advance(const Rows& rows, const Tables& tables);

}  // namespace midstream
