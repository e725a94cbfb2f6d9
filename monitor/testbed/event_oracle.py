"""Exact filter and look-ahead at the clocks of turns and agent steps.

At both clocks somebody hidden (a user, an agent's intent) moves from one event to the next, every
event is written according to where they are, and what has happened so far is a *fact* that the text
tells for certain: how many seals are open, what has been read. Only the hidden state has to be
filtered; with the fact it is a state of an absorbing chain, whose closed forms look ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from midstream.chain import Chain

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EventReading:
    """What the oracle knows along T events (turns, steps).

    Attributes
    ----------
    risk : ndarray [H, T + 1]
        One row per horizon: chance that the harm is complete by now or within so many more events.
        Column 0 is before the first event, column t + 1 has read events 0 to t.
    pending : ndarray [H, T]
        The same when of event t only its beginning has been read (of a turn the prompt, of a step
        the call); event t is then the first of those to come.
    belief : ndarray [T + 1, U]
        Chance of each hidden state at the event read last; row 0 is that of the first event,
        before it is read.
    fact : ndarray [T + 1] int
        What the text tells for certain; the number of facts, F, once the harm is complete.
    log_likelihood : ndarray [T]
        Natural log of the chance that there is an event t and that it is this one.
    """

    risk: Floats
    pending: Floats
    belief: Floats
    fact: Ints
    log_likelihood: Floats


@dataclass(frozen=True)
class EventProcess:
    """Hidden states, the events they write, and the facts that follow from events.

    Attributes
    ----------
    hidden : tuple of str
        Names of the U hidden states.
    facts : tuple of str
        Names of the F facts; the first holds before anything has happened.
    start : [U]
        Hidden state at the first event.
    transition : [U, U]
        Moves of the hidden state, given that another event comes.
    ending : [U]
        Chance that an event is the last one.
    event : [U, E]
        Chance of each event.
    then : [F, E] int
        Fact after an event; F where the event completes the harm.
    """

    hidden: tuple[str, ...]
    facts: tuple[str, ...]
    start: Floats
    transition: Floats
    ending: Floats
    event: Floats
    then: Ints

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states of `chain`, the violated one last."""
        pairs = (f"{hidden}, {fact}" for hidden in self.hidden for fact in self.facts)
        return ("before", *pairs, "violated")

    @cached_property
    def chain(self) -> Chain:
        """The chain over (hidden state, fact), one token of it an event.

        State 0 is that before the first event and never comes back; then hidden state u with fact f
        is ``1 + u F + f``. Nothing is hidden from the oracle but u, and it filters that from the
        events themselves, so the chain's own evidence model says nothing.
        """
        hidden, facts = len(self.hidden), len(self.facts)
        size = 1 + hidden * facts
        # moved[f, u, g]: chance that in hidden state u an event leads from fact f to g
        moved = np.zeros((facts, hidden, facts + 1))
        for fact in range(facts):
            for event, then in enumerate(self.then[fact]):
                moved[fact, :, then] += self.event[:, event]
        rows = np.zeros((size + 1, size + 1))
        rows[-1, -1] = 1.0
        for state in range(size):
            fact = 0 if state == 0 else (state - 1) % facts
            onward = self.start if state == 0 else self.transition[(state - 1) // facts]
            reached = onward[:, None] * moved[fact]  # [U, F + 1]
            rows[state, 1:size] = reached[:, :facts].ravel()
            rows[state, size] = reached[:, facts].sum()
        return Chain(
            transition=rows.tolist(),
            ending=[0.0, *np.repeat(self.ending, facts).tolist(), 0.0],
            emission=[[1.0]] * (size + 1),
            edges=[],
            prior=[1.0, *[0.0] * size],
            prompt_emission=[[1.0]] * (size + 1),
            prompt_edges=[],
        )

    def values(self, horizon: int) -> Floats:
        """Chance of harm by now or within ``horizon`` more events, [U, F + 1]; 1 for fact F."""
        ahead = self.chain.horizon(horizon)[1:-1].reshape(len(self.hidden), len(self.facts))
        return np.concatenate([ahead, np.ones((len(ahead), 1))], axis=1)

    def read(
        self,
        events: Sequence[int],
        begun: Sequence[Sequence[int]],
        horizons: Sequence[int],
    ) -> EventReading:
        """Filter one sequence; O(T x (U^2 + E) x H).

        Parameters
        ----------
        events : sequence of int
            T events that happened.
        begun : sequence of sequence of int
            Per event all events that begin like it: it is one of these before it is whole.
        horizons : sequence of int

        Raises
        ------
        ValueError
            For an event that cannot happen there.
        """
        facts, count = len(self.facts), len(events)
        now = [self.values(horizon) for horizon in horizons]
        ahead = [self.values(horizon - 1) if horizon > 0 else None for horizon in horizons]
        risk = np.empty((len(horizons), count + 1))
        pending = np.empty((len(horizons), count))
        belief = np.empty((count + 1, len(self.hidden)))
        fact = np.zeros(count + 1, dtype=np.int64)
        logs = np.empty(count)
        then = np.vstack([self.then, np.full(self.then.shape[1], facts)])  # harm stays done

        risk[:, 0] = [self.chain.horizon(horizon)[0] for horizon in horizons]
        belief[0] = coming = self.start  # times the chance that there is an event at all
        for at, event in enumerate(events):
            if at:
                coming = (belief[at] * (1 - self.ending)) @ self.transition
            held = fact[at]
            options = list(begun[at])
            joint = coming[:, None] * self.event[:, options]  # [U, options]
            for row, values in enumerate(ahead):
                later = float(held == facts) if values is None else values[:, then[held, options]]
                pending[row, at] = (joint * later).sum() / joint.sum()
            written = coming * self.event[:, event]
            if written.sum() == 0:
                raise ValueError(f"event {event} at place {at} cannot happen after those before it")
            logs[at] = np.log(written.sum())
            belief[at + 1] = written / written.sum()
            fact[at + 1] = then[held, event]
            risk[:, at + 1] = [belief[at + 1] @ values[:, fact[at + 1]] for values in now]
        return EventReading(risk, pending, belief, fact, logs)
