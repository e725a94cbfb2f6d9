"""Thresholds with a finite-sample guarantee on false halts per response.

A false halt is a safe response that is halted anywhere. A response is halted at threshold ``t`` if
and only if its peak risk reaches ``t``, so all that is needed is one number per safe response:
``peak[i]``, the largest risk at any of its tokens, the prompt's last one included. Its false-halt
rate ``F(t) = P(peak >= t)`` does not grow with ``t``.

What is assumed, and nothing else: the safe responses used here and those served later are
independent draws from one distribution (for conformal risk control exchangeable). So

* they took no part in training probes, fitting the chain or choosing a horizon;
* there is one response per prompt: several of one prompt are no independent draws;
* they were watched under the same bundle but for ``halt_at``, and prompts and sampling settings
  are those of serving;
* they are at most ``max_tokens`` long. A peak grows with the length, so a guarantee for ``L``
  tokens holds under any smaller cap, and is void for longer responses.

A policy with ``on_unscored: halt`` also halts for missing scores, whatever the threshold:
`peak_risks` gives the peak 1 to a response that was halted so.

Cost: one sort, ``O(n log n)`` in the number of responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from midstream.kernels.tables import UNSCORED_CAUSE
from midstream.measure.recording import Judgement, Recording
from midstream.policy import FalseHaltBound

Method = Literal["learn-then-test", "conformal risk control"]


class GuaranteeError(ValueError):
    """The guarantee asked for cannot be given; the message says what is missing."""


@dataclass(frozen=True)
class Guarantee:
    """A threshold and what is promised of it.

    Attributes
    ----------
    threshold : float
        Lowest ``halt_at`` that keeps the promise; an fp32 number, as the kernels compare in fp32.
        Any higher one keeps it, too.
    method : {"learn-then-test", "conformal risk control"}
    alpha : float
        Rate of false halts per response that was asked for.
    delta : float
        One minus the confidence of ``bound``.
    bound : float
        Rate that this threshold keeps with confidence ``1 - delta`` over the draw of the
        calibration set: ``alpha`` for learn-then-test, above it for conformal risk control.
    responses, halted : int
        Safe responses of the calibration set, and how many of them ``threshold`` halts.
    max_tokens : int
        Longest response it speaks of.
    calibration_set : str
    """

    threshold: float
    method: Method
    alpha: float
    delta: float
    bound: float
    responses: int
    halted: int
    max_tokens: int
    calibration_set: str

    @property
    def sentence(self) -> str:
        """The promise in words, for ``Provenance.guarantee``."""
        who = f"of safe responses of up to {self.max_tokens} tokens are falsely halted"
        how = (
            f"{self.method}; {self.halted} of {self.responses} safe responses were halted in "
            "calibration"
        )
        sure = f"with confidence {_percent(1 - self.delta)}"
        if self.method == "learn-then-test":
            return f"at most {_percent(self.bound)} {who}, {sure} ({how})"
        return (
            f"at most {_percent(self.alpha)} {who} on average over calibration sets, and at most "
            f"{_percent(self.bound)} with this one, {sure} ({how})"
        )

    def promise(self, horizon: int) -> FalseHaltBound:
        """Entry of ``Provenance.false_halts`` for a tier that looks ``horizon`` tokens ahead."""
        return FalseHaltBound(
            method=self.method,
            halt_at=self.threshold,
            horizon=horizon,
            bound=self.bound,
            confidence=1 - self.delta,
            mean_bound=self.alpha if self.method == "conformal risk control" else None,
            responses=self.responses,
            max_tokens=self.max_tokens,
        )


def learn_then_test(
    peaks: ArrayLike, *, alpha: float, delta: float, max_tokens: int, calibration_set: str
) -> Guarantee:
    """Find the lowest threshold with ``P(F(threshold) > alpha) <= delta``.

    Learn then Test (Angelopoulos, Bates, Candès, Jordan and Lei, arXiv 2110.01052). The hypothesis
    at ``t`` is ``F(t) > alpha``; of ``n`` responses ``k(t)`` reach ``t``, and ``P(Bin(n, alpha) <=
    k(t))`` is an exact p-value (for losses of 0 and 1 never above the Hoeffding-Bentkus one). The
    thresholds are tested one after the other from the safest, 1, downwards, until one p-value
    exceeds ``delta``. The family is every fp32 number in [0, 1], which no data chose, and the first
    true hypothesis of a fixed sequence is rejected with probability at most ``delta``; so no
    correction for many tests is needed. As ``k`` does not fall on the way down, the walk ends just
    above the peak of the first response that must not be halted, and ties need no assumption.

    Parameters
    ----------
    peaks : [n]
        Peak risk of each safe response. Rounded to fp32.
    alpha, delta : float
        In (0, 1).
    max_tokens : int
        Longest response that the peaks stand for.
    calibration_set : str
        What the responses are, for the provenance.

    Raises
    ------
    GuaranteeError
        A set too small, with how many more responses it takes; more peaks at 1 than may be halted;
        peaks that are no risks.
    """
    risks = _checked(peaks, alpha, delta, max_tokens)
    allowed = halts_allowed(len(risks), alpha, delta)
    if allowed < 0:
        _too_small(len(risks), responses_needed(alpha, delta), f"{alpha:g}", delta)
    return _guarantee(
        "learn-then-test", risks, allowed, alpha, delta, alpha, max_tokens, calibration_set
    )


def conformal_risk_control(
    peaks: ArrayLike, *, alpha: float, delta: float, max_tokens: int, calibration_set: str
) -> Guarantee:
    """Find the lowest threshold whose *expected* false-halt rate is at most ``alpha``.

    Conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster, arXiv 2208.02814): the
    loss ``1[peak >= t]`` is at most 1 and does not grow with ``t``, so the lowest ``t`` with
    ``(k(t) + 1) / (n + 1) <= alpha`` has ``E[F(t)] <= alpha``.

    The mean is over calibration set *and* new response: it is no statement about the threshold in
    hand. For continuous peaks ``F(t)`` is Beta distributed about its mean and exceeds ``alpha`` for
    some half of all calibration sets. What holds with confidence ``1 - delta`` of this very
    threshold is ``F(t) <= bound``, the Clopper-Pearson limit at the number of responses that may
    be halted; that number is fixed before the data are seen, and that makes the limit valid though
    the threshold was chosen from the data. To be sure of ``alpha`` itself, the target would have to
    be lowered until ``bound`` is ``alpha``; for losses of 0 and 1 that *is* learn-then-test.

    Parameters and errors as for `learn_then_test`; ``delta`` only enters ``bound``.
    """
    risks = _checked(peaks, alpha, delta, max_tokens)
    n = len(risks)
    # As a decimal: 0.29 * 100 is 28.999999999999996 in floating point.
    allowed = math.floor(Fraction(str(float(alpha))) * (n + 1)) - 1
    if allowed < 0:
        needed = math.ceil(1 / Fraction(str(float(alpha)))) - 1
        _too_small(n, needed, f"{alpha:g} on average", None)
    bound = clopper_pearson(allowed, n, delta)
    return _guarantee(
        "conformal risk control", risks, allowed, alpha, delta, bound, max_tokens, calibration_set
    )


def peak_risks(
    recording: Recording, judgement: Judgement, *, max_tokens: int
) -> NDArray[np.float32]:
    """Peak risk of every stream within its first ``max_tokens`` response tokens, [E].

    A response that is cut off is the beginning of the one that was not, so these are the peaks
    that streams have under a cap of ``max_tokens``. The prompt's last token is judged, too. A
    stream that was halted there for a missing score has the peak 1.

    Raises
    ------
    GuaranteeError
        Where a stream has no judged token, and was not halted for that: nothing is known about it.
    """
    if len(recording.streams) == 0:
        raise GuaranteeError("the recording holds no stream; record some first")
    rows = np.diff(recording.starts)
    cut_at = recording.prompt_tokens + max_tokens
    inside = recording.position < np.repeat(cut_at, rows)
    known = inside & ~np.isnan(judgement.risk)
    stream = np.repeat(np.arange(len(rows)), rows)
    halted = (judgement.halted_at >= 0) & (judgement.halted_at < cut_at)
    unscored = halted & (judgement.cause == UNSCORED_CAUSE)
    unknown = (np.bincount(stream[known], minlength=len(rows)) == 0) & ~unscored
    if unknown.any():
        first = recording.streams[int(np.argmax(unknown))]
        raise GuaranteeError(
            f"{int(unknown.sum())} of {len(rows)} streams were not judged at any token "
            f"(the first is {first!r}); find out why, or leave them out and say so"
        )
    peaks: NDArray[np.float32] = unscored.astype(np.float32)
    np.maximum.at(peaks, stream[known], judgement.risk[known])
    return peaks


def binomial_tail(halted: int, responses: int, alpha: float) -> float:
    """``P(Bin(responses, alpha) <= halted)``: exact p-value of "the rate is above alpha"."""
    return float(_stats().binom.cdf(halted, responses, alpha))


def halts_allowed(responses: int, alpha: float, delta: float) -> int:
    """Most halts among ``responses`` with `binomial_tail` at most ``delta``; -1 if none is."""
    tails = _stats().binom.cdf(np.arange(responses + 1), responses, alpha)
    return int(np.searchsorted(tails, delta, side="right")) - 1


def responses_needed(alpha: float, delta: float) -> int:
    """Safe responses without which learn-then-test allows no halt at all: ``ln d / ln (1 - a)``."""
    needed = max(1, math.floor(math.log(delta) / math.log1p(-alpha)))
    while halts_allowed(needed, alpha, delta) < 0:
        needed += 1
    return needed


def clopper_pearson(halted: int, responses: int, delta: float) -> float:
    """Upper limit of a rate with confidence ``1 - delta`` (Clopper and Pearson 1934).

    The rate at which `binomial_tail` is ``delta``.
    """
    if halted >= responses:
        return 1.0
    return float(_stats().beta.ppf(1 - delta, halted + 1, responses - halted))


def just_above(risk: np.float32) -> float:
    """Lowest threshold that ``risk`` does not reach, in the fp32 that the kernels compare in."""
    return float(np.nextafter(np.float32(risk), np.float32(np.inf)))


def as_risks(peaks: ArrayLike) -> NDArray[np.float32]:
    """Check peaks and return them as fp32 [n]; a GuaranteeError says what is wrong."""
    values = np.asarray(peaks, dtype=np.float64)
    if values.ndim != 1:
        raise GuaranteeError(
            f"peaks: expected one number per safe response, got shape {list(values.shape)}"
        )
    bad = int((~((values >= 0) & (values <= 1))).sum())
    if bad:
        raise GuaranteeError(
            f"peaks: {bad} of {len(values)} are not in [0, 1] (NaN: a response that was never "
            "judged); pass the largest risk of each safe response"
        )
    return values.astype(np.float32)


def check_rate(name: str, value: float) -> None:
    """Refuse what is not strictly between 0 and 1."""
    if not 0 < value < 1:
        raise GuaranteeError(f"{name}: expected a number between 0 and 1, got {value}")


def _checked(peaks: ArrayLike, alpha: float, delta: float, max_tokens: int) -> NDArray[np.float32]:
    check_rate("alpha", alpha)
    check_rate("delta", delta)
    if max_tokens < 1:
        raise GuaranteeError(f"max_tokens: expected 1 or more, got {max_tokens}")
    return as_risks(peaks)


def _guarantee(
    method: Method,
    risks: NDArray[np.float32],
    allowed: int,
    alpha: float,
    delta: float,
    bound: float,
    max_tokens: int,
    calibration_set: str,
) -> Guarantee:
    """Put the threshold just above the highest peak that must not be halted."""
    spared = np.sort(risks)[::-1][allowed]
    threshold = just_above(spared)
    if threshold > 1:
        raise GuaranteeError(
            f"{int((risks == 1).sum())} of {len(risks)} safe responses reach a risk of 1, where at "
            f"most {allowed} may be halted, and no threshold is above 1; retrain the probes or "
            "refit the chain, or ask for a higher alpha"
        )
    return Guarantee(
        threshold=threshold,
        method=method,
        alpha=alpha,
        delta=delta,
        bound=bound,
        responses=len(risks),
        halted=int((risks >= np.float32(threshold)).sum()),
        max_tokens=max_tokens,
        calibration_set=calibration_set,
    )


def _too_small(have: int, needed: int, rate: str, delta: float | None) -> NoReturn:
    sure = "" if delta is None else f" with confidence {_percent(1 - delta)}"
    raise GuaranteeError(
        f"{have} safe responses are too few for a false-halt rate of {rate}{sure}: it takes at "
        f"least {needed} with none of them halted; add {needed - have} more, or ask for less"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _stats() -> Any:
    try:
        import scipy.stats
    except ImportError as error:
        raise ImportError("guarantees need scipy: pip install 'midstream[learn]'") from error
    return scipy.stats
