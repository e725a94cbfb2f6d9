"""Live streams, as their reports keep them, to a recording."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from midstream.bundle import Bundle
from midstream.kernels.tables import Phase
from midstream.measure.recording import TIER, Recording, RecordingError, probes_hash
from midstream.streams import StreamReport


def from_reports(
    reports: Sequence[StreamReport],
    bundle: Bundle,
    *,
    streams: Sequence[str] | None = None,
    ended: Sequence[bool] | None = None,
) -> Recording:
    """Do what `Recording.from_reports` says."""
    probes = bundle.bank.names
    rows = [trace_rows(report, bundle) for report in reports]
    lengths = [len(position) for position, _ in rows]
    names = [report.stream for report in reports] if streams is None else streams
    stopped = [report.finish_reason == "stop" for report in reports]
    hazards = tuple(dict.fromkeys(bundle.bank.hazards))
    tokens = sum(lengths)
    return Recording(
        bundle=bundle.hash,
        probes=probes,
        hazards=hazards,
        streams=tuple(names),
        starts=np.cumsum([0, *lengths], dtype=np.int64),
        prompt_tokens=np.array([report.prompt_tokens for report in reports], np.int32),
        ended=np.array(stopped if ended is None else ended, np.bool_),
        position=np.concatenate([np.empty(0, np.int32), *(p for p, _ in rows)]),
        logits=np.concatenate(
            [np.empty((0, len(probes)), np.float32), *(logits for _, logits in rows)]
        ),
        labels=np.full((tokens, len(hazards)), -1, np.int8),
        response_labels=np.full((len(reports), len(hazards)), -1, np.int8),
        characters=None,
        texts=None,
        columns={TIER: tuple(report.tier for report in reports)},
        probes_hash=probes_hash(bundle.bank),
    )


def trace_rows(
    report: StreamReport, bundle: Bundle
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Positions [n] and logits [n, P] of a report's trace.

    Raises
    ------
    RecordingError
        As `Recording.from_reports`.
    """
    if report.bundle != bundle.hash:
        raise RecordingError(
            f"stream {report.stream!r} was judged by bundle {report.bundle}, this is {bundle.hash}"
        )
    trace = report.trace
    position = np.array(trace.position, dtype=np.int32)
    scores = [trace.scores[name] for name in bundle.bank.names]
    logits = np.array(scores, dtype=np.float32).T.reshape(len(position), len(scores))  # None is NaN

    phase = bundle.bank.evidence_table().phase.numpy()
    of_prompt = (position < report.prompt_tokens)[:, None]
    reads = phase == np.where(of_prompt, int(Phase.PROMPT), int(Phase.RESPONSE))
    scored = (np.isfinite(logits) | ~reads).all(axis=1) & reads.any(axis=1)
    # The ring forgets the oldest tokens first. One without a score leaves no count behind; it is
    # missed when it halted the stream or was the last of the prompt, and otherwise is a gap, which
    # a stream is judged by in just the same way.
    needed = [report.halted_at] if report.halted_at is not None else []
    if 0 < report.prompt_tokens < position.max(initial=0):
        needed.append(report.prompt_tokens - 1)
    if scored.sum() != report.scored or not np.isin(needed, position).all():
        counted = report.scored + report.unscored
        if not (phase == Phase.PROMPT).any():
            counted += report.prompt_tokens
        fed = max(int(position.max(initial=-1)) + 1, counted)
        raise RecordingError(
            f"stream {report.stream!r}: its trace keeps {len(position)} tokens, it had more; build "
            f"the monitor with trace={fed} or more"
        )
    return position, logits
