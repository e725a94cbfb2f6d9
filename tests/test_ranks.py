"""Two ranks on the CPU: tensor parallel verdicts, ranks that disagree, ranks that die, replicas.

Every rank is a process of its own. Tensor parallel is real: heads and neurons are split, and each
block ends in an all-reduce, so that the residual stream is the same on both ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import toy
import turn_cases
import yaml
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from midstream.bank import Probe
from midstream.engines import hf
from midstream.engines.ranks import Agreement, OtherStageError, RankLostError, check_last_stage
from midstream.kernels.tables import Verdict
from midstream.ledger.open import open_ledger
from midstream.monitor import Monitor
from midstream.taps import Tap, attach_taps
from midstream.turns import TurnGate

RANKS = 2
WAIT = timedelta(seconds=5)
TAP = Tap(1, "resid_pre")  # behind the all-reduces of the first layer


def on_two_ranks(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Run ``work(rank, *args)`` on both ranks; return what each returned."""
    context = mp.spawn(_run, (work, str(folder), *args), nprocs=RANKS, join=False)
    deadline = time.monotonic() + 600
    while not context.join(timeout=5):
        assert time.monotonic() < deadline, "the ranks hang"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _run(rank: int, work: Callable[..., Any], folder: str, *args: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=WAIT * 12)
    torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


class TensorParallelLayer(nn.Module):
    """A rank's share of a Llama layer: columns of what goes in, rows of what comes out."""

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        self.layer = layer
        attn, mlp = layer.self_attn, layer.mlp
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight = nn.Parameter(linear.weight.chunk(RANKS, 0)[rank].clone())
        for linear in (attn.o_proj, mlp.down_proj):
            linear.weight = nn.Parameter(linear.weight.chunk(RANKS, 1)[rank].clone())

    def forward(self, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        x, attn = self.layer.input_layernorm(hidden_states), self.layer.self_attn
        q, k, v = (
            linear(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        hidden = hidden_states + self._reduce(attn.o_proj(out.transpose(1, 2).flatten(2)))
        return hidden + self._reduce(self.layer.mlp(self.layer.post_attention_layernorm(hidden)))

    @staticmethod
    def _reduce(part: Tensor) -> Tensor:
        dist.all_reduce(part)
        return part


class TensorParallelLlama(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        lm = toy.new_model()
        self.config = lm.config
        self.embed_tokens, self.rotary = lm.model.embed_tokens, lm.model.rotary_emb
        self.layers = nn.ModuleList(TensorParallelLayer(layer, rank) for layer in lm.model.layers)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed_tokens(ids)
        angles = self.rotary(hidden, torch.arange(ids.shape[1])[None])
        for layer in self.layers:
            hidden = layer(hidden, angles)
        return hidden


def random_probe() -> Probe:
    """One whose logits lie on both sides of the chain's edge at 5, some of them close to it."""
    generator = torch.Generator().manual_seed(3)
    weight = 3 * torch.randn(32, generator=generator)
    return Probe(name="any", hazard="any", tap=TAP, weight=weight, bias=-33.63)


@dataclass
class Watched:
    """What a rank saw."""

    hidden: Tensor
    table: list[Tensor]
    verdicts: Tensor  # after every step [steps, S]


def sentences(count: int = 12, length: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(5, 24, (count, length), generator=generator)


def watch(rank: int, groups: list[list[int]], agree: bool, noise: float = 0.0) -> Watched:
    """Feed the sentences token by token, streams packed in ``groups``; judge each step."""
    monitor = toy.monitor(slots=12, probes=[random_probe()])
    model = TensorParallelLlama(rank)
    ids, seen = sentences(), []
    attach_taps(model, [TAP], lambda tap, hidden: seen.append(hidden))
    model(ids)
    hidden = seen[0]
    if noise and rank == 1:
        generator = torch.Generator().manual_seed(9)
        hidden = hidden * (1 + noise * torch.randn(hidden.shape, generator=generator))
    agreement = Agreement(monitor.slots, dist.group.WORLD, timeout=WAIT * 12) if agree else None
    for i in range(len(ids)):
        monitor.admit(f"s{i}", 1)
    verdicts = []
    for at in range(ids.shape[1]):
        for group in groups:
            rows = torch.tensor(group, dtype=torch.int32)
            monitor.observe(TAP, hidden[group, at])
            monitor.advance(rows, torch.full_like(rows, at))
            if agreement is not None:
                agreement()
        verdicts.append(monitor.slots.verdict.clone())
    return Watched(hidden, monitor.slots.tensors(), torch.stack(verdicts))


def all_streams(rank: int) -> Watched:
    return watch(rank, [list(range(12))], agree=False)


def streams_in_other_batches(rank: int) -> Watched:
    groups = [[list(range(12))], [[7, 0, 3], [1], [11, 10, 9, 8, 6, 5, 4, 2]]][rank]
    return watch(rank, groups, agree=False)


@pytest.mark.parametrize("work", [all_streams, streams_in_other_batches])
def test_ranks_of_a_tensor_parallel_model_decide_alike_bit_for_bit(
    tmp_path: Path, work: Any
) -> None:
    one, two = on_two_ranks(work, tmp_path)
    assert torch.equal(one.hidden, two.hidden)
    halted = (one.verdicts[-1] == Verdict.HALT).sum()
    assert 2 <= halted <= 9
    assert torch.equal(one.verdicts, two.verdicts)
    for mine, theirs in zip(one.table, two.table, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def test_a_tensor_parallel_model_is_judged_as_the_whole_one(tmp_path: Path) -> None:
    split = on_two_ranks(all_streams, tmp_path)[0]
    lm, seen = toy.model(), []
    with attach_taps(lm, [TAP], lambda tap, hidden: seen.append(hidden)), torch.no_grad():
        lm(sentences())
    torch.testing.assert_close(split.hidden, seen[0])


NOISE = 2.0**-8
"""Relative: what rounding to bf16 once more may change."""


def perturbed(rank: int, agree: bool) -> Watched:
    return watch(rank, [list(range(12))], agree, NOISE)


def test_ranks_whose_residuals_differ_disagree_unless_one_of_them_decides(tmp_path: Path) -> None:
    folders = [tmp_path / "alone", tmp_path / "agreed"]
    for folder in folders:
        folder.mkdir()
    alone = on_two_ranks(perturbed, folders[0], False)
    assert not torch.equal(alone[0].verdicts, alone[1].verdicts)
    agreed = on_two_ranks(perturbed, folders[1], True)
    assert torch.equal(agreed[0].verdicts, agreed[1].verdicts)
    assert torch.equal(agreed[0].verdicts, alone[0].verdicts)  # rank 0 decides as it would alone


def dies(rank: int, which: int, how: str) -> tuple[str, float] | None:
    monitor = toy.monitor()
    Agreement(monitor.slots, dist.group.WORLD, timeout=WAIT * 12)()  # once both are there
    agree = Agreement(monitor.slots, dist.group.WORLD, timeout=WAIT)
    dist.barrier()
    start = time.monotonic()
    if rank == which:
        if how == "hangs":
            time.sleep(4 * WAIT.total_seconds())
        else:
            dist.destroy_process_group()
        return None
    try:
        while time.monotonic() < start + 3 * WAIT.total_seconds():
            agree()  # the rank that decides may send some into the void
            time.sleep(0.01)
    except RankLostError as error:
        return str(error), time.monotonic() - start
    return "nobody missed it", time.monotonic() - start


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_decides_and_is_lost_stops_the_others_in_time(tmp_path: Path, how: str) -> None:
    outcome = on_two_ranks(dies, tmp_path, 0, how)[1]
    message, waited = outcome
    assert "got no verdicts from rank 0" in message
    assert waited < 4 * WAIT.total_seconds()


def test_taps_of_other_pipeline_stages_are_refused() -> None:
    check_last_stage([Tap(4, "resid_pre"), Tap(7, "resid_post")], first_layer=4)
    with pytest.raises(OtherStageError, match=r"begins at layer 4 and never sees resid_post\.3"):
        check_last_stage([Tap(3, "resid_post"), Tap(7, "resid_post")], first_layer=4)


def pipeline(rank: int) -> Tensor | None:
    """Two stages of one layer each: the last one reads, judges, and would sample."""
    lm, ids = toy.new_model(), sentences()
    hidden = lm.model.embed_tokens(ids).detach()
    angles = lm.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    monitor = toy.monitor(slots=12, probes=[random_probe()])
    if rank == 0:
        with torch.no_grad():
            first = lm.model.layers[0](hidden, position_embeddings=angles)
        dist.send(first.contiguous(), 1)
        return None
    check_last_stage(monitor.bank.taps, first_layer=1)
    dist.recv(hidden, 0)
    lm.config.num_hidden_layers = 1  # of this stage
    stage = nn.Module()
    stage.config, stage.layers = lm.config, nn.ModuleList([lm.model.layers[1]])
    local = {Tap(0, "resid_pre"): TAP}
    attach_taps(stage, list(local), lambda tap, rows: monitor.observe(local[tap], rows))
    for i in range(len(ids)):
        monitor.admit(f"s{i}", 1)
    with torch.no_grad():
        stage.layers[0](hidden, position_embeddings=angles)
    slot = torch.arange(12, dtype=torch.int32).repeat_interleave(ids.shape[1])
    monitor.advance(slot, torch.arange(ids.shape[1], dtype=torch.int32).repeat(12))
    return monitor.slots.halted_at


def test_the_last_pipeline_stage_judges_as_one_process_would(tmp_path: Path) -> None:
    got = on_two_ranks(pipeline, tmp_path)[1]
    lm, ids = toy.model(), sentences()
    monitor = toy.monitor(lm, slots=12, probes=[random_probe()])
    for i in range(len(ids)):
        monitor.admit(f"s{i}", 1)
    with attach_taps(lm, [TAP], monitor.observe), torch.no_grad():
        lm(ids)
    slot = torch.arange(12, dtype=torch.int32).repeat_interleave(ids.shape[1])
    monitor.advance(slot, torch.arange(ids.shape[1], dtype=torch.int32).repeat(12))
    assert torch.equal(got, monitor.slots.halted_at)
    assert 2 <= int((got >= 0).sum()) <= 9


def converse(ledger: str, mine: Callable[[int], bool], share: Callable[..., str]) -> list[Any]:
    """Answer those turns of one conversation that come to this replica; return what was decided."""
    lm, bundle = toy.new_model(), turn_cases.bundle()
    monitor = Monitor(bundle, slots=1)
    gate = TurnGate(bundle, open_ledger(ledger))
    messages = [{"role": "user", "content": "w5 w6"}]
    decisions = []
    for turn in range(4):
        text = None
        if mine(turn):
            torch.manual_seed(turn)
            options = {"gate": gate, "conversation": "c", "max_new_tokens": 8, "do_sample": True}
            options["sequence_bias"] = {(toy.BAD,): 2.0}  # so that some turns open a seal
            events = list(hf.stream(lm, toy.tokenizer(), messages, monitor, **options))
            text = "".join(event.text or "" for event in events if event.type == "released")
            decisions += [(turn, e.verdict, e.risk) for e in events if e.type == "verdict"]
            decisions += [(turn, e.verdict, e.risk) for e in events if e.type == "halted"]
        messages += [
            {"role": "assistant", "content": share(turn, text)},
            {"role": "user", "content": "w7"},
        ]
    return decisions


def replica(rank: int, ledger: str) -> list[Any]:
    def share(turn: int, text: str | None) -> str:
        shared = [text]
        dist.broadcast_object_list(shared, src=turn % RANKS)  # the client carries the messages
        return str(shared[0])

    return converse(ledger.format(rank=rank), lambda turn: turn % RANKS == rank, share)


def test_replicas_that_share_a_ledger_decide_turns_as_one_would(tmp_path: Path) -> None:
    def alone(turn: int, text: str | None) -> str:
        return str(text)

    decided = {}
    for name in ("shared", "apart{rank}"):
        folder = tmp_path / name
        folder.mkdir()
        one, two = on_two_ranks(replica, folder, f"{tmp_path}/{name}.db")
        decided[name] = one + two
    one = converse(f"{tmp_path}/one.db", lambda turn: True, alone)
    assert {verdict for _, verdict, _ in one} == {"CONTINUE", "HALT"}
    assert sorted(decided["shared"]) == sorted(one)
    assert sorted(decided["apart{rank}"]) != sorted(one)  # the ledger is what carries it over


EXAMPLE = Path(__file__).parents[1] / "docs" / "ray_serve.yaml"


def test_the_example_for_ray_has_the_shape_and_the_names_of_the_vllm_plugin() -> None:
    deployed = yaml.safe_load(EXAMPLE.read_text())
    (application,) = deployed["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (config,) = application["args"]["llm_configs"]
    assert set(config) == {"model_loading_config", "deployment_config", "engine_kwargs"}
    engine = config["engine_kwargs"]
    settings = pytest.importorskip("midstream.engines.vllm.settings")
    assert engine["worker_cls"] == settings.WORKER
    assert engine["scheduler_cls"] == settings.SCHEDULER
    assert engine["logits_processors"] == [settings.PROCESSOR]
    assert set(engine["additional_config"]) == {settings.KEY}
    assert os.path.isabs(engine["additional_config"][settings.KEY]["bundle"])
