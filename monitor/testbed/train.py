"""Training the testbed's language model: a tiny Llama, from scratch, on grammar text.

One pass over fresh dialogues with plain next-token loss. Nothing here knows about labels,
states or the oracle: whatever the monitor later finds in the residual stream is there
because it helps to predict the next word.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from . import grammar
from .language import Dialogue, sample_dialogue
from .tokenizer import build_tokenizer

Progress = Callable[[int, int, float], None]

#: Longest dialogue trained on; longer ones are cut (they are under 1 %).
MAX_TOKENS = 256
#: The seed of all training dialogues; `sample_dialogues` with this seed is not held out.
TRAINING_SEED = 20_000
#: Weight of prompt tokens in the loss: they are noise to predict, and cost capacity.
PROMPT_WEIGHT = 0.05
#: Weight of the word after "the", where the colours come, and of the word after a colour: all
#: that is hard to predict is there. It must depend on what comes before and never on the
#: target itself, or the model would learn wrong frequencies.
HARD_WEIGHT = 3.0

_COLOUR_IDS = frozenset(grammar.TOKEN_ID[colour] for colour in grammar.COLOURS)
_THE = grammar.TOKEN_ID["the"]


def model_config() -> LlamaConfig:
    """Sizes of the model: about 0.9 million weights."""
    ids = grammar.TOKEN_ID
    return LlamaConfig(
        vocab_size=len(grammar.VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        # 1 / sqrt(128). With the default 0.02 attention starts out uniform and the model does not
        # learn within 4000 steps to compare a colour with the sealed one; so it does in 150.
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=ids[grammar.BOS],
        eos_token_id=ids[grammar.EOS],
        pad_token_id=ids[grammar.PAD],
    )


def _talk_of_seal(dialogue: Dialogue) -> float:
    """Share of the colours in a response that are the sealed one."""
    sealed = grammar.TOKEN_ID[dialogue.prompt.sealed]
    colours = [token for token in dialogue.response if token in _COLOUR_IDS]
    return sum(token == sealed for token in colours) / (len(colours) + 1)


def batches(
    seed: int, tokens_per_batch: int, lessons: int = 0, name_weight: float = HARD_WEIGHT
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of fresh dialogues of like length.

    Parameters
    ----------
    lessons : int
        The first so many batches come from the dialogues that talk most of the sealed jar.
        To look the colour up in the prompt is the hard part; in ordinary text it pays so
        seldom at first that the model stays for long on a plateau.
    name_weight : float
        Loss weight of the word after a colour.

    Yields
    ------
    ids : Tensor [B, T] int64
        Prompt and response, padded on the right.
    weight : Tensor [B, T] float32
        Loss weight of each token *as a target*; zero on padding and on the first token.
    """
    random = Random(f"batches/{seed}")
    pad = grammar.TOKEN_ID[grammar.PAD]
    index, given, pool_size = 0, 0, 2048
    while True:
        dialogues = [sample_dialogue(seed, index + offset) for offset in range(pool_size)]
        index += pool_size
        if given < lessons:
            dialogues = sorted(dialogues, key=_talk_of_seal)[-pool_size // 4 :]
        pool = []
        for dialogue in dialogues:
            prompt = dialogue.prompt.ids
            pool.append(((*prompt, *dialogue.response)[:MAX_TOKENS], len(prompt)))
        pool.sort(key=lambda row: len(row[0]))
        groups, group = [], list[tuple[tuple[int, ...], int]]()
        for row in pool:
            if group and len(row[0]) * (len(group) + 1) > tokens_per_batch:
                groups.append(group)
                group = []
            group.append(row)
        groups.append(group)
        random.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), longest), pad)
            weight = torch.zeros(len(group), longest)
            for place, (tokens, prompt_length) in enumerate(group):
                ids[place, : len(tokens)] = torch.tensor(tokens)
                weight[place, 1:prompt_length] = PROMPT_WEIGHT
                before = tokens[prompt_length - 1 : -1]
                weight[place, prompt_length : len(tokens)] = torch.tensor(
                    [
                        name_weight if token in _COLOUR_IDS else HARD_WEIGHT if token == _THE else 1
                        for token in before
                    ]
                )
            given += 1
            yield ids, weight


class Cycle(NamedTuple):
    """One run of the optimiser from warm-up to the end of its cosine.

    Attributes
    ----------
    steps : float
        Share of all steps.
    learning_rate : float
        Its peak.
    lessons : float
        Share of the cycle's steps that are lessons, see `batches`.
    name_weight : float
        Loss weight of the word after a colour.
    """

    steps: float
    learning_rate: float
    lessons: float
    name_weight: float


#: The first cycle learns the language. The others sharpen what a vessel is called: rare words
#: decide there whether a monitor can see a violation at the very word. Loss of the name after a
#: colour, in nats, after each: 0.06, 0.0008, 0.0001.
CYCLES: Final = (
    Cycle(0.40, 2e-3, lessons=0.2, name_weight=HARD_WEIGHT),
    Cycle(0.33, 1.5e-3, lessons=0.0, name_weight=10.0),
    Cycle(0.27, 1e-3, lessons=0.0, name_weight=20.0),
)


def build_model(
    out_dir: str | Path,
    *,
    seed: int = 0,
    steps: int = 7500,
    tokens_per_batch: int = 2048,
    progress: Progress | None = None,
) -> Path:
    """Train the model and save it with its tokenizer, ready for `from_pretrained`.

    Parameters
    ----------
    out_dir : path
        Folder to write; it is replaced only when everything has been written.
    seed : int
        Seeds the weights; together with `steps` it fixes the result on one machine.
    progress : callable, optional
        Called as ``progress(step, steps, loss)`` after every step.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    model.train()
    ends = [round(share * steps) for share in accumulate(cycle.steps for cycle in CYCLES)]
    for number, (cycle, begin, end) in enumerate(zip(CYCLES, [0, *ends], ends, strict=False)):
        losses = _train(model, cycle, end - begin, TRAINING_SEED + seed + number, tokens_per_batch)
        for step, loss in enumerate(losses, start=begin + 1):
            if progress is not None:
                progress(step, steps, loss)
    model.eval()
    return save_model(model, out_dir)


def _train(
    model: LlamaForCausalLM, cycle: Cycle, steps: int, seed: int, tokens_per_batch: int
) -> Iterator[float]:
    """Take the steps of one cycle; yield the loss of each."""
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=cycle.learning_rate,
        betas=(0.9, 0.98),
    )
    warmup = max(1, min(200, steps // 10))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    stream = batches(
        seed, tokens_per_batch, lessons=int(cycle.lessons * steps), name_weight=cycle.name_weight
    )
    for _ in range(steps):
        ids, weight = next(stream)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        # One scale for all batches: a mean over each would favour the words of short responses.
        loss = (loss * weight[:, 1:].flatten()).sum() / tokens_per_batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def save_model(model: LlamaForCausalLM, out_dir: str | Path) -> Path:
    """Write model, tokenizer and sampling defaults; a crash leaves the old folder whole."""
    target = Path(out_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    ids = grammar.TOKEN_ID
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=192,
        bos_token_id=ids[grammar.BOS],
        eos_token_id=ids[grammar.EOS],
        pad_token_id=ids[grammar.PAD],
    )
    with tempfile.TemporaryDirectory(dir=target.parent) as holder:
        fresh = Path(holder) / "fresh"
        model.save_pretrained(fresh)
        build_tokenizer().save_pretrained(fresh)
        if target.exists():
            os.replace(target, Path(holder) / "old")
        os.replace(fresh, target)
    return target
