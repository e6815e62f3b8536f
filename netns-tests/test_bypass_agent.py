"""The bypass as an operator meets it: policies come and go, processes die, transfers go on or stop.

Evidence is what arrived at the receiving host, and when; the connmarks of the kernel; and what
`conntrack list` says.
"""

import os
import re
import selectors
import signal
import socket
import struct
import threading
import time

import pytest
from evidence import queued, workers
from rules import peers, policy, ports
from traffic import Echo, eventually, exchange, token, udp

pytestmark = pytest.mark.needs("nfqueue", "nfqueue6", "tproxy", "socket", "connmark", "ipset")

OPEN = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", "53/UDP")}])
WIDER = policy("app=b", ingress=[{**peers("app=a", "app=c"), **ports("80/TCP", "53/UDP")}])
CLOSED = policy("app=b", ingress=[{**peers("app=d"), **ports("80/TCP", "53/UDP")}])

REVOKED_WITHIN_S = 0.1
"""What is promised: nothing of a flow arrives this long after `policy apply` has returned."""


@pytest.fixture
def three(lab, bartizan):
    """a may reach b, c may not; the kernel carries established flows."""
    made = lab(a="app=a", b="app=b", c="app=c")
    made.firewall = bartizan(made, {"bypass": True, "workers": 1})
    made.firewall.apply(OPEN)
    return made


def offloaded(lab) -> list[str]:
    """The kernel's flows that bear our mark, as conntrack(8) prints them."""
    lines = lab.node.run(["conntrack", "-L"], check=True).stdout.splitlines()
    return [line for line in lines if " mark=" in line and " mark=0 " not in line]


def dropped_count(lab) -> int:
    """Dropped segments that have a record."""
    return len(lab.firewall.flows(verdict="DROPPED", protocol="tcp"))


class Stream:
    """A transfer from `client` to `server` that runs until it is stopped."""

    def __init__(self, client, server) -> None:
        self.received_bytes = 0
        self._ends = (client, server)
        self._over = threading.Event()
        client.settimeout(0.1)
        server.settimeout(0.1)
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while not self._over.is_set():
            try:
                self._ends[0].send(b"x" * 16_384)
            except TimeoutError:
                continue

    def _receive(self) -> None:
        while not self._over.is_set():
            try:
                data = self._ends[1].recv(1 << 16)
            except TimeoutError:
                continue
            self.received_bytes += len(data)

    @property
    def arrived_at(self) -> float:
        """When the latest data came, as the kernel noted it: a busy reader does not make it later.

        Source: tcpi_last_data_recv (ms ago) of struct tcp_info, linux/tcp.h.
        """
        told = self._ends[1].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 56)
        (ago_ms,) = struct.unpack_from("=I", told, 52)
        return time.monotonic() - ago_ms / 1000


ARRIVALS = ("PREROUTING", "-p", "tcp")


def arrived_count(host) -> int:
    """TCP packets that have reached the host since the first question."""
    if host.run(["iptables", "-t", "raw", "-C", *ARRIVALS]).returncode != 0:
        host.run(["iptables", "-t", "raw", "-A", *ARRIVALS], check=True)
    saved = host.run(["iptables-save", "-c", "-t", "raw"], check=True).stdout
    (count,) = re.findall(r"^\[(\d+):\d+\] -A PREROUTING -p tcp$", saved, re.MULTILINE)
    return int(count)


def await_standstill(three, came_count) -> None:
    """Wait until `came_count`, of what the sender repeats, grows and nothing arrives at b."""
    b = three.host("b")

    def stands() -> bool:
        arrived, came = arrived_count(b), came_count()
        eventually(lambda: came_count() > came, "the sender repeats a segment")
        return arrived_count(b) == arrived

    eventually(stands, "the transfer has stopped")


def test_a_permission_that_is_taken_away_stops_a_running_transfer(three):
    """Nothing arrives later than 100 ms after the apply has returned."""
    a, b = three.host("a"), three.host("b")
    with (
        Echo(b, 80) as server,
        a.connect(b.address4, 80) as client,
        Stream(client, server.accept()) as stream,
    ):
        eventually(lambda: stream.received_bytes > 20_000_000, "data flows")
        eventually(lambda: offloaded(three), "the kernel carries it")
        three.firewall.apply(CLOSED)
        returned_at = time.monotonic()
        await_standstill(three, lambda: dropped_count(three))
        assert stream.arrived_at < returned_at + REVOKED_WITHIN_S
        three.firewall.apply(OPEN)
        again = stream.received_bytes
        eventually(lambda: stream.received_bytes > again, "it goes on")


def test_granting_disturbs_nothing(three):
    """Another may too: no flow comes back to the queue, the generation stays."""
    a, b = three.host("a"), three.host("b")
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        connection = server.accept()
        for _ in range(20):
            assert exchange(client, connection, token())
        eventually(lambda: offloaded(three), "the kernel carries it")
        marked = [line.rsplit("mark=", 1)[1] for line in offloaded(three)]
        generation = three.firewall.get("/v1/status")["bypass"]["generation"]
        three.firewall.apply(WIDER)
        before = queued(three.node)
        for _ in range(50):
            assert exchange(client, connection, token())
        assert queued(three.node) == before
        assert [line.rsplit("mark=", 1)[1] for line in offloaded(three)] == marked
        assert three.firewall.get("/v1/status")["bypass"]["generation"] == generation


def test_conntrack_list_shows_what_the_kernel_has_carried(three):
    """Packets and bytes are the kernel's, the flag says who carries the flow."""
    a, b = three.host("a"), three.host("b")
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        connection = server.accept()
        for _ in range(20):
            assert exchange(client, connection, b"x" * 50_000)
        eventually(lambda: offloaded(three), "the kernel carries it")
        rows = three.firewall.told("conntrack", "list")
        (row,) = (row for row in rows if row["destination"] == f"{b.address4}:80")
        assert "OFFLOAD" in row["flags"]
        assert min(row["bytes"]) > 20 * 50_000
        assert "OFFLOAD" in three.firewall.cli("conntrack", "list").stdout
    status = three.firewall.cli("status").stdout
    assert "established flows pass in the kernel" in status


def test_flush_ends_the_chosen_flows_and_no_others(three):
    """Tracker and kernel forget them, and say how many; what follows belongs to no flow."""
    a, b, firewall = three.host("a"), three.host("b"), three.firewall
    with (
        Echo(b, 80) as server,
        a.connect(b.address4, 80) as first,
        a.connect(b.address4, 80) as second,
    ):
        one, two = server.accept(), server.accept()
        for _ in range(20):
            assert exchange(first, one, token())
            assert exchange(second, two, token())
        eventually(lambda: len(offloaded(three)) == 2, "the kernel carries both")
        nobody = firewall.told("conntrack", "flush", "--from", "c")
        assert nobody == {"flows": 0, "kernel": 0}
        end = f"{a.address4}:{first.getsockname()[1]}"
        said = firewall.cli("conntrack", "flush", "--from", end, "--to", "b").stdout
        assert said == "1 flows forgotten, 1 of them by the kernel too\n"
        assert f"sport={second.getsockname()[1]}" in "".join(offloaded(three))
        assert len(offloaded(three)) == 1
        first.sendall(b"lost")
        eventually(
            lambda: any(
                flow["l4"].get("TCP", {}).get("source_port") == first.getsockname()[1]
                for flow in firewall.flows(verdict="DROPPED", protocol="tcp")
            ),
            "the segment is dropped",
        )
        assert exchange(second, two, token())
        with a.connect(b.address4, 80) as third:
            assert exchange(third, server.accept(), token())
        assert firewall.told("conntrack", "flush", "--all")["kernel"]
        assert offloaded(three) == []
        assert firewall.told("conntrack", "list") == []
    refused = firewall.cli("conntrack", "flush", "--from", "nobody")
    assert (refused.returncode, refused.stderr) == (1, "Error: no endpoint 'nobody'\n")
    assert firewall.cli("conntrack", "flush").returncode == 2


def test_a_worker_that_hangs_does_not_hold_a_revocation_up(three):
    """Its flows come to a queue that nobody reads, until it follows."""
    a, b = three.host("a"), three.host("b")
    with (
        Echo(b, 80) as server,
        a.connect(b.address4, 80) as client,
        Stream(client, server.accept()) as stream,
    ):
        eventually(lambda: stream.received_bytes > 20_000_000, "data flows")
        pid = workers(three.firewall)["datapath", 0]
        os.kill(pid, signal.SIGSTOP)
        try:
            three.firewall.request(
                "PUT", "/v1/policy", CLOSED.encode(), {"file": "x.yaml", "wait": 1}
            )
            returned_at = time.monotonic()
            await_standstill(three, lambda: queued(three.node))
            assert stream.arrived_at < returned_at + REVOKED_WITHIN_S
        finally:
            os.kill(pid, signal.SIGCONT)
        eventually(
            lambda: three.firewall.get("/v1/status")["bypass"]["generation"] is not None,
            "flows are carried again",
        )
        await_standstill(three, lambda: dropped_count(three))


COUNT = 200


class Transfers:
    """Many connections a -> b that exchange all the time, in a thread."""

    def __init__(self, a, b, port=80) -> None:
        self.server = b.listen(port, backlog=COUNT)
        self.pairs = []
        for _ in range(COUNT):
            client = a.connect(b.address4, port)
            self.pairs.append((client, self.server.accept()[0]))
        self.turns = [0] * COUNT
        self.broken: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        for pair in self.pairs:
            for end in pair:
                end.close()
        self.server.close()

    def _work(self) -> None:
        """Each end answers what it gets; the client begins."""
        poll = selectors.DefaultSelector()
        for index, pair in enumerate(self.pairs):
            for end in pair:
                end.setblocking(False)
                poll.register(end, selectors.EVENT_READ, (index, end))
            pair[0].send(b"ball")
        while not self._over.is_set():
            for key, _ in poll.select(0.05):
                index, end = key.data
                try:
                    data = end.recv(64)
                    if data:
                        self.turns[index] += 1
                        end.send(data)
                        continue
                except BlockingIOError:
                    continue
                except OSError:
                    pass
                self.broken.append(index)
                poll.unregister(end)
            self._over.wait(0.002)

    def all_move(self) -> None:
        """Wait until every connection has made two more turns."""
        before = list(self.turns)
        eventually(
            lambda: all(now > then + 1 for now, then in zip(self.turns, before, strict=True)),
            "every transfer goes on",
        )


@pytest.fixture
def pair_of_workers(lab, bartizan):
    """As `three`, with two datapath workers."""
    made = lab(a="app=a", b="app=b", c="app=c")
    made.firewall = bartizan(made, {"workers": 2})
    made.firewall.apply(OPEN)
    return made


def datapath(firewall):
    """pid of each datapath worker that runs."""
    rows = firewall.get("/v1/status")["workers"]
    return {row["pid"] for row in rows if row["kind"] == "datapath" and row["state"] == "running"}


@pytest.mark.parametrize("victims", ["worker", "agent", "worker agent", "agent worker"])
def test_no_transfer_breaks_when_processes_are_killed(pair_of_workers, victims):
    """kill -9 among 200 transfers; c stays forbidden all the time; a may again before long."""
    made = pair_of_workers
    a, b, c = (made.host(name) for name in "abc")
    with Transfers(a, b) as transfers:
        transfers.all_move()
        before = datapath(made.firewall)
        with b.capture() as at_b:
            forbidden = token()
            for victim in victims.split():
                if victim == "worker":
                    for pid in before:
                        os.kill(pid, signal.SIGKILL)
                else:
                    made.firewall.kill()
                c.send(bytes(udp(c, b, 53, forbidden)))
            if "agent" in victims:
                made.firewall.start()
            eventually(
                lambda: "worker" not in victims or not datapath(made.firewall) & before,
                "other workers",
            )
            c.send(bytes(udp(c, b, 53, forbidden)))
            allowed = token()

            def passes() -> bool:
                a.send(bytes(udp(a, b, 53, allowed)))
                return any(allowed in data for data in at_b.so_far())

            eventually(passes, "new flows", every_s=0.05)
            assert not any(forbidden in data for data in at_b.so_far())
        transfers.all_move()
        assert transfers.broken == []
