"""Hardware descriptions: those that come with the package, and a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dwdp.perf.hardware import Hardware, find_hardware, hardware_names, load_hardware

OWN = {
    "name": "mine",
    "description": "a machine of my own",
    "memory_gb": 100,
    "memory_gbs": 1000,
    "peak_tflops": {"bf16": 100},
    "link": {"gbs": 50, "domain_size": 4},
    "host_link_gbs": 20,
    "host_memory_gb": 64,
}


def write(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_every_generation_is_there() -> None:
    assert set(hardware_names()) >= {"h100", "h200", "b200", "gb200", "gb300", "cpu"}


@pytest.mark.parametrize("name", hardware_names())
def test_descriptions_are_complete_and_say_where_they_are_from(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert hardware.sources or hardware.assumed
    keys = hardware.model_dump()
    for key in hardware.assumed:
        value = keys
        for part in key.split("."):
            value = value[part]
    rates = [hardware.peak_flops(datatype) for datatype in ("bf16", "fp8", "fp4")]
    assert rates == sorted(rates)


def test_a_users_file_is_read(tmp_path: Path) -> None:
    hardware = load_hardware(write(tmp_path / "mine.yaml", OWN))
    assert hardware.memory_bytes == 100e9
    assert hardware.peak_flops("fp4") == 100e12  # computed in the next wider datatype
    assert hardware.achieved.link == 1 and hardware.at_peak() == hardware


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"memory_gb": None}, "memory_gb"),
        ({"memory_gbs": -1}, "memory_gbs"),
        ({"bandwidth": 3}, "bandwidth"),
        ({"link": {"gbs": 50}}, "link.domain_size"),
        ({"peak_tflops": {"fp3": 1}}, "peak_tflops.fp3"),
        ({"peak_tflops": {"fp4": 1}}, "peak_tflops: has fp4, and needs bf16 or fp32"),
        ({"memory_gbs": float("inf")}, "memory_gbs: Input should be a finite number"),
        ({"achieved": {"link": 1.5}}, "achieved.link"),
        ({"memory_gb": True}, "memory_gb: True is not a figure"),
        ({"link": {"gbs": 1e300, "domain_size": 8}}, "link.gbs"),
        ({"memory_gb": None, "memory_gB": 80}, "memory_gB: Extra"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_key(
    change: dict[str, object], named: str, tmp_path: Path
) -> None:
    content = {key: value for key, value in {**OWN, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=named) as raised:
        load_hardware(write(tmp_path / "mine.yaml", content))
    assert "mine.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_what_is_no_description_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.yaml"):
        load_hardware(path)


def test_host_memory_that_is_slower_than_the_link_is_what_counts() -> None:
    assert Hardware.model_validate({**OWN, "host_link_gbs": 64}).host_gbs == 64
    shared = {**OWN, "host_link_gbs": 64, "host_memory_gbs": 40}
    assert Hardware.model_validate(shared).host_gbs == 40
    # Two GPUs share the memory of one CPU.
    assert load_hardware("gb200").host_gbs < load_hardware("gb200").host_link_gbs


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="gb200"):
        load_hardware("v100")


def test_a_datatype_that_nothing_computes_is_refused() -> None:
    hardware = Hardware.model_validate({**OWN, "peak_tflops": {"bf16": 100}})
    with pytest.raises(ValueError, match="peak_tflops"):
        hardware.peak_flops("fp32")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB300", "gb300"),
    ],
)
def test_a_device_is_found_by_what_it_calls_itself(device: str, name: str) -> None:
    found = find_hardware(device)
    assert found is not None and found.name == name


def test_an_unknown_device_is_not_guessed() -> None:
    assert find_hardware("Radeon VII") is None
