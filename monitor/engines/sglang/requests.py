"""SGLang: what a watched request carries, and which of its tokens may leave.

SGLang takes custom logit processors from requests, as pickles: whoever can send one can run code in
the server. So clients must not reach SGLang directly; a gateway of the operator's sends
:func:`watched` requests in their place, and lets out what :class:`Front` lets out.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from midstream.engines.sglang.arguments import UnsupportedEngineError, check_policy
from midstream.holdback import HoldBack
from midstream.kernels.tables import Verdict
from midstream.policy import Policy

TIER = "midstream_tier"
"""Key of a request's ``custom_params``: the tier it asks for."""

# What SGLang takes besides was not tried: grammars keep a halted request from ending, embeddings
# hide what is fed, log-probabilities leave unjudged.
_BODY = ("text", "input_ids", "stream", "sampling_params")
_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "sampling_seed")


class HaltingProcessor:
    """SGLang's custom logit processor: asks the process's `Watch` which rows are halted."""

    def __call__(
        self, logits: Tensor, custom_param_list: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """Return ``logits`` [rows, vocabulary], with halted rows forced to end."""
        from midstream.engines.sglang.hooks import watch

        requests = [params["__req__"] for params in custom_param_list or ()]
        return watch().force_end(logits, requests)


# What CustomLogitProcessor.to_str makes of a class that can be imported: its name, pickled.
PROCESSOR = json.dumps({"callable": pickle.dumps(HaltingProcessor, protocol=4).hex()})


def watched(
    body: Mapping[str, Any], policy: Policy, *, stop_id: int, tier: str | None = None
) -> dict[str, Any]:
    """Return a client's ``/generate`` body as a request that the server will watch.

    Raises
    ------
    UnsupportedEngineError
        For a body that has more than a prompt and plain sampling parameters.
    PolicyError
        For an unknown tier or one looser than the policy allows.
    """
    policy.tier_for(tier)
    sampling = body.get("sampling_params") or {}
    for given, known in ((body, _BODY), (sampling, _SAMPLING)):
        if not isinstance(given, Mapping) or set(given) - set(known):
            raise UnsupportedEngineError(
                f"a watched request is one stream with {', '.join(known)}; got {list(given)}"
            )
    return {
        **body,
        "custom_logit_processor": PROCESSOR,
        "sampling_params": {
            **sampling,
            "stop_token_ids": [stop_id],
            "custom_params": {} if tier is None else {TIER: tier},
        },
    }


class Front:
    """Which ids of one watched response may leave, by the policy's ``hold_back``.

    A token that was sampled says how the one before it was judged: as HALT if it is the stop id.

    Parameters
    ----------
    policy : Policy
    stop_id : int
    """

    def __init__(self, policy: Policy, stop_id: int) -> None:
        check_policy(policy)
        self._on_halt = policy.on_halt
        self._stop_id = stop_id
        passes = policy.on_unscored == "pass"
        self._hold_back: HoldBack[int] = HoldBack(policy.hold_back, passes_unscored=passes)
        self._taken = 0
        self.finish_reason: str | None = None
        """Set at the end: the policy's for a halt, else SGLang's."""

    def take(self, ids: Sequence[int], finish_reason: Mapping[str, Any] | None = None) -> list[int]:
        """Take the next ids of the response; return those that may leave now.

        Parameters
        ----------
        ids : sequence of int
            Sampled since the last call.
        finish_reason : mapping, optional
            ``meta_info["finish_reason"]`` of the last chunk.
        """
        leaving = []
        for token in ids:
            at, self._taken = self._taken, self._taken + 1
            verdict = Verdict.HALT if token == self._stop_id else Verdict.CONTINUE
            if at:  # what came before the first token is the prompt
                leaving += self._hold_back.judge(at - 1, verdict)
            if verdict == Verdict.HALT:
                self._hold_back.withhold()
                self.finish_reason = self._on_halt.finish_reason
                return leaving
            if finish_reason is None or token != finish_reason.get("matched"):
                self._hold_back.push(at, token)
        if finish_reason is not None and self.finish_reason is None:
            leaving += self._hold_back.finish()
            self.finish_reason = str(finish_reason["type"])
        return leaving
