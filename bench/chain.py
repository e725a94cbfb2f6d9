"""Does EM recover the testbed's chain, and are its forecasts as good as with the true one?

    python bench/chain.py [--seeds 3] [--held-out 10000] [--responses 2000]

At the clock of clauses (`clause_chain`) the chain is known, so `em_error_slope` is that of the log
error of the recovered moves over the log number of streams, -1/2 at the parametric rate; one slope
per seed, with a t interval over seeds. The chains fitted on the most streams then forecast held-out
ones from the text's symbols, what a Bayes oracle of this clock sees: `forecast_brier_vs_oracle` is
their Brier score over that of the true chain. Their reliability is judged in ten groups of equal
size, as Hosmer and Lemeshow (1980) do, with the sampling error of whole streams.

At the clock of tokens the probes of the shipped bundle read what the testbed's model writes; there
EM with few latent states is compared with counts over the bins, and with the oracle of the text.
Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import clause_chain
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import chi2, t

from midstream import testbed
from midstream.bundle import Bundle
from midstream.chain import Chain
from midstream.learn.chains.choice import choose_states
from midstream.learn.chains.counts import fit_symbols_by_counts
from midstream.learn.chains.em import fit_em
from midstream.learn.chains.filtering import as_served, forecasts, log_likelihood
from midstream.learn.chains.observed import observe
from midstream.learn.chains.symbols import SymbolStream
from midstream.learn.collect import residuals
from midstream.learn.methods.method import ReadOut
from midstream.measure.recording import Recording, probes_hash
from midstream.testbed.fit import HORIZON, WrittenStream, truth_of
from midstream.testbed.generate import generate_responses
from midstream.testbed.grammar import HAZARD
from midstream.testbed.language import sample_prompt

SIZES = (100, 300, 1000, 3000, 10000)
HORIZONS = (1, 2, 4, 8, 16)
HEADLINE = 4
"""Clauses ahead: what the testbed's 24 tokens are."""
RESTARTS = 4
LATENT = (2, 3, 4, 5, 6)
GROUPS = 10

Floats = NDArray[np.float64]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fit(streams: Sequence[SymbolStream], seed: int, states: int = clause_chain.TRANSIENT) -> Any:
    return fit_em(
        streams,
        states,
        bins=clause_chain.BINS,
        prompt_bins=clause_chain.PROMPT_BINS,
        seed=seed,
        restarts=RESTARTS,
    )


def error_of_moves(found: Chain, truth: Chain) -> float:
    """Root mean square error of the transient rows, states matched by what they emit."""
    k = truth.states
    emission, true_emission = np.array(found.emission)[:k], np.array(truth.emission)[:k]
    distance = np.abs(true_emission[:, None] - emission[None]).sum(axis=2)
    order = [*linear_sum_assignment(distance)[1], k]
    moves = np.array(found.transition)[np.ix_(order, order)]
    return float(np.sqrt(((moves - np.array(truth.transition))[:k] ** 2).mean()))


def slopes(sizes: Sequence[int], errors: Floats) -> dict[str, Any]:
    """Slope of log error on log n for each seed; ``errors`` [seeds, sizes]."""
    each = np.polyfit(np.log(sizes), np.log(errors).T, 1)[0]
    half = t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / len(each) ** 0.5
    return {
        "slope": float(each.mean()),
        "interval": [float(each.mean() - half), float(each.mean() + half)],
        "slope_of_each_seed": each.tolist(),
        "points": [
            {"streams": n, "error": float(np.exp(np.log(column).mean())), "each": column.tolist()}
            for n, column in zip(sizes, errors.T, strict=True)
        ],
    }


def targets(streams: Sequence[SymbolStream], horizon: int) -> list[NDArray[np.bool_]]:
    """Whether each stream violates within the horizon, as long as it has not, [until then]."""
    found = []
    for stream in streams:
        assert stream.violated is not None
        safe = int((~stream.violated).sum())
        ahead = np.arange(safe + 1) + horizon  # token by which, counted from 1
        found.append(ahead > safe if stream.violated[-1] else np.zeros(safe + 1, dtype=np.bool_))
    return found


def squares(
    risks: Sequence[Floats], wanted: Sequence[NDArray[np.bool_]]
) -> tuple[Floats, NDArray[np.int64]]:
    """Sum of squared errors and number of forecasts of each stream."""
    pairs = [(risk[: len(want)], want) for risk, want in zip(risks, wanted, strict=True)]
    return (
        np.array([((risk - want) ** 2).sum() for risk, want in pairs]),
        np.array([len(want) for _, want in pairs]),
    )


def brier(risks: Sequence[Floats], wanted: Sequence[NDArray[np.bool_]]) -> float:
    """Mean squared error over all tokens before the violation."""
    error, count = squares(risks, wanted)
    return float(error.sum() / count.sum())


def reliability(risks: Sequence[Floats], wanted: Sequence[NDArray[np.bool_]]) -> dict[str, Any]:
    """Wald statistic of ten groups of like risk, robust to the dependence within a stream.

    Each stream's sums of outcome less risk have mean 0 in every group if the forecasts are
    calibrated, since which group a forecast is in is known when it is made; streams are
    independent, so their sums of squares estimate the covariance.
    """
    lengths = [len(want) for want in wanted]
    risk = np.concatenate([r[:n] for r, n in zip(risks, lengths, strict=True)])
    outcome = np.concatenate(wanted)
    group = np.empty(len(risk), dtype=np.int64)
    for g, rows in enumerate(np.array_split(np.argsort(risk, kind="stable"), GROUPS)):
        group[rows] = g
    stream = np.repeat(np.arange(len(wanted)), lengths)
    excess = np.zeros((len(wanted), GROUPS))
    np.add.at(excess, (stream, group), outcome - risk)
    total = excess.sum(axis=0)
    statistic = float(total @ np.linalg.solve(excess.T @ excess, total))
    table = [
        {
            "forecasts": int((group == g).sum()),
            "mean_risk": float(risk[group == g].mean()),
            "violated": float(outcome[group == g].mean()),
            "standard_error": float((excess[:, g] ** 2).sum() ** 0.5 / (group == g).sum()),
        }
        for g in range(GROUPS)
    ]
    p = float(chi2.sf(statistic, GROUPS))
    return {"chi_square": statistic, "degrees": GROUPS, "p": p, "table": table}


def clauses(seeds: int, held_out: int) -> dict[str, Any]:
    """Recovery, reliability and Brier score at the clock of clauses."""
    truth = clause_chain.true_chain()
    errors, largest, runs = np.empty((seeds, len(SIZES))), [], []
    for seed in range(seeds):
        for column, n in enumerate(SIZES):
            found = fit(clause_chain.sample(n, 1000 * (seed + 1) + column), seed)
            errors[seed, column] = error_of_moves(found.chain, truth)
            runs.append({"streams": n, "seed": seed, "iterations": found.iterations})
            runs[-1]["converged"] = found.converged
            say(f"seed {seed}, {n} streams: error {errors[seed, column]:.4f}")
        largest.append(found.chain)
    judged = clause_chain.sample(held_out, 77)
    wanted = {h: targets(judged, h) for h in HORIZONS}

    def risks(chain: Chain) -> dict[int, list[Floats]]:
        curves = forecasts(as_served(chain), judged, HORIZONS)
        return {h: [curve[i] for curve in curves] for i, h in enumerate(HORIZONS)}

    true_risks, fitted = risks(truth), [risks(chain) for chain in largest]
    oracle = {h: brier(true_risks[h], wanted[h]) for h in HORIZONS}
    ours = {h: [brier(found[h], wanted[h]) for found in fitted] for h in HORIZONS}
    small = clause_chain.sample(1000, 78)
    chosen = choose_states(
        small,
        (2, 3, 4, 5, 6),
        folds=3,
        bins=clause_chain.BINS,
        prompt_bins=clause_chain.PROMPT_BINS,
        restarts=4,
        max_iterations=100,
    )
    return {
        "em_error_slope": slopes(SIZES, errors),
        "fits": runs,
        "forecast_brier_vs_oracle": {h: float(np.mean(ours[h]) / oracle[h]) for h in HORIZONS},
        "worst_of_seeds": {h: max(ours[h]) / oracle[h] for h in HORIZONS},
        "brier": {h: {"fitted": float(np.mean(ours[h])), "true": oracle[h]} for h in HORIZONS},
        "reliability": {
            "horizon": HEADLINE,
            "fitted": [reliability(f[HEADLINE], wanted[HEADLINE]) for f in fitted],
            "true": reliability(true_risks[HEADLINE], wanted[HEADLINE]),
        },
        "choice": {
            "streams": len(small),
            "true_states": clause_chain.TRANSIENT,
            "chosen": chosen.states,
            "best": chosen.best,
            "held_out_log_likelihood": chosen.held_out,
            "behind": chosen.behind,
            "behind_error": chosen.behind_error,
        },
    }


def written_by_the_model(responses: int, seed: int) -> tuple[Bundle, Recording, list[Any]]:
    """Responses of the testbed's model, recorded by the shipped bundle's probes."""
    model, _ = testbed.load()
    bundle = testbed.load_bundle()
    prompts = [sample_prompt(seed, i) for i in range(responses)]
    texts = generate_responses(model, prompts, seed)
    pairs = [truth_of(*pair) for pair in zip(prompts, texts, strict=True)]
    written = [one for one in pairs if one.response and one.truth.ended]
    hidden = residuals(model, [(*w.prompt.ids, *w.response) for w in written], bundle.bank.taps)
    heads = [ReadOut("", tuple(bundle.bank.probes[i] for i in term)) for term in bundle.bank.terms]
    logits = [
        torch.stack(
            [h.logits({tap: torch.from_numpy(hidden[tap][e]) for tap in h.taps}) for h in heads], 1
        )
        for e in range(len(written))
    ]
    return bundle, _recording(bundle, written, torch.cat(logits).numpy()), written


def _recording(
    bundle: Bundle, written: Sequence[WrittenStream], logits: NDArray[np.float32]
) -> Recording:
    prompts = np.array([len(one.prompt.ids) for one in written], np.int32)
    lengths = [len(one.prompt.ids) + len(one.response) for one in written]
    labels = [
        np.concatenate([np.full(start, -1), np.arange(one.truth.tokens) >= one.truth.violates_at])
        for start, one in zip(prompts, written, strict=True)
    ]
    return Recording(
        bundle=bundle.hash,
        probes=bundle.bank.names,
        hazards=(HAZARD,),
        streams=tuple(map(str, range(len(written)))),
        starts=np.cumsum([0, *lengths]),
        prompt_tokens=prompts,
        ended=np.ones(len(written), np.bool_),
        position=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        logits=logits,
        labels=np.concatenate(labels).astype(np.int8)[:, None],
        response_labels=np.array([[one.truth.violates] for one in written], np.int8),
        characters=None,
        texts=None,
        columns={},
        probes_hash=probes_hash(bundle.bank),
    )


def tokens(responses: int) -> dict[str, Any]:
    """EM and counts on the evidence of real probes, half of the responses held out."""
    bundle, recording, written = written_by_the_model(responses, seed=3)
    edges, prompt_edges = bundle.chain.edges, bundle.chain.prompt_edges
    streams = observe(recording, bundle, (HAZARD,)).symbols(edges, prompt_edges)
    half = len(streams) // 2
    learn, judge = streams[:half], streams[half:]
    wanted = targets(judge, HORIZON)
    bins = len(edges) + 1
    settings: dict[str, Any] = {"edges": edges, "prompt_edges": prompt_edges}
    chains = {"counts": fit_symbols_by_counts(learn, bins, **settings)}
    seconds = {}
    for states in LATENT:
        begin = time.perf_counter()
        chains[f"em_{states}"] = fit_em(
            learn, states, bins=bins, prompt_bins=len(prompt_edges) + 1, restarts=4, **settings
        ).chain
        seconds[f"em_{states}"] = time.perf_counter() - begin
        say(f"tokens: {states} states in {seconds[f'em_{states}']:.1f} s")
    risks = {
        name: [curve[0] for curve in forecasts(as_served(chain), judge, (HORIZON,))]
        for name, chain in chains.items()
    }
    readings = testbed.Oracle().read(
        [one.prompt for one in written[half:]],
        [one.response for one in written[half:]],
        (HORIZON,),
    )
    risks["oracle"] = [reading.risk[0] for reading in readings]
    base, count = squares(risks["counts"], wanted)
    rows: dict[str, Any] = {}
    for name, curves in risks.items():
        error, _ = squares(curves, wanted)
        better = (base - error) / count.mean()
        rows[name] = {
            "brier": float(error.sum() / count.sum()),
            "better_than_counts": float(better.mean()),
            "standard_error": float(better.std(ddof=1) / len(better) ** 0.5),
            "reliability_p": reliability(curves, wanted)["p"],
        }
        if name in chains:
            likelihood = log_likelihood(chains[name], judge)
            rows[name]["held_out_log_likelihood"] = float(likelihood.mean())
    return {
        "responses": len(streams),
        "horizon": HORIZON,
        "violating": float(np.mean([one.truth.violates for one in written])),
        "fit_seconds": seconds,
        "chains": rows,
    }


def main(
    seeds: Annotated[int, typer.Option(help="Times that everything is fitted anew.")] = 3,
    held_out: Annotated[int, typer.Option(help="Dialogues that forecasts are judged on.")] = 10000,
    responses: Annotated[int, typer.Option(help="Of the testbed's model.")] = 2000,
) -> None:
    """Fit, forecast, compare, print."""
    begin = time.perf_counter()
    of_clauses = clauses(seeds, held_out)
    of_tokens = tokens(responses)
    result = {
        "em_error_slope": of_clauses["em_error_slope"]["slope"],
        "em_error_slope_interval": of_clauses["em_error_slope"]["interval"],
        "forecast_brier_vs_oracle": of_clauses["forecast_brier_vs_oracle"][HEADLINE],
        "reliability_p": of_clauses["reliability"]["fitted"][0]["p"],
        "seconds": time.perf_counter() - begin,
        "clauses": of_clauses,
        "tokens": of_tokens,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
