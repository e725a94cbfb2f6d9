"""CUDA backend: bindings on raw device addresses. See csrc/python/cuda_bindings.cpp."""

from collections.abc import Sequence

PACK_PROBES: int
PACK_WIDTH: int

def load() -> None:
    """Load all kernels onto the current device, which a graph capture may not do."""

def fits(sizes: Sequence[int]) -> bool:
    """Whether advance has the shared memory for tables of these sizes."""

def fits_score_advance(sizes: Sequence[int]) -> bool:
    """Whether score_advance has the shared memory for tables of these sizes."""

def score_warps(width: int, columns: int) -> int:
    """See launch.h."""

def rows_per_block(rows: int, most: int) -> int:
    """See launch.h."""

def advance_threads(rows: int) -> int:
    """See launch.h."""

def advance_chunk(sizes: Sequence[int], most: int, limit: int) -> int:
    """See launch.h."""

def norm_tile(rows: int, most: int, width: int, size: int, limit: int) -> list[int]:
    """See launch.h: rows per block and numbers from row to row."""

class Tables:
    """Addresses and sizes of all tables of a monitor."""

    def __init__(
        self,
        sizes: Sequence[int],
        slots: Sequence[int],
        evidence: Sequence[int],
        chain: Sequence[int],
        policy: Sequence[int],
    ) -> None: ...
    def advance(
        self,
        logits: int,
        logits_stride: int,
        slot: int,
        position: int,
        count: int,
        cuda_stream: int,
    ) -> None:
        """Fold `count` rows."""

class Probes:
    """The packed probes of one tap."""

    def __init__(
        self,
        bfloat16: int,
        bfloat16_parts: int,
        float16: int,
        float32: int,
        bias: int,
        probes: int,
        width: int,
        rms_norm: bool,
        eps: float,
    ) -> None: ...
    def score(
        self,
        hidden: int,
        dtype: int,
        rows: int,
        stride: int,
        out: int,
        out_stride: int,
        cuda_stream: int,
    ) -> None:
        """Write the logits of `rows` rows."""

    def score_advance(
        self,
        tables: Tables,
        hidden: int,
        dtype: int,
        count: int,
        stride: int,
        logits: int,
        logits_stride: int,
        slot: int,
        position: int,
        cuda_stream: int,
    ) -> None:
        """Score `count` rows and fold them."""

    def add_rms_norm_score(
        self,
        x: int,
        x_stride: int,
        residual: int,
        residual_stride: int,
        gamma: int,
        dtype: int,
        count: int,
        norm_eps: float,
        out: int,
        out_stride: int,
        cuda_stream: int,
    ) -> None:
        """Add, normalise and score `count` rows."""
