"""One packet in the worker, of a known flow and of a new one: processor time, and time to verdict.

The daemon sets everything up; then a variant of the loop (`bench.loop`) takes its worker's place,
with the same queue and the same snapshot. Packets come in small bursts at a rate that one worker
keeps up with, so that the time is that of the verdict and not of a backlog.
"""

import json
import multiprocessing
import os
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

from bench.build import PURE, builds, named
from bench.figure import Figure, percentile
from bench.loop import ACCEPT, CALLBACK, WORKER, Variant, displace
from lab import daemon
from lab.laboratory import Host, Lab
from lab.topology import hosts

PACKETS = 8_000
"""For processor time, in each round."""

TIMED_PACKETS = 40_000
"""For the time to the verdict, whose 99th percentile wants many."""

ROUNDS = 5
BURST = 8
RATE = 8_000
"""Packets per second: below what one worker and one sender manage on two slow cores."""

SOURCE_PORT, TARGET_PORT = 7000, 7001
"""New flows come from the ports above, which `TIMED_PACKETS` do not use up."""

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: bench, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: b}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: a}}]
    toPorts: [{ports: [{port: "1", endPort: 65535, protocol: UDP}]}]
"""


def measure() -> list[Figure]:
    """Measure known and new flows with each variant, in turns."""
    with Lab(hosts(a="app=a", b="app=b")) as lab:
        firewall = daemon.start(lab, {"workers": 1, "bypass": False})
        firewall.apply(POLICY)
        displace(lab, firewall)
        known = _figures(lab, firewall, "known", fresh=False, promised=1.5)
        return known + _figures(lab, firewall, "new", fresh=True, promised=3.0)


def _figures(
    lab: Lab, firewall: daemon.Bartizan, what: str, *, fresh: bool, promised: float
) -> list[Figure]:
    """Measure one kind of flow."""
    found = builds()
    costs_us = defaultdict(list)
    for _ in range(ROUNDS):
        for kind, build in ((CALLBACK, PURE), *((WORKER, build) for build in found)):
            with _variant(lab, firewall, kind, build=build) as variant:
                costs_us[kind, build].append(_offer(lab, variant, PACKETS, fresh=fresh))
    figures = []
    for build in found:
        figures.append(
            Figure(
                named(f"processor time for a packet of a {what} flow", build),
                median(costs_us[WORKER, build]),
                "us",
                median(costs_us[CALLBACK, PURE]),
                "callback that accepts",
                at_most=promised,
            )
        )
        times = {kind: _times_ns(lab, firewall, kind, build, fresh) for kind in (ACCEPT, WORKER)}
        figures += [
            Figure(
                named(f"queue to verdict, packet of a {what} flow, {name}", build),
                percentile(times[WORKER], share) / 1e3,
                "us",
                percentile(times[ACCEPT], share) / 1e3,
                "the same loop without tracker and policy",
            )
            for name, share in (("p50", 0.50), ("p99", 0.99))
        ]
    return figures


def _variant(
    lab: Lab, firewall: daemon.Bartizan, kind: str, *flags: str | Path, build: str
) -> Variant:
    """Start a variant that knows no flow: it would take over those of the one before."""
    lab.node.run(["conntrack", "-F"], check=True)
    return Variant(lab, firewall, kind, *flags, build=build)


def _times_ns(lab: Lab, firewall: daemon.Bartizan, kind: str, build: str, fresh: bool) -> list[int]:
    """Return how long each packet stayed, sorted. To note it takes time itself."""
    result = lab.folder / "times.json"
    with _variant(lab, firewall, kind, "--times", result, build=build) as variant:
        _offer(lab, variant, TIMED_PACKETS, fresh=fresh)
    return sorted(json.loads(result.read_bytes()))


def _offer(lab: Lab, variant: Variant, count: int, *, fresh: bool) -> float:
    """Send the packets and wait; return microseconds of the process for each."""
    source, target = lab.host("a"), lab.host("b")
    with known_flow(source, target) as known:
        begun_s = variant.cpu_s()
        _send(source, target, count, None if fresh else known)
        while variant.waiting_count():
            time.sleep(0.01)
        return (variant.cpu_s() - begun_s) / count * 1e6


@contextmanager
def known_flow(source: Host, target: Host, *, is_read: bool = False) -> Iterator[bytes]:
    """Exchange a datagram each way; yield one more of that flow.

    Its receiver stays: to answer that a port is closed would cost the worker more than what it is
    measured by, since that happens on its processor time. If it `is_read`, a process on the last
    processor waits for what comes, as receivers do, and has to be woken.
    """
    with source.datagram(SOURCE_PORT) as here, target.datagram(TARGET_PORT) as there:
        here.settimeout(10)
        there.settimeout(10)
        here.sendto(b"?", (target.address4, TARGET_PORT))
        _, sender = there.recvfrom(16)
        there.sendto(b"!", sender)
        here.recvfrom(16)
        with _reader(there) if is_read else nullcontext():
            yield _datagram(source.address4, target.address4, SOURCE_PORT)


@contextmanager
def _reader(receiver: socket.socket) -> Iterator[None]:
    """Have a process read a socket meanwhile."""
    receiver.settimeout(None)
    process = multiprocessing.get_context("fork").Process(target=_read, args=(receiver,))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _read(receiver: socket.socket) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    while True:
        receiver.recv(65_535)


def _send(source: Host, target: Host, count: int, known: bytes | None) -> None:
    """Send at `RATE`: the same datagram, or each of a flow of its own."""
    begun = time.monotonic()
    for first in range(0, count, BURST):
        numbers = range(first, first + BURST)
        burst = [known or _new(source, target, number) for number in numbers]
        ahead_s = first / RATE - (time.monotonic() - begun)
        if ahead_s > 0:
            time.sleep(ahead_s)
        source.send(*burst)


def _new(source: Host, target: Host, number: int) -> bytes:
    return _datagram(source.address4, target.address4, SOURCE_PORT + 1 + number)


def _datagram(source: str, target: str, source_port: int) -> bytes:
    """An IPv4/UDP datagram of 8 bytes of payload (RFC 791, RFC 768), UDP checksum not used."""
    udp = struct.pack("!4H", source_port, TARGET_PORT, 16, 0) + bytes(8)
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return head[:10] + struct.pack("!H", checksum) + head[12:] + udp
