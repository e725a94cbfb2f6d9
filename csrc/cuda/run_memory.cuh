// What a block keeps of a stream and of one chunk of its rows, in shared memory.
#pragma once

#include <cstdint>

#include "midstream/advance.h"
#include "midstream/cuda/device.cuh"

namespace midstream::cuda {

/// What is known of a row of the chunk.
struct RowFacts {
  int position;
  int gap;           // tokens never shown before this one
  int response_gap;  // those of them that belong to the response
  unsigned char fresh, in_prompt, scored, judged, missing, traced;
};

/// A stream's numbers beside evidence and belief. In registers they would be there while a tile of
/// score_advance needs all of them.
struct StreamState {
  int expected, scored, unscored, verdict, cause, halted_at;
  float risk, peak;
};

/// A stream's state and one chunk of its rows, in shared memory. advance_bytes counts it.
struct RunMemory {
  // per probe [P]: the evidence table, and the stream's evidence
  int *rule, *window, *phase, *folds;
  float *parameter, *center, *evidence;
  // per state [K+1]
  float *belief, *moved;
  // per row
  RowFacts* row;   // [chunk], 5 words
  float* risk;     // [chunk]
  int* bin;        // [chunk], of the evidence
  int* blamed;     // [chunk], probe with the largest hazard, or the row's verdict later
  float* z;        // [chunk, P] logits
  float* hazard;   // [chunk, P] evidence - center
  float* beliefs;  // [chunk, K+1]
  StreamState* stream;
  int* count;  // rows in the chunk
  int* flags;  // kMoves, kJudges
};
static_assert(sizeof(RowFacts) == 5 * 4, "advance_bytes counts 8 words per row: these and 3 more");
static_assert(sizeof(StreamState) == 8 * 4, "advance_bytes counts 10 words: these and 2 more");

/// What a chunk needs beyond the evidence.
constexpr int kMoves = 1;   // some row moves or weighs the belief
constexpr int kJudges = 2;  // some row is judged or missing

__device__ __forceinline__ RunMemory run_memory(unsigned char* memory, const Sizes& sizes,
                                                int chunk) {
  auto* next = reinterpret_cast<float*>(memory);
  const auto take = [&next](std::int64_t count) {
    float* taken = next;
    next += count;
    return taken;
  };
  const auto ints = [&take](std::int64_t count) { return reinterpret_cast<int*>(take(count)); };
  const int probes = static_cast<int>(sizes.probes), states = static_cast<int>(sizes.states);
  RunMemory m;
  m.rule = ints(probes), m.window = ints(probes), m.phase = ints(probes), m.folds = ints(probes);
  m.parameter = take(probes), m.center = take(probes), m.evidence = take(probes);
  m.belief = take(states), m.moved = take(states);
  m.stream = reinterpret_cast<StreamState*>(take(8));
  m.count = ints(1), m.flags = ints(1);
  m.row = reinterpret_cast<RowFacts*>(take(5 * chunk));
  m.risk = take(chunk), m.bin = ints(chunk), m.blamed = ints(chunk);
  m.z = take(chunk * probes), m.hazard = take(chunk * probes);
  m.beliefs = take(chunk * states);
  return m;
}

}  // namespace midstream::cuda
