"""What ``midstream chain`` prints of a chain and of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from midstream.chain import Chain
    from midstream.learn.chains.report import FitReport

_MOVES = 3
"""Of the moves from a state so many are shown, the likeliest; --json has all."""

_SURE = 0.01  # p-value below which order 1 is called an approximation


def summary(
    chain: Chain, report: FitReport | None, horizons: list[int], level: float = 0.85
) -> dict[str, Any]:
    """All that the tables show, for machines; absorbing quantities are null where infinite.

    Zones and points of no return are those of the farthest horizon: where nothing ends, every state
    violates in the end.
    """
    from midstream.chain import SingularChainError

    farthest = max(horizons)
    found: dict[str, Any] = {
        "states": chain.states,
        "never_seen": report.never_seen if report else [],
        "transition": chain.transition,
        "ending": chain.ending,
        "absorbing": chain.absorbing.tolist(),
        "risk": {},
        "zones": [str(zone) for zone in chain.zones(farthest)],
        "level": level,
        "points_of_no_return": chain.points_of_no_return(level, farthest),
    }
    for tokens in horizons:
        interval = report.intervals.at(tokens) if report and report.intervals else None
        found["risk"][str(tokens)] = {
            "value": chain.horizon(tokens).tolist(),
            "low": interval and interval[0],
            "high": interval and interval[1],
        }
    try:
        found |= {
            "never_absorbed": None,
            "expected_tokens": chain.expected_tokens().tolist(),
            "violated_in_the_end": chain.risk().tolist(),
        }
    except SingularChainError as error:
        found |= {"never_absorbed": str(error), "expected_tokens": None}
        found["violated_in_the_end"] = None
    return found


def tables(found: dict[str, Any], report: FitReport | None) -> list[Any]:
    """Tables and lines of a :func:`summary`."""
    clock = report.clock if report else "token"
    k, never_seen = found["states"], found["never_seen"]
    seen = [state for state in range(k) if state not in never_seen]
    moves = Table(title=f"Chance to be there at the next {clock}", **_LOOK)
    for header in ("state", "stays", "moves to", "violated", "ended"):
        moves.add_column(header, justify="left" if header == "moves to" else "right")
    for state in seen:
        row = found["absorbing"][state]
        others = sorted((-chance, to) for to, chance in enumerate(row[:k]) if to != state)
        likely = [f"{to}: {number(-less)}" for less, to in others[:_MOVES] if less < -0.0005]
        chances = map(number, row[k:])
        moves.add_row(str(state), number(row[state]), ", ".join(likely), *chances)
    risks = Table(title="Risk by state", **_LOOK)
    risks.add_column("state", justify="right")
    for tokens in found["risk"]:
        risks.add_column(f"within {tokens}", justify="right", no_wrap=True)
    farthest = list(found["risk"])[-1]
    infinite = found["never_absorbed"]
    for header in () if infinite else ("ever", f"{clock}s to the end"):
        risks.add_column(header, justify="right")
    risks.add_column(f"zone at {farthest}")
    for state in seen:
        cells = []
        for of in found["risk"].values():
            ends = (of["low"][state], of["high"][state]) if of["low"] else ()
            cells.append(with_interval((of["value"][state], *ends)))
        if not infinite:
            cells.append(number(found["violated_in_the_end"][state]))
            cells.append(f"{found['expected_tokens'][state]:.1f}")
        risks.add_row(str(state), *cells, found["zones"][state])
    no_return = [str(state) for state in found["points_of_no_return"] if state in seen]
    lines = [
        f"points of no return, with a risk of {found['level']:g} or more within {farthest} "
        f"{clock}s: {', '.join(no_return) or 'none'}"
    ]
    if never_seen:
        lines.append(
            f"states {', '.join(map(str, never_seen))} are left out: no stream was there before "
            "it had violated, so that nothing is known of what follows"
        )
    if infinite:
        lines.append(infinite)
    return [moves, risks, *lines]


def fit_lines(report: FitReport) -> list[str]:
    """What else there is to know about a fit, in words."""
    clock = report.clock
    lines = [f"{report.streams} streams, {report.tokens} {clock}s, {report.violating} violate"]
    if (test := report.order_test) is not None and test["p_value"] is not None:
        p = test["p_value"]
        lines.append(
            f"order 1 against 2: χ² {test['statistic']:.1f} on {test['degrees']} degrees of "
            f"freedom, p {'< 1e-300' if p == 0 else f'= {p:.3g}'}"
            + (
                f"; the {clock} before the last one matters too, so this chain is an approximation"
                if p < _SURE
                else ""
            )
        )
    if test is not None and test["note"]:
        lines.append(test["note"])
    if (em := report.em) is not None:
        state = "converged" if em["converged"] else "has NOT converged"
        lines.append(
            f"EM {state} after {em['iterations']} iterations, the best of "
            f"{len(em['restarts'])} starts"
        )
        if (choice := em["choice"]) is not None:
            each = ", ".join(f"{n}: {value:.3f}" for n, value in choice["held_out"].items())
            lines.append(
                f"{choice['states']} latent states were chosen by held-out log-likelihood per "
                f"stream ({each})"
            )
    if "pooled" in report.held_out:
        told = [f"{report.held_out['pooled']:.4f}"]
        if "by_category" in report.held_out:
            told.append(f"{report.held_out['by_category']:.4f} by category")
        lines.append(f"held-out log-likelihood per {clock}: {', '.join(told)}")
    lines += [
        f"category {name or '(none)'}: {one.streams} streams, {one.file}"
        for name, one in report.categories.items()
    ]
    if report.concentration:
        weights = ", ".join(
            f"{table.replace('_', ' ')} {'all' if weight is None else f'{weight:.3g}'}"
            for table, weight in report.concentration.items()
        )
        lines.append(f"weight of the pooled chain in each category, in counts: {weights}")
    lines += [f"{key.replace('_', ' ')}: {value}" for key, value in report.notes.items() if value]
    return lines


_LOOK: Any = {"title_justify": "left", "box": box.SIMPLE}


def number(value: float | None) -> str:
    """Three places, or the power of ten."""
    if value is None:
        return "–"
    if 0 < value < 1e-9:
        return "<1e-09"
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else f"{value:.0e}"


def with_interval(value: Any) -> str:
    """A value, and below it its interval where there is one."""
    first, *ends = value
    return number(first) + (f"\n{number(ends[0])}–{number(ends[1])}" if ends else "")
