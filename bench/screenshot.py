"""Draw docs/watch.svg: what ``midstream watch`` shows for one prompt of the testbed.

python bench/screenshot.py SEED docs/watch.svg
"""

from __future__ import annotations

import io
import sys

import torch
from rich.console import Console

from midstream import testbed
from midstream.engines.hf import stream
from midstream.monitor import Monitor
from midstream.show import StreamView


def main() -> None:
    """Record one run."""
    seed, path = int(sys.argv[1]), sys.argv[2]
    console = Console(record=True, force_terminal=True, width=100, file=io.StringIO())
    model, tokenizer = testbed.load()
    messages = testbed.sample_prompt(seed, 0).messages
    for message in messages:
        console.print(f"{message['role']}: {message['content']}", style="dim", markup=False)
    torch.manual_seed(seed)
    monitor = Monitor(testbed.load_bundle(), slots=1)
    events = stream(model, tokenizer, messages, monitor, do_sample=True, top_k=0)
    view = StreamView("assistant")
    for event in events:
        view.take(event)
    console.print(view.render(console.width))  # the last frame; Live would leave others in between
    console.save_svg(path, title=f"midstream watch --seed {seed}")


if __name__ == "__main__":
    main()
