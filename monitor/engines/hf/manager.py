"""transformers: the seams of its continuous batching, and which of its options can be watched.

The generation loop of the manager runs in a thread of its own. In every step it takes in new
requests, packs the rows of all that run into one forward pass ``[1, rows]``, hands the logits of
each request's last row to the logits processors, samples, and brings its requests up to date.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Protocol

import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.model_runner import (
    infer_max_single_request_tokens,
)
from transformers.generation.continuous_batching.requests import GenerationOutput

from midstream.engines.hf.checks import UnsupportedGenerationError, end_tokens

VERSION = "5.23"
"""The minor version whose loop was read; its inner parts change with each."""

_log = logging.getLogger(__name__)


class Watcher(Protocol):
    """What is called in the loop's thread."""

    def before_step(self) -> None:
        """Before requests are taken in and scheduled; also when there is nothing to do."""

    def judge(self, scores: Tensor) -> Tensor:
        """After the forward pass: return the logits [n, vocabulary] to sample from."""

    def after_step(self) -> None:
        """After sampling, with the device's work done and no token handed out."""

    def finished(self, output: GenerationOutput) -> None:
        """A request has ended, or failed."""

    def stopped(self) -> None:
        """The loop has ended, in whatever way."""


class WatchedManager(ContinuousBatchingManager):
    """A manager whose loop calls a watcher.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    generation_config : GenerationConfig
    batching : ContinuousBatchingConfig
        As :func:`watchable` returns it.
    watcher : Watcher
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        batching: ContinuousBatchingConfig,
        watcher: Watcher,
    ) -> None:
        super().__init__(model, generation_config, batching)
        self._watcher = watcher
        self.output_router = _Finished(watcher.finished)
        # The last of the processors, called in every step: before it samples.
        self.logit_processor.logits_processor.append(_Judging(watcher))
        self.logit_processor.do_processing = True
        self.warmup()  # makes the cache here, so that the caller sees what is wrong with its size

    @property
    def longest(self) -> int:
        """Tokens, prompt and response, of a request that has the whole cache to itself."""
        return int(infer_max_single_request_tokens(self._processor.cache))

    @property
    def batch(self) -> Any:
        """The batch that runs: its requests, in order, and what was packed for them."""
        return self._processor.inputs_and_outputs

    @property
    def _processor(self) -> Any:
        assert self.batch_processor is not None  # until the loop was stopped
        return self.batch_processor

    def drop(self, request_id: str) -> None:
        """Take a request out, at once: its name may be that of another from now on.

        In the loop's thread only. `cancel_request` is for other threads, and can overtake the
        request that it cancels.
        """
        processor, scheduler = self._processor, self._processor.scheduler
        processor._update_tp_group_state()  # takes in what still is in the queue
        scheduler.set_request_cancellation(request_id)
        for state in scheduler.clear_cancelled_requests():
            processor.offloading_manager.free_request_cpu_cache(state)
        # Set by a preemption, and taken back only when a request finishes: with all that run
        # dropped, those that were preempted would wait for ever.
        scheduler.block_new_requests = False

    def wake(self) -> None:
        """Let a loop that waits for work look again."""
        self._wake_up_loop.set()

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        self._watcher.before_step()
        return bool(super()._generation_loop_body(batch_processor, bootstrapping))

    def _generation_step(self) -> None:
        super()._generation_step()
        self._watcher.after_step()

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self._watcher.stopped()


class _Judging(LogitsProcessor):
    supports_continuous_batching = True

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._watcher.judge(scores)


class _Finished(OutputRouter):
    """Hands outputs to a callable instead of the queue."""

    def __init__(self, finished: Callable[[GenerationOutput], None]) -> None:
        super().__init__()
        self._finished = finished

    def deliver(self, output: GenerationOutput) -> None:
        self._finished(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self._finished(output)


def check_version() -> None:
    """Refuse a transformers whose loop was not read.

    Raises
    ------
    UnsupportedGenerationError
    """
    if transformers.__version__.split(".")[:2] != VERSION.split("."):
        raise UnsupportedGenerationError(
            f"transformers {transformers.__version__}: continuous batching can be watched in "
            f"{VERSION}, its inner parts change with each minor version; install "
            f"'transformers=={VERSION}.*'"
        )


def generation_config(model: Any, given: GenerationConfig | None) -> GenerationConfig:
    """Refuse what cannot be watched; return the generation config of all requests.

    Raises
    ------
    UnsupportedGenerationError
        Naming every option at fault.
    """
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    if given is not None:
        config.update(**{k: v for k, v in given.to_dict().items() if v is not None})
    faults = []
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        faults.append(f"{mode.value}: leave num_beams and the like out")
    if (config.num_return_sequences or 1) != 1:
        faults.append("num_return_sequences: submit the prompt several times")
    if config.guidance_scale not in (None, 1):
        faults.append("guidance_scale runs the model on a second prompt: leave it out")
    for option in ("stop_strings", "max_time"):
        if getattr(config, option, None) is not None:
            faults.append(f"{option}: continuous batching ignores it, leave it out")
    if given is not None and given.max_length is not None and config.max_new_tokens is None:
        faults.append("max_length: continuous batching ignores it, give max_new_tokens")
    vocabulary = model.config.get_text_config().vocab_size
    if config.eos_token_id in (None, -1, []):
        faults.append("no eos_token_id, which halted rows are given: set one")
    elif wrong := [token for token in end_tokens(config) if not 0 <= token < vocabulary]:
        faults.append(f"eos_token_id has {wrong}: expected 0 to {vocabulary - 1}")
    _refuse(faults)
    return config


def watchable(
    given: ContinuousBatchingConfig | None, model: Any, *, reads_prompt: bool
) -> ContinuousBatchingConfig:
    """Refuse what cannot be watched; return a copy with what was left open switched off.

    Parameters
    ----------
    given : ContinuousBatchingConfig, optional
    model : transformers.PreTrainedModel
    reads_prompt : bool
        Whether some probe reads prompts, so that every prompt token has to be fed.

    Raises
    ------
    UnsupportedGenerationError
        Naming every option at fault.
    """
    asked = given if given is not None else ContinuousBatchingConfig()
    replays = "is replayed without the monitor's hooks: leave it out"
    graphs = asked.use_cuda_graph
    text = model.config.get_text_config()
    faults = [
        fault
        for wrong, fault in [
            (any(graphs) if isinstance(graphs, tuple) else graphs, f"use_cuda_graph {replays}"),
            (
                asked.q_padding_interval_size or asked.kv_padding_interval_size,
                "q_padding_interval_size and kv_padding_interval_size are for CUDA graphs: "
                "leave them out",
            ),
            (
                asked.varlen_compile_config
                or asked.decode_compile_config
                or asked.default_compile_level
                or getattr(text, "compile_config", None),
                f"what is compiled {replays}: no compile_config, no default_compile_level",
            ),
            (
                asked.use_async_batching,
                "use_async_batching runs a step ahead of the verdicts: leave it out",
            ),
            (
                asked.return_logprobs,
                "return_logprobs: they would leave unjudged, leave it out",
            ),
            (
                asked.max_queue_size,
                "max_queue_size: requests wait in front of the manager here, leave it out",
            ),
            (
                getattr(model, "_device_mesh", None) is not None,
                "a tensor-parallel model: attach to a model on one device",
            ),
        ]
        if wrong
    ]
    _refuse(faults)
    off: dict[str, Any] = {"use_cuda_graph": False, "use_async_batching": False}
    if reads_prompt and asked.allow_block_sharing:
        _log.warning(
            "allow_block_sharing is switched off: some probe reads prompts, and the tokens of a "
            "shared prefix are not fed again"
        )
        off["allow_block_sharing"] = False
    return dataclasses.replace(asked, **off)


def check_sampling(sampling: dict[str, Any], vocabulary: int) -> None:
    """Refuse values that would fail in the loop, and with it every request.

    Raises
    ------
    UnsupportedGenerationError
    """
    temperature, top_k, top_p = (sampling.get(k) for k in ("temperature", "top_k", "top_p"))
    faults = []
    # Logits divided by less or more can leave fp32's range; a NaN ends the loop.
    if temperature is not None and not 1e-5 <= temperature <= 1e5:
        faults.append(f"temperature: expected 1e-5 to 1e5, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        faults.append(f"top_k: expected 1 to {vocabulary}, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        faults.append(f"top_p: expected above 0, 1 at most; got {top_p}")
    _refuse(faults)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise UnsupportedGenerationError("cannot be watched: " + "; ".join(faults))
