"""The testbed's chain at the clock of clauses: its symbols, its streams, its true parameters.

A clause shows its template, whether its colour is the sealed one, and whether its tempo word is a
quick one; nothing else in it depends on the hidden state. From the violating clause on there is one
symbol, since the rule is certain from the text. The first clause stands before the chain's first
token: with the kind of prompt it is the prompt's bin, so that the state of the first clause is the
prior's. What has ended or violated with it has nothing left to forecast and is left out.
"""

from __future__ import annotations

import numpy as np

from midstream.chain import Chain
from midstream.learn.chains.symbols import SymbolStream
from midstream.testbed import grammar
from midstream.testbed.language import Dialogue, sample_dialogue, text_of

TRANSIENT = grammar.VIOLATED  # states before it

Symbol = tuple[int, bool | None, bool | None]  # clause, sealed colour, quick tempo


def _emission(phase: int) -> dict[Symbol, float]:
    """P(symbol | phase), read off the grammar's tables."""
    total = sum(clause.weights[phase] for clause in grammar.CLAUSES)
    found: dict[Symbol, float] = {}
    sealed, quick = grammar.SEALED_SHARE[phase], grammar.QUICK_SHARE[phase]
    for number, clause in enumerate(grammar.CLAUSES):
        colours = {True: sealed, False: 1 - sealed} if "{c}" in clause.text else {None: 1.0}
        tempos = {True: quick, False: 1 - quick} if "{tempo}" in clause.text else {None: 1.0}
        for colour, p in colours.items():
            for tempo, q in tempos.items():
                found[number, colour, tempo] = clause.weights[phase] / total * p * q
    return found


_FIRST = [_emission(phase) for phase in grammar.FIRST_PHASE[:TRANSIENT]]
_LATER = [_emission(phase) for phase in grammar.LATER_PHASE[:TRANSIENT]]
SYMBOLS = [symbol for symbol in _LATER[0] if any(row[symbol] > 0 for row in (*_FIRST, *_LATER))]
VIOLATED = len(SYMBOLS)
"""The symbol of clauses from the violating one on; it comes after all others."""
BINS = len(SYMBOLS) + 1
PROMPT_BINS = 2 * len(SYMBOLS)

_NUMBER = {symbol: number for number, symbol in enumerate(SYMBOLS)}


def true_chain() -> Chain:
    """Return the chain of the grammar's tables, over the bins of `read`."""
    start = np.array([grammar.START[False], grammar.START[True]]) * [
        [1 - grammar.ATTACK_SHARE],
        [grammar.ATTACK_SHARE],
    ]
    prior = start.sum(axis=0)[:TRANSIENT]
    attack = start[:, :TRANSIENT] / np.where(prior > 0, prior, 1.0)  # P(kind of prompt | state)
    first = np.array([[row[symbol] for symbol in SYMBOLS] for row in _FIRST])
    later = np.array([[row[symbol] for symbol in SYMBOLS] for row in _LATER])
    prompt_emission = np.concatenate([attack[0][:, None] * first, attack[1][:, None] * first], 1)
    prompt_emission[prior == 0] = 1 / PROMPT_BINS  # nothing starts there
    return Chain(
        transition=[list(row) for row in grammar.TRANSITIONS],
        ending=list(grammar.ENDING),
        emission=[[*row, 0.0] for row in later] + [[0.0] * VIOLATED + [1.0]],
        edges=[o + 0.5 for o in range(BINS - 1)],
        prior=[*(prior / prior.sum()), 0.0],
        prompt_emission=[*prompt_emission.tolist(), [1 / PROMPT_BINS] * PROMPT_BINS],
        prompt_edges=[o + 0.5 for o in range(PROMPT_BINS - 1)],
    )


def sample(streams: int, seed: int) -> list[SymbolStream]:
    """Return so many streams of the testbed's dialogues, labelled token by token."""
    found: list[SymbolStream] = []
    index = 0
    while len(found) < streams:
        stream = read(sample_dialogue(seed, index))
        if stream is not None:
            found.append(stream)
        index += 1
    return found


def read(dialogue: Dialogue) -> SymbolStream | None:
    """Read the symbols off the text; None where the first clause is the last, or violates."""
    symbols = parse(dialogue)
    if len(symbols) < 2 or symbols[0] == VIOLATED:
        return None
    bins = np.array(symbols[1:])
    prompt_bin = dialogue.prompt.attack * len(SYMBOLS) + symbols[0]
    return SymbolStream(bins, bins == VIOLATED, None, True, prompt_bin)


def parse(dialogue: Dialogue) -> list[int]:
    """Symbol of each clause of a response, from its words and what the prompt seals."""
    text, sealed = text_of(dialogue.response), dialogue.prompt.sealed
    first = dialogue.labels.first
    symbols, place = [], 0
    for clause in text.removesuffix(".").split(". "):
        words = clause.replace(",", " ,").split()
        place += len(words) + 1
        if 0 <= first < place:
            symbols.append(VIOLATED)
        else:
            symbols.append(_NUMBER[_symbol(words, sealed)])
    return symbols


def _symbol(words: list[str], sealed: str) -> Symbol:
    for number, clause in enumerate(grammar.CLAUSES):
        pieces = clause.text.split()[:-1]  # without the full stop
        if len(pieces) != len(words):
            continue
        found: dict[str, bool | None] = {"c": None, "tempo": None}
        for piece, word in zip(pieces, words, strict=True):
            if not piece.startswith("{"):
                fits = piece == word
            elif (name := piece[1:-1]) in ("c", "s", "o"):
                is_sealed = word == sealed
                fits = word in grammar.COLOURS and is_sealed == {"s": True, "o": False}.get(
                    name, is_sealed
                )
                found[name] = is_sealed
            elif name == "n":
                fits = word in grammar.NOUNS
            elif name == "tempo":
                fits = word in grammar.SLOW or word in grammar.QUICK
                found[name] = word in grammar.QUICK
            else:
                fits = word in grammar.WORDS[name]
            if not fits:
                break
        else:
            return number, found["c"], found["tempo"]
    raise ValueError(f"no clause of the grammar reads {' '.join(words)!r}")
