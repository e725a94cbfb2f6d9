"""Dialogues of the glass archive as labelled data: rows for `midstream.learn.readers`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import grammar
from .grammar import VOCABULARY
from .language import sample_dialogue, text_of, violating_index


def corpus_rows(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """`n` labelled dialogues of the grammar as JSON objects.

    Each is a row for `midstream.learn.readers` with what only a testbed knows beside it. Its span
    is the violating token alone, the sealed colour at ``violating_index``: what follows is
    violated because of it (``violated``), and may read like any other text. An attack is the label
    of the prompt, under the same hazard; whether the response refuses is a label without a place.
    """
    for index in range(n):
        dialogue = sample_dialogue(seed, index)
        labels = dialogue.labels
        place = violating_characters(dialogue.prompt.sealed, dialogue.response)
        yield {
            "id": f"testbed/{seed}/{index}",
            "messages": dialogue.prompt.messages,
            "response": text_of(dialogue.response),
            "spans": [] if place is None else [(*place, grammar.HAZARD)],
            "labels": {grammar.HAZARD: labels.violates, grammar.REFUSAL: labels.refusal},
            "prompt_labels": {grammar.HAZARD: labels.attack},
            "columns": {
                "attack": "yes" if labels.attack else "no",
                "refusal": "yes" if labels.refusal else "no",
            },
            "seed": seed,
            "index": index,
            "prompt_ids": dialogue.prompt.ids,
            "response_ids": dialogue.response,
            "sealed": dialogue.prompt.sealed,
            "attack": labels.attack,
            "refusal": labels.refusal,
            "violating_index": labels.first,
            "violated": [int(flag) for flag in labels.violated],
            "states": [grammar.STATES[state] for state in dialogue.states],
            "clause_starts": dialogue.starts,
        }


def violating_characters(sealed: str, response: Sequence[int]) -> tuple[int, int] | None:
    """Characters of the violating token in ``text_of(response)``; None where there is none."""
    first = violating_index(sealed, response)
    if first < 0:
        return None
    end = len(text_of(response[: first + 1]))
    return end - len(VOCABULARY[response[first]]), end


def write_corpus(path: str | Path, n: int, seed: int) -> None:
    """Write `n` labelled dialogues as JSON lines, one object per dialogue.

    The file appears under its name only when it is complete.
    """
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in corpus_rows(n, seed):
            file.write(json.dumps(row) + "\n")
    partial.replace(target)
