"""A small engine with SGLang's seams, where the real one cannot run.

Written after SGLang's documentation and sources (``forward_hooks.md``, ``hook_manager.py``,
``forward_batch_info.py``, ``sampler.py``, ``schedule_batch.py``, ``models/llama.py``): packed rows,
layers that pass on a pair to be added, hooks by module name whose misses only warn, custom logit
processors out of requests, a radix cache, chunked and mixed prefill, retraction, and the overlap
scheduler, which launches a step before the host knows what the one before it sampled.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib
import json
import pickle
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ForwardMode = IntEnum("ForwardMode", "EXTEND DECODE MIXED IDLE TARGET_VERIFY")


@dataclass
class ServerArgs:
    model_path: str = "toy"
    tokenizer_path: str | None = None
    device: str = "cpu"
    tp_size: int = 1
    pp_size: int = 1
    disable_cuda_graph: bool = True
    enable_custom_logit_processor: bool = True
    enable_torch_compile: bool = False
    speculative_algorithm: str | None = None
    enable_dp_attention: bool = False
    enable_two_batch_overlap: bool = False
    enable_lora: bool | None = None
    disaggregation_mode: str = "null"
    max_running_requests: int | None = 8
    forward_hooks: list[dict[str, Any]] = field(default_factory=list)
    # of the stand-in's scheduler
    chunked_prefill_size: int = 1 << 20
    enable_mixed_chunk: bool = False
    disable_overlap_schedule: bool = True


def install(monkeypatch: Any, args: ServerArgs) -> None:
    """Let ``sglang`` be importable, as far as the adapter imports it."""
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    context: Any = types.ModuleType("sglang.srt.runtime_context")
    context.get_server_args = lambda: args
    monkeypatch.setitem(sys.modules, context.__name__, context)


def register_forward_hooks(model: nn.Module, specs: Sequence[dict[str, Any]]) -> None:
    for spec in specs:
        module, _, function = spec["hook_factory"].partition(":")
        hook = getattr(importlib.import_module(module), function)(spec.get("config") or {})
        for name, target in model.named_modules():
            if any(fnmatch.fnmatch(name, pattern) for pattern in spec["target_modules"]):
                if spec.get("hook_type", "forward") == "forward_pre":
                    with_kwargs = spec.get("with_kwargs", False)
                    target.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
                else:
                    target.register_forward_hook(hook)


class RMSNorm(nn.Module):
    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is not None:
            residual.add_(x)  # in place, as the fused kernel does it
            x.copy_(self._norm(residual))
            return x, residual
        return self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class DecoderLayer(nn.Module):
    def __init__(self, layer: Any, index: int, rotary: Any) -> None:
        super().__init__()
        eps = layer.input_layernorm.variance_epsilon
        self.input_layernorm = RMSNorm(layer.input_layernorm.weight, eps)
        self.post_attention_layernorm = RMSNorm(layer.post_attention_layernorm.weight, eps)
        self.attn, self.mlp = layer.self_attn, layer.mlp
        self.index = index
        self.rotary = rotary

    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        forward_batch: ForwardBatch,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden_states.clone()
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.attend(positions, hidden_states, forward_batch)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual

    def attend(self, positions: Tensor, x: Tensor, batch: ForwardBatch) -> Tensor:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        d = self.attn.head_dim
        q, k, v = (
            projection(x).view(1, len(x), -1, d).transpose(1, 2)
            for projection in (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *self.rotary(x, positions[None]))
        out, start = [], 0
        for req, rows in zip(batch.kv_owners, batch.rows, strict=True):
            part = slice(start, start + rows)
            start += rows
            held = req.kv[self.index]
            first = int(positions[part][0])  # the cache holds what is before
            held[:] = [torch.cat([old[:, :first], new[0, :, part]], 1) for old, new in
                       zip(held, (k, v), strict=True)]  # fmt: skip
            total = first + rows
            mask = torch.ones(rows, total, dtype=torch.bool).tril(total - rows)
            attended = F.scaled_dot_product_attention(
                q[:, :, part], held[0][None], held[1][None], attn_mask=mask, enable_gqa=True
            )
            out.append(attended[0].transpose(0, 1).flatten(1))
        return self.attn.o_proj(torch.cat(out))


class Decoder(nn.Module):
    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.config = copy.deepcopy(lm.config)
        self.config.architectures = [type(lm).__name__]  # as a checkpoint's config says it
        self.embed_tokens = lm.model.embed_tokens
        self.layers = nn.ModuleList(
            DecoderLayer(layer, i, lm.model.rotary_emb) for i, layer in enumerate(lm.model.layers)
        )
        self.norm = RMSNorm(lm.model.norm.weight, lm.model.norm.variance_epsilon)

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch) -> Tensor:
        hidden, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, forward_batch, residual)
        return self.norm(hidden, residual)[0]


@dataclass
class LogitsProcessorOutput:
    next_token_logits: Tensor


class LogitsProcessor(nn.Module):
    def forward(
        self, input_ids: Tensor, hidden: Tensor, lm_head: nn.Linear, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        last = torch.tensor(forward_batch.rows).cumsum(0) - 1
        return LogitsProcessorOutput(lm_head(hidden[last]))


class CausalLM(nn.Module):
    """Of the weights of a transformers Llama."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.config = lm.config
        self.model = Decoder(lm)
        self.lm_head = lm.lm_head
        self.logits_processor = LogitsProcessor()

    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch) -> Any:
        hidden = self.model(input_ids, positions, forward_batch)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)


@dataclass
class SamplingParams:
    max_new_tokens: int = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    custom_params: dict[str, Any] | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: int = 0


def gumbel(seed: int, position: int, vocabulary: int) -> Tensor:
    """Noise that makes the likeliest token a sample: the same for a seed and a position."""
    generator = torch.Generator().manual_seed(1000 * seed + position)
    return -torch.empty(vocabulary).exponential_(generator=generator).log()


class Finish:
    def __init__(self, **content: Any) -> None:
        self.content = content

    def to_json(self) -> dict[str, Any]:
        return self.content


class Req:
    def __init__(self, rid: str, ids: Sequence[int], body: dict[str, Any], eos: int) -> None:
        self.rid = rid
        self.origin_input_ids = list(ids)
        self.output_ids: list[int] = []
        self.sampling_params = SamplingParams(**body.get("sampling_params", {}))
        self.custom_logit_processor = body.get("custom_logit_processor")
        if self.custom_logit_processor is not None:
            params = self.sampling_params.custom_params or {}
            self.sampling_params.custom_params = {**params, "__req__": self}
        self.finished_reason: Finish | None = None
        self.eos = eos
        self.prefix = 0  # tokens whose keys and values are there
        self.kv: list[list[Tensor]] = []
        self.next_id: Tensor | None = None  # sampled, maybe not known to the host yet

    def finished(self) -> bool:
        return self.finished_reason is not None

    def check_finished(self) -> None:
        params, last = self.sampling_params, self.output_ids[-1]
        if len(self.output_ids) >= params.max_new_tokens:
            self.finished_reason = Finish(type="length", length=params.max_new_tokens)
        elif not params.ignore_eos and last in [self.eos, *(params.stop_token_ids or ())]:
            self.finished_reason = Finish(type="stop", matched=last)


@dataclass
class SamplingBatchInfo:
    temperatures: Tensor
    custom_params: list[Any] | None
    custom_logit_processor: dict[int, tuple[Any, Tensor]] | None

    def __len__(self) -> int:
        return len(self.temperatures)

    @classmethod
    def of(cls, reqs: list[Req]) -> SamplingBatchInfo:
        masks: dict[str, Tensor] = {}
        for i, req in enumerate(reqs):
            if req.custom_logit_processor is not None:
                mask = masks.setdefault(
                    req.custom_logit_processor, torch.zeros(len(reqs), dtype=torch.bool)
                )
                mask[i] = True
        temperatures = torch.ones(len(reqs), 1)
        if not masks:
            return cls(temperatures, None, None)
        processors = {
            hash(text): (pickle.loads(bytes.fromhex(json.loads(text)["callable"]))(), mask)
            for text, mask in masks.items()
        }
        return cls(temperatures, [r.sampling_params.custom_params for r in reqs], processors)


@dataclass
class ForwardBatch:
    forward_mode: Any
    input_ids: Tensor
    positions: Tensor
    extend_seq_lens_cpu: list[int] | None
    extend_prefix_lens_cpu: list[int] | None
    sampling_info: SamplingBatchInfo
    kv_owners: list[Req]
    rows: list[int]


class Engine:
    """Scheduler and model runner in one."""

    def __init__(self, lm: Any, args: ServerArgs) -> None:
        self.args = args
        self.model = CausalLM(lm).eval()
        self.blank = [
            [torch.empty(lm.config.num_key_value_heads, 0, lm.model.layers[0].self_attn.head_dim)]
            * 2
        ] * lm.config.num_hidden_layers
        self.waiting: list[Req] = []
        self.running: list[Req] = []
        self.radix: dict[tuple[int, ...], list[list[Tensor]]] = {}
        self.pending: tuple[list[tuple[Req, bool]], Tensor] | None = None
        self.modes: list[str] = []
        self.prefix_hits = 0
        self.replays = False  # a decode graph was captured, and its replay runs no hooks
        register_forward_hooks(self.model, args.forward_hooks)

    def add(self, rid: str, ids: Sequence[int], body: dict[str, Any]) -> Req:
        req = Req(rid, ids, body, self.model.config.eos_token_id)
        self.waiting.append(req)
        return req

    def retract(self, req: Req) -> None:
        """Take a running request's memory; it waits to be computed again."""
        assert self.args.disable_overlap_schedule
        self.running.remove(req)
        req.prefix, req.kv = 0, []
        self.waiting.insert(0, req)

    def run(self, steps: int = 1000) -> None:
        for _ in range(steps):
            if not self.step():
                return

    @torch.no_grad()
    def step(self) -> bool:
        self.running = [req for req in self.running if not req.finished()]
        batch = self._prefill() or self._decode()
        launched = None
        if batch is not None:
            launched = self._launch(*batch)
        if not self.args.disable_overlap_schedule:
            launched, self.pending = self.pending, launched  # the host is one step behind
        if launched is not None:
            self._process(*launched)
        return batch is not None or self.pending is not None

    def idle(self) -> None:
        """A pass without rows, beside ranks that have some."""
        none = torch.empty(0, dtype=torch.long)
        batch = ForwardBatch(
            ForwardMode.IDLE, none, none, None, None, SamplingBatchInfo.of([]), [], []
        )
        for hook in self.model.model._forward_pre_hooks.values():
            hook(self.model.model, (none, none, batch), {})

    def _prefill(self) -> Any:
        room = self.args.max_running_requests - len(self.running)
        budget = self.args.chunked_prefill_size
        chosen: list[tuple[Req, list[int], int]] = []
        for req in list(self.waiting)[:room]:
            ids = req.origin_input_ids + req.output_ids
            if req.prefix == 0:
                self._match(req, ids)
            take = min(len(ids) - req.prefix, budget)
            if take == 0:
                break
            budget -= take
            chosen.append((req, ids[req.prefix : req.prefix + take], len(ids)))
        if not chosen:
            return None
        mode = ForwardMode.EXTEND
        reqs = [(req, req.prefix + len(ids) == total) for req, ids, total in chosen]
        parts = [torch.tensor(ids) for _, ids, _ in chosen]
        prefixes = [req.prefix for req, _, _ in chosen]
        for req, ids, total in chosen:
            req.prefix += len(ids)
            if req.prefix == total:
                self.waiting.remove(req)
        if self.args.enable_mixed_chunk and self.running:
            mode = ForwardMode.MIXED
            for req in self.running:
                reqs.append((req, True))
                parts.append(req.next_id.view(1))
                prefixes.append(req.prefix)
                req.prefix += 1
        self.running += [req for req, whole in reqs if whole and req not in self.running]
        return mode, reqs, parts, prefixes

    def _decode(self) -> Any:
        if not self.running:
            return None
        reqs = [(req, True) for req in self.running]
        prefixes = [req.prefix for req in self.running]
        for req in self.running:
            req.prefix += 1
        return ForwardMode.DECODE, reqs, [req.next_id.view(1) for req, _ in reqs], prefixes

    def _launch(self, mode: Any, reqs: Any, parts: Any, prefixes: Any) -> Any:
        self.modes.append(mode.name)
        owners = [req for req, _ in reqs]
        for req in owners:
            req.kv = req.kv or [list(layer) for layer in self.blank]
        rows = [len(part) for part in parts]
        positions = torch.cat([torch.arange(p, p + n) for p, n in zip(prefixes, rows, strict=True)])
        extend = mode is not ForwardMode.DECODE
        batch = ForwardBatch(
            mode,
            torch.cat(parts),
            positions,
            rows if extend else None,
            prefixes if extend else None,
            SamplingBatchInfo.of(owners),
            owners,
            rows,
        )
        hooks = [(m, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in
                 self.model.modules()]  # fmt: skip
        if self.replays and mode is ForwardMode.DECODE:
            for module, *_ in hooks:
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
        # The model runner calls forward itself, so hooks on the root never fire.
        logits = self.model.forward(batch.input_ids, positions, batch).next_token_logits
        for module, after, before in hooks:
            module._forward_hooks.update(after)
            module._forward_pre_hooks.update(before)
        for i, req in enumerate(owners):
            for token, bias in (req.sampling_params.logit_bias or {}).items():
                logits[i, int(token)] += bias
        info = batch.sampling_info
        for processor, mask in (info.custom_logit_processor or {}).values():
            chosen = mask.nonzero(as_tuple=True)[0]
            logits[mask] = processor(logits[mask], [info.custom_params[i] for i in chosen])
        seeds = [req.sampling_params.sampling_seed for req in owners]
        ends = [p + n for p, n in zip(prefixes, rows, strict=True)]
        noise = [gumbel(seed, end, logits.shape[1]) for seed, end in zip(seeds, ends, strict=True)]
        sampled = (logits + torch.stack(noise)).argmax(-1)
        for req, token in zip(owners, sampled, strict=True):
            req.next_id = token
        self.logits = logits
        return reqs, sampled

    def _process(self, reqs: list[tuple[Req, bool]], sampled: Tensor) -> None:
        for (req, whole), token in zip(reqs, sampled.tolist(), strict=True):
            if whole and not req.finished():
                if not req.output_ids:
                    self._cache(req)
                req.output_ids.append(token)
                req.check_finished()
                if req.finished():
                    self._cache(req)

    def _cache(self, req: Req) -> None:
        ids = (req.origin_input_ids + req.output_ids)[: req.kv[0][0].shape[1]]
        self.radix[tuple(ids)] = [[t[:, : len(ids)] for t in layer] for layer in req.kv]

    def _match(self, req: Req, ids: list[int]) -> None:
        best, found = 0, None
        for known, kv in self.radix.items():
            same = 0
            while same < min(len(known), len(ids) - 1) and known[same] == ids[same]:
                same += 1
            if same > best:
                best, found = same, kv
        if found is not None:
            self.prefix_hits += 1
            req.prefix = best
            req.kv = [[t[:, :best] for t in layer] for layer in found]
