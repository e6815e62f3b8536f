"""The conditions of a rule held against one packet, in words.

A peer that is meant by labels fails requirement by requirement, so that an explanation can name the
one label that is wrong; its weight is the number of requirements that do not hold. Every other
condition that fails weighs one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from conntrack.address import Prefix, prefix_contains
from firewall.identities.labels import ANY, CLUSTER, POD_NAMESPACE, Label, LabelSet
from firewall.identities.selector import Key, Requirement
from firewall.policy.model import ANY_PROTOCOL, CidrPeer, LabelPeer, NodePeer, Peer
from firewall.policy.selectors import describe
from firewall.policy.snapshot import ANY_SELECTOR, EntryRow

PROTOCOL_WORDS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
_ICMP = (1, 58)
_PLAIN_SOURCES = (ANY, "k8s", "unspec")


class Traffic(NamedTuple):
    """The other side of one endpoint's traffic, and what it asks for.

    `prefix` is the peer's address as a host prefix.
    """

    selectors: frozenset[int]
    labels: LabelSet
    prefix: Prefix
    protocol: int
    port: int


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """One condition: `what` it is about, what the rule wants, what the traffic has.

    `what` is "peer", "port", "authentication", or a field of an http item: "method", "path",
    "host", "header", "headerMatch". `weight`: how much is wrong, at least 1 if it does not hold.
    """

    what: str
    expected: str
    actual: str
    held: bool
    weight: int = 1


def plain(key: Key) -> str:
    """Render a label key as policies write it: without the sources that go without saying."""
    if key.name == POD_NAMESPACE:
        return "namespace"
    return key.name if key.source in _PLAIN_SOURCES else str(key)


def _requirement_text(requirement: Requirement) -> str:
    text = str(requirement)
    prefix = str(requirement.key)
    return plain(requirement.key) + text.removeprefix(prefix)


def peer_text(peer: Peer) -> str:
    """Render whom a rule means; the labels that readers add go without saying."""
    if not isinstance(peer, LabelPeer):
        return describe(peer)
    shown = [r for r in peer.selector.requirements if r.key.name != CLUSTER]
    return ", ".join(map(_requirement_text, shown)) or "any endpoint"


def label_text(labels: LabelSet, key: Key) -> str:
    """Render what a label set has under a key: `org=alliance`, `no org`."""
    value = labels.get(key.source, key.name)
    if value is None:
        return f"no {plain(key)}"
    return f"{plain(key)}={value}" if value else plain(key)


def failing(peer: Peer, traffic: Traffic) -> tuple[Requirement, ...]:
    """Return the label requirements of a peer that the traffic's labels do not meet."""
    if not isinstance(peer, LabelPeer | NodePeer):
        return ()
    return tuple(r for r in peer.selector.requirements if not r.matches(traffic.labels))


def peer_condition(selector: int, peer: Peer | None, traffic: Traffic, others: int) -> Condition:
    """Hold the peer of one row against the other side.

    Args:
        selector: the row's selector number.
        peer: what the number means, None if that is not known.
        traffic: the other side.
        others: how many more peers the rule lists.
    """
    more = f" (or {others} other{'s' if others > 1 else ''})" if others else ""
    if selector == ANY_SELECTOR:
        return Condition(what="peer", expected="anyone", actual="", held=True)
    expected = f"selector {selector}" if peer is None else peer_text(peer)
    if selector in traffic.selectors:
        return Condition(what="peer", expected=expected + more, actual="", held=True)
    wrong = failing(peer, traffic) if peer is not None else ()
    if wrong:
        # Readers demand the own cluster of every peer: that is what failed only if nothing else is.
        shown = tuple(r for r in wrong if r.key.name != CLUSTER) or wrong
        expected = ", ".join(map(_requirement_text, shown))
        actual = ", ".join(dict.fromkeys(label_text(traffic.labels, r.key) for r in shown))
    elif isinstance(peer, CidrPeer):
        actual = _outside(peer, traffic)
    else:
        actual = identity_text(traffic)
    return Condition(
        what="peer",
        expected=expected + more,
        actual=actual,
        held=False,
        weight=max(1, len(wrong)),
    )


def _outside(peer: CidrPeer, traffic: Traffic) -> str:
    address = str(traffic.prefix).partition("/")[0]
    for hole in peer.excepts:
        if prefix_contains(hole, traffic.prefix):
            return f"{address}, which except {hole} leaves out"
    if prefix_contains(peer.prefix, traffic.prefix):
        return f"{address}, which belongs to an endpoint or node: CIDR rules do not mean those"
    return address


def identity_text(traffic: Traffic) -> str:
    """Render who the other side is: its labels, or its address where labels say nothing."""
    words = [str(label) for label in traffic.labels if label.source not in ("cidr", "k8s")]
    words += [f"{label.key}={label.value}" for label in own_labels(traffic.labels)]
    return ", ".join(words) or str(traffic.prefix).partition("/")[0]


def own_labels(labels: LabelSet) -> Sequence[Label]:
    """Return the workload's own labels: without namespace, cluster and other additions."""
    return [
        label
        for label in labels
        if label.source in ("k8s", "unspec") and not label.key.startswith(("io.cilium.", "io.kub"))
    ]


def port_condition(row: EntryRow, traffic: Traffic, names: frozenset[str]) -> Condition:
    """Hold the port of one row against the traffic's; `names` are the names of that port."""
    if row.protocol == ANY_PROTOCOL:
        held = True
    elif row.protocol != traffic.protocol:
        held = False
    elif row.port_name:
        held = row.port_name in names
    else:
        held = row.port_low <= traffic.port <= row.port_high
    return Condition(
        what="port",
        expected=port_text(row.protocol, row.port_low, row.port_high, row.port_name),
        actual=port_text(traffic.protocol, traffic.port, traffic.port),
        held=held,
    )


def port_text(protocol: int, low: int, high: int, name: str = "") -> str:
    """Render ports: `80/TCP`, `8000-9000/UDP`, `type 8/ICMP`, `any port/TCP`, `any port`."""
    if protocol == ANY_PROTOCOL:
        return "any port"
    word = PROTOCOL_WORDS.get(protocol, f"protocol {protocol}")
    if name:
        return f"{name}/{word}"
    if low == 0 and high == 65535:
        return f"any port/{word}"
    number = str(low) if low == high else f"{low}-{high}"
    return f"type {number}/{word}" if protocol in _ICMP else f"{number}/{word}"
