"""The ``midstream`` command.

Exit codes: 0 done; 1 refused or failed, with one line that says why; 2 wrong usage; 3 the stream
that ``watch`` showed was halted.
"""

from __future__ import annotations

import typer
from rich.console import Console

from midstream.commands.collect import collect
from midstream.commands.demo import demo
from midstream.commands.doctor import doctor
from midstream.commands.evaluate import evaluate
from midstream.commands.inspect import inspect
from midstream.commands.record import record
from midstream.commands.replay import replay
from midstream.commands.score import score
from midstream.commands.testbed import build_testbed, sample_testbed
from midstream.commands.train import train
from midstream.commands.vllm import serve
from midstream.commands.watch import watch

app = typer.Typer(
    name="midstream",
    help="Watch a language model from the inside while it writes, and halt it before a bad token "
    "leaves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
testbed_app = typer.Typer(
    help="The testbed: a small language whose rule, model and Bayes oracle are known.",
    no_args_is_help=True,
)
vllm_app = typer.Typer(help="The monitor inside vLLM.", no_args_is_help=True)
COMMANDS = (demo, watch, score, collect, train, evaluate, record, replay, inspect, doctor)
for command in COMMANDS:
    app.command()(command)
testbed_app.command("build")(build_testbed)
testbed_app.command("sample")(sample_testbed)
app.add_typer(testbed_app, name="testbed")
vllm_app.command(
    "serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)(serve)
app.add_typer(vllm_app, name="vllm")


def main() -> None:
    """Run the command; expected failures become one line and exit code 1."""
    try:
        app()
    except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        Console(stderr=True).print(f"midstream: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1) from error


def _is_ours(error: BaseException) -> bool:
    """Whether a message of ours explains it; anything else is a bug and shows its traceback."""
    return type(error).__module__.startswith("midstream") or isinstance(
        error,
        FileNotFoundError | FileExistsError | ImportError | PermissionError | IsADirectoryError,
    )
