"""HARC's four directions, and the layers where harm and refusal stand apart (2607.00572).

Per tap: ``v_harm`` and ``v_ref`` are mean differences of harmful and benign prompts, at the last
instruction token and at the last prompt token; ``v_harm_resp`` and ``v_ref_resp`` those of harmful
and helpful, and of refusing and helpful responses, each the mean of its first 32 tokens. A good
layer keeps harm and refusal apart on both sides, and each the same from prompt to response.

Of HARC only the directions are used: it trains the model with them, a monitor reads. It reads the
response, because harm shows there even when an attack hides it in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from midstream.evidence import Mean
from midstream.learn.methods.checks import joined, labels_of, probe_name
from midstream.learn.methods.method import ReadOut, Task
from midstream.learn.methods.moments import Moments, class_moments
from midstream.learn.methods.units import (
    RESPONSE_WINDOW,
    Units,
    instruction_end_rows,
    of_examples,
    prompt_end_rows,
    response_rows,
)
from midstream.learn.tokens import UNKNOWN, Source, Tokens, TrainingDataError
from midstream.probe import Probe
from midstream.taps import Tap

HELPFUL, HARMFUL, REFUSING = 0, 1, 2


@dataclass(frozen=True)
class Directions:
    """The four directions at one tap, fp64 [d]."""

    v_harm: Tensor
    v_ref: Tensor
    v_harm_resp: Tensor
    v_ref_resp: Tensor

    @property
    def score(self) -> float:
        """Layer score, 0 to 1; 0 as well where a direction vanishes."""
        apart = 1 - abs(_cos(self.v_ref, self.v_harm))
        apart_resp = 1 - abs(_cos(self.v_ref_resp, self.v_harm_resp))
        same_harm = abs(_cos(self.v_harm, self.v_harm_resp))
        same_ref = abs(_cos(self.v_ref, self.v_ref_resp))
        return apart * apart_resp * same_harm * same_ref


@dataclass(frozen=True)
class HARC:
    """Response-side read-outs of harm and of refusal over the best taps.

    Two read-outs, whose parts add up: ``harc`` looks for ``task.hazard``, ``harc-refusal`` for
    ``task.refusal``. The logit is the mean over the taps of where the residual stands along the
    direction: +1/2 at the mean of the harmful (refusing) responses, -1/2 at that of the helpful. It
    is averaged over 32 tokens. The facts have the ``score`` of every tap.

    All taps of the source are candidates. The paper leaves out the first four and the last four
    layers, which would leave none of a small model: collect without them where there are enough.

    Cost: three passes, O(tokens x d) a tap; memory O(d) a tap.

    Attributes
    ----------
    layers : int
        Taps read, those of the highest score.
    """

    name: ClassVar[str] = "harc"

    layers: int = 2

    def fit(self, source: Source, task: Task) -> list[ReadOut]:
        """Fit both read-outs; see `Method`."""
        tokens = source.tokens
        if task.refusal is None:
            raise TrainingDataError(
                f"{self.name}: hazard {task.hazard!r}: tells harm from refusal, and the task names "
                "no response label for refusal; name one"
            )
        inst, post = (
            class_moments(self.name, source, self._prompts(tokens, task.hazard, rows, what))
            for rows, what in (
                (instruction_end_rows(tokens), "instruction"),
                (prompt_end_rows(tokens), "prompt"),
            )
        )
        response = class_moments(
            self.name, source, self._responses(tokens, task.hazard, task.refusal)
        )
        directions = {
            tap: Directions(
                v_harm=inst[tap].mean[1] - inst[tap].mean[0],
                v_ref=post[tap].mean[1] - post[tap].mean[0],
                v_harm_resp=response[tap].mean[HARMFUL] - response[tap].mean[HELPFUL],
                v_ref_resp=response[tap].mean[REFUSING] - response[tap].mean[HELPFUL],
            )
            for tap in source.taps
        }
        scores = {tap: four.score for tap, four in directions.items()}
        ranked = sorted((tap for tap in scores if scores[tap] > 0), key=lambda tap: -scores[tap])
        if not ranked:
            raise TrainingDataError(
                f"{self.name}: hazard {task.hazard!r}: the layer score is 0 at all of "
                f"{', '.join(map(str, source.taps))}: at each some direction vanishes or two are "
                "parallel; collect at deeper layers"
            )
        chosen = sorted(ranked[: self.layers])
        facts = {f"score {tap}": score for tap, score in scores.items()}
        return [
            self._read_out(self.name, task.hazard, HARMFUL, chosen, response, facts),
            self._read_out(f"{self.name}-refusal", task.refusal, REFUSING, chosen, response, facts),
        ]

    def _prompts(self, tokens: Tokens, hazard: str, rows: NDArray[np.bool_], what: str) -> Units:
        labels = labels_of(self.name, tokens, hazard, "prompt")
        known = labels != UNKNOWN
        return Units(
            of_examples(self.name, tokens, known, rows, what), labels[known].astype(np.int64)
        )

    def _responses(self, tokens: Tokens, hazard: str, refusal: str) -> Units:
        harm, refuses = (
            labels_of(self.name, tokens, label, "response") for label in (hazard, refusal)
        )
        of_class = np.full(len(tokens), -1)
        of_class[(harm == 0) & (refuses == 0)] = HELPFUL
        of_class[(harm == 1) & (refuses != 1)] = HARMFUL
        of_class[(refuses == 1) & (harm != 1)] = REFUSING
        for value, what in enumerate(("helpful (neither)", "harmful", "refusing")):
            if not (of_class == value).any():
                raise TrainingDataError(
                    f"{self.name}: hazard {hazard!r}, refusal {refusal!r}: none of {len(tokens)} "
                    f"responses is {what} by its response labels; label some that are"
                )
        wanted = of_class >= 0
        rows = response_rows(tokens, first=RESPONSE_WINDOW)
        return Units(of_examples(self.name, tokens, wanted, rows, "response"), of_class[wanted])

    def _read_out(
        self,
        method: str,
        hazard: str,
        of_class: int,
        taps: list[Tap],
        moments: dict[Tap, Moments],
        facts: dict[str, float],
    ) -> ReadOut:
        parts = []
        for tap in taps:
            helpful, other = moments[tap].mean[HELPFUL], moments[tap].mean[of_class]
            direction = other - helpful
            parts.append(
                Probe.folded(
                    probe_name(hazard, method, tap),
                    hazard,
                    tap,
                    direction / (direction.square().sum() * len(taps)),
                    mean=(other + helpful) / 2,
                    evidence=Mean(window=RESPONSE_WINDOW),
                )
            )
        return ReadOut(method, joined(hazard, method, parts), facts)


def _cos(a: Tensor, b: Tensor) -> float:
    """Cosine, 0 where one of the two vanishes."""
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths else 0.0
