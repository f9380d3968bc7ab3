"""Hardware as data: what a GPU (or a CPU host) can move and compute, per device.

A description is a YAML file; those of ``dwdp/perf/data/hardware`` come with the package. Rates are
per GPU and in one direction. 1 GB is 1e9 bytes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
)

DATA_DIR = Path(__file__).parent / "data"

Datatype = Literal["fp32", "bf16", "fp8", "fp4"]

_WIDER: dict[Datatype, Datatype] = {"fp4": "fp8", "fp8": "bf16", "bf16": "fp32"}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any) -> Any:
        # YAML reads yes, no, on and off as these; they are not the figures 1 and 0.
        if isinstance(value, bool):
            raise ValueError(f"{value} is not a figure")
        return value


Figure = Annotated[float, Field(ge=1e-6, le=1e9)]
"""A rate or size: positive, and far from where arithmetic overflows."""


class Link(_Section):
    """How a GPU reaches its peers' memory.

    Attributes:
        gbs: bandwidth per GPU, one direction.
        domain_size: GPUs that reach each other over it.
        copy_engines: copies of one GPU that run at the same time.
        copy_setup_s: time from one copy's end to the next one's first byte on the same engine.
    """

    gbs: Figure
    domain_size: PositiveInt
    copy_engines: PositiveInt = 1
    copy_setup_s: float = Field(default=0.0, ge=0, le=1)


class Achieved(_Section):
    """Shares of the peaks that real kernels reach. 1 is the peak, so the defaults are a pure roofline.

    Attributes:
        attention, dense_gemm, grouped_gemm: share of the peak rate of the datatype in use.
        memory: share of the memory bandwidth.
        link: share of the link bandwidth that copies reach, contention apart.
        collective: share of the link bandwidth that all-to-all exchanges reach.
        other_s_per_token_layer: time of everything that is neither attention nor a matrix product
            (norms, quantisation, routing, gather and scatter), per token and layer.
        copy_slowdown: how many times longer compute takes while a copy runs beside it.
        generation: share of the roofline of what grows with the number of sequences in generation.
        step_overhead_s: host and launch time of one forward that nothing hides.
        source: where the figures come from, or "" if nobody has measured.
    """

    attention: float = Field(default=1.0, gt=0, le=1)
    dense_gemm: float = Field(default=1.0, gt=0, le=1)
    grouped_gemm: float = Field(default=1.0, gt=0, le=1)
    memory: float = Field(default=1.0, gt=0, le=1)
    link: float = Field(default=1.0, gt=0, le=1)
    collective: float = Field(default=1.0, gt=0, le=1)
    other_s_per_token_layer: float = Field(default=0.0, ge=0, le=1)
    copy_slowdown: float = Field(default=1.0, ge=1, le=100)
    generation: float = Field(default=1.0, gt=0, le=1)
    step_overhead_s: float = Field(default=0.0, ge=0, le=60)
    source: str = ""


class Hardware(_Section):
    """One device and its surroundings.

    Attributes:
        name: short name.
        description: one line for people.
        device_names: how the device calls itself; the first match of a part of the name wins.
        memory_gb: memory per device.
        memory_gbs: its bandwidth.
        peak_tflops: dense peak rate per datatype. A missing datatype is computed in the next wider.
        link: see :class:`Link`.
        host_link_gbs: between host memory and the device, one direction.
        host_memory_gb: host memory per device.
        host_memory_gbs: its bandwidth per device, where that is less than the link's; None: it is not.
        achieved: see :class:`Achieved`.
        sources: where the figures come from.
        assumed: keys whose value is neither from a datasheet nor measured.
    """

    name: str
    description: str
    device_names: tuple[str, ...] = ()
    memory_gb: Figure
    memory_gbs: Figure
    peak_tflops: dict[Datatype, Figure] = Field(min_length=1)
    link: Link
    host_link_gbs: Figure
    host_memory_gb: Figure
    host_memory_gbs: Figure | None = None
    achieved: Achieved = Achieved()
    sources: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @field_validator("peak_tflops")
    @classmethod
    def _check_peaks(cls, value: dict[Datatype, float]) -> dict[Datatype, float]:
        # Attention is computed in 16 bits whatever the weights' format.
        if "bf16" not in value and "fp32" not in value:
            raise ValueError(f"has {', '.join(value)}, and needs bf16 or fp32")
        return value

    @property
    def host_gbs(self) -> float:
        """What a device reads from host memory while all devices do: the slower of link and memory."""
        return min(self.host_link_gbs, self.host_memory_gbs or self.host_link_gbs)

    @property
    def memory_bytes(self) -> float:
        """Memory per device in bytes."""
        return self.memory_gb * 1e9

    def peak_flops(self, datatype: Datatype) -> float:
        """Dense peak in FLOP/s of ``datatype``, or of the next wider one that the device computes in.

        Raises:
            ValueError: the device computes in none of them.
        """
        wanted: Datatype | None = datatype
        while wanted is not None:
            if wanted in self.peak_tflops:
                return self.peak_tflops[wanted] * 1e12
            wanted = _WIDER.get(wanted)
        raise ValueError(
            f"Hardware {self.name}: peak_tflops has neither {datatype} nor anything wider."
        )

    def at_peak(self) -> Hardware:
        """The same device with every share at 1: a pure roofline."""
        return self.model_copy(update={"achieved": Achieved()})


def hardware_names() -> tuple[str, ...]:
    """The names of the descriptions that come with the package."""
    return tuple(sorted(path.stem for path in (DATA_DIR / "hardware").glob("*.yaml")))


def load_hardware(name_or_path: str | Path) -> Hardware:
    """Read a description by name (``"gb200"``) or from a user's YAML file.

    Raises:
        ValueError: no such name or file, not YAML, or a key is missing, unknown or out of range; one
            line that names the file and the key.
    """
    text = str(name_or_path)
    if text.lower() in hardware_names():
        return _load_packaged(text.lower())
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"hardware {text!r} is neither a file nor one of {', '.join(hardware_names())}."
        )
    return _read(path)


def find_hardware(device_name: str) -> Hardware | None:
    """The description of a device by the name it reports, e.g. ``"NVIDIA H100 80GB HBM3"``.

    None if no description that comes with the package is of that device.
    """
    matches = [
        (len(part), name)
        for name in hardware_names()
        for part in _load_packaged(name).device_names
        if part.lower() in device_name.lower()
    ]
    return _load_packaged(max(matches)[1]) if matches else None


@cache
def _load_packaged(name: str) -> Hardware:
    return _read(DATA_DIR / "hardware" / f"{name}.yaml")


def _read(path: Path) -> Hardware:
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a hardware description is a mapping of keys to values.")
    try:
        return Hardware.model_validate(content)
    except ValidationError as error:
        # A misspelt key is also a missing one: name what is there rather than what is not.
        problems = error.errors(include_url=False)
        problem = min(problems, key=lambda found: found["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {key}: {text}") from error
