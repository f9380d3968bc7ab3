"""Python imports this when it starts and this folder is on PYTHONPATH: children are booted like the tests."""

import os

if os.environ.get("TRTLLM_SOURCE"):
    import tensorrt_llm_boot

    tensorrt_llm_boot.install()
