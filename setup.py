"""Builds the native core, csrc/, into ``dwdp._C``. Metadata lives in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    text = (ROOT / "dwdp" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('dwdp/_version.py has no line of the form __version__ = "X.Y.Z"')
    return match.group(1)


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


native_core = Pybind11Extension(
    "dwdp._C",
    sources=files("**/*.cpp"),
    # Any change to a header rebuilds everything: there is no finer dependency tracking here.
    depends=files("**/*.hpp"),
    include_dirs=["csrc"],
    define_macros=[("DWDP_VERSION", f'"{read_version()}"')],
    cxx_std=17,
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror=return-type", "-pthread"],
    extra_link_args=["-pthread"],
)

# DWDP_BUILD_JOBS files are compiled at a time; 2 unless set, 0 for one per processor.
ParallelCompile("DWDP_BUILD_JOBS", default=2).install()

setup(ext_modules=[native_core], cmdclass={"build_ext": build_ext})
