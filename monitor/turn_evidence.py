"""The evidence of a turn: what the token monitor saw in one response, as one number.

It is ``-log(1 - p)``, in nats, of the peak detect risk p: the largest P(violated by now) at any
token of the response, by the bundle's own chain from its own prior. Horizon, thresholds and tier
of the stream do not enter, nor does a prior carried over from earlier turns: the turn chain already
holds what these said, and must not count it twice.

So the stored logits go through the kernels once more, at a horizon of 0: two calls of
``advance``, some microseconds per token.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from numpy.typing import NDArray

from midstream.bundle import Bundle
from midstream.kernels import ops
from midstream.kernels.tables import SlotTable
from midstream.policy import Policy, Thresholds
from midstream.streams import StreamReport

DETECT = Policy(tiers={"strict": Thresholds(horizon=0, halt_at=1.0)}, default_tier="strict")
"""Makes a stream's risk its detect risk."""

_RESOLUTION = 2.0**-24  # of 1 - p, since p is fp32: no log-hazard exceeds 16.64 nats


class TurnEvidenceError(ValueError):
    """A report that does not hold what the evidence is made of."""


class TurnEvidence:
    """Reads reports of one bundle; thread-safe.

    Parameters
    ----------
    bundle : Bundle
        Its probes and token chain.
    """

    @torch.inference_mode(False)
    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle.hash
        self._names = bundle.bank.names
        self._slots = SlotTable.allocate(
            1, len(self._names), bundle.chain.states, window=bundle.bank.window
        )
        self._reads_prompts = bool(bundle.chain.prompt_edges)
        chain = bundle.chain.table()
        self._prior = chain.prior
        self._advance = ops.Backend(torch.device("cpu")).bind_advance(
            self._slots, bundle.bank.evidence_table(), chain, DETECT.table(bundle.chain)
        )
        self._lock = threading.Lock()

    def log_hazard(self, report: StreamReport, tokens: int | None = None) -> float | None:
        """Log-hazard of the response of a stream, 0 to 16.64 nats; None if no token has a score.

        A response without tokens says nothing: 0. O(n) in the tokens of the trace.

        Parameters
        ----------
        report : StreamReport
        tokens : int, optional
            Read only so many of the response.

        Raises
        ------
        TurnEvidenceError
            For a report of another bundle, and for a trace that does not reach back to the first
            response token, or, where the bundle reads prompts, to the first prompt token.
        """
        if report.bundle != self._bundle:
            raise TurnEvidenceError(
                f"report of stream {report.stream!r}: made by bundle {report.bundle}, the gate has "
                f"{self._bundle}; give the gate and the monitor the same bundle"
            )
        trace = report.trace
        position = np.array(trace.position, dtype=np.int32)
        prompt = int((position < report.prompt_tokens).sum())
        kept = len(position) - prompt
        lost = bool(position[prompt] != report.prompt_tokens) if kept else not prompt
        if lost and report.scored:
            raise TurnEvidenceError(
                f"report of stream {report.stream!r}: its trace begins behind the first response "
                "token; build the monitor with a trace as long as the longest response"
            )
        if not kept and not report.unscored:
            return 0.0
        logits = np.array([trace.scores[name] for name in self._names], dtype=np.float32).T
        scored = np.asarray(np.isfinite(logits).any(axis=1))
        if self._reads_prompts and scored.sum() < report.scored:
            raise TurnEvidenceError(
                f"report of stream {report.stream!r}: its trace has {scored.sum()} of "
                f"{report.scored} scored tokens, and the bundle reads prompts; build the monitor "
                "with a trace as long as the longest prompt and response together"
            )
        if tokens is not None:
            position = position[position < report.prompt_tokens + tokens]
            logits = logits[: len(position)]
        if not scored[prompt : len(position)].any():
            return None
        with self._lock:
            self._slots.admit(0, start=prompt, policy=0, prior=self._prior)
            self._feed(logits[:prompt], position[:prompt] - position[0])
            self._slots.host.peak[0] = 0.0  # of the prompt
            self._feed(logits[prompt:], position[prompt:] - position[0])
            peak = float(self._slots.host.peak[0])
        return log_hazard_of(peak)

    def _feed(self, logits: NDArray[np.float32], position: NDArray[np.int32]) -> None:
        self._advance(
            torch.from_numpy(np.ascontiguousarray(logits)),
            torch.zeros(len(position), dtype=torch.int32),
            torch.from_numpy(position),
        )


def log_hazard_of(peak: float) -> float:
    """``-log(1 - p)`` of a peak detect risk that was computed in fp32, nats."""
    return -math.log(max(1.0 - peak, _RESOLUTION))
