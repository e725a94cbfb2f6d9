/* Scores one stream through the C interface, token by token: what a server in C does.
 *
 *     stream INPUT
 *
 * INPUT holds, without gaps: int64 sizes (those of midstream_sizes), width, tokens, start, policy;
 * weight, bias; the tables of evidence, chain and policy in the order of their fields; bf16 rows of
 * the residual stream [tokens, width]. Prints position, verdict, risk and cause after each token. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "midstream/midstream.h"

static FILE* input;

static void fail(const char* what) {
  fprintf(stderr, "%s: %s\n", what, midstream_last_error());
  exit(1);
}

static void demand(int holds, const char* what) {
  if (!holds) fail(what);
}

/* The next `count` elements of `size` bytes of the input, or so many zeros. */
static void* memory(int from_input, int64_t count, size_t size) {
  void* bytes = calloc((size_t)count + 1, size);
  demand(bytes != NULL, "calloc");
  if (from_input) demand(fread(bytes, size, (size_t)count, input) == (size_t)count, "input");
  return bytes;
}

#define READ(type, count) ((type*)memory(1, (count), sizeof(type)))
#define ZEROS(type, count) ((type*)memory(0, (count), sizeof(type)))

int main(int argc, char** argv) {
  midstream_tables tables;
  midstream_sizes n;
  midstream_probe_table given;
  midstream_probes* probes = NULL;
  int64_t more[4]; /* width, tokens, start, policy */
  const int64_t slot = 1;

  demand(argc == 2, "usage: stream INPUT");
  input = fopen(argv[1], "rb");
  demand(input != NULL, argv[1]);
  demand(fread(&n, sizeof n, 1, input) == 1 && fread(more, sizeof more, 1, input) == 1, "sizes");

  memset(&given, 0, sizeof given);
  given.weight = READ(float, n.probes * more[0]);
  given.dtype = MIDSTREAM_FLOAT32;
  given.bias = READ(float, n.probes);
  given.probes = n.probes;
  given.width = more[0];
  demand(midstream_probes_create(&given, &probes) == MIDSTREAM_OK, "probes");
  {
    midstream_probe_table vast = given;
    midstream_probes* none = NULL;
    vast.probes = INT64_MAX / 8, vast.width = 64;
    demand(midstream_probes_create(&vast, &none) == MIDSTREAM_INVALID_ARGUMENT, "vast table");
  }

  memset(&tables, 0, sizeof tables);
  tables.sizes = n;
  tables.evidence.rule = READ(int32_t, n.probes);
  tables.evidence.parameter = READ(float, n.probes);
  tables.evidence.window = READ(int32_t, n.probes);
  tables.evidence.center = READ(float, n.probes);
  tables.evidence.phase = READ(int32_t, n.probes);
  tables.chain.step_powers = READ(float, MIDSTREAM_GAP_BITS * n.states * n.states);
  tables.chain.emission = READ(float, n.states * n.bins);
  tables.chain.edges = READ(float, n.bins - 1);
  tables.chain.prior = READ(float, n.states);
  tables.chain.prompt_emission = READ(float, n.states * n.prompt_bins);
  tables.chain.prompt_edges = READ(float, n.prompt_bins - 1);
  tables.policy.ahead = READ(float, n.policies * n.states);
  tables.policy.halt_at = READ(float, n.policies);
  tables.policy.hold_at = READ(float, n.policies);
  tables.policy.release_at = READ(float, n.policies);
  tables.policy.on_unscored = READ(int32_t, n.policies);

  tables.slots.position = ZEROS(int32_t, n.slots);
  tables.slots.start = ZEROS(int32_t, n.slots);
  tables.slots.policy = ZEROS(int32_t, n.slots);
  tables.slots.evidence = ZEROS(float, n.slots * n.probes);
  tables.slots.folds = ZEROS(int32_t, n.slots * n.probes);
  tables.slots.ring = ZEROS(float, n.slots * n.probes * n.window);
  tables.slots.belief = ZEROS(float, n.slots * n.states);
  tables.slots.risk = ZEROS(float, n.slots);
  tables.slots.peak = ZEROS(float, n.slots);
  tables.slots.verdict = ZEROS(uint8_t, n.slots);
  tables.slots.cause = ZEROS(int16_t, n.slots);
  tables.slots.halted_at = ZEROS(int32_t, n.slots);
  tables.slots.scored = ZEROS(int32_t, n.slots);
  tables.slots.unscored = ZEROS(int32_t, n.slots);
  tables.slots.trace_position = ZEROS(int32_t, n.slots * n.trace);
  tables.slots.trace_risk = ZEROS(float, n.slots * n.trace);
  tables.slots.trace_verdict = ZEROS(uint8_t, n.slots * n.trace);
  tables.slots.trace_logits = ZEROS(float, n.slots * n.trace * n.probes);

  /* Refused, and nothing changes. */
  demand(midstream_admit(&tables, n.slots, 0, 0) == MIDSTREAM_OUT_OF_RANGE, "slot out of range");
  demand(midstream_advance(NULL, NULL) == MIDSTREAM_INVALID_ARGUMENT, "null tables");
  tables.sizes.states = MIDSTREAM_MAX_STATES + 1;
  demand(midstream_admit(&tables, 0, 0, 0) == MIDSTREAM_INVALID_ARGUMENT, "too many states");
  tables.sizes.states = n.states;

  demand(midstream_admit(&tables, slot, (int32_t)more[2], (int32_t)more[3]) == MIDSTREAM_OK,
         "admit");
  {
    const uint16_t* hidden = READ(uint16_t, more[1] * more[0]);
    float* logits = ZEROS(float, 2 * n.probes);
    int64_t t;
    for (t = 0; t < more[1]; ++t) {
      /* Two rows: the token, and padding, which changes nothing. */
      const int32_t slots[2] = {(int32_t)slot, -1}, positions[2] = {(int32_t)t, 0};
      const midstream_hidden row = {hidden + t * more[0], MIDSTREAM_BFLOAT16, 2, 0};
      const midstream_rows rows = {logits, n.probes, slots, positions, 2};
      demand(midstream_score_advance(probes, &row, &tables, &rows, 1) == MIDSTREAM_OK, "token");
      printf("%d %d %.9g %d\n", (int)t, tables.slots.verdict[slot], tables.slots.risk[slot],
             tables.slots.cause[slot]);
    }
    {
      const int32_t beyond = (int32_t)n.slots, position = 0;
      const midstream_rows rows = {logits, n.probes, &beyond, &position, 1};
      demand(midstream_advance(&tables, &rows) == MIDSTREAM_OUT_OF_RANGE, "row out of range");
      demand(strstr(midstream_last_error(), "names slot") != NULL, "message");
    }
    {
      /* Rows that share memory would get each other's logits. */
      const int32_t slots[2] = {(int32_t)slot, -1}, positions[2] = {(int32_t)more[1], 0};
      const midstream_hidden row = {hidden, MIDSTREAM_BFLOAT16, 2, 0};
      const midstream_rows rows = {logits, 0, slots, positions, 2};
      demand(midstream_score_advance(probes, &row, &tables, &rows, 1) == MIDSTREAM_INVALID_ARGUMENT,
             "overlapping logits");
      demand(strstr(midstream_last_error(), "must not overlap") != NULL, "message");
      demand(midstream_advance(&tables, &rows) == MIDSTREAM_INVALID_ARGUMENT, "overlapping rows");
      demand(midstream_score(probes, &row, logits, 0, 1) == MIDSTREAM_INVALID_ARGUMENT, "stride");
    }
  }
  midstream_probes_destroy(probes);
  return 0;
}
