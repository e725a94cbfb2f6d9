"""Every number the README quotes stands in docs/figures.json."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "bench" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_agrees_with_the_file(figures: ModuleType) -> None:
    readme = figures.README.read_text(encoding="utf-8")
    assert figures.readme_with(json.loads(figures.FILE.read_text()), readme) == readme, (
        "README and docs/figures.json disagree; run `make figures`, or "
        "`python bench/figures.py --render` when only the file changed"
    )


def test_every_entry_says_where_it_comes_from(figures: ModuleType) -> None:
    entries = json.loads(figures.FILE.read_text())
    for name, entry in entries.items():
        assert set(entry) == {"value", "unit", "asked", "command", "machine", "date"}, name
        assert isinstance(entry["value"], int | float), name
    assert set(figures.ASKED) <= set(entries)


@pytest.mark.parametrize(
    "name", ["detect_midstream_leaked_tokens", "forecast_brier_ratio", "overhead_testbed_batch_1"]
)
def test_a_changed_figure_changes_the_readme(figures: ModuleType, name: str) -> None:
    entries = json.loads(figures.FILE.read_text())
    changed = copy.deepcopy(entries)
    changed[name]["value"] += 1
    assert figures.render(changed) != figures.render(entries)
