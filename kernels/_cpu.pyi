"""C++ CPU backend: bindings on raw addresses. See csrc/python/bindings.cpp."""

from collections.abc import Sequence

MAX_STATES: int

def isa() -> str:
    """Instruction set in use: generic, avx2 or avx512."""

def detected_isa() -> str:
    """Widest instruction set this machine can run."""

def set_isa_cap(name: str) -> None:
    """Use at most this instruction set from now on, whatever MIDSTREAM_CPU_ISA says."""

class Probes:
    """The probes of one tap."""

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
    def score(
        self,
        hidden: int,
        hidden_dtype: int,
        rows: int,
        hidden_stride: int,
        out: int,
        out_stride: int,
    ) -> None:
        """Write the logits of `rows` rows."""

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
        self, logits: int, logits_stride: int, slot: int, position: int, count: int
    ) -> None:
        """Fold `count` rows."""
