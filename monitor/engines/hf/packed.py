"""transformers: the packed rows of a step of continuous batching, put under their streams."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import RequestState

from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.engines.hf.halting import only_end
from midstream.engines.hf.requests import Request
from midstream.kernels.tables import Verdict
from midstream.monitor import Monitor
from midstream.streams import Event, StreamReport
from midstream.taps import Tap


class PackedStreams:
    """Judges the requests of each step, and gives their readers what may leave.

    All of it happens in the thread of the generation loop.

    Parameters
    ----------
    monitor : Monitor
    enforce : bool
    ends : list of int
        Ids that end a sequence; the first is the one that halted requests are given.
    """

    def __init__(self, monitor: Monitor, enforce: bool, ends: list[int]) -> None:
        self._monitor = monitor
        self._enforces = enforce
        self._ends = ends
        self._taps = len(monitor.bank.taps)
        self._thread: int | None = None
        self._reads = 0
        self._fed: list[tuple[Request, int]] = []
        self._on_host = monitor.device.type == "cpu"

    def enter_thread(self) -> None:
        """Take forward passes of the calling thread from now on, and of no other."""
        self._thread = threading.get_ident()

    def leave_thread(self) -> None:
        """Take none any more, and forget what was not folded."""
        self._thread = None
        self._monitor.discard()

    def observe(self, tap: Tap, hidden: Tensor) -> None:
        """Score the rows at one tap.

        Raises
        ------
        UnsupportedGenerationError
            For a forward pass that is none of the generation loop.
        """
        if threading.get_ident() != self._thread:
            raise UnsupportedGenerationError(
                "a forward pass outside of the generation loop has no streams to put its rows "
                "under; submit requests, or leave the attachment first"
            )
        self._reads += 1
        self._monitor.observe(tap, hidden)

    def judge(self, batch: Any, requests: Mapping[str, Request], scores: Tensor) -> Tensor:
        """Fold the rows that were observed; return the logits to sample from.

        Parameters
        ----------
        batch : ContinuousBatchingIOs
            Says whose tokens the rows are.
        requests : mapping of id to Request
        scores : float [n, vocabulary]
            One row per request of the batch; those in the middle of their prompts come last, and
            what is sampled from theirs is thrown away.

        Raises
        ------
        UnsupportedGenerationError
            When not every row was read once at each tap.
        """
        rows, new, sampling = _Rows(), _Rows(), []
        self._fed = []
        for future in batch.requests_in_batch:
            state = future.state
            request = requests[state.request_id]
            begin, end = state.position_offset - future.query_length, state.position_offset
            slot = self._admitted(request)
            if _take(request, state, end):
                new.add(slot, request.tokens[-1:], end - 1)
            rows.add(slot, request.tokens[begin:end], begin)
            if end >= request.prompt_tokens:
                self._fed.append((request, end - 1))
            if future.has_new_token:
                sampling.append(request)
        self._check_readings(len(rows))
        slot, token, position = rows.labels(self._monitor.device)
        fed = torch.stack([batch.input_ids[: len(rows)], batch.position_ids[: len(rows)]])
        # Looked at after the step, when the device has got there.
        self._mislabelled = (fed != torch.stack([token, position])).any()
        if len(new):
            streams, tokens, _ = new.labels(self._monitor.device)
            self._monitor.follow(streams, tokens.long())
        self._monitor.advance(slot, position)
        return self._end_rows(sampling, scores)

    def release(self) -> None:
        """Give the readers what the verdicts of this step allow, once they can be read.

        Raises
        ------
        UnsupportedGenerationError
            When the rows were of other tokens than those they were put under.
        """
        if bool(self._mislabelled):
            raise UnsupportedGenerationError(
                "the batch's tokens or positions are not those of its requests; nothing of this "
                "step was released"
            )
        table, slots = self._monitor.slots.host, [request.slot for request, _ in self._fed]
        names = ("unscored", "verdict", "risk", "cause")
        columns = [getattr(table, name)[slots].tolist() for name in names]
        for (request, position), *found in zip(self._fed, *columns, strict=True):
            if position > request.judged:  # and not recomputed
                request.judged = position
                self._release(request, position, *found)

    def retire(self, request: Request, reason: str, sampled: Sequence[int]) -> StreamReport | None:
        """Free the slot of a request, and let go what leaves with its end.

        Parameters
        ----------
        sampled : sequence of int
            All of its response, as far as the manager knows it.

        Returns
        -------
        StreamReport or None
            None where none of its tokens was fed.
        """
        if request.slot is None:
            return None
        end = next((i for i, token in enumerate(sampled) if token in self._ends), len(sampled))
        unfed = sampled[request.response_tokens : end]
        for position, token in enumerate(unfed, start=len(request.tokens)):
            request.session.push(position, token)
        report = self._monitor.retire(
            request.slot,
            reason,
            never_fed=len(unfed),
            enforced=self._enforces and reason != "error",
        )
        request.slot = None
        if reason != "error":  # or a token whose verdict was not read could pass as unscored
            request.release(request.session.finish(), None, report.risk)
        return report

    def _admitted(self, request: Request) -> int:
        if request.slot is None:
            prompt = request.tokens[: request.prompt_tokens]
            request.slot = self._monitor.admit(
                request.id, len(prompt), request.tier, prompt=prompt, prior=request.prior
            )
            request.tell(request.session.event("admitted", position=0))
        return request.slot

    def _check_readings(self, rows: int) -> None:
        reads, self._reads = self._reads, 0
        observed = self._monitor.observed_rows
        if reads != self._taps or observed != rows:
            raise UnsupportedGenerationError(
                f"{reads} readings at {self._taps} taps, of {observed} rows, for {rows} rows that "
                "were fed; tap layers that run once in a forward pass"
            )

    def _end_rows(self, sampling: list[Request], scores: Tensor) -> Tensor:
        """Leave those halted, and those at their limit, no token but the end of sequence."""
        slots, table = [request.slot for request in sampling], self._monitor.slots
        rows = np.zeros(len(scores), dtype=bool)
        rows[: len(slots)] = [request.response_tokens >= request.limit for request in sampling]
        if self._enforces and self._on_host:
            # A look at the table's own memory spares a pass over [rows, vocabulary].
            rows[: len(slots)] |= table.host.verdict[slots] == Verdict.HALT
        ended = torch.from_numpy(rows).to(scores.device)
        if self._enforces and not self._on_host:
            ended[: len(slots)] |= table.verdict[slots] == int(Verdict.HALT)
        elif not rows.any():
            return scores
        return only_end(ended, scores, self._ends[0])

    def _release(
        self,
        request: Request,
        position: int,
        unscored: int,
        verdict: int,
        risk: float,
        cause: int,
    ) -> None:
        allowed = Verdict(verdict) if self._enforces else Verdict.CONTINUE
        name = self._monitor.cause_name(cause)
        tokens, events = request.session.judge(
            position, allowed, risk, name, scored=unscored == request.unscored
        )
        request.unscored = unscored
        if request.closely:
            request.tell(self._scored(request, position, Verdict(verdict), risk, name))
        request.release(tokens, position, risk)
        for event in events:
            request.tell(event)

    def _scored(
        self, request: Request, position: int, verdict: Verdict, risk: float, cause: str | None
    ) -> Event:
        """What became of one token, with its logits as the trace has them."""
        kept, scores = self._monitor.slots.trace_logits, None
        if kept.shape[1]:
            logits = kept[request.slot, position % kept.shape[1]].tolist()
            pairs = zip(self._monitor.bank.names, logits, strict=True)
            scores = {name: z if math.isfinite(z) else None for name, z in pairs}
        facts = {"position": position, "risk": risk, "cause": cause, "scores": scores}
        return request.session.event("scored", verdict=verdict.name, **facts)


class _Rows:
    """Labels of packed rows."""

    def __init__(self) -> None:
        self._columns: tuple[list[int], list[int], list[int]] = ([], [], [])

    def __len__(self) -> int:
        return len(self._columns[0])

    def add(self, slot: int, tokens: Sequence[int], begin: int) -> None:
        slots, ids, positions = self._columns
        slots += [slot] * len(tokens)
        ids += tokens
        positions += range(begin, begin + len(tokens))

    def labels(self, device: torch.device) -> Tensor:
        """Slot, token and position of each row, int32 [3, rows]."""
        return torch.tensor(self._columns, dtype=torch.int32).to(device)


def _take(request: Request, state: RequestState, end: int) -> bool:
    """Take the token of the response that is fed for the first time, if there is one."""
    new = end - len(request.tokens)
    if new < 1:
        return False
    if new > 1:
        raise UnsupportedGenerationError(
            f"request {request.id!r}: {new} tokens of the response are fed at a time, 1 can have "
            "been sampled; this version of transformers cannot be watched"
        )
    # Preempted, a request comes back with what it had sampled behind its prompt.
    at = len(request.tokens) - len(state.initial_tokens)
    token = state.initial_tokens[at] if at < 0 else state.generated_tokens[at]
    request.session.push(len(request.tokens), token)
    request.tokens.append(token)
    return True
