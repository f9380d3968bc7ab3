"""Patches modules of ``tensorrt_llm`` right after each of them was executed, in whatever process.

The startup file installs the hook when ``tensorrt_llm`` is first looked for. Where there is no such file
(dwdp is on PYTHONPATH but not installed) import ``dwdp.engines.tensorrt_llm.startup`` before it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

DISABLE_VARIABLE = "DWDP_DISABLE"


PACKAGE = "tensorrt_llm"

_PROGRAMS = frozenset({"tensorrt_llm.commands.serve"})
_RUN_AS_PROGRAM = """\
from {name} import main

if __name__ == "__main__":
    main()
"""


class DwdpImportHook(MetaPathFinder):
    """Lets the other finders find a watched module, and calls ``after`` when it was executed.

    ``before`` is called when the package itself is about to be executed.
    """

    def __init__(
        self,
        watched: Collection[str],
        before: Callable[[], None],
        after: Callable[[ModuleType], None],
    ) -> None:
        self._watched = frozenset(watched)
        self._before = before
        self._after = after

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._watched:
            return None
        spec = self._find_elsewhere(fullname, path, target)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            before = self._before if fullname == PACKAGE else None
            spec.loader = _CallingLoader(spec.loader, before, self._after)
        return spec

    def _find_elsewhere(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            # As Python does, leave out finders of the old protocol.
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _CallingLoader(Loader):
    """A module's own loader, with a call before or after it. Only the import itself sees this one.

    And ``python -m``, which imports nothing: it runs what :meth:`get_code` returns.
    """

    def __init__(
        self,
        loader: Loader,
        before: Callable[[], None] | None,
        after: Callable[[ModuleType], None],
    ) -> None:
        self._loader = loader
        self._before = before
        self._after = after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        if self._before is not None:
            self._before()
        self._loader.exec_module(module)
        self._after(module)

    def get_code(self, fullname: str) -> CodeType | None:
        """What ``python -m fullname`` runs. Of a program: the import of its module, and its ``main``."""
        if fullname in _PROGRAMS:
            return compile(_RUN_AS_PROGRAM.format(name=fullname), f"<{fullname}>", "exec")
        code: CodeType | None = self._loader.get_code(fullname)  # type: ignore[attr-defined]
        return code

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def install() -> DwdpImportHook:
    """Watch the imports of this process; the hook that is there already, if there is one.

    With ``DWDP_DISABLE=1`` in the environment the hook watches nothing.
    """
    for finder in sys.meta_path:
        if isinstance(finder, DwdpImportHook):
            return finder
    from dwdp.engines.tensorrt_llm import patches

    is_disabled = os.environ.get(DISABLE_VARIABLE) == "1"
    watched = () if is_disabled else {PACKAGE, *patches.watched_modules()}
    hook = DwdpImportHook(watched, patches.prepare, patches.apply)
    sys.meta_path.insert(0, hook)
    return hook
