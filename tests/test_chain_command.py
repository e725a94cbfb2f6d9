"""``midstream chain``: fit, show and forecast on recorded streams."""

import json
from dataclasses import replace

import numpy as np
import pytest
from kernel_cases import fresh_seed
from recordings import HAZARD, random_bundle, random_recording
from typer.testing import CliRunner

from midstream.chain import Chain, ChainError
from midstream.cli import app
from midstream.learn.chains.counts import fit_by_counts
from midstream.learn.chains.fit import fit_streams
from midstream.learn.chains.observed import observe
from midstream.learn.chains.report import FitReport
from midstream.learn.chains.symbols import SymbolStream
from midstream.measure.chain_scores import cumulative_incidence, new_violations, served_risks
from midstream.measure.halting import NEVER, Truth
from midstream.measure.outcomes import MeasureError
from midstream.measure.recording import RecordingError
from midstream.measure.rejudge import rejudge


@pytest.fixture
def case(tmp_path):
    rng = np.random.default_rng(fresh_seed())
    bundle = random_bundle(rng)
    recording = random_recording(rng, bundle, 120)
    bundle.save(tmp_path / "bundle")
    recording.save(tmp_path / "streams.parquet")
    return tmp_path, bundle, recording


def run(*arguments, expect=0):
    found = CliRunner().invoke(app, ["chain", *map(str, arguments)], catch_exceptions=False)
    assert found.exit_code == expect, found.output
    return found.output


def test_fit_show_and_forecast(case):
    folder, bundle, recording = case
    given = ["--recording", folder / "streams.parquet", "--bundle", folder / "bundle"]
    out = folder / "fit"
    told = json.loads(run("fit", *given, "--out", out, "--category", "source", "--json"))
    assert told["notes"]["bundle"] == bundle.hash
    left_out = told["notes"]["responses_left_out_since_their_outcome_is_not_known"]
    assert told["streams"] + left_out == len(recording)
    assert {"horizon_curves.svg", "first_passage.svg", "transitions.svg", "chain-x.json"} <= {
        path.name for path in out.iterdir()
    }
    chain = Chain.from_json((out / "chain.json").read_text())
    observed = observe(recording, bundle, [HAZARD])
    edges, prompt_edges = observed.edges()
    again = fit_by_counts(observed.streams, edges, prompt_edges=prompt_edges)
    np.testing.assert_allclose(again.transition, chain.transition, rtol=1e-12)

    found = json.loads(run("show", out, "--horizon", 3, "--horizon", 40, "--json"))
    assert found["risk"]["3"]["value"] == chain.horizon(3).tolist()
    report = FitReport.from_json((out / "fit.json").read_text())
    assert (found["risk"]["3"]["low"], found["risk"]["3"]["high"]) == report.intervals.at(3)
    assert found["risk"]["40"]["low"] is None  # no interval is kept there
    assert found["expected_tokens"] == chain.expected_tokens().tolist()
    of_x = json.loads(run("show", out / "chain-x.json", "--horizon", 3, "--json"))["risk"]["3"]
    assert (of_x["low"], of_x["high"]) == report.categories["x"].intervals.at(3)
    assert "Risk by state" in run("show", out, "--plot", folder / "p.png")
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(run("show", folder / "bundle", "--json"))["states"] == bundle.chain.states

    said = folder / "said"
    found = json.loads(
        run("forecast", *given, "--chain", out / "chain.json", "--out", said, "--json")
    )
    assert found == json.loads((said / "forecast.json").read_text())
    assert len(list(said.glob("*.svg"))) == 5
    assert [row["horizon"] for row in found["horizons"]] == [1, 5, 10, 32]
    for row in found["horizons"]:
        for kind in ("risk", "forecast"):
            value, low, high = row[kind]["brier"]
            assert low <= value <= high
            assert row[kind]["tokens"] == sum(one["tokens"] for one in row[kind]["reliability"])


def test_response_labels_alone_date_a_violation_to_the_largest_evidence(case):
    _, bundle, recording = case
    whole = observe(recording, bundle, [HAZARD])
    blind = observe(recording, bundle, [HAZARD], response_labels=True)
    assert blind.index.tolist() == whole.index.tolist()
    violates = np.array([bool(stream.violated[-1]) for stream in whole.streams])
    assert blind.located.tolist() == (~violates).tolist()
    for stream in blind.streams:
        if stream.violated[-1]:
            assert stream.violated.argmax() == stream.log_hazard.argmax()
    symbols = blind.symbols(*blind.edges(), dated=False)
    assert [s.violates for s in symbols] == violates.tolist()
    assert all((s.violated is None) == v for s, v in zip(symbols, violates, strict=True))


def test_observed_evidence_is_that_of_the_kernels(case):
    """The bins of the observed streams drive a filter to the very risk that rejudge gives."""
    _, bundle, recording = case
    lengths = np.diff(recording.starts)
    without_gaps = np.arange(lengths.sum()) - np.repeat(recording.starts[:-1], lengths)
    labels = np.where(recording.labels == 1, 1, 0)
    labels[without_gaps < np.repeat(recording.prompt_tokens, lengths)] = -1
    recording = replace(
        recording,
        logits=np.nan_to_num(recording.logits),
        position=without_gaps.astype(np.int32),
        labels=labels.astype(np.int8),
        response_labels=np.full_like(recording.response_labels, -1),
    )
    observed = observe(recording, bundle, [HAZARD])
    chain = bundle.chain
    judged = rejudge(recording, bundle)
    step = (1 - np.array(chain.ending))[:, None] * np.array(chain.transition)
    emission = np.maximum(chain.emission, 1e-4)
    emission /= emission.sum(axis=1, keepdims=True)
    compared = 0
    for stream, e in zip(observed.streams, observed.index, strict=True):
        rows = slice(int(recording.starts[e]), int(recording.starts[e + 1]))
        if not recording.prompt_tokens[e]:
            continue  # then the prior is weighed by nothing
        symbols = stream.symbols(chain.edges, chain.prompt_edges)
        belief = np.array(chain.prior) * np.array(chain.prompt_emission)[:, symbols.prompt_bin]
        for o in symbols.bins:
            belief = (belief @ step) * emission[:, o]
            belief /= belief.sum()
        ahead = chain.forecast(belief, bundle.policy.tiers["moderate"].horizon)
        assert judged.risk[rows][-1] == pytest.approx(float(ahead), abs=1e-4)
        compared += 1
    assert compared > 30


def test_tokens_that_are_not_in_the_recording_have_the_evidence_of_the_one_before(case):
    _, bundle, recording = case
    observed, gaps = observe(recording, bundle, [HAZARD]), 0
    for stream, e in zip(observed.streams, observed.index, strict=True):
        rows = np.arange(recording.starts[e], recording.starts[e + 1])
        position = recording.position[rows] - recording.prompt_tokens[e]
        position = position[position >= 0] - position[position >= 0][0]
        assert len(stream.log_hazard) == position[-1] + 1
        for gap in np.setdiff1d(np.arange(position[-1]), position):
            assert stream.log_hazard[gap] == stream.log_hazard[gap - 1]
            assert stream.violated[gap] == stream.violated[gap - 1]
            gaps += 1
    assert gaps > 10


def test_a_forecast_of_streams_that_are_all_safe(case):
    folder, _, recording = case
    calm = replace(
        recording,
        labels=np.minimum(recording.labels, 0),
        response_labels=np.zeros_like(recording.response_labels),
    )
    calm.save(folder / "calm.parquet")
    given = ["--recording", folder / "calm.parquet", "--bundle", folder / "bundle"]
    found = json.loads(run("forecast", *given, "--out", folder / "said", "--json"))
    assert (found["violating"], found["streams"]) == (0, len(recording))
    assert set(found["first_passage"]["came_true"]) == {0.0}
    with pytest.raises(ChainError, match="no response is known to show"):
        run("fit", *given, "--out", folder / "x")


def test_states_that_only_violated_streams_show_are_named_and_left_out(tmp_path):
    def stream(bins, violated):
        n = len(bins)
        return SymbolStream(np.array(bins), np.arange(n) >= n - violated, None, ended=True)

    streams = [stream([0, 1, 0], 0), stream([0, 1, 1, 3], 1)] * 9 + [stream([1, 3], 1)]
    fit = fit_streams(streams, edges=[0.5, 1.5, 2.5], draws=100)
    assert fit.report.never_seen == [2, 3]
    for name, content in fit.files().items():
        (tmp_path / name).write_bytes(content)
    assert json.loads(run("show", tmp_path, "--json"))["never_seen"] == [2, 3]
    assert "states 2, 3 are left out" in " ".join(run("show", tmp_path).split())
    with pytest.raises(MeasureError, match=r"no plot can be a \.foo"):
        run("show", tmp_path, "--plot", tmp_path / "plot.foo")


def test_incidence_against_hand_and_without_censoring():
    truths = [Truth(3, 1, True), Truth(2, NEVER, True), Truth(1, NEVER, False), Truth(4, 3, True)]
    # 4 at risk at 1; the stream of one token is cut off then; 3 at risk at 2, one violates;
    # at 3 the safe one ends; the last violates at 4
    one = np.ones(4)
    np.testing.assert_allclose(cumulative_incidence(truths, 4, one), [0, 0, 1 / 3, 1 / 3, 2 / 3])
    rng = np.random.default_rng(fresh_seed())
    lengths = rng.integers(1, 30, 50)
    at = [int(rng.integers(n)) if rng.random() < 0.5 else NEVER for n in lengths]
    truths = [Truth(int(n), a, True) for n, a in zip(lengths, at, strict=True)]
    expected = [(np.array(at) + 1 <= n).mean() for n in range(31)]
    np.testing.assert_allclose(cumulative_incidence(truths, 30, np.ones(50)), expected)


def test_what_is_said_of_new_violations_leaves_out_those_that_may_be_there_already():
    truths = [Truth(3, 2, True), Truth(2, NEVER, True), Truth(2, NEVER, False)]
    risk = [np.array([0.1, 0.4, 0.6, 1.0]), np.array([0.2, 0.5, np.nan]), np.array([0.0, 0.3, 0.4])]
    now = [np.array([0.0, 0.2, 0.2, 1.0]), np.array([0.0, 0.0, 0.0]), np.array([0.0, 0.1, 0.4])]
    said, true, stream = new_violations(truths, risk, now, 1)
    np.testing.assert_allclose(said, [0.25, 0.5, 0.5, 0.2 / 0.9])
    assert true.tolist() == [False, True, False, False]
    assert stream.tolist() == [0, 0, 1, 2]
    said, true, stream = served_risks(truths, risk, 1)
    np.testing.assert_allclose(said, [0.4, 0.6, 1.0, 0.5, 0.3])
    assert true.tolist() == [False, True, True, False, False]


def test_bad_input_is_refused_in_words(case):
    folder, *_ = case
    given = ["--recording", folder / "streams.parquet", "--bundle", folder / "bundle"]
    with pytest.raises(RecordingError, match="no column 'sort' in the recording; it has source"):
        run("fit", *given, "--out", folder / "x", "--category", "sort")
    with pytest.raises(ChainError, match="by counts the bins are the states"):
        run("fit", *given, "--out", folder / "x", "--states", 3)
    with pytest.raises(FileExistsError):
        run("fit", *given, "--out", folder)
    assert "expected counts or em" in run(
        "fit", *given, "--out", folder / "x", "--by", "luck", expect=2
    )
    assert not (folder / "x").exists()
    (folder / "chain.json").write_text((folder / "bundle" / "chain.json").read_text()[:-40])
    with pytest.raises(ChainError, match=r"chain\.json"):
        run("show", folder / "chain.json")


def test_a_chain_that_is_never_absorbed_is_shown_all_the_same(tmp_path):
    chain = Chain(
        transition=[[0.9, 0.0, 0.1], [0, 1, 0], [0, 0, 1]],
        ending=[0.0, 0.0, 0.0],
        emission=[[1.0]] * 3,
        edges=[],
        prior=[1.0, 0.0, 0.0],
        prompt_emission=[[1.0]] * 3,
        prompt_edges=[],
    )
    (tmp_path / "chain.json").write_text(chain.to_json())
    assert "[1] are never left" in " ".join(run("show", tmp_path).split())
    found = json.loads(run("show", tmp_path, "--horizon", 1, "--horizon", 32, "--json"))
    assert found["zones"] == ["point of no return", "safe"]  # within 32, which is finite
    assert found["points_of_no_return"] == [0]
    assert found["risk"]["1"]["value"] == [pytest.approx(0.1), 0, 1]
