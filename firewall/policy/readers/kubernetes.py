"""NetworkPolicy of networking.k8s.io/v1.

Its defaults are the opposite of Cilium's: a missing or empty `from` means everyone, and a rule `{}`
allows everything. What isolates is `policyTypes` (missing: Ingress always, Egress if there are
egress rules), with or without rules.

Source: Kubernetes' NetworkPolicy API and its validation; Cilium pkg/k8s/network_policy.go for the
translation to labels. Where the two differ (ipBlock and pods' addresses), a setting decides.
"""

import re
from dataclasses import replace

from firewall.identities.labels import K8S, POD_NAMESPACE
from firewall.identities.selector import Selector
from firewall.policy.model import (
    Action,
    CidrPeer,
    LabelPeer,
    ObjectKey,
    Origin,
    Peer,
    PolicyEntry,
    PolicyObject,
    PortRange,
)
from firewall.policy.problem import did_you_mean
from firewall.policy.readers.composition import Scalar
from firewall.policy.readers.document import Value, document_of, shorten
from firewall.policy.readers.metadata import origin_labels, read_metadata
from firewall.policy.readers.peers import read_excepts, read_prefix
from firewall.policy.readers.ports import HIGHEST_PORT, PORT_PROTOCOLS, TCP, is_port_name
from firewall.policy.readers.selectors import (
    confine_to_cluster,
    in_some_namespace,
    namespace_key,
    read_selector,
    workload_key,
)
from firewall.policy.readers.settings import ReaderSettings
from firewall.policy.verdict import TrafficDirection

KIND = "NetworkPolicy"

_OBJECT_FIELDS = ("apiVersion", "kind", "metadata", "spec", "status")
_SPEC_FIELDS = ("podSelector", "ingress", "egress", "policyTypes")
_PEER_FIELDS = ("podSelector", "namespaceSelector", "ipBlock")
_OTHER_BASE = re.compile(r"0[xob][0-9A-Fa-f_]+|[0-9]+[eE][0-9]+")  # what YAML calls a number
_DIRECTIONS = {
    "Ingress": (TrafficDirection.INGRESS, "ingress", "from"),
    "Egress": (TrafficDirection.EGRESS, "egress", "to"),
}


def read_policy(root: Value, settings: ReaderSettings) -> PolicyObject | None:
    """Read a NetworkPolicy; None if it has no name or no spec."""
    root.fields(_OBJECT_FIELDS)
    metadata = read_metadata(root, default_namespace=settings.default_namespace, namespaced=True)
    spec = root.child("spec")
    if spec is None:
        root.error("needs spec with a podSelector")
        return None
    fields = spec.fields(_SPEC_FIELDS)
    if not spec.is_mapping:
        return None
    namespace = metadata.namespace if metadata else settings.default_namespace
    subject = Selector()
    if "podSelector" in fields:
        subject = read_selector(fields["podSelector"], workload_key)
    labels = origin_labels(KIND, metadata) if metadata else ()
    template = PolicyEntry(
        origin=Origin(
            kind=KIND,
            namespace=namespace,
            name=metadata.name if metadata else "",
            path=spec.path,
            file=root.report.file,
            line=spec.mark.line,
            column=spec.mark.column,
            labels=labels,
        ),
        direction=TrafficDirection.INGRESS,
        action=Action.ALLOW,
        subject=subject.with_label(K8S, POD_NAMESPACE, namespace),
        peers=(),
        ports=None,
    )
    entries = _read_directions(fields, template, settings)
    if metadata is None:
        return None
    return PolicyObject(
        key=ObjectKey(kind=KIND, namespace=namespace, name=metadata.name),
        labels=labels,
        entries=tuple(entries),
        document=document_of(root),
        file=root.report.file,
    )


def _read_directions(
    fields: dict[str, Value], template: PolicyEntry, settings: ReaderSettings
) -> list[PolicyEntry]:
    types = _policy_types(fields)
    entries: list[PolicyEntry] = []
    for word, (direction, field, peer_field) in _DIRECTIONS.items():
        rules = fields[field].items() if field in fields else []
        read = [
            _read_rule(rule, peer_field, replace(template, direction=direction), settings)
            for rule in rules
        ]
        if word not in types:
            if rules:
                fields[field].warning(f"has no effect: policyTypes does not name {word}")
            continue
        entries += read or [replace(template, direction=direction)]
    return entries


def _policy_types(fields: dict[str, Value]) -> list[str]:
    given = fields["policyTypes"].items() if "policyTypes" in fields else []
    if len(given) > len(_DIRECTIONS):
        fields["policyTypes"].error("may not specify more than two policyTypes")
    if given:
        return [word for item in given if (word := item.word(_DIRECTIONS)) is not None]
    egress = fields.get("egress")
    return ["Ingress", "Egress"] if egress is not None and egress.items() else ["Ingress"]


def _read_rule(
    rule: Value, peer_field: str, template: PolicyEntry, settings: ReaderSettings
) -> PolicyEntry:
    fields = rule.fields((peer_field, "ports"))
    peer_items = fields[peer_field].items() if peer_field in fields else []
    port_items = fields["ports"].items() if "ports" in fields else []
    peers = [_read_peer(item, template.origin.namespace, settings) for item in peer_items]
    ports = [port for item in port_items if (port := _read_port(item)) is not None]
    mark = rule.mark
    return replace(
        template,
        origin=replace(template.origin, path=rule.path, line=mark.line, column=mark.column),
        peers=tuple(peer for peer in peers if peer is not None) if peer_items else None,
        ports=tuple(ports) if port_items else None,
    )


def _read_peer(item: Value, namespace: str, settings: ReaderSettings) -> Peer | None:
    fields = item.fields(_PEER_FIELDS)
    if not item.is_mapping:
        return None
    if not fields:
        item.error("must specify a peer: podSelector, namespaceSelector or ipBlock")
        return None
    if "ipBlock" in fields:
        if len(fields) > 1:
            item.error("may not specify both ipBlock and another peer")
        return read_ip_block(fields["ipBlock"], settings)
    namespaces, pods = fields.get("namespaceSelector"), fields.get("podSelector")
    return LabelPeer(pods_of(namespaces, pods, settings, namespace))


def pods_of(
    namespaces: Value | None, pods: Value | None, settings: ReaderSettings, namespace: str = ""
) -> Selector:
    """Return the selector of pods by their namespace's labels and their own.

    Args:
        namespaces: a namespaceSelector; `{}` = every namespace; missing = `namespace`.
        pods: a podSelector; missing or `{}` = every pod.
        settings: the cluster's name.
        namespace: the policy's; "" = every namespace.
    """
    selector = read_selector(pods, workload_key) if pods is not None else Selector()
    if namespaces is not None:
        found = read_selector(namespaces, namespace_key)
        selector = Selector((*selector.requirements, *found.requirements))
    if namespaces is None and namespace:
        selector = selector.with_label(K8S, POD_NAMESPACE, namespace)
    else:
        # Without it, NotIn and DoesNotExist would match host and world, which have no namespace.
        selector = in_some_namespace(selector)
    return confine_to_cluster(selector, settings)


def read_ip_block(block: Value, settings: ReaderSettings) -> CidrPeer | None:
    """Read `ipBlock`: a prefix and exceptions inside it."""
    fields = block.fields(("cidr", "except"))
    if "cidr" not in fields:
        if block.is_mapping:
            block.error("needs cidr")
        return None
    prefix = read_prefix(fields["cidr"])
    excepts = read_excepts(fields.get("except"), prefix)
    if prefix is None:
        return None
    for item, inner in zip(_items(fields.get("except")), excepts, strict=False):
        if inner == prefix:
            item.error("must be a strict subset of cidr")
    return CidrPeer(prefix, excepts, settings.ip_block_matches_endpoints)


def _items(value: Value | None) -> list[Value]:
    return value.items() if value is not None else []


def read_protocol_word(value: Value | None) -> int | None:
    """Read a Kubernetes protocol: TCP (the default), UDP or SCTP, upper case."""
    if value is None:
        return TCP
    text = value.text()
    if text is None:
        return None
    if text not in PORT_PROTOCOLS:
        hint = did_you_mean(text, PORT_PROTOCOLS)
        value.error(f'unknown protocol "{shorten(text)}": must be TCP, UDP or SCTP{hint}')
        return None
    return PORT_PROTOCOLS[text]


def _read_port(item: Value) -> PortRange | None:
    fields = item.fields(("protocol", "port", "endPort"))
    if not item.is_mapping:
        return None
    protocol = read_protocol_word(fields.get("protocol"))
    end = fields.get("endPort")
    port = fields.get("port")
    if port is None:
        if end is not None:
            end.error("may not be specified when port is not")
        return None if protocol is None else PortRange(protocol)
    name = _port_name(port)
    if name is not None:
        if end is not None:
            end.error("may not be specified when port is a name")
        if not is_port_name(name):
            hint = "; write the number without quotes" if name.isdecimal() else ""
            port.error(
                f'"{shorten(name)}" is no port name: 1 to 15 letters, digits and hyphens, '
                f"at least one letter{hint}"
            )
            return None
        return None if protocol is None else PortRange(protocol, 0, 0, name.lower())
    low = port.integer(1, HIGHEST_PORT)
    high = end.integer(1, HIGHEST_PORT) if end is not None else low
    if protocol is None or low is None or high is None:
        return None
    if end is not None and high < low:
        end.error(f"must be greater than or equal to port {low}")
    return PortRange(protocol, low, max(low, high))


def _port_name(port: Value) -> str | None:
    """Return the port as a name: quoted, or plain and read as one (`9p`), never as a number."""
    node = port.node
    if not isinstance(node, Scalar) or port.is_null:
        return None
    worded = node.text[:1].isalpha() or is_port_name(node.text)
    if node.plain and (not worded or _OTHER_BASE.fullmatch(node.text)):
        return None
    return port.text()
