"""Takes docs/page.png: the live page over the testbed's model, served by `LocalEngine`.

    python docs/screenshot_page.py [--out docs/page.png] [--scheme light] [--seed 0]

Needs Chromium on the PATH. Clients ask for tokens until a stream was halted that is long enough
to look at; its replay is then set to a lower level.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Page, async_playwright

from midstream import testbed
from midstream.serve.app import create_app
from midstream.serve.feed import Feed
from midstream.serve.live import Live
from midstream.serve.live_routes import live_router
from midstream.serve.local import LocalEngine
from midstream.serve.run import Server
from midstream.serve.settings import Settings

CLIENTS = 28
SLOTS = 24
LONG = 24  # tokens that a halted stream has let go
TIERS = ("moderate", "moderate", "strict")


async def ask_on(url: str, client: int, seed: int) -> None:
    """One response after the other."""
    async with httpx.AsyncClient(timeout=120) as http:
        for n in itertools.count():
            prompt = testbed.sample_prompt(seed, client * 1000 + n)
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
            break
    await page.locator("#level").fill("0.2")
    await page.wait_for_timeout(300)
    await page.locator("#level").blur()


async def main(out: Path, scheme: Any, seed: int, width: int, height: int) -> None:
    """Serve, ask, look."""
    bundle = testbed.load_bundle()
    live = Live({bundle.hash: bundle}.get, text=True)
    feed = Feed([live])
    engine = LocalEngine(feed, slots=SLOTS)
    live.look_closely = engine.look_closely
    app = create_app(engine, feed, Settings(), routers=[live_router(live)])
    server = Server(app, drain=5.0, start=engine.start)
    sock = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    serving = asyncio.create_task(server.serve([sock]))
    while engine.unready is not None:
        await asyncio.sleep(0.1)
    clients = [asyncio.create_task(ask_on(url, n, seed)) for n in range(CLIENTS)]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox"],
        )
        page = await browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        async with asyncio.timeout(120):
            await look(page, url)
        await page.screenshot(path=out, full_page=width < 900)
        await browser.close()
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    server.drain()
    await serving
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path(__file__).with_name("page.png"))
    options.add_argument("--scheme", choices=("light", "dark"), default="light")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--size", default="1280x800")
    chosen = options.parse_args()
    wide, high = map(int, chosen.size.split("x"))
    asyncio.run(main(chosen.out, chosen.scheme, chosen.seed, wide, high))
