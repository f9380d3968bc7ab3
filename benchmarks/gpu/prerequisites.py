"""What the GPU report needs installed, looked up without importing it: torch alone takes seconds."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

REQUIREMENTS = {
    "annotated-types": "0.6",
    "click": "8.2.2",
    "hypothesis": "6.100",
    "psutil": "5.9",
    "pybind11": "2.13",
    "pydantic": "2.9",
    "pytest": "8.3",
    "pytest-timeout": "2.3",
    "pyyaml": "6",
    "rich": "13",
    "safetensors": "0.6",
    "setuptools": "77",
    "torch": "2.9",
    "transformers": "5.17",
}
"""Packages and their oldest releases, as in pyproject.toml: to build dwdp, to test it and to run it."""


def release(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: ``(2, 11, 0)`` of ``2.11.0a0+cu130``."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def lacking(requirements: Mapping[str, str]) -> dict[str, str]:
    """Packages that are not there or too old, as pip takes them, with the installed version or ""."""
    found = {}
    for name, oldest in requirements.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            found[f"{name}>={oldest}"] = ""
            continue
        if release(installed) < release(oldest):
            found[f"{name}>={oldest}"] = installed
    return found


def require_packages(requirements: Mapping[str, str] = REQUIREMENTS) -> None:
    """End the program with 2, and one line that says what to install, where packages are missing."""
    found = lacking(requirements)
    if not found:
        return
    names = [f"{what} ({old} is installed)" if old else what for what, old in found.items()]
    install = shlex.join((sys.executable, "-m", "pip", "install", *found))
    print(
        f"error: {sys.executable} lacks {', '.join(names)}: {install} (or run make setup, or name an "
        "interpreter that has them with PYTHON=...)",
        file=sys.stderr,
    )
    sys.exit(2)
