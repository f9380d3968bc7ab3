"""Shared by all tests: helper modules beside the tests can be imported by name; no example is timed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from hypothesis import settings

for folder in ("runtime", "engines"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

# What a shell runs in the background ignores it, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine may be slow, or busy with something else.
settings.register_profile("dwdp", deadline=None)
settings.load_profile("dwdp")
