"""Labels of characters arrive at the tokens that serving sees, whatever the tokenizer does."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from midstream import testbed
from midstream.engines.hf import scoring, streaming
from midstream.learn.align import Encoded, encode, tabulate, truncation
from midstream.learn.examples import Contrast, Example, Message, Span
from midstream.learn.tokenise import AlignmentError
from midstream.learn.tokens import UNKNOWN
from midstream.testbed.tokenizer import build_tokenizer

CORPUS = ["hello  world\n\n the café naïve", "a cab, a bad c\n d", "the glass jar is bad"] * 3
CHAT = (
    "<s>{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] | trim }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
SPECIALS = ["<s>", "<e>", "<a>", "<u>", "<unk>"]


@cache
def byte_level(trim: bool = False) -> Any:
    """GPT-2's kind: several tokens for a character, the blank with the word after it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=290,
            initial_alphabet=sorted(alphabet),
            special_tokens=SPECIALS,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", chat_template=CHAT)


@cache
def trimming() -> Any:
    """The same, with blanks trimmed off the offsets, as most checkpoints have it."""
    return byte_level(trim=True)


@cache
def wordpiece() -> Any:
    """BERT's kind: folds case and accents, drops control characters, [CLS] and [SEP] around."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdehlnor.,", "bad", "cab", "##d", "##b"]
    inner = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


@cache
def metaspace() -> Any:
    """SentencePiece's kind: the blank belongs to the word after it."""
    inner = Tokenizer(
        models.Unigram(
            [("<unk>", -9.0), ("▁", -3.0), ("▁a", -3.0), ("▁ba", -4.0), ("d", -4.0), ("c", -4.0)],
            unk_id=0,
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


KINDS = {
    "byte-level": byte_level,
    "byte-level, trimming": trimming,
    "wordpiece": wordpiece,
    "metaspace": metaspace,
    "testbed": build_tokenizer,
}
kinds = pytest.mark.parametrize("kind", KINDS)
TEXT = st.text(st.sampled_from("abcd é你🙂\n\t .,\x07A"), min_size=1, max_size=24)


def characters_one_by_one(text: str, kind: str) -> list[set[int]]:
    """Characters of each token, as a set: those of its word, or its blanks where it has none."""
    tokenizer = byte_level() if kind.startswith("byte") else KINDS[kind]()
    encoding = tokenizer(text).encodings[0]
    found = []
    for (start, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        if special:
            continue
        shown = [c for c in range(start, end) if not text[c].isspace()]
        found.append(set(range(shown[0], shown[-1] + 1)) if shown else set(range(start, end)))
    return found


@kinds
@given(text=TEXT, data=st.data())
def test_labels_agree_with_a_count_of_characters(kind: str, text: str, data: Any) -> None:
    tokenizer = KINDS[kind]()
    tokens = characters_one_by_one(text, kind)
    cut = st.integers(0, len(text))
    pairs = data.draw(st.lists(st.tuples(cut, cut), max_size=3))
    spans = [Span(start=min(p), end=max(p), hazard="h") for p in pairs if p[0] != p[1]]
    example = Example(id="e", response=text, spans=tuple(spans))
    marked = [{t for t, c in enumerate(tokens) if c & set(range(s.start, s.end))} for s in spans]
    if not tokens or not all(marked):
        with pytest.raises(AlignmentError, match="covers no token" if tokens else "no token of"):
            encode(example, tokenizer, ["h"])
        return
    found = encode(example, tokenizer, ["h"])
    inner = found.labels[~found.special, 0].tolist()
    for at, covered in enumerate(tokens):
        piece = "".join(text[c] for c in sorted(covered))
        if any(at in one for one in marked):
            assert inner[at] == 1
        elif not piece.strip() and "\n" not in piece:
            assert inner[at] == UNKNOWN
        else:
            assert inner[at] == 0
        start, end = found.characters[~found.special][at]
        assert set(range(start, end)) == covered
    begin = found.prompt_tokens
    assert [(a - begin, b - begin) for _, a, b in found.spans.tolist()] == [
        (min(one), max(one) + 1) for one in marked
    ]
    assert (found.labels[found.special] == UNKNOWN).all()
    assert (found.characters[found.special] == -1).all()


def test_the_blank_before_a_word_is_not_the_word() -> None:
    text = "a bad cab"
    for kind, tokenizer in KINDS.items():
        first = encode(
            Example(id="e", response=text, spans=(Span(start=0, end=2, hazard="h"),)),
            tokenizer(),
            ["h"],
        )
        marked = first.characters[first.labels[:, 0] == 1]
        assert marked.max() == 1, kind


def test_one_character_of_several_tokens() -> None:
    example = Example(id="e", response="a 🙂 b", spans=(Span(start=2, end=3, hazard="h"),))
    found = encode(example, trimming(), ["h"])
    assert (found.labels[:, 0] == 1).sum() >= 3
    assert found.labels[0, 0] == found.labels[-1, 0] == 0


def test_a_span_without_a_token_is_named() -> None:
    example = Example(
        id="row 7", response="bad \x07 cab", spans=(Span(start=4, end=5, hazard="h"),)
    )
    with pytest.raises(AlignmentError, match=r"'row 7'.*4:5 of 'h'.*x07.*covers no token"):
        encode(example, wordpiece(), ["h"])
    with pytest.raises(AlignmentError, match=r"'e'.*no token of the response"):
        encode(Example(id="e", response="\x07"), wordpiece(), ["h"])


# ---- what is fed --------------------------------------------------------------------------------


def body(window: int) -> Any:
    config = SimpleNamespace(max_position_embeddings=window)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))


@kinds
@pytest.mark.parametrize("window", [3, 7, 512])
def test_a_plain_text_is_fed_as_score_feeds_it(kind: str, window: int) -> None:
    tokenizer = KINDS[kind]()
    text = "the bad café, a cab .\nopen the amber jar ."
    (want,) = scoring._encode(body(window), tokenizer, [text])
    example = Example(id="e", response=text, labels={"h": True})
    found = encode(example, tokenizer, ["h"], window=window)
    assert found.ids.tolist() == want.ids
    assert found.special.tolist() == [bool(s) for s in want.special_tokens_mask]
    beyond = sum(m == 0 for cut in want.overflowing for m in cut.special_tokens_mask)
    assert found.cut_tokens == beyond
    assert found.response_labels.tolist() == [UNKNOWN if beyond else 1]
    assert found.prompt_tokens == next(i for i, s in enumerate(found.special) if not s)
    assert found.instruction_end == -1


CONVERSATIONS = [
    [("user", "a bad cab")],
    [("user", "  a bad cab \n\n")],
    [("system", "bad"), ("user", "bad"), ("assistant", "bad"), ("user", "bad")],
    [("user", "u"), ("assistant", "<u>"), ("user", " the <u> café 🙂 "), ("assistant", "the")],
    [("user", "thelastusermessagestandshere"), ("user", "thelastusermessagestandsherex")],
]


@pytest.mark.parametrize("said", CONVERSATIONS)
def test_a_conversation_is_fed_as_stream_feeds_it(said: list[tuple[str, str]]) -> None:
    tokenizer = trimming()
    messages = tuple(Message(role=role, content=content) for role, content in said)
    example = Example(id="e", messages=messages, response="a café")
    found = encode(example, tokenizer, ["h"])
    dumped = [m.model_dump() for m in messages]
    prompt = streaming.encode(SimpleNamespace(device="cpu"), tokenizer, dumped)[0].tolist()
    response = tokenizer("a café", add_special_tokens=False)["input_ids"]
    assert found.ids.tolist() == prompt + response
    assert found.prompt_tokens == len(prompt)
    assert (found.labels == UNKNOWN).all()
    assert not found.special.any()
    # Special tokens separate the turns, so the text up to the end of the content is a prefix.
    last = max(n for n, (role, _) in enumerate(said) if role == "user")
    before = tokenizer.apply_chat_template(dumped[:last], tokenize=False) if last else "<s>"
    prefix = f"{before}<u>{said[last][1].strip()}"
    tokens = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    assert found.ids[: len(tokens)].tolist() == tokens
    assert found.instruction_end == len(tokens) - 1


def test_no_user_and_nothing_said() -> None:
    system = Message(role="system", content="bad")
    assert encode(Example(id="e", messages=(system,)), trimming(), ["h"]).instruction_end == -1
    empty = Message(role="user", content=" ")
    found = encode(Example(id="e", messages=(empty,)), trimming(), ["h"])
    assert (found.instruction_end, found.prompt_tokens) == (-1, len(found.ids))


def test_without_a_template_a_prompt_is_fed_as_a_string() -> None:
    tokenizer = wordpiece()
    example = Example(
        id="e",
        messages=(Message(role="user", content="a bad cab"),),
        response="bad",
        spans=(Span(start=0, end=3, hazard="h"),),
    )
    found = encode(example, tokenizer, ["h"])
    fed = streaming.encode(SimpleNamespace(device="cpu"), tokenizer, "a bad cab")[0].tolist()
    assert found.ids.tolist() == [*fed, *tokenizer("bad", add_special_tokens=False)["input_ids"]]
    assert found.instruction_end == len(fed) - 2
    assert found.labels[:, 0].tolist() == [UNKNOWN] * len(fed) + [1]
    more = example.model_copy(update={"messages": example.messages * 2})
    with pytest.raises(
        AlignmentError, match=r"'e'.*no chat template.*set tokenizer\.chat_template"
    ):
        encode(more, tokenizer, ["h"])


def test_the_testbed_round_trip() -> None:
    tokenizer = build_tokenizer()
    for dialogue in testbed.sample_dialogues(50, seed=4):
        messages = tuple(Message(**m) for m in dialogue.prompt.messages)
        text = testbed.text_of(dialogue.response)
        found = encode(Example(id="e", messages=messages, response=text), tokenizer, [])
        assert tuple(found.ids) == (*dialogue.prompt.ids, *dialogue.response[:-1])
        assert (
            tokenizer.decode(found.ids[: found.instruction_end + 1])
            .rstrip()
            .endswith(dialogue.prompt.user.split()[-1])
        )


def refusing(template: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "shows it not once"),
        ("hello", "shows it not once"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] | length }}", "changes other text"),
    ],
)
def test_templates_that_cannot_be_read(template: str, message: str) -> None:
    example = Example(id="e7", messages=(Message(role="user", content="a bad cab"),))
    with pytest.raises(AlignmentError, match=f"'e7'.*{message}"):
        encode(example, refusing(template), ["h"])


# ---- the window ---------------------------------------------------------------------------------


def cut_at(window: int, spans: Any, **fields: Any) -> Encoded:
    """``bad cab bad``: a token each, between [CLS] and [SEP]."""
    example = Example(id="e", response="bad cab bad", spans=spans, **fields)
    return encode(example, wordpiece(), ["h", "g"], window=window)


def test_what_is_cut_off_is_counted_and_no_longer_known() -> None:
    early, late = Span(start=0, end=3, hazard="h"), Span(start=8, end=11, hazard="h")
    both = cut_at(4, (early, late))
    assert both.labels[:, 0].tolist() == [UNKNOWN, 1, 0, UNKNOWN]
    assert (both.cut_tokens, both.cut_spans) == (1, 1)
    assert both.response_labels.tolist() == [1, 0]
    gone = cut_at(4, (late,))
    assert gone.labels[:, 0].tolist() == [UNKNOWN, 0, 0, UNKNOWN]
    assert gone.response_labels.tolist() == [UNKNOWN, 0]
    across = cut_at(4, (Span(start=5, end=9, hazard="h"),))
    assert across.spans.tolist() == [[0, 2, 3]]
    assert (across.response_labels.tolist(), across.cut_spans) == ([1, 0], 0)
    whole = cut_at(5, (late,))
    assert (whole.cut_tokens, whole.response_labels.tolist()) == (0, [1, 0])
    stated = cut_at(4, None, labels={"h": True, "g": False})
    assert stated.response_labels.tolist() == [UNKNOWN, 0]
    assert truncation([whole]) is None
    assert truncation([both, gone, whole]) == (
        "2 of 3 responses go on behind the end of the window: 2 of 15 tokens and 2 labelled spans "
        "are left out (the first is 'e')"
    )


def test_a_prompt_that_fills_the_window_is_refused() -> None:
    example = Example(id="e", messages=(Message(role="user", content="a b"),), response="a b")
    need = encode(example, trimming(), ["h"]).prompt_tokens
    assert len(encode(example, trimming(), ["h"], window=need + 1).ids) == need + 1
    with pytest.raises(AlignmentError, match=f"'e'.*{need} tokens.*{need + 1} must fit"):
        encode(example, trimming(), ["h"], window=need)


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "token", "response"),
    [
        ({"spans": ()}, 0, 0),
        ({"spans": (), "labels": {"h": True}}, UNKNOWN, 1),
        ({"labels": {"h": True}}, UNKNOWN, 1),
        ({"labels": {"h": False}}, 0, 0),
        ({"labels": {"g": False}}, UNKNOWN, UNKNOWN),
        ({"spans": (Span(start=4, end=5, hazard="g"),)}, 0, 0),
    ],
)
def test_what_is_known_of_a_response(fields: Any, token: int, response: int) -> None:
    found = encode(Example(id="e", response="bad cab", **fields), wordpiece(), ["h"])
    assert found.labels[1:-1, 0].tolist() == [token, token]
    assert found.response_labels.tolist() == [response]
    assert len(found.spans) == 0


def test_tabulate() -> None:
    examples = [
        Example(id="a", response="bad cab", spans=(Span(start=4, end=7, hazard="h"),)),
        Example(
            id="b",
            messages=(Message(role="user", content="cab"),),
            response="a bad",
            spans=(Span(start=2, end=5, hazard="h"),),
            prompt_labels={"g": True},
            contrast=Contrast(pair="p", answer=True),
        ),
        Example(id="c", group="k", response="a", contrast=Contrast(pair="p", answer=False)),
    ]
    encoded = [encode(example, wordpiece(), ["g", "h"]) for example in examples]
    tokens = tabulate(encoded)
    assert (tokens.ids, tokens.groups) == (("a", "b", "c"), ("a", "user: cab", "k"))
    assert tokens.starts.tolist() == [0, 4, 9, 12]
    assert tokens.prompt_tokens.tolist() == [1, 3, 1]
    assert tokens.instruction_end.tolist() == [-1, 1, -1]
    assert tokens.labels[:, 1].tolist() == [-1, 0, 1, -1, -1, -1, -1, 0, 1, -1, -1, -1]
    assert tokens.spans.tolist() == [[1, 2, 3], [1, 8, 9]]
    assert tokens.prompt_labels.tolist() == [[-1, -1], [1, -1], [-1, -1]]
    assert tokens.contrast.tolist() == [[-1, -1, -1], [0, 0, 1], [0, 0, 0]]
    for name in ("starts", "spans"):
        assert getattr(tokens, name).dtype == np.int64
    assert tokens.labels.dtype == tokens.response_labels.dtype == np.int8
    assert tokens.select([1]).spans.tolist() == [[1, 4, 5]]
    assert torch.from_numpy(encoded[0].ids).dtype == torch.int32
    with pytest.raises(AlignmentError, match="no examples"):
        tabulate([])
    with pytest.raises(AlignmentError, match="'a' and 'c'"):
        tabulate([encoded[0], encode(examples[2], wordpiece(), ["h"])])
