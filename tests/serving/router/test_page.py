"""The live page in a real browser."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, open_page
from front import MODEL, running, serving, spawn

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

STATES = "[...document.querySelectorAll('.state')].map((state) => state.textContent).join()"
IS_LIVE = "document.getElementById('connection').textContent === 'live'"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
NOTES = "[...document.querySelectorAll('.note')].map((note) => note.textContent)"
LEGEND = "[...document.querySelectorAll('#legend li')].map((item) => item.textContent)"
MODEL_DIR = Path(__file__).parents[3] / "examples" / "tiny_moe" / "model"


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
                    await page.eventually(f"document.querySelectorAll('rect.{kind}').length === 2")
                assert await page.evaluate(LEGEND) == ["compute", "fetch"]
                assert await page.evaluate(NOTES) == ["", ""]
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


def bars(rank: int, kind: str) -> str:
    """An expression for ``[left, top, width, height, title]`` of the bars of one kind on a rank's card."""
    selector = f'section[data-rank="{rank}"] rect.{kind}'
    sizes = "['x', 'y', 'width', 'height'].map((name) => Number(bar.getAttribute(name)))"
    return (
        f"[...document.querySelectorAll('{selector}')].map((bar) => [...{sizes}, bar.textContent])"
    )


def test_the_page_draws_the_lanes_of_a_staged_group(tmp_path: Path) -> None:
    options = ["--dwdp-size", "2", "--fetch-mode", "staged", "--served-model-name", MODEL]
    command = [sys.executable, "-m", "dwdp", "serve", str(MODEL_DIR), "--port", "0", *options]
    with running(spawn([*command, "--threads-per-rank", "1"]), r"ready at (\S+)") as front:

        async def look() -> None:
            async with open_page(front.url, tmp_path / "profile") as page:
                await page.eventually(f"{STATES} === 'ready,ready'")
                stream = front.stream("def f(", max_tokens=1000, ignore_eos=True)
                # One rank generates; all is read at once, because the page goes on.
                names = "[...document.querySelectorAll('.lane')].map((name) => name.textContent)"
                drawn = await page.eventually(
                    f"[[{bars(0, 'compute')}, {bars(0, 'fetch')}, {names}],"
                    f" [{bars(1, 'compute')}, {bars(1, 'fetch')}, {names}]]"
                    ".find(([computed, fetched]) => computed.length > 2 && fetched.length > 20)"
                )
                stream.close()
                computed, fetched, lanes = drawn
                assert lanes == 2 * ["compute", "fetch 0"]
                # One row each, the lane's below, all inside of the plot.
                [compute_top] = {top for _, top, *_ in computed}
                [fetch_top] = {top for _, top, *_ in fetched}
                assert fetch_top > compute_top + computed[0][3]
                assert all(92 <= left <= left + width <= 512.5 for left, _, width, *_ in fetched)
                assert all("layer" in title and "MiB: " in title for *_, title in fetched)
                assert len({title.split(",")[0] for *_, title in fetched}) >= 2
                legend = await page.evaluate(LEGEND)
                kinds = [text.split(":")[0] for text in legend]
                assert kinds == ["compute", "exposed wait", "fetch"]
                assert await page.evaluate(NOTES) == ["", ""]
                assert page.complaints == []

        asyncio.run(look())


def test_the_page_marks_waits_and_says_why_there_are_no_lanes(tmp_path: Path) -> None:
    """What the page makes of a rank's timeline: shown, and read, before the next update can come."""
    with serving(1) as front:

        async def look() -> None:
            async with open_page(front.url, tmp_path / "profile") as page:
                await page.eventually(f"{STATES} === 'ready'")

                async def shown(timeline: str, expression: str) -> object:
                    show = "const now = structuredClone(previous);"
                    show += " now.ranks[0].timeline = timeline; show(now);"
                    return await page.evaluate(
                        f"((timeline) => {{ {show} return {expression}; }})({timeline})"
                    )

                lanes = "{name: 'compute', spans: [[6, 9, 'step']]}"
                waits = "{name: 'exposed wait', spans: [[7, 8, 'waiting for layer 3']]}"
                staged = f"{{now_s: 10, fetch_mode: 'staged', lanes: [{lanes}, {waits}]}}"
                [[left, top, width, height, title]] = await shown(staged, bars(0, "wait"))  # type: ignore[misc]
                [[start, compute_top, length, compute_height, _]] = await shown(  # type: ignore[misc]
                    staged, bars(0, "compute")
                )
                assert title == "waiting for layer 3: 1000.0 ms"
                assert (left - start, width) == (
                    pytest.approx(length / 3),
                    pytest.approx(length / 3),
                )
                # Over compute, and not hidden by it.
                assert top < compute_top < compute_top + compute_height < top + height
                [note] = await shown(staged, NOTES)  # type: ignore[misc]
                assert note.startswith("No fetch lanes: in mode staged on this device")
                direct = f"{{now_s: 10, fetch_mode: 'direct', lanes: [{lanes}]}}"
                [note] = await shown(direct, NOTES)  # type: ignore[misc]
                assert note.startswith("No fetch lanes: in direct mode")
                assert await shown("null", NOTES) == [""]
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
