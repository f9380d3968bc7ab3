"""``dwdp doctor``: what dwdp can do on this machine, and whether it fits a TensorRT-LLM."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from dwdp.cli.main import EXIT_FAILURE, version_text

_IMEX_CHANNELS = Path("/dev/nvidia-caps-imex-channels")
_PACKAGES = ("torch", "transformers", "tensorrt_llm")


@click.command()
@click.option("--trtllm", is_flag=True, help="Check the installed TensorRT-LLM, or --source.")
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --trtllm: a checkout of TensorRT-LLM. It is read, not imported.",
)
@click.option(
    "--record",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --trtllm: write the names and signatures that were found to this JSON file.",
)
@click.pass_context
def doctor(ctx: click.Context, trtllm: bool, source: Path | None, record: Path | None) -> None:
    """Say what dwdp can do here.

    Exits with 1 where something is wrong: the native module cannot be loaded, or, with --trtllm, TensorRT-LLM
    is not as dwdp needs it.
    """
    if not trtllm and (source is not None or record is not None):
        raise click.UsageError("--source and --record need --trtllm")
    is_well = _examine_trtllm(source, record) if trtllm else _examine_machine()
    if not is_well:
        ctx.exit(EXIT_FAILURE)


def _examine_trtllm(source: Path | None, record: Path | None) -> bool:
    from dwdp.engines.tensorrt_llm.doctor import describe, examine

    examination = examine(source)
    for line in describe(examination):
        click.echo(line)
    if record is not None:
        record.write_text(examination.surface.as_json(), encoding="utf-8")
    return examination.verdict.fits


def _examine_machine() -> bool:
    click.echo(version_text())
    installed = [f"Python {platform.python_version()}", *map(_package_text, _PACKAGES)]
    click.echo(", ".join(installed))
    try:
        from dwdp import _C
    except ImportError as error:
        click.echo(f"native module: cannot be loaded: {error}")
        return False
    click.echo("host fabric: ready")
    click.echo(f"CUDA fabric: {_cuda_text(_C.build_info()['fabrics'])}")
    for line in (*_gpu_lines(), _imex_text(), _memory_text()):
        click.echo(line)
    return True


def _package_text(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def _cuda_text(fabrics: str) -> str:
    from dwdp.fabric.base import FabricError
    from dwdp.fabric.cuda_devices import driver_version

    if fabrics != "host+cuda":
        return "not in this build; build dwdp where nvcc is (set CUDA_HOME if it is not found)"
    try:
        major, minor = driver_version()
    except FabricError as error:
        return f"in this build, but {error}"
    return f"ready, driver for CUDA {major}.{minor}"


def _gpu_lines() -> list[str]:
    from dwdp.fabric.base import FabricError
    from dwdp.fabric.cuda_devices import list_devices

    try:
        devices = list_devices()
    except FabricError:
        return ["GPUs: none"]
    lines = []
    for device in devices:
        major, minor = device.compute_capability
        handles = [
            name
            for name, is_supported in (
                ("on this host", device.supports_posix_handles),
                ("across hosts", device.supports_fabric_handles),
            )
            if is_supported and device.supports_virtual_memory
        ]
        lines.append(
            f"GPU {device.ordinal}: {device.name}, {device.memory_bytes / (1 << 30):.0f} GiB, compute "
            f"capability {major}.{minor}, {device.num_copy_engines} copy engines, shares memory "
            f"{' and '.join(handles) or 'with nobody: virtual memory management is missing'}"
        )
    return lines or ["GPUs: none"]


def _imex_text() -> str:
    """A channel is a device file that a process opens to map memory of other hosts in its NVLink domain."""
    channels = sorted(_IMEX_CHANNELS.glob("channel*"))
    if not channels:
        return "IMEX: no channel, so ranks of one group have to be on one host"
    usable = [path.name for path in channels if os.access(path, os.R_OK | os.W_OK)]
    if not usable:
        return f"IMEX: {channels[0]} is there, but this process may not open it"
    return f"IMEX: {', '.join(usable)}"


def _memory_text() -> str:
    from dwdp.system_memory import memory_pools

    pool = min(memory_pools(), key=lambda pool: pool.available_bytes)
    return f"memory: {pool.available_bytes / (1 << 30):.1f} GiB free {pool.name}"
