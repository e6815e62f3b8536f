"""What is sent to the proxy: endpoints and ports with L7 rules, and what became of the requests."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from firewall.policy.snapshot import DirectionRow, EndpointRow, Snapshot

_PROTOCOLS = {0: "ANY", 6: "TCP", 17: "UDP", 132: "SCTP"}
_COUNTED = ("received", "forwarded", "denied")


def redirects(
    snapshot: Snapshot, answers: Iterable[Iterable[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return one row for each endpoint, direction, port range and kind of rule, in this order.

    Args:
        snapshot: what is in force.
        answers: each worker's rows about "redirects": `endpoint`, `direction`, `protocol` (IANA),
            `port`, and how many requests were `received`, `forwarded` and `denied`.
    """
    counted = [row for rows in answers for row in rows]
    by_identity = {row.identity: row for row in snapshot.policies}
    found: list[dict[str, Any]] = []
    for endpoint in snapshot.endpoints:
        policy = by_identity.get(endpoint.identity)
        if policy is None:
            continue
        for name, direction in (("ingress", policy.ingress), ("egress", policy.egress)):
            for row in _of(snapshot, endpoint, name, direction):
                _count(row, counted)
                found.append(row)
    return found


def _of(
    snapshot: Snapshot, endpoint: EndpointRow, name: str, direction: DirectionRow
) -> Iterator[dict[str, Any]]:
    """Yield each of one endpoint's redirects once, however many rules lead to it."""
    seen: set[tuple[int, int, int, str]] = set()
    for entry in direction.entries:
        if entry.l7 < 0:
            continue
        kind = snapshot.l7[entry.l7].kind
        key = entry.protocol, entry.port_low, entry.port_high, kind
        if key not in seen:
            seen.add(key)
            yield {
                "endpoint": endpoint.id,
                "name": f"{endpoint.namespace}/{endpoint.name}",
                "direction": name,
                "protocol": _name(entry.protocol),
                "port": entry.port_low,
                "end_port": entry.port_high,
                "parser": kind,
                "proxy_port": snapshot.settings.http_proxy_port,
            }


def _name(protocol: int) -> str:
    return _PROTOCOLS.get(protocol, str(protocol))


def _count(row: dict[str, Any], counted: list[Mapping[str, Any]]) -> None:
    """Add what the workers counted for an endpoint and port."""
    for word in _COUNTED:
        row[word] = sum(
            int(one[word])
            for one in counted
            if one["endpoint"] == row["endpoint"]
            and one["direction"] == row["direction"]
            and row["protocol"] in ("ANY", _name(int(one["protocol"])))
            and row["port"] <= int(one["port"]) <= row["end_port"]
        )
