"""From the workers' events to everybody who wants to see flows.

Each event becomes one record (`firewall.flows.record`), which is counted, kept in the ring, handed
to followers and, if asked for, exported. Followers read the ring at their own speed: a slow one
loses flows and is told how many; nobody slows the others or the workers.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, NamedTuple

from firewall.agent.config import FlowSettings
from firewall.agent.engine import Engine
from firewall.agent.exporter import Exporter
from firewall.agent.supervisor import Worker
from firewall.control.messages import Events
from firewall.flows.filters import Filter, FilterError, Term
from firewall.flows.flow import NS_PER_S, parse_time, to_json
from firewall.flows.metrics import FlowMetrics
from firewall.flows.record import EndpointName, build
from firewall.flows.ring import QUEUE_SOURCE, Item, Ring
from firewall.identities.labels import LabelSet

DEFAULT_LAST = 20
"""Flows shown if a request says neither how many nor since when (Hubble's default)."""

EXPORT_INTERVAL_S = 0.5
"""How long an exported line waits for company."""

EXPORT_MAX_LINES = 20_000
"""Lines that may wait for the disk; further ones are counted as lost."""

IDLE_S = 5.0
"""After this time without a flow a follower is looked after."""

FOLLOW_BATCH = 500
"""Flows per write to a follower."""

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")


class Query(NamedTuple):
    """What a reader of flows wants; times are wall-clock nanoseconds."""

    matches: Filter | None
    first: int | None
    last: int | None
    since_ns: int | None
    until_ns: int | None
    follow: bool


class NodeNames:
    """Names by the engine's present knowledge (`firewall.flows.record.Names`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._labels: dict[int, tuple[LabelSet, tuple[str, ...]]] = {}

    @property
    def node_name(self) -> str:
        """The name of this node."""
        return self._engine.config.node

    def labels(self, identity: int) -> tuple[str, ...]:
        """Return the labels of an identity, sorted."""
        found = self._engine.registry.lookup(identity)
        if found is None:
            return ()
        known = self._labels.get(identity)
        if known is None or known[0] is not found:
            known = self._labels[identity] = (found, found.strings())
        return known[1]

    def endpoint(self, number: int) -> EndpointName | None:
        """Return what an endpoint is called."""
        member = self._engine.roster.by_id(number)
        if member is None:
            return None
        endpoint = member.endpoint
        return EndpointName(endpoint.name, endpoint.namespace, endpoint.labels.strings())

    def dns_names(self, _: bytes) -> tuple[str, ...]:
        """Return no names: nothing observes DNS yet."""
        return ()


class Collector:
    """The flows of this node.

    Args:
        engine: knows the names.
        settings: size of the ring, export.
    """

    def __init__(self, engine: Engine, settings: FlowSettings) -> None:
        self._names = NodeNames(engine)
        self._ring = Ring(settings.ring, engine.config.node)
        self._metrics = FlowMetrics()
        self._followers: set[asyncio.Event] = set()
        self._exporter: Exporter | None = None
        self._lines: list[bytes] = []
        if settings.export.path is not None:
            export = settings.export
            self._exporter = Exporter(settings.export.path, export.max_bytes, export.backups)

    def take(self, _: Worker, message: Events) -> None:
        """Take a batch of events."""
        now = time.monotonic()
        if message.lost_count:
            self._ring.append_lost(message.lost_count, time.time_ns())
            self._metrics.lost(QUEUE_SOURCE, message.lost_count)
        for event in message.events:
            flow = build(event, self._names)
            self._ring.append(flow, now)
            self._metrics.observe(flow)
            if self._exporter is not None:
                self._lines.append(to_json(flow) + b"\n")
        if self._exporter is not None and len(self._lines) > EXPORT_MAX_LINES:
            self._exporter.lost_count += len(self._lines) - EXPORT_MAX_LINES
            del self._lines[:-EXPORT_MAX_LINES]
        self.wake()

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

    # --- readers ------------------------------------------------------------------------------

    def query(self, keys: Iterable[str], values: Callable[[str], list[str]]) -> Query:
        """Read the parameters of a request.

        `first`, `last`, `since`, `until`, `all`, `follow` choose the range; every other key is a
        filter flag of `hubble observe`, `not-` before it negates it.

        Raises:
            FilterError: a key or value that cannot be.
        """
        now_ns = time.time_ns()
        terms: list[Term] = []
        chosen: dict[str, str] = {}
        for key in keys:
            if key in ("first", "last", "since", "until", "all", "follow"):
                chosen[key] = values(key)[-1]
                continue
            flag = key.removeprefix("not-")
            terms += [Term(flag, value, flag != key) for value in values(key)]
        follow = chosen.get("follow", "") not in ("", "0", "false")
        whole = chosen.get("all", "") not in ("", "0", "false")
        first, last = _count(chosen, "first"), _count(chosen, "last")
        if first is not None and (last is not None or follow):
            raise FilterError("first", str(first), "excludes last and follow")
        since_ns, until_ns = _time(chosen, "since", now_ns), _time(chosen, "until", now_ns)
        if first is None and last is None and not whole and since_ns is None:
            last = 0 if follow else DEFAULT_LAST
        return Query(Filter(terms) if terms else None, first, last, since_ns, until_ns, follow)

    async def stream(self, query: Query, ending: asyncio.Event) -> AsyncIterator[bytes]:
        """Yield lines: what the ring holds, then, if followed, what comes, until `ending`.

        Nothing (b"") is yielded from time to time, so that a reader who left is noticed.
        """
        reader = self._ring.reader(query.matches)
        chosen = self._ring.select(
            query.matches,
            first=query.first,
            last=query.last,
            since_ns=query.since_ns,
            until_ns=query.until_ns,
        )
        for start in range(0, len(chosen), FOLLOW_BATCH):
            yield _lines(chosen[start : start + FOLLOW_BATCH])
        if not query.follow:
            return
        more = asyncio.Event()
        self._followers.add(more)
        try:
            while not ending.is_set():
                more.clear()
                while reader.behind_count:
                    yield _lines(reader.take(FOLLOW_BATCH))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(more.wait(), IDLE_S)
                yield b""
        finally:
            self._followers.discard(more)

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
        if self._exporter is not None and self._lines:
            lines, self._lines = self._lines, []
            await asyncio.to_thread(self._exporter.append, lines)


def _lines(items: Iterable[Item]) -> bytes:
    return b"".join(to_json(item) + b"\n" for item in items)


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
    found = _DURATION.fullmatch(text)
    if text and found:
        hours, minutes, seconds = (float(part or 0) for part in found.groups())
        return now_ns - int((hours * 3600 + minutes * 60 + seconds) * NS_PER_S)
    try:
        return parse_time(text)
    except ValueError as error:
        message = f"{error}; write RFC 3339, or how long ago: 1h30m, 45s"
        raise FilterError(key, text, message) from error
