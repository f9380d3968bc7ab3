"""The live page in a real browser."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from browser import CHROMIUM, open_page
from front import serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

STATES = "[...document.querySelectorAll('.state')].map((state) => state.textContent).join()"
IS_LIVE = "document.getElementById('connection').textContent === 'live'"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def figure(rank: int, name: str) -> str:
    """An expression for the figure called ``name`` on the card of ``rank``."""
    terms = f"[...document.querySelectorAll('section[data-rank=\"{rank}\"] dt')]"
    return f"{terms}.find((term) => term.textContent === '{name}').nextSibling.textContent"


def test_the_page_shows_the_group_and_what_happens_to_it(tmp_path: Path) -> None:
    with serving(2, exit_with={f"1/{start}": 1 for start in range(1, 4)}) as front:

        async def look() -> None:
            async with open_page(front.url, tmp_path / "profile") as page:
                await page.eventually(f"{STATES} === 'ready,ready'")
                assert (
                    await page.evaluate("document.getElementById('model').textContent")
                    == "stand-in"
                )
                assert await page.evaluate(figure(0, "resident experts")) == "8.0 MiB"
                assert await page.evaluate(figure(0, "staging slots")) == "2.0 MiB"
                assert (await page.evaluate(figure(1, "exposed wait"))).startswith("0.13 s")
                # One bar in the compute lane and one in the fetch lane of each rank.
                for kind in ("compute", "fetch"):
                    assert await page.evaluate(f"document.querySelectorAll('.{kind}').length") == 2
                assert await page.evaluate("document.getElementById('risk').hidden")

                stream = front.stream("each=0.01 busy", max_tokens=1500)
                rank = stream.served_by
                await page.eventually(f"Number({figure(rank, 'tokens/s')}) > 10")
                assert await page.evaluate(figure(rank, "running")) == "1 of 10"
                stream.close()

                front.kill(1)
                await page.eventually(f"{STATES} !== 'ready,ready'")
                await page.eventually(
                    "document.getElementById('risk').innerText.startsWith('Rank 0 is the last')"
                )
                await page.eventually(f"{STATES} === 'ready,ready'")
                await page.eventually(f"Number({figure(1, 'restarts')}) === 4")
                assert page.complaints == []

        asyncio.run(look())


def test_the_page_follows_the_users_taste_and_loads_nothing_else(tmp_path: Path) -> None:
    with serving(1) as front:

        async def look() -> None:
            async with open_page(front.url, tmp_path / "profile") as page:
                await page.eventually(IS_LIVE)
                await page.prefer("light")
                assert await page.evaluate(BACKGROUND) == "rgb(255, 255, 255)"
                await page.prefer("dark")
                assert await page.evaluate(BACKGROUND) == "rgb(20, 23, 28)"
                loaded = await page.evaluate(
                    "performance.getEntriesByType('resource').map((entry) => entry.name)"
                )
                assert set(loaded) <= {f"{front.url}/page/events"}
                assert page.complaints == []

        asyncio.run(look())


def test_the_page_asks_for_the_key(tmp_path: Path) -> None:
    with serving(1, keys=("sesame",)) as front:

        async def look() -> None:
            async with open_page(front.url, tmp_path / "profile") as page:
                await page.eventually("!document.getElementById('key').hidden")
                for given in ("wrong", "sesame"):
                    await page.evaluate(f"document.getElementById('key-text').value = '{given}'")
                    await page.evaluate("document.querySelector('#key button').click()")
                    await asyncio.sleep(0.5)
                await page.eventually(f"{STATES} === 'ready'")
                assert await page.evaluate("document.getElementById('key').hidden")

        asyncio.run(look())


def test_the_page_returns_when_the_server_does(tmp_path: Path) -> None:
    with serving(1) as front:

        async def look() -> None:
            async with open_page(front.url, tmp_path / "profile") as page:
                await page.eventually(IS_LIVE)
                assert await asyncio.to_thread(front.end) == 0
                await page.eventually("document.getElementById('connection').className === 'lost'")

        asyncio.run(look())
