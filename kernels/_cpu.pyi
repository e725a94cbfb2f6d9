"""C++ CPU backend: tensors are read and checked in C++. See csrc/python/bindings.cpp.

A call answers False, having changed nothing, where an argument is not as :mod:`.checks` demands.
"""

from collections.abc import Sequence

from torch import Tensor

MAX_STATES: int

def isa() -> str:
    """Instruction set in use: generic, avx2, avx512, avx512bf16 or amx."""

def detected_isa() -> str:
    """Widest instruction set this machine can run."""

def set_isa_cap(name: str) -> None:
    """Bind with at most this instruction set from now on, whatever MIDSTREAM_CPU_ISA says."""

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
    def advance(self, logits: Tensor, slot: Tensor, position: Tensor) -> bool:
        """Fold the rows."""

class Probes:
    """The probes of one tap, their weights copied."""

    def __init__(
        self,
        weight: int,
        weight_dtype: int,
        bias: int,
        probes: int,
        width: int,
        rms_norm: bool,
        eps: float,
    ) -> None: ...
    def score(self, hidden: Tensor, out: Tensor) -> bool:
        """Write the logits of the rows."""

    def score_advance(
        self, tables: Tables, hidden: Tensor, logits: Tensor, slot: Tensor, position: Tensor
    ) -> bool:
        """Score the rows and fold them."""

    def add_rms_norm_score(
        self, x: Tensor, residual: Tensor, gamma: Tensor, norm_eps: float, out: Tensor
    ) -> bool:
        """Add, score and normalise."""
