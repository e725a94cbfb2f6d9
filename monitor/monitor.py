"""The one object an engine talks to: bank + chain + policy + slot table.

An engine adapter calls, in this order: :meth:`Monitor.admit` once per stream; in every forward pass
:meth:`Monitor.observe` at each tapped layer and then :meth:`Monitor.advance`;
:meth:`Monitor.retire` when the stream ends. ``observe`` and ``advance`` launch one kernel each,
read nothing back, and allocate nothing once the row buffer is large enough
(:meth:`Monitor.reserve`); the verdicts are in ``monitor.slots.verdict``, on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from midstream.bundle import Bundle
from midstream.kernels import ops
from midstream.kernels.tables import (
    MAX_POSITION,
    NO_CAUSE,
    UNSCORED_CAUSE,
    SlotTable,
    Verdict,
)
from midstream.policy import ANSWER, TierName
from midstream.segments import SegmentReader, SegmentTable
from midstream.streams import SegmentReport, Session, StreamReport, Trace
from midstream.taps import Tap

if TYPE_CHECKING:
    from midstream.engines.hf import Attachment
    from midstream.engines.hf.batching import BatchingAttachment

DEFAULT_TRACE = 1024
"""Tokens of per-token record kept per slot when nothing else is asked for."""


class NoFreeSlotError(RuntimeError):
    """All slots are taken: the stream must wait, or the monitor needs more slots."""


class MonitorInUseError(RuntimeError):
    """Two engines want one monitor at the same time."""


class RowError(ValueError):
    """Rows that do not fit: of an unknown tap, or more or fewer than at the taps before."""


@dataclass(frozen=True)
class _Admitted:
    stream: str
    tier: TierName
    prompt_tokens: int


class Monitor:
    """Watches up to ``slots`` streams at the same time.

    Parameters
    ----------
    bundle : Bundle
        Probes, chain, policy, and the model they were made for.
    slots : int
        Streams that can be watched at once. Memory is linear in it: ``slots *
        SlotTable.bytes_per_slot(...)``.
    rows : int
        Rows of one forward pass that fit without growing the logits buffer.
    trace : int
        Tokens of per-token record kept per slot for the report; 0 keeps none.
    device : torch.device or str
        Where the residual streams are.
    backend : str, optional
        A name of :func:`midstream.kernels.ops.capabilities`; chosen for the device when not given.
    """

    @torch.inference_mode(False)  # tensors made under it could not be written to outside of it
    def __init__(
        self,
        bundle: Bundle,
        *,
        slots: int = 64,
        rows: int = 256,
        trace: int = DEFAULT_TRACE,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        self.bundle = bundle
        self.bank, self.chain, self.policy = bundle.bank, bundle.chain, bundle.policy
        self.device = torch.device(device)
        self.backend = ops.Backend(self.device, backend)
        self.slots = SlotTable.allocate(
            slots,
            len(self.bank.names),
            self.chain.states,
            window=self.bank.window,
            trace=trace,
            device=self.device,
        )
        self._chain = self.chain.table(self.device)
        bank = self.bank.to(self.device)
        self._terms = bank.terms
        self._heads = torch.tensor([columns[0] for columns in bank.terms], device=self.device)
        self._score = {
            t: self.backend.bind_score(
                bank.weight(t), bank.bias(t), rms_norm=bank.norm(t) == "rms", eps=bank.eps(t)
            )
            for t in bank.taps
        }
        self._advance = self.backend.bind_advance(
            self.slots,
            bank.evidence_table(self.device),
            self._chain,
            self.policy.table(self.chain, self.device),
        )
        self.segments = SegmentTable(self.policy, self.slots) if self.policy.segments else None
        self._free = list(range(slots - 1, -1, -1))
        self._admitted: dict[int, _Admitted] = {}
        self._user = threading.Lock()
        self.reserve(rows)

    @classmethod
    def from_bundle(cls, path: str | Path, **options: Any) -> Monitor:
        """Build the monitor of a bundle folder (see `Bundle.load`); ``options`` as above."""
        return cls(Bundle.load(path), **options)

    @property
    def free_slots(self) -> int:
        """Streams that can still be admitted."""
        return len(self._free)

    @torch.inference_mode(False)
    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows per pass; allocates, so not while a graph is captured."""
        self._logits = torch.full((rows, len(self.bank.probes)), torch.nan, device=self.device)
        self._summed = torch.empty((rows, len(self.bank.heads)), device=self.device)
        self._observed = False  # whether some tap was, since the last advance
        self._set_rows(0)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other engines away, or raise MonitorInUseError: rows of two passes would mix."""
        if not self._user.acquire(blocking=False):
            raise MonitorInUseError(
                "the monitor is in use: leave its other attachment, stream or scoring first, or "
                "build another monitor from the same bundle"
            )
        try:
            yield
        finally:
            self._user.release()

    def recognise_segments(self, tokenizer: Any = None) -> None:
        """Get ready to tell the policy's segments by their markers; without segments do nothing.

        Raises
        ------
        SegmentError
            For a marker that cannot be recognised with this tokenizer.
        """
        if self.segments is not None:
            self.segments.recognise(SegmentReader.of(self.policy, tokenizer))

    def admit(
        self,
        stream: str,
        prompt_tokens: int,
        tier: str | None = None,
        *,
        prompt: Sequence[int] = (),
        prior: Sequence[float] | None = None,
    ) -> int:
        """Give a stream a slot, re-initialised completely.

        Parameters
        ----------
        stream : str
            Labels its report and events.
        prompt_tokens : int
            Tokens before the first one to be generated. 0 scores a given text from its first token.
        tier : str, optional
            Strictness asked for by the request.
        prompt : sequence of int
            Its token ids, which say whether the response starts inside a segment; not needed where
            the policy has none.
        prior : sequence of float [K+1], optional
            Belief before the prompt's own evidence is weighed in, such as the one that a turn gate
            carries over from earlier turns; the chain's prior when not given.

        Returns
        -------
        int
            The slot, to be put beside every row of this stream.

        Raises
        ------
        NoFreeSlotError
        PolicyError
            For an unknown tier or one looser than the policy allows.
        ValueError
            For a prior that is no distribution over the chain's states.
        """
        if not 0 <= prompt_tokens < MAX_POSITION:
            raise ValueError(
                f"prompt_tokens: expected 0 to {MAX_POSITION - 1}, got {prompt_tokens}"
            )
        chosen = self.policy.tier_for(tier)
        start = self._chain.prior if prior is None else self._prior(prior)
        if not self._free:
            raise NoFreeSlotError(
                f"stream {stream!r}: all {len(self._admitted)} slots are taken; retire streams, "
                "queue this one, or build the monitor with more slots"
            )
        slot = self._free.pop()
        row = self.policy.row(chosen)
        self.slots.admit(slot, start=prompt_tokens, policy=row, prior=start)
        if self.segments is not None:
            self.segments.admit(slot, prompt)
        self._admitted[slot] = _Admitted(stream, chosen, prompt_tokens)
        return slot

    def follow(self, slot: Tensor, token: Tensor) -> None:
        """Take the response tokens that are about to be judged, one per stream.

        Call it before :meth:`advance` where the policy has segments: a token's segment decides by
        which thresholds it is judged. Launches some small operations; reads nothing back.

        Parameters
        ----------
        slot : int32 [n]
            Each once; -1 for padding.
        token : int64 [n]
        """
        if self.segments is not None:
            self.segments.follow(slot, token)

    def enter_segment(self, slot: int, segment: str = ANSWER) -> None:
        """Judge the stream's next tokens on their own, by the thresholds of ``segment``.

        For callers that know where segments begin; others let :meth:`follow` find out.
        """
        row = self.policy.row(self._stream(slot).tier, segment)
        if self.segments is not None:
            self.segments.enter(slot, row // len(self.policy.tiers))

    def observe(self, tap: Tap, hidden: Tensor) -> None:
        """Score the rows of this forward pass at one tap.

        ``hidden`` is bf16, fp16 or fp32 [..., d]; all but d is flattened into N rows, as many at
        each tap.
        """
        read_out = self._read_outs.get(tap)
        if read_out is None:
            raise RowError(
                f"no probe reads {tap}; the bank's taps are {', '.join(map(str, self.bank.taps))}"
            )
        packed = hidden.reshape(-1, hidden.shape[-1])
        rows = packed.shape[0]
        if rows != self._rows:
            if self._observed:
                raise RowError(f"{rows} rows at {tap}, {self._rows} at the taps before it")
            self._set_rows(rows)
            read_out = self._read_outs[tap]
        self._observed = True
        score, out = read_out
        score(packed, out)

    @property
    def observed_rows(self) -> int:
        """Rows observed since the last :meth:`advance`."""
        return self._rows if self._observed else 0

    def discard(self) -> None:
        """Forget the rows observed since the last :meth:`advance`: their forward pass failed."""
        self._logits.fill_(torch.nan)
        self._observed = False

    def advance(self, slot: Tensor, position: Tensor, *, keep: bool = False) -> None:
        """Fold the rows scored by :meth:`observe` into their streams.

        A tap that was not observed since the last call leaves its rows unscored, never stale.

        Parameters
        ----------
        slot : int32 [N]
            Slot per row, -1 for padding. Rows of one stream stand in order.
        position : int32 [N]
            The token's position in its stream, counted from the start of the prompt.
        keep : bool
            Keep what was observed, for another call that folds other rows of it.
        """
        rows = slot.shape[0]
        if rows != self._rows:
            if self._observed:
                raise RowError(f"{rows} slots for the {self._rows} rows that were observed")
            self._set_rows(rows)
        kept = self._used.clone() if keep else None
        try:
            self._advance(self._head_logits(), slot, position)
        except BaseException:
            self.discard()  # or the next advance would fold what these rows left
            raise
        if kept is not None:
            self._used.copy_(kept)
        self._observed = keep

    def session(self, slot: int, hold_back: int | Literal["turn"] | None = None) -> Session[Any]:
        """Return a new front end for the stream in ``slot``: phase, hold-back and events.

        ``hold_back`` replaces the policy's own.
        """
        return Session(self._stream(slot).stream, self.policy, self.bundle.hash, hold_back)

    def cause_name(self, cause: int) -> str | None:
        """Name of a ``cause`` of the slot table: a probe, ``"unscored"``, or None."""
        if cause == NO_CAUSE:
            return None
        return "unscored" if cause == UNSCORED_CAUSE else self.bank.names[cause]

    def trace(self, slot: int) -> Trace:
        """Return the record of a stream, as far as it is kept. Reads from the device."""
        self._stream(slot)
        return Trace.read(self.slots, slot, self.bank.names)

    def retire(
        self,
        slot: int,
        finish_reason: str = "stop",
        *,
        never_fed: int = 0,
        enforced: bool = True,
    ) -> StreamReport:
        """Free a slot and return what it knew. Reads from the device.

        Parameters
        ----------
        finish_reason : str
            Why the engine ended the stream.
        never_fed : int
            Response tokens that were sampled but never fed, hence never scored; as a rule the last.
        enforced : bool
            Whether a HALT is what ended the stream: its report then gives the policy's reason.
        """
        admitted = self._stream(slot)
        slots = self.slots.host
        verdict, halted_at = Verdict(int(slots.verdict[slot])), int(slots.halted_at[slot])
        if enforced and verdict == Verdict.HALT:
            finish_reason = self.policy.on_halt.finish_reason
        peak, segments = float(slots.peak[slot]), dict[str, SegmentReport]()
        if self.segments is not None:
            peak, segments = self.segments.report(slot)
        report = StreamReport(
            stream=admitted.stream,
            bundle=self.bundle.hash,
            tier=admitted.tier,
            prompt_tokens=admitted.prompt_tokens,
            scored=int(slots.scored[slot]),
            unscored=int(slots.unscored[slot]) + never_fed,
            verdict=verdict.name,
            cause=self.cause_name(int(slots.cause[slot])),
            halted_at=halted_at if halted_at >= 0 else None,
            risk=float(slots.risk[slot]),
            peak=peak,
            finish_reason=finish_reason,
            trace=self.trace(slot),
            segments=segments,
        )
        del self._admitted[slot]
        self._free.append(slot)
        return report

    def attach(self, model: Any, tokenizer: Any = None, **options: Any) -> Attachment:
        """Watch a transformers model; see :class:`midstream.engines.hf.Attachment`."""
        from midstream.engines.hf import Attachment

        return Attachment(self, model, tokenizer, **options)

    def attach_batching(
        self, model: Any, tokenizer: Any = None, **options: Any
    ) -> BatchingAttachment:
        """Serve requests by continuous batching; see `midstream.engines.hf.BatchingAttachment`."""
        from midstream.engines.hf.batching import BatchingAttachment

        return BatchingAttachment(self, model, tokenizer, **options)

    def check_prior(self, prior: Sequence[float]) -> None:
        """Refuse a prior that :meth:`admit` would refuse, with a ValueError."""
        self._prior(prior)

    def _stream(self, slot: int) -> _Admitted:
        if slot not in self._admitted:
            raise KeyError(f"slot {slot} holds no stream; admitted are {sorted(self._admitted)}")
        return self._admitted[slot]

    def _prior(self, belief: Sequence[float]) -> Tensor:
        prior = torch.tensor(belief, dtype=torch.float64)
        states = self.chain.states + 1
        # NaN fails the second
        if prior.shape != (states,) or not ((prior >= 0).all() and abs(prior.sum() - 1) < 1e-6):
            raise ValueError(
                f"prior: expected {states} chances, 0 or more, that sum to 1; one per state of the "
                f"chain, violated last; got {list(belief)}"
            )
        return prior.to(self.device, torch.float32)

    def _head_logits(self) -> Tensor:
        """Logits of the heads, [N, P]; where no probe adds to another they are the read-outs.

        A part costs one launch more. They are added one by one, in the same order in any batch.
        """
        if len(self.bank.heads) == len(self.bank.probes):
            return self._used
        for head, *parts in self._terms:
            for part in parts:
                self._used[:, head].add_(self._used[:, part])
        logits = self._summed[: self._rows]
        torch.index_select(self._used, 1, self._heads, out=logits)
        self._used.fill_(torch.nan)  # what advance does to what it is given
        return logits

    def _set_rows(self, rows: int) -> None:
        if rows > self._logits.shape[0]:
            self.reserve(rows)
        self._rows, self._used = rows, self._logits[:rows]
        self._read_outs = {
            tap: (score, self._used[:, self.bank.columns(tap)])
            for tap, score in self._score.items()
        }
