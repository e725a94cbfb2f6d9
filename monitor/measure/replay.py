"""Recorded residual streams through a monitor once more: the same rows give the same verdicts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from midstream.monitor import Monitor
from midstream.streams import StreamReport
from midstream.taps import Tap


def replay(
    monitor: Monitor,
    hidden: Mapping[Tap, NDArray[np.float32]],
    prompt_tokens: int,
    *,
    stream: str = "replay",
    tier: str | None = None,
) -> StreamReport:
    """Feed one recorded stream and return its report.

    Parameters
    ----------
    monitor : Monitor
        With a free slot, and a trace that is long enough for what is to be read from the report.
    hidden : mapping of Tap to float32 [tokens, d]
        Prompt and response, as :func:`midstream.learn.collect.residuals` returns them.
    prompt_tokens : int
    """
    slot = monitor.admit(stream, prompt_tokens, tier)
    tokens = 0
    for tap, rows in hidden.items():
        monitor.observe(tap, torch.from_numpy(rows).to(monitor.device))
        tokens = len(rows)
    monitor.advance(
        torch.full((tokens,), slot, dtype=torch.int32, device=monitor.device),
        torch.arange(tokens, dtype=torch.int32, device=monitor.device),
    )
    return monitor.retire(slot)


def evidence_curve(
    monitor: Monitor, hidden: Mapping[Tap, NDArray[np.float32]], prompt_tokens: int
) -> NDArray[np.float32]:
    """Evidence of every probe after each token of one recorded stream, [tokens, P].

    The rows are fed one by one, so the kernels themselves do the smoothing.
    """
    slot = monitor.admit("replay", prompt_tokens)
    streams = {tap: torch.from_numpy(rows).to(monitor.device) for tap, rows in hidden.items()}
    where = torch.tensor([slot], dtype=torch.int32, device=monitor.device)
    curve = []
    for position in range(min(map(len, streams.values()))):
        for tap, rows in streams.items():
            monitor.observe(tap, rows[position : position + 1])
        monitor.advance(where, torch.full_like(where, position))
        curve.append(monitor.slots.evidence[slot].cpu().numpy().copy())
    monitor.retire(slot)
    return np.stack(curve)


def risk_curve(report: StreamReport) -> NDArray[np.float64]:
    """Risk at the end of the prompt and at each response token, [response tokens + 1].

    NaN where a token was not scored.
    """
    first = report.prompt_tokens - 1
    pairs = zip(report.trace.position, report.trace.risk, strict=True)
    return np.array([np.nan if risk is None else risk for at, risk in pairs if at >= first])
