"""The Triton backend: its four bindings, each from the module of its kernel."""

from midstream.kernels.triton_advance import bind_advance, bind_score_advance
from midstream.kernels.triton_norm import bind_add_rms_norm_score
from midstream.kernels.triton_score import bind_score

__all__ = ["bind_add_rms_norm_score", "bind_advance", "bind_score", "bind_score_advance"]
