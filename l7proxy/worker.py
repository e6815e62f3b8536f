"""The proxy worker: `python -m l7proxy.worker --number N --port P --run-dir DIR --snapshot PATH`.

Theory of operation. One process, one event loop, transparent listeners that share their port with
the other workers. It needs nobody: the snapshot file found at start is enforced at once; without
one, or with a damaged one, every connection is reset until the agent announces another. A new
snapshot is in force for the next request of every open connection, and connections that lost their
permission are reset before the acknowledgement goes out. The control socket appears after the
listeners: who can connect to it sees a worker that serves.

Ends: Drain or SIGTERM stops accepting, lets exchanges finish, then exits, at the deadline anyway.

Time is swept: a few times a second every connection whose deadline has passed is told. Events are
sent in batches; of a storm at most `EVENTS_PER_FLUSH` per batch are made, the rest is counted.
"""

import argparse
import asyncio
import contextlib
import gc
import itertools
import logging
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import msgspec

from conntrack.address import format_address
from firewall.control import journal
from firewall.control.inheritance import inherited
from firewall.control.messages import (
    Acknowledged,
    Announce,
    Answer,
    Ask,
    Drain,
    Events,
    Forget,
    Instruct,
    Lend,
    Pause,
    Settled,
    Watch,
)
from firewall.control.snapshots import SnapshotReader
from firewall.control.unix import ChannelError
from firewall.control.worker_channel import WorkerChannel
from firewall.flows.event import DnsEvent, Event
from firewall.policy.snapshot import Snapshot, SnapshotError
from l7proxy.accesslog import Ends, SocketAddress, ends_of, http_event, is_final
from l7proxy.certificates import Certificates
from l7proxy.commands import Record
from l7proxy.connection import ClientConnection
from l7proxy.dns_desk import Desk, Lesson
from l7proxy.dns_service import DnsService
from l7proxy.dns_stream import TCP, DnsStream
from l7proxy.heads import Heads
from l7proxy.judgement import Judge, Judgement
from l7proxy.limits import LimitError, Limits, override
from l7proxy.listener import ListenError, is_local, listen
from l7proxy.logfile import AccessLog
from l7proxy.logformat import ENCODINGS, FormatError, compile_format
from l7proxy.metrics import Metrics, Redirects, Row
from l7proxy.plan import Policy
from l7proxy.policy import ConnectionJudge
from l7proxy.poller import Door, Poller
from l7proxy.renewal import Renewal
from l7proxy.secrets import SecretFiles
from l7proxy.shares import Shares
from l7proxy.wire import Wire

SWEEP_S = 0.25
"""Resolution of timeouts; 10,000 connections take about a millisecond."""

FLUSH_S = 0.05
"""Longest time that an event waits for company."""

RECORDS_PER_TELLING = 64
"""Records that wait for company at most: telling them takes about 0.3 ms."""

EVENTS_PER_FLUSH = 1024
"""Events made per FLUSH_S, about 20,000/s."""

DRAIN_S = 5.0
"""How long SIGTERM lets exchanges finish."""

ROWS_PER_ANSWER = 256
"""Rows of one message: about 30 kB."""

SPARE_DESCRIPTORS = 64
"""For listeners, control socket, logs and libraries."""

VERSION = version("bartizan")
"""What the agent compares with its own before it adopts a worker."""

log = logging.getLogger(__name__)


class Worker:
    """Serves redirected connections until it is told to stop.

    Raises:
        ListenError: the port cannot be bound.
        ChannelError: the control socket cannot be made.
    """

    def __init__(self, options: argparse.Namespace, limits: Limits) -> None:
        self.limits = limits
        self.heads = Heads(limits)
        self.metrics = Metrics()
        self.poller = Poller()
        self._redirects = Redirects()
        self.mark: int = options.mark_from_proxy
        self._number: int = options.number
        self._port: int = options.port
        secrets = SecretFiles(Path(options.secrets_dir)) if options.secrets_dir else None
        self._secrets = secrets
        folder = Path(options.secrets_dir) if options.secrets_dir else None
        self.certificates = Certificates(folder)
        self._renewal = Renewal(
            lambda: (*self.certificates.news(), *(secrets.news() if secrets else ()))
        )
        self._policy = Policy(secrets)
        self._connections: set[ClientConnection | DnsStream] = set()
        bounds = limits.connection_count, limits.connection_count_per_source
        self._clients = Shares(*bounds)
        # A client of HTTP/2 may ask for a connection to a server with each stream: with the bounds
        # of clients for them as well, no source takes all descriptors.
        self.upstreams = Shares(*bounds)
        self.handshakes = Shares(limits.tls_handshake_count, limits.tls_handshake_count_per_source)
        self._records: list[tuple[Record, Ends, int]] = []
        self._events: list[Event] = []
        self._room_count = EVENTS_PER_FLUSH
        self._lost_count = 0
        self._started_at = time.monotonic()
        self._ids = itertools.count(1)
        self._connection_ids = itertools.count(1)
        start = os.urandom(10).hex()
        self._id_prefix = f"{start[:8]}-{start[8:12]}-{start[12:16]}-{start[16:]}-"
        self._access_log: AccessLog | None = None
        if options.access_log:
            line = compile_format(options.access_log_format, options.access_log_encoding)
            self._access_log = AccessLog(Path(options.access_log), line, socket.gethostname())
        self._snapshots = SnapshotReader()
        self._dns: DnsService | None = None
        self._load(Path(options.snapshot))
        # What the agent keeps open for us is listening already, and connections may wait in it.
        self._listeners = listen(self._port, self.mark, inherited(os.environ))
        self._doors: list[Door] = []
        self._stopped = asyncio.Event()
        self._draining_since = math.inf
        self._channel = WorkerChannel(
            Path(options.run_dir) / f"l7proxy-{self._number}.sock",
            "l7proxy",
            self._number,
            VERSION,
            revision=self._policy.revision,
        )
        self._dns = DnsService(
            limits,
            [sock for name, sock in self._listeners.items() if name.startswith("udp")],
            self.mark,
            count=self.metrics.add,
            report=self._report_dns,
            send=self._channel.send,
        )
        self._dns.follow(self._policy.view)

    async def run(self) -> None:
        """Serve until `drain` has ended."""
        loop = asyncio.get_running_loop()
        for name, sock in self._listeners.items():
            if name.startswith("tcp"):
                self._doors.append(Door(self.poller, sock, self._enter))
        assert self._dns is not None
        self._dns.start(self.poller)
        loop.add_reader(self._channel.fileno(), self._listen)
        loop.add_signal_handler(signal.SIGTERM, self.drain, DRAIN_S)
        if self._access_log is not None:
            loop.add_signal_handler(signal.SIGUSR1, self._access_log.reopen)
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # a terminal's ^C is the agent's
        sweep_at = 0.0
        while not self._stopped.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), FLUSH_S)
            now = time.monotonic()
            self._flush()
            if now >= sweep_at:
                self._sweep(now)
                sweep_at = now + SWEEP_S
        self._flush()
        loop.remove_reader(self._channel.fileno())

    def _enter(self, sock: socket.socket, client: SocketAddress) -> None:
        """Meet a connection, of which nothing is known yet."""
        assert self._dns is not None
        server: SocketAddress = sock.getsockname()
        ends = ends_of(client, server, next(self._connection_ids), time.monotonic())
        serves = DnsStream if self._dns.desk.serves(ends, TCP) else ClientConnection
        # Who has just connected has often sent something, too.
        Wire(self.poller, sock, serves(self, client, server, ends)).read()

    def close(self) -> None:
        """Close the control socket and the log."""
        if self._dns is not None:
            self._dns.close()
        self.poller.close()
        self._channel.close()
        if self._access_log is not None:
            self._access_log.close()

    def drain(self, within_s: float) -> None:
        """Accept nothing more, finish what has begun, stop at the latest after so many seconds.

        Listening sockets and the control socket's path are a successor's from now on.
        """
        self._channel.retire()
        for door in self._doors:
            door.close()
        if self._dns is not None:
            self._dns.stop()
        now = time.monotonic()
        for connection in tuple(self._connections):
            connection.drain(now)
        loop = asyncio.get_running_loop()
        loop.call_later(min(self.limits.drain_gap_s, within_s / 2), self._finish)
        loop.call_later(within_s, self._stopped.set)
        self._draining_since = min(self._draining_since, now)

    def _finish(self) -> None:
        """End the connections that are idle, and the others with what they serve now."""
        now = time.monotonic()
        for connection in tuple(self._connections):
            connection.finish(now)

    # --- what connections ask of their worker ----------------------------------------------------

    def admit(self, connection: ClientConnection | DnsStream) -> Judge | None:
        """Take a new connection; None: it must be reset."""
        ends = connection.ends
        self._connections.add(connection)
        room = self._clients.has_room(ends.source)
        self._clients.add(ends.source)  # until `forget`, refused or not
        self.metrics.opened()
        if not room:
            self.metrics.add("http_downstream_cx_overflow")
            return None
        if ends.destination_port == self._port and is_local(connection.server[0]):
            self.metrics.add("http_downstream_cx_loop")
            log.warning("connection from %s to the proxy itself", format_address(ends.source))
            return None
        return ConnectionJudge(self._policy, ends.source, ends.destination, ends.destination_port)

    def admit_stream(self, stream: DnsStream) -> Desk | None:
        """Take a new connection of a DNS client; None: it must be reset."""
        assert self._dns is not None
        return self._dns.desk if self.admit(stream) is not None else None

    def forget(self, connection: ClientConnection | DnsStream) -> None:
        """Let go of a connection that has ended."""
        self._connections.discard(connection)
        self.metrics.closed(time.monotonic() - connection.ends.begun_at)
        self._clients.give_back(connection.ends.source)

    def new_request_id(self) -> str:
        """Return an id that no other request has, in the shape of a UUID."""
        return f"{self._id_prefix}{next(self._ids):012x}"

    def report(self, record: Record, ends: Ends) -> None:
        """Take a record; it is told a moment later, when the answer is on its way."""
        self._records.append((record, ends, time.time_ns()))
        if len(self._records) >= RECORDS_PER_TELLING:
            self._tell()

    def _tell(self) -> None:
        """Count what was recorded, log it, and send events of it if there is an agent."""
        records, self._records = self._records, []
        for record, ends, time_ns in records:
            self.metrics.observe(record)
            self._redirects.observe(record, ends.destination_port)
            if self._access_log is not None and is_final(record):
                self._access_log.write(record, ends, time_ns)
        room = self._room_count if self._channel.connected else 0
        self._events += [
            http_event(record, ends, time_ns, self._who(record, ends))
            for record, ends, time_ns in records[:room]
        ]
        self._lost_count += max(0, len(records) - room)
        if self._events:
            self._send_events()

    def _who(self, record: Record, ends: Ends) -> Judgement | None:
        """Say whose connection it is on which policy was not asked about a request."""
        if record.judgement is not None:
            return None
        judge = ConnectionJudge(self._policy, ends.source, ends.destination, ends.destination_port)
        return judge.connection()

    def _send_events(self) -> None:
        """Send what has gathered; what finds no room is counted by the channel.

        At once and not with the next flush: as one message, the events of 50 ms would take 5 ms of
        everybody's time, and more than twice that because they do not fit into a datagram.
        """
        self._room_count -= len(self._events)
        self._channel.send(Events(tuple(self._events), self._lost_count))
        self._events.clear()
        self._lost_count = 0

    def hold(self, lesson: Lesson | None, send: Callable[[], None]) -> None:
        """Send an answer when what it says is enforced."""
        assert self._dns is not None
        self._dns.hold(lesson, send)

    def _report_dns(self, event: DnsEvent) -> None:
        if event.kind == "request":
            self.metrics.asked(event)
            self._redirects.asked(event)
        if not self._channel.connected or len(self._events) >= self._room_count:
            self._lost_count += 1
            return
        self._events.append(msgspec.structs.replace(event, time_ns=time.time_ns()))
        if len(self._events) >= RECORDS_PER_TELLING:
            self._send_events()

    # --- the agent -------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Do what the agent says."""
        for message in self._channel.receive():
            match message:
                case Announce():
                    self._announced(message)
                case Ask():
                    self._answer(message)
                case Drain():
                    self.drain(message.deadline_s)
                case Lend():
                    self._channel.lend(self._listeners)
                case Instruct():
                    self._instructed(message)
                case Forget() | Watch() | Pause():
                    pass  # for verdict workers
                case Settled():
                    assert self._dns is not None
                    self._dns.settled(message)

    def _announced(self, message: Announce) -> None:
        error = self._load(Path(message.path))
        if error:
            self._channel.send(Acknowledged(message.revision, error))
            return
        now = time.monotonic()
        for connection in tuple(self._connections):
            connection.policy_changed(now)
        self._flush()
        self._channel.send(Acknowledged(self._policy.revision))

    def _load(self, path: Path) -> str:
        """Enforce the snapshot at `path`; "" or why the one before stays."""
        try:
            snapshot = self._snapshots.load(path)
        except FileNotFoundError:
            error = "there is no snapshot yet"
        except (OSError, SnapshotError) as problem:
            error = str(problem)
        else:
            self._read_secrets(snapshot)
            self._policy.install(snapshot)
            if self._dns is not None:
                self._dns.follow(self._policy.view)
            log.info("snapshot enforced: revision %d", snapshot.revision)
            return ""
        revision = self._policy.revision
        held = f"revision {revision} stays" if revision else "every connection is reset"
        log.warning("%s: %s; %s", path, error, held)
        return error

    def _read_secrets(self, snapshot: Snapshot) -> None:
        """Look at the secrets of a snapshot again."""
        if self._secrets is not None:
            self._secrets.forget()
        self.metrics.secret_problems = missing = self.certificates.install(snapshot)
        for problem_text in missing:
            log.warning("%s: its TLS connections end until it is there", problem_text)

    def _renew(self, now: float) -> None:
        """Use secrets that have changed; what they no longer allow ends, as with a snapshot."""
        if self._policy.view is None or not self._renewal.due(now):
            return
        self._read_secrets(self._policy.view.snapshot)
        log.info("secrets were read again")
        for connection in tuple(self._connections):
            connection.policy_changed(now)

    def _answer(self, question: Ask) -> None:
        rows: list[Row] = []
        self._flush()
        if question.what == "metrics":
            rows = self.metrics.rows()
        elif question.what == "connections":
            rows = self._ends()
        elif question.what == "redirects":
            rows = self._redirects.rows()
        elif question.what == "stats":
            rows = [*self.metrics.rows(), *self.metrics.histograms()]
        elif question.what == "status":
            rows = [self._status()]
        for start in range(0, len(rows), ROWS_PER_ANSWER):
            part = tuple(rows[start : start + ROWS_PER_ANSWER])
            self._channel.send(Answer(question.request, part, last=False))
        self._channel.send(Answer(question.request, (), last=True))

    def _ends(self) -> list[Row]:
        """Return the two addresses of every connection, as text, each pair once."""
        pairs = {(one.ends.source, one.ends.destination) for one in self._connections}
        return [
            {"source": format_address(source), "destination": format_address(destination)}
            for source, destination in pairs
        ]

    def _instructed(self, instruction: Instruct) -> None:
        """Do what an operator wants of the running process."""
        match instruction.what:
            case "log_level":
                logging.getLogger().setLevel(instruction.value.upper())
            case "reset_counters":
                self.metrics.reset()
            case _:
                log.warning("unknown instruction %r", instruction.what)

    def _status(self) -> Row:
        """Return what this worker is and does."""
        return {
            "kind": "l7proxy",
            "number": self._number,
            "pid": os.getpid(),
            "version": VERSION,
            "uptime_s": time.monotonic() - self._started_at,
            "revision": self._policy.revision,
            "port": self._port,
            "connection_count": self.metrics.active_connection_count,
            "upstream_count": self.metrics.active_upstream_count,
            "memory_bytes": _resident_bytes(),
            "addresses": self._addresses(socket.SOCK_STREAM),
            "datagram_addresses": self._addresses(socket.SOCK_DGRAM),
            "lost_event_count": self._channel.lost_total_count + self._lost_count,
        }

    def _addresses(self, kind: socket.SocketKind) -> list[list[str | int]]:
        """Return where sockets of a kind listen, as text and port."""
        return [
            list(sock.getsockname()[:2])
            for sock in self._listeners.values()
            if sock.fileno() >= 0 and sock.type == kind
        ]

    # --- upkeep ----------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Tell what has waited for company long enough."""
        self._room_count = EVENTS_PER_FLUSH
        self._tell()
        if self._lost_count:
            self._send_events()
        if self._access_log is not None:
            self._access_log.flush()
            self.metrics.lost_line_count = self._access_log.lost_count
            self.metrics.access_log_problem = self._access_log.problem

    def _sweep(self, now: float) -> None:
        if self._access_log is not None:
            self._access_log.follow()
        assert self._dns is not None
        self._dns.tick(now)
        for connection in tuple(self._connections):
            connection.tick(now)
        self._renew(now)
        # A connection that the loop has accepted, but not yet told us of, must not end with us.
        is_over = now >= self._draining_since + SWEEP_S
        if is_over and not self._connections and self._dns.idle:
            self._stopped.set()


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; exits with usage on a mistake."""
    parser = argparse.ArgumentParser(
        prog="l7proxy.worker", description="Enforce http rules on redirected connections."
    )
    add = parser.add_argument
    add("--number", type=int, required=True, help="number of this worker, from 0")
    add("--port", type=int, required=True, help="TCP port that TPROXY hands connections to")
    add("--run-dir", required=True, help="where the control socket is made")
    add("--snapshot", required=True, help="path of the snapshot file")
    add(
        "--mark-from-proxy",
        type=lambda text: int(text, 0),
        default=0,
        help="packet mark of everything that the proxy sends",
    )
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="see docs/l7.md")
    add("--access-log", default="", help="file for a line about each request")
    add("--access-log-encoding", choices=ENCODINGS, default="text", help="of each line")
    add("--access-log-format", default="", help="Envoy's operators; empty = Envoy's default")
    add("--secrets-dir", default="", help="DIR/NAMESPACE/NAME: secrets of headerMatches and TLS")
    add("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="event loop")
    add("--log-level", default="info", help="debug, info, warning or error")
    add("--log-format", choices=("logfmt", "json"), default="logfmt", help="of each line")
    return parser.parse_args(arguments)


def _raise_descriptor_limit(limits: Limits) -> Limits:
    """Take as many descriptors as the system gives, and accept no more than they serve.

    A connection needs two. Without a descriptor accept(2) fails, and a listener that stays readable
    would keep the loop busy.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return limits
    room = max(1, (hard - SPARE_DESCRIPTORS) // 2)
    if room < limits.connection_count:
        log.warning("RLIMIT_NOFILE %d: at most %d connections", hard, room)
    return replace(limits, connection_count=min(limits.connection_count, room))


def _resident_bytes() -> int:
    """Return what this process holds in memory now (proc_pid_statm(5))."""
    statm = Path("/proc/self/statm").read_text(encoding="ascii")
    return int(statm.split()[1]) * resource.getpagesize()


def _new_loop(name: str) -> asyncio.AbstractEventLoop:
    if name == "uvloop":
        try:
            import uvloop  # noqa: PLC0415 - not on every interpreter (pyproject.toml)
        except ImportError:
            log.warning("uvloop is not installed: using asyncio's own loop")
        else:
            return uvloop.new_event_loop()
    return asyncio.new_event_loop()


async def _serve(options: argparse.Namespace, limits: Limits) -> int:
    try:
        worker = Worker(options, limits)
    except (ListenError, ChannelError, FormatError, OSError) as error:
        log.error("cannot start: %s", error)  # noqa: TRY400 - the text says it all
        return 1
    # What is loaded now lives as long as the process.
    gc.freeze()
    gc.set_threshold(5_000, 10, 1_000)
    try:
        await worker.run()
    finally:
        worker.close()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker; return the exit status."""
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    journal.configure(options.log_format, options.log_level, f"l7proxy-{options.number}")
    try:
        limits = _raise_descriptor_limit(override(Limits(), options.set))
    except LimitError as error:
        log.error("--set: %s", error)  # noqa: TRY400 - the text says it all
        return 2
    with asyncio.Runner(loop_factory=lambda: _new_loop(options.loop)) as runner:
        return runner.run(_serve(options, limits))


if __name__ == "__main__":
    sys.exit(main())
