"""`make bench`, or `python -m bench NAME...` inside `python -m lab.enclosure --`."""

import importlib
import os
import platform
import sys
from datetime import UTC, datetime

from bench.figure import report

NAMES = ("answers", "exchanges", "policy", "proxy", "stream", "verdicts", "tracker", "policytest")


def main() -> int:
    """Measure what is asked for, everything without a name, and print one table."""
    wanted = sys.argv[1:] or list(NAMES)
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} processors, "
        f"Linux {platform.release()}, Python {platform.python_version()}\n"
    )
    figures = []
    for name in wanted:
        print(f"measuring: {name}", file=sys.stderr)
        figures += importlib.import_module(f"bench.{name}").measure()
    print(report(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
