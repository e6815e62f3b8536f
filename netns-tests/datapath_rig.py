"""The datapath without its agent: rules, workers and snapshots of a test's own, in a lab's node.

`Rig` plays the agent: it installs the rules, starts real workers, writes snapshot files, announces
them and reads what the workers say.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from traffic import DEADLINE_S, eventually

import firewall
from conntrack.address import parse_address
from firewall.control.framing import decode_from_worker
from firewall.control.messages import (
    MAX_MESSAGE_BYTES,
    Acknowledged,
    Announce,
    Answer,
    Ask,
    Drain,
    Events,
    Hello,
)
from firewall.flows.event import PacketEvent
from firewall.policy.model import Action, Tier
from firewall.policy.snapshot import (
    DirectionRow,
    EndpointRow,
    EntryRow,
    IdentityRow,
    L7Row,
    OriginRow,
    PolicyRow,
    Settings,
    Snapshot,
)
from firewall.policy.snapshot_file import encode
from firewall.policy.verdict import DropReason, Verdict
from lab.laboratory import Lab

ROOT = Path(firewall.__file__).resolve().parents[1]
"""Where the product was imported from: the compiled tree, in `make test-compiled`."""
ANY_PORT = (0, 65535)
ORIGIN = OriginRow("CiliumNetworkPolicy", "default", "test", "spec.ingress[0]")
_encoder = msgspec.msgpack.Encoder()


class Rule(NamedTuple):
    """`source` may open flows to `destination` (names of hosts; None = anybody)."""

    source: str | None
    destination: str
    protocol: int = 0
    ports: tuple[int, int] = ANY_PORT
    http: bool = False


@pytest.fixture
def rig(request: pytest.FixtureRequest, lab: Callable[..., Lab]) -> Iterator[Callable[..., "Rig"]]:
    """Make a rig: `rig(hosts={"a": "app=a"}, workers=2)`; workers are killed with the test."""
    made: list[Rig] = []

    def make(*, hosts: dict[str, str] | None = None, **settings: Any) -> Rig:
        one = Rig(lab(**(hosts or {"a": "app=a", "b": "app=b"})), **settings)
        made.append(one)
        # The harness is a plug-in to pytest, not a module that can be imported a second time.
        for plugin in request.config.pluginmanager.get_plugins():
            if hasattr(plugin, "attach"):
                plugin.attach(request.node, one.evidence)
        return one

    yield make
    for one in made:
        one.stop(signal.SIGKILL)


class WorkerLink:
    """The agent's end of one worker's socket, read synchronously."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[PacketEvent] = []
        self.lost_count = 0
        self.acknowledged: list[Acknowledged] = []
        self.answers: list[Answer] = []
        self.hello: Hello | None = None
        self._connection = eventually(self._connect, f"{path} listens")

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(self.path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        return connection

    def say(self, message: object) -> None:
        self._connection.send(_encoder.encode(message))

    def listen(self) -> None:
        """Sort what has come."""
        while select.select([self._connection], [], [], 0)[0]:
            payload = self._connection.recv(MAX_MESSAGE_BYTES)
            if not payload:
                return
            match decode_from_worker(payload):
                case Events(events, lost):
                    self.events += events
                    self.lost_count += lost
                case Acknowledged() as message:
                    self.acknowledged.append(message)
                case Answer() as message:
                    self.answers.append(message)
                case Hello() as message:
                    self.hello = message

    def close(self) -> None:
        self._connection.close()


class Rig:
    """Rules and workers in the node of a lab.

    Every host is a managed endpoint except those in `outside`, which are the world.

    Attributes:
        path: where workers find modules; a `sitecustomize` in front of it is loaded into them.
    """

    def __init__(
        self,
        lab: Lab,
        *,
        workers: int = 1,
        proxy_port: int = 0,
        outside: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
        settings: Settings | None = None,
        bypass: bool = False,
    ) -> None:
        self.lab = lab
        self.workers = workers
        self.proxy_port = proxy_port
        self.settings = settings or Settings()
        self.managed = [name for name in lab.hosts if name not in outside]
        self.folder = lab.folder / "rig"
        self.folder.mkdir()
        self.snapshot = self.folder / "snapshot"
        self.revision = 0
        self.links: list[WorkerLink] = []
        self.processes: list[subprocess.Popen[str]] = []
        self._options = (*options, *(("--bypass",) if bypass else ()))
        self.bypass = bypass
        self.path = [str(ROOT)]
        self.generation = 0
        shown = json.loads(lab.node.run(["ip", "-j", "link"], check=True).stdout)
        self.interfaces = {row["ifname"]: row["ifindex"] for row in shown}
        self.kernel("kernel.install(config)")
        self.update_sets()
        if bypass:
            self.set_generation(fresh=True)

    # --- kernel -------------------------------------------------------------------------------

    def kernel(self, *statements: str) -> str:
        """Run statements over `kernel`, `config` and `links` in the node's namespace."""
        endpoints = [
            (self.lab.host(name).addresses, self.lab.host(name).interface) for name in self.managed
        ]
        code = [
            "from firewall.datapath import kernel, ruleset, sets",
            "from conntrack.address import parse_address",
            f"numbers = dict(queue_count={self.workers}, http_proxy_port={self.proxy_port})",
            f"numbers |= dict(generation={self.generation if self.bypass else None})",
            "config = ruleset.RulesetConfig(**numbers)",
            f"endpoints = {endpoints!r}",
            "packed = [(tuple(map(parse_address, texts)), name) for texts, name in endpoints]",
            "links = [sets.EndpointLink(*pair) for pair in packed]",
            *statements,
        ]
        argv = [sys.executable, "-c", "\n".join(code)]
        return self.lab.node.run(argv, check=True, env={"PYTHONPATH": str(ROOT)}).stdout

    def set_generation(self, *, fresh: bool = False) -> None:
        self.kernel(f"kernel.set_generation(config, fresh={fresh})")

    def update_sets(self) -> None:
        self.kernel("kernel.update_endpoints(links)")

    # --- workers ------------------------------------------------------------------------------

    def start(self, *, connect: bool = True) -> None:
        """Start every worker and wait until it listens."""
        for number in range(self.workers):
            argv = [
                sys.executable, "-m", "firewall.datapath", "--number", str(number),
                "--queue", str(number), "--run-dir", str(self.folder), "--snapshot",
                str(self.snapshot), "--workers", str(self.workers), *self._options,
            ]  # fmt: skip
            log = (self.folder / f"worker-{number}.log").open("a")
            env = {"PYTHONPATH": os.pathsep.join(self.path)}
            self.processes.append(self.lab.node.popen(argv, stdout=log, env=env))
            log.close()
        if connect:
            self.connect()

    def connect(self) -> None:
        for number in range(self.workers):
            link = WorkerLink(self.folder / f"datapath-{number}.sock")
            self.links.append(link)
            eventually(lambda link=link: self._greeted(link), "the worker says hello")

    def _greeted(self, link: WorkerLink) -> bool:
        link.listen()
        return link.hello is not None

    def disconnect(self) -> None:
        for link in self.links:
            link.close()
        self.links.clear()

    def stop(self, how: int = signal.SIGTERM) -> list[int]:
        """End the workers by a signal; return their exit codes."""
        self.disconnect()
        # nsenter(1) execs, so the child is the worker itself.
        for process in self.processes:
            process.send_signal(how)
        codes = [process.wait(DEADLINE_S) for process in self.processes]
        self.processes.clear()
        return codes

    def drain(self) -> list[int]:
        for link in self.links:
            link.say(Drain(1.0))
        codes = [process.wait(DEADLINE_S) for process in self.processes]
        self.processes.clear()
        self.disconnect()
        return codes

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("worker-*.log")))

    # --- snapshots ----------------------------------------------------------------------------

    def build(self, *rules: Rule, closed: tuple[str, ...] | None = None) -> Snapshot:
        """Return a snapshot: ingress of `closed` (default: all managed) allows the rules only."""
        self.revision += 1
        numbers = {name: 1000 + index for index, name in enumerate(self.lab.hosts)}
        closed = tuple(self.managed) if closed is None else closed
        policies = []
        for name in self.managed:
            entries = tuple(_entry(rule, numbers) for rule in rules if rule.destination == name)
            ingress = DirectionRow(True, True, entries, (0,))
            if name not in closed:
                ingress = DirectionRow(False, False)
            policies.append(PolicyRow(numbers[name], ingress, DirectionRow(False, False)))
        return Snapshot(
            revision=self.revision,
            generation=self.generation,
            policy_revision=self.revision,
            settings=msgspec.structs.replace(self.settings, http_proxy_port=self.proxy_port),
            endpoints=tuple(
                EndpointRow(
                    id=index + 1,
                    name=name,
                    namespace="default",
                    identity=numbers[name],
                    addresses=tuple(map(parse_address, self.lab.host(name).addresses)),
                    interface=self.lab.host(name).interface,
                    interface_index=self.interfaces[self.lab.host(name).interface],
                )
                for index, name in enumerate(self.managed)
            ),
            identities=tuple(
                IdentityRow(numbers[name], (f"k8s:app={name}",), (numbers[name],))
                for name in self.managed
            ),
            policies=tuple(policies),
            l7=(L7Row("http"),),
            origins=(ORIGIN,),
        )

    def write(self, snapshot: Snapshot) -> None:
        temporary = self.snapshot.with_suffix(".new")
        temporary.write_bytes(encode(snapshot))
        temporary.replace(self.snapshot)

    def revoke(self, *rules: Rule, closed: tuple[str, ...] | None = None) -> None:
        """Publish a snapshot of the next generation, as the agent does."""
        self.generation += 1
        self.publish(*rules, closed=closed)
        self.set_generation()

    def publish(self, *rules: Rule, closed: tuple[str, ...] | None = None) -> float:
        """Write a snapshot, announce it, wait for every worker; return the seconds it took."""
        snapshot = self.build(*rules, closed=closed)
        self.write(snapshot)
        began = time.monotonic()
        for link in self.links:
            link.say(Announce(snapshot.revision, str(self.snapshot)))
        eventually(
            lambda: all(self._enforces(link, snapshot.revision) for link in self.links),
            "every worker acknowledges",
            every_s=0.001,
        )
        return time.monotonic() - began

    def _enforces(self, link: WorkerLink, revision: int) -> bool:
        link.listen()
        return any(a.revision >= revision and not a.error for a in link.acknowledged)

    # --- what the workers say -----------------------------------------------------------------

    def events(self) -> list[PacketEvent]:
        for link in self.links:
            link.listen()
        return [event for link in self.links for event in link.events]

    def event(self, matches: Callable[[PacketEvent], bool], what: str = "an event") -> PacketEvent:
        return eventually(
            lambda: next((event for event in self.events() if matches(event)), None), what
        )

    def dropped(self, reason: DropReason, detail: str = "", count: int = 1) -> PacketEvent:
        """Wait until so many drops for this reason were reported; return the last."""

        def found() -> list[PacketEvent] | None:
            drops = [
                event
                for event in self.events()
                if event.verdict == Verdict.DROP
                and event.drop_reason == reason
                and detail in event.detail
            ]
            return drops if len(drops) >= count else None

        return eventually(found, f"{count} drops for {reason.name}")[-1]

    def forget(self) -> None:
        self.events()
        for link in self.links:
            link.events.clear()

    def ask(self, what: str) -> list[dict[str, object]]:
        """Ask every worker, and gather the rows."""
        rows: list[dict[str, object]] = []
        for number, link in enumerate(self.links):
            request = 1000 + number + len(link.answers)
            link.say(Ask(request, what))

            def whole(link: WorkerLink = link, request: int = request) -> list[Answer] | None:
                link.listen()
                parts = [part for part in link.answers if part.request == request]
                return parts if parts and parts[-1].last else None

            for part in eventually(whole, f"the answer about {what}"):
                rows += part.rows
            link.answers.clear()
        return rows

    def metric(self, name: str, **labels: str) -> int:
        """A counter's value summed over workers."""
        return sum(
            int(str(row["value"]))
            for row in self.ask("metrics")
            if row["name"] == name and (not labels or row["labels"] == labels)
        )

    def drop_count(self) -> int:
        """Packets dropped, except the link's own messages before the first snapshot."""
        early = "DROP_EP_NOT_READY"
        name = "drop_count_total"
        return self.metric(name) - self.metric(name, reason=early)

    def evidence(self) -> list[tuple[str, str]]:
        drops = [event for event in self.events() if event.verdict == Verdict.DROP]
        sets = self.lab.node.run(["ipset", "save"]).stdout
        return [
            ("workers", self.log()),
            ("drops", "\n".join(map(str, drops[-20:]))),
            ("ipset", sets),
        ]


def _entry(rule: Rule, numbers: dict[str, int]) -> EntryRow:
    return EntryRow(
        action=Action.ALLOW,
        tier=Tier.NORMAL,
        priority=0.0,
        selector=numbers[rule.source] if rule.source else 0,
        protocol=rule.protocol,
        port_low=rule.ports[0],
        port_high=rule.ports[1],
        port_name="",
        l7=0 if rule.http else -1,
        origin=0,
    )
