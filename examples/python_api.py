"""DWDP from Python: every process of the launcher is a rank that loads its share and generates.

    torchrun --nproc-per-node 2 examples/python_api.py [MODEL_DIR]

Without a launcher the one process is a group of one, and holds the whole model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

from dwdp import DwdpConfig, Group
from dwdp.engines.transformers import load

PROMPTS = ("def read_file(path):\n", "import os\nimport sys\n", "class Node:\n", "    for key in ")


def main() -> None:
    here = Path(__file__).parent
    model_dir = sys.argv[1] if len(sys.argv) > 1 else str(here / "tiny_moe" / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    group = Group.from_launcher()
    config = DwdpConfig(dwdp_size=group.size, fetch_mode="staged")

    # Set-up is the only collective part: a failure of any rank ends all of them with its message.
    with group.setting_up():
        attachment = load(model_dir, group, config)

    with attachment:
        # From here on the ranks are independent: each answers its own prompts.
        for prompt in PROMPTS[group.rank :: group.size]:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            tokens = attachment.model.generate(**inputs, max_new_tokens=24, do_sample=False)
            text = tokenizer.decode(tokens[0], skip_special_tokens=True)
            print(f"--- rank {group.rank} of {group.size}\n{text}\n", end="", flush=True)
        stats = attachment.runtime.stats()
        print(f"rank {group.rank}: {stats.num_fetches} fetches, {stats.fetched_bytes} bytes")


if __name__ == "__main__":
    main()
