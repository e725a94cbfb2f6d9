"""Build of the C++ extension ``midstream.kernels._cpu`` with ninja.

Everything else about the package is in ``pyproject.toml``. Two rules here:

* no C++ compiler: the package is built without the extension, and the reason is written to
  ``midstream/kernels/_build_info.py`` where ``midstream doctor`` finds it;
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

# Portable baseline: no -march. Wider instruction sets are per-function target attributes in the
# sources, chosen at run time.
CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]
LDFLAGS = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
LDFLAGS += ["-pthread"]

BUILD_INFO = '''\
"""How this installation was built. Written by setup.py, not under version control."""

CPU_EXTENSION: bool = {built!r}
COMPILER: str = {compiler!r}
REASON: str = {reason!r}
'''

PROBE = """\
#include <Python.h>
#include <string_view>
#include <vector>
int probe(std::string_view text) { return std::vector<int>(text.size()).size() > PY_MAJOR_VERSION; }
"""


class NoCompilerError(Exception):
    """No C++17 compiler was found; the message says what was tried."""


def sources() -> list[str]:
    """C++ sources of the extension, relative to the root."""
    found = [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/python/*.cpp")]
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


def compiler_version(command: list[str]) -> str:
    """First line of ``--version``."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return (said.stdout.splitlines() or [shlex.join(command)])[0]


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


class NinjaBuildExt(build_ext):
    """``build_ext`` that writes one ``build.ninja`` and lets ninja do the work."""

    reason = ""

    def run(self) -> None:
        """Build the extension, or record why it was not built."""
        try:
            compiler = find_compiler()
        except NoCompilerError as error:
            self.reason = str(error)
            self.warn(f"building without {EXTENSION}: {self.reason}")
            self.warn("midstream will run on its reference backend; `midstream doctor` repeats why")
            self.write_build_info("")
            return
        built = self.build_with_ninja(compiler)
        target = self.extension()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Unlink first: overwriting a library that some process has mapped would crash it.
        target.unlink(missing_ok=True)
        shutil.copy2(built, target)
        self.write_build_info(compiler_version(compiler))

    def build_with_ninja(self, compiler: list[str]) -> Path:
        """Compile and link; return the path of the extension in the build folder."""
        import pybind11
        from ninja.ninja_syntax import Writer

        def joined(*words: str) -> str:
            return shlex.join(words).replace("$", "$$")

        def extra(name: str) -> list[str]:
            return shlex.split(os.environ.get(name, ""))

        # Kept between builds, also editable ones, so that ninja rebuilds only what changed.
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / f"ninja-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        relative = folder.relative_to(ROOT).as_posix()
        library = f"{relative}/{Path(self.get_ext_filename(EXTENSION)).name}"
        system = [*python_includes(), pybind11.get_include()]
        flags = [*CXXFLAGS, "-Icsrc/include"]
        flags += [word for path in system for word in ("-isystem", path)]

        with (folder / "build.ninja").open("w") as file:
            ninja = Writer(file, width=100)
            ninja.variable("builddir", relative)
            ninja.variable("cxx", joined(*compiler))
            ninja.variable("flags", joined(*flags, *extra("CPPFLAGS"), *extra("CXXFLAGS")))
            ninja.variable("ldflags", joined(*LDFLAGS, *extra("LDFLAGS")))
            compile_command = "$cxx -MMD -MF $out.d $flags -c $in -o $out"
            ninja.rule("cxx", compile_command, depfile="$out.d", deps="gcc", description="CXX $in")
            ninja.rule("link", "$cxx -o $out $in $ldflags", description="LINK $out")
            objects = []
            for source in sources():
                target = f"{relative}/{source.removeprefix('csrc/').removesuffix('.cpp')}.o"
                ninja.build([target], "cxx", [source])
                objects.append(target)
            ninja.build([library], "link", objects)

        command = [ninja_binary(), "-f", f"{relative}/build.ninja"]
        if self.parallel:
            command.append(f"-j{self.parallel}")
        # ninja prints errors on stdout, where pip shows them when the build fails.
        if subprocess.run([*command, library], cwd=ROOT, check=False).returncode != 0:
            raise CompileError(f"{EXTENSION} did not compile; the messages are above")
        return ROOT / library

    def extension(self) -> Path:
        """Where the extension goes: the build folder, for editable installs too."""
        return Path(self.build_lib, self.get_ext_filename(EXTENSION))

    def build_info(self) -> Path:
        """Where the generated module goes, beside the extension."""
        return self.extension().with_name("_build_info.py")

    def write_build_info(self, compiler: str) -> None:
        """Record what was built, and if nothing was, why."""
        text = BUILD_INFO.format(built=not self.reason, compiler=compiler, reason=self.reason)
        self.build_info().parent.mkdir(parents=True, exist_ok=True)
        self.build_info().write_text(text)

    def get_outputs(self) -> list[str]:
        """Files this command made, for wheels and editable link trees."""
        outputs = [str(self.build_info())]
        if not self.reason:
            outputs.append(str(self.extension()))
        return outputs

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is built in the source tree."""
        return {}


setup(
    packages=[
        "midstream",
        *(f"midstream.{name}" for name in find_packages("monitor")),
        "midstream.kernels",  # no __init__.py, so find_packages would not see it
    ],
    ext_modules=[Extension(EXTENSION, sources())],
    cmdclass={
        "build": FreshBuild,
        "build_ext": NinjaBuildExt,
        "editable_wheel": StrictEditable,
    },
)
