"""Recorded logits through the kernels' own ``advance`` once more, without the model.

Nothing but the logits comes from the recording: evidence rules are the bank's, belief, risk and
verdict the kernels'. Linear in the tokens, some 0.4 us each with the testbed's 26 states on one
core; memory beside the recording and the result is constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from midstream.bundle import Bundle
from midstream.chain import Chain
from midstream.kernels import ops
from midstream.kernels.tables import SlotTable
from midstream.measure.recording import TIER, Judgement, Recording, RecordingError, probes_hash
from midstream.policy import Policy

_SLOTS = 256
_ROWS = 1 << 16
_WINDOW = 512
"""Tokens of trace per slot: what is fed between two readings of the slot table."""


def rejudge(
    recording: Recording,
    bundle: Bundle,
    *,
    policy: Policy | None = None,
    chain: Chain | None = None,
    tier: str | None = None,
) -> Judgement:
    """Judge every recorded token again; with nothing changed, to the very verdicts it had.

    A stream that was halted has no tokens after its halt, so that a looser policy shows how far it
    would have come at least, and no more.

    Parameters
    ----------
    recording : Recording
    bundle : Bundle
        With the probes that made the recording.
    policy, chain : optional
        In place of the bundle's.
    tier : str, optional
        Judges all streams, were it looser than a client may ask for. By default each has the tier
        it was recorded under (`midstream.measure.recording.TIER`), where that is known, and the
        policy's default where not.

    Raises
    ------
    RecordingError
        For a recording of other probes, and for a policy with segments, since a recording does not
        say where they begin.
    PolicyError
        For a tier that the policy does not have.
    BundleError
        For a chain that the bundle's probes cannot feed.
    """
    judged = _empty(len(recording), len(recording.position))
    for part in judge(recording, bundle, policy=policy, chain=chain, tier=tier):
        judged.risk[part.rows] = part.risk
        judged.verdict[part.rows] = part.verdict
        judged.halted_at[part.streams] = part.halted_at
        judged.cause[part.streams] = part.cause
        judged.unscored[part.streams] = part.unscored
    return judged


@dataclass(frozen=True)
class JudgedPart(Judgement):
    """The judgement of some streams of a recording that stand side by side."""

    streams: slice
    rows: slice


def judge(
    recording: Recording,
    bundle: Bundle,
    *,
    policy: Policy | None = None,
    chain: Chain | None = None,
    tier: str | None = None,
) -> Iterator[JudgedPart]:
    """Do what `rejudge` does part by part, in constant memory."""
    policy = policy or bundle.policy
    check_probes(recording, bundle)
    _check_segments(policy)
    # checks that it fits; a turn model is of no concern here
    chain = replace(bundle, chain=chain or bundle.chain, policy=policy, turns=None).chain
    policy_rows = _policy_rows(recording, policy, tier)
    bank = bundle.bank
    slots = SlotTable.allocate(
        _SLOTS, len(bank.names), chain.states, window=bank.window, trace=_WINDOW
    )
    chain_table = chain.table()
    advance = ops.Backend("cpu").bind_advance(
        slots, bank.evidence_table(), chain_table, policy.table(chain)
    )
    host = slots.host
    for first, last in _parts(recording.starts):
        streams = slice(first, last)
        rows = slice(int(recording.starts[first]), int(recording.starts[last]))
        for free, e in enumerate(range(first, last)):
            start, row = int(recording.prompt_tokens[e]), int(policy_rows[e])
            slots.admit(free, start=start, policy=row, prior=chain_table.prior)
        slot = np.repeat(
            np.arange(last - first, dtype=np.int32), np.diff(recording.starts[first : last + 1])
        )
        position = recording.position[rows]
        risk = np.empty(len(position), np.float32)
        verdict = np.empty(len(position), np.uint8)
        for now in _windows(position):
            # The op leaves NaN behind in the logits, so it is given a copy.
            logits = torch.from_numpy(recording.logits[rows][now])
            advance(logits, torch.from_numpy(slot[now]), torch.from_numpy(position[now]))
            cell = slot[now], position[now] % _WINDOW
            risk[now], verdict[now] = host.trace_risk[cell], host.trace_verdict[cell]
        used = slice(0, last - first)
        yield JudgedPart(
            risk=risk,
            verdict=verdict,
            halted_at=host.halted_at[used].copy(),
            cause=host.cause[used].copy(),
            unscored=host.unscored[used].copy(),
            streams=streams,
            rows=rows,
        )


def check_probes(recording: Recording, bundle: Bundle) -> None:
    """Refuse a recording of other probes than the bundle's, with a RecordingError."""
    ours = probes_hash(bundle.bank)
    if recording.probes != bundle.bank.names or recording.probes_hash != ours:
        raise RecordingError(
            f"recorded with the probes {', '.join(recording.probes)} ({recording.probes_hash}) of "
            f"bundle {recording.bundle}; bundle {bundle.hash} has {', '.join(bundle.bank.names)} "
            f"({ours}). Their logits are others: record the streams anew, or give a bundle with "
            "the same probes"
        )


def _check_segments(policy: Policy) -> None:
    if policy.segments:
        raise RecordingError(
            f"the policy has segments ({', '.join(policy.segments)}), and a recording does not say "
            "where they begin; take them out"
        )


def _policy_rows(recording: Recording, policy: Policy, tier: str | None) -> NDArray[np.int32]:
    """Row of the policy's table for each stream, [E]."""
    names = recording.columns.get(TIER) if tier is None else None
    if names is None:
        names = (tier or policy.default_tier,) * len(recording)
    row = {name: policy.row(name) for name in set(names)}  # type: ignore[arg-type]
    return np.array([row[name] for name in names], dtype=np.int32)


def _parts(starts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of ``_SLOTS`` streams at most, and ``_ROWS`` tokens at most if not one stream alone."""
    first, streams = 0, len(starts) - 1
    while first < streams:
        last = int(np.searchsorted(starts, starts[first] + _ROWS, side="right")) - 1
        last = min(max(last, first + 1), first + _SLOTS, streams)
        yield first, last
        first = last


def _windows(position: NDArray[np.int32]) -> Iterator[NDArray[np.int64]]:
    """Rows of one window of positions after the other, so that none is overwritten in the trace."""
    window = position // _WINDOW
    order = np.argsort(window, kind="stable")  # rows of a stream stay side by side and in order
    begins = np.flatnonzero(np.diff(window[order], prepend=-1))
    yield from (part for part in np.split(order, begins[1:]) if len(part))


def _empty(streams: int, tokens: int) -> Judgement:
    return Judgement(
        risk=np.empty(tokens, np.float32),
        verdict=np.empty(tokens, np.uint8),
        halted_at=np.empty(streams, np.int32),
        cause=np.empty(streams, np.int16),
        unscored=np.empty(streams, np.int32),
    )
