"""transformers: watch ``model.generate``, halt rows in the same step (design section 4.7).

The taps read the residual stream during the forward pass. The logits processor, which generate
calls before it samples, folds what they read and forces the end-of-sequence id on halted rows:
their next token is never sampled, and the other rows keep their logits bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

from midstream.bundle import Fingerprint
from midstream.engines.hf.checks import (
    UnsupportedGenerationError,
    check_generation,
    check_mask,
    check_supported,
    check_unwatched,
    end_tokens,
    set_option,
)
from midstream.engines.hf.halting import HaltingProcessor
from midstream.kernels.tables import Verdict
from midstream.monitor import Monitor
from midstream.streams import StreamReport, released
from midstream.taps import Tap, attach_taps

_POSITIONAL = list(inspect.signature(GenerationMixin.generate).parameters)[1:-1]

_HALT = int(Verdict.HALT)  # an enum member costs torch a conversion in every step
_HALT_BYTE = bytes([_HALT])


class Attachment:
    """A monitor on one transformers model, for callers of ``model.generate``.

    Use it as a context manager; each ``generate`` inside admits one stream per row and leaves its
    reports in :attr:`reports`::

        with monitor.attach(model, tokenizer) as m:
            sequences = model.generate(**inputs, logits_processor=[m.halting()])
        texts = tokenizer.batch_decode(m.released(sequences))

    ``generate`` returns every sampled token, the one that was flagged included; :meth:`released`
    gives those that may leave. The last token of a row that ends by length was never fed, so it has
    no score.

    Parameters
    ----------
    monitor : Monitor
    model : transformers.PreTrainedModel
        Must be the model the bundle was made for.
    tokenizer : optional
        When given it is checked against the bundle as well.
    tier : str, optional
        Strictness of the streams.
    enforce : bool
        False only observes: nothing is halted, the reports say what would have been.
    prior : sequence of float, optional
        Belief that every stream starts from, as for :meth:`midstream.monitor.Monitor.admit`.

    Raises
    ------
    WrongModelError
        When the bundle was made for another model.
    """

    def __init__(
        self,
        monitor: Monitor,
        model: Any,
        tokenizer: Any = None,
        *,
        tier: str | None = None,
        enforce: bool = True,
        prior: Sequence[float] | None = None,
    ) -> None:
        monitor.bundle.fingerprint.check(Fingerprint.of(model, tokenizer))
        check_supported(model)
        monitor.recognise_segments(tokenizer)
        self.monitor = monitor
        self.model = model
        self.enforces = enforce
        self.reports: list[StreamReport] = []
        self._tier = monitor.policy.tier_for(tier)
        self._prior = prior
        self._attached = ExitStack()
        self._generate: Callable[..., Any] = model.generate
        self._taps = monitor.bank.taps
        self._slots: list[int] = []
        self._streams = self._passes = self._reads = self._steps = 0

    def __enter__(self) -> Self:
        model = self.model
        check_unwatched(model)
        with ExitStack() as stack:
            stack.enter_context(self.monitor.exclusive())
            stack.enter_context(attach_taps(model, self._taps, self._observe))
            self._generate = model.generate
            model.generate = self._watched_generate
            stack.callback(delattr, model, "generate")  # the class's own method shows again
            self._attached = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._attached.close()

    def halting(self) -> HaltingProcessor:
        """Return the logits processor that every ``generate`` here must be given."""
        return HaltingProcessor(self)

    def halted(self) -> Tensor:
        """Which rows are halted, bool [B] on the device; all false when only observing."""
        if not self.enforces:
            return torch.zeros_like(self._index, dtype=torch.bool)
        return self.monitor.slots.verdict[self._index] == _HALT

    def may_have_halted(self) -> bool:
        """Whether to look at :meth:`halted`; false only where the host can see that no row is.

        On the CPU a look at the table's own memory costs 1 us, and saves a pass over [rows,
        vocabulary]; a GPU would have to be waited for.
        """
        if not self.enforces:
            return False
        verdicts = self._host_verdicts
        return verdicts is None or _HALT_BYTE in verdicts[self._host_index].tobytes()

    def step(self, input_ids: Tensor) -> None:
        """Fold what the taps read in the forward pass over ``input_ids`` [B, tokens].

        Raises
        ------
        UnsupportedGenerationError
            When there was no such pass, or more than one, or not over these rows.
        """
        self._steps += 1
        self._check_passes(self._passes)
        self._passes = self._reads = 0
        rows, tokens = input_ids.shape
        observed = self.monitor.observed_rows
        if self._steps > 1:
            self._retire_ended(input_ids[:, -1])
        if self._steps > 1:
            self.monitor.follow(self._live, input_ids[:, -1])
        if observed == rows and self._steps > 1:
            slot, position = self._live, self._next
        elif observed == rows * tokens:
            slot, position = self._whole(tokens)
        else:
            raise UnsupportedGenerationError(
                f"a forward pass over {observed} rows for {rows} streams of {tokens} tokens; pass "
                "whole prompts and no cache that was filled before"
            )
        self.monitor.advance(slot, position)
        self._count += 1  # the next position of each row

    @property
    def end_token(self) -> int:
        """Id that halted rows are given."""
        return self._ends[0]

    @property
    def slots(self) -> list[int]:
        """Slot of each row of the running ``generate``."""
        return self._slots

    def released(self, sequences: Tensor) -> list[Tensor]:
        """Response ids of each row that may leave, by the policy's ``hold_back``.

        Parameters
        ----------
        sequences : int64 [B, tokens]
            What the last ``generate`` returned.

        """
        return [
            sequences.new_tensor(released(report, response, self.monitor.policy))
            for report, response in zip(self.reports, self.responses(sequences), strict=True)
        ]

    def responses(self, sequences: Tensor) -> list[list[int]]:
        """Sampled ids of each row, up to the first that ends it."""
        rows: list[list[int]] = sequences[:, self._prompt_mask.shape[1] :].tolist()
        return [
            row[: next((i for i, token in enumerate(row) if token in self._ends), len(row))]
            for row in rows
        ]

    def _watched_generate(self, *args: Any, **kwargs: Any) -> Any:
        if self._slots:
            raise UnsupportedGenerationError("generate is running already under this attachment")
        kwargs |= dict(zip(_POSITIONAL, args, strict=False))
        inputs: Any = kwargs.get("inputs")
        if inputs is None:
            inputs = kwargs.get("input_ids")
        config = check_generation(self.model, inputs, kwargs)
        processors = kwargs.get("logits_processor") or []
        if getattr(next(reversed(processors), None), "attachment", None) is not self:
            if self.enforces:
                raise UnsupportedGenerationError(
                    "without this attachment's logits processor as the last, nothing would be "
                    "halted; pass logits_processor=[m.halting()], or attach with enforce=False to "
                    "observe only"
                )
            # One that stands elsewhere observes as well, and a second step per pass is refused.
            others = [p for p in processors if getattr(p, "attachment", None) is not self]
            kwargs["logits_processor"] = LogitsProcessorList([*others, self.halting()])
        mask = kwargs.get("attention_mask")
        if mask is None:
            # as generate infers it: pads are padding unless they could end a sequence
            pad = config.pad_token_id
            padded = pad is not None and pad not in end_tokens(config)
            mask = inputs != pad if padded else inputs.new_ones(inputs.shape)
        # Compiled decoding would keep the hooks' first answers; the monitor must run in every step.
        set_option(kwargs, "disable_compile", True)
        try:
            times = config.num_return_sequences or 1
            self._begin(
                inputs.repeat_interleave(times, 0), mask.repeat_interleave(times, 0), config
            )
            output = self._generate(**kwargs)
            self._end(output if isinstance(output, Tensor) else output.sequences, config)
            return output
        except BaseException:
            self.monitor.discard()
            self._retire(["error"] * len(self._slots))
            raise

    def _begin(self, prompts: Tensor, mask: Tensor, config: GenerationConfig) -> None:
        """Admit one stream per row of ``prompts`` [B, T], of which ``mask`` [B, T] is true."""
        check_mask(mask)
        rows, lengths = len(mask), mask.sum(dim=1).tolist()
        if rows > self.monitor.free_slots:
            raise UnsupportedGenerationError(
                f"{rows} rows for {self.monitor.free_slots} free slots; build the monitor with "
                "more slots, or generate smaller batches"
            )
        ids = prompts.tolist() if self.monitor.segments else [[]] * rows
        for length, row in zip(lengths, ids, strict=True):
            name, prompt = f"stream-{self._streams}", row[-length:]
            self._slots.append(
                self.monitor.admit(name, length, self._tier, prompt=prompt, prior=self._prior)
            )
            self._streams += 1
        self._ends = end_tokens(config)
        on_host = self.monitor.device.type == "cpu"
        self._host_verdicts = self.monitor.slots.host.verdict if on_host else None
        self._host_index = np.array(self._slots)
        self._index = torch.tensor(self._slots, device=self.monitor.device)
        self._live = self._index.to(torch.int32)  # -1 once the row has ended
        self._next = torch.zeros_like(self._live)  # position of the token to be fed
        self._count: Any = self._next.numpy() if on_host else self._next  # the same memory
        self._prompt_mask = mask.to(self.monitor.device).bool()
        self._passes = self._reads = self._steps = 0

    def _observe(self, tap: Tap, hidden: Tensor) -> None:
        if not self._slots:
            raise UnsupportedGenerationError(
                "a forward pass outside of generate has no streams to put its rows under; use "
                "midstream.engines.hf.score for given texts"
            )
        if tap is self._taps[0]:
            self._passes += 1
            if self._passes > 1:
                self._check_passes(self._passes)
        self._reads += 1
        if self._reads > len(self._taps):
            raise UnsupportedGenerationError(
                f"{tap} was read more than once in 1 forward pass, as where layers are shared; tap "
                "a layer that runs once"
            )
        self.monitor.observe(tap, hidden)

    def _retire_ended(self, fed_last: Tensor) -> None:
        """Turn rows that were fed an end token, ``fed_last`` [B], into padding."""
        # On the CPU most steps can see that no row has ended.
        if fed_last.device.type == "cpu" and set(self._ends).isdisjoint(fed_last.tolist()):
            return
        for token in self._ends:
            self._live.masked_fill_(fed_last == token, -1)

    def _whole(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Rows of the prompt; or, without a cache, of everything so far once more.

        What was folded before is ignored then.
        """
        fed = tokens - self._prompt_mask.shape[1]
        real = torch.nn.functional.pad(self._prompt_mask, (0, fed), value=True)
        position = (real.cumsum(dim=1) - 1).to(torch.int32)
        self._next.copy_(position[:, -1])
        return torch.where(real, self._live[:, None], -1).flatten(), position.flatten()

    def _check_passes(self, passes: int) -> None:
        if passes != 1:
            raise UnsupportedGenerationError(
                f"{passes} forward passes of the attached model in 1 step; attach to the model "
                "whose layers generate runs, and let nothing else call it"
            )

    def _end(self, sequences: Tensor, config: GenerationConfig) -> None:
        prompt = self._prompt_mask.shape[1]
        width = sequences.shape[1] - prompt
        if self._steps != width:
            raise UnsupportedGenerationError(
                f"{self._steps} steps were judged and {width} tokens were sampled; generate must "
                "call its logits processors before each sample"
            )
        limit = config.max_new_tokens or (config.max_length or 0) - prompt
        sampled = [len(response) for response in self.responses(sequences)]
        start = self.monitor.slots.start[self._index].tolist()
        folded = self.monitor.slots.position[self._index].tolist()
        self._retire(
            # shorter than it might be: by an end token, or by a stopping criterion
            ["stop" if n < max(limit, width) else "length" for n in sampled],
            [s + n - f for s, n, f in zip(start, sampled, folded, strict=True)],
        )

    def _retire(self, reasons: list[str], never_fed: list[int] | None = None) -> None:
        self.reports = [
            self.monitor.retire(
                slot, reason, never_fed=unfed, enforced=self.enforces and reason != "error"
            )
            for slot, reason, unfed in zip(
                self._slots, reasons, never_fed or [0] * len(reasons), strict=True
            )
        ]
        self._slots = []
