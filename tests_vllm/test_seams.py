"""The plugin's seams on vLLM's own classes, without a server; the newer runner on stand-ins of it.

The newer runner needs Triton, so that it does not run on a CPU. What is real here: the loaders of
logits processors, the mixin through which models return auxiliary states, and the layers' pairs.
"""

from __future__ import annotations

from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from serving import Server
from torch import nn
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.interfaces import EagleModelMixin, SupportsEagle3
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

from midstream import testbed
from midstream.engines.vllm import frontend
from midstream.engines.vllm import worker as module
from midstream.engines.vllm.halting import HaltingProcessor
from midstream.engines.vllm.model import attach_taps
from midstream.engines.vllm.runner import LayerRunner
from midstream.engines.vllm.runner_v2 import AuxiliaryRunner
from midstream.engines.vllm.settings import KEY, PROCESSOR, UnsupportedEngineError
from midstream.engines.vllm.watch import JUDGEMENTS, Watch
from midstream.engines.vllm.worker import _JudgedLater
from midstream.kernels.tables import Verdict
from midstream.monitor import Monitor
from midstream.taps import Tap

WIDTH = 8


class Layer(nn.Module):
    """Passes the stream on as vLLM's layers do, as a pair to be added."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, positions, hidden_states, residual):
        residual = hidden_states if residual is None else hidden_states + residual
        return self.mix(residual).tanh(), residual


class Body(nn.Module, EagleModelMixin):
    start_layer = 0

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, hidden):
        aux = self._maybe_add_hidden_state([], 0, hidden, None)
        residual = None
        for number, layer in enumerate(self.layers, start=1):
            hidden, residual = layer(None, hidden, residual)
            aux = self._maybe_add_hidden_state(aux, number, hidden, residual)
        return (hidden + residual, aux) if aux else hidden + residual


class Model(nn.Module, SupportsEagle3):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = LlamaConfig(num_hidden_layers=3, hidden_size=WIDTH, num_attention_heads=2)
        self.model = Body()

    def forward(self, hidden):
        return self.model(hidden)


TAPS = tuple(Tap(layer, site) for layer in range(3) for site in ("resid_pre", "resid_post"))


def read_by_hooks(hidden, *, compiled=False):
    """What the older runner's hooks read in each of two passes."""
    model, reads = Model(), []
    attach_taps(model, TAPS, lambda tap, rows: reads.append((tap, rows.clone())))
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    passes = []
    for rows in hidden:
        reads.clear()
        with torch.no_grad():
            run(rows)
        passes.append(dict(reads))
    return passes


def read_by_runner(hidden):
    """What the newer runner's adapter reads of the same."""
    model, reads = Model(), {}
    runner = Namespace(get_model=lambda: model, use_aux_hidden_state_outputs=False)
    adapter = AuxiliaryRunner(runner)
    adapter.attach(TAPS, lambda tap, rows: reads.__setitem__(tap, rows))
    assert runner.use_aux_hidden_state_outputs
    with torch.no_grad():
        _, aux = model(hidden)
    runner.execute_model_state = Namespace(aux_hidden_states=aux, input_batch=batch([len(hidden)]))
    adapter.batch(None)
    return reads


def batch(rows, first=0, padding=0):
    """The fields of the newer runner's ``InputBatch`` that the adapter reads."""
    total = sum(rows)
    return Namespace(
        req_ids=[f"r{n}" for n in range(len(rows))],
        num_scheduled_tokens=np.array(rows, dtype=np.int32),
        num_computed_tokens_np=np.full(len(rows), first, dtype=np.int32),
        input_ids=torch.arange(total + padding),
    )


def test_both_runners_and_compiled_layers_read_the_same():
    first, second = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    plain = read_by_hooks([first, second])
    compiled = read_by_hooks([first, second], compiled=True)
    newer = read_by_runner(second)
    assert plain[0].keys() == plain[1].keys() == compiled[1].keys() == newer.keys() == set(TAPS)
    for tap in TAPS:
        assert torch.equal(plain[1][tap], compiled[1][tap])
        assert torch.equal(plain[1][tap], newer[tap])
        assert not torch.equal(plain[0][tap], plain[1][tap])  # each pass is read anew


def test_the_newer_runner_halts_by_its_own_batch():
    """Padded states, two requests; the flagged one alone is forced to end."""
    bundle = testbed.load_bundle()
    monitor = Monitor(bundle, slots=4, trace=0)
    (tap,) = bundle.bank.taps
    model = Namespace(
        config=LlamaConfig(num_hidden_layers=4),
        set_aux_hidden_state_layers=lambda layers: None,
    )
    runner = Namespace(get_model=lambda: model, use_aux_hidden_state_outputs=False)
    adapter = AuxiliaryRunner(runner)
    adapter._taps = {tap: 0}
    adapter.attach = lambda taps, read: setattr(adapter, "_read", read)
    watch = Watch(monitor, adapter, end_token=2)
    processor = HaltingProcessor(None, None)
    processor.watch = watch
    violated = next(p for p in bundle.bank.probes if p.name == "violated").weight
    bad = violated / violated.norm() * 1e3
    params = Namespace(extra_args=None)
    new = [Namespace(req_id=f"r{n}", prompt_token_ids=[1], sampling_params=params) for n in (0, 1)]
    for step in range(12):
        output = Namespace(
            finished_req_ids=set(),
            scheduled_new_reqs=new if step == 0 else [],
            total_num_scheduled_tokens=2,
        )
        rows = torch.stack([torch.zeros_like(bad), bad if step else bad * 0, bad, bad])
        with watch.step(output):
            runner.execute_model_state = Namespace(
                aux_hidden_states=[rows], input_batch=batch([1, 1], first=step, padding=2)
            )
        judged = watch.judge(output)()
        context = LogitsContext(*[None] * 7)
        logits = processor.apply(torch.ones(2, 180), context)
        assert torch.equal(logits[0], torch.ones(180))
    assert judged["r0"][1] != Verdict.HALT
    assert judged["r1"][1] == Verdict.HALT
    assert logits[1].argmax() == 2
    runner.execute_model_state.aux_hidden_states = None
    with pytest.raises(UnsupportedEngineError, match="returned 0 auxiliary hidden states"):
        adapter.batch(None)


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ((Tap(3, "resid_post"),), "no tap resid_post.3"),
        ((Tap(0, "resid_mid"),), r"tap resid_mid\.0"),
    ],
)
def test_taps_that_are_not_there_are_refused(taps, message):
    model = Model()
    with pytest.raises(UnsupportedEngineError, match=message):
        attach_taps(model, taps, print)
    runner = Namespace(get_model=lambda: model, use_aux_hidden_state_outputs=False)
    with pytest.raises(UnsupportedEngineError, match=message):
        AuxiliaryRunner(runner).attach(taps, print)


def test_a_seam_that_is_taken_is_refused():
    model = Model()
    model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedEngineError, match="layer 1 of Model has a hook already"):
        attach_taps(model, (Tap(1, "resid_post"),), print)
    runner = Namespace(get_model=lambda: model, use_aux_hidden_state_outputs=True)
    with pytest.raises(UnsupportedEngineError, match="something else already"):
        AuxiliaryRunner(runner).attach(TAPS, print)


def test_a_model_that_does_not_name_its_stream_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(UnsupportedEngineError, match="does not declare SupportsEagle3"):
        attach_taps(model, TAPS, print)
    runner = Namespace(get_model=lambda: model, use_aux_hidden_state_outputs=False)
    with pytest.raises(UnsupportedEngineError, match="does not declare SupportsEagle3"):
        AuxiliaryRunner(runner).attach(TAPS, print)


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_the_older_runner_with_cuda_graphs_is_refused(mode):
    compilation = Namespace(cudagraph_mode=CUDAGraphMode[mode])
    runner = Namespace(
        device=torch.device("cuda"), vllm_config=Namespace(compilation_config=compilation)
    )
    message = rf"the older model runner with CUDA graphs \({mode}\)"
    with pytest.raises(UnsupportedEngineError, match=message):
        LayerRunner(runner)
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    LayerRunner(runner)


def test_weights_of_another_model_are_not_run(monkeypatch):
    bundle = testbed.load_bundle()
    other = bundle.fingerprint.model_copy(update={"weights_sha256": "0" * 64})
    monkeypatch.setattr(module.PlatformWorker, "reload_weights", lambda self: None)
    monkeypatch.setattr(module, "_tokenizer", lambda config: None)
    monkeypatch.setattr(module, "fingerprint", lambda model, tokenizer: other)
    monkeypatch.setattr(module, "bundle_of", lambda config: bundle)
    worker = object.__new__(module.MonitoredWorker)
    worker.vllm_config = Namespace(model_config=None)
    worker.model_runner = Namespace(get_model=lambda: None)
    for call in (worker.reload_weights, lambda: worker.execute_model(None)):
        with pytest.raises(ValueError, match="wrong model: weights_sha256 is"):
            call()


def test_a_front_end_without_the_plugin_is_refused(monkeypatch):
    monkeypatch.setattr(frontend, "_policy", None)
    with pytest.raises(UnsupportedEngineError, match="did not load midstream's plugin"):
        HaltingProcessor.validate_params(SamplingParams())


def test_a_prompt_in_pieces_is_refused():
    watched = Namespace(vllm_config=Namespace(additional_config={KEY: {}}))
    with pytest.raises(VLLMValidationError, match="a prompt that comes in pieces"):
        frontend._process(print, watched, resumable=True)


@pytest.mark.parametrize("load", [_load_logitsprocs_by_fqcns, _load_v2_logitsprocs_by_fqcns])
def test_both_loaders_take_the_logits_processor(load):
    assert load([PROCESSOR]) == [HaltingProcessor]


def test_judgements_wait_for_an_output_that_is_on_its_way():
    class Later(AsyncModelRunnerOutput):
        def get_output(self):
            return ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0})

    judgement = (3, Verdict.CONTINUE, 0.1, None)
    output = _JudgedLater(Later(), lambda: {"r": judgement}).get_output()
    assert getattr(output, JUDGEMENTS) == {"r": judgement}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pipeline-parallel-size", "2"], "pipeline parallel over 2"),
        (["--scheduling-policy", "priority"], "--scheduling-policy priority"),
    ],
)
def test_a_server_that_cannot_be_watched_says_so_and_ends(options, message, tmp_path):
    """Before the engine's processes are started."""
    log = refused(Server(tmp_path, *options))
    assert any(message in line for line in log.splitlines()[-3:])
    assert "EngineCore" not in log


def test_a_bundle_for_another_model_is_refused(tmp_path):
    bundle = testbed.load_bundle()
    other = bundle.fingerprint.model_copy(update={"weights_sha256": "0" * 64})
    bundle.with_fingerprint(other).save(tmp_path / "bundle")
    log = refused(Server(tmp_path, bundle=tmp_path / "bundle"))
    assert "wrong model: weights_sha256 is" in log


def refused(server):
    """Start a server that will not have it; return what it said."""
    with pytest.raises(RuntimeError, match="the server ended at start"), server:
        pass
    return server.log.read_text()
