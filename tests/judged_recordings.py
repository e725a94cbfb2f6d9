"""Random recordings with a judgement, and all that makes measuring hard.

Prompts and plain texts, empty responses, gaps, tokens without a score, special tokens, unknown
labels of tokens and of responses, hazards that never occur, held and halted streams.
"""

from __future__ import annotations

import numpy as np
import toy

from midstream.bundle import Bundle
from midstream.evidence import Ema
from midstream.kernels.tables import NO_CAUSE, UNSCORED_CAUSE, Verdict
from midstream.measure.recording import Judgement, Recording
from midstream.policy import Policy, Thresholds
from midstream.taps import Tap

HAZARDS = ("badness", "rudeness", "never")
HALT_AT, HOLD_AT = 0.8, 0.6


def bundle(*, horizon: int = 0, hold_back: int | str = 1) -> Bundle:
    """Two probes for the first hazard, one for the second, and one that reads the prompt."""
    lm = toy.model()
    later = {"tap": Tap(1, "resid_post"), "weight": toy.detector(lm).weight}
    probes = [
        toy.detector(lm, name="a"),
        toy.detector(lm, name="b", evidence=Ema(alpha=0.5)),
        toy.detector(lm, name="rude", hazard="rudeness", **later),
        toy.detector(lm, name="prompt", reads="prompt"),
    ]
    tiers = {"moderate": Thresholds(horizon=horizon, halt_at=HALT_AT, hold_at=HOLD_AT)}
    made = toy.bundle(probes=probes)
    return made.with_policy(
        Policy(tiers=tiers, default_tier="moderate", hold_back=hold_back, on_unscored="hold")
    )


def recording(random: np.random.Generator, streams: int = 40) -> tuple[Recording, Judgement]:
    """One of each of ``streams`` random streams, labelled at random, judged by a random risk."""
    made = [_stream(random) for _ in range(streams)]
    rows = {key: [row[key] for _, mine in made for row in mine] for key in _ROW}
    per = {key: [facts[key] for facts, _ in made] for key in _STREAM}
    probes = bundle().bank.names
    labels = np.array(rows["labels"], np.int8).reshape(-1, len(HAZARDS))
    found = Recording(
        bundle="0" * 64,
        probes=probes,
        hazards=HAZARDS,
        streams=tuple(f"stream-{e}" for e in range(streams)),
        starts=np.cumsum([0, *(len(mine) for _, mine in made)]),
        prompt_tokens=np.array(per["prompt"], np.int32),
        ended=np.array(per["ended"], np.bool_),
        position=np.array(rows["position"], np.int32),
        logits=np.array(rows["logits"], np.float32).reshape(-1, len(probes)),
        labels=labels,
        response_labels=np.array(per["response"], np.int8).reshape(-1, len(HAZARDS)),
        characters=np.array(rows["characters"], np.int32).reshape(-1, 2),
        texts=tuple(per["text"]),
        columns={
            "source": tuple(random.choice(["web", "book"], streams).tolist()),
            "severity": tuple(random.choice(["benign", "borderline", "harmful"], streams).tolist()),
            "sophistication": tuple(random.choice(["direct", "jailbreak"], streams).tolist()),
        },
    )
    judged = Judgement(
        risk=np.array(rows["risk"], np.float32),
        verdict=np.array(rows["verdict"], np.uint8),
        halted_at=np.array(per["halted_at"], np.int32),
        cause=np.array(per["cause"], np.int16),
        unscored=np.array(per["unscored"], np.int32),
    )
    return found, judged


_STREAM = ("prompt", "ended", "response", "text", "halted_at", "cause", "unscored")
_ROW = ("position", "logits", "labels", "characters", "risk", "verdict")


def _stream(random: np.random.Generator) -> tuple[dict, list[dict]]:
    prompt, tokens = int(random.integers(0, 4)), int(random.choice([0, 1, 2, 5, 9, 14]))
    kind = random.choice(["safe", "spans", "response only", "partly known", "unknown"])
    words = [f"w{at % 7}" for at in range(tokens)]
    special = tokens > 1 and random.random() < 0.3  # the last token stands for no text
    text = " ".join(words[:-1] if special else words)
    truth = np.zeros((tokens, len(HAZARDS)), np.int8)
    if kind in ("spans", "partly known"):
        truth[:, :2] = random.random((tokens, 2)) < 0.3
    response = truth.max(axis=0, initial=0).astype(np.int8)
    if special:
        truth[-1] = -1
        response = truth[:-1].max(axis=0, initial=0).astype(np.int8)
    if kind == "partly known":
        truth[random.random(tokens) < 0.3] = -1
    if kind in ("response only", "unknown"):
        truth[:] = -1
        response[0] = 1 if kind == "response only" else -1
    elif random.random() < 0.4:
        response[:] = -1
    rows, verdict, halted_at, cause, unscored = [], Verdict.CONTINUE, -1, NO_CAUSE, 0
    drift = random.uniform(0.5, 1.2)
    for position in range(prompt + tokens):
        if position > 0 and random.random() < 0.05:
            unscored += position >= prompt
            continue  # a gap
        at = position - prompt
        scored = random.random() > 0.05
        logits = np.where(random.random(4) < 0.3, 0.0, random.normal(size=4))  # with ties
        risk = np.nan
        if at >= -1 and scored:
            risk = np.float32(min(1.0, round(random.random() * drift, 2)))
            if verdict != Verdict.HALT:
                held = Verdict.HOLD if risk >= HOLD_AT else Verdict.CONTINUE
                verdict = Verdict.HALT if risk >= HALT_AT else held
                if verdict == Verdict.HALT:
                    halted_at, cause = position, int(random.choice([0, 1, 2, UNSCORED_CAUSE]))
        elif at >= 0:
            unscored += 1
            verdict = max(verdict, Verdict.HOLD)
        begin = at * 3
        rows.append(
            {
                "position": position,
                "logits": logits if scored else np.full(4, np.nan),
                "labels": truth[at] if at >= 0 else np.full(len(HAZARDS), -1),
                "characters": (-1, -1)
                if at < 0 or (special and at == tokens - 1)
                else (begin, begin + 2),
                "risk": risk,
                "verdict": verdict,
            }
        )
    facts = {
        "prompt": prompt,
        "ended": bool(random.random() < 0.8),
        "response": response,
        "text": text,
        "halted_at": halted_at,
        "cause": cause,
        "unscored": unscored,
    }
    return facts, rows
