"""vLLM: what the API server's process does, loaded by the entry point ``vllm.general_plugins``.

The engine core ends a halted stream with a stop reason of ours; here it becomes the finish reason
that the policy asks for, ``content_filter``, before any endpoint sees it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

from midstream.engines.vllm.checks import check_config, check_version
from midstream.engines.vllm.settings import KEY, TIER, UnsupportedEngineError, bundle_of
from midstream.policy import Policy

_MARK = "\0midstream:"
_policy: Policy | None = None
_installed = _endpoints_installed = False


class Halted(str):
    """Finish reason of a halted response; by its type endpoints can tell it from their own."""


class _NoTokens(list[int]):
    """Empty, and true.

    Endpoints that stream leave out a first chunk that has no tokens (a prompt that is computed in
    chunks once gave such), and with it the finish reason of a response that is halted at once.
    """

    def __bool__(self) -> bool:
        return True


def stop_reason(policy: Policy) -> str:
    """Return the stop reason that stands for a halt, between the engine core and this process."""
    return _MARK + json.dumps([policy.on_halt.finish_reason, policy.on_halt.message])


def register() -> None:
    """Install the translation; vLLM calls it in each of its processes, maybe more than once."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import RequestState

    _wrap(InputProcessor, "__init__", _start)
    _wrap(InputProcessor, "process_inputs", _process)
    _wrap(RequestState, "_new_completion_output", _complete)
    for mixin in BeamSearchOfflineMixin, BeamSearchOnlineMixin:
        _wrap(mixin, "beam_search", _search_beams)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Let ``around(original, self, ...)`` stand in a method's place."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, method)


def _start(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    global _policy
    if KEY in vllm_config.additional_config:
        # Before the engine's processes are started.
        import vllm

        check_version(vllm.__version__)
        check_config(vllm_config)
        _policy = bundle_of(vllm_config).policy
        _install_endpoints()
    original(self, vllm_config, *args, **kwargs)


def _process(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if KEY in self.vllm_config.additional_config and kwargs.get("resumable"):
        _refuse("a prompt that comes in pieces has no first response token", "send it whole")
    return original(self, *args, **kwargs)


def _search_beams(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    engine = getattr(self, "llm_engine", None) or self.engine_client
    if KEY in engine.vllm_config.additional_config:
        _refuse(
            "beam search asks for every token as a new request, so no beam has a history",
            "use sampling",
        )
    return original(self, *args, **kwargs)


def _complete(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(self, *args, **kwargs)
    reason = output.stop_reason
    if isinstance(reason, str) and reason.startswith(_MARK):
        name, output.stop_reason = json.loads(reason.removeprefix(_MARK))
        output.finish_reason = Halted(name)
        output.token_ids = output.token_ids or _NoTokens()
    return output


def _install_endpoints() -> None:
    """Mend the endpoints that would give a halted response another finish reason."""
    global _endpoints_installed
    if _endpoints_installed:
        return
    _endpoints_installed = True
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    _wrap(OpenAIServingChat, "chat_completion_full_generator", _answer_chat)
    _wrap(OpenAIServingResponses, "responses_full_generator", _answer_responses)


async def _answer_chat(
    original: Any, self: Any, request: Any, results: Any, *args: Any, **kwargs: Any
) -> Any:
    """A halted response is no ``tool_calls``, even where a whole call was read from it."""
    halted: dict[int, Halted] = {}

    async def seen() -> AsyncIterator[Any]:
        async for result in results:
            for output in result.outputs:
                if isinstance(output.finish_reason, Halted):
                    halted[output.index] = output.finish_reason
            yield result

    response = await original(self, request, seen(), *args, **kwargs)
    for choice in getattr(response, "choices", ()):  # none in an error
        choice.finish_reason = halted.get(choice.index, choice.finish_reason)
    return response


async def _answer_responses(
    original: Any,
    self: Any,
    request: Any,
    params: Any,
    results: Any,
    context: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A halted response is ``incomplete`` by ``content_filter``, which vLLM has no case for."""
    from openai.types.responses.response import IncompleteDetails

    response = await original(self, request, params, results, context, *args, **kwargs)
    final = getattr(context, "final_output", None)
    reason = context.finish_reason if final is None else final.outputs[0].finish_reason
    if isinstance(reason, Halted) and hasattr(response, "incomplete_details"):
        response.status = "incomplete"
        response.incomplete_details = IncompleteDetails(reason="content_filter")
    return response


def _refuse(what: str, remedy: str) -> NoReturn:
    """Raise what vLLM answers with status 400."""
    from vllm.exceptions import VLLMValidationError

    raise VLLMValidationError(f"{what}; {remedy}")


def check_request(params: Any) -> None:
    """Refuse a request that asks for what the policy does not allow, or nobody could honour.

    Raises
    ------
    UnsupportedEngineError
        Where this process did not load the plugin: clients would be told of no halt.
    PolicyError
        For an unknown tier, or one looser than the policy allows.
    """
    if _policy is None:
        raise UnsupportedEngineError(
            "this process did not load midstream's plugin, so clients would not be told of a halt; "
            "leave VLLM_PLUGINS unset, or name midstream in it"
        )
    _policy.tier_for((params.extra_args or {}).get(TIER))
    if params.include_stop_str_in_output and params.stop_token_ids:
        _refuse(
            "include_stop_str_in_output with stop_token_ids would deliver a token that was never "
            "judged",
            "leave one of them out",
        )
