#include "midstream/score_advance.h"

namespace midstream {

std::int64_t score_advance(const Probes& probes, const Hidden& hidden, const Rows& rows,
                           const Tables& tables, int threads) {
  const std::int64_t bad = first_bad_row(rows, tables);
  if (bad >= 0) return bad;
  score(probes, hidden, {rows.logits, rows.logits_stride}, threads);
  advance(rows, tables);
  return -1;
}

}  // namespace midstream
