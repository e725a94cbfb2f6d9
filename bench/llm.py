"""A decoder of the shape of Llama 3 8B with random weights, decoding in a CUDA graph.

Plain PyTorch with a static cache; a step takes every stream one token on. Monitored, four layers
are tapped: each writes its logits with ``score`` into its columns of one buffer, and ``advance``
ends the step, in the same graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import make_tables
from timing import Block
from torch import Tensor
from torch.nn import functional as F

from midstream.kernels import ops

LEAST_MEMORY = 40 << 30  # 16 GiB of weights; 8 GiB of cache at batch 256; twice, and logits


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the monitor."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    inner: int = 14336
    vocabulary: int = 128256
    context: int = 256
    taps: tuple[int, ...] = (8, 16, 24, 31)
    probes_per_tap: int = 2

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads


class Decoder:
    """Random weights, and graphs of one decoding step with and without the monitor."""

    def __init__(
        self,
        shape: Shape | None = None,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.shape = s = shape or Shape()
        self.device, self.dtype = device, dtype
        torch.manual_seed(0)
        self.embedding = self._random(s.vocabulary, s.width)
        self.unembedding = self._random(s.vocabulary, s.width)
        self.gain = torch.ones(s.width, device=device, dtype=dtype)
        kv = s.kv_heads * s.head
        self.layers = [
            (
                self._random(s.width + 2 * kv, s.width),
                self._random(s.width, s.width),
                self._random(2 * s.inner, s.width),
                self._random(s.width, s.inner),
            )
            for _ in range(s.layers)
        ]
        halves = torch.arange(0, s.head, 2, device=device) / s.head
        angles = torch.arange(s.context, device=device)[:, None] / 500000.0**halves
        self.cos, self.sin = angles.cos(), angles.sin()
        # Fused as an engine would: what is slow without need would hide what watching costs.
        self._layer = torch.compile(layer, dynamic=False) if device == "cuda" else layer

    def _random(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype).normal_(std=0.02)

    def step(self, run: Run) -> None:
        """Take every stream one token on; greedy."""
        s = self.shape
        at = run.position[:1].long()  # all streams stand at the same place
        turn = self.cos.index_select(0, at), self.sin.index_select(0, at)
        seen = (run.places <= at).expand(1, 1, s.heads // s.kv_heads, -1)
        x = self.embedding[run.token]
        for index, weights in enumerate(self.layers):
            x = self._layer(x, self.gain, weights, run.cache[index], turn, at, seen)
            if index in run.scores:
                score, out = run.scores[index]
                score(x, out)
        if run.advance is not None:
            run.advance(run.logits, run.slot, run.position)
        last = F.rms_norm(x, (s.width,), self.gain, 1e-5)
        run.token.copy_(F.linear(last, self.unembedding).argmax(dim=1))
        run.position.add_(1)

    def blocks(self, batch: int) -> dict[str, Block]:
        """Return ``plain`` and ``monitored``: each a graph of one step, replayed 8 times a block.

        Both start each block at position 0, so that they attend to the same places.
        """
        cache = [
            tuple(
                torch.zeros(
                    batch,
                    self.shape.kv_heads,
                    self.shape.context,
                    self.shape.head,
                    device=self.device,
                    dtype=self.dtype,
                )
                for _ in range(2)
            )
            for _ in range(self.shape.layers)
        ]
        return {
            "plain": self._block(Run(self, batch, cache, monitored=False)),
            "monitored": self._block(Run(self, batch, cache, monitored=True)),
        }

    def _block(self, run: Run, steps: int = 8) -> Block:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(run)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        run.rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step(run)

        def replay() -> None:
            for _ in range(steps):
                graph.replay()

        return Block(replay, steps, run.rewind)


class Run:
    """What a batch of streams keeps from step to step."""

    def __init__(
        self, decoder: Decoder, batch: int, cache: list[tuple[Tensor, ...]], *, monitored: bool
    ) -> None:
        s, device = decoder.shape, decoder.device
        self.batch, self.cache = batch, cache
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(batch, dtype=torch.int32, device=device)
        self.places = torch.arange(s.context, device=device)
        self.slot = torch.arange(batch, dtype=torch.int32, device=device)
        probes = len(s.taps) * s.probes_per_tap
        self.tables = make_tables(batch, probes, device)
        self.logits = torch.zeros(batch, probes, device=device)
        self.scores = {}
        self.advance = None
        if not monitored:
            return
        backend = ops.Backend(device)
        for turn, layer in enumerate(s.taps):
            weight = decoder._random(s.probes_per_tap, s.width)
            score = backend.bind_score(weight, torch.zeros(s.probes_per_tap, device=device))
            columns = slice(turn * s.probes_per_tap, (turn + 1) * s.probes_per_tap)
            self.scores[layer] = (score, self.logits[:, columns])
        self.advance = backend.bind_advance(*self.tables)

    def rewind(self) -> None:
        """Begin again, with all tables as they are but for the positions."""
        self.position.zero_()
        self.tables.slots.position.zero_()


def layer(
    x: Tensor,
    gain: Tensor,
    weights: tuple[Tensor, ...],
    cache: tuple[Tensor, ...],
    turn: tuple[Tensor, Tensor],
    at: Tensor,
    seen: Tensor,
) -> Tensor:
    """One block. Query heads that share keys stand as rows of one head: their mask is the same."""
    into_qkv, out_of_heads, into_mlp, out_of_mlp = weights
    keys, values = cache
    (batch, width), (kv_heads, head) = x.shape, (keys.shape[1], keys.shape[3])
    kv = kv_heads * head
    normed = F.rms_norm(x, (width,), gain, 1e-5)
    q, k, v = F.linear(normed, into_qkv).split([width, kv, kv], dim=1)
    keys.index_copy_(2, at, _rotate(k.view(batch, kv_heads, 1, head), *turn))
    values.index_copy_(2, at, v.view(batch, kv_heads, 1, head))
    q = _rotate(q.view(batch, kv_heads, -1, head), *turn)
    heads = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    x = x + F.linear(heads.reshape(batch, width), out_of_heads)
    gate, up = F.linear(F.rms_norm(x, (width,), gain, 1e-5), into_mlp).chunk(2, dim=1)
    return x + F.linear(F.silu(gate) * up, out_of_mlp)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of each head by the position's angles."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
