"""How many files this process may open."""

from __future__ import annotations

import resource


def raise_descriptor_limit() -> int:
    """Let this process open as many files as it is allowed to; returns how many those are.

    Every region and every connection is one or two. The usual limit of 1024 is there for programs that
    use ``select``, and too low for large models and many clients.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
