"""From the workers' events to everybody who wants to see flows.

Each event is noted with the names of its moment (`firewall.flows.note`), counted, and kept in the
ring; the record that people see is made when somebody reads it, follows it or has it exported.
Followers read the ring at their own speed: a slow one loses flows and is told how many; nobody
slows the others or the workers.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, NamedTuple

from firewall.agent.config import FlowSettings
from firewall.agent.engine import Engine
from firewall.agent.exporter import Exporter
from firewall.agent.monitor import Monitor
from firewall.agent.worker import Worker
from firewall.control.messages import Events
from firewall.flows.filters import Filter, FilterError, Term
from firewall.flows.flow import NS_PER_S, Flow, parse_time, to_json
from firewall.flows.metrics import FlowMetrics
from firewall.flows.note import Note, Noter
from firewall.flows.record import EndpointName
from firewall.flows.ring import QUEUE_SOURCE, Item, Ring
from firewall.identities.labels import LabelSet

log = logging.getLogger(__name__)

DEFAULT_LAST = 20
"""Flows shown if a request says neither how many nor since when (Hubble's default)."""

EXPORT_INTERVAL_S = 0.5
"""How long an exported flow waits for company."""

EXPORT_MAX_COUNT = 20_000
"""Flows that may wait for the disk; further ones are counted as lost."""

IDLE_S = 5.0
"""After this time without a flow a follower is looked after."""

EVENTS_PER_TURN = 500
"""Events noted between two turns of the event loop: about 3 ms."""

RECORDS_PER_TURN = 100
"""Records made between two turns of the event loop, or for one write to a reader: about 3 ms."""

CATCH_UP_S = 1.0
"""How long a worker may take to tell what it has decided; it gathers events for less."""

LABELS_MAX_COUNT = 65_536
"""Identities whose labels are remembered as text: all of a cluster. A full table is forgotten
whole, because names that come and go take ever new numbers."""

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_HOURS_MINUTES = re.compile(r"\d+h\d+")  # Hubble's short form: 1h43


class Query(NamedTuple):
    """What a reader of flows wants; times are wall-clock nanoseconds."""

    matches: Filter | None
    first: int | None
    last: int | None
    since_ns: int | None
    until_ns: int | None
    follow: bool
    why: bool = False


class Allowance:
    """How many flows may still be made now: `per_second`, and twice that in a burst."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._left = 2.0 * per_second
        self._at = 0.0

    def take(self, count: int, now: float) -> int:
        """Return how many of `count` may be made; `now` is monotonic seconds."""
        if self._at:
            refilled = self._left + (now - self._at) * self._per_second
            self._left = min(refilled, 2.0 * self._per_second)
        self._at = now
        granted = min(count, int(self._left))
        self._left -= granted
        return granted


class NodeNames:
    """Names by the engine's present knowledge (`firewall.flows.record.Names`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._labels: dict[int, tuple[LabelSet, tuple[str, ...]]] = {}
        self._endpoints: dict[int, tuple[LabelSet, EndpointName]] = {}

    @property
    def node_name(self) -> str:
        """The name of this node."""
        return self._engine.config.node

    def labels(self, identity: int) -> tuple[str, ...]:
        """Return the labels of an identity, sorted; the same object until they change."""
        found = self._engine.registry.lookup(identity)
        if found is None:
            return ()
        known = self._labels.get(identity)
        if known is None or known[0] is not found:
            if len(self._labels) >= LABELS_MAX_COUNT:
                self._labels.clear()
            known = self._labels[identity] = (found, found.strings())
        return known[1]

    def endpoint(self, number: int, address: bytes) -> EndpointName | None:
        """Return what an endpoint is called; the same object until that changes."""
        if not number:
            return self._engine.addresses.neighbours.name(address)
        member = self._engine.roster.by_id(number)
        if member is None:
            self._endpoints.pop(number, None)
            return None
        endpoint = member.endpoint
        labels, known = self._endpoints.get(number, (None, None))
        called = endpoint.name, endpoint.namespace
        if known is None or labels is not endpoint.labels or known[:2] != called:
            known = EndpointName(*called, endpoint.labels.strings())
            self._endpoints[number] = endpoint.labels, known
        return known

    def dns_names(self, address: bytes) -> tuple[str, ...]:
        """Return the names that DNS answered with this address."""
        return self._engine.names.names(address)


class Collector:
    """The flows of this node.

    Args:
        engine: knows the names.
        settings: size of the ring, export.

    Attributes:
        annotate: adds the whole explanation to a flow, for readers that ask for it.
        monitor: hands the packets themselves to whoever watches.
    """

    def __init__(self, engine: Engine, settings: FlowSettings) -> None:
        self._noter = Noter(NodeNames(engine))
        self._ring = Ring(settings.ring, engine.config.node)
        self._metrics = FlowMetrics()
        self._allowance = Allowance(settings.per_second)
        self._followers: set[asyncio.Event] = set()
        self._exporter: Exporter | None = None
        self._unwritten: list[Note] = []
        self.monitor = Monitor(engine.workers)
        self.annotate: Callable[[Flow], Flow] | None = None
        if settings.export.path is not None:
            export = settings.export
            self._exporter = Exporter(settings.export.path, export.max_bytes, export.backups)

    async def take(self, _: Worker, message: Events) -> None:
        """Take a batch of events; what exceeds the rate is counted, not shown.

        Now and then everybody else gets a turn, or a flood of packets would silence the API.
        """
        taken = message.events[: self._allowance.take(len(message.events), time.monotonic())]
        for start in range(0, len(taken), EVENTS_PER_TURN):
            for event in taken[start : start + EVENTS_PER_TURN]:
                try:
                    self._add(self._noter.note(event))
                except Exception:
                    log.exception("event without a record: %r", event)
            self.wake()
            await asyncio.sleep(0)
        lost_count = message.lost_count + len(message.events) - len(taken)
        if lost_count:
            self.monitor.lost(lost_count)
            self._ring.append_lost(lost_count, time.time_ns())
            self._metrics.lost(QUEUE_SOURCE, lost_count)
            self.wake()

    def _add(self, note: Note) -> None:
        """Count, keep and export one flow."""
        self._ring.append(note, time.monotonic())
        self._metrics.observe(note)
        self.monitor.saw(note)
        if self._exporter is None:
            return
        self._unwritten.append(note)
        if len(self._unwritten) > EXPORT_MAX_COUNT:
            self._exporter.lost_count += len(self._unwritten) // 2
            del self._unwritten[: len(self._unwritten) // 2]

    def wake(self) -> None:
        """Have every follower look again."""
        for follower in self._followers:
            follower.set()

    def counts(self) -> dict[str, Any]:
        """Return how many flows there are and were."""
        status = self._ring.status(time.monotonic())
        exporter = self._exporter
        return {
            "seen": status.seen_count,
            "max": status.max_count,
            "current": status.current_count,
            "per_second": round(status.per_second, 2),
            "lost": status.lost_count,
            "followers": len(self._followers),
            "export": {
                "path": str(exporter.path) if exporter is not None else "",
                "lost": exporter.lost_count if exporter is not None else 0,
                "error": exporter.error if exporter is not None else "",
            },
        }

    def metrics(self) -> str:
        """Return the flow metrics in Prometheus' text form."""
        return self._metrics.text().decode()

    async def catch_up(self) -> None:
        """Wait for what the workers have decided until now, and would tell a moment later."""
        await self.monitor.answered(CATCH_UP_S)

    def notes(self) -> list[Note]:
        """Return the flows that are kept, as they were noted, oldest first."""
        return sorted(self._ring.notes(), key=lambda note: note.event.time_ns)

    # --- readers ------------------------------------------------------------------------------

    def query(self, keys: Iterable[str], values: Callable[[str], list[str]]) -> Query:
        """Read the parameters of a request.

        `first`, `last`, `since`, `until`, `all`, `follow` choose the range, `why` adds
        explanations; every other key is a filter flag of `hubble observe`, `not-` before it
        negates it.

        Raises:
            FilterError: a key or value that cannot be.
        """
        now_ns = time.time_ns()
        terms: list[Term] = []
        chosen: dict[str, str] = {}
        for key in keys:
            if key in ("first", "last", "since", "until", "all", "follow", "why"):
                chosen[key] = values(key)[-1]
                continue
            flag = key.removeprefix("not-")
            terms += [Term(flag, value, flag != key) for value in values(key)]
        follow, whole, why = (
            chosen.get(key, "") not in ("", "0", "false") for key in ("follow", "all", "why")
        )
        first, last = _count(chosen, "first"), _count(chosen, "last")
        if first is not None and (last is not None or follow):
            raise FilterError("first", str(first), "excludes last and follow")
        since_ns, until_ns = _time(chosen, "since", now_ns), _time(chosen, "until", now_ns)
        if first is None and last is None and not whole and since_ns is None:
            last = 0 if follow else DEFAULT_LAST
        matches = Filter(terms) if terms else None
        return Query(matches, first, last, since_ns, until_ns, follow, why)

    async def stream(self, query: Query, ending: asyncio.Event) -> AsyncGenerator[bytes, None]:
        """Yield lines: what the ring holds, then, if followed, what comes, until `ending`.

        Nothing (b"") is yielded from time to time, so that a reader who left is noticed.
        """
        if query.last != 0:
            await self.catch_up()
        if query.matches is not None:
            await self._make_records()
        reader = self._ring.reader(query.matches)
        chosen = self._ring.select(
            query.matches,
            first=query.first,
            last=query.last,
            since_ns=query.since_ns,
            until_ns=query.until_ns,
        )
        for start in range(0, len(chosen), RECORDS_PER_TURN):
            yield self._written(chosen[start : start + RECORDS_PER_TURN], why=query.why)
            await asyncio.sleep(0)
        if not query.follow:
            return
        more = asyncio.Event()
        self._followers.add(more)
        try:
            while not ending.is_set():
                more.clear()
                while reader.behind_count:
                    yield self._written(reader.take(RECORDS_PER_TURN), why=query.why)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(more.wait(), IDLE_S)
                yield b""
        finally:
            self._followers.discard(more)

    async def _make_records(self) -> None:
        """Make the records that a filter will look at, with turns for everybody else between."""
        waiting = [note for note in self._ring.notes() if not note.written]
        for count, note in enumerate(waiting, 1):
            _ = note.flow
            if count % RECORDS_PER_TURN == 0:
                await asyncio.sleep(0)

    def _written(self, items: Iterable[Item], *, why: bool) -> bytes:
        """Return lines, with explanations if they are asked for."""
        if why and self.annotate is not None:
            annotate = self.annotate
            items = (annotate(item) if isinstance(item, Flow) else item for item in items)
        return b"".join(to_json(item) + b"\n" for item in items)

    # --- export -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Export, until cancelled; without an export, just wait."""
        while True:
            await asyncio.sleep(EXPORT_INTERVAL_S)
            await self._export()

    async def close(self) -> None:
        """Export what still waits."""
        await self._export()

    async def _export(self) -> None:
        if self._exporter is not None and self._unwritten:
            notes, self._unwritten = self._unwritten, []
            await asyncio.to_thread(_append, self._exporter, notes)


def _append(exporter: Exporter, notes: list[Note]) -> None:
    """Write flows to the disk, one per line."""
    exporter.append([to_json(note.flow) + b"\n" for note in notes])


def _count(chosen: dict[str, str], key: str) -> int | None:
    """Read a number of flows."""
    text = chosen.get(key)
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal():
        raise FilterError(key, text, "expected a number of flows")
    return int(text)


def _time(chosen: dict[str, str], key: str, now_ns: int) -> int | None:
    """Read a time: RFC 3339, or how long ago (`1h30m`, `45s`)."""
    text = chosen.get(key)
    if text is None:
        return None
    found = _DURATION.fullmatch(f"{text}m" if _HOURS_MINUTES.fullmatch(text) else text)
    if text and found:
        hours, minutes, seconds = (float(part or 0) for part in found.groups())
        return now_ns - int((hours * 3600 + minutes * 60 + seconds) * NS_PER_S)
    try:
        return parse_time(text)
    except ValueError as error:
        message = f"{error}; write RFC 3339, or how long ago: 1h30m, 45s"
        raise FilterError(key, text, message) from error
