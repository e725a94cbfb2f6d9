"""Evidence of every probe after every token of many recorded streams, as the kernels compute it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from midstream.bundle import Bundle
from midstream.kernels import ops
from midstream.kernels.tables import SlotTable
from midstream.measure.recording import Recording

_STREAMS = 256
"""Streams fed side by side: a call is one token of each, so its cost is shared by so many."""


def evidence_curves(recording: Recording, bundle: Bundle) -> NDArray[np.float32]:
    """Feed every stream token by token and read its evidence after each.

    The slot table keeps the newest evidence alone, so that takes a call of ``advance`` per position
    and batch of streams; time is linear in tokens, memory in streams of a batch.

    Parameters
    ----------
    recording : Recording
        Of the bundle's probes. Chain and policy of the bundle are without effect here.
    bundle : Bundle

    Returns
    -------
    float32 [N, P]
        The evidence a probe begins with where it has not read a token yet.
    """
    slots = SlotTable.allocate(
        min(_STREAMS, len(recording.streams)),
        len(bundle.bank.heads),
        bundle.chain.states,
        window=bundle.bank.window,
    )
    chain = bundle.chain.table()
    advance = ops.Backend(torch.device("cpu")).bind_advance(
        slots, bundle.bank.evidence_table(), chain, bundle.policy.table(bundle.chain)
    )
    tier = bundle.policy.row(bundle.policy.default_tier)
    curves = np.empty_like(recording.logits)
    lengths = np.diff(recording.starts)
    order = np.argsort(-lengths, kind="stable")  # streams of like length share a batch
    for begin in range(0, len(order), _STREAMS):
        batch = order[begin : begin + _STREAMS]
        for slot, stream in enumerate(batch):
            start = int(recording.prompt_tokens[stream])
            slots.admit(slot, start=start, policy=tier, prior=chain.prior)
        for step in range(lengths[batch[0]]):
            going = int((lengths[batch] > step).sum())  # the longest come first
            rows = recording.starts[batch[:going]] + step
            advance(
                torch.from_numpy(recording.logits[rows]),
                torch.arange(going, dtype=torch.int32),
                torch.from_numpy(recording.position[rows]),
            )
            curves[rows] = slots.evidence[:going].numpy()
    return curves


@dataclass(frozen=True)
class LogHazards:
    """Cumulative log-hazards, which the bins of a chain part.

    Attributes
    ----------
    token : float64 [N]
        Of the probes that read the phase that a token is in; of one without a score, that before.
    scored : bool [N]
        Whether all of these probes have scored it.
    prompt : float64 [E]
        That of the last prompt token; 0 where none was recorded, and without prompt probes.
    """

    token: NDArray[np.float64]
    scored: NDArray[np.bool_]
    prompt: NDArray[np.float64]


def log_hazards(recording: Recording, bundle: Bundle) -> LogHazards:
    """Sum up the evidence of every recorded token. O(N P)."""
    evidence = evidence_curves(recording, bundle).astype(np.float64)
    hazard = np.logaddexp(0.0, evidence - bundle.bank.evidence_table().center.numpy())
    of_response = np.array([probe.reads == "response" for probe in bundle.bank.heads])
    reads = of_response[None, :] == recording.in_response[:, None]
    token = np.where(reads, hazard, 0.0).sum(axis=1)
    prompt = np.zeros(len(recording))
    stream = np.repeat(np.arange(len(recording)), np.diff(recording.starts))
    before = ~recording.in_response
    prompt[stream[before]] = token[before]  # rows are in order, so the last one stays
    scored = (np.isfinite(recording.logits) | ~reads).all(axis=1)
    return LogHazards(token, np.asarray(scored), prompt)
