/* The C interface: the four ops on the CPU, for servers written in C, C++, Rust or anything that
 * can call C. C99, no dependencies. `make library` builds libmidstream.so from csrc/cpu and csrc/c.
 *
 * Letters for sizes: N rows of a call, one token each; d width of the residual stream; P probes;
 * S slots, streams that can be watched at the same time; K+1 states of the chain, the last one
 * "violated"; O and O' bins of evidence; M longest window of a MEAN probe; L tokens of trace per
 * slot; T rows of the policy table.
 *
 * Every table lives in the caller's memory, is read at every call and may change between calls.
 * Calls on different tables may run at the same time; calls on one slot table may not.
 */
#ifndef MIDSTREAM_MIDSTREAM_H_
#define MIDSTREAM_MIDSTREAM_H_

#include <stdint.h>

#if defined(_WIN32)
#define MIDSTREAM_API
#else
#define MIDSTREAM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Steps of the chain that are stored: step ** (2 ** g) for g below this. */
#define MIDSTREAM_GAP_BITS 20
/* Most states of a chain, "violated" included. */
#define MIDSTREAM_MAX_STATES 64
/* Positions are below this. */
#define MIDSTREAM_MAX_POSITION (1 << 30)

typedef enum {
  MIDSTREAM_OK = 0,
  MIDSTREAM_INVALID_ARGUMENT = 1, /* a null pointer, a size or a type that is not allowed */
  MIDSTREAM_OUT_OF_RANGE = 2,     /* a slot, policy row or position; nothing was changed */
  MIDSTREAM_OUT_OF_MEMORY = 3
} midstream_status;

typedef enum {
  MIDSTREAM_FLOAT32 = 0,
  MIDSTREAM_FLOAT16 = 1,
  MIDSTREAM_BFLOAT16 = 2
} midstream_dtype;

enum { MIDSTREAM_CONTINUE = 0, MIDSTREAM_HOLD = 1, MIDSTREAM_HALT = 2 }; /* verdict */
enum { MIDSTREAM_NO_CAUSE = -1, MIDSTREAM_UNSCORED_CAUSE = -2 };         /* cause */
enum { MIDSTREAM_PROMPT = 0, MIDSTREAM_RESPONSE = 1 };                   /* phase */
enum {
  MIDSTREAM_PASS_UNSCORED,
  MIDSTREAM_HOLD_UNSCORED,
  MIDSTREAM_HALT_UNSCORED
}; /* on_unscored */
enum {
  MIDSTREAM_LAST,
  MIDSTREAM_EMA,
  MIDSTREAM_MEAN,
  MIDSTREAM_CUSUM,
  MIDSTREAM_COUNT,
  MIDSTREAM_RUN,
  MIDSTREAM_MAX
}; /* rule */

typedef struct {
  int64_t slots;       /* S */
  int64_t probes;      /* P */
  int64_t states;      /* K + 1, at most MIDSTREAM_MAX_STATES */
  int64_t bins;        /* O */
  int64_t prompt_bins; /* O' */
  int64_t window;      /* M, 0 where no probe averages */
  int64_t trace;       /* L, 0 without a trace */
  int64_t policies;    /* T */
} midstream_sizes;

/* State of every watched stream. Zeroed memory is a valid empty table; midstream_admit fills a
 * slot. */
typedef struct {
  int32_t* position;       /* [S] next position expected; rows below it are ignored */
  int32_t* start;          /* [S] tokens of the prompt */
  int32_t* policy;         /* [S] row of the policy table */
  float* evidence;         /* [S, P] smoothed logits */
  int32_t* folds;          /* [S, P] tokens folded into each evidence */
  float* ring;             /* [S, P, M] */
  float* belief;           /* [S, K+1] */
  float* risk;             /* [S] at the last judged token */
  float* peak;             /* [S] its maximum */
  uint8_t* verdict;        /* [S] */
  int16_t* cause;          /* [S] the probe that halted the stream, or one of the constants above */
  int32_t* halted_at;      /* [S] position of the halting token, -1 if none */
  int32_t* scored;         /* [S] tokens */
  int32_t* unscored;       /* [S] tokens */
  int32_t* trace_position; /* [S, L], cell = position % L, -1 where nothing is */
  float* trace_risk;       /* [S, L] NaN where not judged */
  uint8_t* trace_verdict;  /* [S, L] */
  float* trace_logits;     /* [S, L, P] */
} midstream_slot_table;

typedef struct {
  const int32_t* rule;    /* [P] */
  const float* parameter; /* [P] alpha of EMA, drift of CUSUM, threshold of COUNT and RUN */
  const int32_t* window;  /* [P] tokens averaged by MEAN */
  const float* center;    /* [P] hazard = sigmoid(evidence - center) */
  const int32_t* phase;   /* [P] the tokens the probe reads */
} midstream_evidence_table;

typedef struct {
  const float* step_powers;     /* [MIDSTREAM_GAP_BITS, K+1, K+1], each over its largest entry */
  const float* emission;        /* [K+1, O] */
  const float* edges;           /* [O-1] ascending, on the cumulative log-hazard */
  const float* prior;           /* [K+1] */
  const float* prompt_emission; /* [K+1, O'] */
  const float* prompt_edges;    /* [O'-1] */
} midstream_chain_table;

typedef struct {
  const float* ahead;         /* [T, K+1] risk of each state within the row's horizon */
  const float* halt_at;       /* [T] */
  const float* hold_at;       /* [T] */
  const float* release_at;    /* [T] */
  const int32_t* on_unscored; /* [T] */
} midstream_policy_table;

typedef struct {
  midstream_sizes sizes;
  midstream_slot_table slots;
  midstream_evidence_table evidence;
  midstream_chain_table chain;
  midstream_policy_table policy;
} midstream_tables;

/* Rows of a packed batch; those of one stream stand side by side, in order. */
typedef struct {
  float* logits; /* [count, P], row stride in elements, P or more; NaN after midstream_advance */
  int64_t logits_stride;
  const int32_t* slot;     /* [count], -1 = padding */
  const int32_t* position; /* [count], counted from the start of the prompt */
  int64_t count;
} midstream_rows;

/* Rows of the residual stream: [rows, d] with a free row stride in elements. */
typedef struct {
  const void* data;
  midstream_dtype dtype;
  int64_t rows;
  int64_t stride;
} midstream_hidden;

/* Probes that read one tap. */
typedef struct {
  const void* weight; /* [P, d] contiguous */
  midstream_dtype dtype;
  const float* bias; /* [P] */
  int64_t probes;
  int64_t width;
  int rms_norm; /* nonzero: rows are divided by sqrt(mean(row^2) + eps) first */
  float eps;
} midstream_probe_table;

/* A decoder layer's rows for midstream_add_rms_norm_score, all of one dtype. */
typedef struct {
  void* x; /* [rows, d], normed afterwards */
  int64_t x_stride;
  void* residual; /* [rows, d], the sum afterwards */
  int64_t residual_stride;
  const void* gamma; /* [d] */
  midstream_dtype dtype;
  int64_t rows;
  float eps; /* of the model's norm */
} midstream_norm_rows;

/* Probes with their weights copied into the order in which the kernels read them. */
typedef struct midstream_probes midstream_probes;

/* What the last call in this thread that did not return MIDSTREAM_OK found; valid until the next.
 */
MIDSTREAM_API const char* midstream_last_error(void);

/* The instruction set in use, as MIDSTREAM_CPU_ISA may cap it; null when that names none. */
MIDSTREAM_API const char* midstream_isa(void);

/* Copy probes. The biases are not copied: they must outlive the object. Free it with
 * midstream_probes_destroy, which takes null too. */
MIDSTREAM_API midstream_status midstream_probes_create(const midstream_probe_table* table,
                                                       midstream_probes** probes);
MIDSTREAM_API void midstream_probes_destroy(midstream_probes* probes);

/* Re-initialise a slot completely for a stream with `start` prompt tokens under a policy row. */
MIDSTREAM_API midstream_status midstream_admit(const midstream_tables* tables, int64_t slot,
                                               int32_t start, int32_t policy);

/* logits[n, p] = weight[p] . phi(hidden[n]) + bias[p], [rows, P] with a row stride of P or more. No
 * result depends on the other rows or on `threads`, the most that are used (1 or more). */
MIDSTREAM_API midstream_status midstream_score(const midstream_probes* probes,
                                               const midstream_hidden* hidden, float* logits,
                                               int64_t logits_stride, int threads);

/* Fold the rows into their streams' evidence, belief, risk and verdict. */
MIDSTREAM_API midstream_status midstream_advance(const midstream_tables* tables,
                                                 const midstream_rows* rows);

/* Both at once, for tables whose probes all read one tap: rows->logits is memory to work in. */
MIDSTREAM_API midstream_status midstream_score_advance(const midstream_probes* probes,
                                                       const midstream_hidden* hidden,
                                                       const midstream_tables* tables,
                                                       const midstream_rows* rows, int threads);

/* residual = x + residual; logits = score(residual); x = gamma * (residual / rms(residual)), every
 * result rounded to the dtype of the rows. */
MIDSTREAM_API midstream_status midstream_add_rms_norm_score(const midstream_probes* probes,
                                                            const midstream_norm_rows* rows,
                                                            float* logits, int64_t logits_stride,
                                                            int threads);

#ifdef __cplusplus
}
#endif

#endif /* MIDSTREAM_MIDSTREAM_H_ */
