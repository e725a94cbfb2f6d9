"""What costs imply: the optimal policy beside thresholds, the shipped tier, and an oracle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from midstream.chain import Array, Chain
from midstream.kernels.tables import Verdict
from midstream.learn.stopping import Costs, StoppingPolicy, solve
from midstream.learn.stopping_beliefs import POINTS
from midstream.learn.stopping_price import (
    HORIZONS,
    Choice,
    Price,
    Verdicts,
    choose_thresholds,
    policy_verdicts,
    risks,
    threshold_verdicts,
)
from midstream.learn.stopping_streams import (
    UNSCORED,
    Stakes,
    Streams,
    follow,
    recorded,
    simulate,
)
from midstream.measure.bootstrap import Bootstrap, Figure, mean, ratio
from midstream.policy import Policy, Provenance, Thresholds

if TYPE_CHECKING:
    from midstream.bundle import Bundle
    from midstream.measure.recording import Recording

STREAMS = 4000
"""Streams that thresholds are chosen on, and as many others that policies are priced on."""

OPTIMAL, SUGGESTED, HALTING_ONLY = "optimal", "suggested", "halting only"
SHIPPED, HINDSIGHT, NEVER_HALTING, ORACLE = "shipped", "hindsight", "never halting", "oracle"

_COARSER = 4  # times fewer points, to see what the grid does


@dataclass(frozen=True)
class Study:
    """All that was found.

    Attributes
    ----------
    policy : StoppingPolicy
        Optimal on the chain.
    choice : Choice
        Thresholds chosen on streams that the chain wrote; ``choice.thresholds`` is the suggestion.
    shipped : Thresholds, optional
    streams : Streams
        Others that the chain wrote, on which the policies are priced.
    beliefs : float64 [N, K+1]
        Along them.
    verdicts : uint8 [N]
        Of the optimal policy along them.
    result : dict
        For JSON.
    """

    policy: StoppingPolicy
    choice: Choice
    shipped: Thresholds | None
    streams: Streams
    beliefs: Array
    verdicts: Verdicts
    result: dict[str, Any]

    def suggestion(self) -> Policy:
        """Return the suggestion as a policy of one tier."""
        costs = self.policy.costs
        return Policy(
            tiers={"moderate": self.choice.thresholds},
            default_tier="moderate",
            provenance=Provenance(
                calibration_set=f"{len(self.streams)} streams simulated from the chain",
                guarantee=(
                    "none: least expected cost on the chain, with "
                    f"{costs.false_halt:g} for a false halt, {costs.leak:g} for each violating "
                    f"token that leaves and {costs.delay:g} for each token held"
                ),
            ),
        )


def study(
    chain: Chain,
    costs: Costs,
    *,
    shipped: Thresholds | None = None,
    recording: tuple[Recording, Bundle] | None = None,
    streams: int = STREAMS,
    points: int = POINTS,
    seed: int = 0,
) -> Study:
    """Solve for the optimal policy, choose thresholds, and price both and what stands beside them.

    Linear in streams and tokens; some ten seconds with the default numbers on one core.

    Parameters
    ----------
    chain : Chain
    costs : Costs
    shipped : Thresholds, optional
        Of the policy that is there, to compare with.
    recording : Recording and Bundle, optional
        Labelled streams to price the same policies on. The bundle has this chain.
    streams, points, seed : int
        Of the simulation; and of the grid, see `midstream.learn.stopping.solve`.

    Raises
    ------
    StoppingError, SingularChainError, RecordingError, MeasureError
        As `midstream.learn.stopping.solve` and `midstream.learn.stopping_streams.recorded`.
    """
    policy = solve(chain, costs, points=points)
    coarser = solve(chain, costs, points=points // _COARSER)
    horizons = (*HORIZONS, *([] if shipped is None else [shipped.horizon]))

    training, held_out = (simulate(chain, streams, s) for s in (2 * seed, 2 * seed + 1))
    choice = choose_thresholds(
        training,
        Stakes.expected(chain, training),
        risks(chain, follow(chain, training), horizons),
        costs,
    )
    beliefs = follow(chain, held_out, floor=0.0)
    verdicts = policy_verdicts(policy, held_out, beliefs)
    risk = risks(chain, follow(chain, held_out), horizons)
    named = _thresholds(choice, shipped)
    result: dict[str, Any] = {
        "costs": asdict(costs),
        "states": chain.states,
        "suggestion": choice.thresholds.model_dump(),
        "halting_only": choice.halting_only.model_dump(),
        "shipped": None if shipped is None else shipped.model_dump(),
        "grid": {
            "least_cost_at_least": policy.value,
            "by_a_coarser_grid": coarser.value,
            "points": len(policy.values),
            "sweeps": policy.sweeps,
            "gap": policy.gap,
        },
        "simulated": _priced(
            held_out,
            Stakes.expected(chain, held_out),
            {
                OPTIMAL: verdicts,
                **_by_thresholds(held_out, risk, named),
                ORACLE: oracle_verdicts(held_out),
            },
            costs,
        ),
        "recorded": None,
    }
    if recording is not None:
        result["recorded"] = _on_recording(*recording, policy, named, costs, horizons)
    return Study(policy, choice, shipped, held_out, beliefs, verdicts, result)


def oracle_verdicts(streams: Streams) -> Verdicts:
    """HALT from the violating token on, CONTINUE before: what one does who sees the state."""
    violated = Stakes.known(streams).violated > 0
    return np.where(violated, Verdict.HALT, Verdict.CONTINUE).astype(np.uint8)


def _thresholds(choice: Choice, shipped: Thresholds | None) -> dict[str, Thresholds]:
    named = {SUGGESTED: choice.thresholds, HALTING_ONLY: choice.halting_only}
    return named if shipped is None else {**named, SHIPPED: shipped}


def _by_thresholds(
    streams: Streams, risk: Mapping[int, Array], named: Mapping[str, Thresholds]
) -> dict[str, Verdicts]:
    """Verdicts of each, and of none."""
    found = {
        name: threshold_verdicts(streams, risk[thresholds.horizon], thresholds)
        for name, thresholds in named.items()
    }
    never = np.full(len(streams.bins), Verdict.CONTINUE, dtype=np.uint8)
    return {**found, NEVER_HALTING: never}


def _on_recording(
    recording: Recording,
    bundle: Bundle,
    policy: StoppingPolicy,
    named: Mapping[str, Thresholds],
    costs: Costs,
    horizons: tuple[int, ...],
) -> dict[str, Any]:
    streams, used = recorded(recording, bundle)
    stakes = Stakes.known(streams)
    risk = risks(bundle.chain, follow(bundle.chain, streams), horizons)
    best = choose_thresholds(streams, stakes, risk, costs)
    optimal = policy_verdicts(policy, streams, follow(bundle.chain, streams, floor=0.0))
    priced = _priced(
        streams,
        stakes,
        {
            OPTIMAL: optimal,
            **_by_thresholds(streams, risk, {**named, HINDSIGHT: best.thresholds}),
            ORACLE: oracle_verdicts(streams),
        },
        costs,
    )
    return {
        **priced,
        "left_out": int((~used).sum()),
        "unscored_tokens": int(((streams.bins == UNSCORED) & ~streams.first_rows).sum()),
        "hindsight": best.thresholds.model_dump(),
    }


def _priced(
    streams: Streams, stakes: Stakes, verdicts: Mapping[str, Verdicts], costs: Costs
) -> dict[str, Any]:
    """Cost of each by stream, its excess over the optimal one on the same streams, and its terms.

    Intervals by bootstrap over streams; all are drawn alike, so differences are paired.
    """
    bootstrap, every = Bootstrap(), np.ones(len(streams), np.bool_)
    known = Stakes.known(streams)
    known_safe, safe = streams.safe, stakes.harmless[streams.starts[:-1]]

    def figure(values: Array) -> dict[str, Any]:
        return _plain(bootstrap.figure(mean(values, every), len(streams), n=len(streams)))

    def share(part: Any, whole: Any) -> dict[str, Any]:
        part, whole = part.astype(np.float64), whole.astype(np.float64)
        return _plain(
            bootstrap.figure(
                lambda counts: ratio(counts @ part, counts @ whole), len(streams), n=len(streams)
            )
        )

    rows: dict[str, Any] = {}
    best: Array | None = None
    for name, given in verdicts.items():
        price = Price.of(streams, known if name == ORACLE else stakes, given)
        cost = price.cost(costs)
        best = cost if best is None else best
        rows[name] = {
            "cost": figure(cost),
            "above_optimal": figure(cost - best),
            "false_halts": share(price.false_halt, safe),
            "violating_halted": share(price.halted & ~known_safe, ~known_safe),
            "leaked_tokens": figure(price.leaked),
            "held_tokens": figure(price.held.astype(np.float64)),
        }
    return {"streams": len(streams), "policies": rows}


def _plain(figure: Figure) -> dict[str, Any]:
    return {"value": figure.value, "low": figure.low, "high": figure.high}
