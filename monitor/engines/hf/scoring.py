"""transformers: score given texts, teacher-forced, at the speed of a prefill.

Decoders and encoders alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from midstream.bundle import Fingerprint
from midstream.engines.hf.checks import UnsupportedGenerationError, check_unwatched, window
from midstream.monitor import Monitor
from midstream.policy import ANSWER
from midstream.segments import SegmentTable
from midstream.streams import StreamReport
from midstream.taps import attach_taps

_UNLIMITED = 1 << 24  # a tokenizer that knows no limit names a huge one


@dataclass(frozen=True)
class TextScore:
    """A scored text.

    Attributes
    ----------
    report : StreamReport
        Its ``trace`` has one entry per token in ``offsets``.
    offsets : list of (start, end)
        Characters of the text that each scored token covers. Special tokens are not scored.
    """

    report: StreamReport
    offsets: list[tuple[int, int]]


def score(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    monitor: Monitor,
    *,
    batch_size: int = 16,
    tier: str | None = None,
) -> Iterator[TextScore]:
    """Score every token of each text as if the model had just generated it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder or a BERT-like encoder.
    tokenizer : transformers.PreTrainedTokenizerFast
    texts : iterable of str
        Read lazily, ``batch_size`` at a time.
    monitor : Monitor
        Needs ``batch_size`` free slots, and a ``trace`` as long as the longest text. Without
        ``batch_size`` slots the batches are smaller.
    tier : str, optional

    Yields
    ------
    TextScore
        In the order of the texts. Tokens beyond the model's window are counted in
        ``report.unscored``.

    Raises
    ------
    UnsupportedGenerationError
        For a text without any token.
    WrongModelError
        When the monitor's bundle was made for another model.
    """
    monitor.bundle.fingerprint.check(Fingerprint.of(model, tokenizer))
    monitor.recognise_segments(tokenizer)
    names = (f"text-{i}" for i in count())
    pending = iter(texts)
    while batch := list(islice(pending, min(batch_size, max(1, monitor.free_slots)))):
        yield from _score_batch(model, tokenizer, batch, names, monitor, tier)


def _score_batch(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    names: Iterator[str],
    monitor: Monitor,
    tier: str | None,
) -> list[TextScore]:
    encodings = _encode(getattr(model, model.base_model_prefix, model), tokenizer, texts)
    offsets = [_spans(encoding) for encoding in encodings]
    for text, spans in zip(texts, offsets, strict=True):
        if not spans:
            raise UnsupportedGenerationError(
                f"the text {text!r} has no token to score; leave it out"
            )
    given = [
        GivenTokens(
            name,
            encoding.ids,
            judged=[not special for special in encoding.special_tokens_mask],
            never_fed=sum(len(_spans(cut)) for cut in encoding.overflowing),
        )
        for encoding, name in zip(encodings, names, strict=False)
    ]
    reports = feed(model, given, monitor, tier=tier)
    return [TextScore(report, spans) for report, spans in zip(reports, offsets, strict=True)]


@dataclass(frozen=True)
class GivenTokens:
    """One row of a batch for :func:`feed`.

    Attributes
    ----------
    stream : str
        Labels its report.
    ids : sequence of int
        All that the model is fed.
    judged : sequence of bool
        False for tokens that only give context, such as the special ones around a text: they have
        no position, no score, and do not count as unscored.
    prompt_tokens : int
        Judged tokens before the response.
    never_fed : int
        Tokens that the model's window cuts off.
    """

    stream: str
    ids: Sequence[int]
    judged: Sequence[bool]
    prompt_tokens: int = 0
    never_fed: int = 0


def feed(
    model: Any, batch: Sequence[GivenTokens], monitor: Monitor, *, tier: str | None = None
) -> list[StreamReport]:
    """Feed given tokens in one forward pass, and judge them as if they had just been generated.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    batch : sequence of GivenTokens
    monitor : Monitor
        With a free slot for each, and a ``trace`` as long as the longest. Where its policy has
        segments, a token costs one more fold for each of them that the longest row goes through.
    tier : str, optional

    Raises
    ------
    UnsupportedGenerationError
        For a trace that is too short, and for a model that something else watches.
    """
    for row in batch:
        tokens, kept = sum(row.judged), monitor.slots.trace_position.shape[1]
        if tokens > kept:
            raise UnsupportedGenerationError(
                f"a text has {tokens} tokens, the monitor keeps {kept}; build it with "
                f"trace={tokens}"
            )
    check_unwatched(model)
    slots: list[int] = []
    # Only now: between two batches the reader may do what it likes with model and monitor.
    with monitor.exclusive(), attach_taps(model, monitor.bank.taps, monitor.observe):
        try:
            for row in batch:
                slots.append(monitor.admit(row.stream, row.prompt_tokens, tier))
            _forward(getattr(model, model.base_model_prefix, model), batch, monitor, slots)
        finally:
            monitor.discard()
            reports = [
                monitor.retire(slot, never_fed=row.never_fed)
                for slot, row in zip(slots, batch, strict=False)
            ]
    return reports


def _encode(body: Any, tokenizer: Any, texts: list[str]) -> list[Encoding]:
    """Tokenise; what the window cuts off is in ``overflowing``."""
    longest = min(window(body) or _UNLIMITED, tokenizer.model_max_length)
    options = {"truncation": True, "max_length": longest} if longest < _UNLIMITED else {}
    encodings: list[Encoding] | None = tokenizer(texts, **options).encodings
    if encodings is None:
        raise UnsupportedGenerationError(
            f"{type(tokenizer).__name__} does not tell which characters a token covers; "
            "use a PreTrainedTokenizerFast"
        )
    return encodings


def _spans(encoding: Encoding) -> list[tuple[int, int]]:
    """Characters of every token but the special ones."""
    tokens = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return [span for span, special in tokens if not special]


def _padded(rows: Iterable[Sequence[int]]) -> Tensor:
    """Pad on the right with 0, where neither causal attention nor absolute positions notice."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


@torch.inference_mode()
def _forward(body: Any, batch: Sequence[GivenTokens], monitor: Monitor, slots: list[int]) -> None:
    """Run all but the head of the model, whose logits are not needed."""
    ids = _padded(row.ids for row in batch).to(body.device)
    present = _padded([1] * len(row.ids) for row in batch).to(body.device)
    judged = _padded(row.judged for row in batch).bool()
    cacheless = "use_cache" in inspect.signature(body.forward).parameters
    body(input_ids=ids, attention_mask=present, **({"use_cache": False} if cacheless else {}))
    slot = torch.where(judged, torch.tensor(slots)[:, None], -1)
    position = (judged.cumsum(dim=1) - 1).flatten().to(monitor.device, torch.int32)
    if monitor.segments is None:
        monitor.advance(slot.flatten().to(monitor.device, torch.int32), position)
        return
    # A slot has one row of thresholds at a time, so each call folds one segment of each stream.
    runs = [_segment_runs(row, monitor.segments) for row in batch]
    of_run = torch.full(judged.shape, -1)
    of_run[judged] = torch.cat([torch.from_numpy(number) for number, _ in runs])
    last = int(of_run.max())
    for run in range(last + 1):
        for at, (_, segments) in zip(slots, runs, strict=True):
            if 0 < run < len(segments):
                monitor.enter_segment(at, segments[run])
        rows = torch.where(of_run == run, slot, -1).flatten()
        monitor.advance(rows.to(monitor.device, torch.int32), position, keep=run < last)


def _segment_runs(row: GivenTokens, segments: SegmentTable) -> tuple[NDArray[np.int64], list[str]]:
    """Number of the run that each judged token is in, and the segment of each run.

    Run 0 is the prompt.
    """
    ids = [token for token, judged in zip(row.ids, row.judged, strict=True) if judged]
    response = segments.read(ids[: row.prompt_tokens], ids[row.prompt_tokens :])
    changes = np.diff(response, prepend=-1) != 0
    number = np.concatenate([np.zeros(row.prompt_tokens, np.int64), np.cumsum(changes)])
    return number, [ANSWER, *(segments.names[segment] for segment in response[changes])]
