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


class Watch:
    """Streams of one scheduler process: admits, labels, judges, halts, retires.

    Parameters
    ----------
    monitor : Monitor
    stop_id : int
        Token that halted rows are given; no other row is let write it.
    report : callable
        Takes the report of every stream that ended.
    """

    def __init__(
        self, monitor: Monitor, stop_id: int, *, report: Callable[[StreamReport], None]
    ) -> None:
        self.monitor = monitor
        self._stop_id = stop_id
        self._report = report
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
            return  # the engine idles
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
        slots = [_NO_SLOT if r is None else self._streams[r.rid].slot for r in self._requests]
        slot = torch.tensor(slots, dtype=torch.int32).repeat_interleave(torch.tensor(self._rows))
        position = batch.positions[: len(slot)].to(torch.int32)
        self.monitor.advance(slot.to(self.monitor.device, non_blocking=True), position)
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
        running = {request.rid: request for request in self._requests if request is not None}
        for rid, stream in list(self._streams.items()):
            request = stream.request()
            # Its name alone says nothing: another request may have it by now.
            if request is not None and (running.get(rid) is request or not request.finished()):
                continue
            del self._streams[rid]
            if stream.slot != _NO_SLOT:
                self._report(self._retire(stream, request))

    def _retire(self, stream: _Stream, request: Any) -> StreamReport:
        if request is None:  # aborted while it waited, its newest token never fed
            return self.monitor.retire(stream.slot, "abort", never_fed=1, enforced=False)
        reason = request.finished_reason.to_json()
        sampled = list(request.output_ids)
        halted = sampled[-1:] == [self._stop_id]
        if sampled and (halted or sampled[-1] == reason.get("matched")):
            sampled.pop()  # the end token
        fed = int(self.monitor.slots.position[stream.slot]) - stream.prompt_tokens
        never_fed = max(0, len(sampled) - max(0, fed))
        return self.monitor.retire(
            stream.slot, reason["type"], never_fed=never_fed, enforced=halted
        )


def _requests(batch: Any) -> list[Any]:
    """Return the request of each row of the batch; None where it does not carry our processor."""
    sampling = batch.sampling_info
    params = (sampling.custom_params or [])[: len(sampling)]
    requests = [(given or {}).get("__req__") for given in params]
    requests += [None] * (len(sampling) - len(requests))
    return [
        r if r is not None and r.custom_logit_processor == PROCESSOR else None for r in requests
    ]
