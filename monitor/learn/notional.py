"""SCM's rule for word labels (arXiv 2506.09996): in a harmful sentence, the notional words.

Nouns, verbs and adjectives of a harmful sentence are labelled 1, its other words 0; all words of a
benign sentence are 0, and so is the line break that joins sentences. With examples whose spans are
sentences this means: cut every span down to its notional words. `midstream.learn.align` does the
rest as SCM does: a token is 1 when any word it overlaps is, and unknown when it overlaps none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from midstream.learn.examples import Example, Span

Tagger = Callable[[Sequence[str]], Sequence[str]]
"""Words of a passage in, as many part-of-speech tags out: Universal Dependencies or Penn."""

_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_UNIVERSAL = {"NOUN", "PROPN", "VERB", "ADJ"}
_PENN = ("NN", "VB", "JJ")

# The closed classes of English, and the adverbs that are nearly closed. Contractions stand for
# their first word: "don't" is looked up as "do".
_CLOSED_CLASSES = """
a an the this that these those each every either neither some any no all both half such what
which whose whichever whatever another other many much few little more most less least several
enough own same
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his
himself she her hers herself it its itself they them their theirs themselves who whom whoever
someone somebody something anyone anybody anything everyone everybody everything nobody nothing
none one ones oneself
about above across after against along amid among around as at before behind below beneath
beside besides between beyond by despite down during except for from in inside into like near of
off on onto out outside over past per regarding since through throughout till to toward towards
under underneath until unto up upon via with within without
and but or nor so yet for if unless because although though while whereas whether than that
once lest when whenever where wherever how however why
am is are was were be been being do does did doing done have has had having will would shall
should can could may might must ought cannot ain aren couldn didn doesn don hadn hasn haven isn
mightn mustn needn shan shouldn wasn weren won wouldn
not never ever also too very just only even still already again always often sometimes
seldom usually here there then now soon later today tomorrow yesterday away back together almost
quite rather really perhaps maybe else thus hence therefore instead otherwise meanwhile
moreover furthermore nevertheless well yes oh ah hey please ok okay
zero two three four five six seven eight nine ten eleven twelve hundred thousand million first
second third
"""
_CLOSED = frozenset(_CLOSED_CLASSES.split())


def closed_class(words: Sequence[str]) -> list[str]:
    """Tag English words without a model: ``X`` for function words, ``NOUN`` for all others.

    An approximation of a tagger. Function words form closed classes, which a list can hold; every
    other word of letters counts as notional. So adverbs in -ly count, too, and a word that is both
    ("like", "back", "will") is a function word always. Other languages need a tagger.
    """
    return [
        "NOUN"
        if any(map(str.isalpha, word)) and re.split("['’]", word.lower())[0] not in _CLOSED
        else "X"
        for word in words
    ]


def spacy_tagger(nlp: Any) -> Tagger:
    """Tagger of a loaded spaCy pipeline, ``spacy.load("en_core_web_sm")`` for instance."""
    document = type(nlp.make_doc(""))

    def tag(words: Sequence[str]) -> list[str]:
        return [token.pos_ for token in nlp(document(nlp.vocab, words=list(words)))]

    return tag


def notional(example: Example, hazard: str, *, tagger: Tagger = closed_class) -> Example:
    """Cut the spans of a hazard, harmful sentences for instance, down to their notional words.

    Parameters
    ----------
    example : Example
        With spans. Its label for the response stays what it is, and is stated where it followed
        from the spans: a harmful sentence may consist of function words.
    hazard : str
        Spans of other hazards stay as they are.
    tagger : callable
        Called once per span with its words. UD's ``NOUN``, ``PROPN``, ``VERB``, ``ADJ`` and Penn's
        ``NN*``, ``VB*``, ``JJ*`` are notional. Auxiliaries are verbs to Penn, not to UD.

    Returns
    -------
    Example
        With one span per notional word. A word at the end of a span counts where it overlaps it.

    Raises
    ------
    ValueError
        When the example has no spans, or the tagger gives another number of tags.
    """
    if example.spans is None:
        raise ValueError(
            f"example {example.id!r}: it is not known which sentences show {hazard!r}; give "
            "sentences with labels, or spans"
        )
    words = [match.span() for match in _WORD.finditer(example.response)]
    chosen: dict[tuple[int, int], Span] = {}
    for span in (span for span in example.spans if span.hazard == hazard):
        inside = [(start, end) for start, end in words if start < span.end and end > span.start]
        tags = tagger([example.response[start:end] for start, end in inside])
        if len(tags) != len(inside):
            raise ValueError(
                f"example {example.id!r}: the tagger gave {len(tags)} tags for {len(inside)} words"
            )
        for (start, end), tag in zip(inside, tags, strict=True):
            if tag in _UNIVERSAL or tag.startswith(_PENN):
                chosen[start, end] = Span(start=start, end=end, hazard=hazard)
    others = [span for span in example.spans if span.hazard != hazard]
    stated = any(span.hazard == hazard for span in example.spans)
    return example.model_copy(
        update={
            "spans": (*others, *chosen.values()),
            "labels": {hazard: stated, **example.labels},
        }
    )
