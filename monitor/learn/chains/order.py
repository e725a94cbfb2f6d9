"""Whether the next state depends on more than the present one: order 1 against order 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from midstream.chain import ChainError
from midstream.learn.chains.counts import state_path
from midstream.learn.chains.symbols import SymbolStream

SMALL = 5.0
"""Expected counts below this are small (Cochran 1954, Biometrics 10:417)."""

_SMALL_SHARE = 0.2  # of the cells: more than Cochran's rule allows


@dataclass(frozen=True)
class OrderTest:
    """Result of :func:`order_test`.

    Attributes
    ----------
    statistic : float
        Pearson's χ², summed over the present states.
    degrees : int
        Degrees of freedom.
    p_value : float, optional
        Chance of a statistic as large under order 1; None where nothing can be compared.
    triples : int
        Triples of states that were compared.
    cells, small_cells : int
        Cells of all tables, and those with an expected count below `SMALL`.
    note : str
        What to keep in mind about the p-value; empty where nothing is.
    """

    statistic: float
    degrees: int
    p_value: float | None
    triples: int
    cells: int
    small_cells: int
    note: str


def order_test(streams: Sequence[SymbolStream], states: int) -> OrderTest:
    """Test order 1 against order 2 by Pearson's χ² on triples (Anderson and Goodman 1957).

    For each present state a table of the state before against the one after, whose rows are alike
    under order 1; V and the end of a stream are states after. Degrees of freedom are those of the
    rows and columns that were seen: (rows - 1) (columns - 1) per table. O(tokens + K^3).

    Parameters
    ----------
    streams : sequence of SymbolStream
        As for `midstream.learn.chains.counts.count`.
    states : int
        K.

    Raises
    ------
    ChainError
        Without streams, and for one whose states are not known.
    ImportError
        Without scipy.
    """
    try:
        from scipy.stats import chi2
    except ImportError as error:
        raise ImportError("the order test needs scipy: pip install 'midstream[learn]'") from error
    if not streams:
        raise ChainError("order_test: no streams")
    seen = np.zeros((states, states, states + 2))  # present, before, after
    for index, stream in enumerate(streams):
        path = state_path(stream, states, index)
        if stream.ended:
            path = np.append(path, states + 1)
        before, now, after = path[:-2], path[1:-1], path[2:]
        transient = now < states
        np.add.at(seen, (now[transient], before[transient], after[transient]), 1)
    statistic, degrees, cells, small, triples = 0.0, 0, 0, 0, 0
    for table in seen:
        table = table[table.any(axis=1)][:, table.any(axis=0)]
        if min(table.shape) < 2:
            continue
        expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
        statistic += float(((table - expected) ** 2 / expected).sum())
        degrees += (table.shape[0] - 1) * (table.shape[1] - 1)
        cells += table.size
        small += int((expected < SMALL).sum())
        triples += int(table.sum())
    if not degrees:
        note = "no state was entered from two states and left for two: nothing can be compared"
        return OrderTest(0.0, 0, None, 0, 0, 0, note)
    note = ""
    if small > _SMALL_SHARE * cells:
        note = (
            f"{small} of {cells} expected counts are below {SMALL:g}, so the p-value is rough; "
            "give more streams or fewer states"
        )
    p_value = float(chi2.sf(statistic, degrees))
    return OrderTest(statistic, degrees, p_value, triples, cells, small, note)
