"""The smallest change of a policy that would let a refused packet or request pass.

Written in the words and the notation of the policy's own format, ready to be pasted under the
field that it names.
"""

from typing import NamedTuple

from firewall.identities.labels import K8S, POD_NAMESPACE, RESERVED
from firewall.policy.conditions import PROTOCOL_WORDS, Condition, Traffic, own_labels
from firewall.policy.http_match import split_header_rule
from firewall.policy.model import LabelPeer, Peer

_KUBERNETES = frozenset({"NetworkPolicy"})
_ENTITIES = frozenset(
    {
        "host",
        "remote-node",
        "world",
        "world-ipv4",
        "world-ipv6",
        "init",
        "ingress",
        "unmanaged",
        "health",
        "kube-apiserver",
    }
)
_YAML_SIGNS = frozenset("{}[],:#&*?|<>=!%@`\\\"' ")
_ICMP_FAMILIES = {1: "IPv4", 58: "IPv6"}


class Gap(NamedTuple):
    """What keeps the closest rule from allowing the traffic.

    `kind` and `namespace` are of the object that holds the rule; `peer` is whom the row that came
    closest means, None = anyone; `conditions` are all of its conditions.
    """

    kind: str
    namespace: str
    peer: Peer | None
    conditions: tuple[Condition, ...]


def advice(gap: Gap | None, traffic: Traffic, *, incoming: bool) -> str:
    """Say what to add, and where.

    Args:
        gap: the closest rule and what is wrong with it, None if there is no rule at all.
        traffic: the other side and the port.
        incoming: whether the refusing side is ingress.
    """
    if gap is None:
        side = "ingress" if incoming else "egress"
        nobody = Gap("", "", None, ())
        return f"{side} rule with {_peer(nobody, traffic, incoming)} and {_port('', traffic)}"
    changes = []
    for failed in gap.conditions:
        if failed.held:
            continue
        match failed.what:
            case "peer":
                changes.append(_peer(gap, traffic, incoming))
            case "port":
                changes.append(_port(gap.kind, traffic))
            case "authentication":
                changes.append("authentication of the peer")
            case "TLS":
                changes.append(f"a rule of the port for {failed.actual}")
            case "serverName":
                name = failed.actual
                changes.append(
                    f"- {name} under serverNames" if name else "terminatingTLS without serverNames"
                )
            case _:
                changes.append(_http_item(gap.conditions))
                break
    return "; ".join(changes)


def _http_item(conditions: tuple[Condition, ...]) -> str:
    """Write the item that allows this request and as little else as the closest one does."""
    fields = []
    headers = []
    for one in conditions:
        if one.what in ("method", "path", "host"):
            value = one.expected if one.held else literally(one.actual)
            fields.append(f"{one.what}: {_scalar(value)}")
        elif one.what == "header" and one.held:
            headers.append(_scalar(one.expected))
        elif one.what == "header" and one.actual:
            name, _ = split_header_rule(one.expected)
            headers.append(_scalar(f"{name}: {one.actual}"))
    if headers:
        fields.append(f"headers: [{', '.join(headers)}]")
    return f"- {{{', '.join(fields)}}} under rules.http"


def literally(text: str) -> str:
    """Write a pattern that matches just this text."""
    return "".join(f"\\{c}" if c in "\\.+*?()|[]{}^$" else c for c in text)


def _scalar(text: str) -> str:
    """Quote a YAML scalar where it needs it; in single quotes only the quote itself is special."""
    quoted = "'" + text.replace("'", "''") + "'"
    return quoted if set(text) & _YAML_SIGNS or not text else text


def _peer(gap: Gap, traffic: Traffic, incoming: bool) -> str:
    word = "from" if incoming else "to"
    entity = next(
        (x.key for x in traffic.labels if x.source == RESERVED and x.key in _ENTITIES), None
    )
    if gap.kind in _KUBERNETES:
        return _kubernetes_peer(word, traffic)
    if not own_labels(traffic.labels):
        if entity is None or entity.startswith("world"):
            return f"- {traffic.prefix} under {word}CIDR"
        return f"- {entity} under {word}Entities"
    return f"- matchLabels: {_mapping(_labels(gap, traffic))} under {word}Endpoints"


def _labels(gap: Gap, traffic: Traffic) -> dict[str, str]:
    """Return the labels to ask for: under the keys that the rule asks for, else all there are."""
    labels = {label.key: label.value for label in own_labels(traffic.labels)}
    if isinstance(gap.peer, LabelPeer):
        asked = {key.name for key in gap.peer.selector.keys}
        wanted = {key: value for key, value in labels.items() if key in asked}
        missing = any(one.what == "peer" and not one.held for one in gap.conditions) and not wanted
        labels = labels if missing else wanted
    namespace = traffic.labels.get(K8S, POD_NAMESPACE)
    if namespace is not None and namespace != gap.namespace:
        labels[f"k8s:{POD_NAMESPACE}"] = namespace
    return labels


def _kubernetes_peer(word: str, traffic: Traffic) -> str:
    namespace = traffic.labels.get(K8S, POD_NAMESPACE)
    labels = {key: value for _, key, value in own_labels(traffic.labels)}
    if namespace is None:
        return f"- ipBlock: {{cidr: {traffic.prefix}}} under {word}"
    return (
        f"- podSelector: {{matchLabels: {_mapping(labels)}}} with namespaceSelector: "
        f"{{matchLabels: {{kubernetes.io/metadata.name: {namespace}}}}} under {word}"
    )


def _port(kind: str, traffic: Traffic) -> str:
    word = PROTOCOL_WORDS.get(traffic.protocol)
    if traffic.protocol in _ICMP_FAMILIES:
        family = _ICMP_FAMILIES[traffic.protocol]
        return f"- fields: [{{family: {family}, type: {traffic.port}}}] under icmps"
    if word is None:
        return "an entry without ports (no other covers this protocol)"
    if kind in _KUBERNETES:
        return f"- {{port: {traffic.port}, protocol: {word}}} under ports"
    return f'- {{port: "{traffic.port}", protocol: {word}}} under toPorts[].ports'


def _mapping(pairs: dict[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value or repr('')}" for key, value in pairs.items()) + "}"
