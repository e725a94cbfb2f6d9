"""The ``midstream`` command.

Exit codes: 0 done; 1 refused or failed, with one line that says why; 2 wrong usage; 3 the stream
that ``watch`` showed was halted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from midstream.bundle import Bundle

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
app.add_typer(testbed_app, name="testbed")

HALTED = 3

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Model = Annotated[
    str | None,
    typer.Option(help="Folder or hub id of a transformers model; the testbed's when not given."),
]
BundleOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the bundle made for the model; the testbed's when not given."),
]
Tier = Annotated[str | None, typer.Option(help="Strictness: strict, moderate or loose.")]


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


def _errors() -> Console:
    """Where progress goes, so that standard output stays clean."""
    return Console(stderr=True)


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    from midstream.show import stages

    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with stages(console) as progress:
        yield progress


@app.command()
def demo(
    streams: Annotated[int, typer.Option(min=2, help="Responses to generate, per run.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts and sampling.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw risk curves of a halted, a released and a missed stream."),
    ] = None,
    json_: Json = False,
) -> None:
    """Show a model that watches itself: live, then in figures against the Bayes oracle.

    The testbed's model writes the same responses without a monitor, observed, in detect mode and in
    forecast mode.
    """
    from midstream import testbed
    from midstream.measure import plots
    from midstream.testbed import demo as job

    console = Console()
    model, tokenizer = testbed.load()
    bundle = testbed.load_bundle()
    monitor = _monitor(bundle, slots=job.BATCH)
    if not json_:
        console.print(testbed.describe(), markup=False, highlight=False)
        _show_one(console, model, tokenizer, monitor, seed)
    with _progress(json_) as progress:
        run = job.run(model, tokenizer, monitor, streams=streams, seed=seed, progress=progress)
        cost = job.overheads(model, bundle, progress=progress)
    figures = job.figures(run, backend=monitor.backend.name, overhead=cost)
    if plot is not None:
        threshold = bundle.policy.tiers[bundle.policy.tier_for(job.MODES["forecast"])].halt_at
        plots.risk_curves(job.examples(run, threshold), plot)
    if json_:
        print(json.dumps(_without_nan(figures), indent=2, allow_nan=False))
        return
    from midstream.show import figures_tables

    for table in figures_tables(figures):
        console.print(table)
    console.print(
        f"{figures['violating_unmonitored']} of {streams} unmonitored responses violate the rule; "
        f"watching costs {cost['batch_1'] - 1:+.1%} of the time per token at batch 1, "
        f"{cost['batch_8'] - 1:+.1%} at batch 8.",
        highlight=False,
    )
    if plot is not None:
        console.print(f"risk curves: {plot}", highlight=False)


@app.command()
def watch(
    prompt: Annotated[str | None, typer.Argument(help="What to ask the model.")] = None,
    model: Model = None,
    bundle: BundleOption = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Colour this file's lines by score instead of generating; - is stdin."),
    ] = None,
    tier: Tier = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave the tokenizer's chat template aside.")
    ] = False,
    observe: Annotated[bool, typer.Option("--observe", help="Halt nothing, only look.")] = False,
    json_: Json = False,
) -> None:
    """Generate one response, live: text coloured by risk, the risk curve, verdict and cause."""
    import torch

    from midstream.engines.hf import stream
    from midstream.show import show_stream

    loaded, tokenizer, ours = _load(model, bundle)
    if text is not None:
        _watch_text(loaded, tokenizer, ours, text, tier, json_)
        return
    if model is None:
        from midstream import testbed

        # The system message says which vessel is sealed; without it nothing could violate.
        system, user = testbed.sample_prompt(seed, 0).messages
        messages = [system, {"role": "user", "content": prompt} if prompt else user]
    elif prompt is None:
        raise typer.BadParameter("give a PROMPT, or --text FILE")
    else:
        messages = [{"role": "user", "content": prompt}]
    templated = tokenizer.chat_template is not None and not raw
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    torch.manual_seed(seed)
    events = stream(
        loaded,
        tokenizer,
        messages if templated else messages[-1]["content"],
        _monitor(ours, slots=1),
        max_new_tokens=max_new_tokens,
        tier=tier,
        enforce=not observe,
        **(sampling if temperature else {"do_sample": False}),
    )
    if json_:
        halted = False
        for event in events:
            print(event.model_dump_json(exclude_none=True), flush=True)
            halted |= event.type == "halted"
    else:
        console = Console()
        for message in messages:
            console.print(f"{message['role']}: {message['content']}", style="dim", markup=False)
        report = show_stream(console, "assistant", events)
        halted = report.halted_at is not None and not observe
        if halted and (told := ours.policy.on_halt.message):
            console.print(told, style="italic", markup=False)
    if halted:
        raise typer.Exit(HALTED)


@app.command()
def score(
    model: Model = None,
    bundle: BundleOption = None,
    input_: Annotated[
        Path, typer.Option("--input", "-i", help="JSONL, or CSV by its name's end; - is stdin.")
    ] = Path("-"),
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL; - is standard output.")
    ] = Path("-"),
    field: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 16,
    tier: Tier = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar on a terminal.")] = True,
) -> None:
    """Score given texts token by token, one JSON object per line in and out."""
    from midstream import texts
    from midstream.engines.hf import score as score_texts

    loaded, tokenizer, ours = _load(model, bundle)
    records = list(texts.read(input_, field))
    monitor = _monitor(ours, slots=batch_size, trace=_window(loaded))
    with texts.writer(output) as write, _progress(not progress) as bar:
        scores = score_texts(
            loaded,
            tokenizer,
            (record[field] for record in records),
            monitor,
            batch_size=batch_size,
            tier=tier,
        )
        for done, (record, scored) in enumerate(zip(records, scores, strict=True), start=1):
            write(texts.scored_record(record, scored))
            bar("score", done, len(records))


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")], json_: Json = False
) -> None:
    """Show what is in a bundle: its model, probes, chain, policy and where they come from."""
    from midstream.bundle import Bundle
    from midstream.kernels.tables import SlotTable
    from midstream.monitor import DEFAULT_TRACE
    from midstream.show import inspect_table

    loaded = Bundle.load(bundle)
    spec = loaded.bank.spec()
    summary = {
        "hash": loaded.hash,
        "model": loaded.fingerprint.model_dump(mode="json"),
        "probes": [
            {
                **probe.model_dump(mode="json"),
                "tap": str(tap.tap),
                "norm": tap.norm,
                "evidence": probe.evidence.rule,
            }
            for tap in spec.taps
            for probe in tap.probes
        ],
        "chain": {"states": loaded.chain.states, "bins": len(loaded.chain.edges) + 1},
        "policy": loaded.policy.model_dump(mode="json", exclude_none=True),
        "notes": dict(loaded.notes),
        "bytes_per_slot": SlotTable.bytes_per_slot(
            len(loaded.bank.names), loaded.chain.states, loaded.bank.window, DEFAULT_TRACE
        ),
    }
    if json_:
        print(json.dumps(summary, indent=2))
        return
    console = Console()
    for part in inspect_table(summary):
        console.print(part)


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what this installation can do, and why it cannot do the rest."""
    from midstream.doctor import facts

    found = facts()
    if json_:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    for name, version in found["versions"].items():
        console.print(f"{name:14}{version}", highlight=False, markup=False)
    for name, backend in found["backends"].items():
        state = "yes" if backend["available"] else f"no: {backend['reason']}"
        console.print(f"backend {name:10}{state}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"built with    {found['build']}", highlight=False, markup=False, soft_wrap=True)


@testbed_app.command("build")
def build_testbed(
    out: Annotated[Path, typer.Option(help="New folder for model/ and bundle/.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of corpus, weights and sampling.")] = 0,
) -> None:
    """Train the testbed's model from scratch and fit its bundle; minutes on two cores."""
    from midstream.testbed.build import build

    with _progress(False) as progress:
        build(out, seed=seed, progress=progress)
    typer.echo(f"wrote {out / 'model'} and {out / 'bundle'}")


@testbed_app.command("sample")
def sample_testbed(
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Dialogues.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the grammar.")] = 0,
    json_: Json = False,
) -> None:
    """Sample labelled dialogues from the grammar."""
    from midstream import testbed

    if json_:
        for row in testbed.corpus_rows(count, seed):
            print(json.dumps(row))
        return
    console = Console()
    for dialogue in testbed.sample_dialogues(count, seed):
        for message in dialogue.prompt.messages:
            console.print(f"{message['role']}: {message['content']}", markup=False, highlight=False)
        first = dialogue.labels.first
        harmless = dialogue.response if first < 0 else dialogue.response[:first]
        console.print(f"assistant: {testbed.text_of(harmless)}", end=" ", highlight=False)
        console.print(testbed.text_of(dialogue.response[len(harmless) :]), style="red")
        console.print()


def _load(model: str | None, bundle: Path | None) -> tuple[Any, Any, Bundle]:
    """Model, tokenizer and bundle; the testbed's where none is named."""
    from midstream import testbed
    from midstream.bundle import Bundle, Fingerprint
    from midstream.engines.hf import load

    if model is not None and bundle is None:
        raise typer.BadParameter("a model needs the bundle that was made for it: give --bundle")
    ours = Bundle.load(bundle) if bundle is not None else testbed.load_bundle()
    loaded, tokenizer = load(model) if model is not None else testbed.load()
    ours.fingerprint.check(Fingerprint.of(loaded, tokenizer))
    return loaded, tokenizer, ours


def _show_one(console: Console, model: Any, tokenizer: Any, monitor: Any, seed: int) -> None:
    """Stream one response to an attack, the first of the seed, as a user would see it."""
    from midstream import testbed
    from midstream.engines.hf import stream
    from midstream.show import show_stream

    index = next(i for i in range(1000) if testbed.sample_prompt(seed, i).attack)
    prompt = testbed.sample_prompt(seed, index)
    for message in prompt.messages:
        console.print(f"{message['role']}: {message['content']}", style="dim", markup=False)
    events = stream(model, tokenizer, prompt.messages, monitor, do_sample=True, top_k=0)
    show_stream(console, "assistant", events)


def _without_nan(value: Any) -> Any:
    """Replace what JSON does not have, a median of nothing for instance, by null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if value != value else value


def _monitor(bundle: Bundle, **options: Any) -> Any:
    from midstream.monitor import Monitor

    return Monitor(bundle, **options)


def _window(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 4096))


def _watch_text(
    model: Any, tokenizer: Any, bundle: Bundle, path: Path, tier: str | None, as_json: bool
) -> None:
    from midstream import texts
    from midstream.engines.hf import score as score_texts
    from midstream.show import coloured

    lines = texts.read_lines(path)
    monitor = _monitor(bundle, slots=16, trace=_window(model))
    console = Console()
    for line, scored in zip(
        lines, score_texts(model, tokenizer, lines, monitor, tier=tier), strict=True
    ):
        if as_json:
            print(json.dumps(texts.scored_record({"text": line}, scored)), flush=True)
        else:
            console.print(coloured(texts.pieces(line, scored)), soft_wrap=True)
