"""What is built, what is installed, and what happens where nothing can be compiled."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd, **environment):
    """Run a command with extra environment variables; return the finished process."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        # The CUDA extension takes a minute, and no test here looks at what is in it.
        env=os.environ | {"HF_HUB_OFFLINE": "1", "MIDSTREAM_NVCC": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_python(code, *arguments, cwd, **environment):
    """Run Python code that prints one JSON value; return the value."""
    done = run(sys.executable, "-c", code, *arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def checkout(tmp_path):
    """Copy of what a build reads, without anything built before."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("monitor", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def build_wheel(source, folder, **environment):
    """Build a wheel with what is installed here; nothing is downloaded."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder]
    return run(*command, *options, source, cwd=folder, **environment)


def unpack(folder):
    """Unpack the only wheel in a folder; return where, and the names in it."""
    (wheel,) = Path(folder).glob("midstream-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        return folder / "site", archive.namelist()


IMPORT_TRANSFORMERS = """
import importlib.metadata, json, sys
version = importlib.metadata.version
if len(sys.argv) > 1:
    importlib.metadata.version = lambda name: sys.argv[1] if name == "kernels" else version(name)
import transformers.integrations.hub_kernels
from transformers.utils.import_utils import is_kernels_available
already = "kernels" in sys.modules
import kernels
print(json.dumps([kernels.__file__, already, bool(is_kernels_available())]))
"""


def test_transformers_imports_hugging_face_kernels_from_the_repository_root():
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    assert (ROOT / "kernels" / "reference.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    theirs = str(importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py"))

    assert run_python(IMPORT_TRANSFORMERS, cwd=ROOT)[0] == theirs
    # Outside the range of versions it accepts, transformers does not import kernels at all, and the
    # line above proves little. So once more, as a version that it accepts.
    assert run_python(IMPORT_TRANSFORMERS, KERNELS_MIN_VERSION, cwd=ROOT) == [theirs, True, True]


def test_wheel_from_source_distribution(checkout, tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, checkout]
    done = run(*command, cwd=tmp_path, CXXFLAGS="-O0")  # what is in it, not how fast it is
    assert done.returncode == 0, done.stdout + done.stderr
    site, names = unpack(tmp_path)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"midstream"}

    expected = {
        f"{package}/{path.relative_to(checkout / folder).as_posix()}"
        for folder, package in (("monitor", "midstream"), ("kernels", "midstream/kernels"))
        for path in (checkout / folder).rglob("*")
        if path.is_file()
    }
    assert expected <= set(names)
    assert "midstream/py.typed" in names
    assert "midstream/kernels/__init__.py" not in names
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".pyc"))]

    code = """
import json
from midstream.kernels import _build_info as info, _cpu
cuda = [info.CUDA_EXTENSION, info.CUDA_REASON]
print(json.dumps([_cpu.__file__, info.CPU_EXTENSION, info.REASON, _cpu.isa(), cuda]))
"""
    file, built, reason, isa, cuda = run_python(code, cwd=tmp_path, PYTHONPATH=str(site))
    assert cuda == [False, "MIDSTREAM_NVCC is empty"]
    assert Path(file).parent == site / "midstream" / "kernels"
    assert built
    assert reason == ""
    assert isa


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "false"}, "false: exit 1"),
        ({"CXX": "", "PATH": os.fspath(Path(sys.executable).parent)}, "g++: not found"),
    ],
    ids=["failing", "absent"],
)
def test_without_a_compiler_the_reference_remains(checkout, tmp_path, environment, reason):
    done = build_wheel(checkout, tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    site, names = unpack(tmp_path)
    assert not [name for name in names if name.endswith(".so")]
    code = """
import importlib.util, json
import midstream
from midstream.kernels import _build_info, reference
extension = importlib.util.find_spec("midstream.kernels._cpu")
print(json.dumps([midstream.__file__, _build_info.CPU_EXTENSION, _build_info.REASON, extension]))
"""
    file, built, recorded, extension = run_python(code, cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(file).is_relative_to(site)
    assert not built
    assert extension is None
    assert reason in recorded


def test_broken_sources_fail_the_build(checkout, tmp_path):
    shutil.rmtree(checkout / "csrc" / "cpu")
    (checkout / "csrc" / "python" / "bindings.cpp").write_text("#error this is broken\n")
    done = build_wheel(checkout, tmp_path)
    assert done.returncode != 0
    assert "this is broken" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_nvcc_that_does_not_work_fails_the_build(checkout, tmp_path):
    done = build_wheel(checkout, tmp_path, MIDSTREAM_NVCC="false")
    assert done.returncode != 0
    assert "--list-gpu-code" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))
