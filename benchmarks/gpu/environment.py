"""What a report was made on: the GPU, its driver, and the versions in use. Run as a program: as JSON."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch
import transformers
from harness import require_device

import dwdp
from dwdp import _C
from dwdp.fabric.cuda_devices import driver_version, list_devices

ROOT = Path(__file__).resolve().parents[2]


def output_of(*command: str) -> str:
    """What a program prints; empty where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def nvcc_version() -> str:
    """``"13.0.88"``, or empty where there is no nvcc."""
    found = re.search(r"V(\d[\d.]*)", output_of("nvcc", "--version"))
    return found[1] if found else ""


def describe() -> dict[str, str]:
    """What to state beside every figure, in the order to state it; unknown things are left out."""
    device = list_devices()[torch.cuda.current_device()]
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    facts = {
        "GPU": device.name,
        "GPU memory": f"{device.memory_bytes / 2**30:.1f} GiB",
        "compute capability": "{}.{}".format(*device.compute_capability),
        "multiprocessors": str(device.num_multiprocessors),
        "copy engines": str(device.num_copy_engines),
        "driver": driver.splitlines()[0] if driver else "",
        "CUDA of the driver": "{}.{}".format(*driver_version()),
        "nvcc": nvcc_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "",
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "dwdp": dwdp.__version__,
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "native module": f"{_C.build_info()['fabrics']}, {_C.build_info()['compiler']}",
    }
    return {name: fact for name, fact in facts.items() if fact}


if __name__ == "__main__":
    require_device()
    print(json.dumps(describe()))
