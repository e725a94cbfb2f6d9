"""From recorded streams to the evidence a chain is fitted on, at the clock of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from midstream.bundle import Bundle
from midstream.chain import ChainError
from midstream.learn.chains.counts import ObservedStream
from midstream.learn.chains.symbols import SymbolStream
from midstream.measure.evidence import log_hazards
from midstream.measure.outcomes import Outcomes
from midstream.measure.recording import Judgement, Recording

# Edges of the bins: quantiles of the cumulative log-hazard at tokens that do not violate, the more
# of them the nearer to the violated ones, and of those. At most 14 bins.
_CALM_QUANTILES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
_VIOLATED_QUANTILES = (0.1, 0.25, 0.5, 0.75)
_PROMPT_QUANTILES = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Observed:
    """Streams of a recording whose outcome is known.

    Attributes
    ----------
    streams : list of ObservedStream
        A response that is known to be bad, but not where, is dated to its largest log-hazard.
    index : int64 [n]
        Which of the recording's streams each is.
    located : bool [n]
        False where the violation was dated so.
    unscored : int
        Response tokens without a score in these streams: their evidence is that of the token
        before, and those before the first recorded one are passed over.
    """

    streams: list[ObservedStream]
    index: NDArray[np.int64]
    located: NDArray[np.bool_]
    unscored: int

    def edges(self) -> tuple[list[float], list[float]]:
        """Edges of the bins of the evidence and of the prompts', at quantiles of these streams."""
        risk = np.concatenate([stream.log_hazard for stream in self.streams])
        violated = np.concatenate([stream.violated for stream in self.streams])
        prompts = [stream.prompt_log_hazard for stream in self.streams]
        parts = ((risk[~violated], _CALM_QUANTILES), (risk[violated], _VIOLATED_QUANTILES))
        edges = [np.quantile(values, levels) for values, levels in parts if len(values)]
        return (
            np.unique(np.concatenate(edges)).tolist(),
            # Without prompt probes all of them are 0.
            np.unique(np.quantile(prompts, _PROMPT_QUANTILES)).tolist() if any(prompts) else [],
        )

    def symbols(
        self,
        edges: Sequence[float],
        prompt_edges: Sequence[float],
        categories: Sequence[str] | None = None,
        *,
        dated: bool = True,
    ) -> list[SymbolStream]:
        """Bin them; ``categories`` are those of the recording's streams.

        Where not ``dated``, nobody knows where a stream violates unless its tokens were labelled.
        """
        found = []
        for stream, index, located in zip(self.streams, self.index, self.located, strict=True):
            category = categories[index] if categories is not None else ""
            symbols = stream.symbols(edges, prompt_edges, category)
            found.append(symbols if dated or located else replace(symbols, violated=None))
        return found


def observe(
    recording: Recording,
    bundle: Bundle,
    hazards: Sequence[str],
    *,
    response_labels: bool = False,
) -> Observed:
    """Evidence of every recorded response, with what its labels say. Linear in tokens.

    Parameters
    ----------
    recording : Recording
        Of the bundle's probes.
    bundle : Bundle
        Its chain and policy are without effect.
    hazards : sequence of str
        Any of them is a violation.
    response_labels : bool
        Look at no label of a token.

    Raises
    ------
    MeasureError
        For labels that are not there or contradict each other.
    ChainError
        When no response is known to violate.
    """
    outcomes = Outcomes.of(recording, _unjudged(recording), hazards)
    hazard = log_hazards(recording, bundle)
    streams, index, located, missing = [], [], [], 0
    for e, truth in enumerate(outcomes.truth):
        rows = np.arange(recording.starts[e], recording.starts[e + 1])
        rows = rows[outcomes.position[rows] >= 0]
        if truth < 0 or not len(rows):
            continue
        missing += int(outcomes.tokens[e]) - int(hazard.scored[rows].sum())
        position = outcomes.position[rows]
        gaps = np.diff(position, append=position[-1] + 1)
        rows = np.repeat(rows, gaps)
        risk = hazard.token[rows]
        shown = np.zeros(len(risk), dtype=bool)
        if not response_labels:
            shown |= outcomes.label[rows] == 1
        located.append(bool(shown.any() or not truth))
        if not located[-1]:
            shown[risk.argmax()] = True
        violated = np.maximum.accumulate(shown)
        prompt = float(hazard.prompt[e])
        streams.append(ObservedStream(risk, violated, bool(recording.ended[e]), prompt))
        index.append(e)
    if not any(stream.violated.any() for stream in streams):
        raise ChainError(
            f"no response is known to show {', '.join(map(repr, hazards))}, so nothing can be "
            "learnt about it; give more that do"
        )
    return Observed(streams, np.array(index, np.int64), np.array(located, np.bool_), missing)


def _unjudged(recording: Recording) -> Judgement:
    streams, tokens = len(recording), len(recording.position)
    return Judgement(
        risk=np.full(tokens, np.nan, np.float32),
        verdict=np.zeros(tokens, np.uint8),
        halted_at=np.full(streams, -1, np.int32),
        cause=np.zeros(streams, np.int16),
        unscored=np.zeros(streams, np.int32),
    )
