"""vLLM: the monitor inside one worker process, between the model runner and the sampler.

Every row of a step is labelled with its stream's slot and its position. Rows that were fed before
(recomputed after a preemption) have positions below the expected one, which the kernels ignore; a
prefix that came from the cache leaves a gap, which they count as unscored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.engines.vllm.runner import Batch, Runner, to_device
from midstream.engines.vllm.settings import TIER, UnsupportedEngineError
from midstream.kernels.tables import Verdict
from midstream.monitor import Monitor
from midstream.taps import Tap

_HALT = int(Verdict.HALT)
_HALT_BYTE = bytes([_HALT])

JUDGEMENTS = "midstream_judgements"
"""Attribute of a step's output under which judgements travel to the scheduler."""


Judgement = tuple[int, int, float, str | None, int]
"""Position, verdict, risk and cause of a stream's newest row, and how many rows had no score so
far; travels to the scheduler with the tokens. A plain tuple: sixteen are pickled and read again in
3 us, of a class of its own in 42."""


@dataclass
class _Stream:
    slot: int
    prompt_tokens: int
    next: int = 0
    """Position of the first row that was not fed yet."""


class Watch:
    """Streams of one worker: admits, labels, judges, retires.

    Parameters
    ----------
    monitor : Monitor
        With a slot for every request that can be running or preempted.
    runner : Runner
    end_token : int
        Id that halted rows are given.
    agree : callable, optional
        Makes this rank's verdicts those of the rank that decides; called before they are read.
    """

    def __init__(
        self,
        monitor: Monitor,
        runner: Runner,
        end_token: int,
        agree: Callable[[], None] | None = None,
    ) -> None:
        self.monitor = monitor
        self.end_token = end_token
        self._agree = agree
        self._runner = runner
        self._streams: dict[str, _Stream] = {}
        self._running = False
        self._batch: Batch | None = None
        self._slots: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self.retired = self.scored = self.unscored = self.halted = 0
        runner.attach(monitor.bank.taps, self._observe)

    @contextmanager
    def step(self, scheduler_output: Any) -> Iterator[None]:
        """Surround a forward pass: streams that ended leave, new ones come, rows are read.

        They are until :meth:`judge`: some runners hand them over only then.
        """
        # A set of strings has another order in each process; slots must be the same on all ranks.
        for request in sorted(scheduler_output.finished_req_ids):
            self._retire(request)
        for new in scheduler_output.scheduled_new_reqs:
            self._admit(new)
        self._batch = None
        self._running = scheduler_output.total_num_scheduled_tokens > 0
        try:
            yield
        except BaseException:
            self._running = False
            self.monitor.discard()
            raise

    def judge(self, scheduler_output: Any) -> Callable[[], dict[str, Judgement]]:
        """Fold the rows of the pass that just ran, before it is sampled.

        Returns
        -------
        callable
            Gives the judgement of every request of the step, once the device is done with it.

        Raises
        ------
        UnsupportedEngineError
            When the rows that were read are not those that were scheduled.
        """
        batch = self._batch = self._runner.batch(scheduler_output)
        self._running = False
        total, observed = int(batch.rows.sum()), self.monitor.observed_rows
        if not total <= observed:
            raise UnsupportedEngineError(
                f"{observed} rows were read of a step of {total}: the model did not run as a whole "
                "in this process, or its hooks were left out; start vLLM without what splits a step"
            )
        streams = [self._streams[request] for request in batch.requests]
        self._slots = np.array([stream.slot for stream in streams], dtype=np.int32)
        last = batch.first + batch.rows - 1
        self._follow(batch, streams, last)
        slot, position = self._label(batch, total, observed)
        device = self.monitor.device
        self.monitor.advance(to_device(slot, device), to_device(position, device))
        if self._agree is not None:
            self._agree()
        for stream, end in zip(streams, last.tolist(), strict=True):
            stream.next = max(stream.next, end + 1)
        return self._read_back(batch.requests, last)

    def force_end(self, logits: Tensor) -> Tensor:
        """Leave only the end of sequence possible on halted rows; the others stay as they are.

        Parameters
        ----------
        logits : [B, vocabulary]
            One row for each request of the step, in its order.
        """
        if self._batch is None:
            return logits  # a dummy run of the engine
        slots, device = self._slots, self.monitor.device
        if len(logits) != len(slots):
            raise UnsupportedEngineError(
                f"{len(logits)} rows of logits for {len(slots)} requests: rows cannot be told "
                "apart; start vLLM without what samples several rows of a request"
            )
        # On the CPU a look at the table's own memory saves a pass over [rows, vocabulary].
        on_host = device.type == "cpu"
        if on_host and _HALT_BYTE not in self.monitor.slots.host.verdict[slots].tobytes():
            return logits
        halted = self.monitor.slots.verdict[to_device(slots, device).long()] == _HALT
        logits.masked_fill_(halted[:, None], -torch.inf)
        logits[:, self.end_token].masked_fill_(halted, 0.0)
        return logits

    def sampled(self) -> None:
        """Note that the step is over: rows that are sampled from now on are none of its own."""
        self._batch = None

    def status(self) -> dict[str, Any]:
        """Return counts for operators and tests: slots in use, and what retired streams came to."""
        return {
            "slots": len(self.monitor.slots.position),
            "free": self.monitor.free_slots,
            "streams": len(self._streams),
            "retired": self.retired,
            "halted": self.halted,
            "scored": self.scored,
            "unscored": self.unscored,
        }

    def _observe(self, tap: Tap, hidden: Tensor) -> None:
        if self._running:  # and not profiling, warming up, or idling beside other ranks
            self.monitor.observe(tap, hidden)

    def _admit(self, new: Any) -> None:
        if new.req_id in self._streams:
            return  # resumed after a preemption: its rows are ignored up to where it was
        prompt = new.prompt_token_ids or ()
        tier = (new.sampling_params.extra_args or {}).get(TIER)
        slot = self.monitor.admit(new.req_id, len(prompt), tier, prompt=prompt)
        self._streams[new.req_id] = _Stream(slot, len(prompt))

    def _retire(self, request: str) -> None:
        stream = self._streams.pop(request, None)
        if stream is None:
            return  # ended before it was ever scheduled
        report = self.monitor.retire(stream.slot)
        self.retired += 1
        self.halted += report.verdict == "HALT"
        self.scored += report.scored
        self.unscored += report.unscored

    def _label(
        self, batch: Batch, total: int, observed: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return slot and position of every row that was observed."""
        if total == observed == len(batch.requests):
            return self._slots, batch.first  # one row each, as in most steps: 8 us less
        # Padding of the engine stands after the last row.
        slot = np.full(observed, -1, dtype=np.int32)
        slot[:total] = np.repeat(self._slots, batch.rows)
        position = np.zeros(observed, dtype=np.int32)
        starts = np.cumsum(batch.rows) - batch.rows
        position[:total] = np.arange(total, dtype=np.int32) + np.repeat(
            batch.first - starts, batch.rows
        )
        return slot, position

    def _follow(self, batch: Batch, streams: list[_Stream], last: NDArray[np.int32]) -> None:
        """Tell the segments which response token each stream was fed for the first time."""
        if self.monitor.segments is None:
            return
        new = [
            stream.slot if end >= max(stream.prompt_tokens, stream.next) else -1
            for stream, end in zip(streams, last.tolist(), strict=True)
        ]
        device = self.monitor.device
        ends = to_device(np.cumsum(batch.rows, dtype=np.int64) - 1, device)
        self.monitor.follow(
            to_device(np.array(new, dtype=np.int32), device), batch.fed[ends].long()
        )

    def _read_back(
        self, requests: list[str], last: NDArray[np.int32]
    ) -> Callable[[], dict[str, Judgement]]:
        table, device, done = self.monitor.slots, self.monitor.device, None
        fields: list[Any]
        if device.type == "cpu":  # the table's own memory: NumPy indexes it in a tenth of the time
            host = table.host
            fields = [
                field[self._slots] for field in (host.verdict, host.risk, host.cause, host.unscored)
            ]
        else:
            index = to_device(self._slots, device).long()
            fields = [
                field[index].to("cpu", non_blocking=True)
                for field in (table.verdict, table.risk, table.cause, table.unscored)
            ]
            done = torch.cuda.Event()
            done.record()

        def wait() -> dict[str, Judgement]:
            if done is not None:
                done.synchronize()
            verdict, risk, cause, unscored = (field.tolist() for field in fields)
            return {
                request: (position, v, r, self.monitor.cause_name(c), u)
                for request, position, v, r, c, u in zip(
                    requests, last.tolist(), verdict, risk, cause, unscored, strict=True
                )
            }

        return wait
