"""The GPU report: builds dwdp, runs the GPU tests and every benchmark, and writes what came of them.

    python benchmarks/gpu/report.py [--output-dir DIR] [--total-s SECONDS]

Needs no network and no virtual environment. Ends with 1 when the build, a GPU test or a benchmark fails
or a stated limit is missed, and with 2 where there is no GPU or a package is missing.
"""

from __future__ import annotations

import time

from prerequisites import require_packages


def main() -> None:
    """Look for the packages, then run the report; its time counts from here."""
    start_s = time.monotonic()
    require_packages()
    from report_command import report

    report(obj=start_s)


if __name__ == "__main__":
    main()
