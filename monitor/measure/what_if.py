"""Recorded streams under another policy, chain, tier or threshold: what would have changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from midstream.bundle import Bundle
from midstream.chain import Chain
from midstream.measure.compare import KINDS, compare
from midstream.measure.recording import Recording, RecordingError
from midstream.measure.sweep import sweep
from midstream.policy import Policy

MANY = 40
"""Changed streams that the table shows."""


def replay(
    paths: Sequence[Path],
    bundle: Bundle,
    *,
    policy: Path | None = None,
    chain: Path | None = None,
    tier: str | None = None,
    thresholds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Judge recorded streams again and say what would have changed; the model is not needed.

    Parameters
    ----------
    paths : sequence of path
        Files of `midstream.measure.recording.Recording.save`, of one bundle.
    bundle : Bundle
        With the probes of the recording. Its own policy and chain are what is compared with.
    policy, chain : path, optional
        A ``policy.yaml`` and a ``chain.json`` in place of the bundle's.
    tier : str, optional
        By which all streams are judged.
    thresholds : sequence of float, optional
        Values of ``halt_at`` to go through, at the tier's horizon, instead of a comparison.

    Returns
    -------
    dict
        For JSON, and for `tables`.

    Raises
    ------
    RecordingError, PolicyError, ChainError, BundleError, MeasureError
        For files, a policy or a chain that cannot be read or do not fit; and when there is nothing
        to compare with.
    """
    if policy is None and chain is None and tier is None and thresholds is None:
        raise RecordingError(
            "nothing to compare with: give another policy, chain, tier or thresholds"
        )
    recording = Recording.load(*paths)
    read_policy = (
        None if policy is None else Policy.from_yaml(policy.read_text("utf-8"), str(policy))
    )
    read_chain = None if chain is None else Chain.from_json(chain.read_text("utf-8"), str(chain))
    about = {
        "recorded_by": recording.bundle,
        "bundle": bundle.hash,
        "streams": len(recording),
        "tokens": len(recording.position),
    }
    if thresholds is not None:
        other = replace(
            bundle, policy=read_policy or bundle.policy, chain=read_chain or bundle.chain
        )
        return {**about, **_grid(recording, other, thresholds, tier)}
    found = compare(recording, bundle, policy=read_policy, chain=read_chain, tier=tier)
    kinds = Counter(change.kind for change in found.changed)
    return {
        **about,
        "safe": found.safe,
        "violating": found.violating,
        "located": found.located,
        "before": asdict(found.before),
        "after": asdict(found.after),
        "changes": {kind: kinds[kind] for kind in KINDS},
        "changed": [{**asdict(change), "tokens": change.tokens} for change in found.changed],
    }


def _grid(
    recording: Recording, bundle: Bundle, thresholds: Sequence[float], tier: str | None
) -> dict[str, Any]:
    name = tier or bundle.policy.default_tier
    bundle.policy.row(name)  # type: ignore[arg-type]  # refuses a tier that is not there
    horizon = bundle.policy.tiers[name].horizon  # type: ignore[index]
    found = sweep(recording, bundle, thresholds, horizons=[horizon])
    halted = (found.halted_at[0] >= 0).sum(axis=1)
    return {
        "safe": found.safe,
        "violating": found.violating,
        "located": found.located,
        "horizon": horizon,
        "hold_back": found.hold_backs[0],
        "thresholds": [
            {
                "threshold": float(found.thresholds[t]),
                "halted": int(halted[t]),
                "false_halts": int(found.false_halts[0, t]),
                "caught": int(found.caught[0, t]),
                "missed": int(found.missed[0, t, 0]),
                "leaked_tokens": int(found.leaked_tokens[0, t, 0]),
                "lead_tokens_median": float(found.lead[0, t]) if found.located else None,
            }
            for t in range(len(found.thresholds))
        ],
    }


def parse_thresholds(listed: str | None, grid: int | None) -> list[float] | None:
    """Thresholds of ``--threshold 0.1,0.2`` or of ``--grid N``: N evenly spaced up to 1.

    Raises
    ------
    RecordingError
        For both, for no number, and for a grid below 2.
    """
    if listed is not None and grid is not None:
        raise RecordingError("give either thresholds or a grid")
    if grid is not None:
        if grid < 2:
            raise RecordingError(f"grid: expected 2 thresholds or more, got {grid}")
        return [round(n / grid, 6) for n in range(1, grid + 1)]
    if listed is None:
        return None
    try:
        return [float(value) for value in re.split(r"\s*,\s*", listed.strip())]
    except ValueError as error:
        raise RecordingError(f"thresholds: {error}; expected numbers such as 0.1,0.2") from error


def tables(result: dict[str, Any], *, many: int = MANY) -> Iterator[RenderableType]:
    """Render what `replay` found."""
    if result["recorded_by"] != result["bundle"]:
        yield Text(
            f"recorded under bundle {result['recorded_by'][:12]}, of the same probes; what is "
            f"compared with is bundle {result['bundle'][:12]}"
        )
    known = f"{result['safe']} labelled safe, {result['violating']} violating"
    yield Text(f"{result['streams']} streams, {result['tokens']} tokens; {known}")
    if "thresholds" in result:
        yield _grid_table(result)
        return
    table = _table("", "before", "after", title="all streams")
    for name in _shown(result, list(result["before"])):
        table.add_row(
            name.replace("_", " "), str(result["before"][name]), str(result["after"][name])
        )
    yield table
    yield Text(", ".join(f"{count} {kind}" for kind, count in result["changes"].items()))
    if result["changed"]:
        yield _changed_table(result["changed"], many)


def _table(*headers: str, title: str) -> Table:
    """Table of numbers, whose first column names its rows."""
    table = Table(title=title, title_justify="left")
    for n, header in enumerate(headers):
        table.add_column(header, justify="right" if n else "left")
    return table


def _shown(result: dict[str, Any], names: list[str]) -> list[str]:
    """Leave out figures of which nothing is known for want of labels."""
    needs = {"false_halts": "safe", "caught": "violating"}
    needs |= dict.fromkeys(("missed", "leaked_tokens", "lead_tokens_median"), "located")
    return [name for name in names if name not in needs or result[needs[name]]]


def _grid_table(result: dict[str, Any]) -> Table:
    names = _shown(result, list(result["thresholds"][0]))
    table = _table(
        *(name.replace("_", " ") for name in names),
        title=f"{result['horizon']} tokens ahead, hold-back {result['hold_back']}",
    )
    for row in result["thresholds"]:
        table.add_row(*(f"{row[name]:.6g}" for name in names))
    return table


def _changed_table(changed: Sequence[dict[str, Any]], many: int) -> Table:
    left = f", the first {many} of {len(changed)}" if len(changed) > many else ""
    table = Table(title=f"changed streams{left}", title_justify="left")
    for header in ("stream", "change", "before", "after", "tokens", "cause"):
        number = header in ("before", "after", "tokens")
        table.add_column(header, justify="right" if number else "left")
    for row in changed[:many]:
        kind = row["kind"] + (" (recorded no further)" if row["cut_short"] else "")
        numbers = ("" if row[name] is None else str(row[name]) for name in ("before", "after"))
        by = "" if row["tokens"] is None else f"{row['tokens']:+d}"
        # Text, since a name may look like markup
        table.add_row(Text(row["stream"]), kind, *numbers, by, Text(row["cause"] or ""))
    return table
