"""What tests that need a real GPU share."""

from __future__ import annotations

import pytest
import torch
from ranks import layers_of

from dwdp import _C
from dwdp.fabric import Fabric, create_fabric
from dwdp.weights import LayerSpec

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        _C.build_info()["fabrics"] != "host+cuda", reason="this build has no CUDA fabric"
    ),
]
"""For ``pytestmark`` of a test module."""

MODES = ("staged", "direct", "demand", "auto")


def cuda_fabric() -> Fabric:
    """The fabric of the current device."""
    return create_fabric("cuda", ordinal=torch.cuda.current_device())


def odd_layers(num_layers: int = 4) -> list[LayerSpec]:
    """Layers whose experts end in the midst of 2 MiB pages, with a tensor small enough to be packed."""
    return layers_of((300, 1100), (700, 300), (5,), num_layers=num_layers, num_experts=10)
