"""transformers: judge texts that somebody else writes, while they are written.

Streams are opened with a prompt and fed text as it comes. Every :meth:`ForcedStreams.step` feeds
tokens that wait, of many streams together, to the model in one pass, and says what may leave::

    with ForcedStreams(monitor, model, tokenizer) as forced:
        stream = forced.open("a", prompt)
        stream.feed("some text")
        stream.finish("stop")
        while forced.busy:
            for stream, events in forced.step():
                ...

The events are those of `midstream.engines.hf.stream`; the texts of all ``released`` ones are the
text that was fed, character by character, as far as it may leave. Not for several threads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from time import perf_counter
from typing import Any, Self

from midstream.bundle import Fingerprint
from midstream.engines.hf.checks import UnsupportedGenerationError, check_unwatched
from midstream.engines.hf.forced_pass import feed
from midstream.engines.hf.forced_prompt import PromptError, PromptLengthError, encode_prompt
from midstream.engines.hf.forced_stream import ForcedStream
from midstream.engines.hf.growing_text import GrowingText, Piece, blank, literal
from midstream.engines.hf.prompts import Prompt
from midstream.engines.hf.slot_cache import SlotCache, check_cache, window_for
from midstream.kernels.tables import Verdict
from midstream.monitor import Monitor
from midstream.streams import Event, Phase
from midstream.taps import attach_taps

__all__ = ["CHUNK", "ForcedStream", "ForcedStreams", "PromptError", "PromptLengthError"]

_log = logging.getLogger(__name__)

FEW = 4
"""Tokens that may wait of a stream that goes with those that get one at a time."""
CHUNK = 128
"""Tokens of one stream in one pass, at most."""
ROWS = 256
"""Rows of a pass over prompts: for as long as they take, all other streams wait."""


class ForcedStreams:
    """A monitor on one transformers model that reads along what others write.

    Use it as a context manager. A stream has at most ``window`` tokens, those of its prompt
    included. What comes after them is unscored: it leaves so, counted, where the policy's
    ``on_unscored`` is ``pass``; else the stream is halted there. A token that comes with characters
    which the tokenizer drops is unscored, too, and treated as any such.

    Parameters
    ----------
    monitor : Monitor
        For as many streams at a time as it has slots.
    model : transformers.PreTrainedModel
        A decoder; the one the bundle was made for.
    tokenizer : transformers.PreTrainedTokenizerFast
    window : int, optional
        The model's own limit when not given. The cache is linear in it: see `SlotCache`.

    Raises
    ------
    WrongModelError
        When the bundle was made for another model.
    UnsupportedGenerationError
    """

    def __init__(
        self, monitor: Monitor, model: Any, tokenizer: Any, *, window: int | None = None
    ) -> None:
        monitor.bundle.fingerprint.check(Fingerprint.of(model, tokenizer))
        monitor.recognise_segments(tokenizer)
        kept = monitor.slots.trace_position.shape[1]
        if kept < CHUNK:
            raise UnsupportedGenerationError(
                f"the monitor keeps {kept} tokens of each stream, where verdicts are read from; "
                f"build it with trace={CHUNK} or more"
            )
        self.monitor = monitor
        self.model = model
        self.tokenizer = tokenizer
        self.window = window_for(model, window)
        self._literal = literal(tokenizer)
        self._body = getattr(model, model.base_model_prefix, model)
        self._streams: dict[str, ForcedStream] = {}
        self._told: dict[ForcedStream, list[Event]] = {}
        self._of_unscored = {
            "pass": Verdict.CONTINUE,
            "hold": Verdict.HOLD,
            "halt": Verdict.HALT,
        }[monitor.policy.on_unscored]
        self._turn_of_few = True
        self.rows = 0
        """Tokens that the last step fed."""
        self.judge_seconds = 0.0
        """How long the host took to judge them."""
        self._attached = ExitStack()

    def __enter__(self) -> Self:
        check_unwatched(self.model)
        slots = len(self.monitor.slots.position)
        if self.monitor.free_slots < slots:
            raise UnsupportedGenerationError(
                f"{slots - self.monitor.free_slots} slots of the monitor are taken; give one that "
                "nobody else uses"
            )
        monitor, taps = self.monitor, self.monitor.bank.taps
        with ExitStack() as stack:
            stack.enter_context(monitor.exclusive())
            self._cache = SlotCache(self.model.config.get_text_config(), slots, self.window)
            check_cache(self.model, taps, self._cache)
            stack.enter_context(attach_taps(self.model, taps, monitor.observe))
            stack.callback(self._leave)
            self._attached = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._attached.close()

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values of all slots."""
        return self._cache.nbytes

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._told) or any(stream.waits for stream in self._streams.values())

    def open(
        self,
        stream: str,
        prompt: Prompt | Sequence[int],
        *,
        tier: str | None = None,
        prior: Sequence[float] | None = None,
    ) -> ForcedStream:
        """Begin a stream.

        Parameters
        ----------
        stream : str
            Labels its report and events; no other's that is open.
        prompt : str, chat messages, or sequence of int
        tier : str, optional
        prior : sequence of float, optional
            As for :meth:`midstream.monitor.Monitor.admit`.

        Raises
        ------
        PromptError
            For a prompt that is empty, too long, or that the chat template refuses.
        NoFreeSlotError
        PolicyError
            For a tier that may not be asked for.
        """
        if stream in self._streams:
            raise UnsupportedGenerationError(f"stream {stream!r} is open already; choose another")
        before, ids = encode_prompt(self.model, self.tokenizer, prompt, self.window)
        slot = self.monitor.admit(stream, len(ids), tier, prompt=ids, prior=prior)
        session = self.monitor.session(slot)
        opened = ForcedStream(session, slot, ids, GrowingText(self._literal, before))
        self._streams[stream] = opened
        self._tell(opened, session.event("admitted", position=0))
        return opened

    def find(self, stream: str) -> ForcedStream | None:
        """Return the stream of this name that has not ended."""
        return self._streams.get(stream)

    def step(self) -> list[tuple[ForcedStream, list[Event]]]:
        """Feed what waits, in one pass; return what happened since the last step.

        Streams with few tokens waiting go together; those with more, as new ones have, in passes
        of their own, in turn with the others: no long prompt keeps them waiting for long.
        """
        few: list[ForcedStream] = []
        many: list[ForcedStream] = []
        for stream in list(self._streams.values()):
            if stream.waits and (not stream.pending or stream.fed >= self.window):
                self._settle(stream)
            elif stream.waits:
                (few if len(stream.pending) <= FEW else many).append(stream)
        batch = few if few and (self._turn_of_few or not many) else _first_rows(many)
        self._turn_of_few = batch is not few
        self.rows, self.judge_seconds = 0, 0.0
        if batch:
            self._pass(batch)
        told, self._told = self._told, {}
        return list(told.items())

    def close(self, stream: ForcedStream, reason: str = "cancelled") -> None:
        """End a stream before its text has ended; what was judged leaves."""
        if not stream.ended:
            self._end(stream, reason)

    def fail(self, stream: ForcedStream, message: str) -> None:
        """End a stream with an error; what waits never leaves."""
        stream.session.hold_back.withhold()
        self.monitor.retire(stream.slot, "error", enforced=False)
        self._forget(stream)
        facts = stream.delivered
        self._tell(stream, stream.session.event("error", message=message, **facts))

    def _pass(self, batch: list[ForcedStream]) -> None:
        taken = [
            list(islice(stream.pending, min(CHUNK, self.window - stream.fed))) for stream in batch
        ]
        try:
            self._forward(batch, taken)
        except Exception as error:
            # Rows of other streams were not written to; they go on.
            _log.exception("a pass over %d streams failed", len(batch))
            self.monitor.discard()
            for stream in batch:
                self.fail(stream, f"the watching model failed: {type(error).__name__}")
            return
        begun = perf_counter()
        for stream, pieces in zip(batch, taken, strict=True):
            for _ in pieces:
                stream.pending.popleft()
            stream.fed += len(pieces)
            self._judge(stream, pieces)
        self.rows = sum(map(len, taken))
        self.judge_seconds += perf_counter() - begun

    def _forward(self, batch: list[ForcedStream], taken: list[list[Piece]]) -> None:
        self.judge_seconds = feed(self.monitor, self._body, self._cache, batch, taken)

    def _judge(self, stream: ForcedStream, pieces: list[Piece]) -> None:
        """Let go what the verdicts on the tokens just fed allow."""
        table, session = self.monitor.slots.host, stream.session
        begin = stream.fed - len(pieces)
        positions = range(max(begin, stream.prompt_tokens - 1), stream.fed)
        cells = [position % table.trace_verdict.shape[1] for position in positions]
        verdicts = table.trace_verdict[stream.slot][cells].tolist()
        risks = table.trace_risk[stream.slot][cells].tolist()
        cause = self.monitor.cause_name(int(table.cause[stream.slot]))
        logits = table.trace_logits[stream.slot][cells].tolist() if stream.closely else []
        for position, number, risk in zip(positions, verdicts, risks, strict=True):
            known = risk if risk == risk else None  # NaN where it was unscored
            verdict, why, scored = Verdict(number), cause, known is not None
            if position >= stream.prompt_tokens:
                piece = pieces[position - begin]
                session.push(position, piece.text)
                if piece.unread:
                    scored, verdict = False, max(verdict, self._of_unscored)
                    why = "unscored" if verdict != number else cause
            if stream.closely:
                facts = {"position": position, "risk": known, "verdict": verdict.name}
                scores = self._scores(logits[position - positions[0]])
                self._tell(stream, session.event("scored", cause=why, scores=scores, **facts))
            leaving, events = session.judge(position, verdict, known, why, scored=scored)
            self._release(stream, leaving, position, known)
            self._tell(stream, *events)
            if session.phase == Phase.HALTED:
                self._end(stream, self.monitor.policy.on_halt.finish_reason, halted_at=position)
                return
        self._settle(stream)

    def _scores(self, logits: list[float]) -> dict[str, float | None]:
        pairs = zip(self.monitor.bank.names, logits, strict=True)
        return {name: z if math.isfinite(z) else None for name, z in pairs}

    def _settle(self, stream: ForcedStream) -> None:
        """Go on where nothing can be fed: at the window's end, and at the text's."""
        if stream.pending and stream.fed >= self.window:
            self._pass_by(stream, f"the watching model's window of {self.window} tokens is full")
        if stream.reason is None or stream.pending or stream.ended:
            return
        if not blank(rest := stream.text.rest):
            stream.pending.append(Piece(-1, rest))
            self._pass_by(stream, "the watching model's tokenizer drops the text's last characters")
        if not stream.ended:
            self._end(stream, stream.reason)

    def _pass_by(self, stream: ForcedStream, why: str) -> None:
        """Do what the policy says with what waits and cannot be fed."""
        session, policy = stream.session, self.monitor.policy
        facts = {"position": stream.fed, "cause": "unscored"}
        if policy.on_unscored != "pass" or session.phase == Phase.HELD:
            self._tell(stream, *session.withhold(message=why, **facts))
            self._end(stream, policy.on_halt.finish_reason, halted_at=stream.fed)
            return
        if not stream.passed:
            message = f"{why}; what follows leaves unscored, as the policy says"
            self._tell(
                stream, session.event("verdict", verdict="CONTINUE", message=message, **facts)
            )
        texts = [piece.text for piece in stream.pending]
        stream.passed += len(texts)
        stream.pending.clear()
        if session.delivers_whole:
            begin = stream.fed + stream.passed - len(texts)
            for position, text in enumerate(texts, start=begin):
                session.push(position, text)
        else:
            if session.phase != Phase.FINISHED:
                texts = session.finish() + texts
            self._release(stream, texts, None, None)

    def _end(self, stream: ForcedStream, reason: str, halted_at: int | None = None) -> None:
        """Free the slot, let go what leaves with the end, and tell the end.

        ``halted_at`` is where it was halted for what the monitor did not see.
        """
        session = stream.session
        leaves = session.phase not in (Phase.HELD, Phase.HALTED)
        halted = session.phase == Phase.HALTED
        texts = [] if session.phase == Phase.FINISHED else session.finish()
        if leaves and stream.reason is not None and not stream.pending and blank(stream.text.rest):
            texts.append(stream.text.rest)  # no token's: nothing there to judge
        broke = stream.error is not None and not halted
        report = self.monitor.retire(
            stream.slot,
            "error" if broke else reason,
            never_fed=stream.passed + len(stream.pending),
        )
        if halted and report.verdict != "HALT":
            report = report.model_copy(
                update={"verdict": "HALT", "cause": "unscored", "halted_at": halted_at}
            )
        self._forget(stream)
        self._release(stream, texts, None, report.risk)
        if broke:
            why = {"message": stream.error, "cause": stream.reason}
            self._tell(stream, session.event("error", **why, **stream.delivered))
            return
        facts = {"risk": report.risk, "verdict": report.verdict, "cause": report.cause}
        facts |= stream.delivered
        self._tell(
            stream,
            session.event("finished", message=report.finish_reason, report=report, **facts),
        )

    def _forget(self, stream: ForcedStream) -> None:
        stream.ended = True
        self._cache.clear(stream.slot, stream.fed + CHUNK)  # a failed pass has written beyond
        del self._streams[stream.id]

    def _leave(self) -> None:
        for stream in list(self._streams.values()):
            self.close(stream)
        self.monitor.discard()

    def _release(
        self, stream: ForcedStream, texts: list[str], position: int | None, risk: float | None
    ) -> None:
        if text := "".join(texts):
            facts = {"position": position, "risk": risk, "text": text}
            self._tell(stream, stream.session.event("released", **facts))

    def _tell(self, stream: ForcedStream, *events: Event) -> None:
        if events:
            self._told.setdefault(stream, []).extend(events)


def _first_rows(streams: list[ForcedStream]) -> list[ForcedStream]:
    """As many of the oldest as fit in a pass."""
    longest = min(CHUNK, max((len(stream.pending) for stream in streams), default=1))
    return streams[: max(1, ROWS // longest)]
