"""Upgrade in place: agent and workers change; flows and new connections do not notice."""

import configparser
import contextlib
import os
import select
import signal
import socket
import threading
from pathlib import Path

import pytest
from evidence import Segments, alive, workers
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


class Newcomers(threading.Thread):
    """One new connection a -> b:81 after another, with a word each way, until the end."""

    def __init__(self, a, b) -> None:
        super().__init__(daemon=True)
        self._a, self._address = a, b.address4
        self._server = b.listen(81, backlog=64)
        self._over = threading.Event()
        self.opened_count = 0
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._over.is_set():
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
            self.opened_count += 1

    def __enter__(self):
        self.start()
        self.some()
        return self

    def some(self) -> None:
        """Wait for some more."""
        count = self.opened_count
        eventually(lambda: self.opened_count > count + 5, "newcomers come")

    def __exit__(self, *_) -> None:
        self._over.set()
        self.join(DEADLINE_S)
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

            eventually(over, "others run", every_s=0.05)
            assert firewall.process.poll() is None
            assert queues(three) == now_fed
            eventually(
                lambda before=before: not any(map(alive, before)), "the earlier ones have ended"
            )
            newcomers.some()
            transfers.all_move()
        assert not any(forbidden in data for data in at_b.so_far())
    assert newcomers.failures == []
    assert transfers.broken == []
    segments.await_all()
    assert segments.arrived_count() > 1000
    text = three.node.run(["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout
    assert [line.split()[5:7] for line in text.splitlines()] == [["0", "0"], ["0", "0"]]


def test_sigquit_leaves_everything_to_the_next_start(three):
    """The agent ends with 0; the same workers go on, and the next agent adopts them."""
    firewall = three.firewall
    before = workers(firewall)
    firewall.process.send_signal(signal.SIGQUIT)
    assert firewall.process.wait(DEADLINE_S) == 0
    assert all(map(alive, before.values()))
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
        segments.await_all()
        assert segments.arrived_count() > 1000


def test_an_upgrade_that_was_interrupted_leaves_one_set_of_workers(three):
    """kill -9 of the agent while two sets run: the next agent keeps those that are fed.

    Which those are depends on how far it came until it was killed.
    """
    firewall = three.firewall
    a, b = three.host("a"), three.host("b")
    before = datapath(firewall)
    earlier = {f"datapath-{number}.sock" for number in (0, 1)}
    later = {f"datapath-{number}b.sock" for number in (0, 1)}
    sockets = lambda: {path.name for path in firewall.run_dir.glob("datapath-*.sock")}
    with Transfers(a, b) as transfers:
        transfers.all_move()
        firewall.process.send_signal(signal.SIGUSR2)
        eventually(lambda: later <= sockets(), "the next workers listen", every_s=0.001)
        firewall.kill()
        fed = queues(three)
        assert fed in ({"0:1"}, {"64:65"})
        firewall.start()
        assert queues(three) == fed
        kept = earlier if fed == {"0:1"} else later
        eventually(lambda: sockets() == kept, "the others have ended")
        assert (datapath(firewall) == before) == (fed == {"0:1"})
        transfers.all_move()
        assert transfers.broken == []
