"""Words for tests that send real packets: build with scapy, send, expect with a deadline.

A host is a `lab.laboratory.Host`. Builders fill in its addresses, so a test names hosts and ports.
Every wait is a poll with a deadline; nothing sleeps. That a packet did *not* come is shown by what
did: a later packet on the same path, a counter, a flow record.
"""

import itertools
import select
import socket
import time
from collections.abc import Callable
from typing import Self, TypeVar

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.packet import Packet, Raw

from lab.laboratory import Host, Machine
from lab.wire import NothingArrivedError

V4 = socket.AF_INET
V6 = socket.AF_INET6
FAMILIES = (V4, V6)

DEADLINE_S = 30.0
"""How long an awaited packet may take on a busy machine; reached only by a failing test."""

T = TypeVar("T")

_ports = itertools.count(20_000)
_marks = itertools.count(1)


def fresh_port() -> int:
    """A source port that no test of this run has used, below the ephemeral range (32,768-)."""
    return 20_000 + next(_ports) % 12_000


def eventually(
    condition: Callable[[], T], what: str, within_s: float = DEADLINE_S, every_s: float = 0.01
) -> T:
    """The first truthy answer of `condition`; fails with `what` when the deadline passes."""
    deadline = time.monotonic() + within_s
    nothing = select.poll()
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {within_s} s; last answer {answer!r}")
        nothing.poll(every_s * 1000)


# --- packets ----------------------------------------------------------------------------------


def ip(source: Machine | str, destination: Machine | str, family: int = V4, **fields) -> Packet:
    """An IPv4 or IPv6 header between two hosts (or addresses in text); `fields` are scapy's."""
    ends = [end if isinstance(end, str) else end.address(family) for end in (source, destination)]
    layer = IP if family == V4 else IPv6
    return layer(src=ends[0], dst=ends[1], **fields)


def tcp(
    source: Machine | str,
    destination: Machine | str,
    port: int,
    *,
    family: int = V4,
    source_port: int = 0,
    flags: str = "S",
    payload: bytes = b"",
    **fields,
) -> Packet:
    """A TCP segment; `source_port` 0 = a fresh one; `fields` (seq, ack, window...) are scapy's."""
    segment = TCP(sport=source_port or fresh_port(), dport=port, flags=flags, **fields)
    packet = ip(source, destination, family) / segment
    return packet / Raw(payload) if payload else packet


def udp(
    source: Machine | str,
    destination: Machine | str,
    port: int,
    payload: bytes,
    *,
    family: int = V4,
    source_port: int = 0,
) -> Packet:
    """A UDP datagram; `source_port` 0 = a fresh one."""
    header = UDP(sport=source_port or fresh_port(), dport=port)
    return ip(source, destination, family) / header / Raw(payload)


def echo(
    source: Machine | str,
    destination: Machine | str,
    payload: bytes,
    *,
    family: int = V4,
    identifier: int = 0,
    reply: bool = False,
) -> Packet:
    """An ICMP or ICMPv6 echo request, or `reply`; `identifier` 0 = a fresh one."""
    number = identifier or fresh_port()
    if family == V4:
        message = ICMP(type=0 if reply else 8, id=number, seq=1)
    else:
        kind = ICMPv6EchoReply if reply else ICMPv6EchoRequest
        message = kind(id=number, seq=1)
    return ip(source, destination, family) / message / Raw(payload)


def token() -> bytes:
    """A payload that no other packet of this run carries."""
    return b"token-%06d." % next(_marks)


def parsed(data: bytes) -> Packet:
    """Layer-3 bytes as scapy sees them."""
    return IPv6(data) if data[0] >> 4 == 6 else IP(data)


def carries(payload: bytes) -> Callable[[bytes], bool]:
    """A matcher for `Capture.expect`: the packet contains `payload`."""
    return lambda data: payload in data


def is_tcp(
    *, port: int | None = None, source_port: int | None = None, flags: str | None = None
) -> Callable[[bytes], bool]:
    """A matcher for TCP segments; None = any. `flags` as scapy prints them, e.g. "SA"."""

    def matches(data: bytes) -> bool:
        packet = parsed(data)
        if TCP not in packet:
            return False
        segment = packet[TCP]
        return (
            (port is None or segment.dport == port)
            and (source_port is None or segment.sport == source_port)
            and (flags is None or str(segment.flags) == flags)
        )

    return matches


# --- evidence ---------------------------------------------------------------------------------


def delivered(sender: Host, receiver: Host, packet: Packet, payload: bytes) -> bytes:
    """Send `packet` and wait for its `payload` at the receiver; fails if it does not come."""
    with receiver.capture() as capture:
        sender.send(bytes(packet))
        return capture.expect(carries(payload), DEADLINE_S, what=f"{packet.summary()} did not come")


# --- connections ------------------------------------------------------------------------------


class Echo:
    """A TCP server in a host that sends back what it gets, served by `step()` from the test."""

    def __init__(self, host: Machine, port: int, family: int = V4) -> None:
        self.server = host.listen(port, family=family)
        self.server.settimeout(DEADLINE_S)
        self.accepted: list[socket.socket] = []

    def accept(self) -> socket.socket:
        """The next connection that reached the host; TimeoutError after the deadline."""
        connection, _ = self.server.accept()
        connection.settimeout(DEADLINE_S)
        self.accepted.append(connection)
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.accepted:
            connection.close()
        self.server.close()


def exchange(client: socket.socket, server: socket.socket, payload: bytes) -> bool:
    """Send `payload` one way and back; whether both ends got it before the deadline."""
    try:
        client.sendall(payload)
        if _receive(server, len(payload)) != payload:
            return False
        server.sendall(payload)
        return _receive(client, len(payload)) == payload
    except (TimeoutError, ConnectionError):
        return False


def _receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = connection.recv(length - len(data))
        if not more:
            break
        data += more
    return data


def curl(
    host: Host, url: str, *options: str, timeout_s: float = DEADLINE_S
) -> tuple[int, str, str]:
    """Ask by curl from a host: exit code, HTTP status as text ("000" = none), body."""
    done = host.run(
        ["curl", "-s", "-w", "\n%{http_code}", "--max-time", str(timeout_s), *options, url],
        timeout_s + 5,
    )
    body, _, status = done.stdout.rpartition("\n")
    return done.returncode, status, body


__all__ = [
    "DEADLINE_S", "FAMILIES", "V4", "V6", "Echo", "NothingArrivedError", "carries",
    "curl", "delivered", "echo", "eventually", "exchange", "fresh_port", "ip", "is_tcp",
    "parsed", "tcp", "token", "udp",
]  # fmt: skip
