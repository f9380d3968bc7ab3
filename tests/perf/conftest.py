"""The reproduction takes tens of seconds: computed once for all tests that look at it."""

from __future__ import annotations

import pytest

from dwdp.perf.reproduce import Reproduction, reproduce


@pytest.fixture(scope="session")
def reproduction() -> Reproduction:
    return reproduce()
