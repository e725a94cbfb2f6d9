"""Every method at every tap of the testbed's model, against the Bayes oracle.

    python bench/learn.py [--tokens 1000000]

Dialogues of the grammar, so that the truth is known: collected at four taps, half of them train
every method, the others rank their tokens. Two hazards: the violating token, which the oracle knows
for sure (AUROC 1), and a violation within the next 24 tokens, which it can only forecast. Prints
one JSON object: the shares of the oracle's token AUROC that the best read-out of one token reaches.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from midstream import testbed
from midstream.learn.align import encode, tabulate
from midstream.learn.collect import collect
from midstream.learn.compare import compare
from midstream.learn.methods import METHODS, method_class
from midstream.learn.methods.method import Task
from midstream.learn.readers import read_examples
from midstream.learn.tokens import MissingLabelsError, Tokens
from midstream.taps import Tap
from midstream.testbed.fit import HORIZON
from midstream.testbed.grammar import HAZARD, REFUSAL

TAPS = [Tap(layer, "resid_post") for layer in range(4)]
FORECASTERS = ("logistic", "logistic-joint", "lda")
"""What is trained for `SOON` as well; all methods are for `NOW`."""

NOW, SOON = HAZARD, f"{HAZARD} within {HORIZON} tokens"


def with_forecasts(tokens: Tokens) -> Tokens:
    """Add the hazard `SOON`: known up to the violating token, which is the last to forecast."""
    now = tokens.labels[:, tokens.column(NOW)]
    soon = np.zeros_like(now)
    inside = tokens.in_response
    for begin, end in zip(tokens.starts[:-1], tokens.starts[1:], strict=True):
        rows = np.arange(begin, end)
        soon[rows[~inside[rows]]] = -1
        violating = rows[now[rows] == 1]
        if len(violating):
            first = violating[0]
            response = rows[inside[rows]]
            soon[response[(response >= first - HORIZON) & (response < first)]] = 1
            soon[response[response >= first]] = -1
    violates = tokens.response_labels[:, tokens.column(NOW)]
    return replace(
        tokens,
        hazards=(*tokens.hazards, SOON),
        labels=np.column_stack([tokens.labels, soon]),
        response_labels=np.column_stack([tokens.response_labels, violates]),
        prompt_labels=np.column_stack(
            [tokens.prompt_labels, tokens.prompt_labels[:, tokens.column(NOW)]]
        ),
    )


def oracle_auroc(tokens: Tokens, dialogues: list[Any]) -> float:
    """Token AUROC of the oracle's risk at the labels of `SOON`."""
    readings = testbed.Oracle().read(
        [d.prompt for d in dialogues], [d.response for d in dialogues], (HORIZON,)
    )
    column = tokens.column(SOON)
    scores: list[NDArray[Any]] = []
    labels: list[NDArray[Any]] = []
    for e, reading in enumerate(readings):
        rows = slice(tokens.starts[e] + tokens.prompt_tokens[e], tokens.starts[e + 1])
        label = tokens.labels[rows, column]
        risk = reading.risk[0][1 : len(label) + 1]
        scores.append(risk[label >= 0])
        labels.append(label[label >= 0])
    return float(roc_auc_score(np.concatenate(labels), np.concatenate(scores)))


def main(
    tokens: Annotated[int, typer.Option(help="Tokens to collect.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Of the grammar.")] = 7,
) -> None:
    """Collect, train, compare, print."""
    model, tokenizer = testbed.load()
    dialogues: list[Any] = []
    count = 0
    while count < tokens:
        dialogues.append(testbed.sample_dialogue(seed, len(dialogues)))
        count += len(dialogues[-1].prompt.ids) + len(dialogues[-1].response)
    examples = list(read_examples(testbed.corpus_rows(len(dialogues), seed)))
    encoded = [encode(example, tokenizer, (NOW, REFUSAL)) for example in examples]
    table = with_forecasts(tabulate(encoded))
    half = len(encoded) // 2
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        data = collect(
            model, tokenizer, [e.ids for e in encoded], table, TAPS, Path(folder) / "collection"
        )
        collected = time.perf_counter() - begin
        learn, judge = (data.select(part) for part in np.split(np.arange(len(encoded)), [half]))
        rows, best, seconds, left_out = [], {}, {}, {}
        for hazard in (NOW, SOON):
            read_outs = []
            for name in METHODS if hazard == NOW else FORECASTERS:
                begin = time.perf_counter()
                try:
                    read_outs += method_class(name)().fit(learn, Task(hazard, REFUSAL))
                except MissingLabelsError as error:
                    left_out[name] = str(error)
                if hazard == NOW:
                    seconds[name] = time.perf_counter() - begin
            compared = compare(read_outs, judge)
            rows += [c.row() for c in compared]
            best[hazard] = next(
                c.auroc
                for c in compared
                if c.level == "token" and c.read_out.probes[0].hazard == hazard
            )
        oracle = {NOW: 1.0, SOON: oracle_auroc(judge.tokens, dialogues[half:])}
    result = {
        "testbed_probe_auroc_vs_oracle": best[NOW] / oracle[NOW],
        "testbed_forecast_auroc_vs_oracle": best[SOON] / oracle[SOON],
        "auroc": {h: {"best probe": best[h], "oracle": oracle[h]} for h in (NOW, SOON)},
        "tokens": int(table.starts[-1]),
        "collect_seconds": collected,
        "train_seconds": seconds,
        "collect_and_train_minutes": (collected + sum(seconds.values())) / 60,
        "left_out": left_out,
        "compared": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
