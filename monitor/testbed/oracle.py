"""The Bayes oracle: the best risk that anyone who reads only the text could have.

The grammar is a hidden Markov model whose nodes are (phase, clause, place in the clause).
An exact forward filter gives the chance of every node after each token; a backward
recursion gives each node's chance of a violation within h more tokens; their product is
the horizon risk. The language model is never asked.

A colour matters only as "the sealed one" or "another one", so tokens are renamed per
stream before they meet the tables and one set of tables serves all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import grammar
from .grammar import TOKEN_ID, VOCABULARY
from .language import Prompt, other_noun, violating_index

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Renamed colours live behind the vocabulary; END is what <eos> becomes.
_SEALED, _OTHER = len(VOCABULARY), len(VOCABULARY) + 1
_NOUN, _WRONG_NOUN = len(VOCABULARY) + 2, len(VOCABULARY) + 3
_RENAMED = len(VOCABULARY) + 4
_SLOTS = {"{s}": _SEALED, "{o}": _OTHER, "{n}": _NOUN}
_NOUN_IDS = frozenset(TOKEN_ID[noun] for noun in grammar.NOUNS)
#: A token less likely than this is off the grammar: the filter re-synchronises on it.
_FLOOR = 1e-12
_BATCH = 64


@dataclass(frozen=True)
class Reading:
    """What the oracle knows along one response of T tokens.

    Attributes
    ----------
    risk : ndarray [H, T + 1]
        One row per horizon asked for. Column 0 is the end of the prompt, column t + 1 has
        read the response up to and including token t.
    belief : ndarray [T + 1, S]
        Chance of each of `grammar.STATES`; after the end, that of the last clause.
    log_likelihood : ndarray [T]
        Natural log of the chance of each token given the prompt and the text before it.
    off_grammar : int
        How many tokens the grammar could not have written there.
    """

    risk: Floats
    belief: Floats
    log_likelihood: Floats
    off_grammar: int


class Oracle:
    """Exact filter and look-ahead on the product states of the grammar."""

    def __init__(self) -> None:
        states = len(grammar.STATES)
        phase_of, following = list[int](), list[int]()
        emission, violated = list[Floats](), list[bool]()
        # begin[phase, node]: chance that a clause of this phase begins at this node
        begins: list[tuple[int, int, float]] = []
        for phase in range(len(grammar.PHASES)):
            total = sum(clause.weights[phase] for clause in grammar.CLAUSES)
            for clause in grammar.CLAUSES:
                if clause.weights[phase] == 0:
                    continue
                begins.append((phase, len(phase_of), clause.weights[phase] / total))
                pieces = clause.text.split()
                seen = grammar.PHASES[phase] == "violated"
                for place, piece in enumerate(pieces):
                    row = np.zeros(_RENAMED)
                    for word, chance in grammar.choices(piece, phase):
                        row[_SLOTS.get(word) or TOKEN_ID[word]] += chance
                    # the first clause of the violated state violates at its colour word
                    seen |= piece == "{s}" and grammar.PHASES[phase] == "violated:first"
                    last = place == len(pieces) - 1
                    following.append(-1 if last else len(phase_of) + 1)
                    phase_of.append(phase)
                    emission.append(row)
                    violated.append(seen)
        nodes = len(phase_of)
        self._phase: Ints = np.array(phase_of)
        self._state: Ints = np.array(grammar.PHASE_STATE)[self._phase]
        self._violated = np.array(violated)
        self._emission: Floats = np.ascontiguousarray(np.array(emission).T)  # [token, node]
        self._inner: Ints = np.flatnonzero(np.array(following) >= 0)  # nodes with a successor
        self._last: Ints = np.flatnonzero(np.array(following) < 0)  # ends of clauses
        begin = np.zeros((len(grammar.PHASES), nodes))
        for phase, node, chance in begins:
            begin[phase, node] = chance
        chain, ending = np.array(grammar.TRANSITIONS), np.array(grammar.ENDING)
        first, later = begin[list(grammar.FIRST_PHASE)], begin[list(grammar.LATER_PHASE)]
        stay = np.eye(states, dtype=bool)
        # chance of each node after a clause in each state, the response going on  [S, node]
        self._onward: Floats = (1 - ending)[:, None] * (
            np.where(stay, chain, 0.0) @ later + np.where(stay, 0.0, chain) @ first
        )
        self._ending: Floats = ending
        self._start: dict[bool, Floats] = {
            attack: np.array(row) @ first for attack, row in grammar.START.items()
        }
        self._of_state: Floats = np.eye(states)[self._state]  # [node, S]
        self._values: Floats = self._violated.astype(float)[None]

    def values(self, horizon: int) -> Floats:
        """Chance of being violated within 0..horizon more tokens, by node: ``[h + 1, node]``."""
        rows = list(self._values)
        while len(rows) <= horizon:
            row = np.zeros(len(self._state))
            row[self._inner] = rows[-1][self._inner + 1]
            row[self._last] = (self._onward @ rows[-1])[self._state[self._last]]
            rows.append(np.where(self._violated, 1.0, row))
        self._values = np.array(rows)
        return self._values[: horizon + 1]

    def read(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        horizons: Sequence[int] = (0, 24),
    ) -> list[Reading]:
        """Read many responses at once.

        Parameters
        ----------
        prompts : sequence of Prompt
            B prompts; the sealed colour, its noun and the attack flag are what counts.
        responses : sequence of sequence of int
            B responses as token ids, cut anywhere; padding is not needed.
        horizons : sequence of int
            The risk is the chance of a violation by now or within so many more tokens.

        Returns
        -------
        list of Reading
            One per response.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
        order = sorted(range(len(responses)), key=lambda row: -len(responses[row]))
        readings: dict[int, Reading] = {}
        for begin in range(0, len(order), _BATCH):
            rows = order[begin : begin + _BATCH]  # like lengths together: little is padded
            batch = self._read_batch(
                [prompts[r] for r in rows], [responses[r] for r in rows], horizons
            )
            readings.update(zip(rows, batch, strict=True))
        return [readings[row] for row in range(len(responses))]

    def _read_batch(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        horizons: Sequence[int],
    ) -> list[Reading]:
        """`read` for responses that come longest first."""
        lengths = np.array([len(response) for response in responses])
        tokens = self._rename(prompts, responses)
        firsts = np.array([
            violating_index(prompt.sealed, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ])  # fmt: skip
        batch, longest = tokens.shape
        table = self.values(max(0, *horizons))[list(horizons)].T  # [node, H]
        ahead = self.values(max(1, *horizons))[[max(0, h - 1) for h in horizons]].T
        risk = np.zeros((batch, longest + 1, len(horizons)))
        belief = np.zeros((batch, longest + 1, len(grammar.STATES)))
        logs = np.zeros((batch, longest))
        off = np.zeros(batch, dtype=np.int64)

        coming = np.array([self._start[prompt.attack] for prompt in prompts])  # [B, node]
        # Nothing is violated before the first token, which is one of the h tokens to come.
        risk[:, 0] = coming @ ahead * (np.array(horizons) > 0)
        belief[:, 0] = coming @ self._of_state
        end_chance = np.zeros(batch)
        for at in range(longest):
            live = int((lengths > at).sum())
            token, coming, end_chance = tokens[:live, at], coming[:live], end_chance[:live]
            ends = token == grammar.EOS_ID
            by_now = (firsts[:live] >= 0) & (firsts[:live] <= at)
            joint = coming * self._emission[token]
            # The rule is certain from the text: nodes that contradict it are ruled out.
            joint *= self._violated == by_now[:, None]
            chance = np.where(ends, end_chance, joint.sum(1))
            lost = chance < _FLOOR
            if lost.any():
                off[:live] += lost
                joint[lost] = self._resync(belief[:live, at][lost], token[lost], by_now[lost])
            colours = np.where(token == _OTHER, len(grammar.COLOURS) - 1, 1)
            logs[:live, at] = np.log(np.maximum(chance, _FLOOR) / colours)
            joint[ends] = 0.0
            node = joint / np.maximum(joint.sum(1, keepdims=True), 1e-300)
            last = node[:, self._last] @ self._of_state[self._last]  # clause just ended [live, S]
            belief[:live, at + 1] = np.where(
                ends[:, None], belief[:live, at], node @ self._of_state
            )
            risk[:live, at + 1] = np.where(ends[:, None], by_now[:, None], node @ table)
            coming = last @ self._onward
            coming[:, self._inner + 1] += node[:, self._inner]
            end_chance = last @ self._ending
        return [
            Reading(
                np.ascontiguousarray(risk[row, : length + 1].T),
                belief[row, : length + 1],
                logs[row, :length],
                int(off[row]),
            )
            for row, length in enumerate(lengths)
        ]

    def _rename(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> Ints:
        """Tokens with colours renamed, padded with -1 to ``[B, longest]``."""
        longest = max((len(response) for response in responses), default=0)
        tokens = np.full((len(responses), longest), -1, dtype=np.int64)
        colours = [TOKEN_ID[colour] for colour in grammar.COLOURS]
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            renamed = np.arange(_RENAMED)
            renamed[colours] = _OTHER
            renamed[TOKEN_ID[prompt.sealed]] = _SEALED
            tokens[row, : len(response)] = renamed[np.asarray(response, dtype=np.int64)]
            self._rename_nouns(tokens[row], prompt, response)
        return tokens

    def _rename_nouns(self, tokens: Ints, prompt: Prompt, response: Sequence[int]) -> None:
        """What a vessel is called follows from the text before it: the right noun or the wrong."""
        sealed, first = TOKEN_ID[prompt.sealed], violating_index(prompt.sealed, response)
        names = TOKEN_ID[prompt.noun], TOKEN_ID[other_noun(prompt.noun)]
        for at, token in enumerate(response):
            if token in _NOUN_IDS:
                still_sealed = at > 0 and response[at - 1] == sealed and not 0 <= first < at
                tokens[at] = _NOUN if token == names[not still_sealed] else _WRONG_NOUN

    def _resync(self, belief: Floats, token: Ints, by_now: NDArray[np.bool_]) -> Floats:
        """Nodes to go on from after a token off the grammar  ``[rows, node]``.

        The belief over states is kept; within a state any node that could write this token
        may be meant, or any node at all if none could.
        """
        allowed = (self._violated[None, :] == by_now[:, None]).astype(float)
        prior = np.maximum(belief[:, self._state], 1e-4) * allowed
        fitting = prior * self._emission[token]
        none = fitting.sum(1, keepdims=True) == 0
        nodes: Floats = np.where(none, prior, fitting)
        return nodes
