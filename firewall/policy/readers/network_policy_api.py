"""Policies with tiers and priorities: policy.networking.k8s.io v1alpha2 and v1alpha1.

ClusterNetworkPolicy (v1alpha2) and AdminNetworkPolicy with BaselineAdminNetworkPolicy (v1alpha1)
say the same in other words; a table tells the dialects apart. Rules are ordered: rule i of a policy
has priority + i/100 in its tier, as in Cilium. They never isolate: what no rule decides falls
through to the next tier.

A peer of a kind that is not known here refuses the whole object: the API wants such a rule to fail
closed, and an object that is not in force while its author is told does not pretend to work.

Source: kubernetes-sigs/network-policy-api apis/v1alpha2, apis/v1alpha1; Cilium
pkg/k8s/cluster_network_policy.go.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from firewall.identities.selector import Selector
from firewall.policy.model import (
    Action,
    CidrPeer,
    FqdnPeer,
    LabelPeer,
    NodePeer,
    ObjectKey,
    Origin,
    Peer,
    PolicyEntry,
    PolicyObject,
    PortRange,
    Tier,
)
from firewall.policy.readers.document import Value, document_of, shorten
from firewall.policy.readers.kubernetes import pods_of, read_protocol_word
from firewall.policy.readers.metadata import Metadata, origin_labels, read_metadata
from firewall.policy.readers.peers import check_domain, read_prefix
from firewall.policy.readers.ports import HIGHEST_PORT, PORT_PROTOCOLS, is_port_name
from firewall.policy.readers.selectors import read_selector, workload_key
from firewall.policy.readers.settings import ReaderSettings
from firewall.policy.verdict import TrafficDirection

HIGHEST_PRIORITY = 1000
RULES_PER_PRIORITY = 100
"""Rule i of a policy has its priority plus i hundredths (Cilium)."""

_MAX_RULE_NAME_CHARACTERS = 100
_OBJECT_FIELDS = ("apiVersion", "kind", "metadata", "spec", "status")
_EGRESS_PEERS = ("nodes", "networks", "domainNames")
_DOMAIN = re.compile(r"(\*\.)?[a-zA-Z0-9][-a-zA-Z0-9_.]*")


class Dialect(NamedTuple):
    """What differs between the kinds. `max_items`: of rules, peers and ports in one list."""

    kind: str
    actions: dict[str, Action]
    tiers: dict[str, Tier]
    """By `spec.tier`; a single one under "" if the kind is its tier."""
    has_priority: bool
    only_name: str
    ports_field: str
    read_port: Callable[[Value], tuple[PortRange, ...]]
    max_items: int


def read_policy(root: Value, settings: ReaderSettings, dialect: Dialect) -> PolicyObject | None:
    """Read one object; None if it has no name or no spec."""
    root.fields(_OBJECT_FIELDS)
    metadata = read_metadata(root, default_namespace="", namespaced=False)
    if metadata is not None and dialect.only_name not in ("", metadata.name):
        root.error(f'a {dialect.kind} must be named "{dialect.only_name}"')
    spec = root.child("spec")
    if spec is None:
        root.error("needs spec")
        return None
    known = ["subject", "ingress", "egress"]
    known += ["priority"] if dialect.has_priority else []
    known += [] if "" in dialect.tiers else ["tier"]
    fields = spec.fields(known)
    if not spec.is_mapping:
        return None
    entries = _read_rules(spec, fields, metadata or Metadata("", ""), settings, dialect)
    if metadata is None:
        return None
    return PolicyObject(
        key=ObjectKey(kind=dialect.kind, namespace="", name=metadata.name),
        labels=origin_labels(dialect.kind, metadata),
        entries=tuple(entries),
        document=document_of(root),
        file=root.report.file,
    )


def _read_rules(
    spec: Value,
    fields: dict[str, Value],
    metadata: Metadata,
    settings: ReaderSettings,
    dialect: Dialect,
) -> list[PolicyEntry]:
    template = PolicyEntry(
        origin=Origin(
            kind=dialect.kind,
            namespace="",
            name=metadata.name,
            path=spec.path,
            file=spec.report.file,
            labels=origin_labels(dialect.kind, metadata),
        ),
        direction=TrafficDirection.INGRESS,
        action=Action.ALLOW,
        subject=_subject(spec, fields, settings),
        tier=_tier(spec, fields, dialect),
        priority=float(_priority(spec, fields, dialect)),
        peers=None,
        ports=None,
        default_deny=False,
    )
    entries = []
    for field, direction in (
        ("ingress", TrafficDirection.INGRESS),
        ("egress", TrafficDirection.EGRESS),
    ):
        rules = fields[field].items() if field in fields else []
        if len(rules) > dialect.max_items:
            fields[field].error(f"too many rules, the max is {dialect.max_items}")
        for at, rule in enumerate(rules):
            ordered = replace(
                template,
                direction=direction,
                priority=template.priority + at / RULES_PER_PRIORITY,
            )
            entries.append(_read_rule(rule, ordered, settings, dialect))
    return entries


def _subject(spec: Value, fields: dict[str, Value], settings: ReaderSettings) -> Selector:
    if "subject" not in fields:
        spec.error("needs subject")
        return Selector()
    chosen = _exactly_one(fields["subject"], ("namespaces", "pods"))
    # A subject is local by nature: the cluster is no condition of it.
    here = replace(settings, default_local_cluster=False)
    return _pods(chosen, here) if chosen is not None else Selector()


def _pods(chosen: tuple[str, Value], settings: ReaderSettings) -> Selector:
    name, value = chosen
    if name == "namespaces":
        return pods_of(value, None, settings)
    fields = value.fields(("namespaceSelector", "podSelector"))
    if value.is_mapping and "podSelector" not in fields:
        value.error("needs podSelector; {} selects all")
    return pods_of(fields.get("namespaceSelector"), fields.get("podSelector"), settings)


def _exactly_one(value: Value, names: tuple[str, ...]) -> tuple[str, Value] | None:
    fields = value.fields(names)
    if len(fields) == 1:
        return next(iter(fields.items()))
    if value.is_mapping:
        value.error(f"needs exactly one of {', '.join(names)}")
    return None


def _tier(spec: Value, fields: dict[str, Value], dialect: Dialect) -> Tier:
    if "" in dialect.tiers:
        return dialect.tiers[""]
    word = fields["tier"].word(dialect.tiers) if "tier" in fields else None
    if "tier" not in fields:
        spec.error(f"needs tier: {' or '.join(dialect.tiers)}")
    return dialect.tiers[word] if word else Tier.BASELINE


def _priority(spec: Value, fields: dict[str, Value], dialect: Dialect) -> int:
    if not dialect.has_priority:
        return 0
    if "priority" not in fields:
        spec.error(f"needs priority, 0 to {HIGHEST_PRIORITY}")
        return 0
    return fields["priority"].integer(0, HIGHEST_PRIORITY) or 0


def _read_rule(
    rule: Value, template: PolicyEntry, settings: ReaderSettings, dialect: Dialect
) -> PolicyEntry:
    ingress = template.direction is TrafficDirection.INGRESS
    peer_field = "from" if ingress else "to"
    fields = rule.fields(("name", "action", peer_field, dialect.ports_field))
    if "name" in fields:
        name = fields["name"].text() or ""
        if len(name) > _MAX_RULE_NAME_CHARACTERS:
            fields["name"].error(f"is longer than {_MAX_RULE_NAME_CHARACTERS} characters")
    action = fields["action"].word(dialect.actions) if "action" in fields else None
    if rule.is_mapping and "action" not in fields:
        rule.error(f"needs action: {', '.join(dialect.actions)}")
    chosen = dialect.actions[action] if action else Action.DENY
    peers = _list(fields.get(peer_field), dialect)
    if rule.is_mapping and not peers:
        rule.error(f"needs {peer_field} with at least one peer")
    ports = _list(fields.get(dialect.ports_field), dialect)
    if dialect.ports_field in fields and not ports:
        fields[dialect.ports_field].error("is empty; leave it out to mean every port")
    entry = replace(
        template,
        origin=replace(
            template.origin, path=rule.path, line=rule.mark.line, column=rule.mark.column
        ),
        action=chosen,
        peers=tuple(
            peer for item in peers for peer in _read_peer(item, chosen, settings, ingress=ingress)
        ),
        ports=tuple(port for item in ports for port in dialect.read_port(item)) if ports else None,
    )
    if any(not isinstance(peer, LabelPeer) for peer in entry.peers or ()) and any(
        port.name is not None for port in entry.ports or ()
    ):
        rule.error("networks, nodes and domainNames have no named ports; use numbers")
    return entry


def _list(value: Value | None, dialect: Dialect) -> list[Value]:
    items = value.items() if value is not None else []
    if value is not None and len(items) > dialect.max_items:
        value.error(f"too many items, the max is {dialect.max_items}")
    return items


def _read_peer(
    item: Value, action: Action, settings: ReaderSettings, *, ingress: bool
) -> tuple[Peer, ...]:
    inside = ("namespaces", "pods")
    chosen = _exactly_one(item, inside if ingress else (*inside, *_EGRESS_PEERS))
    if chosen is None:
        return ()
    name, value = chosen
    match name:
        case "nodes":
            selector = read_selector(value, workload_key)
            settings.require("nodes", value)
            return (NodePeer(selector),)
        case "networks":
            prefixes = [read_prefix(network) for network in value.items()]
            if not prefixes:
                value.error("is empty; give at least one prefix")
            at_endpoints = settings.ip_block_matches_endpoints
            return tuple(CidrPeer(p, (), at_endpoints) for p in prefixes if p is not None)
        case "domainNames":
            return _domains(value, action, settings)
        case _:
            return (LabelPeer(_pods(chosen, settings)),)


def _domains(value: Value, action: Action, settings: ReaderSettings) -> tuple[Peer, ...]:
    if action is not Action.ALLOW:
        value.error("domainNames are only for rules that accept")
    settings.require("fqdn", value)
    peers = []
    for item in value.items():
        text = item.text()
        if text is None:
            continue
        if not _DOMAIN.fullmatch(text) or "." not in text.strip("."):
            item.error(f'"{shorten(text)}" is no domain name; a wildcard is "*." in front')
        elif check_domain(item, text, wildcards=True):
            name = text.lower()
            # The API's "*" is one or more labels, which is Cilium's "**".
            peers.append(FqdnPeer(None, f"*{name}") if name[0] == "*" else FqdnPeer(name, None))
    return tuple(peers)


def _number(value: Value | None, owner: Value, name: str) -> int | None:
    if value is None:
        owner.error(f"needs {name}")
        return None
    return value.integer(1, HIGHEST_PORT)


def _range(value: Value, fields: dict[str, Value]) -> tuple[int, int] | None:
    low = _number(fields.get("start"), value, "start")
    high = _number(fields.get("end"), value, "end")
    if low is None or high is None:
        return None
    if low >= high:
        value.error("start must be less than end")
        return None
    return low, high


def _named(value: Value) -> tuple[PortRange, ...]:
    """Return a named port of every protocol: the name alone says which is meant."""
    text = value.text()
    if text is None:
        return ()
    if not is_port_name(text):
        value.error(f'"{shorten(text)}" is no port name: 1 to 15 letters, digits and hyphens')
        return ()
    return tuple(PortRange(number, 0, 0, text.lower()) for number in PORT_PROTOCOLS.values())


def _read_v1alpha2_port(item: Value) -> tuple[PortRange, ...]:
    words = {word.lower(): number for word, number in PORT_PROTOCOLS.items()}
    chosen = _exactly_one(item, (*words, "destinationNamedPort"))
    if chosen is None:
        return ()
    name, value = chosen
    if name not in words:
        return _named(value)
    port = value.fields(("destinationPort",)).get("destinationPort")
    if port is None:
        return (PortRange(words[name]),) if value.is_mapping else ()
    kind = _exactly_one(port, ("number", "range"))
    if kind is None:
        return ()
    if kind[0] == "number":
        number = kind[1].integer(1, HIGHEST_PORT)
        return () if number is None else (PortRange(words[name], number, number),)
    bounds = _range(kind[1], kind[1].fields(("start", "end")))
    return () if bounds is None else (PortRange(words[name], *bounds),)


def _read_v1alpha1_port(item: Value) -> tuple[PortRange, ...]:
    chosen = _exactly_one(item, ("portNumber", "portRange", "namedPort"))
    if chosen is None:
        return ()
    name, value = chosen
    if name == "namedPort":
        return _named(value)
    wanted = ("port",) if name == "portNumber" else ("start", "end")
    fields = value.fields(("protocol", *wanted))
    if not value.is_mapping:
        return ()
    protocol = read_protocol_word(fields.get("protocol"))
    if name == "portNumber":
        number = _number(fields.get("port"), value, "port")
        bounds = None if number is None else (number, number)
    else:
        bounds = _range(value, fields)
    return () if protocol is None or bounds is None else (PortRange(protocol, *bounds),)


_V1ALPHA1_ACTIONS = {"Allow": Action.ALLOW, "Deny": Action.DENY, "Pass": Action.PASS}

CLUSTER_NETWORK_POLICY = Dialect(
    kind="ClusterNetworkPolicy",
    actions={"Accept": Action.ALLOW, "Deny": Action.DENY, "Pass": Action.PASS},
    tiers={"Admin": Tier.ADMIN, "Baseline": Tier.BASELINE},
    has_priority=True,
    only_name="",
    ports_field="protocols",
    read_port=_read_v1alpha2_port,
    max_items=25,
)
ADMIN_NETWORK_POLICY = Dialect(
    kind="AdminNetworkPolicy",
    actions=_V1ALPHA1_ACTIONS,
    tiers={"": Tier.ADMIN},
    has_priority=True,
    only_name="",
    ports_field="ports",
    read_port=_read_v1alpha1_port,
    max_items=100,
)
BASELINE_ADMIN_NETWORK_POLICY = Dialect(
    kind="BaselineAdminNetworkPolicy",
    actions={"Allow": Action.ALLOW, "Deny": Action.DENY},
    tiers={"": Tier.BASELINE},
    has_priority=False,
    only_name="default",
    ports_field="ports",
    read_port=_read_v1alpha1_port,
    max_items=100,
)
