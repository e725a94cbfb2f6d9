"""The Bayes oracle of conversations: exact risk at the clock of turns.

Given a prompt's attack flag a response says nothing about the user, so at this clock an event is
whether the turn's prompt attacks and whether its response opens the sealed vessel. Both are read
from the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from midstream.chain import Chain

from . import conversations, grammar
from .conversations import SEAL_COUNT, Conversation
from .event_oracle import EventProcess, EventReading

_EVENTS = ((False, False), (False, True), (True, False), (True, True))  # (attack, opened)


@cache
def opening_chance(attack: bool) -> float:
    """Chance that a response of the grammar to such a prompt opens the sealed vessel.

    ``B`` of the absorbing chain of clauses: opened before the response ends.
    """
    size = len(grammar.STATES)
    clauses = Chain(
        transition=[list(row) for row in grammar.TRANSITIONS],
        ending=list(grammar.ENDING),
        emission=[[1.0]] * size,
        edges=[],
        prior=list(grammar.START[attack]),
        prompt_emission=[[1.0]] * size,
        prompt_edges=[],
    )
    return float(np.array(clauses.prior) @ np.append(clauses.absorption()[:, 0], 1.0))


class ConversationOracle:
    """Exact filter over the user's state and look-ahead to the second opening.

    Parameters
    ----------
    opening : mapping of bool to float, optional
        Chance of an opening by the prompt's attack flag: `opening_chance` of the grammar. A model
        that answers opens somewhat more or less often; give what was counted on other
        conversations of the same model.
    """

    def __init__(self, opening: Mapping[bool, float] | None = None) -> None:
        if opening is None:
            opening = {attack: opening_chance(attack) for attack in (False, True)}
        attack_chance = np.array(conversations.USER_ATTACK)
        event = np.stack(
            [
                (attack_chance if attack else 1 - attack_chance)
                * (opening[attack] if opened else 1 - opening[attack])
                for attack, opened in _EVENTS
            ],
            axis=1,
        )
        self.process = EventProcess(
            hidden=conversations.USER_STATES,
            facts=tuple(f"{count} open" for count in range(SEAL_COUNT)),
            start=np.array(conversations.USER_START),
            transition=np.array(conversations.USER_TRANSITIONS),
            ending=np.array(conversations.USER_ENDING),
            event=event,
            then=np.array([[f + opened for _, opened in _EVENTS] for f in range(SEAL_COUNT)]),
        )

    def read(
        self, talks: Sequence[Conversation], horizons: Sequence[int] = (0, 1, 4)
    ) -> list[EventReading]:
        """Read conversations, one `EventReading` each.

        The hidden states are `conversations.USER_STATES`; the fact is the number of openings.
        ``risk`` has read the turn's candidate response, ``pending`` its prompt alone.
        """
        readings = []
        for talk in talks:
            flags = [
                (turn.prompt.attack, opened)
                for turn, opened in zip(talk.turns, talk.labels.opened, strict=True)
            ]
            events = [_EVENTS.index(flag) for flag in flags]
            begun = [[_EVENTS.index((attack, o)) for o in (False, True)] for attack, _ in flags]
            readings.append(self.process.read(events, begun, horizons))
        return readings
