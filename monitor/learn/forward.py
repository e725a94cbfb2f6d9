"""Forward passes over given token sequences, in batches of like length, read at taps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.learn.tokens import TrainingDataError
from midstream.taps import Tap, UnreadableModelError, attach_taps, hidden_size

TokenIds = Sequence[int] | NDArray[np.integer[Any]]

BATCH_TOKENS = 4096


class ForwardPass:
    """Feeds sequences to a model and keeps what the taps read.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode. Only its body runs: the logits are not needed.
    sequences : sequence of token ids
    ids : sequence of str
        What to call them in errors.
    taps : sequence of Tap
    batch_tokens : int
        Tokens per forward pass, padding included, unless one sequence alone has more.

    Raises
    ------
    TrainingDataError
        For taps that are not there or given twice, a model in training mode, and a sequence that
        the model cannot take: longer than its window, or with an id that it has no embedding for.
    UnreadableModelError
        If the model's residual stream cannot be read at a tap.
    """

    def __init__(
        self,
        model: Any,
        sequences: Sequence[TokenIds],
        ids: Sequence[str],
        taps: Sequence[Tap],
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        if not taps:
            raise TrainingDataError("no taps: give at least one place to read")
        if batch_tokens < 1:
            raise TrainingDataError(f"batch_tokens is {batch_tokens}: give at least 1")
        if model.training:
            raise TrainingDataError("the model is in training mode: call model.eval() first")
        try:
            attach_taps(model, taps, lambda tap, hidden: None).remove()
        except UnreadableModelError:
            raise
        except ValueError as error:
            raise TrainingDataError(str(error)) from error
        self.taps = tuple(taps)
        self.width = hidden_size(model)
        self._model, self._ids, self._batch_tokens = model, ids, batch_tokens
        self._sequences = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        config = model.config.get_text_config()
        window = getattr(config, "max_position_embeddings", None)
        known = model.get_input_embeddings().num_embeddings
        for name, sequence in zip(ids, self._sequences, strict=True):
            if window is not None and len(sequence) > window:
                raise TrainingDataError(
                    f"example {name!r} has {len(sequence)} tokens, the model's window {window}: "
                    "cut it"
                )
            if len(sequence) and not 0 <= sequence.min() <= sequence.max() < known:
                raise TrainingDataError(
                    f"example {name!r} has token ids from {sequence.min()} to {sequence.max()}, "
                    f"the model knows 0 to {known - 1}: use the model's own tokenizer"
                )
        # Of no use here, and as large as the activations at every layer.
        self._options = {"use_cache": False} if getattr(config, "use_cache", None) else {}

    @torch.inference_mode()
    def read_into(
        self,
        out: Tensor,
        examples: Sequence[int] | NDArray[np.int64],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Feed some of the sequences, each once.

        Takes the time of the forward passes and, per token and tap, of two copies of ``d`` values.

        Parameters
        ----------
        out : floating Tensor [taps, tokens, d] on the CPU
            Is written to: what each tap read, sequence by sequence in the order of ``examples``.
        examples : sequence of int
        progress : callable, optional
            Called after each batch with its number of tokens.

        Raises
        ------
        TrainingDataError
            Where a value is not finite, or is not any more as ``out`` has it: names example, tap
            and remedy.
        """
        lengths = np.array([len(self._sequences[e]) for e in examples], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        body = getattr(self._model, self._model.base_model_prefix, self._model)
        held: dict[Tap, tuple[Tensor, Tensor, Tensor]] = {}
        real = torch.empty(0, dtype=torch.long)  # of the batch, padding left out

        def keep(tap: Tap, hidden: Tensor) -> None:
            # Nothing here waits for an accelerator; what it holds is of the smaller dtype.
            rows = hidden.flatten(0, 1).index_select(0, real.to(hidden.device))
            held[tap] = (rows.to(out.dtype), *rows.aminmax())

        with attach_taps(self._model, self.taps, keep):
            for batch in batches(lengths, self._batch_tokens):
                chosen = [self._sequences[examples[row]] for row in batch]
                ids, mask = padded(chosen)
                real = mask.flatten().nonzero()[:, 0]
                body(
                    input_ids=ids.to(body.device),
                    attention_mask=mask.to(body.device),
                    **self._options,
                )
                place = torch.from_numpy(
                    np.concatenate([np.arange(starts[r], starts[r] + lengths[r]) for r in batch])
                )
                for index, tap in enumerate(self.taps):
                    values, low, high = held.pop(tap)
                    values = values.cpu()
                    limit = torch.finfo(out.dtype).max
                    if not (float(low) >= -limit and float(high) <= limit):  # also for NaN
                        names = [self._ids[examples[row]] for row in batch]
                        refuse_non_finite(tap, values, float(low), float(high), chosen, names)
                    out[index].index_copy_(0, place, values)
                if progress is not None:
                    progress(len(place))


def batches(lengths: NDArray[np.int64], batch_tokens: int) -> Iterator[list[int]]:
    """Group sequences by length, the longest first, so that little is padded.

    Sequences without tokens are in no batch.
    """
    # The longest first: what the largest batch needs is known at once and not after an hour.
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    begin = 0
    while begin < len(order):
        count = max(1, batch_tokens // int(lengths[order[begin]]))
        yield order[begin : begin + count].tolist()
        begin += count


def padded(sequences: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [sequences, longest], padded on the right."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def refuse_non_finite(
    tap: Tap,
    values: Tensor,
    low: float,
    high: float,
    sequences: Sequence[NDArray[np.int64]],
    names: Sequence[str],
) -> None:
    """Raise a TrainingDataError for the first row that is not finite; none may be, by rounding."""
    bad = (~values.isfinite()).any(dim=1).nonzero()[:, 0]
    if not len(bad):
        return
    ends = np.cumsum([len(sequence) for sequence in sequences])
    row = int(np.searchsorted(ends, int(bad[0]), side="right"))
    position = int(bad[0]) - int(ends[row]) + len(sequences[row])
    where = f"example {names[row]!r}, token {position}: the residual at {tap}"
    if np.isfinite([low, high]).all():
        most = torch.finfo(values.dtype).max
        raise TrainingDataError(
            f"{where} is too large for {values.dtype} (up to {max(-low, high):.6g} in this batch, "
            f"the most it holds is {most:.6g}): collect as bf16 (--dtype bf16)"
        )
    raise TrainingDataError(
        f"{where} is not finite in the model itself ({values[bad[0]].float().sum().item()}): leave "
        "the example out, or load the model in a wider dtype"
    )
