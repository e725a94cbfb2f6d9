"""vLLM's model runners behind one small interface: what ran in a step, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midstream.engines.vllm.model import Read, attach_taps
from midstream.engines.vllm.settings import UnsupportedEngineError
from midstream.taps import Tap


@dataclass(frozen=True)
class Batch:
    """The requests of one step, in the order of their rows.

    Attributes
    ----------
    requests : list of str
        Request ids, B of them.
    rows : int32 [B]
        Rows of each, at least one; they stand one request after the other.
    first : int32 [B]
        Position of the first row of each, counted from the start of its prompt.
    fed : int64 [N]
        Token ids that were fed, on the device.
    """

    requests: list[str]
    rows: NDArray[np.int32]
    first: NDArray[np.int32]
    fed: Tensor


class Runner(Protocol):
    """What the worker needs of a model runner."""

    def attach(self, taps: tuple[Tap, ...], read: Read) -> None:
        """Let ``read(tap, hidden [rows, d])`` be called in every step, the latest by `batch`."""

    def batch(self, scheduler_output: Any) -> Batch:
        """Return what the forward pass just ran, called before the step is sampled."""

    def processors(self) -> list[Any]:
        """Return the logits processors that rows pass through, in order."""


class LayerRunner:
    """The older runner (``v1/worker/gpu_model_runner.py``), by hooks on the decoder layers.

    Parameters
    ----------
    runner : GPUModelRunner
        With its model loaded, not yet compiled.

    Raises
    ------
    UnsupportedEngineError
        Where CUDA graphs would replay the layers without their hooks.
    """

    def __init__(self, runner: Any) -> None:
        mode = runner.vllm_config.compilation_config.cudagraph_mode
        if runner.device.type != "cpu" and mode is not None and mode.name != "NONE":
            raise UnsupportedEngineError(
                f"the older model runner with CUDA graphs ({mode.name}) replays layers without "
                "their hooks; use the newer one (VLLM_USE_V2_MODEL_RUNNER=1), or --enforce-eager"
            )
        self._runner = runner

    def attach(self, taps: tuple[Tap, ...], read: Read) -> None:
        """Hook the tapped layers."""
        attach_taps(self._runner.get_model(), taps, read)

    def batch(self, scheduler_output: Any) -> Batch:
        """Read the runner's persistent batch, whose order is that of the rows."""
        held = self._runner.input_batch
        requests = list(held.req_ids)
        scheduled = scheduler_output.num_scheduled_tokens
        rows = np.array([scheduled[request] for request in requests], dtype=np.int32)
        first = np.array(held.num_computed_tokens_cpu[: len(requests)], dtype=np.int32)
        return Batch(requests, rows, first, self._runner.input_ids.gpu[: int(rows.sum())])

    def processors(self) -> list[Any]:
        """Those that can change which token is likeliest; the others cannot undo a halt."""
        return list(self._runner.input_batch.logitsprocs.non_argmax_invariant)


def select_runner(worker: Any) -> Runner:
    """Return the adapter for the model runner that is in force."""
    if worker.use_v2_model_runner:
        from midstream.engines.vllm.runner_v2 import AuxiliaryRunner

        return AuxiliaryRunner(worker.model_runner)
    return LayerRunner(worker.model_runner)


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Copy host numbers to the device without waiting for it; on the CPU they are shared."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
