"""A ``trtllm-serve`` without a model: the same options, the same health, and answers without meaning.

Without a place in a group it serves the whole group, as the plugin does; with one it is that rank. A rank
answers ``/environment`` with what it was started with, and a chat with what it was asked. ``FAIL_WITH``
in the environment: rank 1 fails so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys

from aiohttp import web

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm.launch import prepare_process, rank_of_process

SHOWN = ("DWDP_", "CUDA_VISIBLE_DEVICES", "SLURM_", "OMPI_", "PMIX_", "HF_HOME")


async def health(request: web.Request) -> web.Response:
    return web.Response(status=200)


async def environment(request: web.Request) -> web.Response:
    shown = {key: value for key, value in os.environ.items() if key.startswith(SHOWN)}
    return web.json_response({"pid": os.getpid(), "argv": sys.argv, **shown})


async def stats(request: web.Request) -> web.Response:
    return web.json_response({"limits": {"max_running": 5, "max_sequence_length": 64}})


async def completions(request: web.Request) -> web.Response:
    body = await request.json()
    await asyncio.sleep(0.05)
    choice = {"index": 0, "text": "word", "finish_reason": "length", "logprobs": None}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    document = {
        "object": "text_completion",
        "model": body["model"],
        "choices": [choice],
        "usage": usage,
    }
    headers = {"X-Rank": os.environ["DWDP_RANK"]}
    return web.json_response({"id": f"cmpl-{os.environ['DWDP_RANK']}", **document}, headers=headers)


async def chat(request: web.Request) -> web.Response:
    return web.json_response({"asked": await request.json()})


async def serve_rank(host: str, port: int) -> None:
    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/environment", environment)
    app.router.add_get("/internal/stats", stats)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    print(f"serving on {port}", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await runner.cleanup()


def main() -> int:
    prepare_process()
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--parallel")
    parser.add_argument("--dwdp_size", type=int)
    parser.add_argument("--num_devices", type=int)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    config = DwdpConfig(dwdp_size=options.dwdp_size)
    place = rank_of_process(config)
    if place is None:
        from dwdp.engines.tensorrt_llm import rank_launcher

        rank_launcher._device_count = lambda: options.num_devices
        return rank_launcher.serve_group(
            config, {"model": options.model}, host=options.host, port=options.port
        )
    failure = json.loads(os.environ.get("FAIL_WITH", "null"))
    if failure is not None and place.rank == 1:
        print(f"error: {failure['message']}", file=sys.stderr)
        return int(failure["code"])
    asyncio.run(serve_rank(options.host, options.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
