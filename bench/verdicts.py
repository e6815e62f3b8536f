"""From queue to verdict: how long a packet stays with the worker, known flows and new ones.

The daemon sets everything up; then its datapath worker is replaced by one that notes times
(`bench.timed_worker`), with the same queue and the same snapshot. Packets come in small bursts at a
rate that one worker keeps up with, so that the time is that of the verdict and not of a backlog.
"""

import json
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from bench.figure import Figure, percentile
from lab import daemon
from lab.laboratory import Host, Lab
from lab.topology import hosts

PACKETS = 100_000
BURST = 8
RATE = 8_000
"""Packets per second: below what one worker and one sender manage on two slow cores."""

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
    """Measure known and new flows, each with the worker and with accept-everything."""
    figures = []
    for what, fresh in (("known flow", False), ("new flow", True)):
        times = {kind: _times(kind, fresh=fresh) for kind in ("baseline", "worker")}
        for name, share in (("p50", 0.50), ("p99", 0.99)):
            figures.append(
                Figure(
                    f"queue to verdict, packet of a {what}, {name} of {len(times['worker']):,}",
                    percentile(times["worker"], share) / 1e3,
                    "us",
                    percentile(times["baseline"], share) / 1e3,
                    "accept without a look",
                )
            )
    return figures


def _times(kind: str, *, fresh: bool) -> list[int]:
    with Lab(hosts(a="app=a", b="app=b")) as lab:
        firewall = daemon.start(lab, {"workers": 1})
        firewall.apply(POLICY)
        workers = firewall.get("/v1/status")["workers"]
        firewall.kill()
        for worker in workers:
            os.kill(worker["pid"], signal.SIGKILL)
        result = lab.folder / "times.json"
        timed = lab.node.start(
            [
                sys.executable, "-m", "bench.timed_worker", result, kind,
                "--number", "0", "--queue", "0", "--run-dir", firewall.run_dir,
                "--snapshot", firewall.state_dir / "snapshot",
            ]
        )  # fmt: skip
        _await_queue(lab)
        _send(lab.host("a"), lab.host("b"), fresh=fresh)
        timed.terminate()
        timed.wait(30)
        return sorted(json.loads(Path(result).read_text(encoding="utf-8")))


def _await_queue(lab: Lab) -> None:
    for _ in range(500):
        if lab.node.run(["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout.strip():
            return
    raise TimeoutError("the timed worker does not bind its queue")


def _send(source: Host, target: Host, *, fresh: bool) -> None:
    if not fresh:  # a datagram each way, and the flow is known
        here, there = source.datagram(7000), target.datagram(7001)
        here.sendto(b"?", (target.address4, 7001))
        _, sender = there.recvfrom(16)
        there.sendto(b"!", sender)
        here.recvfrom(16)
    begun = time.monotonic()
    for first in range(0, PACKETS, BURST):
        burst = [
            _datagram(source.address4, target.address4, *_ports(number, fresh=fresh))
            for number in range(first, first + BURST)
        ]
        ahead_s = first / RATE - (time.monotonic() - begun)
        if ahead_s > 0:
            time.sleep(ahead_s)
        source.send(*burst)


def _ports(number: int, *, fresh: bool) -> tuple[int, int]:
    return (1024 + number % 60_000, 2000 + number // 60_000) if fresh else (7000, 7001)


def _datagram(source: str, target: str, source_port: int, target_port: int) -> bytes:
    """An IPv4/UDP datagram of 8 bytes of payload (RFC 791, RFC 768), UDP checksum not used."""
    udp = struct.pack("!4H", source_port, target_port, 16, 0) + bytes(8)
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return head[:10] + struct.pack("!H", checksum) + head[12:] + udp
