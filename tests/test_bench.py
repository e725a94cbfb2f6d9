"""The bench's machinery: models, harness, opponents, CSV, page. No time is judged here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cases
import ceiling
import contest
import llm
import model
import page
import plain
import plain_numpy
import pytest
import quick
import quick_gpu
import records
import timing
import torch
from kernel_cases import fresh_seed

from midstream.kernels import ops
from midstream.kernels.tables import Verdict


def test_bytes_and_flops_by_hand() -> None:
    # 2 rows and 3 probes of 4 bf16 numbers: 8 + 12 numbers, 3 biases, 6 logits
    assert model.score(2, 3, 4, 2) == (2 * 20 + 12 + 24, 6 * (8 + 1))
    # x and residual twice instead of hidden once, and gamma
    normed = model.add_rms_norm_score(2, 3, 4, 2)
    assert normed == (2 * (4 * 8 + 12 + 4) + 12 + 24, 54 + 2 * (20 + 3))
    # 1 row, 1 probe, K=1, 2 bins: logit 8, row 8, evidence and folds 16, belief 16, position, peak,
    # scored and unscored 32, verdict 2, start and policy 8, risk 4, ahead 8, policy 16; tables 44
    assert model.advance(1, 1, 1, 2).bytes == 118 + 20 + 4 * (4 + 4 + 1)
    both, alone = model.score_advance(1, 1, 4, 2, 1, 2), model.score(1, 1, 4, 2)
    assert both.bytes == alone.bytes + model.advance(1, 1, 1, 2).bytes - 8
    assert both.flops == alone.flops + model.advance(1, 1, 1, 2).flops
    assert alone.intensity == pytest.approx(9 / 24)


def test_bytes_of_the_design() -> None:
    """Decode is 0.6 MB and prefill 134 MB, design section 7's numbers."""
    assert model.score(64, 8, 4096, 2).bytes == pytest.approx(0.6e6, rel=0.02)
    assert model.score(16384, 16, 4096, 2).bytes == pytest.approx(134e6, rel=0.02)


def test_quantiles_interpolate() -> None:
    assert timing.Quantiles.of([5.0]) == (5.0, 5.0, 5.0)
    assert timing.Quantiles.of([4.0, 0.0, 1.0, 3.0, 2.0, 5.0]) == (1.0, 2.5, 4.0)


def test_ratio_is_within_rounds_and_against_the_fastest() -> None:
    samples = {"a": [2.0, 8.0, 2.0], "b": [1.0, 4.0, 1.0], "slow": [9.0, 9.0, 9.0]}
    assert timing.ratio(samples, ["a"], ["slow", "b"]) == 2.0
    assert timing.ratio(samples, ["slow", "a"], ["b"]) == 2.0


def test_blocks_take_turns_and_prepare_before_each() -> None:
    log: list[str] = []
    blocks = {
        name: timing.loop(log.append, [(name,)] * 2, lambda name=name: log.append(f"({name})"))
        for name in "ab"
    }
    samples = timing.interleaved(blocks, seconds=0, warm_up=0, least=3)
    assert log == ["(a)", "a", "a", "(b)", "b", "b"] * 4
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}


def test_a_block_is_long_enough_for_the_clock() -> None:
    slow = timing.sized(lambda calls: timing.loop(lambda: None, [()] * calls), least=1e-9)
    quick_one = timing.sized(lambda calls: timing.loop(lambda: None, [()] * calls), least=1.0)
    assert (slow.calls, quick_one.calls) == (1, timing.MOST_CALLS)


def test_ceiling_is_finite_with_several_threads() -> None:
    for block in ceiling.read_blocks(1000, threads=3).values():
        assert timing.seconds_of(block) > 0
    assert 0 < ceiling.bytes_per_second(1 << 12, threads=1) < float("inf")


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
@pytest.mark.parametrize(
    "form", ["direct", "folded", "folded_fp32", "folded_whole", "folded_products", "numpy"]
)
def test_plain_step_is_the_reference(form: str, dtype: str, tolerance: float) -> None:
    """Same risk and verdict, after the first token, whose EMA the plain step leaves out."""
    rows, calls = 5, 6
    inputs = cases.Inputs.of(cases.Point("score_advance", rows, 3, 65, dtype), "cpu")
    torch.manual_seed(fresh_seed())
    slots = inputs.tables.slots
    step = ops.Backend("cpu", "reference").bind_score_advance(
        inputs.weight, inputs.bias + 2, *inputs.tables
    )
    slot = torch.randperm(rows, dtype=torch.int32)
    hidden = torch.randn(calls, rows, 65).to(inputs.hidden.dtype)
    step(hidden[0], inputs.logits, slot, inputs.position[0])
    inputs.bias.add_(2)
    if form == "numpy":
        mine = plain_numpy.Step(inputs.weight, inputs.bias, *inputs.tables)
        call = mine.score_advance
        arguments = [(h.float().numpy(), slot.long().numpy()) for h in hidden]
    else:
        mine = plain.PlainStep(inputs.weight, inputs.bias, *inputs.tables, rows)
        call, arguments = getattr(mine, form), [(h, slot.long()) for h in hidden]
    for i in range(1, calls):
        call(*arguments[i])
        step(hidden[i], inputs.logits, slot, inputs.position[i])
    assert slots.scored.tolist() == [calls] * rows
    if form == "numpy":
        risk, verdict = torch.from_numpy(mine.risk), torch.from_numpy(mine.verdict)
    else:
        risk, verdict = mine.result(form)
    torch.testing.assert_close(risk, slots.risk, rtol=tolerance, atol=tolerance)
    if dtype == "fp32":
        assert verdict.tolist() == slots.verdict.tolist()


def test_the_inputs_reach_every_verdict_and_bin() -> None:
    """A step that always takes the same way would flatter whoever predicts branches."""
    inputs = cases.Inputs.of(cases.Point("score_advance", 64, 8, 256), "cpu")
    inputs.tables.policy.release_at.fill_(2.0)
    step = ops.Backend("cpu", "reference").bind_score_advance(
        inputs.weight, inputs.bias, *inputs.tables
    )
    step(inputs.hidden[0], inputs.logits, inputs.slot, inputs.position[0])
    hazard = torch.nn.functional.softplus(
        inputs.tables.slots.evidence - inputs.tables.evidence.center
    ).sum(dim=1)
    bins = torch.bucketize(hazard, inputs.tables.chain.edges).unique()
    assert len(bins) >= cases.BINS // 2
    assert inputs.tables.slots.risk.isfinite().all()
    assert int(inputs.tables.slots.verdict.min()) >= Verdict.CONTINUE


def test_plain_norm_is_the_reference() -> None:
    torch.manual_seed(fresh_seed())
    x, residual = torch.randn(3, 65), torch.randn(3, 65)
    gamma, weight, bias = torch.randn(65), torch.randn(4, 65), torch.randn(4)
    results = []
    for backend in (None, "reference"):
        mine = [x.clone(), residual.clone(), torch.empty(3, 4)]
        if backend is None:
            plain.add_rms_norm_score(*mine[:2], gamma, 1e-6, weight, bias, mine[2])
        else:
            bound = ops.Backend("cpu", backend).bind_add_rms_norm_score(weight, bias)
            bound(*mine[:2], gamma, 1e-6, mine[2])
        results.append(mine)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    new = list(plain.add_rms_norm_score_new(x, residual, gamma, 1e-6, weight, bias))
    torch.testing.assert_close(new, results[1], rtol=1e-4, atol=1e-4)


def test_every_contestant_runs_at_every_op() -> None:
    for op in cases.OPS:
        point = cases.Point(op, 2, 3, 16)
        names = contest.contestants(point, "cpu")
        assert {"reference", "eager", "compile", "numpy"} <= set(names)
        for who in set(names) - {"compile"}:
            inputs = cases.Inputs.of(point, "cpu")
            assert timing.seconds_of(contest.block(inputs, who)) > 0
            if op == "advance" and who == "reference":
                assert not inputs.tables.slots.unscored.any()
                assert inputs.tables.slots.scored.all()


def test_grid_has_the_center_of_every_op_and_no_point_twice() -> None:
    points = cases.grid()
    assert len(points) == len(set(points))
    assert {point.op for point in points if point[1:] == (8, 8, 4096, "bf16")} == set(cases.OPS)


@pytest.fixture
def rows() -> list[records.Record]:
    machine = replace(records.Machine.here(), machine='a "quoted", <one>')
    return [
        records.Record.of(
            cases.Point("score", count),
            who,
            [count * 1e-6, count * 2e-6],
            device="cpu",
            threads=1,
            ceiling=1e10,
            machine=machine,
        )
        for count in (1, 8)
        for who in ("cpu", "eager")
    ]


def test_csv_round_trip(rows: list[records.Record], tmp_path: Path) -> None:
    records.write(tmp_path / "new" / "a.csv", rows)
    assert records.read(tmp_path / "new" / "a.csv") == rows
    assert rows[0].us_median == 1.5
    assert rows[0].share == pytest.approx(rows[0].bytes / 1.5e-6 / 1e10, abs=1e-4)
    (tmp_path / "b.csv").write_text("op,who\nscore,cpu\n")
    with pytest.raises(ValueError, match="columns"):
        records.read(tmp_path / "b.csv")


def test_page_is_one_file_with_all_plots(rows: list[records.Record], tmp_path: Path) -> None:
    text = page.write(rows, tmp_path / "page").read_text()
    assert text.count("<svg") == 3
    assert text.count("<tr>") == 1 + len(rows)
    assert "&lt;one&gt;" in text
    assert "<script" not in text
    assert "src=" not in text


def test_quick_prints_every_name() -> None:
    tiny = quick.Size(
        decode_rows=(1,), prefill_rows=32, width=64, seconds=0.0, compiled=(), llm_batches=()
    )
    result = json.loads(json.dumps(quick.measure(tiny)))
    assert set(quick.FIGURES) <= set(result)
    missing = {name for name in quick.FIGURES if result[name] is None}
    assert missing - {"cpu_step_vs_compile"} <= set(result["reasons"])
    measured = quick.figures(result)
    assert set(measured) == set(quick.FIGURES) - missing
    if ops.capabilities()["cpu"].available:
        value, unit, asked, command = measured["cpu_call_us"]
        assert value > 0
        assert (unit, asked, command) == ("us", "≤ 3", "python bench/quick.py")


def test_the_gpu_part_runs_with_loops_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the graphs: without a GPU its tensors are on the CPU, and nothing is compiled."""
    monkeypatch.setattr(quick_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(quick_gpu, "GRAPH_CALLS", 2)
    monkeypatch.setattr(quick_gpu, "captured", timing.loop)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(plain, "compiled", lambda function, how="default": function)
    monkeypatch.setattr(ceiling, "copy_block", lambda nbytes: ceiling.read_blocks(nbytes, 1)["sum"])
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=1 << 30)
    )
    size = quick.Size(decode_rows=(1, 3), prefill_rows=8, width=16, seconds=0.0)
    result: quick.Result = {"reasons": {}, "detail": {}}
    with torch.inference_mode():
        quick_gpu.measure_gpu(result, size)
    names = {name for name in quick.FIGURES if name.startswith("gpu_")}
    assert result["reasons"].keys() == {"gpu_llm_step_ratio"}
    assert "40 GiB" in result["reasons"]["gpu_llm_step_ratio"]
    assert names - result.keys() == {"gpu_llm_step_ratio"}
    assert all(result[name] > 0 for name in names - {"gpu_llm_step_ratio"})


def test_a_rival_that_cannot_run_costs_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm or a compiler that fails at its first call, as those that are built then may do."""

    def broken(*arguments: object) -> None:
        raise RuntimeError("cannot be built here")

    monkeypatch.setattr(quick_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(quick_gpu, "GRAPH_CALLS", 2)

    def captured(call: object, arguments: list[object], prepare: object) -> timing.Block:
        if call is broken:
            broken()
        return timing.loop(call, arguments, prepare)

    monkeypatch.setattr(quick_gpu, "captured", captured)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(plain, "compiled", lambda function, how="default": broken)
    size = quick.Size(decode_rows=(1,), prefill_rows=8, width=16, seconds=0.0)
    result: quick.Result = {"reasons": {}, "detail": {}}
    with torch.inference_mode():
        quick_gpu._decode(result, size)
        quick_gpu._norm(result, size)
    assert result["gpu_decode_vs_empty"] > 0
    assert result["gpu_norm_score_vs_norm"] > 0
    assert "gpu_decode_vs_compile" not in result
    assert result["reasons"]["gpu_decode_vs_compile"] == "no form was compiled for N = [1]"
    assert result["reasons"]["left out: norm compile"] == "RuntimeError: cannot be built here"


def test_a_gpu_is_kept_busy_while_a_block_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, **options: object) -> None: ...
        def record(self) -> None:
            said.append("event")

        def synchronize(self) -> None: ...
        def elapsed_time(self, end: object) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("sleep"))
    block = timing.Block(lambda: said.append("run"), 1, lambda: said.append("prepare"))
    assert timing.seconds_of(block, "cuda") == 1e-3
    assert said == ["prepare", "sleep", "event", "run", "event"]


def test_the_small_decoder_watches_every_token() -> None:
    shape = llm.Shape(
        layers=2, width=64, heads=4, kv_heads=2, inner=96, vocabulary=50, context=8, taps=(0, 1)
    )
    decoder = llm.Decoder(shape, device="cpu", dtype=torch.float32)
    tokens = []
    for monitored in (False, True):
        cache = [tuple(torch.zeros(3, 2, 8, 16) for _ in range(2)) for _ in range(2)]
        run = llm.Run(decoder, 3, cache, monitored=monitored)
        steps = []
        with torch.inference_mode():
            for _ in range(4):
                decoder.step(run)
                steps.append(run.token.tolist())
        tokens.append(steps)
        assert run.tables.slots.scored.tolist() == [4 * monitored] * 3
    assert tokens[0] == tokens[1]
