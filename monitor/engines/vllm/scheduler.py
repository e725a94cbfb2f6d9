"""vLLM: the scheduler class through which a token leaves only after its own residual was judged.

Given to ``--scheduler-cls``. A token that is sampled in one step is fed, and judged, in the next.
So the outputs of a step carry what earlier steps sampled; a stream of N tokens is scheduled for
one step more, in which the last is judged; and a halted stream ends without the token that was
flagged or the forced one after it. What is not released never leaves the engine core's process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import vllm
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request, RequestStatus

from midstream.engines.vllm.checks import check_config, check_version
from midstream.engines.vllm.frontend import stop_reason
from midstream.engines.vllm.settings import UnsupportedEngineError, bundle_of
from midstream.engines.vllm.watch import JUDGEMENTS, Judgement
from midstream.kernels.tables import Verdict
from midstream.streams import Session

logger = init_logger("vllm.midstream")  # below the logger that vLLM gives a handler

_ONCE = ("prefill_stats", "new_prompt_logprobs_tensors", "prompt_token_id_logprobs")


class _Token(NamedTuple):
    id: int
    logprobs: LogprobsLists | None


@dataclass
class _Held:
    """What of a stream waits to leave."""

    session: Session[_Token]
    limit: int
    """Tokens that the request asked for."""
    first: dict[str, Any] = field(default_factory=dict)
    """What vLLM sends beside the first tokens."""
    unscored: int = 0
    """Rows without a score, up to the newest judgement."""


class MonitoredScheduler(Scheduler):  # type: ignore[misc]
    """Holds tokens back by the policy; asynchronous where vLLM schedules asynchronously."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> MonitoredScheduler:
        """Build the asynchronous one where the configuration asks for it."""
        if vllm_config.scheduler_config.async_scheduling:
            return object.__new__(MonitoredAsyncScheduler)
        return object.__new__(cls)

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        check_version(vllm.__version__)
        check_config(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        if self.return_sampling_mask or self.aux_output_connector is not None:
            raise UnsupportedEngineError(
                "sampling masks and routed experts leave the engine beside tokens that are held "
                "back; switch them off"
            )
        self._bundle = bundle_of(vllm_config)
        self._halt_reason = stop_reason(self._bundle.policy)
        self._held: dict[str, _Held] = {}
        self._judgements: dict[str, Judgement] = {}

    def add_request(self, request: Request) -> None:
        """Queue a request, for one token more than it asks for: in that step its last is judged."""
        super().add_request(request)
        policy = self._bundle.policy
        session: Session[_Token] = Session(request.request_id, policy, self._bundle.hash)
        self._held[request.request_id] = _Held(session, request.max_tokens)
        request.max_tokens += 1

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        """Forget what is held of requests that are ended from outside."""
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in finished:
            held = self._held.pop(request.request_id, None)
            if held is not None:
                _tell(held.session, str(request.get_finished_reason()))
        return finished

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take a step's tokens and judgements; return what may leave now."""
        self._judgements = getattr(model_runner_output, JUDGEMENTS, {})
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client in outputs.values():
            client.outputs = [output for output in client.outputs if self._lets_go(output)]
        return outputs

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        judgement = self._judgements.get(request.request_id)
        if judgement is None:
            raise RuntimeError(
                f"the worker sampled a token of {request.request_id} and judged nothing; stop the "
                "server: this stream would be unwatched"
            )
        tokens, stopped = super()._update_request_with_output(
            request, new_token_ids, *args, **kwargs
        )
        verdict = judgement[1]
        if verdict == Verdict.HALT:
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = self._halt_reason
            return [], True
        if request.num_output_tokens > self._held[request.request_id].limit:
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
            request.stop_reason = None
            return [], True
        return tokens, stopped

    def _lets_go(self, output: EngineCoreOutput) -> bool:
        """Replace the tokens of an output by those that may leave; whether to send it at all."""
        held = self._held.get(output.request_id)
        judgement = self._judgements.get(output.request_id)
        if held is None or judgement is None:
            output.new_token_ids, output.new_logprobs = [], None
            return bool(output.finished)  # ended from outside
        session = held.session
        position, verdict, risk, cause, unscored = judgement
        leaving, events = session.judge(
            position, Verdict(verdict), risk, cause, scored=unscored == held.unscored
        )
        held.unscored = unscored
        for event in events:
            if event.type == "halted":
                logger.info("%s", event.model_dump_json(exclude_none=True))
        tokens = _tokens(output)
        # What ends a stream is no text; it leaves with the last of it.
        end = [tokens.pop()] if output.finish_reason == FinishReason.STOP and tokens else []
        for after, token in enumerate(tokens, start=1):
            session.push(position + after, token)
        if output.finished:
            del self._held[output.request_id]
            leaving += session.finish()
            if verdict == Verdict.HOLD and session.hold_back.withheld:
                output.finish_reason, output.stop_reason = FinishReason.STOP, self._halt_reason
                end = []
            leaving += end
            _tell(session, str(output.finish_reason))
        elif not leaving:
            _keep(output, held.first)
            return False
        _send(output, leaving, held.first)
        return True


class MonitoredAsyncScheduler(MonitoredScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same, one step ahead of the device."""


def _tell(session: Session[_Token], reason: str) -> None:
    """Log the end of a stream out of which tokens left without a score, and how many."""
    queue = session.hold_back
    if queue.released_unscored:
        event = session.event(
            "finished",
            message=reason,
            delivered=queue.released,
            delivered_unscored=queue.released_unscored,
        )
        logger.warning("%s", event.model_dump_json(exclude_none=True))


def _tokens(output: EngineCoreOutput) -> list[_Token]:
    logprobs = output.new_logprobs
    return [
        _Token(token, None if logprobs is None else logprobs.slice_request(n, 1))
        for n, token in enumerate(output.new_token_ids)
    ]


def _keep(output: EngineCoreOutput, first: dict[str, Any]) -> None:
    """Put what is sent only once aside, for the output in which the first token leaves."""
    for name in _ONCE:
        if (value := getattr(output, name)) is not None:
            first[name] = value
    first.setdefault("events", []).extend(output.events or [])


def _send(output: EngineCoreOutput, leaving: list[_Token], first: dict[str, Any]) -> None:
    output.new_token_ids = [token.id for token in leaving]
    rows = [token.logprobs for token in leaving if token.logprobs is not None]
    output.new_logprobs = None
    if rows:
        columns = list(zip(*rows, strict=True))[:3]
        output.new_logprobs = LogprobsLists(*(np.concatenate(column) for column in columns))
    output.events = first.pop("events", []) + (output.events or []) or None
    for name in _ONCE:
        if name in first:
            setattr(output, name, first.pop(name))
