"""Takes docs/page.png: the live page of ``midstream serve --page text`` with the testbed's model.

    python docs/screenshot_page.py [--out docs/page.png] [--scheme light] [--size 1280x800]

Needs Chromium on the PATH. Clients ask for tokens until a stream was halted that is long enough
to look at; its replay is then set to a lower level.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Page, async_playwright

from midstream import testbed

CLIENTS = 28
SERVE = """
import sys
from midstream.cli import main
sys.argv = "midstream serve --port 0 --page text --slots 24 --drain 2".split()
main()
"""
LONG = 24  # tokens that a halted stream has let go
REPLAYED = 4  # of them those that another level would have kept
TIERS = ("moderate", "moderate", "strict")


async def ask_on(url: str, client: int) -> None:
    """One response after the other."""
    async with httpx.AsyncClient(timeout=120) as http:
        for n in itertools.count():
            prompt = testbed.sample_prompt(0, client * 1000 + n)
            body = {
                "model": "testbed",
                "prompt": list(prompt.ids),
                "max_tokens": 192,
                "temperature": 1.0,
                "stream": True,
                "midstream": {"tier": TIERS[(client + n) % len(TIERS)]},
            }
            async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for _ in answer.aiter_bytes():
                    pass


async def look(page: Page, url: str) -> None:
    """Choose a halted stream that shows something, and replay it."""
    await page.goto(url)
    while True:
        await page.wait_for_timeout(700)
        await page.keyboard.press("h")
        await page.wait_for_timeout(500)
        left = page.locator("#text span[data-to]")
        halted = await page.locator("#state.halted").count() == 1
        halts = await page.locator(".row.halted").count()
        if halted and halts >= 4 and await left.count() >= LONG:
            await page.locator("#level").fill("0.2")
            await page.wait_for_timeout(300)
            if await page.locator("#text .stays").count() >= REPLAYED:
                break
    await page.locator("#level").blur()


async def listening(serving: asyncio.subprocess.Process) -> str:
    """Address that the server says it listens on."""
    assert serving.stderr is not None
    async for line in serving.stderr:
        if found := re.search(rb"listening on (\S+)", line):
            return found[1].decode()
    raise SystemExit("midstream serve ended without listening")


async def ready(url: str) -> None:
    """Wait until the model is loaded."""
    async with httpx.AsyncClient() as http:
        while (await http.get(f"{url}/ready")).status_code != 200:
            await asyncio.sleep(0.2)


async def main(out: Path, scheme: Any, width: int, height: int) -> None:
    """Serve, ask, look."""
    serving = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(300), asyncio.TaskGroup() as tasks, async_playwright() as playwright:
        url = await listening(serving)
        assert serving.stderr is not None
        background = [tasks.create_task(serving.stderr.read())]
        await ready(url)
        background += [tasks.create_task(ask_on(url, n)) for n in range(CLIENTS)]
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox"],
        )
        page = await browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        await look(page, url)
        await page.screenshot(path=out, full_page=width < 900)
        await browser.close()
        for task in background:
            task.cancel()
    serving.terminate()
    await serving.wait()
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path(__file__).with_name("page.png"))
    options.add_argument("--scheme", choices=("light", "dark"), default="light")
    options.add_argument("--size", default="1280x800")
    chosen = options.parse_args()
    wide, high = map(int, chosen.size.split("x"))
    asyncio.run(main(chosen.out, chosen.scheme, wide, high))
