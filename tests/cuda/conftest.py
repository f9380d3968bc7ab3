"""Fixtures: the driver that this process tests with, and what is alive in it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import standin as standin_module
from driver import Driver
from standin import Standin

from dwdp import _C

GRANULARITY = 64 << 10


@pytest.fixture(scope="session")
def has_device() -> bool:
    """Whether tests run on a CUDA device; ``DWDP_TEST_DRIVER=standin`` keeps them off it."""
    return os.environ.get("DWDP_TEST_DRIVER") != "standin" and standin_module.real_device()


@pytest.fixture(scope="session")
def loaded_standin(has_device: bool) -> Iterator[Standin | None]:
    """The stand-in, built and loaded; None where the real driver is used."""
    if has_device:
        yield None
        return
    if standin_module.cuda_home() is None:
        pytest.skip("no CUDA toolkit to build the stand-in driver with")
    standin_module.build()
    loaded = Standin()
    loaded.set("GRANULARITY", GRANULARITY)
    yield loaded
    # For the tests after these, this is a machine without a GPU.
    loaded.set("DEVICES", 0)


@pytest.fixture(scope="session", params=["standin", pytest.param("gpu", marks=pytest.mark.gpu)])
def driver(
    request: pytest.FixtureRequest, has_device: bool, loaded_standin: Standin | None
) -> Iterator[Driver]:
    """The driver API, current on device 0: of the stand-in, or of a GPU where there is one."""
    if (request.param == "gpu") != has_device:
        pytest.skip("no CUDA device" if request.param == "gpu" else "tested on the CUDA device")
    library = loaded_standin.library if loaded_standin else ctypes.CDLL("libcuda.so.1")
    driver = Driver(library, keeps_streams=has_device)
    yield driver
    driver.close()


@pytest.fixture
def standin(driver: Driver, loaded_standin: Standin | None) -> Iterator[Standin]:
    """The stand-in, for tests that fail calls, delay streams or count what is alive."""
    if loaded_standin is None:
        pytest.skip("needs the stand-in driver")
    yield loaded_standin
    loaded_standin.fail("", 0)
    for name in ("JITTER_US", "MEMORY_BYTES", "DEVICES", "FABRIC", "PEER_ACCESS", "SEED"):
        loaded_standin.set(name, "")


@pytest.fixture
def device(driver: Driver) -> _C.CudaDevice:
    """The project's view of device 0, as it is before the test changes any settings."""
    if _C.build_info()["fabrics"] != "host+cuda":
        pytest.skip("this build has no CUDA fabric")
    return _C.CudaDevice(0)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test took from the stand-in is given back, and no stream used after its end."""
    if "driver" not in request.fixturenames:
        yield
        return
    loaded: Standin | None = request.getfixturevalue("loaded_standin")
    request.getfixturevalue("driver")
    if loaded is None:
        yield
        return
    gc.collect()
    before, dead_streams = loaded.live(), loaded.misuses("dead stream")
    yield
    request.node.funcargs.clear()  # pytest would hold what fixtures made until after this
    gc.collect()
    assert loaded.live() == before
    assert loaded.misuses("dead stream") == dead_streams
