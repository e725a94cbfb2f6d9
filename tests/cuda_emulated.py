"""The CUDA backend on CPU tensors: its sources compiled against ``tests/native/cuda_emulator``.

``installed()`` makes it a backend called ``cuda_emulated`` while its block runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from kernel_cases import Target

from midstream.kernels import backends

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests/native/cuda_emulator"
BACKEND = "cuda_emulated"

# -mavx2 and friends are the machine's that runs the tests. FMA only where the source says fmaf, as
# nvcc's -fmad=false.
FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-mavx2", "-mfma", "-mf16c", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
]


def sources() -> list[Path]:
    return [
        *sorted(ROOT.glob("csrc/cuda/*.cu")),
        ROOT / "csrc/python/cuda_bindings.cpp",
        EMULATOR / "emulator.cpp",
    ]


def build() -> Path:
    """Compile once per state of the sources; return the module."""
    import pybind11

    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted({*sources(), *EMULATOR.rglob("*.*"), *ROOT.glob("csrc/**/*.*")}):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir(), f"midstream-emulator-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    module = folder / f"{digest.hexdigest()[:16]}" / f"_cuda{suffix}"
    if module.exists():
        return module
    module.parent.mkdir(exist_ok=True)
    includes = [EMULATOR, ROOT / "csrc/include", ROOT / "csrc/cuda"]
    system = [sysconfig.get_paths()["include"], pybind11.get_include()]
    command = ["g++", *FLAGS, *(f"-I{path}" for path in includes)]
    command += [word for path in system for word in ("-isystem", path)]
    running, objects = [], []
    for source in sources():
        objects.append(module.parent / f"{source.stem}.{os.getpid()}.o")
        step = [*command, "-c", "-x", "c++", str(source), "-o", str(objects[-1])]
        running.append(subprocess.Popen(step))
    assert not any(process.wait() for process in running), "the emulated backend does not compile"
    unfinished = module.with_suffix(f".{os.getpid()}")
    subprocess.run(["g++", *FLAGS, *objects, "-o", unfinished], check=True)
    for target in objects:
        target.unlink()
    unfinished.rename(module)
    return module


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if name.startswith("midstream."):
        sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@contextmanager
def installed() -> Iterator[Target]:
    """Make the emulated backend one that ``ops`` knows by name; yield the tests' target for it."""
    backend()
    backends._MISSING[BACKEND] = lambda: ""
    try:
        yield Target(BACKEND)
    finally:
        del backends._MISSING[BACKEND]


@cache
def backend() -> ModuleType:
    """Import a second copy of kernels/cuda.py, one that finds the emulated extension."""
    import midstream.kernels as package

    name = "midstream.kernels._cuda"
    before = sys.modules.get(name), getattr(package, "_cuda", None)
    sys.modules[name] = package._cuda = load("_cuda", build())
    try:
        module = load(f"midstream.kernels.{BACKEND}", ROOT / "kernels/cuda.py")
    finally:
        del sys.modules[name], package._cuda
        if before[0] is not None:
            sys.modules[name] = before[0]
        if before[1] is not None:
            package._cuda = before[1]
    module._stream = lambda device: 0
    return module
