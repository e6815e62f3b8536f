"""Peers of Cilium rules: who is on the other side of the traffic.

Inside one rule entry at most one kind of peer may have items. The kinds are a table: the field's
name without its direction, and the function that reads one item.

Source: Cilium pkg/policy/api/ingress.go, egress.go, cidr.go, entity.go, fqdn.go, service.go.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from conntrack.address import Prefix, format_prefix, parse_prefix, prefix_contains
from firewall.identities.labels import RESERVED
from firewall.identities.reserved import Reserved
from firewall.identities.selector import Key, Operator, require
from firewall.policy.model import (
    CidrGroupPeer,
    CidrPeer,
    EntityPeer,
    FqdnPeer,
    LabelPeer,
    NodePeer,
    Peer,
    ServicePeer,
)
from firewall.policy.problem import did_you_mean
from firewall.policy.readers.document import Value, shorten
from firewall.policy.readers.selectors import confine_peer, read_selector
from firewall.policy.readers.settings import ReaderSettings
from firewall.policy.verdict import TrafficDirection

ENTITIES: tuple[str, ...] = (
    "all",
    "world",
    "world-ipv4",
    "world-ipv6",
    "cluster",
    "cluster-mesh",
    "host",
    "remote-node",
    "kube-apiserver",
    "init",
    "ingress",
    "unmanaged",
    "health",
    "none",
)
"""Cilium's entities (pkg/policy/api/entity.go EntitySelectorMapping)."""

MAX_NAME_CHARACTERS = 255  # RFC 1035 section 2.3.4
_NAME = re.compile(r"[-a-zA-Z0-9_]+([.][-a-zA-Z0-9_]+)*[.]?")
_PATTERN = re.compile(r"[-a-zA-Z0-9_*]+([.][-a-zA-Z0-9_*]+)*[.]?")
_PREFIX = re.compile(r"([0-9a-fA-F:.]+)/(0|[1-9][0-9]{0,2})")
_MASKED = re.compile(r"[0-9a-fA-F:.]+/[0-9a-fA-F:.]+")
_MAPPED = parse_prefix("::ffff:0:0/96")  # RFC 4291 2.5.5.2
_OTHER_NODES = require(Key(RESERVED, Reserved.REMOTE_NODE.label), Operator.EXISTS)
_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


class PeerContext(NamedTuple):
    """What reading a peer depends on besides its own fields."""

    settings: ReaderSettings
    namespace: str
    """Of the policy; "" if cluster-wide."""
    subject_is_init: bool = False
    confined: bool = True
    """False: rules without an object around them, whose selectors mean just what they say."""


class Kind(NamedTuple):
    """One kind of peer: how an item is read and which capability it needs."""

    read: Callable[[Value, PeerContext], Peer | None]
    capability: str = ""
    directions: tuple[TrafficDirection, ...] = (TrafficDirection.INGRESS, TrafficDirection.EGRESS)
    may_deny: bool = True


def read_prefix(value: Value) -> Prefix | None:
    """Read `address/length`; host bits are masked off. A bare address is no prefix."""
    text = value.text()
    if text is None:
        return None
    if not text:
        value.error("IP must be specified")
        return None
    found = _PREFIX.fullmatch(text)
    if found is None and _MASKED.fullmatch(text):
        value.error(
            f'unable to parse CIDR "{shorten(text)}": write the mask as a length, like /24 '
            "(a mask with holes is no CIDR)"
        )
        return None
    try:
        prefix = parse_prefix(text)
    except ValueError as error:
        value.error(f'unable to parse CIDR "{shorten(text)}": {error}')
        return None
    if found is None:
        value.error(f'unable to parse CIDR "{text}": no length; write {format_prefix(prefix)}')
        return None
    if prefix_contains(_MAPPED, prefix):
        meant = format_prefix(Prefix(prefix.network[12:], prefix.length - _MAPPED.length))
        value.warning(
            f"matches nothing: no packet carries IPv4 in the clothes of IPv6; write {meant}"
        )
    return prefix


def read_excepts(value: Value | None, outer: Prefix | None) -> tuple[Prefix, ...]:
    """Read an `except` list; each prefix must lie inside `outer` if that is known."""
    found = []
    for item in value.items() if value is not None else ():
        inner = read_prefix(item)
        if inner is None:
            continue
        if outer is not None and not prefix_contains(outer, inner):
            item.error(
                f"allow CIDR prefix {format_prefix(outer)} does not contain exclude CIDR prefix "
                f"{format_prefix(inner)}"
            )
        found.append(inner)
    return tuple(found)


def _read_endpoints(item: Value, context: PeerContext) -> Peer:
    selector = read_selector(item)
    if context.confined:
        selector = confine_peer(
            selector,
            context.namespace,
            context.settings,
            subject_is_init=context.subject_is_init,
        )
    return LabelPeer(selector)


def _read_cidr(item: Value, _context: PeerContext) -> Peer | None:
    prefix = read_prefix(item)
    return None if prefix is None else CidrPeer(prefix)


def _read_cidr_rule(item: Value, context: PeerContext) -> Peer | None:
    fields = item.fields(("cidr", "cidrGroupRef", "cidrGroupSelector", "except"))
    if not item.is_mapping:
        return None
    chosen = [name for name in fields if name != "except"]
    if len(chosen) != 1:
        item.error("needs exactly one of cidr, cidrGroupRef, cidrGroupSelector")
        read_excepts(fields.get("except"), None)
        return None
    if chosen == ["cidr"]:
        prefix = read_prefix(fields["cidr"])
        excepts = read_excepts(fields.get("except"), prefix)
        return None if prefix is None else CidrPeer(prefix, excepts)
    place = fields[chosen[0]]
    excepts = read_excepts(fields.get("except"), None)
    context.settings.require("cidr-groups", place)
    if chosen == ["cidrGroupSelector"]:
        return CidrGroupPeer(None, read_selector(place), excepts)
    name = place.text()
    if name is not None and (len(name) > 253 or not _OBJECT_NAME.fullmatch(name)):  # RFC 1123
        place.error(f'"{shorten(name)}" is no name of a CiliumCIDRGroup')
        return None
    return None if name is None else CidrGroupPeer(name, None, excepts)


def _read_entity(item: Value, _context: PeerContext) -> Peer | None:
    text = item.text()
    if text is None:
        return None
    if text not in ENTITIES:
        item.error(f"unsupported entity: {shorten(text)}{did_you_mean(text, ENTITIES)}")
        return None
    return EntityPeer(text)


def read_domain(item: Value, what: str) -> tuple[str | None, str | None] | None:
    """Read a structure of `matchName` or `matchPattern`, lower-cased.

    Args:
        item: the mapping.
        what: the structure's name for messages, "FQDNSelector".

    Returns:
        (name, pattern), exactly one of them set; None after a report.
    """
    fields = item.fields(("matchName", "matchPattern"))
    if not item.is_mapping:
        return None
    if len(fields) == 2:
        item.error(f"only one of matchName or matchPattern is allowed in an {what}")
        return None
    if not fields:
        item.error(f"one of matchName or matchPattern is needed in an {what}")
        return None
    field, place = next(iter(fields.items()))
    text = place.text()
    if text is None:
        return None
    text = text.strip().lower()
    if not check_domain(place, text, wildcards=field == "matchPattern"):
        return None
    return (text, None) if field == "matchName" else (None, text)


def check_domain(place: Value, text: str, *, wildcards: bool) -> bool:
    """Report what makes the text no DNS name (or pattern of names); say whether it is one."""
    if len(text) > MAX_NAME_CHARACTERS:
        place.error(f"is longer than {MAX_NAME_CHARACTERS} characters, no DNS name is")
        return False
    allowed = _PATTERN if wildcards else _NAME
    if allowed.fullmatch(text):
        return True
    if not wildcards and "*" in text:
        place.error(f'"{shorten(text)}" is a pattern; write it as matchPattern')
    else:
        characters = 'letters, digits, "-", "_" and "."' + (' and "*"' if wildcards else "")
        place.error(f'"{shorten(text)}" is no DNS name: {characters}, no empty label')
    return False


def _read_fqdn(item: Value, _context: PeerContext) -> Peer | None:
    domain = read_domain(item, "FQDNSelector")
    return None if domain is None else FqdnPeer(*domain)


def _read_service(item: Value, _context: PeerContext) -> Peer | None:
    fields = item.fields(("k8sService", "k8sServiceSelector"))
    if not item.is_mapping:
        return None
    if len(fields) != 1:
        item.error("needs exactly one of k8sService, k8sServiceSelector")
        return None
    place = next(iter(fields.values()))
    by_name = "k8sService" in fields
    wanted = "serviceName" if by_name else "selector"
    inner = place.fields((wanted, "namespace"))
    namespace = _namespace(inner)
    if by_name:
        name = inner[wanted].text() if wanted in inner else None
        if not name:
            place.error("needs serviceName")
        return ServicePeer(name, namespace, None) if name else None
    if wanted not in inner:
        if place.is_mapping:
            place.error("needs selector")
        return None
    return ServicePeer(None, namespace, read_selector(inner[wanted]))


def _namespace(fields: dict[str, Value]) -> str:
    return (fields["namespace"].text() or "") if "namespace" in fields else ""


def _read_node(item: Value, _context: PeerContext) -> Peer:
    """Read a node selector; it means other nodes only, as Cilium adds to it."""
    return NodePeer(read_selector(item).with_requirement(_OTHER_NODES))


KINDS: dict[str, Kind] = {
    "Endpoints": Kind(_read_endpoints),
    "CIDR": Kind(_read_cidr),
    "CIDRSet": Kind(_read_cidr_rule),
    "Entities": Kind(_read_entity),
    "Nodes": Kind(_read_node, "nodes"),
    "Services": Kind(_read_service, "services", (TrafficDirection.EGRESS,)),
    "FQDNs": Kind(_read_fqdn, "fqdn", (TrafficDirection.EGRESS,), may_deny=False),
}
"""The kinds of peers by field name without `from` or `to`."""


def peer_fields(direction: TrafficDirection, *, deny: bool) -> dict[str, Kind]:
    """Return the peer fields of one entry type: `fromEndpoints`, ... or `toEndpoints`, ..."""
    word = "from" if direction is TrafficDirection.INGRESS else "to"
    return {
        f"{word}{name}": kind
        for name, kind in KINDS.items()
        if direction in kind.directions and (kind.may_deny or not deny)
    }


def read_peers(
    fields: dict[str, Value], kinds: dict[str, Kind], context: PeerContext
) -> tuple[Peer, ...] | None:
    """Read the peers of one entry.

    Returns:
        None: no peer field was given. (): one is given and empty, no peer at all (Cilium
        mergeEndpointSelectors: even if another is filled).
    """
    given = [name for name in fields if name in kinds]
    if not given:
        return None
    items = {name: fields[name].items() for name in given}
    filled = [name for name in given if items[name]]
    if len(filled) > 1:
        fields[filled[1]].error(
            f"combining {filled[0]} and {filled[1]} is not supported yet; write two entries"
        )
    empty = [name for name in given if not items[name]]
    if filled and empty:
        fields[empty[0]].warning(f"is empty, so nobody is meant, whatever {filled[0]} says")
    peers: list[Peer] = []
    for name in filled:
        kind = kinds[name]
        read = [kind.read(item, context) for item in items[name]]
        if kind.capability:
            context.settings.require(kind.capability, fields[name])
        peers += [peer for peer in read if peer is not None]
    return () if empty else tuple(dict.fromkeys(peers))
