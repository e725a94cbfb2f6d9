"""Recompute docs/figures.json, and the README's tables from it.

    python bench/figures.py             run every command, rewrite file and README
    python bench/figures.py --render    only rewrite the README from the file

The figure on real text needs the folder ``toxic_spans`` of SemEval-2021 Task 5: name it in
``MIDSTREAM_TOXIC_SPANS``. Without it that entry is left as it stands, and this is said.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import quick

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "figures.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"

DEMO = "midstream demo --streams 500 --seed 0 --json"
LLAMA = "python bench/overhead.py"
SLOTS = "midstream inspect --json monitor/testbed/bundle"
TOXIC = "docs/toxic_spans.md"

WHO = {
    "midstream": ("modes", None),
    "oracle": ("oracle", None),
    "threshold": ("baselines", "threshold"),
    "ema": ("baselines", "ema"),
}
DETECT = ("leaked_tokens", "missed_rate", "false_halt_rate", "median_tokens_seen")
FORECAST = ("false_halt_rate", "lead_tokens_median", "brier")

ASKED = {
    "detect_midstream_leaked_tokens": "0",
    "detect_midstream_missed_rate": "≤ 0.01",
    "detect_midstream_false_halt_rate": "≤ 0.01",
    "forecast_lead_ratio": "≥ 0.8",
    "forecast_brier_ratio": "≤ 1.15",
    "overhead_testbed_batch_1": "≤ 1.03",
    "overhead_testbed_batch_8": "≤ 1.03",
    "overhead_llama_batch_1": "≤ 1.01",
    "overhead_llama_batch_8": "≤ 1.01",
    "demo_seconds": "≤ 60",
    "toxic_token_auroc": "≥ 0.82",
}


def machine() -> str:
    """Processor, cores visible, Python and torch."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}"


def run(command: str) -> str:
    """Run one of the commands as printed, with this environment's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    print(f"$ {command}", file=sys.stderr, flush=True)
    done = subprocess.run(
        shlex.split(command),
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def collect() -> dict[str, dict[str, Any]]:
    """Run everything and return the entries."""
    figures: dict[str, dict[str, Any]] = {}
    stamp = {"machine": machine(), "date": datetime.date.today().isoformat()}

    def enter(name: str, value: float, unit: str, command: str, asked: str | None = None) -> None:
        figures[name] = {
            "value": value,
            "unit": unit,
            "asked": asked or ASKED.get(name),
            "command": command,
            **stamp,
        }

    demo = json.loads(run(DEMO))
    enter("demo_streams", demo["streams"], "streams", DEMO)
    enter("demo_violating", demo["violating_unmonitored"], "streams", DEMO)
    for who, (group, key) in WHO.items():
        part = demo[group][key] if key else demo[group]
        for mode, keys in (("detect", DETECT), ("forecast", FORECAST)):
            for item in keys:
                unit = "tokens" if "token" in item else "score" if item == "brier" else "fraction"
                enter(f"{mode}_{who}_{item}", part[mode][item], unit, DEMO)
    for name, item in (("lead_ratio", "lead_tokens_median"), ("brier_ratio", "brier")):
        ours, best = demo["modes"]["forecast"][item], demo["oracle"]["forecast"][item]
        enter(f"forecast_{name}", ours / best, "ratio to the oracle", DEMO)
    for batch in ("batch_1", "batch_8"):
        enter(f"overhead_testbed_{batch}", demo["overhead"][batch], "ratio", DEMO)

    llama = json.loads(run(LLAMA))
    for batch in ("batch_1", "batch_8"):
        enter(f"overhead_llama_{batch}", llama[batch], "ratio", LLAMA)

    kernels = json.loads(run(quick.COMMAND))
    for name, (value, unit, asked, command) in quick.figures(kernels).items():
        enter(name, value, unit, command, asked)

    begin = time.perf_counter()
    run("midstream demo")
    enter("demo_seconds", round(time.perf_counter() - begin, 1), "s", "midstream demo")

    bytes_per_slot = json.loads(run(SLOTS))["bytes_per_slot"]
    enter("slot_bytes", bytes_per_slot, "bytes per stream", SLOTS)

    data = os.environ.get("MIDSTREAM_TOXIC_SPANS")
    if data:
        enter("toxic_token_auroc", toxic_auroc(Path(data)), "AUROC", TOXIC)
    elif FILE.exists() and "toxic_token_auroc" in (old := json.loads(FILE.read_text())):
        print("MIDSTREAM_TOXIC_SPANS is not set: toxic_token_auroc is kept", file=sys.stderr)
        figures["toxic_token_auroc"] = old["toxic_token_auroc"]
    return figures


def toxic_auroc(data: Path) -> float:
    """Run the recipe of docs/toxic_spans.md."""
    with tempfile.TemporaryDirectory() as folder:
        bundle, scores = f"{folder}/bundle", f"{folder}/scores.jsonl"
        recipe = "python bench/toxic_spans.py"
        run(f"{recipe} fit {shlex.quote(str(data / 'train.csv'))} {bundle}")
        model = run(f"{recipe} model").strip()
        trial = shlex.quote(str(data / "trial.csv"))
        run(
            f"midstream score --model {shlex.quote(model)} --bundle {bundle} "
            f"--input {trial} --output {scores}"
        )
        return float(json.loads(run(f"{recipe} auroc {trial} {scores}"))["token_auroc"])


def render(figures: dict[str, dict[str, Any]]) -> str:
    """Return the README's block of tables."""

    def value(name: str) -> Any:
        return figures[name]["value"]

    def percent(name: str) -> str:
        return f"{value(name):.1%}"

    titles = {
        "midstream": "**midstream**",
        "oracle": "Bayes oracle",
        "threshold": "single-token threshold, no chain",
        "ema": "EMA threshold, no chain",
    }
    lines = [
        f"`{DEMO}`: {value('demo_violating')} of {value('demo_streams')} responses violate when "
        "nobody watches.",
        "",
        "| detect (horizon 0) | violating tokens that left | missed | false halts | "
        "tokens seen, median |",
        "|---|--:|--:|--:|--:|",
    ]
    for who, title in titles.items():
        cells = (
            str(value(f"detect_{who}_leaked_tokens")),
            percent(f"detect_{who}_missed_rate"),
            percent(f"detect_{who}_false_halt_rate"),
            f"{value(f'detect_{who}_median_tokens_seen'):g}",
        )
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "| forecast, at the oracle's false-halt rate | false halts | lead in tokens, median | "
        "Brier score |",
        "|---|--:|--:|--:|",
    ]
    for who, title in titles.items():
        cells = (
            percent(f"forecast_{who}_false_halt_rate"),
            f"{value(f'forecast_{who}_lead_tokens_median'):g}",
            f"{value(f'forecast_{who}_brier'):.4f}",
        )
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| figure | asked | measured | command |", "|---|--:|--:|---|"]
    rows = {
        "forecast_lead_ratio": "lead, share of the oracle's",
        "forecast_brier_ratio": "Brier score, ratio to the oracle's",
        "overhead_testbed_batch_1": "time per token, ratio, testbed model, batch 1",
        "overhead_testbed_batch_8": "the same, batch 8",
        "overhead_llama_batch_1": "the same, Llama of 134 M random parameters, batch 1",
        "overhead_llama_batch_8": "the same, batch 8",
        "cpu_step_vs_eager": "decode step on the CPU, times faster than eager PyTorch, worst N",
        "cpu_step_vs_compile": "the same, than torch.compile",
        "cpu_prefill_vs_read": "prefill score on the CPU, time over only reading the input",
        "cpu_amx_vs_avx512": "AMX, times faster than AVX-512",
        "cpu_call_us": "cost of a call on the CPU, microseconds",
        "gpu_decode_vs_empty": "decode in a CUDA graph, time over an empty kernel's",
        "gpu_prefill_vs_copy": "prefill, share of the copy bandwidth",
        "gpu_norm_score_vs_norm": "norm with 8 probes, time over the norm alone",
        "gpu_llm_step_ratio": "time per token of an 8 B Llama with CUDA graphs, ratio",
        "slot_bytes": "memory of a slot with the default bundle, bytes",
        "demo_seconds": "the whole demo, seconds",
        "toxic_token_auroc": "token AUROC on 690 real comments",
    }
    for name, title in rows.items():
        if name in figures:
            entry = figures[name]
            shown = f"{entry['value']:.3f}" if isinstance(entry["value"], float) else entry["value"]
            command = entry["command"]
            link = f"[{command}]({command})" if command.endswith(".md") else f"`{command}`"
            lines.append(f"| {title} | {entry['asked'] or '–'} | {shown} | {link} |")
    first = next(iter(figures.values()))
    lines += ["", f"Measured on {first['machine']}, {first['date']}."]
    return "\n".join(lines)


def readme_with(figures: dict[str, dict[str, Any]], readme: str) -> str:
    """Return the README with its block replaced."""
    before, rest = readme.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{render(figures)}\n{END}{after}"


def main() -> None:
    """Recompute, or only render."""
    if "--render" not in sys.argv[1:]:
        figures = collect()
        FILE.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    figures = json.loads(FILE.read_text(encoding="utf-8"))
    README.write_text(readme_with(figures, README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
