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


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank wants a core of its own")
def test_two_tensor_parallel_ranks_decide_alike(tmp_path):
    asked = references(24)
    cores = sorted(os.sched_getaffinity(0))[:2]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))}
    with Server(tmp_path, "--tensor-parallel-size", "2", environment=binding) as running:
        assert_as_reference(asked, ask_all(running, asked))
        running.idle_status()
        first, second = running.statuses()
        assert first == second
        assert first["halted"] == sum(r.finish_reason == "content_filter" for r in asked)
