"""bench/gpu.py without a GPU: what it leaves behind where things are missing or take too long."""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path

import gpu
import pytest
import quick

from midstream.kernels import ops


def outcomes(folder: Path) -> dict[str, tuple[str, str]]:
    with (folder / "checks.csv").open(newline="") as file:
        return {row["name"]: (row["outcome"], row["detail"]) for row in csv.DictReader(file)}


def test_a_command_that_hangs_is_stopped_and_its_words_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "LONGEST", 1.0)
    code = "import time; print('began', flush=True); time.sleep(60)"
    begin = time.monotonic()
    done = gpu.run([sys.executable, "-c", code], tmp_path / "log")
    assert time.monotonic() - begin < 20
    assert done.returncode == 124
    assert done.stdout.split("\n") == ["began", "", "stopped after 1 s", ""]


def test_missing_plugins_are_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "PLUGINS", ("pytest", "no_such_plugin"))
    check = gpu.run_tests("cuda", tmp_path)
    assert (check.outcome, check.detail) == ("skipped", "not installed: no_such_plugin")


@pytest.mark.skipif(
    any(ops.capabilities()[name].available for name in gpu.BACKENDS), reason="backends can run here"
)
def test_without_a_gpu_all_is_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--as-installed", "by a test"])
    assert gpu.main() == 0
    found = outcomes(tmp_path)
    assert found.pop("install") == ("passed", "by a test")
    assert found.keys() == {"cuda", "triton", "timings"}
    assert all(outcome == "skipped" and reason for outcome, reason in found.values())
    assert "versions" in json.loads((tmp_path / "machine.json").read_text())


def test_results_so_far_are_written_before_the_next_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def checks(folder: Path):  # type: ignore[no-untyped-def]
        yield "one", lambda: [gpu.Check("one", "passed")]

        def two() -> list[gpu.Check]:
            assert outcomes(folder).keys() == {"install", "one"}
            gpu._end = 0.0
            return [gpu.Check("two", "failed", "it")]

        yield "two", two
        yield "three", lambda: pytest.fail("the time is up")

    monkeypatch.setattr(gpu, "all_checks", checks)
    monkeypatch.setattr(gpu, "_end", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--as-installed"])
    assert gpu.main() == 1
    assert outcomes(tmp_path)["three"] == ("skipped", "the time is up")


def test_quick_measures_the_devices_asked_for() -> None:
    result = quick.measure(quick.Size(), devices=())
    assert set(result["reasons"]) == set(quick.FIGURES)
    assert set(result["reasons"].values()) == {"not asked for"}
