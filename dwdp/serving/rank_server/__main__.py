"""``python -m dwdp.serving.rank_server``: one rank, serving; :mod:`.job` says how it is started."""

from __future__ import annotations

import sys

from dwdp.serving.rank_server.process import main

if __name__ == "__main__":
    sys.exit(main())
