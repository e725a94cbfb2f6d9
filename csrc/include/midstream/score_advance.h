// score_advance: score and advance in one call, for a bank whose probes all read one tap.
#pragma once

#include "midstream/advance.h"
#include "midstream/score.h"

namespace midstream {

/// score(probes, hidden, rows.logits), then advance(rows, tables). Returns -1, or the index of the
/// first row that first_bad_row() refuses; nothing is changed then. `hidden.rows` is `rows.count`,
/// the tables are for as many probes as there are here.
std::int64_t score_advance(const Probes& probes, const Hidden& hidden, const Rows& rows,
                           const Tables& tables, int threads);

}  // namespace midstream
