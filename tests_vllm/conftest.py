"""Real servers: `midstream vllm serve` on the testbed's model, and vLLM alone for comparison."""

from __future__ import annotations

import pytest
from serving import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The monitored server that most tests share."""
    with Server(tmp_path_factory.mktemp("monitored")) as running:
        yield running


def pytest_addoption(parser):
    parser.addoption("--soak", type=int, default=100, help="requests of the soak; 2000 in earnest")
