"""How a rank's server is started, watched and ended: the same for every engine.

Start. The supervisor runs a command with these in its environment: ``DWDP_RANK``, ``DWDP_WORLD_SIZE``,
``DWDP_RENDEZVOUS`` and ``DWDP_STORE_IS_SERVED`` (see :mod:`dwdp.launch`), and the number of compute threads
in ``OMP_NUM_THREADS`` and its like. For this engine the command is ``python -m dwdp.serving.rank_server``,
and one line of JSON on standard input, a :class:`RankServerJob`, says the rest.

Address. Once it can answer, and not before, the rank listens on a unix socket bound to the abstract name of
the job; the supervisor invents a new one for each start. It accepts connections of its own user's processes
only, and requests with ``Authorization: Bearer TOKEN`` only, except for health.

Health. ``GET /health/live``: 200 while the rank can compute. ``GET /health/ready``: 200 while it takes
requests. A refused connection means that it is still loading, or gone.

Work. OpenAI's paths below ``/v1``, and ``GET /internal/stats``, with ``?timeline`` for what the rank did in
the last seconds as well. ``X-Request-Id`` becomes part of the answer's
id, ``X-DWDP-Timeout-S`` is the number of seconds after which the work is given up. Closing the connection
cancels it. The headers of a stream are sent with its first token: as long as nothing has arrived, nothing
was produced, and the request can be put to another rank.

End. On SIGTERM the rank stops accepting, finishes what it has within a grace time, and exits with 0. SIGINT
is for the parent to handle. When the parent dies the kernel kills the rank. A rank that fails exits with one
of the codes of :mod:`dwdp.serving.rank_exit`, and the last line on its standard error is ``error:`` and what
went wrong.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from dwdp.config import DwdpConfig
from dwdp.serving.rank_server.options import RankOptions

REQUEST_ID_HEADER = "X-Request-Id"
TIMEOUT_HEADER = "X-DWDP-Timeout-S"


class RankServerJob(BaseModel):
    """What a rank's process is told, as one line of JSON on its standard input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_dir: str = Field(description="Checkpoint directory.")
    served_model_name: str = Field(description="What requests call the model.")
    dtype: str = Field(default="auto", description="As in dwdp.engines.transformers.load.")
    device: str = Field(default="cpu", description="As in dwdp.engines.transformers.load.")
    num_threads: int = Field(ge=1, description="Compute threads.")
    config: DwdpConfig = Field(description="Of the group.")
    options: RankOptions = Field(description="Of the server.")
    socket: str = Field(
        min_length=1,
        max_length=100,
        description="Abstract name to listen on, without its leading NUL.",
    )
    token: str = Field(description="What requests prove themselves with; empty: nothing.")
    parent_pid: int | None = Field(
        default=None, description="With whose end this process ends; None: nobody's."
    )
