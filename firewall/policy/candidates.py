"""Changes that might let refused traffic pass, smallest first. Whether they do is tried elsewhere.

For a default deny: the one condition of the closest rule that failed is widened; or the object that
isolates the endpoint gets an entry for exactly this traffic; or there is a new policy. For a deny
rule: the traffic is cut out of it (an `except`, a port out of a range, one peer of several, one
label value), and only if that cannot be said is the rule taken away.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from conntrack.address import Prefix, parse_prefix, prefix_contains
from firewall.identities.labels import CLUSTER, K8S, POD_NAMESPACE, RESERVED, LabelSet
from firewall.identities.workload import METADATA_NAME
from firewall.policy.advice import literally
from firewall.policy.edits import Append, Edit, EditError, Path, Put, Take, parse_path, place
from firewall.policy.explanation import Request, Step, Walk, Written
from firewall.policy.http_match import split_header_rule
from firewall.policy.model import ObjectKey, PolicyObject

CNP, CCNP, KNP = "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy", "NetworkPolicy"

_TIERED = ("ClusterNetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy")
_SECTIONS = ("ingress", "ingressDeny", "egress", "egressDeny")
_PORT_WORDS = {6: "TCP", 17: "UDP", 132: "SCTP"}
_FAMILIES = {1: "IPv4", 58: "IPv6"}
_HTTP_FIELDS = frozenset({"method", "path", "host", "header", "headerMatch"})
_NO_NAME = re.compile(r"[^a-z0-9]+")
_NAME_CHARACTERS = 63  # RFC 1123 section 2.1
_IMPLIED = (CLUSTER, POD_NAMESPACE)


class Candidate(NamedTuple):
    """One possible change.

    `key` and `edits` change an object; `document` not None is a new one, whose key `key` is;
    `edits` None = the object goes. `says` is for people.
    """

    key: ObjectKey
    says: str
    edits: tuple[Edit, ...] | None = ()
    document: dict[str, Any] | None = None


class Case(NamedTuple):
    """What was refused where.

    Attributes:
        walk: the refusing side.
        objects: the policies by key.
        subject, peer: labels of the two ends, seen from that side.
        prefix: the peer's address.
        protocol, port: what is asked for.
        request: the http request, if it is one.
        names: of both ends, for a new policy's name.
    """

    walk: Walk
    objects: Mapping[ObjectKey, PolicyObject]
    subject: LabelSet
    peer: LabelSet
    prefix: Prefix
    protocol: int
    port: int
    request: Request | None
    names: tuple[str, str]

    @property
    def incoming(self) -> bool:
        """Whether the refusing side is ingress."""
        return self.walk.direction == "ingress"

    @property
    def word(self) -> str:
        """What peer fields of this direction begin with."""
        return "from" if self.incoming else "to"

    def object_of(self, rule: Written) -> PolicyObject | None:
        """Return the object that a rule was written in."""
        return self.objects.get(ObjectKey(kind=rule.kind, namespace=rule.namespace, name=rule.name))


def candidates(case: Case) -> Iterator[Candidate]:
    """Yield changes to try, smallest first."""
    denies = [step for step in case.walk.steps if step.decided and step.action == "deny"]
    if denies:
        for step in denies:
            yield from _against_deny(case, step)
        return
    closest = case.walk.closest
    if closest is not None:
        yield from _widened(case, closest)
    rules = [*([closest.rule] if closest is not None else []), *case.walk.isolated_by]
    for rule in dict.fromkeys(rules):
        yield from _further_entry(case, rule)
    yield from _new_policy(case)


# --- the closest rule, widened ----------------------------------------------------------------


def _widened(case: Case, step: Step) -> Iterator[Candidate]:
    """Widen the closest rule where just one kind of condition failed."""
    one = case.object_of(step.rule)
    if one is None:
        return
    failed = {"http" if c.what in _HTTP_FIELDS else c.what for c in step.failed}
    path = parse_path(step.rule.path)
    entry = _entry_path(path)
    if failed == {"peer"}:
        for field, item in _peer_items(case, one, entry):
            says = f"{step.rule.object_name}: let {_of(item)} in under {field}"
            yield Candidate(one.key, says, (Append((*entry, field), item),))
    elif failed == {"port"}:
        for edit in _port_edits(case, one, path, entry):
            yield Candidate(one.key, f"{step.rule.object_name}: add the port", (edit,))
    elif failed == {"http"} and case.request is not None:
        item = _http_item(step, case.request)
        edit = Append((*path, "rules", "http"), item)
        yield Candidate(one.key, f"{step.rule.object_name}: add an http rule", (edit,))
    elif failed == {"serverName"} and (name := step.failed[0].actual):
        says = f"{step.rule.object_name}: name {name} as well"
        yield Candidate(one.key, says, (Append((*path, "serverNames"), name),))
    elif failed == {"authentication"}:
        says = f"{step.rule.object_name}: no longer demand authentication"
        yield Candidate(one.key, says, (Take((*entry, "authentication")),))


def _entry_path(path: Path) -> Path:
    """Return the path of the entry that a path is in: up to and with the index of its list."""
    for at, part in enumerate(path):
        if part in _SECTIONS:
            return path[: at + 2]
    return path


def _root(path: Path) -> Path | None:
    """Return where the lists of a rule are."""
    for at, part in enumerate(path):
        if part in _SECTIONS:
            return path[:at]
    return path if path[:1] == ("spec",) else None


def _of(item: Any) -> str:
    if isinstance(item, dict):
        if "cidr" in item:
            return str(item["cidr"])
        labels = item.get("matchLabels") or item.get("podSelector", {}).get("matchLabels") or item
        return ", ".join(f"{key}={value}" for key, value in labels.items())
    return str(item)


def _peer_items(case: Case, one: PolicyObject, entry: Path) -> Iterator[tuple[str, Any]]:
    """Yield the field and the item by which the peer can be named in an entry of an object."""
    if one.key.kind == KNP:
        yield case.word, _kubernetes_peer(case, one.key.namespace)
        return
    present = _value(one.document, entry) or {}
    asked = _asked_keys(present, f"{case.word}Endpoints")
    yield from _named_peer(case, one.key.namespace, asked)


def _named_peer(case: Case, namespace: str, asked: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the ways in which a Cilium policy can name the peer, the most telling first."""
    entity = next((label.key for label in case.peer if label.source == RESERVED), None)
    if case.peer.get(K8S, POD_NAMESPACE) is not None or any(
        label.source not in (RESERVED, "cidr", "fqdn") for label in case.peer
    ):
        labels = _match_labels(case.peer, namespace, asked)
        yield f"{case.word}Endpoints", {"matchLabels": labels}
        labels = _match_labels(case.peer, namespace, set())
        yield f"{case.word}Endpoints", {"matchLabels": labels}
    elif entity is None or entity.startswith("world"):
        yield f"{case.word}CIDR", str(case.prefix)
        yield f"{case.word}CIDRSet", {"cidr": str(case.prefix)}
    if entity is not None and not entity.startswith("world"):
        yield f"{case.word}Entities", entity


def _match_labels(labels: LabelSet, namespace: str, asked: set[str]) -> dict[str, str]:
    """Return labels to ask for: under the keys asked for before if the peer has them, else all."""
    own = {
        (label.key if label.source == K8S else f"{label.source}:{label.key}"): label.value
        for label in labels
        if label.source != RESERVED
        and not (label.source == K8S and label.key in (*_IMPLIED, METADATA_NAME))
        and not label.key.startswith("io.cilium.k8s.namespace.labels.")
    }
    chosen = {key: value for key, value in own.items() if key in asked} or own
    home = labels.get(K8S, POD_NAMESPACE)
    if home is not None and (home != namespace or not chosen):
        chosen = {**chosen, f"{K8S}:{POD_NAMESPACE}": home}
    return chosen


def _asked_keys(entry: Any, field: str) -> set[str]:
    """Return the label keys that an entry's peers are chosen by."""
    keys: set[str] = set()
    for item in (entry.get(field) or []) if isinstance(entry, dict) else []:
        keys.update(item.get("matchLabels") or {})
        keys.update(one.get("key", "") for one in item.get("matchExpressions") or [])
    return keys


def _kubernetes_peer(case: Case, namespace: str) -> dict[str, Any]:
    home = case.peer.get(K8S, POD_NAMESPACE)
    if home is None:
        return {"ipBlock": {"cidr": str(case.prefix)}}
    labels = _match_labels(case.peer, home, set())
    labels.pop(f"{K8S}:{POD_NAMESPACE}", None)
    peer: dict[str, Any] = {"podSelector": {"matchLabels": labels} if labels else {}}
    if home != namespace:
        peer["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": home}}
    return peer


def _port_edits(case: Case, one: PolicyObject, path: Path, entry: Path) -> Iterator[Edit]:
    """Yield where the port can be added to a rule that has the right peer."""
    if one.key.kind == KNP:
        if case.protocol in _PORT_WORDS:
            yield Append((*entry, "ports"), _kubernetes_port(case))
        return
    present = _value(one.document, entry) or {}
    if case.protocol in _FAMILIES:
        if present.get("icmps"):
            yield Append((*entry, "icmps"), {"fields": [_icmp_field(case)]})
        return
    if case.protocol in _PORT_WORDS and not present.get("icmps"):
        rules = _value(one.document, path) or {}
        restricted = set(rules) - {"ports"}
        if path != entry and not restricted:
            yield Append((*path, "ports"), _cilium_port(case))
        for port_rule in _port_rules(case):
            yield Append((*entry, "toPorts"), port_rule)


def _port_rules(case: Case) -> Iterator[dict[str, Any]]:
    """Yield `toPorts` items for exactly this port; for a request first with its http rule."""
    ports = [_cilium_port(case)]
    if case.request is not None:
        yield {"ports": ports, "rules": {"http": [_http_item(None, case.request)]}}
    yield {"ports": ports}


def _cilium_port(case: Case) -> dict[str, str]:
    return {"port": str(case.port), "protocol": _PORT_WORDS[case.protocol]}


def _kubernetes_port(case: Case) -> dict[str, Any]:
    return {"port": case.port, "protocol": _PORT_WORDS[case.protocol]}


def _icmp_field(case: Case) -> dict[str, Any]:
    return {"family": _FAMILIES[case.protocol], "type": case.port}


def _http_item(step: Step | None, request: Request) -> dict[str, Any]:
    """Return an item for this request that asks for as little else as the closest one does."""
    if step is None:
        return {"method": literally(_text(request.method)), "path": literally(_text(request.path))}
    item: dict[str, Any] = {}
    headers = []
    for one in step.conditions:
        if one.what in ("method", "path", "host"):
            item[one.what] = one.expected if one.held else literally(one.actual)
        elif one.what == "header" and one.held:
            headers.append(one.expected)
        elif one.what == "header" and one.actual:
            name, _ = split_header_rule(one.expected)
            headers.append(f"{name}: {one.actual}")
    if headers:
        item["headers"] = headers
    return item or _http_item(None, request)


def _text(data: bytes) -> str:
    return data.decode("latin-1")


def _value(document: Any, path: Path) -> Any:
    try:
        return place(document, path)
    except EditError:
        return None


# --- one more entry, or a new policy ----------------------------------------------------------


def _further_entry(case: Case, rule: Written) -> Iterator[Candidate]:
    """Add an entry for exactly this traffic to an object that speaks about the endpoint."""
    one = case.object_of(rule)
    root = _root(parse_path(rule.path))
    if one is None or root is None or one.key.kind not in (CNP, CCNP, KNP):
        return
    for entry in _exact_entries(case, one.key.kind, one.key.namespace):
        says = f"{rule.object_name}: add an {case.walk.direction} rule for this traffic"
        yield Candidate(one.key, says, (Append((*root, case.walk.direction), entry),))


def _exact_entries(case: Case, kind: str, namespace: str) -> Iterator[dict[str, Any]]:
    """Yield entries that allow this peer, port and request, and nothing else if it can be said."""
    if kind == KNP:
        if case.protocol in _PORT_WORDS:
            peer = _kubernetes_peer(case, namespace)
            yield {case.word: [peer], "ports": [_kubernetes_port(case)]}
        return
    for field, item in _named_peer(case, namespace, set()):
        named = {field: [item]}
        if case.protocol in _PORT_WORDS:
            for port_rule in _port_rules(case):
                yield {**named, "toPorts": [port_rule]}
        elif case.protocol in _FAMILIES:
            yield {**named, "icmps": [{"fields": [_icmp_field(case)]}]}
        else:
            yield named


def _new_policy(case: Case) -> Iterator[Candidate]:
    """Make a policy of its own for this traffic.

    It may select others too, so it isolates nobody (enableDefaultDeny), unless http rules are to
    refuse other requests: those of a policy that does not isolate only observe.
    """
    namespace = case.subject.get(K8S, POD_NAMESPACE)
    kind = CCNP if namespace is None else CNP
    name = _free_name(case, kind, namespace or "")
    key = ObjectKey(kind=kind, namespace=namespace or "", name=name)
    labels = _match_labels(case.subject, namespace or "", set())
    if namespace is not None:
        labels.pop(f"{K8S}:{POD_NAMESPACE}", None)
    if not labels and namespace is None:
        labels = {str(label): "" for label in case.subject}
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    for entry in _exact_entries(case, kind, namespace or ""):
        document: dict[str, Any] = {
            "apiVersion": "cilium.io/v2",
            "kind": kind,
            "metadata": metadata,
            "spec": {
                "endpointSelector": {"matchLabels": labels} if labels else {},
                case.walk.direction: [entry],
            },
        }
        if case.request is None:
            document["spec"]["enableDefaultDeny"] = {case.walk.direction: False}
        yield Candidate(key, f"new policy {key}", document=document)


def _free_name(case: Case, kind: str, namespace: str) -> str:
    source, destination = (_NO_NAME.sub("-", name.lower()).strip("-") for name in case.names)
    base = f"allow-{source}-to-{destination}"[: _NAME_CHARACTERS - 4].strip("-")
    name, at = base, 1
    while ObjectKey(kind=kind, namespace=namespace, name=name) in case.objects:
        at += 1
        name = f"{base}-{at}"
    return name


# --- deny rules -------------------------------------------------------------------------------


def _against_deny(case: Case, step: Step) -> Iterator[Candidate]:
    """Cut the traffic out of a deny rule; at last take the rule away."""
    one = case.object_of(step.rule)
    if one is None:
        return
    path = parse_path(step.rule.path)
    entry = _entry_path(path)
    name = f"{step.rule.object_name} {step.rule.path}"
    if one.key.kind not in _TIERED:
        yield from _without_address(case, one, entry, name)
        yield from _without_port(case, one, path, name)
        yield from _without_label(case, one, entry, name)
    yield from _without_peer(case, one, entry, name)
    yield from _without_entry(one, entry, name)


def _without_address(case: Case, one: PolicyObject, entry: Path, name: str) -> Iterator[Candidate]:
    """Except the address from the prefixes that are denied."""
    present = _value(one.document, entry) or {}
    address = str(case.prefix)
    for field in (f"{case.word}CIDR", f"{case.word}CIDRSet"):
        listed = present.get(field) or []
        sets = [dict(x) if isinstance(x, dict) else {"cidr": x} for x in listed]
        changed = []
        for item in sets:
            if not _covers(item.get("cidr"), case.prefix):
                changed.append(item)
            elif _prefix(item["cidr"]) != case.prefix:
                changed.append({**item, "except": [*(item.get("except") or []), address]})
        if changed and changed != sets:
            edits: tuple[Edit, ...] = (Put((*entry, field), changed),)
            if field.endswith("CIDR"):
                edits = (
                    Take((*entry, field)),
                    *(Append((*entry, f"{field}Set"), x) for x in changed),
                )
            yield Candidate(one.key, f"{name}: no longer deny {address}", edits)


def _prefix(text: str) -> Prefix | None:
    try:
        return parse_prefix(text)
    except ValueError:
        return None


def _covers(text: Any, prefix: Prefix) -> bool:
    outer = _prefix(text) if isinstance(text, str) else None
    return outer is not None and prefix_contains(outer, prefix)


def _without_port(case: Case, one: PolicyObject, path: Path, name: str) -> Iterator[Candidate]:
    """Take the port out of a list or a range of ports."""
    rule = _value(one.document, path) or {}
    ports = rule.get("ports") if isinstance(rule, dict) else None
    if not isinstance(ports, list) or case.protocol not in _PORT_WORDS:
        return
    says = f"{name}: no longer deny port {case.port}/{_PORT_WORDS[case.protocol]}"
    left: list[dict[str, Any]] = []
    for item in ports:
        left += _port_rest(item, case)
    if left and left != ports:
        yield Candidate(one.key, says, (Put((*path, "ports"), left),))


def _port_rest(item: Any, case: Case) -> Iterator[dict[str, Any]]:
    """Yield what is left of one item of `ports` without the port."""
    protocol = str(item.get("protocol") or "ANY").upper()
    word = _PORT_WORDS[case.protocol]
    low = str(item.get("port", ""))
    if protocol not in (word, "ANY") or not low.isdecimal() or low == "0":
        yield item
        return
    first, last = int(low), int(item.get("endPort") or low)
    if not first <= case.port <= last:
        yield item
        return
    if protocol == "ANY":
        yield from ({**item, "protocol": other} for other in _PORT_WORDS.values() if other != word)
    plain = {key: value for key, value in item.items() if key != "endPort"} | {"protocol": word}
    for start, end in ((first, case.port - 1), (case.port + 1, last)):
        if start <= end:
            yield {**plain, "port": str(start), **({"endPort": end} if end > start else {})}


def _without_label(case: Case, one: PolicyObject, entry: Path, name: str) -> Iterator[Candidate]:
    """Leave the peer out by a label that the rule does not ask for."""
    field = f"{case.word}Endpoints"
    present = _value(one.document, entry) or {}
    items = present.get(field) or []
    asked = _asked_keys(present, field)
    labels = _match_labels(case.peer, case.peer.get(K8S, POD_NAMESPACE) or "", set())
    for key, value in labels.items():
        if key in asked or key.startswith(f"{K8S}:io."):
            continue
        unless = {"key": key, "operator": "NotIn", "values": [value]}
        edits = tuple(
            Append((*entry, field, at, "matchExpressions"), unless) for at in range(len(items))
        )
        if edits:
            yield Candidate(one.key, f"{name}: no longer deny {key}={value}", edits)


def _without_peer(case: Case, one: PolicyObject, entry: Path, name: str) -> Iterator[Candidate]:
    """Take one of several peers out."""
    present = _value(one.document, entry) or {}
    for field, items in present.items() if isinstance(present, dict) else ():
        if field.startswith(case.word) and isinstance(items, list) and len(items) > 1:
            for at, item in enumerate(items):
                says = f"{name}: no longer deny {_of(item)}"
                yield Candidate(one.key, says, (Take((*entry, field, at)),))


def _without_entry(one: PolicyObject, entry: Path, name: str) -> Iterator[Candidate]:
    """Take the rule away: from its list, with its list, or with the whole object."""
    says = f"{name}: take the deny rule away; whatever else it denied is then decided without it"
    listed = _value(one.document, entry[:-1])
    if isinstance(listed, list) and len(listed) > 1:
        yield Candidate(one.key, says, (Take(entry),))
    elif one.key.kind in _TIERED:
        yield Candidate(one.key, says, (Take(entry[:-1]),))
    else:
        # `{}` denies nobody and keeps the endpoint isolated, as it was.
        yield Candidate(one.key, says, (Put(entry, {}),))
    gone = f"{one.key}: delete the policy; whatever else it denied or isolated goes on without it"
    yield Candidate(one.key, gone, None)
