"""The CUDA backend without a GPU: an emulator for results, nvcc for resources.

The tests of ``score`` and ``advance`` run here once more, on the emulated backend.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_kernels_advance
import test_kernels_score
import torch
from kernel_cases import Tables, Target, fresh_seed, make_tables, random_stream, rows_of, run
from torch import Tensor

from midstream.kernels import ops
from midstream.kernels.checks import Sizes
from midstream.kernels.tables import Phase, Rule

cuda_emulated = pytest.importorskip("cuda_emulated")
if os.uname().machine != "x86_64" or shutil.which("g++") is None:
    pytest.skip("the emulator needs g++ on x86-64", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = list(itertools.product(DTYPES, DTYPES))  # of hidden rows and weights


@pytest.fixture
def target() -> Iterator[Target]:
    yield cuda_emulated.install()


def name(value: object) -> str:
    return str(value).replace("torch.", "")


# The shared tests. pytest takes the fixture `target` from the module where it finds a test.
for _module in (test_kernels_score, test_kernels_advance):
    for _name, _test in vars(_module).items():
        if _name.startswith("test_"):
            globals()[f"test_{_module.__name__.removeprefix('test_kernels_')}_{_name[5:]}"] = _test
