"""vLLM: the logits processor that forces the end of sequence on halted rows, on the device.

One class for both model runners: each looks for its own interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as LogitsProcessorV2,
)

from midstream.engines.vllm import frontend

if TYPE_CHECKING:
    from torch import Tensor

    from midstream.engines.vllm.watch import Watch


class HaltingProcessor(LogitsProcessor, LogitsProcessorV2):  # type: ignore[misc]
    """Asks the worker's `Watch` which rows are halted; without one it changes nothing.

    The worker sets :attr:`watch`, and refuses to start when it finds no processor to give it to.
    """

    def __init__(self, vllm_config: Any, *engine: Any) -> None:
        self.watch: Watch | None = None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request that could not be watched; runs in the API server's process."""
        frontend.check_request(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """A halted row must end under greedy decoding as well."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Keep nothing: the watch knows the batch."""

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Return ``logits`` [rows, vocabulary] with halted rows forced to end."""
        if self.watch is None:
            return logits
        return self.watch.force_end(logits)
