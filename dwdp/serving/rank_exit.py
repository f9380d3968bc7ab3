"""How a rank's process ends: its exit codes, and the errors that come without a traceback."""

from __future__ import annotations

from dwdp.fabric.base import FabricError
from dwdp.rendezvous import GroupError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
"""The checkpoint, the options or the placement are no good; another start would end the same way."""
EXIT_PEER_FAILED = 3
"""Another rank's set-up failed; nothing is wrong with this one."""

EXPECTED_ERRORS = (ValueError, GroupError, FabricError, OSError, MemoryError)
"""Their text says what is wrong; any other error is a defect of the program."""
