"""The ``midstream`` command.

Exit codes: 0 done; 1 refused or failed, with one line that says why; 2 wrong usage; 3 the stream
that ``watch`` showed was halted.
"""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich.console import Console

from midstream.commands import agents, audit, chain, gate, testbed
from midstream.commands.chain_stop import stop
from midstream.commands.collect import collect
from midstream.commands.demo import demo
from midstream.commands.doctor import doctor
from midstream.commands.evaluate import evaluate
from midstream.commands.inspect import inspect
from midstream.commands.proxy import proxy
from midstream.commands.record import record
from midstream.commands.replay import replay
from midstream.commands.score import score
from midstream.commands.serve import serve
from midstream.commands.train import train
from midstream.commands.vllm import serve as serve_vllm
from midstream.commands.watch import watch

app = typer.Typer(
    name="midstream",
    help="Watch a language model from the inside while it writes, and halt it before a bad token "
    "leaves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    demo, watch, serve, proxy, score, collect, train, evaluate, record, replay, inspect, doctor,
)  # fmt: skip
GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "chain": (
        "The absorbing chain: fit it, look at it, see how well it forecasts, and where to stop.",
        {"fit": chain.fit, "show": chain.show, "forecast": chain.forecast, "stop": stop},
    ),
    "gate": (
        "The turn gate: whether a whole response may be delivered, given the conversation so far.",
        {"fit": gate.fit, "replay": gate.replay},
    ),
    "agents": (
        "Agents: risk levels of their steps, and the chance that they violate within the next.",
        {"check": agents.check, "fit": agents.fit},
    ),
    "audit": (
        "The audit log of a service: show it, and check that nobody changed it.",
        {"show": audit.show, "verify": audit.verify},
    ),
    "testbed": (
        "The testbed: a small language whose rule, model and Bayes oracle are known.",
        {"build": testbed.build_testbed, "sample": testbed.sample_testbed},
    ),
}
for command in COMMANDS:
    app.command()(command)
for group, (purpose, commands) in GROUPS.items():
    group_app = typer.Typer(help=purpose, no_args_is_help=True)
    for name, function in commands.items():
        group_app.command(name)(function)
    app.add_typer(group_app, name=group)
vllm_app = typer.Typer(help="The monitor inside vLLM.", no_args_is_help=True)
vllm_app.command(
    "serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)(serve_vllm)
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
