"""How long a person waits for `bartizan identity list`."""

import time
from statistics import median

from bench.figure import Figure
from lab import daemon
from lab.laboratory import Lab
from lab.topology import hosts

RUNS = 15


def measure() -> list[Figure]:
    """Time the whole command, start of the interpreter included."""
    with Lab(hosts(a="app=a", b="app=b")) as lab:
        firewall = daemon.start(lab, {"workers": 1})
        times = []
        for _ in range(RUNS):
            begun = time.perf_counter()
            done = firewall.cli("identity", "list")
            times.append(time.perf_counter() - begun)
            assert done.returncode == 0, done.stderr
    return [Figure("`bartizan identity list`", median(times), "s", at_most=0.25)]
