"""Anytime-valid halting: an e-process over the stream, halted when it reaches ``1 / alpha``.

An e-process is a process ``E_t >= 0`` that, on safe streams, is bounded by martingales that begin
at 1. Ville's inequality then gives ``P(E_t >= 1 / alpha for any t) <= alpha``: the chance that a
safe stream is *ever* halted, whatever its length and whenever one looks. (A threshold of
`midstream.learn.guarantee` needs no model, but speaks of ``max_tokens`` only.) The price is an
assumption on what a safe stream does next, given its past. Three constructions, by assumption:

1. `odds_process`, `risk_threshold`. *The risk is right*: it is the conditional probability that the
   stream violates, given what was seen. Then posterior odds over prior odds are the likelihood
   ratio of violating to safe streams, a martingale on the safe ones, and log-optimal (it is the
   bet of Kelly). ``E_t >= 1 / alpha`` says ``risk >= threshold``, so every kernel serves it as
   ``halt_at``. The assumption is the chain's: a filter whose states miss some memory of the stream
   is overconfident, and the bound breaks. Check it with held-out peaks.
2. `changepoint_process` of `bets` on p-values. *Each p-value is super-uniform given the past* of a
   safe stream. Products of bets then are martingales. Marginal validity is not enough: a safe
   stream whose every token is a little odd multiplies that oddity at every token.
   `TailPValues` makes such p-values where the next score depends on the past only through a
   ``context`` that the caller names (the last evidence bin; the kind of sentence). Tokens in a
   row are hardly ever that; chunks are nearer to it.
3. `spending_process` of the same bets. *Each p-value is super-uniform by itself*, with any
   dependence between tokens whatever: a sum of e-values with weights that add up to 1 never falls,
   and its limit has mean at most 1. With one context per place in the stream (doubling chunks:
   tokens 1, 2-3, 4-7 ...) only streams need to be independent. Such bets are weak, since nothing
   that was won can be staked again.

2 and 3 are computed on recorded or live scores on the host, one number per stream; no kernel folds
them. All are linear in the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from midstream.chain import Chain

from .guarantee import GuaranteeError, check_rate, clopper_pearson

Floats = NDArray[np.float64]

_SERIES_BELOW = 1e-3  # -ln p; the closed form loses 1e-10 of its value there, the series 1e-11


# -- 1. the risk is right --------------------------------------------------------------------------


def chance_of_violation(chain: Chain) -> float:
    """``P(violated ever)`` before anything is seen, by the chain: prior odds of `odds_process`.

    Raises
    ------
    SingularChainError
        Where a stream may go on for ever.
    """
    prior = np.asarray(chain.prior)
    return float(prior[:-1] @ chain.absorption()[:, 0] + prior[-1])


def odds_process(risk: ArrayLike, chance: float) -> Floats:
    """``E_t``: odds of ``risk`` [..., T] over those of ``chance``; inf at risk 1, NaN at NaN.

    Horizon risk is at most the risk of ever violating, so with it ``E_t`` only is smaller.
    """
    check_rate("chance", chance)
    p = np.asarray(risk, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(p / (1 - p) * ((1 - chance) / chance), dtype=np.float64)


def risk_threshold(chance: float, alpha: float) -> float:
    """``halt_at`` where `odds_process` reaches ``1 / alpha``: ``c / (c + alpha (1 - c))``.

    The lowest fp32 number that is not below it. Elementary proof: of the streams halted at risk
    ``t`` at least the share ``t`` violates, and no more than ``c`` of all can, so that
    ``P(halted, safe) <= c (1 - t) / t = alpha (1 - c)``.

    Parameters
    ----------
    chance : float
        `chance_of_violation`, or the share of violating responses where the prompts come from.
    alpha : float
        Chance that a safe stream is ever halted.
    """
    check_rate("chance", chance)
    check_rate("alpha", alpha)
    exact = chance / (chance + alpha * (1 - chance))
    level = np.float32(exact)
    if float(level) < exact:
        level = np.nextafter(level, np.float32(np.inf))
    return float(level)


# -- p-values and bets -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TailPValues:
    """p-values of scores by context, valid given the calibration set.

    An empirical p-value is super-uniform on average over calibration sets only; a product of many
    with one set compounds the error of that set. These are upper confidence limits of the tail,
    so that with confidence ``1 - delta`` over the calibration set *all* of them hold at once:
    ``P(ever halted) <= alpha`` with that confidence.

    Attributes
    ----------
    levels, tails : dict of context to float64 [J]
        ``P(score > levels[j])`` is at most ``tails[j]``; levels descend, tails ascend.
    delta : float
    """

    levels: dict[int, Floats]
    tails: dict[int, Floats]
    delta: float

    @classmethod
    def fit(cls, scores: ArrayLike, contexts: ArrayLike, *, delta: float) -> Self:
        """Fit the tails on scores of safe streams.

        The k-th largest of ``m`` scores, k = 1, 2, 4 ... up to m / 2, has a tail that is Beta(k,
        m - k + 1) distributed or below (Wilks 1941). Its ``1 - delta / J`` quantile, which is a
        Clopper-Pearson limit, is the tail stated, with J levels in all contexts together.

        Parameters
        ----------
        scores : float [n]
            One per stream and context, as they must be independent: of the *first* visit to that
            context, since to choose by what came later would be to select.
        contexts : int [n]
        delta : float
            One minus the confidence of all tails together.

        Raises
        ------
        GuaranteeError
            A score that is not finite, nothing to fit on.
        """
        check_rate("delta", delta)
        z = np.asarray(scores, dtype=np.float64)
        where = np.asarray(contexts, dtype=np.int64)
        if z.ndim != 1 or z.shape != where.shape or len(z) == 0:
            raise GuaranteeError(
                "expected scores and contexts of one length, and at least one, got "
                f"{list(z.shape)} and {list(where.shape)}"
            )
        if bad := int((~np.isfinite(z)).sum()):
            raise GuaranteeError(f"{bad} of {len(z)} scores are not finite; leave them out")
        ranked = {int(c): np.sort(z[where == c])[::-1] for c in np.unique(where)}
        ranks = {c: _powers_of_two(max(1, len(s) // 2)) for c, s in ranked.items()}
        share = delta / sum(map(len, ranks.values()))
        return cls(
            levels={c: s[ranks[c] - 1] for c, s in ranked.items()},
            tails={
                c: np.array([clopper_pearson(k - 1, len(s), share) for k in ranks[c].tolist()])
                for c, s in ranked.items()
            },
            delta=delta,
        )

    def __call__(self, scores: ArrayLike, contexts: ArrayLike) -> Floats:
        """p-values of scores [...] in their contexts [...].

        1 where no level is exceeded, in a context never seen, and where the score is NaN: a token
        without a score is evidence of nothing.
        """
        z, where = np.broadcast_arrays(
            np.asarray(scores, dtype=np.float64), np.asarray(contexts, dtype=np.int64)
        )
        p = np.ones(z.shape)
        for context, levels in self.levels.items():
            here = (where == context) & ~np.isnan(z)
            # levels below the score; searchsorted wants them ascending
            below = np.searchsorted(levels[::-1], z[here], side="left")
            tails = np.append(self.tails[context], 1.0)
            p[here] = tails[len(levels) - below]
        return p


def bets(p: ArrayLike) -> Floats:
    """e-values of p-values: ``f(p) = (1 - p + p ln p) / (p ln(p)^2)``, 1/2 at p = 1.

    The mixture over kappa in (0, 1) of the bets ``kappa p^(kappa - 1)``, each of which has mean 1
    under a uniform p (Vovk and Wang 2021, Annals of Statistics 49); f falls with p, so that the
    mean is at most 1 under a super-uniform one.
    """
    with np.errstate(divide="ignore", over="ignore"):  # f is inf at 0, and above 1e308 near it
        x = -np.log(np.asarray(p, dtype=np.float64))
        small = x < _SERIES_BELOW
        safe = np.where(small | np.isinf(x), 1.0, x)
        series = 0.5 + x / 6 + x**2 / 24
        closed = (np.expm1(safe) - safe) / safe**2
    return np.asarray(np.where(small | np.isinf(x), series, closed))


# -- 2. and 3. processes ---------------------------------------------------------------------------


def changepoint_process(e: ArrayLike) -> Floats:
    """``M_t`` [..., T]: mixture of the products of ``e`` that begin at s = 1, 2, 3 ...

    ``M_t = sum over s <= t of w_s e_s ... e_t, + sum over s > t of w_s`` with ``w_s = 1 / (s (s +
    1))``, which adds up to 1. Each product is a martingale from s on where every e-value has mean
    at most 1 *given the past*; a mixture of martingales is one. Against a single product, which a
    long safe beginning drives to 0, it loses the factor ``s (s + 1)`` and is there when the stream
    turns at s.
    """
    values = np.asarray(e, dtype=np.float64)
    process = np.empty_like(values)
    running = np.zeros(values.shape[:-1])
    with np.errstate(over="ignore"):  # inf is above any 1 / alpha
        for t in range(values.shape[-1]):
            running = (running + 1 / ((t + 1) * (t + 2))) * values[..., t]
            process[..., t] = running + 1 / (t + 2)
    return process


def spending_process(e: ArrayLike) -> Floats:
    """``S_t`` [..., T] ``= sum over s <= t of w_s e_s``, with the weights of `changepoint_process`.

    ``S`` never falls and its limit has mean at most 1 where each e-value has: Markov's inequality
    at the limit bounds every t, under any dependence.
    """
    values = np.asarray(e, dtype=np.float64)
    s = np.arange(1, values.shape[-1] + 1)
    return np.asarray(np.cumsum(values / (s * (s + 1)), axis=-1))


def halts_at(process: ArrayLike, alpha: float) -> NDArray[np.int64]:
    """First t, from 0, at which ``process`` [..., T] reaches ``1 / alpha``; -1 where it never does.

    NaN reaches nothing.
    """
    check_rate("alpha", alpha)
    reached = np.asarray(process, dtype=np.float64) >= 1 / alpha
    if reached.shape[-1] == 0:
        return np.full(reached.shape[:-1], -1, dtype=np.int64)
    return np.where(reached.any(axis=-1), reached.argmax(axis=-1), -1)


def _powers_of_two(most: int) -> NDArray[np.int64]:
    return 2 ** np.arange(int(most).bit_length(), dtype=np.int64)
