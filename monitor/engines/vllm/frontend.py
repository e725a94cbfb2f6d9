"""vLLM: what the API server's process does, loaded by the entry point ``vllm.general_plugins``.

The engine core ends a halted stream with a stop reason of ours; here it becomes the finish reason
that the policy asks for, ``content_filter``, before any endpoint sees it.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from midstream.engines.vllm.checks import check_config, check_version
from midstream.engines.vllm.settings import KEY, TIER, UnsupportedEngineError, bundle_of
from midstream.policy import Policy

_MARK = "\0midstream:"
_policy: Policy | None = None
_installed = False


def stop_reason(policy: Policy) -> str:
    """Return the stop reason that stands for a halt, between the engine core and this process."""
    return _MARK + json.dumps([policy.on_halt.finish_reason, policy.on_halt.message])


def register() -> None:
    """Install the translation; vLLM calls it in each of its processes, maybe more than once."""
    global _installed
    if _installed:
        return
    import vllm
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import RequestState

    complete = RequestState._new_completion_output

    @functools.wraps(complete)
    def completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = complete(self, *args, **kwargs)
        reason = output.stop_reason
        if isinstance(reason, str) and reason.startswith(_MARK):
            output.finish_reason, output.stop_reason = json.loads(reason.removeprefix(_MARK))
        return output

    start = InputProcessor.__init__

    @functools.wraps(start)
    def start_with_policy(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        global _policy
        if KEY in vllm_config.additional_config:
            check_version(vllm.__version__)
            check_config(vllm_config)  # before the engine's processes are started
            _policy = bundle_of(vllm_config).policy
        start(self, vllm_config, *args, **kwargs)

    RequestState._new_completion_output = completion_output
    InputProcessor.__init__ = start_with_policy
    _installed = True


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
        raise UnsupportedEngineError(
            "include_stop_str_in_output with stop_token_ids would deliver a token that was never "
            "judged; leave one of them out"
        )
