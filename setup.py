"""Builds the native core, csrc/, into ``dwdp._C``. Metadata lives in pyproject.toml.

The CUDA fabric is built where nvcc and its headers are found: in CUDA_HOME or CUDA_PATH, on the PATH,
or in /usr/local/cuda. Environment:

    DWDP_CUDA        0: without the CUDA fabric; 1: not without it; else whatever is found
    DWDP_CUDA_ARCHS  GPU architectures of the kernels, "90 100" for instance
    DWDP_BUILD_JOBS  files that are compiled at a time; 2 unless set, 0 for one per processor

Beside the package it installs ``dwdp-tensorrt-llm.pth``, which holds what runs when Python starts; see
dwdp/engines/tensorrt_llm/startup.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Command, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
STARTUP_SOURCE = ROOT / "dwdp" / "engines" / "tensorrt_llm" / "startup.py"
STARTUP_FILE = "dwdp-tensorrt-llm.pth"
KERNELS = ("demand", "spin")

# Those that the toolkit knows are taken, and PTX of the last for GPUs newer than any.
DEFAULT_ARCHITECTURES = ("80", "90", "100", "120")

# Older headers lack cuMemcpyBatchAsync's types.
OLDEST_CUDA = 12080


class BuildError(Exception):
    """What the user has to put right."""


class NoToolkitError(BuildError):
    """There is no CUDA toolkit to build with."""


def read_version() -> str:
    text = (ROOT / "dwdp" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('dwdp/_version.py has no line of the form __version__ = "X.Y.Z"')
    return match.group(1)


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


CUDA_SOURCES = files("cuda/*.cpp") + files("bindings/cuda_*.cpp")


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit.

    Attributes:
        architectures: of the kernels; PTX of the last one is added.
    """

    nvcc: Path
    include: Path
    architectures: tuple[str, ...]

    @property
    def described(self) -> str:
        return " ".join([*self.architectures, f"{self.architectures[-1]}+PTX"])

    def compile(self, source: Path, fatbin: Path) -> None:
        command = [
            str(self.nvcc),
            "-std=c++17",
            "-O3",
            "-lineinfo",
            "-fatbin",
            f"-I{ROOT / 'csrc'}",
        ]
        for architecture in self.architectures:
            command.append(f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
        newest = self.architectures[-1]
        command.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        run([*command, str(source), "-o", str(fatbin)])


def run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def find_cuda() -> Cuda:
    """The toolkit to build with.

    Raises:
        NoToolkitError: there is none, or it is too old.
        BuildError: it lacks an architecture that was asked for.
    """
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += [str(Path(on_path).resolve().parent.parent) if on_path else None, "/usr/local/cuda"]
    folders = [Path(home) for home in homes if home]
    found = next(((home, path) for home in folders if (path := find_headers(home))), None)
    if found is None:
        raise NoToolkitError(
            "no CUDA toolkit, nvcc and headers, in CUDA_HOME, CUDA_PATH, around the nvcc on the PATH "
            "or in /usr/local/cuda; install one, or set CUDA_HOME"
        )
    home, include = found
    nvcc = home / "bin" / "nvcc"
    header = (include / "cuda.h").read_text(encoding="utf-8", errors="replace")
    match = re.search(r"^#define CUDA_VERSION (\d+)$", header, re.MULTILINE)
    version = int(match.group(1)) if match else 0
    if version < OLDEST_CUDA:
        raise NoToolkitError(
            f"{include}/cuda.h is of CUDA {version // 1000}.{version % 1000 // 10}; "
            "12.8 or newer is needed"
        )
    return Cuda(nvcc, include, choose_architectures(nvcc))


def find_headers(home: Path) -> Path | None:
    """The folder of the driver's headers in a toolkit that has nvcc; None where it is not one."""
    if not os.access(home / "bin" / "nvcc", os.X_OK):
        return None
    candidates = [home / "include", *sorted(home.glob("targets/*/include"))]
    return next((path for path in candidates if (path / "cudaTypedefs.h").is_file()), None)


def choose_architectures(nvcc: Path) -> tuple[str, ...]:
    known = re.findall(r"compute_(\d+)", run([str(nvcc), "--list-gpu-arch"]))
    asked = re.split(r"[\s,;]+", os.environ.get("DWDP_CUDA_ARCHS", "").strip().replace(".", ""))
    if asked == [""]:
        return tuple(name for name in DEFAULT_ARCHITECTURES if name in known)
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise BuildError(
            f"DWDP_CUDA_ARCHS names {', '.join(unknown)}, but {nvcc} knows {', '.join(known)}"
        )
    return tuple(sorted(set(asked), key=int))


def wanted_cuda() -> Cuda | None:
    """The toolkit, or None where the module is built without CUDA; says why.

    Raises:
        BuildError: CUDA was asked for and cannot be had, or the environment makes no sense.
    """
    choice = os.environ.get("DWDP_CUDA", "")
    if choice not in ("", "0", "1"):
        raise BuildError(f"DWDP_CUDA is {choice!r}: set it to 0 or 1, or unset it")
    if choice == "0":
        return None
    try:
        return find_cuda()
    except NoToolkitError as error:
        if choice == "1":
            raise
        print(f"dwdp is built without its CUDA fabric: {error}", file=sys.stderr)
        return None


class BuildNativeCore(build_ext):
    """``build_ext`` that adds the CUDA fabric where there is a toolkit."""

    def build_extensions(self) -> None:
        try:
            cuda = wanted_cuda()
            [extension] = self.extensions
            if cuda is not None:
                self.add_cuda(extension, cuda)
        except BuildError as error:
            sys.exit(f"error: {error}\n(DWDP_CUDA=0 builds dwdp without its CUDA fabric)")
        compilers = [os.environ.get(name, "") for name in ("CC", "CXX")]
        configuration = repr((cuda, compilers, extension.sources, extension.define_macros))
        record = Path(self.build_temp, "configuration.txt")
        if not record.is_file() or record.read_text() != configuration:
            self.force = True  # Last built from or for something else.
            # What an interrupted build leaves behind is of neither configuration.
            record.unlink(missing_ok=True)
        super().build_extensions()
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(configuration)

    def add_cuda(self, extension: Pybind11Extension, cuda: Cuda) -> None:
        extension.define_macros += [
            ("DWDP_WITH_CUDA", None),
            ("DWDP_CUDA_ARCHS", f'"{cuda.described}"'),
        ]
        # A system folder, so that its headers give no warnings.
        extension.extra_compile_args += ["-isystem", str(cuda.include)]
        extension.extra_link_args.append("-ldl")
        extension.sources += CUDA_SOURCES
        extension.sources += [self.embed(kernel, cuda) for kernel in KERNELS]

    def embed(self, kernel: str, cuda: Cuda) -> str:
        """Compile one kernel, and write a source file that holds what came out. Returns its path."""
        source = ROOT / "csrc" / "cuda" / "kernels" / f"{kernel}.cu"
        folder = Path(self.build_temp, "kernels")
        folder.mkdir(parents=True, exist_ok=True)
        embedded = folder / f"{kernel}_image.cpp"
        inputs = [source, *source.parent.glob("*.cuh")]
        digest = hashlib.sha256(repr(cuda).encode())
        for path in inputs:
            digest.update(path.read_bytes())
        stamp = f"// {digest.hexdigest()}\n"
        if not embedded.is_file() or not embedded.read_text().startswith(stamp):
            fatbin = folder / f"{kernel}.fatbin"
            cuda.compile(source, fatbin)
            embedded.write_text(stamp + as_array(f"k{kernel.title()}Image", fatbin.read_bytes()))
        return str(embedded)


class BuildStartupFile(Command):
    """Writes what Python's ``site`` runs: one line, as it takes only such, with names of its own."""

    description = f"write {STARTUP_FILE}"
    user_options: ClassVar[list[tuple[str, str, str]]] = [
        ("build-lib=", "b", "the folder to write it to")
    ]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        # An editable wheel leaves out the build folder; what goes beside the packages is put there directly.
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else None
        path = Path(folder or self.build_lib or ".", STARTUP_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        source = STARTUP_SOURCE.read_text(encoding="utf-8")
        line = f"import sys; exec({source!a}, {{'__name__': 'dwdp_startup'}})\n"
        path.write_text(line, encoding="ascii")

    def get_source_files(self) -> list[str]:
        return [str(STARTUP_SOURCE.relative_to(ROOT))]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """``build``, and the startup file."""

    sub_commands: ClassVar[list[tuple[str, Any]]] = [
        *build.sub_commands,
        ("build_startup_file", None),
    ]


def as_array(name: str, content: bytes) -> str:
    numbers = ",".join(map(str, content))
    return (
        "namespace dwdp::cuda {\n"
        f"extern const unsigned char {name}[];\n"
        f"alignas(16) const unsigned char {name}[] = {{{numbers}}};\n"
        "}  // namespace dwdp::cuda\n"
    )


native_core = Pybind11Extension(
    "dwdp._C",
    sources=[
        source
        for folder in ("common", "host", "transport", "bindings")
        for source in files(f"{folder}/*.cpp")
        if source not in CUDA_SOURCES
    ],
    # Any change to a header rebuilds everything: there is no finer dependency tracking here. With the
    # sources these are what a source distribution holds.
    depends=files("**/*.hpp") + files("**/*.cu*") + CUDA_SOURCES,
    include_dirs=["csrc"],
    define_macros=[("DWDP_VERSION", f'"{read_version()}"')],
    cxx_std=17,
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror=return-type", "-pthread"],
    extra_link_args=["-pthread"],
)

ParallelCompile("DWDP_BUILD_JOBS", default=2).install()

setup(
    ext_modules=[native_core],
    cmdclass={
        "build": Build,
        "build_ext": BuildNativeCore,
        "build_startup_file": BuildStartupFile,
    },
)
