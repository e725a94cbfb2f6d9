"""SGLang: the monitor inside one scheduler process, between the decoder stack and the sampler.

A pass is labelled from its ``ForwardBatch``: rows stand request after request, one each when
decoding, ``extend_seq_lens`` each otherwise. The request behind a row is the ``__req__`` that
SGLang lays beside the parameters of its custom logit processor. Rows that are fed again (after a
retraction) have positions below the expected one, which the kernels ignore; a prefix out of the
radix cache leaves a gap, which they count.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from midstream.engines.sglang.arguments import UnsupportedEngineError
from midstream.engines.sglang.requests import PROCESSOR, TIER
from midstream.kernels.tables import Verdict
from midstream.monitor import Monitor, NoFreeSlotError
from midstream.policy import PolicyError
from midstream.streams import StreamReport
from midstream.taps import Tap

_log = logging.getLogger(__name__)
_NO_SLOT = -1


@dataclass
class _Stream:
    request: weakref.ref[Any]
    slot: int
    """-1 for a request that was turned away."""
    prompt_tokens: int
    next: int = 0
    """Position of the first row that was not fed yet."""


class Watch:
    """Streams of one scheduler process: admits, labels, judges, halts, retires.

    Parameters
    ----------
    monitor : Monitor
    stop_id : int
        Token that halted rows are given; no other row is let write it.
    report : callable
        Takes the report of every stream that ended.
    agree : callable, optional
        Called after every `Monitor.advance`, where several ranks sample the same rows.
    """

    def __init__(
        self,
        monitor: Monitor,
        stop_id: int,
        *,
        report: Callable[[StreamReport], None],
        agree: Callable[[], None] | None = None,
    ) -> None:
        self.monitor = monitor
        self._stop_id = stop_id
        self._report = report
        self._agree = agree
        self._streams: dict[str, _Stream] = {}
        self._batch: Any = None  # of the pass that is running
        self._rows: list[int] = []
        self._requests: list[Any] = []
        self._seen: set[Tap] = set()
        self._judged: set[str] = set()  # requests of the last pass that were not sampled yet

    def begin(self, batch: Any) -> None:
        """Label the rows of a forward pass; ``batch`` is its ``ForwardBatch``."""
        mode = batch.forward_mode.name
        if mode not in ("EXTEND", "MIXED", "DECODE", "IDLE"):
            raise UnsupportedEngineError(
                f"a forward pass in mode {mode}: its rows cannot be put under streams; start the "
                "server without what runs such passes"
            )
        if self.monitor.observed_rows:
            self.monitor.discard()  # the pass before this one failed
        self._judged.clear()
        self._requests = [] if mode == "IDLE" else _requests(batch)
        self._rows = [1] * len(self._requests) if mode == "DECODE" else batch.extend_seq_lens_cpu
        self._batch, self._seen = batch, set()
        self._retire_ended()
        for request in self._requests:
            if request is not None and request.rid not in self._streams:
                self._admit(request)

    def observe(self, tap: Tap, hidden: Tensor, residual: Tensor | None) -> None:
        """Score the rows at one tap; with a ``residual`` the stream is the sum of the two."""
        if self._batch is None or not self._requests:
            return  # the engine idles beside other ranks
        if getattr(hidden, "_sglang_needs_allreduce_fusion", False):
            raise UnsupportedEngineError(
                f"{tap} would be read before it is summed over the ranks; start the server "
                "without all-reduce fusion"
            )
        rows = sum(self._rows)
        if len(hidden) < rows or tap in self._seen:
            raise UnsupportedEngineError(
                f"{tap} was read {'twice' if tap in self._seen else f'in {len(hidden)} rows'} in a "
                f"pass of {rows} rows; start the server without what splits or repeats a pass"
            )
        self._seen.add(tap)
        hidden = hidden[:rows]  # padding stands at the end
        self.monitor.observe(tap, hidden if residual is None else hidden + residual[:rows])

    def end(self) -> None:
        """Judge the pass: every row of every tap is there, and nothing was sampled yet."""
        batch, self._batch = self._batch, None
        if batch is None or not self._requests:
            return
        missing = [str(tap) for tap in self.monitor.bank.taps if tap not in self._seen]
        if missing:
            raise UnsupportedEngineError(
                f"no rows were read at {', '.join(missing)}: no module has the name that the hook "
                "was given, or the layers ran without their hooks; serve a model whose layers are "
                "model.layers.N, called as modules"
            )
        device, streams = self.monitor.device, [self._stream(r) for r in self._requests]
        slots = torch.tensor([s.slot if s else _NO_SLOT for s in streams], dtype=torch.int32)
        rows = torch.tensor(self._rows)
        slot = slots.repeat_interleave(rows).to(device, non_blocking=True)
        position = batch.positions[: len(slot)].to(torch.int32)
        self._follow(batch, streams, rows)
        self.monitor.advance(slot, position)
        if self._agree is not None:
            self._agree()
        self._judged = {r.rid for r in self._requests if r is not None}

    def force_end(self, logits: Tensor, requests: Sequence[Any]) -> Tensor:
        """Leave only the stop id possible on halted rows; [rows, vocabulary], a request each.

        Raises
        ------
        UnsupportedEngineError
            When the pass these logits come from was not read, as where a CUDA graph replayed it.
        """
        unread = [r.rid for r in requests if r.rid not in self._judged]
        if unread:
            raise UnsupportedEngineError(
                f"requests {', '.join(unread)} are sampled and their forward pass was not read: it "
                "ran without hooks, as CUDA graphs do; start the server with --disable-cuda-graph, "
                "and whatever else your version needs to run all passes eagerly"
            )
        self._judged -= {r.rid for r in requests}
        slots = [self._streams[r.rid].slot for r in requests]
        index = torch.tensor(slots).to(logits.device, non_blocking=True)
        halted = (self.monitor.slots.verdict[index] == int(Verdict.HALT)) | (index == _NO_SLOT)
        stop = torch.full_like(logits[:1], -torch.inf)
        stop[:, self._stop_id] = 0.0
        logits[:, self._stop_id] = -torch.inf
        return torch.where(halted[:, None], stop, logits)

    def turn_away(self, logits: Tensor) -> None:
        """Let requests that came without the processor write nothing; [requests, vocabulary]."""
        rows = [i for i, request in enumerate(self._requests) if request is None]
        if rows:
            _log.error("%d requests that no monitor could watch are ended", len(rows))
            logits[rows] = -torch.inf
            logits[rows, self._stop_id] = 0.0

    def _stream(self, request: Any) -> _Stream | None:
        return None if request is None else self._streams[request.rid]

    def _admit(self, request: Any) -> None:
        prompt, params = request.origin_input_ids, request.sampling_params
        slot = _NO_SLOT
        if self._stop_id not in (params.stop_token_ids or ()) or params.ignore_eos:
            _log.error(
                "request %s is turned away: a halt would not end it; prepare requests with "
                "midstream.engines.sglang.watched",
                request.rid,
            )
        else:
            try:
                tier = (params.custom_params or {}).get(TIER)
                slot = self.monitor.admit(request.rid, len(prompt), tier, prompt=prompt)
            except (NoFreeSlotError, PolicyError) as error:  # one request, not the server
                _log.error("request %s is turned away: %s", request.rid, error)
        self._streams[request.rid] = _Stream(weakref.ref(request), slot, len(prompt))

    def _retire_ended(self) -> None:
        running = {request.rid for request in self._requests if request is not None}
        for rid, stream in list(self._streams.items()):
            request = stream.request()
            if rid in running or (request is not None and not request.finished()):
                continue
            del self._streams[rid]
            if stream.slot == _NO_SLOT:
                continue
            if request is None:  # aborted while it waited, its newest token never fed
                report = self.monitor.retire(stream.slot, "abort", never_fed=1, enforced=False)
            else:
                reason = request.finished_reason.to_json()
                sampled = list(request.output_ids)
                halted = sampled[-1:] == [self._stop_id]
                if sampled and (halted or sampled[-1] == reason.get("matched")):
                    sampled.pop()  # the end token
                fed = int(self.monitor.slots.position[stream.slot]) - stream.prompt_tokens
                report = self.monitor.retire(
                    stream.slot,
                    reason["type"],
                    never_fed=max(0, len(sampled) - max(0, fed)),
                    enforced=halted,
                )
            self._report(report)

    def _follow(self, batch: Any, streams: list[_Stream | None], rows: Tensor) -> None:
        """Tell the segments which response token each stream was fed for the first time."""
        prefixes = batch.extend_prefix_lens_cpu
        new = []
        for i, (stream, count) in enumerate(zip(streams, rows.tolist(), strict=True)):
            if stream is None:
                new.append(_NO_SLOT)
                continue
            # Decoding has no prefix lengths on the host.
            last = stream.next if prefixes is None else prefixes[i] + count - 1
            is_new = last >= max(stream.prompt_tokens, stream.next)
            new.append(stream.slot if is_new else _NO_SLOT)
            stream.next = max(stream.next, last + 1)
        if self.monitor.segments is not None:
            device = self.monitor.device
            ends = (rows.cumsum(0) - 1).to(device, non_blocking=True)
            slots = torch.tensor(new, dtype=torch.int32).to(device, non_blocking=True)
            self.monitor.follow(slots, batch.input_ids[ends].long())


def _requests(batch: Any) -> list[Any]:
    """Return the request of each row of the batch; None where it does not carry our processor."""
    sampling = batch.sampling_info
    params = (sampling.custom_params or [])[: len(sampling)]
    requests = [(given or {}).get("__req__") for given in params]
    requests += [None] * (len(sampling) - len(requests))
    return [
        r if r is not None and r.custom_logit_processor == PROCESSOR else None for r in requests
    ]
