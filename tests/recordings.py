"""Random recordings, and monitors to judge them, that several tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from toy import model

from midstream.bank import Probe, ProbeBank
from midstream.bundle import Bundle, Fingerprint
from midstream.chain import Chain
from midstream.evidence import Count, Cusum, Ema, Last, Max, Mean, Run
from midstream.measure.recording import Recording, probes_hash
from midstream.policy import Policy, Thresholds
from midstream.taps import Tap

RULES = (
    Last(),
    Ema(alpha=0.3),
    Mean(window=3),
    Cusum(kappa=0.2, alarm=2.0),
    Count(theta=0.5, k=4),
    Run(theta=0.3, k=2),
    Max(),
)
HAZARD = "badness"


def random_chain(rng: np.random.Generator, states: int = 4, *, reads_prompt: bool = True) -> Chain:
    """A chain whose states violate soon or hardly ever, so that the risk goes up and down."""

    def rows(count: int, width: int, last: float = 1.0) -> list[list[float]]:
        return rng.dirichlet([1.0] * (width - 1) + [last], count).tolist()

    size = states + 1
    edges, prompt_edges = [1.0, 2.0, 4.0, 6.0], [0.5, 1.0] if reads_prompt else []
    return Chain(
        transition=[*rows(states, size, 0.1), [0.0] * states + [1.0]],
        ending=rng.uniform(0.01, 0.4, size).tolist(),
        emission=rows(size, len(edges) + 1),
        edges=edges,
        prior=rows(1, size, 0.1)[0],
        prompt_emission=rows(size, len(prompt_edges) + 1),
        prompt_edges=prompt_edges,
    )


def random_bundle(rng: np.random.Generator, *, reads_prompt: bool = True, **policy: Any) -> Bundle:
    """Probes of every evidence rule over two taps of the toy, two of them on the prompt."""
    width = model().config.hidden_size

    def probe(n: int, **fields: Any) -> Probe:
        weight = torch.from_numpy(rng.standard_normal(width)) / width**0.5
        return Probe(f"probe {n}", HAZARD, Tap(n % 2, "resid_post"), weight, **fields)

    probes = [probe(n, evidence=rule) for n, rule in enumerate(RULES)]
    if reads_prompt:
        probes += [probe(n, reads="prompt", evidence=RULES[n % 7]) for n in (7, 8)]
    fields = {"tiers": {"moderate": Thresholds(horizon=3, halt_at=0.9)}, **policy}
    return Bundle(
        bank=ProbeBank(probes),
        chain=random_chain(rng, reads_prompt=reads_prompt),
        policy=Policy(**{"default_tier": "moderate", **fields}),
        fingerprint=Fingerprint.of(model()),
    )


def random_recording(
    rng: np.random.Generator, bundle: Bundle | None = None, streams: int = 20, **fields: Any
) -> Recording:
    """Streams of 0 to 40 tokens with gaps, unscored tokens, and labels of all kinds."""
    probes = bundle.bank.names if bundle else ("a.b", "c/d list.element", "π")
    hazards = (HAZARD, "other")
    position, lengths = [], []
    for _ in range(streams):
        fed = np.flatnonzero(rng.random(rng.integers(0, 41)) < 0.9)
        position.append(fed.astype(np.int32))
        lengths.append(len(fed))
    starts = np.cumsum([0, *lengths]).astype(np.int64)
    prompt_tokens = rng.integers(0, 9, streams).astype(np.int32)
    tokens = int(starts[-1])
    rows = np.concatenate(position)
    logits = rng.standard_normal((tokens, len(probes))).astype(np.float32)
    logits[rng.random(tokens) < 0.1, rng.integers(len(probes))] = np.nan
    labels = rng.integers(-1, 2, (tokens, 2)).astype(np.int8)
    labels[rng.random(tokens) < 0.6] = 0
    labels[rows < np.repeat(prompt_tokens, lengths)] = -1
    response_labels = np.full((streams, 2), -1, np.int8)
    for e in range(streams):
        own = labels[starts[e] : starts[e + 1]]
        free = (own != 1).all(axis=0) & (rng.random() < 0.7)
        response_labels[e] = np.where((own == 1).any(axis=0), 1, np.where(free, 0, -1))
    return Recording(
        **{
            "bundle": bundle.hash if bundle else "0" * 64,
            "probes": probes,
            "hazards": hazards,
            "streams": tuple(f"stream {e}" for e in range(streams)),
            "starts": starts,
            "prompt_tokens": prompt_tokens,
            "ended": rng.random(streams) < 0.5,
            "position": rows,
            "logits": logits,
            "labels": labels,
            "response_labels": response_labels,
            "characters": rng.integers(-1, 99, (tokens, 2)).astype(np.int32),
            "texts": tuple("é\n" * e for e in range(streams)),
            "columns": {"source": tuple(rng.choice(["x", "y", ""], streams).tolist())},
            "probes_hash": probes_hash(bundle.bank) if bundle else "1" * 64,
            **fields,
        }
    )


def same(one: Recording, other: Recording) -> bool:
    """Whether they agree in every bit."""
    for name in vars(one):
        ours, theirs = getattr(one, name), getattr(other, name)
        if isinstance(ours, np.ndarray):
            if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
                return False
            if ours.tobytes() != theirs.tobytes():
                return False
        elif ours != theirs:
            return False
    return True
