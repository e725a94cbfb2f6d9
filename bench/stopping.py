"""What costs imply on the testbed: optimal stopping, thresholds, the shipped tier, the oracles.

The testbed's model writes responses and the shipped bundle reads them. The policies are priced on
streams simulated from the bundle's chain and on the responses; beside them stands the oracle that
reads the text, with the thresholds that suit it best. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import numpy as np
import typer

from midstream import testbed
from midstream.bundle import Bundle
from midstream.learn.readers import read_examples
from midstream.learn.stopping import Costs
from midstream.learn.stopping_price import (
    HORIZONS,
    Price,
    choose_thresholds,
    threshold_verdicts,
)
from midstream.learn.stopping_streams import Stakes, Streams, recorded
from midstream.measure.bootstrap import Bootstrap, mean
from midstream.measure.record import record
from midstream.measure.recording import Recording
from midstream.measure.stopping import study
from midstream.measure.stopping_words import sentences
from midstream.policy import Thresholds
from midstream.testbed.corpus import violating_characters
from midstream.testbed.fit import HORIZON, ORACLE_HALT_AT
from midstream.testbed.generate import generate_responses
from midstream.testbed.grammar import EOS_ID, HAZARD, SPECIALS
from midstream.testbed.language import Prompt, text_of

SETTINGS = {
    "a leak as bad as a false halt": Costs(1.0, 1.0, 0.05),
    "a leak 20 times as bad": Costs(1.0, 20.0, 0.1),
    "a leak 20 times as bad, waiting dear": Costs(1.0, 20.0, 20.0),
    "a leak 1000 times as bad, waiting dear": Costs(1.0, 1000.0, 20.0),
}
MAX_TOKENS = 192


def written(streams: int, seed: int, bundle: Bundle) -> tuple[Recording, list[Prompt], list[Any]]:
    """Responses of the testbed's model as a recording, with their prompts and tokens."""
    model, tokenizer = testbed.load()
    prompts = [testbed.sample_prompt(seed, index) for index in range(streams)]
    responses = generate_responses(model, prompts, seed, max_new_tokens=MAX_TOKENS)
    texts = [list(response[:-1] if response[-1] == EOS_ID else response) for response in responses]
    # a text has no special tokens; the model writes one in a thousand responses by mistake
    clean = [index for index, ids in enumerate(texts) if ids and min(ids) >= len(SPECIALS)]
    prompts, texts = [prompts[index] for index in clean], [texts[index] for index in clean]
    rows = []
    for index, (prompt, ids) in enumerate(zip(prompts, texts, strict=True)):
        place = violating_characters(prompt.sealed, ids)
        rows.append(
            {
                "id": str(index),
                "messages": prompt.messages,
                "response": text_of(ids),
                "spans": [] if place is None else [(*place, HAZARD)],
                "labels": {HAZARD: place is not None},
            }
        )
    print(f"{len(clean)} of {streams} responses can be read", file=sys.stderr, flush=True)
    return record(model, tokenizer, list(read_examples(rows)), bundle), prompts, texts


def oracle_risk(streams: Streams, prompts: list[Prompt], texts: list[Any]) -> dict[int, Any]:
    """Risk [N] of the oracle that reads the text, by horizon."""
    readings = testbed.Oracle().read(prompts, texts, HORIZONS)
    risk = np.concatenate([reading.risk for reading in readings], axis=1)
    if risk.shape[1] != len(streams.bins):
        raise RuntimeError(f"{risk.shape[1]} readings of the oracle for {len(streams.bins)} rows")
    return dict(zip(HORIZONS, risk, strict=True))


def oracle_costs(streams: Streams, risk: dict[int, Any], costs: Costs) -> dict[str, Any]:
    """Cost of the text-reading oracle: at its best thresholds, and forecasting as in the demo."""
    stakes = Stakes.known(streams)
    best = choose_thresholds(streams, stakes, risk, costs).thresholds
    forecast = Thresholds(horizon=HORIZON, halt_at=ORACLE_HALT_AT)
    found = {}
    for name, thresholds in (("best", best), ("forecast", forecast)):
        verdicts = threshold_verdicts(streams, risk[thresholds.horizon], thresholds)
        cost = Price.of(streams, stakes, verdicts).cost(costs)
        figure = Bootstrap().figure(
            mean(cost, np.ones(len(cost), np.bool_)), len(cost), n=len(cost)
        )
        found[name] = {
            **thresholds.model_dump(),
            "cost": {"value": figure.value, "low": figure.low, "high": figure.high},
        }
    return found


def main(
    streams: Annotated[int, typer.Option(help="Responses to write.")] = 1000,
    seed: Annotated[int, typer.Option(help="The shipped bundle was fitted on seed 1.")] = 2,
) -> None:
    bundle = testbed.load_bundle()
    recording, prompts, texts = written(streams, seed, bundle)
    rows, used = recorded(recording, bundle)
    if not used.all():
        raise RuntimeError(f"{(~used).sum()} responses of the testbed have no known violation")
    risk = oracle_risk(rows, prompts, texts)
    settings = {}
    for name, costs in SETTINGS.items():
        found = study(
            bundle.chain,
            costs,
            shipped=bundle.policy.tiers[bundle.policy.default_tier],
            recording=(recording, bundle),
            seed=seed,
        )
        print(f"{name}: done", file=sys.stderr, flush=True)
        settings[name] = {
            **found.result,
            "text_oracle": oracle_costs(rows, risk, costs),
            "sentences": sentences(found.result),
        }
    print(
        json.dumps(
            {"asked": streams, "streams": len(recording), "seed": seed, "settings": settings}
        )
    )


if __name__ == "__main__":
    typer.run(main)
