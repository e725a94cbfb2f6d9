"""The turn gate on held-out conversations of the testbed, beside its oracle and three baselines.

    python bench/turns.py [--fit 200 --calibrate 120 --test 240]

The testbed's model answers the hidden users, the shipped bundle's probes read every response, and
the turn model is fitted by EM on labels of the first conversations: target turns alone, no word of
seals. Thresholds of the gate and of every baseline are those of the largest F1phi2 on the second
part, all chosen by one rule, and the figures come from the third. The gate runs with its ledger.

The oracle reads the text and knows the testbed's parameters. Whether a response completes the harm
it sees without doubt, so at a horizon of 0 it is perfect, and the ratio to it is the F1phi2 itself.
`bound` is the same gate with a threshold that keeps blocks of harmless conversations below
`alpha` with `confidence`, by learn-then-test. All intervals are 95 % bootstraps over conversations.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import numpy as np
import typer

from midstream import testbed
from midstream.learn.guarantee import learn_then_test
from midstream.learn.turn_fit import LabelledTurns, fit_turns
from midstream.ledger.memory import MemoryLedger
from midstream.measure.bootstrap import Figure
from midstream.measure.conversations import Conversation
from midstream.measure.turn_metrics import figures
from midstream.measure.turn_replay import BASELINES, Scored, baseline_scores, replay_gate
from midstream.measure.turn_scoring import turn_hazards
from midstream.testbed.conversation_oracle import ConversationOracle
from midstream.testbed.conversations import Conversation as Talk
from midstream.testbed.conversations import rollout
from midstream.testbed.language import text_of
from midstream.turn_policy import TurnPolicy
from midstream.turns import TurnGate

CONFIDENCE = 0.9


def conversation_of(index: int, talk: Talk) -> Conversation:
    """A rollout as a client would hold it."""
    messages = talk.prompts[0].messages[:1]
    for prompt, response in zip(talk.prompts, talk.responses, strict=True):
        messages += [prompt.messages[1], {"role": "assistant", "content": text_of(response)}]
    labels = talk.labels
    return Conversation(str(index), tuple(messages), labels.harmful, labels.target_turn)


def shown(figure: Figure) -> dict[str, Any]:
    """A figure without what says nothing."""
    values = {"value": figure.value, "low": figure.low, "high": figure.high, "n": figure.n}
    return {key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()}


def main(
    fit: Annotated[int, typer.Option(help="Conversations to fit the turn model on.")] = 200,
    calibrate: Annotated[int, typer.Option(help="Conversations to choose thresholds on.")] = 120,
    test: Annotated[int, typer.Option(help="Conversations to measure on.")] = 240,
    alpha: Annotated[float, typer.Option(help="Blocked harmless conversations, at most.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the conversations.")] = 7,
) -> None:
    started = time.perf_counter()

    def told(stage: str) -> None:
        print(f"{stage}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    model, tokenizer = testbed.load()
    bundle = testbed.load_bundle()
    talks = rollout(model, fit + calibrate + test, seed)
    told("written")
    everything = [conversation_of(i, talk) for i, talk in enumerate(talks)]
    hazards = turn_hazards(model, tokenizer, everything, bundle, context="turn", batch_size=64)
    told("scored")
    parts = {
        "fit": slice(0, fit),
        "calibrate": slice(fit, fit + calibrate),
        "test": slice(fit + calibrate, None),
    }
    labelled = [
        LabelledTurns(h, bool(one.harmful), one.target)
        for one, h in zip(everything, hazards, strict=True)
    ]
    fitted = fit_turns(labelled[parts["fit"]], token_chain=bundle.chain)
    told("fitted")

    # The gate's own scores do not depend on its threshold: it only observes here.
    policy = bundle.policy.model_copy(update={"turns": TurnPolicy(block_at=1.0)})
    gate = TurnGate(bundle.with_turns(fitted.model).with_policy(policy), MemoryLedger())
    gated = [
        np.array([decision.risk for decision in turns])
        for turns in replay_gate(gate, everything, hazards)
    ]
    told("replayed")
    readings = ConversationOracle().read(talks, horizons=(0,))
    scores = {
        "gate": gated,
        "oracle": [reading.risk[0, 1:] for reading in readings],
        **baseline_scores(fitted.model, hazards, horizon=0),
    }
    results: dict[str, Any] = {}
    merits = {}
    for name, values in scores.items():
        calibration, held_out = (
            Scored.of(values[parts[part]], everything[parts[part]])
            for part in ("calibrate", "test")
        )
        threshold = calibration.best()
        outcomes = held_out.outcomes(threshold)
        found = figures(outcomes)
        merits[name] = found["f1phi2"].value
        results[name] = {"threshold": round(threshold, 4)} | {
            figure: shown(value) for figure, value in found.items()
        }
        if name == "gate":
            harmless = ~np.array(calibration.harmful)
            promise = learn_then_test(
                np.minimum(calibration.highest[harmless, -1], 1.0),
                alpha=alpha,
                delta=1 - CONFIDENCE,
                max_tokens=calibration.highest.shape[1],
                calibration_set="testbed",
            )
            bounded = figures(held_out.outcomes(promise.threshold))
            results["bound"] = {
                "alpha": alpha,
                "confidence": CONFIDENCE,
                "threshold": round(float(promise.threshold), 4),
                **{figure: shown(value) for figure, value in bounded.items()},
            }
    told("measured")
    tested = everything[parts["test"]]
    print(
        json.dumps(
            {
                "turn_gate_f1phi2_vs_oracle": round(merits["gate"] / merits["oracle"], 4),
                **{
                    f"{name}_f1phi2_vs_oracle": round(merits[name] / merits["oracle"], 4)
                    for name in BASELINES
                },
                "conversations": {"fit": fit, "calibrate": calibrate, "test": test},
                "test_turns": sum(len(one.responses) for one in tested),
                "test_harmful": sum(bool(one.harmful) for one in tested),
                "states": fitted.model.chain.states,
                "held_out_log_likelihood": fitted.held_out,
                "seed": seed,
                "baselines": BASELINES,
                "methods": results,
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
