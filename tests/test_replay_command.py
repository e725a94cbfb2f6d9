"""What ``midstream replay`` tells: changes by stream, totals, grids of thresholds, refusals."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import fresh_seed
from recordings import HAZARD, random_bundle, random_chain, random_recording
from rich.console import Console

from midstream.bundle import Bundle
from midstream.chain import Chain, ChainError
from midstream.measure.compare import compare
from midstream.measure.recording import Recording, RecordingError, probes_hash
from midstream.measure.rejudge import rejudge
from midstream.measure.sweep import sweep
from midstream.measure.what_if import parse_thresholds, replay, tables
from midstream.policy import Policy, PolicyError, Thresholds


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, Bundle, Recording]:
    rng = np.random.default_rng(fresh_seed())
    bundle = random_bundle(rng, tiers={"moderate": Thresholds(horizon=3, halt_at=1.0)})
    recording = random_recording(rng, bundle, 60)
    recording.save(tmp_path / "trace")
    low, high = np.nanquantile(rejudge(recording, bundle).risk, [0.3, 0.5]).tolist()
    tiers = {
        "strict": Thresholds(horizon=3, halt_at=low),
        "moderate": Thresholds(horizon=3, halt_at=high, hold_at=low),
    }
    policy = Policy(tiers=tiers, default_tier="moderate")  # so that many streams change
    (tmp_path / "policy.yaml").write_text(policy.to_yaml())
    (tmp_path / "chain.json").write_text(random_chain(rng, 6).to_json())
    return tmp_path, bundle, recording


def policy_of(folder: Path) -> Policy:
    return Policy.from_yaml((folder / "policy.yaml").read_text())


def shown(result: dict[str, Any], **options: Any) -> str:
    console = Console(width=160, file=io.StringIO())
    for part in tables(result, **options):
        console.print(part)
    return console.file.getvalue()


def test_a_policy_and_a_chain_from_files_are_compared_with_the_bundles_own(case):
    folder, bundle, recording = case
    result = replay(
        [folder / "trace"],
        bundle,
        policy=folder / "policy.yaml",
        chain=folder / "chain.json",
        tier="strict",
    )
    json.dumps(result, allow_nan=False)
    chain = Chain.from_json((folder / "chain.json").read_text())
    found = compare(recording, bundle, policy=policy_of(folder), chain=chain, tier="strict")
    assert result["streams"] == 60
    assert result["tokens"] == len(recording.position)
    assert result["before"] == dataclasses.asdict(found.before)
    assert result["after"] == dataclasses.asdict(found.after)
    assert [row["stream"] for row in result["changed"]] == [c.stream for c in found.changed]
    assert sum(result["changes"].values()) == len(result["changed"])
    halts = result["after"]["halted"] - result["before"]["halted"]
    assert halts == result["changes"]["newly halted"] - result["changes"]["no longer halted"]


def test_the_tables_show_it(case):
    folder, bundle, _ = case
    result = replay([folder / "trace"], bundle, policy=folder / "policy.yaml")
    text = shown(result)
    assert f"60 streams, {result['tokens']} tokens" in text
    assert f"{result['safe']} labelled safe, {result['violating']} violating" in text
    assert "false halts" in text
    assert "leaked tokens" in text
    for row in result["changed"][:40]:
        assert f"{row['stream']} " in text
    few = shown(result, many=2)
    assert f"the first 2 of {len(result['changed'])}" in few
    assert "recorded under bundle" not in text


def test_figures_that_need_labels_are_left_out_without(case):
    folder, bundle, recording = case
    unknown = dataclasses.replace(
        recording,
        streams=tuple(f"[red]{n}" for n in range(60)),  # no markup
        labels=np.full_like(recording.labels, -1),
        response_labels=np.full_like(recording.response_labels, -1),
    )
    unknown.save(folder / "unknown")
    result = replay([folder / "unknown"], bundle, policy=folder / "policy.yaml")
    text = shown(result)
    assert "halted" in text
    assert "false halts" not in text
    assert "missed" not in text
    assert result["changed"][0]["stream"] in text
    grid = shown(replay([folder / "unknown"], bundle, thresholds=[0.5]))
    assert "halted" in grid
    assert "lead" not in grid


def test_a_grid_is_the_sweep(case):
    folder, bundle, recording = case
    result = replay([folder / "trace"], bundle, thresholds=[0.2, 0.8])
    json.dumps(result, allow_nan=False)
    found = sweep(recording, bundle, [0.2, 0.8], horizons=[3])
    assert result["horizon"] == 3
    for t, row in enumerate(result["thresholds"]):
        assert row["threshold"] == found.thresholds[t]
        assert row["halted"] == (found.halted_at[0, t] >= 0).sum()
        assert row["false_halts"] == found.false_halts[0, t]
        assert row["caught"] == found.caught[0, t]
        assert row["missed"] == found.missed[0, t, 0]
        assert row["leaked_tokens"] == found.leaked_tokens[0, t, 0]
        assert row["lead_tokens_median"] == found.lead[0, t]
    assert "3 tokens ahead" in shown(result)


def test_a_grid_uses_the_policy_and_the_chain_given(case):
    folder, bundle, recording = case
    far = policy_of(folder).model_copy(
        update={"tiers": {"moderate": Thresholds(horizon=40, halt_at=0.5)}, "hold_back": 3}
    )
    (folder / "far.yaml").write_text(far.to_yaml())
    result = replay([folder / "trace"], bundle, policy=folder / "far.yaml", thresholds=[0.4])
    found = sweep(recording, bundle, [0.4], horizons=[40], hold_backs=[3])
    assert (result["horizon"], result["hold_back"]) == (40, 3)
    assert result["thresholds"][0]["halted"] == (found.halted_at >= 0).sum()
    assert result["thresholds"][0]["leaked_tokens"] == found.leaked_tokens[0, 0, 0]
    with pytest.raises(PolicyError, match="no tier 'loose'"):
        replay([folder / "trace"], bundle, tier="loose", thresholds=[0.4])


def test_another_policy_or_chain_in_the_bundle_is_the_point_and_other_probes_are_not(case):
    folder, bundle, recording = case
    stricter = bundle.with_policy(policy_of(folder))
    result = replay([folder / "trace"], stricter, tier="strict")
    assert result["recorded_by"] == bundle.hash != result["bundle"] == stricter.hash
    assert f"recorded under bundle {bundle.hash[:12]}" in shown(result)
    other = random_bundle(np.random.default_rng(fresh_seed()))
    assert probes_hash(other.bank) != recording.probes_hash
    with pytest.raises(RecordingError) as caught:
        replay([folder / "trace"], other, tier="moderate")
    assert bundle.hash in str(caught.value)
    assert other.hash in str(caught.value)


def test_bad_input_is_refused(case):
    folder, bundle, _ = case
    trace = [folder / "trace"]
    with pytest.raises(RecordingError, match="nothing to compare with"):
        replay(trace, bundle)
    with pytest.raises(RecordingError, match="is there 2 times"):
        replay(trace * 2, bundle, tier="moderate")
    with pytest.raises(PolicyError, match=r"chain.json"):
        replay(trace, bundle, policy=folder / "chain.json")
    with pytest.raises(ChainError, match=r"policy.yaml"):
        replay(trace, bundle, chain=folder / "policy.yaml")
    with pytest.raises(FileNotFoundError):
        replay([folder / "none"], bundle, tier="moderate")


def test_thresholds_of_the_command_line():
    assert parse_thresholds(None, None) is None
    assert parse_thresholds("0.1, 0.25,1", None) == [0.1, 0.25, 1.0]
    assert parse_thresholds(None, 4) == [0.25, 0.5, 0.75, 1.0]
    for listed, grid in (("0.1,x", None), ("", None), ("0.1", 3), (None, 1)):
        with pytest.raises(RecordingError):
            parse_thresholds(listed, grid)


def test_the_hazard_that_nothing_looks_for_counts_in_no_figure(case):
    folder, bundle, recording = case
    assert recording.hazards == (HAZARD, "other")
    renamed = dataclasses.replace(recording, hazards=("a", "b"))
    renamed.save(folder / "renamed")
    result = replay([folder / "renamed"], bundle, tier="moderate")
    assert (result["safe"], result["violating"], result["located"]) == (0, 0, 0)
