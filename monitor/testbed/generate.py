"""Responses written by the testbed's model, one private random stream per response.

`model.generate` draws for a whole batch at once, so what it writes depends on who shares
the batch. Here response i of a seed is the same (up to rounding of the model itself)
however many are asked for and however they are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from . import grammar
from .language import Prompt


@torch.inference_mode()
def generate_responses(
    model: Any,
    prompts: Sequence[Prompt],
    seed: int,
    *,
    first_index: int = 0,
    max_new_tokens: int = 192,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, ...]]:
    """Sample one response per prompt at temperature 1.

    Parameters
    ----------
    model : LlamaForCausalLM
        The testbed's model (any causal model with its vocabulary).
    prompts : sequence of Prompt
        Prompt number `first_index` + i draws from the random stream (seed, that number).
    progress : callable, optional
        Called as ``progress(responses done, responses asked for)``.

    Returns
    -------
    list of tuple of int
        Token ids; the last is ``<eos>`` unless the response was cut at `max_new_tokens`.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))
    responses: dict[int, tuple[int, ...]] = {}
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]  # prompts of like length: little is padded
        draws = torch.stack(
            [
                torch.from_numpy(
                    np.random.default_rng([seed, first_index + row]).random(max_new_tokens)
                )
                for row in rows
            ]
        )
        written = _decode(model, [prompts[row].ids for row in rows], draws)
        responses.update(zip(rows, written, strict=True))
        if progress is not None:
            progress(len(responses), len(order))
    return [responses[row] for row in range(len(prompts))]


def _decode(
    model: Any, prompts: Sequence[tuple[int, ...]], draws: torch.Tensor
) -> list[tuple[int, ...]]:
    """Decode one batch; `draws` [B, T] are uniform numbers that choose the tokens."""
    longest = max(len(ids) for ids in prompts)
    pad = grammar.TOKEN_ID[grammar.PAD]
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    rows = torch.arange(len(prompts))  # which response each row of the batch belongs to
    going = torch.ones(len(prompts), dtype=torch.bool)
    written: list[list[int]] = [[] for _ in prompts]
    cache = DynamicCache()
    for step in range(draws.shape[1]):
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chances = output.logits[:, -1].double().softmax(-1).cumsum(-1)
        token = torch.searchsorted(chances, draws[rows, step, None] * chances[:, -1:])
        token = token.clamp(max=chances.shape[1] - 1)
        for row, word in zip(rows.tolist(), token[:, 0].tolist(), strict=True):
            written[row].append(word)
        going &= token[:, 0] != grammar.EOS_ID
        if not going.any():
            break
        ids, mask = token, torch.cat([mask, torch.ones_like(token)], 1)
        if going.float().mean() < 0.75:  # let finished rows go; a smaller batch is faster
            ids, mask, rows = ids[going], mask[going], rows[going]
            cache.batch_select_indices(going.nonzero()[:, 0])
            going = going[going]
        # rows that finished but stay in the batch write on; the excess is cut below
    return [tuple(_until_end(row)) for row in written]


def _until_end(tokens: list[int]) -> list[int]:
    """Tokens up to and including the first ``<eos>``."""
    if grammar.EOS_ID in tokens:
        return tokens[: tokens.index(grammar.EOS_ID) + 1]
    return tokens
