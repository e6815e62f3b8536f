"""How long nothing new passes when every verdict worker is killed at once, and what a start costs.

A datagram of a new flow is sent every few milliseconds; what counts is the gap between the last one
before the kill and the first one after it that arrives. The baseline is a worker's bare start: a
process that imports what a worker does, and ends.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import count
from statistics import median

from bench.figure import Figure
from lab.daemon import Bartizan
from lab.laboratory import Lab
from lab.topology import hosts

ROUNDS = 3
PORT = 53
EVERY_S = 0.005
DEADLINE_S = 30.0

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rule, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: b}}
  ingress: [{fromEndpoints: [{matchLabels: {app: a}}]}]
"""


def measure() -> list[Figure]:
    """Kill, wait, and start anew, in one lab."""
    gaps_s, starts_s, bare_s = [], [], []
    with Lab(hosts(a="app=a", b="app=b")) as lab:
        firewall = Bartizan(lab, {"workers": 2})
        for _ in range(ROUNDS):
            begun = time.monotonic()
            firewall.start()
            starts_s.append(time.monotonic() - begun)
            firewall.add_all()
            firewall.apply(POLICY)
            gaps_s.append(_gap_s(lab, firewall))
            bare_s.append(_bare_start_s())
            firewall.stop()
    baseline = median(bare_s), "a worker's imports alone"
    return [
        Figure("new flows again after kill -9 of 2 workers", median(gaps_s), "s", at_most=1.0),
        Figure("the same, to what cannot be had faster", median(gaps_s), "s", *baseline),
        Figure("`bartizan run` until everything is enforced", median(starts_s), "s", *baseline),
    ]


def _gap_s(lab: Lab, firewall: Bartizan) -> float:
    """Seconds from the kill to the first new flow that arrives."""
    a, b = lab.host("a"), lab.host("b")
    with b.datagram(PORT) as server:
        server.settimeout(EVERY_S)
        workers = firewall.get("/v1/status")["workers"]
        killed = time.monotonic()
        _kill(worker["pid"] for worker in workers if worker["kind"] == "datapath")
        for number in count():
            with a.datagram() as client:  # another source port: another flow
                client.sendto(b"%d" % number, (b.address4, PORT))
            with contextlib.suppress(TimeoutError):
                server.recvfrom(16)
                return time.monotonic() - killed
            if time.monotonic() - killed > DEADLINE_S:
                raise TimeoutError(f"no new flow within {DEADLINE_S} s")
    raise AssertionError("count() has no end")


def _kill(pids: Iterable[int]) -> None:
    """Kill -9, and wait until the kernel has taken their queues away."""
    with contextlib.ExitStack() as held:
        ends = []
        for pid in pids:
            ends.append(os.pidfd_open(pid))
            held.callback(os.close, ends[-1])
            os.kill(pid, signal.SIGKILL)
        for end in ends:
            select.select([end], [], [], DEADLINE_S)


def _bare_start_s() -> float:
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import firewall.datapath.process"], check=True)
    return time.monotonic() - begun
