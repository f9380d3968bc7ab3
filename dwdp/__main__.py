"""``python -m dwdp`` is the ``dwdp`` command."""

from __future__ import annotations

from dwdp.cli.main import main

main()
