"""What the firewall says about packets: flow records and counters, awaited with a deadline."""

import os
import re
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scapy.layers.inet import ICMP, TCP, UDP
from scapy.packet import Packet
from traffic import DEADLINE_S, V4, delivered, eventually, token, udp

from lab import topology
from lab.daemon import Bartizan
from lab.laboratory import Lab, Machine

Flow = dict[str, Any]


def of(packet: Packet) -> Callable[[Flow], bool]:
    """Whether a flow record is about exactly this packet: addresses, protocol, ports."""
    wanted = {"source": packet.src, "destination": packet.dst}

    def matches(flow: Flow) -> bool:
        addresses = flow.get("IP", {})
        if any(addresses.get(key) != value for key, value in wanted.items()):
            return False
        layer4 = flow.get("l4", {})
        for layer, name in ((TCP, "TCP"), (UDP, "UDP")):
            if layer in packet:
                found = layer4.get(name, {})
                return (found.get("source_port"), found.get("destination_port")) == (
                    packet[layer].sport,
                    packet[layer].dport,
                )
        if ICMP in packet:
            return layer4.get("ICMPv4", {}).get("type", 0) == packet[ICMP].type
        return layer4.get("ICMPv6", {}).get("type", 0) == packet.payload.type

    return matches


def flow(
    bartizan: Bartizan,
    matches: Callable[[Flow], bool],
    *,
    verdict: str,
    reason: str | None = None,
    within_s: float = DEADLINE_S,
) -> Flow:
    """The first flow that `matches` with this verdict (and `drop_reason_desc`); awaited."""

    def found() -> Flow | None:
        for candidate in bartizan.flows():
            if (
                matches(candidate)
                and candidate.get("verdict") == verdict
                and reason in (None, candidate.get("drop_reason_desc"))
            ):
                return candidate
        return None

    try:
        return eventually(found, f"a flow {verdict} {reason or ''}", within_s)
    except AssertionError as error:
        about = [candidate for candidate in bartizan.flows() if matches(candidate)]
        raise AssertionError(f"{error}; flows about it: {about}") from None


def dropped(bartizan: Bartizan, packet: Packet, reason: str | None = "POLICY_DENIED") -> Flow:
    """The record that this very packet was dropped, and why."""
    return flow(bartizan, of(packet), verdict="DROPPED", reason=reason)


def forwarded(bartizan: Bartizan, packet: Packet) -> Flow:
    """The record that this very packet was let through."""
    return flow(bartizan, of(packet), verdict="FORWARDED")


def opens(bartizan: Bartizan, host: Machine, address: str, port: int) -> bool:
    """Whether a TCP connection is made from the host, and none of its packets was dropped.

    By the records, whatever time it takes: a dropped SYN is sent again, and might pass then.
    """
    since = datetime.now(UTC).isoformat()
    with host.open_socket(topology.family(address), socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.connect_ex((address, port))
        mine = {"from-port": str(sock.getsockname()[1]), "to-ip": address}
        dropped = lambda: bartizan.flows(verdict="DROPPED", since=since, **mine)
        connected = lambda: bool(select.select([], [sock], [], 0)[1])
        eventually(lambda: connected() or dropped(), f"{address} opens or is shut")
        return not dropped() and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def workers(bartizan: Bartizan) -> dict[tuple[str, int], int]:
    """(kind, number) -> pid of every worker."""
    rows = bartizan.get("/v1/status")["workers"]
    return {(row["kind"], row["number"]): row["pid"] for row in rows}


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def passes(lab: Lab) -> None:
    """A datagram from host a reaches port 53 of host b."""
    a, b = lab.host("a"), lab.host("b")
    payload = token()
    delivered(a, b, udp(a, b, 53, payload), payload)


def waiting_count(node: Machine) -> int:
    """Packets in all queues (/proc/net/netfilter/nfnetlink_queue, the third number)."""
    path = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
    text = node.netns.within(lambda: path.read_text(encoding="ascii"))
    return sum(int(line.split()[2]) for line in text.splitlines())


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that stands still meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Segments:
    """Counts TCP segments that leave a host and reach another: one that waited is not lost.

    On a busy machine a SYN may wait for so long that its host sends another. Both are accepted; the
    kernel confirms one of them, drops the other, which says nothing new, and counts it
    (nf_ct_resolve_clash, `insert_failed`). Nothing else may be missing.

    Args:
        node: is between the two.
        a: opens connections.
        b: accepts them.
        port: of b; 0 = all.
    """

    def __init__(self, node: Machine, a: Machine, b: Machine, port: int = 0) -> None:
        self._node = node
        self._hosts = a, b
        ways = (("OUTPUT", "PREROUTING"), ("PREROUTING", "OUTPUT"))
        for host, (to_b, from_b) in zip(self._hosts, ways, strict=True):
            for chain, which in ((to_b, "--dport"), (from_b, "--sport")):
                ports = [which, str(port)] if port else []
                host.run(["iptables", "-t", "raw", "-A", chain, "-p", "tcp", *ports], check=True)

    def _counts(self, host: Machine) -> dict[str, int]:
        saved = host.run(["iptables-save", "-c", "-t", "raw"], check=True).stdout
        rule = r"^\[(\d+):\d+\] -A (\w+) -p tcp(?: -m tcp --[ds]port \d+)?$"
        return {chain: int(count) for count, chain in re.findall(rule, saved, re.MULTILINE)}

    def _repeated_syn_count(self) -> int:
        """SYN that host a has sent again."""
        lines = self._hosts[0].run(["cat", "/proc/net/netstat"], check=True).stdout.splitlines()
        names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
        return int(values[names.index("TCPSynRetrans")])

    def arrived_count(self) -> int:
        """Segments of a that have reached b."""
        return self._counts(self._hosts[1])["PREROUTING"]

    def missing(self) -> tuple[int, int]:
        """Segments to b, and to a, that were sent and have not arrived."""
        a, b = map(self._counts, self._hosts)
        statistics = self._node.run(["conntrack", "-S"], check=True).stdout
        again_count = sum(map(int, re.findall(r"insert_failed=(\d+)", statistics)))
        assert again_count <= self._repeated_syn_count()
        there, back = a["OUTPUT"] - b["PREROUTING"], b["OUTPUT"] - a["PREROUTING"]
        return there - again_count, back

    def await_all(self) -> None:
        """Wait until every segment that was sent has arrived."""
        eventually(lambda: self.missing() == (0, 0), "every segment that was sent has arrived")


LINK_MESSAGES = (130, 131, 132, 133, 134, 135, 136, 143)
"""ICMPv6 types that hosts send on their own: neighbours, routers, listeners (RFC 4861, 3810)."""


def count_link_messages(node: Machine) -> None:
    """Have the node count what IPv6 hosts say to each other unasked, so that `queued` can tell."""
    lines = [
        f"-A {chain} -p icmpv6 --icmpv6-type {kind}"
        for chain in ("PREROUTING", "OUTPUT")
        for kind in LINK_MESSAGES
    ]
    text = "\n".join(["*raw", *lines, "COMMIT", ""])
    node.run(["ip6tables-restore", "--noflush"], stdin=text, check=True)


def queued(node: Machine, family: int = V4) -> int:
    """Packets of a family that our rules have queued, link messages left out.

    A counter of rules, not of queues: those count both families, and neighbour discovery goes on
    beside every IPv4 flow. IPv6 needs `count_link_messages` before the first one.
    """
    program = "iptables-save" if family == V4 else "ip6tables-save"
    saved = node.run([program, "-c"], check=True).stdout
    ours = re.findall(r"^\[(\d+):\d+\] -A BARTIZAN-.* -j NFQUEUE", saved, re.MULTILINE)
    messages = r"^\[(\d+):\d+\] -A \w+ -p ipv6-icmp .*--icmpv6-type \d+$"
    said = re.findall(messages, saved, re.MULTILINE)
    return sum(map(int, ours)) - sum(map(int, said))
