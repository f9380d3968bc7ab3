"""The trace of a group."""

from __future__ import annotations

import json
from typing import Any

from dwdp.observability.spans import COMPUTE, EXPOSED_WAIT, Span, fetch_lane
from dwdp.observability.trace import trace_text


def events(spans: dict[int, list[Span]]) -> list[dict[str, Any]]:
    return list(json.loads(trace_text(spans))["traceEvents"])


def test_a_span_is_an_event_on_the_row_of_its_lane() -> None:
    drawn = events(
        {
            0: [Span(fetch_lane(1), 100.002, 100.004, 5, 4_000_000)],
            1: [
                Span(COMPUTE, 100.001, 100.009, -1, 0),
                Span(EXPOSED_WAIT, 100.0, 100.0005, 3, 0),
            ],
        }
    )
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in drawn
        if event["name"] == "thread_name"
    }
    ranks = {e["pid"]: e["args"]["name"] for e in drawn if e["name"] == "process_name"}
    assert ranks == {0: "rank 0", 1: "rank 1"}
    seen = [
        (
            event["pid"],
            names[event["pid"], event["tid"]],
            event["name"],
            event["ts"],
            event["dur"],
            event["args"],
        )
        for event in drawn
        if event["ph"] == "X"
    ]
    assert seen == [
        (0, "fetch 1", "layer 5", 2000.0, 2000.0, {"bytes": 4_000_000, "gbs": 2.0}),
        (1, "exposed wait", "layer 3", 0.0, 500.0, {}),
        (1, "compute", "forward", 1000.0, 8000.0, {}),
    ]


def test_rows_are_in_order_and_a_copy_may_take_no_time() -> None:
    lanes = ["fetch on demand", *map(fetch_lane, (10, 2)), COMPUTE]
    drawn = events({0: [Span(lane, 1.0, 1.0, 0, 8) for lane in lanes]})
    rows = {e["args"]["name"]: e["tid"] for e in drawn if e["name"] == "thread_name"}
    assert sorted(rows, key=rows.__getitem__) == [
        COMPUTE,
        EXPOSED_WAIT,
        "fetch 2",
        "fetch 10",
        "fetch on demand",
    ]
    assert {event["dur"] for event in drawn if event["ph"] == "X"} == {0.0}


def test_a_group_that_did_nothing_has_a_trace() -> None:
    drawn = events({0: [], 1: []})
    assert {event["ph"] for event in drawn} == {"M"}
