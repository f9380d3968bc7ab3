"""Bandwidth shared fairly: what each copy gets when several use the same ports.

Rates are max-min fair: no copy can get more without another that has no more getting less. They are
found by progressive filling (Bertsekas and Gallager, *Data Networks*, 2nd edition, section 6.5.2):
raise all rates together until a port is full, fix the copies through it, go on with the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

Flow = TypeVar("Flow")
Port = tuple[str, int]
"""A kind (``"out"``, ``"in"``, ``"host"``) and the rank it belongs to."""


def max_min_rates(
    flows: Mapping[Flow, Sequence[Port]], capacity: Mapping[str, float]
) -> dict[Flow, float]:
    """The rate of each flow, in the units of ``capacity``.

    Args:
        flows: the ports that each flow passes, at least one.
        capacity: of every kind of port.
    """
    users: dict[Port, list[Flow]] = {}
    for flow, ports in flows.items():
        for port in ports:
            users.setdefault(port, []).append(flow)
    left = {port: capacity[port[0]] for port in users}
    open_users = {port: len(list_) for port, list_ in users.items()}
    rates: dict[Flow, float] = {}
    while len(rates) < len(flows):
        tightest = min(
            (port for port, count in open_users.items() if count),
            key=lambda port: left[port] / open_users[port],
        )
        share = left[tightest] / open_users[tightest]
        for flow in users[tightest]:
            if flow in rates:
                continue
            rates[flow] = share
            for port in flows[flow]:
                left[port] = max(0.0, left[port] - share)
                open_users[port] -= 1
    return rates
