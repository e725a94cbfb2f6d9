"""Build of the extensions ``midstream.kernels._cpu`` and ``._cuda`` with ninja.

Everything else about the package is in ``pyproject.toml``. Two rules here:

* no C++ compiler: the package is built without the extensions, and the reason is written to
  ``midstream/kernels/_build_info.py`` where ``midstream doctor`` finds it; likewise without nvcc
  and ``_cuda``. Neither needs torch, and ``_cuda`` needs no GPU to be built or imported;
* a compiler that works and sources that do not: the build fails.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
EXTENSION = "midstream.kernels._cpu"
CUDA_EXTENSION = "midstream.kernels._cuda"

# Portable baseline: no -march. Wider instruction sets are per-function target attributes in the
# sources, chosen at run time.
CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]
LDFLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
LDFLAGS += ["-pthread", "-ldl"]

# A100, H100 and B200, and for what comes later the intermediate code of the newest.
CUDA_ARCHITECTURES = ("80", "90", "100")
# No fused multiply-adds but those the sources ask for: bits must not follow the compiler's mind.
NVCCFLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# The runtime comes along; its symbols stay inside, for torch brings a runtime of its own.
NVCC_LDFLAGS = ["-shared", "--cudart=static", "-Xlinker=--exclude-libs,ALL"]

BUILD_INFO = '''\
"""How this installation was built. Written by setup.py, not under version control."""

CPU_EXTENSION: bool = {built!r}
COMPILER: str = {compiler!r}
REASON: str = {reason!r}

CUDA_EXTENSION: bool = {cuda_built!r}
CUDA_COMPILER: str = {cuda_compiler!r}
CUDA_REASON: str = {cuda_reason!r}
'''

PROBE = """\
#include <Python.h>
#include <string_view>
#include <vector>
int probe(std::string_view text) { return std::vector<int>(text.size()).size() > PY_MAJOR_VERSION; }
"""


class NoCompilerError(Exception):
    """No C++17 compiler was found; the message says what was tried."""


class NoNvccError(Exception):
    """No CUDA compiler was found, or none is wanted; the message says why."""


def sources(extension: str = EXTENSION) -> list[str]:
    """Sources of an extension, relative to the root."""
    if extension == CUDA_EXTENSION:
        found = [*ROOT.glob("csrc/cuda/*.cu"), ROOT / "csrc/python/cuda_bindings.cpp"]
    else:
        found = [*ROOT.glob("csrc/cpu/*.cpp"), ROOT / "csrc/python/bindings.cpp"]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def python_includes() -> list[str]:
    """Folders that hold ``Python.h`` and ``pyconfig.h``."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys([paths["include"], paths["platinclude"]]))


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler that can build a Python extension.

    ``$CXX`` alone is tried when it is set; otherwise the compiler Python itself was built with,
    then the usual names. The trial compiles and links a file that includes ``Python.h``.
    """
    if sys.platform == "win32":
        raise NoCompilerError("the C++ extension is not built on Windows")
    if chosen := os.environ.get("CXX"):
        candidates = [chosen]
    else:
        usual = [sysconfig.get_config_var("CXX") or "c++", "c++", "g++", "clang++"]
        candidates = list(dict.fromkeys(usual))
    failures = []
    for candidate in candidates:
        command = shlex.split(candidate)
        if not command or shutil.which(command[0]) is None:
            failures.append(f"{candidate}: not found")
            continue
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text(PROBE)
            includes = [f"-I{path}" for path in python_includes()]
            trial = subprocess.run(
                [*command, *CXXFLAGS, *includes, str(probe), *LDFLAGS, "-o", f"{folder}/probe"],
                capture_output=True,
                text=True,
                check=False,
            )
        if trial.returncode == 0:
            return command
        said = [line for line in trial.stderr.splitlines() if "error" in line.lower()]
        failures.append(f"{candidate}: {said[0] if said else f'exit {trial.returncode}'}")
    raise NoCompilerError(f"no working C++17 compiler ({'; '.join(failures)})")


def find_nvcc() -> list[str]:
    """Return the command of nvcc, with the options that name the architectures.

    ``$MIDSTREAM_NVCC`` alone counts when it is set, and empty it means that none is wanted;
    otherwise ``$CUDA_HOME/bin/nvcc`` and ``nvcc`` on the path.
    """
    chosen, home = os.environ.get("MIDSTREAM_NVCC"), os.environ.get("CUDA_HOME")
    if chosen == "":
        raise NoNvccError("MIDSTREAM_NVCC is empty")
    candidates = [chosen] if chosen else [*([f"{home}/bin/nvcc"] if home else []), "nvcc"]
    nvcc = next((path for name in candidates if (path := shutil.which(name))), None)
    if nvcc is None:
        raise NoNvccError(f"no nvcc ({', '.join(candidates)}: not found)")
    listing = [nvcc, "--list-gpu-code"]
    said = subprocess.run(listing, capture_output=True, text=True, check=False)
    known = [name for name in CUDA_ARCHITECTURES if f"sm_{name}" in said.stdout.split()]
    if said.returncode != 0 or not known:
        raise CompileError(f"{shlex.join(listing)} names none of sm_{CUDA_ARCHITECTURES}: {said}")
    options = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in known]
    options.append(f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}")
    if cxx := os.environ.get("CXX"):
        options.append(f"-ccbin={shlex.split(cxx)[0]}")
    return [nvcc, *options]


def compiler_version(command: list[str]) -> str:
    """First line of ``--version``, of nvcc's the one with the release."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    lines = said.stdout.splitlines() or [shlex.join(command)]
    return next((line for line in lines if "release" in line), lines[0])


def ninja_binary() -> str:
    """Path of ninja from the package of that name, else from ``PATH``."""
    import ninja

    path = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    if path is None:
        raise CompileError(f"the ninja package has no executable in {ninja.BIN_DIR}")
    return path


class StrictEditable(editable_wheel):
    """Editable installs are a tree of links unless asked otherwise.

    The other kind, an import hook, would miss the extension, and type checkers do not follow it.
    A new file needs the install again; ``make`` sees to it.
    """

    def finalize_options(self) -> None:
        """Choose strict mode."""
        self.mode = self.mode or "strict"
        super().finalize_options()


class FreshBuild(build):
    """``build`` that forgets the last one: what lies in ``build/lib*`` goes into the wheel."""

    def run(self) -> None:
        """Build into an empty folder."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def joined(*words: str) -> str:
    """One string for a ninja file."""
    return shlex.join(words).replace("$", "$$")


def extra(name: str) -> list[str]:
    """Words of an environment variable."""
    return shlex.split(os.environ.get(name, ""))


class NinjaBuildExt(build_ext):
    """``build_ext`` that writes one ``build.ninja`` and lets ninja do the work."""

    reason = ""
    cuda_reason = ""

    def run(self) -> None:
        """Build the extensions, or record why they were not built."""
        compilers: dict[str, list[str]] = {}
        try:
            compilers[EXTENSION] = find_compiler()
        except NoCompilerError as error:
            self.reason = self.cuda_reason = str(error)
            self.warn(f"building without {EXTENSION}: {self.reason}")
            self.warn("midstream will run on its reference backend; `midstream doctor` repeats why")
        else:
            try:
                compilers[CUDA_EXTENSION] = find_nvcc()
            except NoNvccError as error:  # the usual case, and nothing to warn of
                self.cuda_reason = str(error)
        for extension, built in self.build_with_ninja(compilers).items():
            target = self.extension(extension)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Unlink first: overwriting a library that some process has mapped would crash it.
            target.unlink(missing_ok=True)
            shutil.copy2(built, target)
        self.write_build_info(compilers)

    def build_with_ninja(self, compilers: dict[str, list[str]]) -> dict[str, Path]:
        """Compile and link; return the paths of the extensions in the build folder."""
        if not compilers:
            return {}
        import pybind11
        from ninja.ninja_syntax import Writer

        # Kept between builds, also editable ones, so that ninja rebuilds only what changed.
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / f"ninja-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        relative = folder.relative_to(ROOT).as_posix()
        system = [*python_includes(), pybind11.get_include()]
        includes = ["-Icsrc/include", *(word for path in system for word in ("-isystem", path))]
        flags = [*CXXFLAGS, *includes, *extra("CPPFLAGS"), *extra("CXXFLAGS")]

        libraries = {}
        with (folder / "build.ninja").open("w") as file:
            ninja = Writer(file, width=100)
            ninja.variable("builddir", relative)
            ninja.variable("cxx", joined(*compilers[EXTENSION]))
            ninja.variable("flags", joined(*flags))
            ninja.variable("ldflags", joined(*LDFLAGS, *extra("LDFLAGS")))
            ninja.variable("nvcc", joined(*compilers.get(CUDA_EXTENSION, [])))
            ninja.variable("nvccflags", joined(*NVCCFLAGS, *includes))
            ninja.variable("nvccldflags", joined(*NVCC_LDFLAGS))
            for rule, tool in (("cxx", "$cxx $flags"), ("nvcc", "$nvcc $nvccflags")):
                command = f"{tool} -MMD -MF $out.d -c $in -o $out"
                ninja.rule(rule, command, depfile="$out.d", deps="gcc", description=f"{rule} $in")
            ninja.rule("link-cxx", "$cxx -o $out $in $ldflags", description="link $out")
            ninja.rule("link-nvcc", "$nvcc -o $out $in $nvccldflags", description="link $out")
            for extension in compilers:
                rule = "nvcc" if extension == CUDA_EXTENSION else "cxx"
                library = f"{relative}/{Path(self.get_ext_filename(extension)).name}"
                objects = []
                for source in sources(extension):
                    target = f"{relative}/{Path(source).relative_to('csrc').with_suffix('.o')}"
                    ninja.build([target], rule, [source])
                    objects.append(target)
                ninja.build([library], f"link-{rule}", objects)
                libraries[extension] = library

        command = [ninja_binary(), "-f", f"{relative}/build.ninja"]
        if self.parallel:
            command.append(f"-j{self.parallel}")
        # ninja prints errors on stdout, where pip shows them when the build fails.
        if subprocess.run([*command, *libraries.values()], cwd=ROOT, check=False).returncode != 0:
            raise CompileError(f"{', '.join(libraries)} did not compile; the messages are above")
        return {extension: ROOT / library for extension, library in libraries.items()}

    def extension(self, name: str) -> Path:
        """Where an extension goes: the build folder, for editable installs too."""
        return Path(self.build_lib, self.get_ext_filename(name))

    def build_info(self) -> Path:
        """Where the generated module goes, beside the extensions."""
        return self.extension(EXTENSION).with_name("_build_info.py")

    def write_build_info(self, compilers: dict[str, list[str]]) -> None:
        """Record what was built, and of what was not, why."""
        versions = {name: compiler_version(command) for name, command in compilers.items()}
        text = BUILD_INFO.format(
            built=not self.reason,
            compiler=versions.get(EXTENSION, ""),
            reason=self.reason,
            cuda_built=not self.cuda_reason,
            cuda_compiler=versions.get(CUDA_EXTENSION, ""),
            cuda_reason=self.cuda_reason,
        )
        self.build_info().parent.mkdir(parents=True, exist_ok=True)
        self.build_info().write_text(text)

    def get_outputs(self) -> list[str]:
        """Files this command made, for wheels and editable link trees."""
        reasons = {EXTENSION: self.reason, CUDA_EXTENSION: self.cuda_reason}
        built = [str(self.extension(name)) for name, reason in reasons.items() if not reason]
        return [str(self.build_info()), *built]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is built in the source tree."""
        return {}


setup(
    packages=[
        "midstream",
        *(f"midstream.{name}" for name in find_packages("monitor")),
        "midstream.kernels",  # no __init__.py, so find_packages would not see it
    ],
    ext_modules=[Extension(name, sources(name)) for name in (EXTENSION, CUDA_EXTENSION)],
    cmdclass={
        "build": FreshBuild,
        "build_ext": NinjaBuildExt,
        "editable_wheel": StrictEditable,
    },
)
