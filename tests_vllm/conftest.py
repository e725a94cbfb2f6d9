"""Real servers: `midstream vllm serve` on the testbed's model, and vLLM alone for comparison."""

from __future__ import annotations

import json
import logging

import environment  # before what reads it
import pytest
from serving import Server


def pytest_sessionstart():
    """End before a module is imported: a kernel for another CPU would end the process."""
    if reason := environment.reason_not_to_run():
        pytest.exit(f"every test is skipped: {reason}", returncode=0)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The monitored server that most tests share."""
    with Server(tmp_path_factory.mktemp("monitored")) as running:
        yield running


@pytest.fixture
def logged():
    """Events that the scheduler logs in this process."""
    events = []
    handler = logging.Handler()
    handler.emit = lambda record: events.append(json.loads(record.getMessage()))
    logger = logging.getLogger("vllm.midstream")
    logger.addHandler(handler)
    yield events
    logger.removeHandler(handler)


def pytest_addoption(parser):
    parser.addoption("--soak", type=int, default=100, help="requests of the soak; 2000 in earnest")
