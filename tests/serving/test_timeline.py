"""The bars of the live page's timeline."""

from __future__ import annotations

import pytest

from dwdp.observability.spans import EXPOSED_WAIT, Span
from dwdp.serving.rank_server.timeline import Bar, bars


def copied(*times: tuple[float, float]) -> list[Span]:
    """Copies of half a MiB each for layers 0, 1, ..."""
    return [Span("fetch 0", *time, layer, 1 << 19) for layer, time in enumerate(times)]


def test_few_spans_have_a_bar_each() -> None:
    assert bars([], 10) == []
    spans = copied((1.0, 2.0), (2.0, 2.5), (4.0, 5.0))
    expected = [
        Bar(1.0, 2.0, "layer 0, 0.50 MiB"),
        Bar(2.0, 2.5, "layer 1, 0.50 MiB"),
        Bar(4.0, 5.0, "layer 2, 0.50 MiB"),
    ]
    assert bars(spans, 10) == expected
    assert bars(spans, 3) == expected


def test_waits_say_what_for() -> None:
    assert bars([Span(EXPOSED_WAIT, 1.0, 2.0, 7, 0)], 3) == [Bar(1.0, 2.0, "waiting for layer 7")]


def test_of_many_spans_the_nearest_share_a_bar() -> None:
    spans = copied((0.0, 1.0), (1.25, 2.0), (4.0, 5.0), (5.5, 6.0), (9.0, 9.5))
    assert bars(spans, 3) == [
        Bar(0.0, 2.0, "2 layers, 1.00 MiB"),
        Bar(4.0, 6.0, "2 layers, 1.00 MiB"),
        Bar(9.0, 9.5, "layer 4, 0.50 MiB"),
    ]
    assert bars(spans, 1) == [Bar(0.0, 9.5, "5 layers, 2.50 MiB")]


@pytest.mark.parametrize("max_bars", [1, 2, 7, 99, 100])
def test_equal_gaps_are_no_reason_for_more_bars(max_bars: int) -> None:
    spans = copied(*((2.0 * i, 2.0 * i + 1) for i in range(100)))
    drawn = bars(spans, max_bars)
    assert len(drawn) == max_bars
    assert (drawn[0].start_s, drawn[-1].end_s) == (0.0, 199.0)
