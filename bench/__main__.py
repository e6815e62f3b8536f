"""`make bench`, or `python -m bench NAME...` inside `python -m lab.enclosure --`.

With `--plot FILE` the figures that have an aim are drawn, too.
"""

import argparse
import importlib
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from bench.figure import HEAD, Figure, row
from bench.plot import draw

NAMES = (
    "answers",
    "exchanges",
    "names",
    "packets",
    "verdicts",
    "stream",
    "policy",
    "policytest",
    "proxy",
    "restart",
    "tracker",
)


def main() -> int:
    """Measure what is asked for, everything without a name, and print one table."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write an SVG")
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    where = (
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} processors, "
        f"Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f} at the start"
    )
    print(f"{where}\n\n{HEAD}", flush=True)
    figures: list[Figure] = []
    for name in asked.names or NAMES:
        begun = time.monotonic()
        print(f"measuring: {name}", file=sys.stderr, end="", flush=True)
        found = importlib.import_module(f"bench.{name}").measure()
        print("\n".join(map(row, found)), flush=True)
        figures += found
        print(f" ({time.monotonic() - begun:.0f} s)", file=sys.stderr)
    if asked.plot:
        asked.plot.write_text(draw(figures, where), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
