"""The model as the API shows it: plain JSON-able values, no decisions."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from conntrack.address import format_address, parse_address
from conntrack.flow import FlowTuple
from firewall.agent.engine import Engine
from firewall.agent.policies import BookChange, Key, key_row
from firewall.agent.roster import Member
from firewall.agent.worker import Worker
from firewall.datapath.choice import Choice, Ends
from firewall.datapath.kernel import QueueCounters
from firewall.flows.flow import format_time
from firewall.fqdn.cache import Entry
from firewall.identities.labels import NO_LABELS
from firewall.identities.reserved import CLUSTER_MAX, CLUSTER_MIN, Reserved
from firewall.policy.model import PolicyObject
from firewall.policy.name_match import to_regex
from firewall.policy.objects import Resource, resource_key
from firewall.policy.repository import Repository
from firewall.policy.snapshot import DirectionRow, NamedPortRow

Json = dict[str, Any]

_PROTOCOLS = {6: "TCP", 17: "UDP", 132: "SCTP"}


def endpoint(engine: Engine, member: Member) -> Json:
    """Return one endpoint."""
    one = member.endpoint
    number = Reserved.INIT if one.identity is None else one.identity
    labels = engine.registry.lookup(number) or one.relevant
    return {
        "id": one.id,
        "name": one.name,
        "namespace": one.namespace,
        "identity": {"id": int(number), "labels": list(labels.strings())},
        "labels": list(one.labels.strings()),
        "addresses": _addresses(one.addresses),
        "interface": one.interface,
        "interface_index": one.interface_index,
        "netns": one.netns,
        "state": one.shown_state,
        "failure": one.failure,
        "audit": one.audit,
        "policy": _enforcement(engine, one.identity, audit=one.audit, revision=one.policy_revision),
        "named_ports": [_port(row) for row in one.named_ports],
        "origin": member.origin,
        "file": member.declaration.place.file if member.origin != "api" else "",
        "log": [
            {
                "time": timestamp(change.time_ns),
                "from": change.before.word if change.before is not None else None,
                "to": change.after.word,
                "reason": change.reason,
            }
            for change in one.log
        ],
    }


def host_endpoint(engine: Engine) -> Json | None:
    """Return this node as an endpoint; None if it is not subject to policy."""
    snapshot = engine.publisher.snapshot
    one = next((row for row in snapshot.endpoints if row.identity == Reserved.HOST), None)
    if one is None:
        return None
    labels = list((engine.registry.lookup(Reserved.HOST) or NO_LABELS).strings())
    revision = snapshot.policy_revision
    return {
        "id": one.id,
        "name": one.name,
        "namespace": "",
        "identity": {"id": int(Reserved.HOST), "labels": labels},
        "labels": labels,
        "addresses": _addresses(one.addresses),
        "interface": "",
        "interface_index": 0,
        "netns": "",
        "state": "ready",
        "failure": "",
        "audit": one.audit,
        "policy": _enforcement(engine, one.identity, audit=one.audit, revision=revision),
        "named_ports": [],
        "origin": "config",
        "file": "",
        "log": [],
    }


def _addresses(addresses: Iterable[bytes]) -> Json:
    texts = [(len(address), format_address(address)) for address in addresses]
    return {
        "ipv4": [text for length, text in texts if length == 4],
        "ipv6": [text for length, text in texts if length == 16],
    }


def _enforcement(engine: Engine, identity: int | None, *, audit: bool, revision: int) -> Json:
    """Return what is enforced for an identity's endpoint by the last snapshot."""
    snapshot = engine.publisher.snapshot
    row = next((row for row in snapshot.policies if row.identity == identity), None)
    audit = audit or snapshot.settings.policy_audit_mode

    def direction(found: DirectionRow | None) -> Json:
        enforced = found is not None and found.enforced
        return {"enforced": enforced, "audit": enforced and audit}

    return {
        "ingress": direction(row.ingress if row is not None else None),
        "egress": direction(row.egress if row is not None else None),
        "revision": revision,
    }


def _port(row: NamedPortRow) -> Json:
    return {
        "name": row.name,
        "port": row.port,
        "protocol": _PROTOCOLS.get(row.protocol, str(row.protocol)),
    }


def identities(engine: Engine) -> list[Json]:
    """Return every identity known here, by number; 0 is nobody's, and Cilium does not list it."""
    users: dict[int, list[str]] = {}
    for member in engine.roster:
        if member.endpoint.identity is not None:
            users.setdefault(member.endpoint.identity, []).append(member.endpoint.title)
    return [
        {
            "id": int(number),
            "labels": list(labels.strings()),
            "refcount": engine.registry.refcount(number),
            "endpoints": users.get(number, []),
        }
        for number, labels in sorted(engine.registry.known().items())
        if number != Reserved.UNKNOWN
    ]


def policies(
    objects: Iterable[PolicyObject], resources: Iterable[Resource], repository: Repository
) -> Json:
    """Return policy objects, then what they refer to, with the revision."""
    rows = [
        {
            "key": _key(key_row(one.key)),
            "labels": list(one.labels),
            "file": one.file,
            "document": one.document,
        }
        for one in objects
    ]
    rows += [
        {
            "key": _key(resource_key(one)),
            "labels": [],
            "file": one.file,
            "document": one.document,
        }
        for one in resources
    ]
    return {"revision": repository.revision, "objects": rows}


def applied(change: BookChange) -> Json:
    """Return what applying a text did."""
    return {
        "revision": change.policies.revision,
        "applied": [{"key": _key(key), "change": kind.value} for key, kind in change.listed()],
        "problems": [str(problem) for problem in change.warnings],
    }


def deleted(change: BookChange, files: Mapping[Key, str]) -> Json:
    """Return what was deleted; `files`: what a file of the policy directory still says."""
    return {
        "revision": change.policies.revision,
        "deleted": [{**_key(key), "file": files.get(key, "")} for key, _ in change.listed()],
    }


def _key(key: Key) -> Json:
    kind, namespace, name = key
    return {"kind": kind, "namespace": namespace, "name": name}


def worker(one: Worker, metrics: Iterable[Mapping[str, Any]] = ()) -> Json:
    """Return one worker; `metrics` are the rows that it answers about itself."""
    return {
        "kind": one.spec.kind,
        "number": one.spec.number,
        "pid": one.pid,
        "state": one.state.name.lower(),
        "revision": one.revision,
        "version": one.version,
        "adopted": one.adopted,
        "restarts": one.restarts_count,
        "error": one.error,
        **({"traffic": _traffic(metrics)} if one.spec.kind == "datapath" else {}),
    }


_TRAFFIC = {
    "forward_count_total": "accepted",
    "proxy_redirected_count_total": "redirected",
    "passed_on_count_total": "passed_on",
    "verdict_refused_count_total": "verdicts_refused",
    "datapath_conntrack_inserted_total": "flows_opened",
    "datapath_conntrack_expired_total": "flows_expired",
    "datapath_conntrack_evicted_total": "flows_evicted",
    "datapath_conntrack_refused_total": "flows_refused",
    "datapath_conntrack_offloaded": "flows_offloaded",
    "datapath_conntrack_expiry_lag_seconds": "expiry_lag_s",
}
"""Metric of a datapath worker -> its name in the status."""


def _traffic(metrics: Iterable[Mapping[str, Any]]) -> Json | None:
    """Return what a datapath worker did and holds; None if it did not answer."""
    document: Json = {}
    dropped: dict[str, int] = {}
    flows: dict[str, int] = {}
    for row in metrics:
        name, value, labels = row["name"], row["value"], row["labels"]
        if name in _TRAFFIC:
            document[_TRAFFIC[name]] = value
        elif name == "drop_count_total" and value:
            dropped[labels["reason"]] = value
        elif name == "datapath_conntrack_entries":
            flows[f"{labels['protocol']} {labels['state']}"] = value
    return {**document, "dropped": dropped, "flows": flows} if document else None


def queue(counters: QueueCounters) -> Json:
    """Return the counters of one queue."""
    return {
        "queue": counters.queue,
        "depth": counters.depth,
        "kernel_dropped": counters.kernel_dropped,
        "user_dropped": counters.user_dropped,
        "packets": counters.packet_count,
    }


def endpoint_counts(engine: Engine) -> Json:
    """Return how many endpoints are in which state."""
    by_state: dict[str, int] = {}
    for member in engine.roster:
        state = member.endpoint.shown_state
        by_state[state] = by_state.get(state, 0) + 1
    return {
        "total": len(engine.roster),
        "ready": by_state.get("ready", 0),
        "by_state": by_state,
    }


def identity_counts(engine: Engine) -> Json:
    """Return how many identities are known, and the range of the shared ones."""
    known = engine.registry.known()
    return {
        "total": len(known),
        "reserved": sum(number < CLUSTER_MIN for number in known),
        "cluster": sum(CLUSTER_MIN <= number <= CLUSTER_MAX for number in known),
        "local": sum(number > CLUSTER_MAX for number in known),
        "min": CLUSTER_MIN,
        "max": CLUSTER_MAX,
    }


def timestamp(time_ns: int) -> str:
    """Return a wall-clock time as RFC 3339 in UTC with nanoseconds."""
    whole = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{time_ns % 1_000_000_000:09d}Z"


def conntrack_rows(rows: Iterable[Mapping[str, Any]], choice: Choice) -> list[Json]:
    """Return the rows of the flows of a choice."""
    return [dict(row) for row in rows if choice.includes(_tuple_of(row))]


def _tuple_of(row: Mapping[str, Any]) -> FlowTuple:
    """Return whose flow a row shows; the protocol's number is not told."""
    return FlowTuple(
        parse_address(row["source_address"]),
        parse_address(row["destination_address"]),
        0,
        row["source_port"],
        row["destination_port"],
    )


def ends(engine: Engine, names: list[str]) -> Ends | None:
    """Return what endpoint names, addresses or `address:port` stand for; no name: None, anybody.

    Raises:
        UnknownEndpointError: a name is none of them.
    """
    if not names:
        return None
    found: list[tuple[bytes, int]] = []
    for name in names:
        try:
            found.append(_end(name))
        except ValueError:
            found += ((address, 0) for address in engine.roster.meant(name).endpoint.addresses)
    return tuple(found)


def _end(text: str) -> tuple[bytes, int]:
    """Read `address`, `address:port` or `[address]:port`; raises ValueError."""
    if text.count(":") == 1 or text.startswith("["):
        host, _, port = text.rpartition(":")
        number = int(port)
        if not 0 < number < 65536:
            raise ValueError(f"{number} is not a port")
        return parse_address(host.removeprefix("[").removesuffix("]")), number
    return parse_address(text), 0


def names(entries: Iterable[Entry]) -> list[Json]:
    """Return what DNS answered, the addresses of a name together, in the columns of cilium-dbg."""
    rows: dict[tuple[int, str, str, float], Json] = {}
    for entry in entries:
        key = entry.endpoint, entry.name, entry.source, entry.expires_at
        row = rows.setdefault(
            key,
            {
                "endpoint": entry.endpoint,
                "source": entry.source,
                "fqdn": entry.name,
                "ttl": entry.ttl_s,
                "expiration_time": f"{format_time(int(entry.expires_at * 1e9))[:-7]}Z",
                "ips": [],
            },
        )
        row["ips"].append(format_address(entry.address))
    for row in rows.values():
        row["ips"].sort()
    return [rows[key] for key in sorted(rows)]


def name_selectors(engine: Engine) -> list[Json]:
    """Return the FQDN selectors of all policies, with the names and addresses that they mean."""
    book = engine.names
    found: dict[str, tuple[set[str], set[str]]] = {
        text: (set(), set()) for text in sorted(engine.resolver.fqdns())
    }
    for entry in book.cache.entries():
        for text in book.of_name(entry.name):
            if text in found and text in book.texts(entry.address):
                found[text][0].add(entry.name)
                found[text][1].add(format_address(entry.address))
    return [
        {
            "selector": text,
            "regex": f"^{to_regex(text)}$",
            "fqdns": sorted(meant),
            "ips": sorted(at),
        }
        for text, (meant, at) in found.items()
    ]
