"""The verdict worker: one process, one queue, one tracker, one snapshot.

Theory of operation. A loop over three descriptors: the queue, the channel to the agent, and the
wake-up pipe of signals. Packets come first; of each turn they get a bounded number, then the
channel, the events and the expiry get their share, so that neither a flood nor a talkative agent
starves the other. Each packet is decided, and only when a turn's verdicts have been sent, its
events are made.

The worker needs nobody: the snapshot file that it finds at start is enforced at once; without one,
or with a damaged one, it drops everything until the agent announces another. The flows of a worker
that died are taken over from the kernel's conntrack. The control socket appears only after the
queue is bound: who can connect, sees a worker that decides.

Event storms: in each `FLUSH_S` at most `EVENTS_PER_FLUSH` events are made; the rest is counted as
lost, because making an event costs more than dropping a packet, and an attacker chooses how many
packets are dropped.
"""

import argparse
import gc
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from conntrack.flow import FlowTuple
from conntrack.tracker import LINUX, STRICT, Entry, Tracker
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
    ToWorker,
    Watch,
)
from firewall.control.snapshots import SnapshotReader
from firewall.control.worker_channel import WorkerChannel, socket_name
from firewall.datapath.answers import (
    Row,
    WorkerCounts,
    connection_rows,
    conntrack_rows,
    forget_rows,
    metric_rows,
)
from firewall.datapath.choice import choose
from firewall.datapath.ctnetlink import take_over
from firewall.datapath.doubts import Cause
from firewall.datapath.events import packet_event
from firewall.datapath.injection import Injector
from firewall.datapath.inquiry import Inquiry
from firewall.datapath.kernel_flows import read_flows
from firewall.datapath.lookout import Lookout
from firewall.datapath.marks import Kind, Marks, Stage
from firewall.datapath.nfqueue import Queue, VerdictLostError
from firewall.datapath.pipeline import PREROUTING, SETTLED, Pipeline, PipelineSettings, Resets
from firewall.datapath.ruleset import passing_count
from firewall.datapath.silence import Silence
from firewall.datapath.sweep import Sweep
from firewall.datapath.troubles import Troubles
from firewall.datapath.verdict import ACCEPT, OFFLOAD, Defer, Drop, PassOn, Redirect, Report, Reset
from firewall.flows.event import Event
from firewall.policy.snapshot import SnapshotError
from firewall.policy.view import View

PACKETS_PER_TURN = 128
"""Packets between two looks at the channel: 1-2 ms at 80,000 packets/s."""

FLUSH_S = 0.05
"""Longest time that an event waits for company."""

EVENTS_PER_FLUSH = 1024
"""Events made per FLUSH_S, about 20,000/s: a tenth of a core."""

ROWS_PER_TURN = 100
"""Rows of an answer between two looks at the queue: about 1 ms."""

_END: Row = {}
"""Behind the last row of an answer."""

VERSION = version("bartizan")
"""What the agent compares with its own before it adopts a worker."""

log = logging.getLogger(__name__)


class _Question(NamedTuple):
    """An answer that is being written."""

    request: int
    rows: Iterator[Row | None]


class Worker:
    """Decides the packets of one queue until it is told to stop.

    Raises:
        QueueError: the queue cannot be bound.
        ChannelError: the control socket cannot be made.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._number: int = options.number
        self._marks = Marks(options.mark_mask)
        self._passing_count = passing_count(self._marks, options.workers)
        self._pipeline = Pipeline(
            Tracker(
                LINUX if options.profile == "linux" else STRICT,
                limit_count=options.flow_limit,
                source_limit_count=options.source_limit or None,
            ),
            None,
            PipelineSettings(
                worker_count=options.workers,
                bypass=options.bypass,
                defers=True,
                resets=Resets[options.resets.upper()],
            ),
        )
        self._troubles = Troubles()
        self._inquiry = Inquiry()
        from_proxy = self._marks.of(Kind.FROM_PROXY).value
        self._injector = Injector(from_proxy, self._inquiry, self._troubles)
        self._decide = self._pipeline.decide
        self._offloaded = self._pipeline.offloaded
        self._suspect, self._mask = self._marks.of(Kind.SUSPECT)
        self._local = self._marks.of(Kind.LOCAL).value
        self._settled = self._marks.of(Kind.DEFERRED, Stage.SETTLED).value
        self._poll = select.epoll()
        carried = self._marks.any_of(Kind.OFFLOAD)
        self._lookout = Lookout(self._offloaded, carried, self._poll, self._troubles)
        self._started_at = self._now = time.monotonic()
        self._stop_at: float | None = None
        self._paused_until = 0.0
        self._internal_count = 0
        self._sweep = Sweep(self._pipeline.tracker, self._now)
        self._silence = Silence(self._pipeline)
        self._reports: list[tuple[Report, int, bytes]] = []
        self._events: list[Event] = []
        self._event_room = EVENTS_PER_FLUSH
        self._watched_until = 0.0
        self._lost_count = 0
        self._questions: deque[_Question] = deque()
        self._snapshots = SnapshotReader()
        self._load(Path(options.snapshot))
        self._take_over()
        self._queue = Queue(
            options.queue,
            self._on_packet,
            copy_bytes=options.copy_range,
            length=options.queue_length,
            gso=not options.no_gso,
        )
        self._copy_bytes = self._queue.copy_bytes
        self._channel = WorkerChannel(
            Path(options.run_dir) / socket_name(self._number, options.bank),
            "datapath",
            self._number,
            VERSION,
            revision=self._revision,
        )

    @property
    def _generation(self) -> int:
        """The snapshot's generation, 0 = there is none."""
        return self._pipeline.view.generation if self._pipeline.view is not None else 0

    @property
    def _revision(self) -> int:
        """The snapshot's revision, 0 = there is none."""
        return self._pipeline.view.revision if self._pipeline.view is not None else 0

    def stop(self, within_s: float = 0.0) -> None:
        """Leave the loop once no packet waits, at the latest after so many seconds."""
        self._stop_at = time.monotonic() + within_s

    def run(self, wakeup: socket.socket) -> None:
        """Decide packets until `stop`.

        Args:
            wakeup: readable when a signal has come.
        """
        poll = self._poll
        numbers = [watched.fileno() for watched in (self._queue, self._channel, wakeup)]
        for number in numbers:
            poll.register(number, select.EPOLLIN)
        packets, channel, signals = numbers
        flush_at = self._now
        self._take_packets()  # of those that came during the binding the socket knows nothing more
        while self._stop_at is None or not self._finished():
            ready = [number for number, _ in poll.poll(self._patience_s())]
            self._now = now = time.monotonic()
            if packets in ready:
                self._take_packets()
            if channel in ready:
                self._listen()
            if signals in ready:
                wakeup.recv(64)
            self._lookout.turn(ready, now)
            if self._paused_until and now >= self._paused_until:
                self._go_on()
            if self._questions:
                self._answer()
            if now >= flush_at:
                self._flush()
                flush_at = now + FLUSH_S
            if now >= min(self._silence.due_at, self._sweep.due_at):
                self._keep_up()
        self._flush()

    def close(self) -> None:
        """Give up the queue and the socket."""
        self._channel.close()
        self._queue.close()
        self._injector.close()
        self._inquiry.close()

    def _patience_s(self) -> float:
        """Return how long the loop may sleep."""
        if self._questions:
            return 0.0
        pause_s = max(0.0, min(self._sweep.pause_s, self._silence.due_at - self._now))
        return min(FLUSH_S, pause_s) if self._events or self._lost_count else pause_s

    def _finished(self) -> bool:
        """Say whether to stop now: it was asked for, and nothing waits or the time is over."""
        if self._stop_at is None:
            return False
        return self._now >= self._stop_at or not select.select([self._queue], [], [], 0)[0]

    # --- packets ------------------------------------------------------------------------------

    def _take_packets(self) -> None:
        """Handle what waits, within this turn's bound."""
        try:
            self._queue.receive(PACKETS_PER_TURN)
        except VerdictLostError:
            raise
        except Exception as error:  # noqa: BLE001  a bug of ours must not end the worker
            self._internal_count += 1  # the queue has dropped the packet; the next may be fine
            count = f"({self._internal_count} in all)"
            self._troubles.complain(f"packet dropped: internal error {count}", error)
        if self._pipeline.doubts:
            self._settle()
        if self._reports:
            self._tell()

    def _on_packet(  # noqa: PLR0917 -- once per packet: keywords cost
        self, packet: int, hook: int, indev: int, physindev: int, mark: int, payload: bytes
    ) -> None:
        """Decide one packet, send the verdict, and keep what is to be told of it."""
        complete = len(payload) < self._copy_bytes
        marked = mark & self._mask
        place = physindev or indev
        if marked == self._local and hook == PREROUTING:  # of a socket of the proxy
            verdict, report = self._pipeline.admit(payload, place, complete=complete)
        else:
            if marked == self._settled and hook == PREROUTING:
                hook = SETTLED
            suspect = marked == self._suspect
            verdict, report = self._decide(payload, place, hook, self._now, complete, suspect)
        if verdict is ACCEPT:
            if marked and self._marks.kind(mark) is Kind.PASS_ON:
                self._queue.accept_marked(packet, self._marks.put(mark, Kind.NONE))
            else:
                self._queue.accept(packet)
        elif verdict is OFFLOAD:
            self._queue.repeat(packet, self._marks.put(mark, Kind.OFFLOAD, self._generation))
        elif isinstance(verdict, Drop):
            self._queue.drop(packet)
        elif isinstance(verdict, Redirect) and physindev:
            report = self._pipeline.beyond_proxy(report).report
            self._queue.drop(packet)
        elif isinstance(verdict, Redirect):
            self._queue.repeat(packet, self._marks.put(mark, Kind.TO_PROXY))
        elif isinstance(verdict, Reset):
            self._queue.drop(packet)
            self._injector.send(verdict.segments)
        elif isinstance(verdict, Defer):
            self._queue.repeat(packet, self._marks.put(mark, Kind.DEFERRED))
        elif isinstance(verdict, PassOn) and not self._pass_on(packet, mark, verdict):
            report = None
        if report is not None:
            self._reports.append((report, time.time_ns(), payload))

    def _pass_on(self, packet: int, mark: int, verdict: PassOn) -> bool:
        """Send a packet to the next worker that has not seen it; say whether it ended here."""
        passed = self._marks.kind(mark) is Kind.PASS_ON
        following = self._marks.number(mark) + 1 if passed else 0
        if following == self._number:
            following += 1
        if following < self._passing_count:
            self._queue.repeat(packet, self._marks.put(mark, Kind.PASS_ON, following))
            return False
        if isinstance(verdict.otherwise, Drop):
            self._queue.drop(packet)
            self._pipeline.counts.dropped[verdict.otherwise.reason] += 1
        else:
            self._queue.accept_marked(packet, self._marks.put(mark, Kind.NONE))
        return True

    def _tell(self) -> None:
        """Make events of what this turn reported, for as many as there is room and a reader."""
        reports, self._reports = self._reports, []
        view = self._pipeline.view
        room = self._event_room if view is not None and self._channel.connected else 0
        self._lost_count += max(0, len(reports) - room)
        self._event_room -= min(room, len(reports))
        if view is None:
            return
        watched = self._now < self._watched_until
        for report, time_ns, payload in reports[:room]:
            shown = payload if watched else b""
            try:
                self._events.append(packet_event(report, view, time_ns, shown))
            except Exception as error:  # noqa: BLE001  a bug of ours must not end the worker
                self._lost_count += 1
                self._troubles.complain("event lost: internal error", error)

    # --- the agent ----------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send the events that have gathered; what finds no room is counted by the channel."""
        if self._events or self._lost_count:
            self._channel.send(Events(tuple(self._events), self._lost_count))
            self._events.clear()
            self._lost_count = 0
        self._event_room = EVENTS_PER_FLUSH

    def _listen(self) -> None:
        """Do what the agent says."""
        for message in self._channel.receive():
            try:
                self._obey(message)
            except Exception as error:  # noqa: BLE001  a bug of ours must not end the worker
                self._troubles.failed(f"{type(message).__name__} from the agent", error)

    def _obey(self, message: ToWorker) -> None:
        """Do what one message says."""
        match message:
            case Announce():
                self._announced(message)
            case Ask():
                self._asked(message)
            case Forget():
                self._questions.append(_Question(message.request, self._forget_rows(message)))
            case Pause():
                self._pause(message.for_s)
            case Watch():
                self._watched_until = self._now + message.for_s
            case Drain():
                self.stop(message.deadline_s)
            case Settled():
                pass  # for proxy workers
            case Lend() | Instruct():
                pass  # for workers that accept connections

    def _announced(self, message: Announce) -> None:
        """Go to the announced snapshot and say so, or say why not."""
        error = self._load(Path(message.path))
        if error:
            self._channel.send(Acknowledged(message.revision, error))
        else:
            self._flush()  # what was decided before is told before
            self._channel.send(Acknowledged(self._revision))

    def _load(self, path: Path) -> str:
        """Enforce the snapshot at `path`; "" or why the one before stays."""
        try:
            view = View(self._snapshots.load(path), self._pipeline.view)
        except FileNotFoundError:
            error = "there is no snapshot yet"
        except (OSError, SnapshotError) as problem:
            error = str(problem)
        except Exception as problem:  # noqa: BLE001  the next worker would meet it as well
            self._troubles.failed("the snapshot", problem)
            error = f"internal error: {problem!r}"
        else:
            generation, self._pipeline.view = self._generation, view
            if view.generation != generation:
                self._silence.begin(self._now)
            log.info("snapshot enforced: revision %d", view.revision)
            return ""
        held = f"revision {self._revision} stays" if self._revision else "every packet is dropped"
        log.warning("%s: %s; %s", path, error, held)
        return error

    def _take_over(self) -> None:
        """Know the flows of an earlier worker; the present policy judges each of them anew."""
        view, tracker = self._pipeline.view, self._pipeline.tracker
        if view is None:
            return  # nobody is managed yet, so no flow can be anybody's
        count = 0
        try:
            for flow in read_flows():
                ends = flow.original.source, flow.original.destination
                if not any(view.endpoint_at(end) is not None for end in ends):
                    continue
                entry = take_over(flow, tracker, self._now)
                count += entry is not None
                if entry is not None and self._marks.kind(flow.mark) is Kind.OFFLOAD:
                    self._offloaded.give(entry, self._now)
        except OSError as error:
            log.warning("the kernel's flows cannot be read: %s; they end here", error)
        log.info("flows taken over from the kernel: %d", count)

    def _pause(self, for_s: float) -> None:
        """Let packets wait; 0 = go on now."""
        if for_s > 0:
            if not self._paused_until:
                self._poll.unregister(self._queue.fileno())
            self._paused_until = self._now + for_s
        elif self._paused_until:
            self._go_on()

    def _go_on(self) -> None:
        """Take over what an earlier worker has confirmed until now, then read the queue again."""
        self._paused_until = 0.0
        tracker = self._pipeline.tracker
        for entry in tracker.entries():
            self._offloaded.take_back(entry)
            tracker.remove(entry)
        self._take_over()
        self._poll.register(self._queue.fileno(), select.EPOLLIN)

    def _asked(self, message: Ask) -> None:
        """Begin to answer; what was decided before is told before."""
        self._flush()
        tracker, counts = self._pipeline.tracker, self._pipeline.counts
        rows: Iterator[Row | None]
        match message.what:
            case "conntrack":
                rows = self._conntrack_rows()
            case "connections":
                rows = connection_rows(tracker)
            case "metrics":
                rows = metric_rows(tracker, counts, self._counts())
            case "status":
                rows = iter([self._status()])
            case _:
                rows = iter([])
        self._questions.append(_Question(message.request, rows))

    def _conntrack_rows(self) -> Iterator[Row | None]:
        """Write the flows down, after a look at what the kernel has carried meanwhile."""
        yield from self._lookout.fresh()
        yield from conntrack_rows(self._pipeline.tracker, self._now, self._number)

    def _forget_rows(self, message: Forget) -> Iterator[Row | None]:
        """Forget flows, and say which."""
        choice = choose(message.sources, message.destinations)
        return forget_rows(self._pipeline.tracker, self._offloaded, choice, self._number)

    def _answer(self) -> None:
        """Write some more rows of the oldest answer."""
        question = self._questions[0]
        rows: list[Row] = []
        ended = False
        for _ in range(ROWS_PER_TURN):
            try:
                row = next(question.rows, _END)
            except Exception as error:  # noqa: BLE001  a bug of ours must not end the worker
                self._troubles.failed("an answer", error)
                row = _END
            if row is None:
                break
            if row is _END:
                ended = True
                break
            rows.append(row)
        if ended:
            self._questions.popleft()
        if rows or ended:
            self._channel.send(Answer(question.request, tuple(rows), ended))

    def _counts(self) -> WorkerCounts:
        return WorkerCounts(
            internal_count=self._internal_count,
            error_count=self._troubles.error_count,
            refused_count=self._queue.refused_count,
            lost_event_count=self._channel.lost_total_count + self._lost_count,
            lag_s=self._sweep.lag_s,
        )

    def _status(self) -> Row:
        """Return what this worker is and does."""
        return {
            "kind": "datapath",
            "number": self._number,
            "pid": os.getpid(),
            "version": VERSION,
            "uptime_s": time.monotonic() - self._started_at,
            "revision": self._revision,
            "generation": self._generation,
            "bypass": self._pipeline.settings.bypass,
            "offloaded_count": len(self._offloaded),
            "queue": self._queue.number,
            "copy_bytes": self._queue.copy_bytes,
            "gso": self._queue.gso,
            "buffer_bytes": self._queue.buffer_bytes,
            "flow_count": len(self._pipeline.tracker),
            "internal_count": self._internal_count,
            "error_count": self._troubles.error_count,
            "refused_count": self._queue.refused_count,
        }

    # --- upkeep -------------------------------------------------------------------------------

    def _keep_up(self) -> None:
        """Do what is due; a bug of ours in it must not end the worker."""
        now = self._now
        try:
            if now >= self._silence.due_at:
                self._injector.send(self._silence.round(now))
            if now >= self._sweep.due_at and self._sweep.round(now):
                # Python's collector counts what is made less what is freed: while many flows leave,
                # new ones would gather, and be looked at all at once afterwards.
                gc.collect(1)
        except Exception as error:  # noqa: BLE001  the packets need the worker more than this
            self._troubles.failed("upkeep", error)

    def _settle(self) -> None:
        """Ask the kernel what has become of flows of which it alone has seen enough."""
        doubts = self._pipeline.doubts
        for doubt in doubts.take():
            try:
                if doubt.cause is Cause.QUOTED:
                    self._bring_back(doubt.entry)
                else:
                    doubts.settle(doubt, self._state_of(doubt.entry.original), self._now)
            except Exception as error:  # noqa: BLE001  a bug of ours must not end the worker
                self._troubles.failed("a flow that the kernel was asked about", error)

    def _state_of(self, flow: FlowTuple) -> int | None:
        """Return the kernel's state of a TCP flow; None if there is none, or it does not say."""
        try:
            return self._inquiry.state(flow)
        except OSError as error:
            self._troubles.complain("the kernel cannot be asked about a flow", error)
            return None

    def _bring_back(self, entry: Entry) -> None:
        """Have the packets of a flow that the kernel carries come here again."""
        try:
            known = entry.offloaded and self._inquiry.clear_mark(entry.original, self._mask)
        except OSError as error:
            self._troubles.complain("a flow cannot be taken back from the kernel", error)
        else:
            if known:
                self._offloaded.keep(entry)
