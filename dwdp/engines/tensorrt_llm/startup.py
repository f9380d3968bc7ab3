"""Runs when Python starts, in every program: waits until somebody imports ``tensorrt_llm``.

``setup.py`` writes this file's text into ``dwdp-tensorrt-llm.pth``, which Python's ``site`` executes. So it
stands alone, imports nothing that is not loaded already, and is harmless where dwdp is broken or gone.
``DWDP_DISABLE=1`` in the environment turns it off.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class DwdpStartupFinder:
    """Installs the plugin's hook when ``tensorrt_llm`` is looked for, once.

    It stays on ``sys.meta_path``: the import that asks it is going through that list, and would leave out
    the finder after one that is removed.
    """

    def __init__(self) -> None:
        self._is_waiting = True

    def find_spec(
        self,
        fullname: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        if fullname != "tensorrt_llm" or not self._is_waiting:
            return None
        self._is_waiting = False
        if os.environ.get("DWDP_DISABLE") == "1":
            return None
        try:
            import dwdp.engines.tensorrt_llm.import_hook as import_hook

            return import_hook.install().find_spec(fullname, path, target)
        except Exception as error:
            is_gone = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("dwdp")
            if not is_gone:
                print(f"dwdp: not available in tensorrt_llm: {error!r}", file=sys.stderr)
            return None


def install() -> None:
    """Start waiting. Does nothing where this process waits already, or did."""
    names = {type(finder).__name__ for finder in sys.meta_path}
    if not names & {"DwdpStartupFinder", "DwdpImportHook"}:
        sys.meta_path.insert(0, DwdpStartupFinder())


install()
