"""Pages are whole, hold the figures and need nothing else; the command runs on the testbed."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from judged_recordings import bundle, recording
from kernel_cases import fresh_seed

from midstream.measure import drawing, gallery, report
from midstream.measure.bootstrap import Bootstrap
from midstream.measure.halting import NEVER
from midstream.measure.limits import limits
from midstream.measure.measured import Measured
from midstream.measure.training_report import training_report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

HOSTILE = "<script>alert('x')</script> & \"quoted\" $\\frac{1}$ ]]> {{ 7 * 7 }}"
VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "line", "circle"}


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: Counter[str] = Counter()
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attributes]
        self.ids.update(value for key, value in attributes if key == "id" and value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check(text: str) -> Page:
    """Whole, self-contained, accessible."""
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    for tag, key, value in page.attributes:
        assert not key.startswith("on"), (tag, key)
        if key in ("src", "href", "xlink:href", "action", "srcset"):
            assert value.startswith("#"), (tag, key, value)
        assert not re.search(r"url\((?!#)", value), (tag, key, value)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text.split("</style>")[0])
    assert set(page.ids.values()) <= {1}, page.ids.most_common(3)
    # what points to a part of a plot finds it
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
    assert used
    assert set(used) <= set(page.ids)
    labelled = [value for _, key, value in page.attributes if key == "aria-label"]
    assert page.tags["svg"] == sum(
        value == "img" for _, key, value in page.attributes if key == "role"
    )
    assert all(labelled)
    assert page.tags["caption"] == page.tags["table"] > 0
    assert ("html", "lang", "en") in page.attributes
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in page.text.lower().split()
    return page


def made(
    random: np.random.Generator, streams: int = 60, **changes: object
) -> tuple[Measured, report.Content]:
    rec, judged = recording(random, streams)
    rec = dataclasses.replace(rec, **changes)
    m = Measured.of(rec, judged, bundle(horizon=3), bootstrap=Bootstrap(20))
    return m, report.content(m, sources={"data": "x.jsonl"}, look_alikes=("source", "web"))


# ---- the page of an evaluation -------------------------------------------------------------------


def test_the_page_is_whole_and_holds_the_figures() -> None:
    m, found = made(np.random.default_rng(fresh_seed()), 300)
    page = check(report.to_html(m, found))
    assert page.tags["svg"] == 6
    for key, (unit, title, _) in report.TITLES.items():
        assert title in page.text
        assert report.show(found["headline"][key], unit) in page.text
        assert report.show_interval(found["headline"][key], unit) in page.text
    for line in found["limits"]:
        assert " ".join(line.split()) in page.text
    assert m.bundle.hash in page.text
    for word in ("Severity × sophistication", "Over-refusal", "By source", "Worst errors"):
        assert word in page.text


def test_every_figure_of_the_headline_has_a_title() -> None:
    _, found = made(np.random.default_rng(0), 20)
    assert set(found["headline"]) == set(report.TITLES)
    assert set(report.CARDS) <= set(report.TITLES)


def test_json_has_the_same_figures_and_no_nan() -> None:
    _, found = made(np.random.default_rng(fresh_seed()), 150)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the JSON")

    parsed = json.loads(report.to_json(found), parse_constant=refuse)
    for key, figure in found["headline"].items():
        assert parsed["headline"][key] == dataclasses.asdict(figure)
    assert parsed["breakdown"]["source"][0]["recall"]["n"] > 0
    assert len(parsed["curves"]["leaks"]) == 17
    assert parsed["schema_version"] == report.SCHEMA_VERSION


@pytest.mark.parametrize("streams", [0, 1, 3])
def test_next_to_nothing_still_makes_a_page(streams: int) -> None:
    random = np.random.default_rng(fresh_seed())
    rec, judged = recording(random, streams)
    m = Measured.of(rec, judged, bundle(), bootstrap=Bootstrap(5))
    found = report.content(m, sources={})
    page = Page(report.to_html(m, found))
    assert "not defined" in page.text
    assert "rough" in page.text
    json.loads(report.to_json(found))


def test_hostile_text_stays_text() -> None:
    random = np.random.default_rng(fresh_seed())
    rec, judged = recording(random, 60)
    halted = judged.halted_at >= 0
    assert halted.any()
    rec = dataclasses.replace(
        rec,
        streams=tuple(f"{HOSTILE} {e}" for e in range(60)),
        texts=tuple(HOSTILE + text for text in rec.texts or ()),
        columns={HOSTILE: tuple(HOSTILE if e % 2 else "b" for e in range(60))},
    )
    m = Measured.of(rec, judged, bundle(), bootstrap=Bootstrap(5))
    found = report.content(m, sources={HOSTILE: HOSTILE})
    text = report.to_html(m, found)
    page = check(text)
    assert "<script" not in text
    assert HOSTILE in page.text
    assert "49" not in re.findall(r"\]\]> (\d+)", page.text)
    assert json.loads(report.to_json(found))["data"][HOSTILE] == HOSTILE


def test_without_texts_the_gallery_says_so() -> None:
    m, found = made(np.random.default_rng(fresh_seed()), texts=None, characters=None)
    page = check(report.to_html(m, found))
    assert found["headline"]["span_f1_characters"].reason == "the recording has no texts"
    if any(found["worst"].values()):
        assert "The recording holds no texts." in page.text


def test_limits_name_what_applies() -> None:
    random = np.random.default_rng(fresh_seed())
    m, found = made(random, 60)
    text = " ".join(found["limits"])
    assert f"Of {int((m.outcomes.truth < 0).sum())} of 60 responses" in text
    assert f"{int(m.judgement.unscored.sum())} tokens have no score" in text
    assert "another bundle" in text
    rec = dataclasses.replace(m.recording, bundle=m.bundle.hash)
    same = Measured.of(rec, m.judgement, m.bundle, bootstrap=Bootstrap(2))
    assert "another bundle" not in " ".join(limits(same, found["headline"]))


# ---- the gallery ---------------------------------------------------------------------------------


def test_the_gallery_shows_the_worst_first_and_every_character_once() -> None:
    m, _ = made(np.random.default_rng(fresh_seed()), 120)
    o = m.outcomes
    shown = gallery.worst(m)
    peaks = o.peaks()
    false = [m.recording.streams.index(each.stream) for each in shown["false halts"]]
    expected = sorted(np.flatnonzero(o.safe & o.stopped), key=lambda e: -peaks[e])
    assert [peaks[e] for e in false] == [peaks[e] for e in expected[: gallery.EXAMPLES]]
    leaked = o.leaked(m.hold_back)
    for each in shown["misses"]:
        e = m.recording.streams.index(each.stream)
        assert o.violating[e]
        assert leaked[e] > 0 or not o.located[e]
    for exhibits in shown.values():
        for each in exhibits:
            e = m.recording.streams.index(each.stream)
            assert "".join(piece.text for piece in each.pieces) == m.recording.texts[e]
            assert sum(piece.halt for piece in each.pieces) <= 1
            marked = [piece for piece in each.pieces if piece.violating]
            words = (m.recording.characters[:, 0] >= 0) & (o.label == 1) & (o.stream == e)
            assert len(marked) == words.sum()


def test_curves_show_one_stream_of_each_kind() -> None:
    m, _ = made(np.random.default_rng(fresh_seed()), 150)
    for curve in gallery.curves(m):
        kind, _, name = curve.title.partition(": ")
        e = m.recording.streams.index(name)
        halt, at = m.outcomes.halt[e], m.outcomes.violates_at[e]
        assert curve.halted_at == (None if halt == NEVER else halt)
        assert len(curve.risk) == m.outcomes.tokens[e] + 1
        if kind == "halted ahead":
            assert halt < at
        elif kind == "halted on or after the violating token":
            assert at <= halt < NEVER
        elif kind == "missed":
            assert halt == NEVER > at
        else:
            assert m.outcomes.safe[e]
            assert (halt != NEVER) == (kind == "falsely halted")


def test_plots_take_the_colour_of_the_page() -> None:
    svg = drawing.timing([-5, 0, 3])
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert drawing.INK not in svg
    assert "<metadata" not in svg


# ---- training ------------------------------------------------------------------------------------

COMPARISON = [
    {"method": "logistic", "tap": "resid_post.0", "auroc": 0.7, "facts": {"loss": 0.5}},
    {"method": "logistic", "tap": "resid_post.1", "auroc": 0.9, "facts": {}},
    {"method": "ccs", "tap": "resid_post.1", "auroc": None, "facts": {}},
    {"method": HOSTILE, "tap": "resid_post.0", "auroc": float("nan"), "facts": {HOSTILE: 1.0}},
]


def test_training_is_compared_layer_by_layer() -> None:
    text = training_report(COMPARISON, title=HOSTILE, about={HOSTILE: "v"}, limits=["few examples"])
    page = check(text)
    assert "<script" not in text
    assert "Best: logistic at resid_post.1, AUROC 0.900" in page.text
    assert page.text.count("not defined") >= 4  # two in each table
    assert "few examples" in page.text
    assert "loss 0.5" in page.text
    first = page.text.index("All read-outs")
    assert page.text.index("0.9000", first) < page.text.index("0.7000", first)


def test_a_comparison_must_be_one() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        training_report([], title="t", about={})
    with pytest.raises(ValueError, match=r"logistic at resid_post\.0 is in the comparison twice"):
        training_report(COMPARISON[:1] * 2, title="t", about={})
    undefined = training_report(COMPARISON[2:], title="t", about={})
    assert "Best:" not in Page(undefined).text


@pytest.mark.parametrize(("module", "extra"), [("jinja2", "learn"), ("matplotlib", "plot")])
def test_what_is_missing_names_the_extra(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"midstream\[{extra}\]"):
        training_report(COMPARISON, title="t", about={})


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, report.Content]:
    pytest.importorskip("pyarrow")
    from midstream import testbed
    from midstream.measure.evaluate import evaluate_data

    folder = tmp_path_factory.mktemp("evaluate")
    testbed.write_corpus(folder / "data.jsonl", 60, 11)
    model, tokenizer = testbed.load()
    found = evaluate_data(
        folder / "data.jsonl",
        folder / "out",
        model,
        tokenizer,
        testbed.load_bundle(),
        look_alikes="attack=yes",
    )
    return folder / "out", found


def test_the_testbed_is_evaluated_end_to_end(evaluated: tuple[Path, report.Content]) -> None:
    from midstream import testbed

    out, found = evaluated
    assert {path.name for path in out.iterdir()} == {
        "recording.parquet", "report.html", "report.json"
    }  # fmt: skip
    check((out / "report.html").read_text("utf-8"))
    assert (out / "report.json").read_text("utf-8") == report.to_json(found)
    truth = [row["violating_index"] >= 0 for row in testbed.corpus_rows(60, 11)]
    assert found["data"]["violating"] == sum(truth)
    assert found["data"]["safe"] == 60 - sum(truth)
    assert found["data"]["violating_tokens"] == sum(truth)
    assert found["headline"]["token_auroc_probes"].value > 0.98
    assert found["headline"]["missed_rate"].value <= 0.1
    assert set(found["breakdown"]) == {"hazard", "response tokens", "attack", "refusal"}


def test_a_recording_gives_the_same_figures(
    evaluated: tuple[Path, report.Content], tmp_path: Path
) -> None:
    from midstream import testbed
    from midstream.measure.evaluate import evaluate_recording, summary

    out, found = evaluated
    ours = testbed.load_bundle()
    again = evaluate_recording([out / "recording.parquet"], tmp_path / "again", ours)
    assert again["headline"] == found["headline"]
    assert again["probes"] == found["probes"]
    assert len(summary(again)) == len(report.CARDS)
    loose = evaluate_recording([out / "recording.parquet"], tmp_path / "loose", ours, tier="loose")
    assert loose["monitor"]["tier"] == "loose"
    assert loose["headline"]["lead_tokens_median"].value == 0
    with pytest.raises(FileExistsError):
        evaluate_recording([out / "recording.parquet"], tmp_path / "again", ours)


def test_what_cannot_be_evaluated_leaves_no_folder(
    evaluated: tuple[Path, report.Content], tmp_path: Path
) -> None:
    from midstream import testbed
    from midstream.measure.evaluate import evaluate_data, evaluate_recording
    from midstream.policy import PolicyError

    ours, path = testbed.load_bundle(), evaluated[0] / "recording.parquet"
    for wrong, error in (
        ({"tier": "lenient"}, PolicyError),
        ({"columns": ["colour"]}, ValueError),
        ({"look_alikes": "attack"}, ValueError),
        ({"look_alikes": "attack=perhaps"}, ValueError),
    ):
        with pytest.raises(error):
            evaluate_recording([path], tmp_path / "out", ours, **wrong)
        assert not (tmp_path / "out").exists()
    (tmp_path / "bad.jsonl").write_text('{"response": "no label"}\n')
    with pytest.raises(ValueError, match="label"):
        evaluate_data(tmp_path / "bad.jsonl", tmp_path / "out", *testbed.load(), ours)
    assert not (tmp_path / "out").exists()


def test_tokens_without_a_score_are_told_beside_the_figures(
    evaluated: tuple[Path, report.Content], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from midstream.commands.evaluate import evaluate
    from midstream.measure.recording import Recording

    whole = Recording.load(evaluated[0] / "recording.parquet")
    broken = dataclasses.replace(whole, logits=np.full_like(whole.logits, np.nan))
    for name, recorded in (("whole", whole), ("broken", broken)):
        recorded.save(tmp_path / f"{name}.parquet")
        evaluate(tmp_path / name, recording=[tmp_path / f"{name}.parquet"])
        assert ("have no score" in capsys.readouterr().out) == (name == "broken")
