"""CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy, and Cilium's bare rules.

A rule has a subject and up to four lists of entries. Every `toPorts` item of an entry has layer-7
rules of its own, so an entry becomes one `PolicyEntry` per such item, all with the same peers.

Missing against empty (Cilium pkg/policy/utils/parserules.go):
    no peer field, ports or icmps given  -> every peer, these ports
    no peer field, no ports              -> nobody, but the subject is isolated
    a peer field that is an empty list   -> nobody, but the subject is isolated

Source: Cilium pkg/policy/api/rule.go, rule_validation.go.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace

from firewall.identities.labels import RESERVED, UNSPEC, LabelError, parse_label
from firewall.identities.selector import Selector
from firewall.policy.model import (
    Action,
    ObjectKey,
    Origin,
    Peer,
    PolicyEntry,
    PolicyObject,
    PortRange,
)
from firewall.policy.readers.document import Value, document_of
from firewall.policy.readers.l7 import read_listener, read_rules, read_server_names, read_tls
from firewall.policy.readers.metadata import origin_labels, read_metadata
from firewall.policy.readers.peers import PeerContext, peer_fields, read_peers
from firewall.policy.readers.ports import TCP, read_icmps, read_ports
from firewall.policy.readers.selectors import confine_subject, read_selector
from firewall.policy.readers.settings import REMOVED, UNSUPPORTED, ReaderSettings
from firewall.policy.verdict import TrafficDirection

NAMESPACED_KIND = "CiliumNetworkPolicy"
CLUSTERWIDE_KIND = "CiliumClusterwideNetworkPolicy"
RULE_KIND = "Rule"
"""Key kind of rules given without an object around them."""

AUTHENTICATION_MODES = ("disabled", "required", "test-always-fail")

_MAX_LOG_CHARACTERS = 32
_OBJECT_FIELDS = ("apiVersion", "kind", "metadata", "spec", "specs", "status")
_RULE_FIELDS = (
    "endpointSelector",
    "nodeSelector",
    "ingress",
    "ingressDeny",
    "egress",
    "egressDeny",
    "labels",
    "enableDefaultDeny",
    "description",
    "log",
)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """One of the four lists of a rule."""

    field: str
    direction: TrafficDirection
    action: Action

    @property
    def deny(self) -> bool:
        return self.action is Action.DENY


_SECTIONS = (
    _Section(field="ingress", direction=TrafficDirection.INGRESS, action=Action.ALLOW),
    _Section(field="ingressDeny", direction=TrafficDirection.INGRESS, action=Action.DENY),
    _Section(field="egress", direction=TrafficDirection.EGRESS, action=Action.ALLOW),
    _Section(field="egressDeny", direction=TrafficDirection.EGRESS, action=Action.DENY),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """What every entry of one rule shares."""

    origin: Origin
    subject: Selector
    is_node: bool
    peers: PeerContext
    default_deny: dict[TrafficDirection, bool]
    log: str


def read_policy(root: Value, settings: ReaderSettings, *, kind: str) -> PolicyObject | None:
    """Read a CiliumNetworkPolicy or CiliumClusterwideNetworkPolicy; None if it has no name."""
    root.fields((*_OBJECT_FIELDS, "description"))
    description = root.child("description")
    if description is not None:
        # Cilium's own Star Wars demo has it there; the CRD drops it.
        description.warning("belongs inside spec; here it is only a comment")
    metadata = read_metadata(
        root,
        default_namespace=settings.default_namespace,
        namespaced=kind == NAMESPACED_KIND,
    )
    rules = _rules_of(root)
    if not rules:
        root.error(f"invalid {kind} spec(s): empty policy; give spec or specs")
    if metadata is None:
        # Without a name nothing can be applied; the rules are still checked for their author.
        for rule in rules:
            read_rule(rule, settings, Origin(kind=kind, namespace="", name="", path=""), kind=kind)
        return None
    labels = origin_labels(kind, metadata)
    origin = Origin(
        kind=kind,
        namespace=metadata.namespace,
        name=metadata.name,
        path="",
        file=root.report.file,
        labels=labels,
    )
    entries = [e for rule in rules for e in read_rule(rule, settings, origin, kind=kind)]
    return PolicyObject(
        key=ObjectKey(kind=kind, namespace=metadata.namespace, name=metadata.name),
        labels=tuple(dict.fromkeys([*labels, *(x for e in entries for x in e.origin.labels)])),
        entries=tuple(entries),
        document=document_of(root),
        file=root.report.file,
    )


def _rules_of(root: Value) -> list[Value]:
    spec, specs = root.child("spec"), root.child("specs")
    return [*([spec] if spec else []), *(specs.items() if specs else [])]


def rule_name(rule: Value) -> str:
    """Return what names a rule without an object: its labels, or a digest of its content."""
    return ",".join(sorted(_rule_labels(rule.child("labels"), quiet=True))) or _digest(rule)


def read_bare_rules(name: str, rules: list[Value], settings: ReaderSettings) -> PolicyObject:
    """Read rules without an object around them, as `cilium policy import` took them.

    Rules with the same name (see `rule_name`) make one object; a rule without labels is named by
    its content, so importing it twice changes nothing.
    """
    file = rules[0].report.file
    origin = Origin(kind=RULE_KIND, namespace="", name=name, path="", file=file)
    entries = [e for rule in rules for e in read_rule(rule, settings, origin, kind=RULE_KIND)]
    return PolicyObject(
        key=ObjectKey(kind=RULE_KIND, namespace="", name=name),
        labels=tuple(dict.fromkeys(x for e in entries for x in e.origin.labels)),
        entries=tuple(entries),
        document={"apiVersion": "v1", "kind": "List", "items": [r.plain() for r in rules]},
        file=file,
    )


def _digest(rule: Value) -> str:
    text = json.dumps(rule.plain(), sort_keys=True)
    return f"rule-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:12]}"


def read_rule(
    value: Value, settings: ReaderSettings, origin: Origin, *, kind: str
) -> list[PolicyEntry]:
    """Read one rule (`spec`, or an item of `specs`) into entries.

    Args:
        value: the rule.
        settings: see there.
        origin: of the object; path, line, column and the rule's labels are added.
        kind: of the object, decides which selectors are allowed and which namespace is meant.
    """
    fields = value.fields(_RULE_FIELDS)
    if not value.is_mapping:
        return []
    labels = (*_rule_labels(fields.get("labels")), *origin.labels)
    subject = _subject(value, fields, settings, origin, kind)
    if "description" in fields:
        fields["description"].text()
    log = _log(fields["log"]) if "log" in fields else ""
    sections = {s.field: fields[s.field].items() for s in _SECTIONS if s.field in fields}
    if not any(sections.values()):
        value.error(
            "rule must have at least one of ingress, ingressDeny, egress, egressDeny, "
            "with at least one entry"
        )
    rule = _Rule(
        origin=replace(origin, labels=labels),
        subject=subject,
        is_node="nodeSelector" in fields,
        peers=PeerContext(
            settings=settings,
            namespace=origin.namespace,
            subject_is_init=subject.has_key("init", (RESERVED,)),
            confined=kind != RULE_KIND,
        ),
        default_deny=_default_deny(fields, sections),
        log=log,
    )
    return [
        entry
        for section in _SECTIONS
        for item in sections.get(section.field, [])
        for entry in _read_entry(item, section, rule)
    ]


def _subject(
    value: Value, fields: dict[str, Value], settings: ReaderSettings, origin: Origin, kind: str
) -> Selector:
    node, endpoint = fields.get("nodeSelector"), fields.get("endpointSelector")
    if node is not None and endpoint is not None:
        node.error("rule cannot have both endpointSelector and nodeSelector")
    elif node is not None and kind == NAMESPACED_KIND:
        node.error(
            f"rule cannot have nodeSelector: it needs a {CLUSTERWIDE_KIND}, "
            f"a {NAMESPACED_KIND} selects endpoints"
        )
    elif node is not None:
        settings.require("host-policy", node)
        return read_selector(node)
    if endpoint is None:
        if node is None:
            value.error("rule must have one of endpointSelector or nodeSelector; {} selects all")
        return Selector()
    selector = read_selector(endpoint)
    if kind == NAMESPACED_KIND:
        return confine_subject(endpoint, selector, origin.namespace)
    return selector


def _rule_labels(value: Value | None, *, quiet: bool = False) -> tuple[str, ...]:
    """Read a rule's free labels; items are structures, or texts as `cilium policy` printed."""
    if value is None:
        return ()
    if quiet:
        # The same labels are read with their problems told when the rule itself is read.
        value = Value(value.node, value.path, type(value.report)(value.report.file))
    found = []
    for item in value.items():
        if not item.is_mapping:
            text = item.text()
        else:
            parts = item.fields(("key", "value", "source"))
            texts = {name: part.text() or "" for name, part in parts.items()}
            if not texts.get("key"):
                item.error("needs key")
                continue
            text = f"{texts.get('source') or UNSPEC}:{texts['key']}={texts.get('value', '')}"
        if text is None:
            continue
        try:
            found.append(str(parse_label(text)))
        except LabelError as error:
            item.error(str(error))
    return tuple(dict.fromkeys(found))


def _log(value: Value) -> str:
    fields = value.fields(("value",))
    if "value" not in fields:
        return ""
    text = fields["value"].text() or ""
    if len(text) > _MAX_LOG_CHARACTERS:
        fields["value"].error(f"is longer than {_MAX_LOG_CHARACTERS} characters")
    if _UNPRINTABLE.search(text):
        fields["value"].error("holds a character that cannot be printed")
    return text


def _default_deny(
    fields: dict[str, Value], sections: dict[str, list[Value]]
) -> dict[TrafficDirection, bool]:
    """Return whether the rule isolates its subject, per direction: said, or if it has entries."""
    directions = {"ingress": TrafficDirection.INGRESS, "egress": TrafficDirection.EGRESS}
    filled = {
        word: any(
            sections.get(section.field) for section in _SECTIONS if section.direction is direction
        )
        for word, direction in directions.items()
    }
    wanted = dict(filled)
    if "enableDefaultDeny" in fields:
        for word, item in fields["enableDefaultDeny"].fields(directions).items():
            answer = item.boolean()
            if answer and not filled[word]:
                item.warning(f"has no effect: the rule has no {word} entries; write {word}: [{{}}]")
            if answer is not None:
                wanted[word] = answer
    for word in directions:
        if word in sections and not filled[word]:
            fields[word].warning(
                f"is an empty list, which does not isolate; write {word}: [{{}}] to allow nothing"
            )
    return {direction: wanted[word] for word, direction in directions.items()}


def _read_entry(item: Value, section: _Section, rule: _Rule) -> list[PolicyEntry]:
    kinds = peer_fields(section.direction, deny=section.deny)
    known = [*kinds, "toPorts", "icmps"]
    if not section.deny:
        known.append("authentication")
    fields = item.fields(known, refused=_refused(section))
    if not item.is_mapping:
        return []
    peers = read_peers(fields, kinds, rule.peers)
    authentication = ""
    if "authentication" in fields:
        authentication = _authentication(fields["authentication"], rule.peers.settings)
    entry = PolicyEntry(
        origin=replace(rule.origin, path=item.path, line=item.mark.line, column=item.mark.column),
        direction=section.direction,
        action=section.action,
        subject=rule.subject,
        subject_is_node=rule.is_node,
        peers=peers,
        ports=None,
        authentication=authentication,
        default_deny=rule.default_deny[section.direction],
        log=rule.log,
    )
    port_items = fields["toPorts"].items() if "toPorts" in fields else []
    icmps = fields["icmps"].items() if "icmps" in fields else []
    if port_items and icmps:
        fields["icmps"].error(
            "the icmps block may only be present without toPorts; write two entries"
        )
    if icmps:
        return [replace(entry, ports=read_icmps(fields["icmps"]))]
    if port_items:
        return [_read_port_item(port, section, entry, rule.peers.settings) for port in port_items]
    return [replace(entry, peers=nobody_if_missing(peers))]


def nobody_if_missing(peers: tuple[Peer, ...] | None) -> tuple[Peer, ...]:
    """Return the peers of an entry without ports: a missing list then means nobody."""
    return () if peers is None else peers


def _refused(section: _Section) -> dict[str, str]:
    """Return the fields an author may expect in this list, with why they are refused."""
    word = "from" if section.direction is TrafficDirection.INGRESS else "to"
    other = "to" if word == "from" else "from"
    refused = {
        f"{word}Requires": REMOVED[f"{word}Requires"],
        f"{word}Groups": UNSUPPORTED[f"{word}Groups"],
    }
    if section.deny:
        refused["toFQDNs"] = "names cannot be denied; deny addresses with toCIDRSet"
        refused["authentication"] = "denied traffic is not authenticated"
    for name in ("Endpoints", "CIDR", "CIDRSet", "Entities", "Nodes"):
        refused[f"{other}{name}"] = f'is not for {section.field}; did you mean "{word}{name}"?'
    return refused


def _authentication(value: Value, settings: ReaderSettings) -> str:
    fields = value.fields(("mode",))
    if "mode" not in fields:
        if value.is_mapping:
            value.error(f"needs mode: {', '.join(AUTHENTICATION_MODES)}")
        return ""
    mode = fields["mode"].word(AUTHENTICATION_MODES) or ""
    if mode not in ("", "disabled"):
        settings.require("authentication", fields["mode"])
    return mode


_DENY_PORT_REFUSED = dict.fromkeys(
    ("rules", "terminatingTLS", "originatingTLS", "serverNames", "listener"),
    "is not for deny entries: what is denied is denied whole",
)


def _read_port_item(
    item: Value, section: _Section, entry: PolicyEntry, settings: ReaderSettings
) -> PolicyEntry:
    known = ("ports",) if section.deny else ("ports", *_DENY_PORT_REFUSED)
    fields = item.fields(known, refused=_DENY_PORT_REFUSED if section.deny else None)
    errors_before = item.report.error_count
    ports = read_ports(fields["ports"], settings) if "ports" in fields else ()
    ingress = section.direction is TrafficDirection.INGRESS
    rules = fields.get("rules")
    if not ports and rules is None and item.report.error_count == errors_before:
        item.warning("lists no ports and matches nothing")
    l7 = read_rules(rules, settings) if rules is not None else None
    terminating = fields.get("terminatingTLS")
    names = fields.get("serverNames")
    listener = fields.get("listener")
    if rules is not None:
        _check_rules(rules, fields.get("ports"), ports, entry)
    if names is not None and rules is not None and terminating is None:
        names.error("serverNames are not allowed with L7 rules without TLS termination")
    originating = fields.get("originatingTLS")
    for field in (names, terminating, originating):
        if field is not None:
            _check_tls(field, fields.get("ports"), ports, entry)
    for field in (terminating, originating):
        if field is not None and l7 is not None and l7.kind == "dns":
            field.error("is not allowed with DNS rules")
    if names is not None and originating is not None and terminating is None:
        names.warning("matches nothing: TLS begins at the proxy, and clear text names no server")
    if listener is not None and ingress:
        listener.error("listener is not allowed on ingress")
    elif listener is not None and rules is not None:
        listener.error("listener is not allowed with L7 rules")
    return replace(
        entry,
        origin=replace(entry.origin, path=item.path, line=item.mark.line, column=item.mark.column),
        ports=ports,
        l7=l7,
        server_names=read_server_names(names, settings) if names is not None else (),
        terminating_tls=read_tls(terminating, settings) if terminating is not None else None,
        originating_tls=read_tls(originating, settings) if originating is not None else None,
        listener=read_listener(listener, settings) if listener is not None else None,
    )


def _check_tls(
    field: Value, written: Value | None, ports: tuple[PortRange, ...], entry: PolicyEntry
) -> None:
    """Refuse server names and TLS contexts where the proxy could not apply them."""
    if any(port.protocol != TCP for port in ports):
        place = written if written is not None else field
        place.warning("TLS is read in TCP; other protocols of these ports stay closed")
    if entry.subject_is_node:
        field.error("is not supported on hosts yet")


def _check_rules(
    rules: Value, written: Value | None, ports: tuple[PortRange, ...], entry: PolicyEntry
) -> None:
    """Refuse layer-7 rules where no proxy could apply them."""
    dns = rules.child("dns")
    ingress = entry.direction is TrafficDirection.INGRESS
    if dns is not None:
        if ingress:
            dns.error("DNS rules are not allowed on ingress")
        if not ports:
            dns.error("port 53 must be specified for DNS rules")
        if any(port.low != port.high for port in ports if port != PortRange(port.protocol)):
            dns.error("DNS rules cannot be used with a range of ports")
    elif any(port.protocol != TCP for port in ports):
        place = written if written is not None else rules
        place.error("L7 rules can only apply to TCP (say protocol: TCP), except for DNS rules")
    elif not ports:
        rules.warning("belongs to no ports and matches nothing")
    if any(port == PortRange(port.protocol) for port in ports):
        rules.error("L7 rules can not be used when a port is 0")
    if entry.subject_is_node and (ingress or dns is None):
        side = "ingress" if ingress else "egress, except for DNS"
        rules.error(f"L7 policy is not supported on host {side} yet")
