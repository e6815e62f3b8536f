"""Upgrade in place: agent and workers change; flows and new connections do not notice."""

import configparser
import contextlib
import os
import re
import select
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from evidence import workers
from rules import peers, policy, ports
from test_bypass_agent import Transfers
from traffic import DEADLINE_S, eventually, token, udp

pytestmark = pytest.mark.needs(
    "nfqueue", "nfqueue6", "tproxy", "socket", "connmark", "ipset", "conntrack-tool"
)

OPEN = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", "81/TCP", "53/UDP")}])


@pytest.fixture
def three(lab, bartizan):
    """a may reach b, c may not."""
    made = lab(a="app=a", b="app=b", c="app=c")
    made.firewall = bartizan(made, {"workers": 2})
    made.firewall.apply(OPEN)
    return made


class Segments:
    """Counts what leaves and what reaches two hosts: a segment that waited is no lost one.

    On a busy machine a SYN may wait for so long that its host sends another. Both are accepted; the
    kernel confirms one of them, drops the other, which says nothing new, and counts it
    (nf_ct_resolve_clash, `insert_failed`). Nothing else may be missing.
    """

    def __init__(self, node, a, b) -> None:
        self._node = node
        self._hosts = a, b
        for host in self._hosts:
            for chain in ("OUTPUT", "PREROUTING"):
                host.run(["iptables", "-t", "raw", "-A", chain, "-p", "tcp"], check=True)

    def _counts(self, host):
        saved = host.run(["iptables-save", "-c", "-t", "raw"], check=True).stdout
        found = re.findall(r"^\[(\d+):\d+\] -A (\w+) -p tcp$", saved, re.MULTILINE)
        return {chain: int(count) for count, chain in found}

    def _repeated_syn_count(self) -> int:
        """SYN that host a has sent again."""
        lines = self._hosts[0].run(["cat", "/proc/net/netstat"], check=True).stdout.splitlines()
        names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
        return int(values[names.index("TCPSynRetrans")])

    def all_arrived(self) -> bool:
        a, b = map(self._counts, self._hosts)
        there, back = a["OUTPUT"] - b["PREROUTING"], b["OUTPUT"] - a["PREROUTING"]
        statistics = self._node.run(["conntrack", "-S"], check=True).stdout
        again_count = sum(map(int, re.findall(r"insert_failed=(\d+)", statistics)))
        assert again_count <= self._repeated_syn_count()
        return b["PREROUTING"] > 1000 and there == again_count and back == 0


class Newcomers(threading.Thread):
    """One new connection a -> b:81 after another, with a word each way, until the end."""

    def __init__(self, a, b) -> None:
        super().__init__(daemon=True)
        self._a, self._address = a, b.address4
        self._server = b.listen(81, backlog=64)
        self._over = threading.Event()
        self.opened_s: list[float] = []
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                with self._a.connect(self._address, 81) as client:
                    served, _ = self._server.accept()
                    with served:
                        client.sendall(b"word")
                        served.settimeout(DEADLINE_S)
                        served.sendall(served.recv(4))
                        client.recv(4)
            except OSError as error:
                self.failures.append(repr(error))
            self.opened_s.append(time.monotonic() - began)

    def __enter__(self):
        self.start()
        self.some()
        return self

    def some(self) -> None:
        """Wait for some more."""
        count = len(self.opened_s)
        eventually(lambda: len(self.opened_s) > count + 5, "newcomers come", 15)

    def __exit__(self, *_) -> None:
        self._over.set()
        self.join(20)
        self._server.close()


def datapath(firewall):
    """pid of each datapath worker."""
    return {pid for (kind, _), pid in workers(firewall).items() if kind == "datapath"}


def queues(made):
    """The queues that the rules feed."""
    saved = made.node.run(["iptables-save", "-t", "mangle"]).stdout
    return {line.rsplit(" ", 1)[1] for line in saved.splitlines() if "--queue-balance" in line}


def upgraded(firewall, before):
    """Other workers than before run, and all enforce the present snapshot."""
    try:
        status = firewall.get("/v1/status")
    except OSError:
        return False
    rows = status["workers"]
    now = {row["pid"] for row in rows if row["kind"] == "datapath"}
    return (
        not now & before
        and all(row["state"] in ("running", "leaving") for row in rows)
        and all(row["revision"] == status["revision"] for row in rows)
    )


def test_an_upgrade_in_place_loses_no_packet(three):
    """SIGUSR2, twice: the same process, other workers, every segment arrives, c stays forbidden."""
    a, b, c, firewall = three.host("a"), three.host("b"), three.host("c"), three.firewall
    assert queues(three) == {"0:1"}
    segments = Segments(three.node, a, b)
    with Transfers(a, b) as transfers, Newcomers(a, b) as newcomers, b.capture() as at_b:
        transfers.all_move()
        forbidden = token()
        for now_fed in ({"64:65"}, {"0:1"}):
            before = datapath(firewall)
            firewall.process.send_signal(signal.SIGUSR2)

            def over(before=before):
                c.send(bytes(udp(c, b, 53, forbidden)))
                return upgraded(firewall, before)

            eventually(over, "others run", 30, every_s=0.05)
            assert firewall.process.poll() is None
            assert queues(three) == now_fed
            eventually(
                lambda before=before: not any(map(_alive, before)), "the earlier ones have ended"
            )
            newcomers.some()
            transfers.all_move()
        assert not any(forbidden in data for data in at_b.so_far())
    assert newcomers.failures == []
    assert max(newcomers.opened_s) < 3.0
    assert transfers.broken == []
    eventually(segments.all_arrived, "every segment that was sent has arrived")
    text = three.node.run(["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout
    assert [line.split()[5:7] for line in text.splitlines()] == [["0", "0"], ["0", "0"]]


def test_sigquit_leaves_everything_to_the_next_start(three):
    """The agent ends with 0; the same workers go on, and the next agent adopts them."""
    firewall = three.firewall
    before = workers(firewall)
    firewall.process.send_signal(signal.SIGQUIT)
    assert firewall.process.wait(15) == 0
    assert all(map(_alive, before.values()))
    assert queues(three) == {"0:1"}
    firewall.start()
    assert workers(firewall) == before


UNIT = Path(__file__).parents[1] / "examples/systemd/bartizan.service"


class ServiceManager:
    """Restarts a firewall as systemd would by our unit file (systemd.kill(5), systemd.service(5)).

    There is no systemd in a namespace; what it does is decided by these settings, so they are read.
    """

    def __init__(self, folder, monkeypatch) -> None:
        self._settings = configparser.ConfigParser(strict=False, interpolation=None)
        self._settings.optionxform = str
        self._settings.read(UNIT)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "notify"))

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()

    def setting(self, name, default=""):
        return self._settings["Service"].get(name, default)

    def restart(self, firewall, meanwhile) -> None:
        """`systemctl restart`; `meanwhile` is called while no agent runs."""
        number = signal.Signals[self.setting("RestartKillSignal", "SIGTERM")]
        group = [] if self.setting("KillMode") == "process" else workers(firewall).values()
        for pid in (firewall.process.pid, *group):
            os.kill(pid, number)
        assert firewall.process.wait(float(self.setting("TimeoutStopSec"))) == 0
        for pid in group:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        meanwhile()
        self.said()
        firewall.start(float(self.setting("TimeoutStartSec")))
        assert self.setting("Type") == "notify"
        eventually(lambda: "READY=1" in self.said(), "the next agent is ready")

    def said(self) -> str:
        """What the agents have told since the last time."""
        told = b""
        while select.select([self._socket], [], [], 0)[0]:
            told += self._socket.recv(4096) + b"\n"
        return told.decode()


def test_a_restart_of_the_service_loses_no_packet(lab, bartizan, tmp_path, monkeypatch):
    """systemctl restart, twice: the queues belong to workers, which outlive the agent."""
    with ServiceManager(tmp_path, monkeypatch) as manager:
        made = lab(a="app=a", b="app=b", c="app=c")
        made.firewall = firewall = bartizan(made, {"workers": 2})
        firewall.apply(OPEN)
        a, b, c = (made.host(name) for name in "abc")
        before = workers(firewall)
        segments = Segments(made.node, a, b)
        with Transfers(a, b) as transfers, Newcomers(a, b) as newcomers, b.capture() as at_b:
            transfers.all_move()
            forbidden = token()

            def meanwhile() -> None:
                newcomers.some()
                transfers.all_move()
                c.send(bytes(udp(c, b, 53, forbidden)))

            for _ in range(2):
                manager.restart(firewall, meanwhile)
                meanwhile()
                assert workers(firewall) == before
            assert not any(forbidden in data for data in at_b.so_far())
        assert newcomers.failures == []
        assert transfers.broken == []
        eventually(segments.all_arrived, "every segment that was sent has arrived")


def test_an_upgrade_that_was_interrupted_leaves_one_set_of_workers(three):
    """kill -9 of the agent while two sets run: the next agent keeps those that are fed."""
    firewall = three.firewall
    a, b = three.host("a"), three.host("b")
    before = datapath(firewall)
    with Transfers(a, b) as transfers:
        transfers.all_move()
        firewall.process.send_signal(signal.SIGUSR2)
        eventually(
            lambda: len(list(firewall.run_dir.glob("datapath-*b.sock"))) == 2,
            "the next workers listen",
            20,
            every_s=0.001,
        )
        firewall.kill()
        firewall.start()
        assert list(firewall.run_dir.glob("datapath-*b.sock")) == []
        assert datapath(firewall) == before
        assert queues(three) == {"0:1"}
        transfers.all_move(15)
        assert transfers.broken == []


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
