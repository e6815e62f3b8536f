"""What a worker answers when the agent asks: tracked flows, counters, its own state. Pure.

A table may hold a quarter of a million flows, and packets must not wait for all of them to be
written down. So an answer is a generator that the worker advances between packets; it yields None
where it has used up about a millisecond without having a row.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from conntrack.address import format_address
from conntrack.flow import FlowTuple, protocol_name
from conntrack.tracker import Entry, Tracker
from firewall.datapath.choice import Choice
from firewall.datapath.offload import Offloaded
from firewall.datapath.pipeline import Counts
from firewall.datapath.ruling import Ruling
from firewall.datapath.verdict import Accept, Drop, Redirect

Row = dict[str, object]

_ENTRIES_PER_STEP = 2000

_ENDED = frozenset({"TIME_WAIT", "CLOSE"})
"""States in which a flow is only remembered."""


class WorkerCounts(NamedTuple):
    """What the process around the pipeline counts.

    Attributes:
        internal_count: packets dropped because the pipeline raised: bugs.
        error_count: bugs that cost no packet: in upkeep, or in what the agent asked for.
        refused_count: verdicts that the kernel refused, since it had dropped the packet before.
        lost_event_count: events that no agent has seen.
        lag_s: the longest that an entry lay dead before it was removed, lately; seconds.
    """

    internal_count: int
    error_count: int
    refused_count: int
    lost_event_count: int
    lag_s: float


def conntrack_rows(tracker: Tracker, now: float, worker: int) -> Iterator[Row | None]:
    """Yield one row per tracked flow (see `_flow_row` for its fields)."""
    for entry in tracker.entries():
        yield _flow_row(entry, now, worker)


def forget_rows(
    tracker: Tracker, offloaded: Offloaded, choice: Choice, worker: int
) -> Iterator[Row | None]:
    """Take the flows of a choice out of the table; yield one row for each.

    What follows of a forgotten flow is the packet of a stranger: a TCP connection has to be opened
    anew. `original` has the fields of `FlowTuple`.
    """
    for index, entry in enumerate(tracker.entries()):
        if choice.includes(entry.original):
            carried = entry.offloaded
            offloaded.take_back(entry)
            tracker.remove(entry)
            yield {"worker": worker, "original": tuple(entry.original), "offloaded": carried}
        if index % _ENTRIES_PER_STEP == _ENTRIES_PER_STEP - 1:
            yield None


def connection_rows(tracker: Tracker) -> Iterator[Row | None]:
    """Yield `{"source", "destination"}`, addresses as text, of every pair that has a live flow."""
    seen: set[tuple[bytes, bytes]] = set()
    for index, entry in enumerate(tracker.entries()):
        if index % _ENTRIES_PER_STEP == _ENTRIES_PER_STEP - 1:
            yield None
        if entry.serial < 0 or entry.state_name in _ENDED:
            continue
        pair = entry.original.source, entry.original.destination
        if pair not in seen:
            seen.add(pair)
            source, destination = map(format_address, pair)
            yield {"source": source, "destination": destination}


def metric_rows(tracker: Tracker, counts: Counts, process: WorkerCounts) -> Iterator[Row | None]:
    """Yield `{"name", "labels", "value"}` for each counter or gauge, Cilium's names without prefix.

    Counters end in `_total`; everything else is a gauge.
    """
    yield _metric("forward_count_total", counts.forwarded_count)
    yield _metric("reset_count_total", counts.reset_count)
    yield _metric("forward_bytes_total", counts.forwarded_bytes)
    yield _metric("proxy_redirected_count_total", counts.redirected_count)
    yield _metric("passed_on_count_total", counts.passed_on_count)
    yield _metric("policy_ruled_anew_count_total", counts.ruled_anew_count)
    for reason, count in sorted(counts.dropped.items()):
        yield _metric("drop_count_total", count, reason=reason.name)
    yield _metric("drop_count_total", process.internal_count, reason="INTERNAL")
    yield _metric("internal_errors_total", process.error_count)
    yield _metric("verdict_refused_count_total", process.refused_count)
    yield _metric("lost_events_total", process.lost_event_count, source="worker")
    yield _metric("datapath_conntrack_inserted_total", tracker.counters.inserted)
    yield _metric("datapath_conntrack_expired_total", tracker.counters.expired)
    yield _metric("datapath_conntrack_evicted_total", tracker.counters.evicted)
    yield _metric("datapath_conntrack_refused_total", tracker.counters.refused)
    yield _metric("datapath_conntrack_expiry_lag_seconds", round(process.lag_s, 3))
    states: Counter[tuple[str, str]] = Counter()
    offloaded_count = 0
    for index, entry in enumerate(tracker.entries()):
        offloaded_count += entry.offloaded
        states[protocol_name(entry.protocol), entry.state_name or _liveliness(entry)] += 1
        if index % _ENTRIES_PER_STEP == _ENTRIES_PER_STEP - 1:
            yield None
    for (protocol, state), count in sorted(states.items()):
        yield _metric("datapath_conntrack_entries", count, protocol=protocol, state=state)
    yield _metric("datapath_conntrack_offloaded", offloaded_count)


def _metric(name: str, value: float, **labels: str) -> Row:
    return {"name": name, "labels": labels, "value": value}


def _flow_row(entry: Entry, now: float, worker: int) -> Row:
    """Return a flow as a row: ends as text, `expires_s` seconds, pairs are (original, reply)."""
    original = entry.original
    source, destination = _ends(original)
    row: Row = {
        "worker": worker,
        "protocol": protocol_name(original.protocol),
        "source": source,
        "destination": destination,
        "source_address": format_address(original.source),
        "destination_address": format_address(original.destination),
        "source_port": original.source_port,
        "destination_port": original.destination_port,
        "state": _state(entry),
        "flags": _flags(entry),
        "age_s": max(0.0, now - entry.created_at),
        "expires_s": max(0.0, entry.expires_at - now),
        "packets": entry.packets,
        "bytes": entry.bytes,
        "revision": entry.revision,
    }
    if isinstance(entry.decision, Ruling):
        row["verdict"] = _verdict_name(entry.decision.verdict)
        row["source_identity"] = entry.decision.decision.source.identity
        row["destination_identity"] = entry.decision.decision.destination.identity
    return row


def _ends(flow: FlowTuple) -> tuple[str, str]:
    """Return `address:port` of both ends; without ports, the address alone."""
    source, destination = format_address(flow.source), format_address(flow.destination)
    if not flow.source_port and not flow.destination_port:
        return source, destination
    if len(flow.source) == 16:
        source, destination = f"[{source}]", f"[{destination}]"
    return f"{source}:{flow.source_port}", f"{destination}:{flow.destination_port}"


def _is_proxied(entry: Entry) -> bool:
    return isinstance(entry.decision, Ruling) and isinstance(entry.decision.verdict, Redirect)


def _state(entry: Entry) -> str:
    """Name the state; what follows the first segment of a proxied flow goes past the worker."""
    return "PROXIED" if _is_proxied(entry) else entry.state_name or _liveliness(entry)


def _flags(entry: Entry) -> list[str]:
    flags = []
    proxied = _is_proxied(entry)
    if entry.assured:
        flags.append("ASSURED")
    elif not entry.seen_reply and not proxied:
        flags.append("UNREPLIED")
    if entry.offloaded:
        flags.append("OFFLOAD")
    if proxied:
        flags.append("PROXY")
    return flags


def _liveliness(entry: Entry) -> str:
    """Return what stands for a state where the protocol has none."""
    return "REPLIED" if entry.seen_reply else "UNREPLIED"


def _verdict_name(verdict: Accept | Drop | Redirect) -> str:
    return type(verdict).__name__.lower()
