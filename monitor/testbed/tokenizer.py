"""The testbed's tokenizer: one token per word, made from the grammar's vocabulary."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from . import grammar

#: Messages to text. Every turn opens with its role's token; only a finished assistant turn
#: ends in <eos>, so the generation prompt is the same text without the answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '>' }}{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the ids of `grammar.VOCABULARY`.

    Words carry a leading mark for the blank before them and punctuation does not, so that
    decoding gives text as people write it. Case is folded, so that people may write it.
    """
    blank = "\u2581"
    marks = {".", ",", "?"}
    vocabulary = {
        word if word in grammar.SPECIALS or word in marks else blank + word: place
        for place, word in enumerate(grammar.VOCABULARY)
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=grammar.UNKNOWN))
    inner.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Strip(),
            normalizers.Replace(Regex(r"\s+(?=[.,?])"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
        ]
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=blank, prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[.,?]"), "isolated"),
        ]
    )
    inner.decoder = decoders.Metaspace(replacement=blank, prepend_scheme="always")
    inner.add_special_tokens(list(grammar.SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=grammar.BOS,
        eos_token=grammar.EOS,
        pad_token=grammar.PAD,
        unk_token=grammar.UNKNOWN,
        additional_special_tokens=[
            grammar.SYSTEM,
            grammar.USER,
            grammar.ASSISTANT,
            grammar.HALT,
        ],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
