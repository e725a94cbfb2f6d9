"""SCM's word labels: notional words of harmful sentences, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from midstream.learn.align import encode
from midstream.learn.examples import Example, Span
from midstream.learn.notional import closed_class, notional, spacy_tagger
from midstream.learn.readers import read_examples
from midstream.learn.tokens import UNKNOWN
from midstream.testbed.tokenizer import build_tokenizer

SENTENCES = ["The amber jar hums .", "We open the teal flask quietly now .", "Dust it ."]
TAGS = {
    "amber": "ADJ", "jar": "NOUN", "hums": "VERB", "open": "VBP", "teal": "JJ", "flask": "NNS",
    "dust": "VB", "quietly": "ADV", "we": "PRP", "the": "DT",
}  # fmt: skip


def by_table(words: Sequence[str]) -> list[str]:
    return [TAGS.get(word.lower(), "X") for word in words]


def example(labels: list[int], **more: Any) -> Example:
    row = {"sentences": SENTENCES, "labels": labels, **more}
    return next(read_examples([row], hazard="h"))


def marked(found: Example) -> list[str]:
    assert found.spans is not None
    return [found.response[s.start : s.end] for s in found.spans if s.hazard == "h"]


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1]])
def test_the_rule_word_by_word(labels: list[int]) -> None:
    want = [
        word
        for sentence, harmful in zip(SENTENCES, labels, strict=True)
        for word in sentence.split()
        if harmful and TAGS.get(word.lower(), "X")[:2] in {"AD", "NO", "VE", "VB", "JJ", "NN"}
        and TAGS[word.lower()] != "ADV"
    ]  # fmt: skip
    found = notional(example(labels), "h", tagger=by_table)
    assert marked(found) == want
    assert found.labels == {"h": any(labels)}


def test_each_word_is_tagged_in_its_sentence() -> None:
    seen: list[list[str]] = []

    def tagger(words: Sequence[str]) -> list[str]:
        seen.append(list(words))
        return ["NOUN"] * len(words)

    found = notional(example([0, 1, 1]), "h", tagger=tagger)
    assert seen == [SENTENCES[1].split(), SENTENCES[2].split()]
    assert marked(found) == [*SENTENCES[1].split(), *SENTENCES[2].split()]


def test_tokens_of_the_words() -> None:
    found = notional(example([0, 1, 0]), "h", tagger=by_table)
    encoded = encode(found, build_tokenizer(), ["h"])
    words = [found.response[a:b].lower() for a, b in encoded.characters if a >= 0]
    assert "".join(words) == "".join("".join(SENTENCES).split()).lower()
    for word, label in zip(words, encoded.labels[~encoded.special, 0], strict=True):
        assert label == (word in {"open", "teal", "flask"}), word
    assert encoded.response_labels.tolist() == [1]


def test_blanks_are_unknown_and_the_joining_line_break_is_not() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate("abc \n")}
    inner = Tokenizer(models.WordLevel(letters, unk_token="c"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # a token per character
    row = {"sentences": ["a b", "b a"], "labels": [1, 0]}
    found = notional(next(read_examples([row], hazard="h")), "h")
    encoded = encode(found, PreTrainedTokenizerFast(tokenizer_object=inner), ["h"])
    #               a        b  \n  b           a
    want = [0, UNKNOWN, 1, 0, 0, UNKNOWN, 0]
    assert encoded.labels[:, 0].tolist() == want


def test_other_hazards_and_stated_labels_stay() -> None:
    other = Span(start=0, end=3, hazard="g")
    given = example([1, 0, 0])
    given = given.model_copy(update={"spans": (*(given.spans or ()), other), "labels": {"g": True}})
    found = notional(given, "h", tagger=by_table)
    assert found.spans is not None
    assert other in found.spans
    assert marked(found) == ["amber", "jar", "hums"]
    assert found.labels == {"g": True, "h": True}
    Example.model_validate(found.model_dump())
    silent = notional(example([0, 0, 1]), "h", tagger=lambda words: ["X"] * len(words))
    assert (silent.spans, silent.labels) == ((), {"h": True})


def test_overlapping_spans_give_each_word_once() -> None:
    spans = (Span(start=0, end=9, hazard="h"), Span(start=6, end=13, hazard="h"))
    text = "bad amber jar"
    found = notional(Example(id="e", response=text, spans=spans), "h")
    assert marked(found) == ["bad", "amber", "jar"]


def test_closed_class() -> None:
    text = "She didn't give the well-worn key to us, and I can't open 2 of them; it's naïve."
    words = re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", text)
    notional_words = [w for w, t in zip(words, closed_class(words), strict=True) if t == "NOUN"]
    assert notional_words == ["give", "well-worn", "key", "open", "naïve"]


def test_a_spacy_pipeline() -> None:
    class Document(list[Any]):
        def __init__(self, vocab: str, words: Sequence[str] = ()) -> None:
            assert vocab == "vocabulary"
            super().__init__(SimpleNamespace(text=word, pos_="") for word in words)

    class Pipeline:
        vocab = "vocabulary"

        def make_doc(self, text: str) -> Document:
            return Document(self.vocab)

        def __call__(self, document: Document) -> Document:
            assert isinstance(document, Document)
            for token in document:
                token.pos_ = "VERB" if token.text == "open" else "ADV"
            return document

    found = notional(example([0, 1, 0]), "h", tagger=spacy_tagger(Pipeline()))
    assert marked(found) == ["open"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"'e'.*not known which sentences show 'h'"):
        notional(Example(id="e", response="a", labels={"h": True}), "h")
    with pytest.raises(ValueError, match="gave 1 tags for 8 words"):
        notional(example([0, 1, 0]), "h", tagger=lambda words: ["X"])
