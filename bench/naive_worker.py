"""What other tools do inside vLLM: eager Python hooks that copy activations, scored on the host.

For `vllm_overhead.py` alone. Every tapped layer's rows are copied, converted and kept; a Python
function multiplies them by the probes, step by step and request by request.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from overhead import PROBES_PER_TAP, TAPS
from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class NaiveWorker(PlatformWorker):  # type: ignore[misc]
    """Copies the tapped rows of each step to the host and scores them there."""

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        assert os.environ.get("OMP_NUM_THREADS"), "set it as for the other servers"
        layers = self.model_runner.get_model().model.layers
        width = self.model_config.get_hidden_size()
        self._weights = torch.randn(PROBES_PER_TAP, width)
        self._copies: list[torch.Tensor] = []
        self._evidence: dict[str, float] = {}
        for tap in TAPS:
            layers[tap.layer].register_forward_hook(self._copy)

    def _copy(self, module: Any, args: Any, output: Any) -> None:
        hidden, residual = output
        self._copies.append((hidden + residual).detach().to("cpu", torch.float32, copy=True))

    def execute_model(self, scheduler_output: Any) -> Any:
        self._copies.clear()
        output = super().execute_model(scheduler_output)
        scores = [copy @ self._weights.T for copy in self._copies]
        row = 0
        for request, rows in scheduler_output.num_scheduled_tokens.items():
            for at in range(row, row + rows):
                logit = max(float(score[at].max()) for score in scores)
                last = self._evidence.get(request, 0.0)
                self._evidence[request] = 0.5 * last + 0.5 * logit
            row += rows
        for request in scheduler_output.finished_req_ids:
            self._evidence.pop(request, None)
        return output
