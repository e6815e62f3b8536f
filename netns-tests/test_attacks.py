"""Floods and forgeries against the real worker: whoever did nothing wrong notices nothing.

Loads are bounded: no more waits than the queue holds, and many times what the worker's table holds
is sent. That a table has a bound, and who leaves it, is what is tested; how many packets per second
a machine decides is a matter of `bench`.
"""

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import datapath_rig
import pytest
from datapath_rig import Rule
from evidence import Segments, waiting_count
from scapy.layers.inet import ICMP, IP, TCP
from scapy.packet import Raw
from traffic import DEADLINE_S, Echo, carries, eventually, exchange, token

from firewall.policy.verdict import DropReason
from lab.laboratory import Host, Machine

rig = datapath_rig.rig
pytestmark = pytest.mark.needs("nfqueue", "nfqueue6", "ipset", "set")

SEED = 20261123
FLOW_LIMIT = 1000
PACKETS = 6 * FLOW_LIMIT
RATE = 2500
"""Packets per second, at most."""
BURST = 25
WAITING = 64
"""Packets that may wait in the queue when the next burst is sent: an attacker who fills the queue
takes the packets of others with him, which the kernel does, not the worker."""
MEMORY_SLACK_BYTES = 24 * 1024 * 1024
"""What a worker may grow by: 1000 flows are 0.5 MB, memos and batches of events the rest."""


class Flood:
    """Packets from one host, in small bursts, while a test does what ordinary people do."""

    def __init__(self, node: Machine, host: Host, packets: Iterator[bytes]) -> None:
        self._node = node
        self._host = host
        self._packets = packets
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.sent_count = 0

    def _run(self) -> None:
        begun = time.monotonic()
        for packet in self._packets:
            if self._stop.is_set():
                return
            self._host.send(packet)
            self.sent_count += 1
            if self.sent_count % BURST == 0:
                ahead_s = self.sent_count / RATE - (time.monotonic() - begun)
                self._stop.wait(max(0.0, ahead_s))
                while waiting_count(self._node) > WAITING and not self._stop.wait(0.005):
                    pass

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)

    def wait_for(self, count: int) -> None:
        eventually(lambda: self.sent_count >= count, f"{count} packets are sent")


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(source: str, target: str, protocol: int, transport: bytes, at: int) -> bytes:
    """An IPv4 packet with right checksums; the transport's stands at `at`."""
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    total = checksum(ends + struct.pack("!HH", protocol, len(transport)) + transport)
    transport = transport[:at] + struct.pack("!H", total) + transport[at + 2 :]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(transport), 0, 0, 64, protocol, 0) + ends
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + transport


def syn(source: str, target: str, source_port: int, port: int, sequence: int) -> bytes:
    header = struct.pack("!HHIIBBHHH", source_port, port, sequence, 0, 0x50, 2, 0xFFFF, 0, 0)
    return packet(source, target, 6, header, 16)


def udp(source: str, target: str, source_port: int, port: int) -> bytes:
    return packet(source, target, 17, struct.pack("!HHHH", source_port, port, 8, 0), 6)


def syn_flood(chance: random.Random, _: Host, b: Host) -> Iterator[bytes]:
    """From addresses of half the internet, which will never answer."""
    for _ in range(PACKETS):
        source = socket.inet_ntoa(struct.pack("!I", 0x64400000 + chance.getrandbits(22)))
        port = chance.randrange(1024, 65536)
        yield syn(source, b.address4, port, 80, chance.getrandbits(32))


def hoarding(chance: random.Random, c: Host, b: Host) -> Iterator[bytes]:
    """One host begins thousands of handshakes and ends none."""
    for number in range(PACKETS):
        yield syn(c.address4, b.address4, 1024 + number, 80, chance.getrandbits(32))


def udp_flood(chance: random.Random, c: Host, b: Host) -> Iterator[bytes]:
    """One host, random ports on both sides."""
    for _ in range(PACKETS):
        ports = chance.randrange(1024, 65536), chance.randrange(1024, 65536)
        yield udp(c.address4, b.address4, *ports)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def flow_count(one: "datapath_rig.Rig") -> int:
    return sum(int(str(r["value"])) for r in one.ask("metrics")
               if r["name"] == "datapath_conntrack_entries")  # fmt: skip


Attack = Callable[[random.Random, Host, Host], Iterator[bytes]]


@pytest.mark.parametrize(
    ("attack", "outside"),
    [(syn_flood, ("c",)), (hoarding, ()), (udp_flood, ())],
    ids=["syn-flood", "half-open-hoarding", "udp-flood"],
)
def test_a_flood_touches_nobody_else(rig, attack: Attack, outside: tuple[str, ...]) -> None:
    """RFC 4987: only half-open flows of the crowd leave for newcomers, and the table is bounded."""
    one = rig(
        hosts={"a": "app=a", "b": "app=b", "c": "app=c"},
        outside=outside,
        options=("--flow-limit", str(FLOW_LIMIT)),
    )
    one.start()
    one.publish(Rule(None, "b"))
    a, b, c = (one.lab.host(name) for name in "abc")
    # The attacker's own kernel would reset what it did not begin.
    c.run(["iptables", "-t", "raw", "-A", "PREROUTING", "-j", "DROP"], check=True)
    closed = b.listen(80)  # it accepts nothing: its backlog is the server's business
    segments = Segments(one.lab.node, a, b, 81)
    with Echo(b, 81) as server:
        client = a.connect(b.address4, 81)
        accepted = server.accept()
        assert exchange(client, accepted, b"before")
        before = resident_bytes(one.processes[0].pid)
        with Flood(one.lab.node, c, attack(random.Random(SEED), c, b)) as flood:
            flood.wait_for(2 * FLOW_LIMIT)
            assert exchange(client, accepted, b"during")
            for _ in range(5):
                with a.connect(b.address4, 81) as newcomer:
                    assert exchange(newcomer, server.accept(), b"newcomer")
            assert FLOW_LIMIT * 9 // 10 <= flow_count(one) <= FLOW_LIMIT, (
                "the attack fills the table"
            )
            flood.wait_for(PACKETS)
        assert exchange(client, accepted, b"after")
        segments.await_all()  # of the established flow and of the newcomers
        assert flow_count(one) <= FLOW_LIMIT
        assert resident_bytes(one.processes[0].pid) - before < MEMORY_SLACK_BYTES
        client.close()
    closed.close()


def test_no_source_has_more_than_its_share(rig) -> None:
    """Established flows never leave; so who has many is refused, before the table is full."""
    one = rig(
        hosts={"a": "app=a", "b": "app=b", "c": "app=c"},
        options=("--flow-limit", "100", "--source-limit", "25"),
    )
    one.start()
    one.publish(Rule(None, "b"))
    a, b, c = (one.lab.host(name) for name in "abc")
    with Echo(b, 80) as server:
        held = []
        for _ in range(25):
            held.append(c.connect(b.address4, 80))
            assert exchange(held[-1], server.accept(), b"held")
        c.send(syn(c.address4, b.address4, 1024, 80, 1))
        one.dropped(DropReason.CT_MAP_INSERTION_FAILED, "table of flows is full")
        with a.connect(b.address4, 80) as newcomer:
            assert exchange(newcomer, server.accept(), b"newcomer")
        for client, served in zip(held, server.accepted, strict=False):
            assert exchange(client, served, b"after")
            client.close()


class Victim:
    """A connection from a to an outside server, its numbers known; w is beside the path."""

    def __init__(self, one: "datapath_rig.Rig") -> None:
        self.one = one
        self.a, self.s, self.w = (one.lab.host(name) for name in "asw")
        self.server = Echo(self.s, 80)
        with self.a.capture() as capture:
            self.client = self.a.connect(self.s.address4, 80)
            answer = IP(capture.expect(lambda data: data[9] == 6))
        self.accepted = self.server.accept()
        assert exchange(self.client, self.accepted, b"hello")
        self.port = answer[TCP].dport
        self.server_next = (answer[TCP].seq + 1 + 5) % 2**32
        self.client_next = (answer[TCP].ack + 5) % 2**32

    def segment(self, flags: str, sequence: int, ack: int = 0, payload: bytes = b"") -> bytes:
        """A segment that claims to come from the server."""
        ends = IP(src=self.s.address4, dst=self.a.address4)
        numbers = {"seq": sequence % 2**32, "ack": ack % 2**32}
        return bytes(ends / TCP(sport=80, dport=self.port, flags=flags, **numbers) / Raw(payload))

    def still_talks(self) -> None:
        assert exchange(self.client, self.accepted, b"still here")
        states = [row["state"] for row in self.one.ask("conntrack") if row["protocol"] == "tcp"]
        assert "ESTABLISHED" in states, states


@pytest.fixture
def victim(rig) -> Iterator[Victim]:
    one = rig(hosts={"a": "app=a", "s": "app=s", "w": "app=w"}, outside=("s", "w"))
    one.start()
    one.publish()
    made = Victim(one)
    yield made
    made.client.close()
    made.server.__exit__()


def test_blind_resets_have_no_effect(victim: Victim) -> None:
    """RFC 5961 3.2: every number but one; those outside the window do not even arrive."""
    chance = random.Random(SEED)
    outside = [chance.getrandbits(32) for _ in range(200)]
    outside = [n for n in outside if (n - victim.server_next) % 2**32 > 1 << 20]
    inexact = [victim.server_next + n for n in (1, 2, 100, 1000, 20000)]
    last = token()
    with victim.a.capture() as capture:
        for number in outside:
            victim.w.send(victim.segment("R", number))
            victim.w.send(victim.segment("RA", number, victim.client_next))
        for number in inexact:
            victim.w.send(victim.segment("R", number))
        victim.accepted.sendall(last)
        capture.expect(carries(last))
        arrived = [IP(data)[TCP] for data in capture.so_far() if data[9] == 6]
    assert victim.client.recv(100) == last
    refused = {number % 2**32 for number in outside}
    assert not [s for s in arrived if s.flags.R and s.seq in refused]
    victim.still_talks()


def test_spoofed_errors_have_no_effect(victim: Victim) -> None:
    """RFC 5927 4.1: what is quoted must be in flight; source quench and redirects never pass."""
    chance = random.Random(SEED)
    last = token()
    with victim.a.capture() as capture:
        for kind, code in (
            (3, 0),
            (3, 1),
            (3, 2),
            (3, 3),
            (3, 4),
            (4, 0),
            (5, 1),
            (11, 0),
            (12, 0),
        ):
            for _ in range(20):
                number = (victim.client_next + 100_000 + chance.getrandbits(31)) % 2**32
                quoted = IP(src=victim.a.address4, dst=victim.s.address4) / TCP(
                    sport=victim.port, dport=80, seq=number, flags="A"
                )
                ends = IP(src=victim.s.address4, dst=victim.a.address4)
                victim.w.send(bytes(ends / ICMP(type=kind, code=code) / Raw(bytes(quoted)[:28])))
        victim.accepted.sendall(last)
        capture.expect(carries(last))
        errors = [data for data in capture.so_far() if data[9] == 1]
    assert victim.client.recv(100) == last
    passed = {(IP(data)[ICMP].type, IP(data)[ICMP].code) for data in errors}
    # allow_icmp_frag_needed: Cilium lets path MTU discovery pass; the host checks the number.
    assert passed <= {(3, 4)}
    victim.still_talks()


def test_forged_replies_have_no_effect(victim: Victim) -> None:
    """Data, SYN/ACK and SYN of a liar beside the path, and answers that nobody asked for."""
    chance = random.Random(SEED)
    last, lie = token(), token()
    with victim.a.capture() as capture:
        for _ in range(100):
            far = victim.server_next + (1 << 20) + chance.getrandbits(30)
            victim.w.send(victim.segment("PA", far, victim.client_next, lie))
            victim.w.send(victim.segment("PA", victim.server_next, far, lie))
            victim.w.send(victim.segment("S", far))
        stray = IP(src=victim.s.address4, dst=victim.a.address4)
        for port in range(100):
            victim.w.send(bytes(stray / TCP(sport=443, dport=2000 + port, flags="SA", ack=1)))
        victim.accepted.sendall(last)
        capture.expect(carries(last))
        arrived = capture.so_far()
    assert victim.client.recv(100) == last
    assert not [data for data in arrived if lie in data]
    assert not [data for data in arrived if data[9] == 6 and IP(data)[TCP].sport == 443]
    victim.still_talks()
