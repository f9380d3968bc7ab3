"""A rank as a process of its own: attaches, then answers each line on stdin with verified forwards."""

from __future__ import annotations

import sys

from ranks import assert_same_bytes, layers_of, load, reference

from dwdp.config import DwdpConfig
from dwdp.group import Group
from dwdp.launch import discover_launch
from dwdp.runtime import DwdpRuntime


def main(mode: str) -> None:
    launch = discover_launch()
    assert launch is not None
    group = Group.join(launch, timeout_s=60)
    layers = layers_of((300, 70), (70, 30), (5,), num_layers=4, num_experts=10)
    full = reference(layers)
    config = DwdpConfig(dwdp_size=group.size, fetch_mode=mode, slice_bytes=4096)
    with group.setting_up():
        runtime = DwdpRuntime(group, config)
        load(runtime.allocate(layers), group.rank, full)
        runtime.attach()
    print("attached", flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            for index in range(len(layers)):
                runtime.begin(index)
                for name, tensor in runtime.tensors(index).items():
                    assert_same_bytes(tensor, full[index][name])
                runtime.end(index)
        print("forwards", runtime.stats().num_fetches, flush=True)
    runtime.detach()
    print("detached", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
