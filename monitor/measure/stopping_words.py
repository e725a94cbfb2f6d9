"""What the figures of `midstream.measure.stopping` mean, in sentences."""

from __future__ import annotations

from typing import Any

from midstream.measure.stopping import HINDSIGHT, NEVER_HALTING, OPTIMAL, SHIPPED, SUGGESTED

_CLOSE = 0.02  # differences below this share of the optimal cost are called none


def sentences(result: dict[str, Any]) -> list[str]:
    """Say what costs imply; one statement each."""
    costs, suggestion = result["costs"], result["suggestion"]
    simulated = result["simulated"]
    policies = simulated["policies"]
    best, chosen = policies[OPTIMAL], policies[SUGGESTED]
    said = [_unit(costs)]
    said.append(
        f"{_rule(suggestion)}. This halts {_percent(chosen['false_halts'])} of the streams of this "
        f"chain that would never have violated and {_percent(chosen['violating_halted'])} of the "
        f"others, and lets {_number(chosen['leaked_tokens'])} violating tokens per stream leave."
    )
    if suggestion["horizon"] == 0:
        said.append(
            "Looking ahead does not pay at these costs: a violating token is itself held back "
            "until it was judged, and the evidence shows it soon enough."
        )
    said.append(
        f"It costs {_number(chosen['cost'])} per stream. No policy costs less than "
        f"{result['grid']['least_cost_at_least']:.3g} on this chain, and the one found by dynamic "
        f"programming costs {_number(best['cost'])}: {_regret(chosen['above_optimal'], best)}"
    )
    if SHIPPED in policies:
        said.append(
            f"The shipped tier ({_levels(result['shipped'])}) costs "
            f"{_number(policies[SHIPPED]['cost'])} per stream and halts "
            f"{_percent(policies[SHIPPED]['false_halts'])} of the safe ones."
        )
    said.append(
        f"Never halting costs {_number(policies[NEVER_HALTING]['cost'])}; whoever sees the state "
        "halts at the violating token, which has not left by then, and pays nothing."
    )
    if result["recorded"] is not None:
        said += _recorded(result["recorded"])
    return said


def _recorded(recorded: dict[str, Any]) -> list[str]:
    policies = recorded["policies"]
    said = [
        f"On the {recorded['streams']} recorded streams the suggestion costs "
        f"{_number(policies[SUGGESTED]['cost'])}, the optimal policy of the chain "
        f"{_number(policies[OPTIMAL]['cost'])}"
        + (
            f", the shipped tier {_number(policies[SHIPPED]['cost'])}"
            if SHIPPED in policies
            else ""
        )
        + f"; the best thresholds in hindsight ({_levels(recorded['hindsight'])}), chosen on these "
        f"very streams, {_number(policies[HINDSIGHT]['cost'])}."
    ]
    best, hindsight = policies[OPTIMAL]["cost"], policies[HINDSIGHT]["cost"]
    if hindsight["high"] < best["low"]:
        said.append(
            "What is optimal on the chain is not on the recording: its streams do not behave as "
            "the chain says. Trust the recording, and see the chain's fit."
        )
    for key, words in (
        ("left_out", "streams were left out: it is not known whether, or where, they violate"),
        ("unscored_tokens", "tokens have no score; they waited for the next one that has"),
    ):
        if recorded[key]:
            said.append(f"{recorded[key]} {words}.")
    return said


def _unit(costs: dict[str, float]) -> str:
    unit = costs["false_halt"]
    if unit == 0:
        return "A false halt costs nothing, so every stream may as well be halted at once."
    return (
        f"A violating token that leaves costs as much as {costs['leak'] / unit:g} false halts, a "
        f"token held as much as {costs['delay'] / unit:g}."
    )


def _rule(thresholds: dict[str, Any]) -> str:
    ahead = thresholds["horizon"]
    event = f"a violation within {ahead} tokens" if ahead else "a violation by now"
    rule = f"Halt when the risk of {event} reaches {thresholds['halt_at']:g}"
    hold_at = thresholds["hold_at"]
    return rule if hold_at is None else f"{rule}, hold from {hold_at:g} on"


def _levels(thresholds: dict[str, Any]) -> str:
    hold_at = thresholds["hold_at"]
    held = "" if hold_at is None else f", hold at {hold_at:g}"
    return f"halt at {thresholds['halt_at']:g}{held}, horizon {thresholds['horizon']}"


def _regret(above: dict[str, Any], best: dict[str, Any]) -> str:
    lead = "the kernels obey a threshold on one risk, and that restriction costs "
    value, base = above["value"], best["cost"]["value"]
    if above["low"] <= 0 or value < _CLOSE * base:
        return lead + f"nothing that shows ({_number(above)})."
    return lead + f"{_number(above)} more, {100 * value / base:.0f} % of the optimal cost."


def _number(figure: dict[str, Any]) -> str:
    return _with_interval(figure, lambda value: f"{value:.3g}", "")


def _percent(figure: dict[str, Any]) -> str:
    return _with_interval(figure, _percents, " %")


def _percents(share: float) -> str:
    percents = 100 * share
    return f"{percents:.0f}" if percents >= 10 else f"{percents:.2g}"


def _with_interval(figure: dict[str, Any], shown: Any, unit: str) -> str:
    if figure["value"] is None:
        return "none"
    value: str = shown(figure["value"]) + unit
    if figure["low"] in (None, figure["high"]):
        return value
    return f"{value} ({shown(figure['low'])} to {shown(figure['high'])})"
