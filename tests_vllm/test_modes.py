"""Servers that run the model in other ways; the same streams halt at the same tokens."""

from __future__ import annotations

import os

import pytest
from serving import Server, ask_all, assert_as_reference, references


def test_layers_that_are_compiled(tmp_path):
    """By Inductor, hooks and all."""
    asked = references(48)
    with Server(tmp_path, eager=False) as running:
        assert_as_reference(asked, ask_all(running, asked))
        assert running.idle_status()["unscored"] == 0


# Rank 1 sees nothing at the taps; put into its process as Python starts.
BLIND = """
import torch.distributed
from midstream.engines.vllm.watch import Watch

observe = Watch._observe
Watch._observe = lambda self, tap, rows: observe(
    self, tap, rows * 0 if torch.distributed.get_rank() else rows
)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank wants a core of its own")
def test_two_tensor_parallel_ranks_decide_alike(tmp_path):
    """By rank 0's verdicts, whatever rank 1 sees."""
    asked = references(24)
    (tmp_path / "sitecustomize.py").write_text(BLIND)
    path = {"PYTHONPATH": str(tmp_path)}
    with Server(tmp_path, "--tensor-parallel-size", "2", environment=path) as running:
        assert_as_reference(asked, ask_all(running, asked))
        running.idle_status()
        first, second = running.statuses()
        assert first == second
        assert first["halted"] == sum(r.finish_reason == "content_filter" for r in asked)
