"""vLLM: the worker class that loads the bundle, taps the model and judges every step.

Given to ``--worker-cls``. It is the platform's own worker with four methods around it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import vllm
from vllm import envs
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from midstream.engines.ranks import Agreement
from midstream.engines.vllm.checks import check_config, check_version
from midstream.engines.vllm.halting import HaltingProcessor
from midstream.engines.vllm.model import fingerprint
from midstream.engines.vllm.runner import select_runner
from midstream.engines.vllm.settings import UnsupportedEngineError, bundle_of
from midstream.engines.vllm.watch import JUDGEMENTS, Judgement, Watch
from midstream.monitor import Monitor

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
elif current_platform.is_cuda_alike():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    raise UnsupportedEngineError(
        f"vLLM on {current_platform.device_name}: the plugin knows its CPU, CUDA and ROCm workers; "
        "serve on one of these"
    )


class MonitoredWorker(PlatformWorker):  # type: ignore[misc]
    """A worker whose every row is judged between the forward pass and the sampler."""

    watch: Watch
    _other_model: ValueError | None = None

    def init_device(self) -> None:
        """Refuse what cannot be watched before anything is loaded."""
        check_version(vllm.__version__)
        check_config(self.vllm_config)
        bundle_of(self.vllm_config)  # its hash must be there before anything is compiled
        super().init_device()

    def load_model(self, **options: Any) -> None:
        """Load the model, check that the bundle was made for it, and tap its layers."""
        super().load_model(**options)
        config = self.vllm_config
        tokenizer = _tokenizer(config.model_config)
        self._check_model(tokenizer)
        monitor = Monitor(
            bundle_of(config),
            # With first come, first served no request starts while a preempted one waits.
            slots=config.scheduler_config.max_num_seqs,
            rows=config.scheduler_config.max_num_batched_tokens,
            trace=0,
            device=self.device,
        )
        monitor.recognise_segments(tokenizer)
        runner = select_runner(self)
        self.watch = Watch(monitor, runner, _end_token(config.model_config), _agreement(monitor))
        ours = [p for p in runner.processors() if isinstance(p, HaltingProcessor)]
        if len(ours) != 1 or runner.processors()[-1] is not ours[0]:
            names = ", ".join(type(p).__name__ for p in runner.processors())
            raise UnsupportedEngineError(
                f"the logits processors in force are {names or 'none'}: the plugin's must be there "
                "once, as the last; leave out what takes its place"
            )
        ours[0].watch = self.watch

    def reload_weights(self, *args: Any, **options: Any) -> None:
        """Load weights anew; where they are not the bundle's model, no step runs any more."""
        super().reload_weights(*args, **options)
        self._check_model(_tokenizer(self.vllm_config.model_config))

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the forward pass with the taps open."""
        if self._other_model is not None:
            raise self._other_model
        self._scheduled = scheduler_output
        with self.watch.step(scheduler_output):
            return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Judge what was fed, then sample; the judgements leave with the tokens."""
        read = self.watch.judge(self._scheduled)
        output = super().sample_tokens(grammar_output)
        self.watch.sampled()
        if isinstance(output, AsyncModelRunnerOutput):
            return _JudgedLater(output, read)
        return _judged(output, read())

    def _check_model(self, tokenizer: Any) -> None:
        found = fingerprint(self.model_runner.get_model(), tokenizer)
        try:
            bundle_of(self.vllm_config).fingerprint.check(found)
        except ValueError as error:
            self._other_model = error
            raise

    def midstream_status(self) -> dict[str, Any]:
        """Return the watch's counts; for ``collective_rpc``."""
        return self.watch.status()


class _JudgedLater(AsyncModelRunnerOutput):  # type: ignore[misc]
    """An output that is still on its way from the device, and so are its judgements."""

    def __init__(self, output: Any, read: Any) -> None:
        self._output = output
        self._read = read

    def get_output(self) -> Any:
        return _judged(self._output.get_output(), self._read())


def _judged(output: ModelRunnerOutput, judgements: dict[str, Judgement]) -> ModelRunnerOutput:
    setattr(output, JUDGEMENTS, judgements)
    return output


def _tokenizer(model_config: Any) -> Any:
    from transformers import AutoTokenizer

    if model_config.skip_tokenizer_init:
        return None
    return AutoTokenizer.from_pretrained(
        model_config.tokenizer,
        revision=model_config.tokenizer_revision,
        trust_remote_code=model_config.trust_remote_code,
    )


def _agreement(monitor: Monitor) -> Agreement | None:
    """Let rank 0 decide for all tensor-parallel ranks; None where there is one.

    Its verdicts are those that the scheduler reads. A rank that halted another row would feed
    another token there than the rest, and their shares of the next step would not fit together.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return None
    patience = timedelta(seconds=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
    return Agreement(monitor.slots, group.device_group, timeout=patience)


def _end_token(model_config: Any) -> int:
    """Id that halted rows are given: the model's end of sequence, or any where it has none.

    The scheduler ends the stream by its verdict and drops this token. So it need not be reserved,
    and a request may ban it, or ask for it.
    """
    ends = model_config.hf_text_config.eos_token_id
    if isinstance(ends, list):
        ends = ends[0] if ends else None
    return 0 if ends is None else int(ends)
