"""Which GPUs of which node every server of a job gets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Role = Literal["context", "generation"]

FRONT_END_PORT = 8000
RENDEZVOUS_PORT = 29500
_LAST_PORT = RENDEZVOUS_PORT - 1


@dataclass(frozen=True)
class Servers:
    """Servers of one kind.

    Attributes:
        num_servers: how many.
        gpus_per_server: GPUs of each; one task per GPU.
    """

    num_servers: int
    gpus_per_server: int

    @property
    def num_gpus(self) -> int:
        """GPUs of all of them."""
        return self.num_servers * self.gpus_per_server


class ServerPlace(NamedTuple):
    """Where one server runs: on these GPUs of every one of these nodes (counted from 0 in the job)."""

    role: Role
    number: int
    nodes: tuple[int, ...]
    gpus: tuple[int, ...]
    port: int


def place_servers(
    servers: Iterable[tuple[Role, Servers]], gpus_per_node: int
) -> tuple[ServerPlace, ...]:
    """A place for every server, in the given order; ports follow the front end's.

    A server that fits on a node is never spread over two; a larger one takes whole nodes. A kind starts on a
    node of its own, so that prefill and generation share no host.

    Raises:
        ValueError: a server of several nodes that does not fill them, or more servers than ports.
    """
    places: list[ServerPlace] = []
    node, free = -1, 0
    for role, kind in servers:
        size = kind.gpus_per_server
        if size > gpus_per_node and size % gpus_per_node:
            raise ValueError(
                f"A {role} server of {size} GPUs does not fill nodes of {gpus_per_node}: use at most "
                f"{gpus_per_node} GPUs, or a multiple."
            )
        free = 0
        for number in range(kind.num_servers):
            num_nodes = max(1, size // gpus_per_node)
            if free < min(size, gpus_per_node):
                node, free = node + 1, gpus_per_node
            first = gpus_per_node - free
            gpus = tuple(range(first, first + min(size, gpus_per_node)))
            nodes = tuple(range(node, node + num_nodes))
            places.append(ServerPlace(role, number, nodes, gpus, FRONT_END_PORT + 1 + len(places)))
            node, free = nodes[-1], free - len(gpus)
    if places and places[-1].port > _LAST_PORT:
        raise ValueError(f"{len(places)} servers are more than there are ports: use several jobs.")
    return tuple(places)


def num_nodes(places: Iterable[ServerPlace]) -> int:
    """Nodes that the job needs."""
    return 1 + max(place.nodes[-1] for place in places)
