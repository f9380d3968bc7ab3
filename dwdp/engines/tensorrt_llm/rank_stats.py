"""What a rank's server says about itself to the router before it: how many requests it takes at a time."""

from __future__ import annotations

import os
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from dwdp.engines.tensorrt_llm.arguments import config_of
from dwdp.launch import DWDP_RANK, DWDP_WORLD_SIZE

STATS_PATH = "/internal/stats"


def patch(module: Any) -> None:
    """Give servers that ``tensorrt_llm.commands.serve`` makes the path, if their model is a rank."""
    make_server = module.OpenAIServer

    def make_server_with_stats(*args: Any, **kwargs: Any) -> Any:
        server = make_server(*args, **kwargs)
        if config_of(getattr(server.llm, "args", None)) is not None:
            _add_stats(server)
        return server

    module.OpenAIServer = make_server_with_stats


def _add_stats(server: Any) -> None:
    async def stats(request: Request) -> JSONResponse:
        return JSONResponse(rank_stats(server.llm.args))

    server.app.add_route(STATS_PATH, stats)


def rank_stats(llm_args: Any) -> dict[str, Any]:
    """The rank's stats in the form that ``docs/serving.md`` describes; what is not known is left out."""
    variables = llm_args.env_overrides or {}
    limits = {
        "max_running": llm_args.max_batch_size,
        "max_sequence_length": llm_args.max_seq_len,
    }
    return {
        "rank": int(variables.get(DWDP_RANK, "0")),
        "dwdp_size": int(variables.get(DWDP_WORLD_SIZE, "1")),
        "pid": os.getpid(),
        "engine": "tensorrt_llm",
        "limits": {key: value for key, value in limits.items() if value is not None},
    }
