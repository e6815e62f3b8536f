"""What an operator says about an endpoint, in a file or to the API: the same words in both.

A declaration is what is wanted; `roster` makes an endpoint of it. Written as YAML or JSON:

    name: deathstar
    addresses: [10.0.1.2, fd00::2]              # or ips: [...], or ip: 10.0.1.2
    labels: [org=empire, k8s:class=deathstar]   # or a mapping; without a source it is k8s
    namespace: default
    netns: deathstar          # or interface: veth7; neither = the address alone is known
    ports: [http:80, dns:53/udp]   # or {name: http, port: 80, protocol: TCP}
    audit: off
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Protocol, TypeVar

import yaml

from conntrack.address import format_address, parse_address, why_unusable
from firewall.agent.document import NOWHERE, DocumentError, Place, Reader, Value, is_null
from firewall.identities.labels import (
    K8S,
    NO_LABELS,
    POD_NAMESPACE,
    RESERVED,
    Label,
    LabelError,
    LabelSet,
    parse_label,
)
from firewall.identities.reserved import RESERVED_LABELS, Reserved
from firewall.policy.snapshot import NamedPortRow

_KEYS = (
    "name", "namespace", "addresses", "ip", "ips", "labels", "netns", "interface", "ports", "audit",
)  # fmt: skip

_ADDRESS_KEYS = ("addresses", "ips", "ip")
"""Words for one thing: ours, and those of policy tests and of the command line."""

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
"""Protocols that have ports, by IANA number."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_NAMESPACE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")  # it is a label's value
# IANA service names (RFC 6335 section 5.1) without the rule on hyphens, as Cilium takes them.
_PORT_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9-]{1,15}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """One wanted endpoint.

    Attributes:
        name: unique on the node.
        namespace: as in Kubernetes; becomes the label `k8s:io.kubernetes.pod.namespace`.
        addresses: packed, at least one (none where that is allowed), without repetition, in the
            order given.
        labels: all of them, the namespace's included; `reserved:init` if none was given.
        netns: name, path or pid of its network namespace, "" = not said.
        interface: the node's side of its link, "" = not said.
        ports: its named ports.
        audit: report what policy would drop and let it pass.
        place: where it was written.
    """

    name: str
    addresses: tuple[bytes, ...]
    labels: LabelSet = NO_LABELS
    namespace: str = "default"
    netns: str = ""
    interface: str = ""
    ports: tuple[NamedPortRow, ...] = ()
    audit: bool = False
    place: Place = NOWHERE

    def says_as(self, other: "Declaration") -> bool:
        """Whether both want the same, wherever they were written."""
        return replace(self, place=NOWHERE) == replace(other, place=NOWHERE)


def read_declarations(text: str, file: str, *, parts: bool = False) -> tuple[Declaration, ...]:
    """Read a file: any number of documents, each one declaration or a list of them.

    Args:
        text: YAML or JSON.
        file: the name that problems and places carry.
        parts: a document may also be a mapping whose key `endpoints` has the list, as in a
            configuration or a policy test; what stands beside it is not looked at, and addresses
            may be missing, as in a policy test.

    Raises:
        DocumentError: with every problem of the file.
    """
    reader = Reader()
    declarations: list[Declaration] = []
    for document in reader.compose(text, file):
        part = reader.entry(document, "endpoints") if parts else None
        if part is not None:
            listed = [] if is_null(part.node) else list(reader.items(part))
        elif isinstance(document.node, yaml.SequenceNode):
            listed = list(reader.items(document))
        else:
            listed = [document]
        found = [read_declaration(reader, item, addressed=not parts) for item in listed]
        declarations.extend(item for item in found if item is not None)
    reader.finish()
    return tuple(declarations)


class Claimant(Protocol):
    """Who is declared under a name and with addresses: an endpoint, a node."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def addresses(self) -> tuple[bytes, ...]:
        """Packed."""

    @property
    def place(self) -> Place:
        """Where it was written."""


C = TypeVar("C", bound=Claimant)


def check_unique(
    reader: Reader,
    noun: str,
    declared: Iterable[C],
    title: Callable[[C], str] = attrgetter("name"),
) -> None:
    """Note names and addresses that two of the same kind claim.

    Args:
        reader: receives the problems.
        noun: the kind.
        declared: all that are to exist together.
        title: what must be unique; the name alone on one node.
    """
    names: dict[str, Claimant] = {}
    owners: dict[bytes, Claimant] = {}
    for one in declared:
        other = names.setdefault(title(one), one)
        if other is not one:
            first = f"first at {_line(other.place, one.place)}"
            reader.note(one.place, f"{noun} {title(one)} is given twice; {first}")
            continue
        for address in one.addresses:
            owner = owners.setdefault(address, one)
            if owner is not one:
                text = f"{format_address(address)} belongs to {noun} {owner.name} already"
                reader.note(one.place, f"{text} ({_line(owner.place, one.place)})")


def _line(place: Place, seen_from: Place) -> str:
    """Say where something stands; its file only if that is another one."""
    return f"line {place.line}" if place.file == seen_from.file else f"{place.file}:{place.line}"


def parse_declaration(text: str, file: str, name: str) -> Declaration:
    """Read exactly one declaration whose name is known already (it may be repeated inside).

    Raises:
        DocumentError: with every problem.
    """
    reader = Reader()
    documents = reader.compose(text, file)
    if len(documents) != 1:
        reader.note(Place(file), f"expected one endpoint, got {len(documents)} documents")
    declaration = read_declaration(reader, documents[0], name) if documents else None
    if declaration is None:
        if not reader.problems:
            reader.note(Place(file), "no endpoint")
        raise DocumentError(reader.problems)
    reader.finish()
    return declaration


def read_declaration(
    reader: Reader, value: Value, name: str = "", *, addressed: bool = True
) -> Declaration | None:
    """Read one declaration; problems go to `reader`, None if one of them is fatal to it.

    Args:
        reader: receives the problems.
        value: the mapping.
        name: what it is called if it does not say so itself.
        addressed: whether it must have an address.
    """
    before = len(reader.problems)
    entries = reader.mapping(value, _KEYS)
    said = reader.text(entries["name"]) if "name" in entries else name
    if not said:
        reader.note(value.place, "name is missing")
    elif not _NAME.fullmatch(said):
        place = entries["name"].place if "name" in entries else value.place
        reader.note(place, f"{said!r} is no name; letters, digits, '-', '_' and '.' are")
    elif name and said != name:
        reader.note(entries["name"].place, f"is {said!r}, but the endpoint is called {name!r}")
    namespace = _namespace(reader, entries.get("namespace"))
    given = [entries[key] for key in _ADDRESS_KEYS if key in entries]
    addresses = _addresses(reader, value, given) if given or addressed else ()
    labels = _labels(reader, entries.get("labels"), namespace)
    ports = _ports(reader, entries["ports"]) if "ports" in entries else ()
    if "netns" in entries and "interface" in entries:
        reader.note(entries["interface"].place, "netns and interface say the same: give one")
    declaration = Declaration(
        name=said,
        addresses=addresses,
        labels=labels,
        namespace=namespace,
        netns=reader.text(entries["netns"]) if "netns" in entries else "",
        interface=reader.text(entries["interface"]) if "interface" in entries else "",
        ports=ports,
        audit=reader.boolean(entries["audit"]) if "audit" in entries else False,
        place=value.place,
    )
    return declaration if len(reader.problems) == before else None


def parse_labels(texts: Iterable[str]) -> LabelSet:
    """Read endpoint labels; without a source they are the workload's (k8s).

    Raises:
        LabelError: one is no label, is reserved for us, or contradicts another.
    """
    labels = LabelSet.parse(texts, default_source=K8S)
    for label in labels:
        if label.source == RESERVED and label.key != "init":
            raise LabelError(f"label {label} is reserved: only {RESERVED}:init can be given")
    return labels


def parse_port(text: str) -> NamedPortRow:
    """Read `name:number` or `name:number/protocol`.

    Raises:
        ValueError: it is none; the text says what is wrong.
    """
    name, colon, rest = text.partition(":")
    number, _, protocol = rest.partition("/")
    if not colon or not _PORT_NAME.fullmatch(name):
        raise ValueError(f"{text!r} is no named port; write name:number[/tcp|udp|sctp]")
    if not number.isascii() or not number.isdecimal() or not 1 <= int(number) <= 65535:
        raise ValueError(f"{text!r}: {number!r} is no port number 1-65535")
    if (protocol or "tcp").lower() not in PROTOCOLS:
        raise ValueError(f"{text!r}: {protocol!r} is none of {', '.join(PROTOCOLS)}")
    return NamedPortRow(name.lower(), PROTOCOLS[(protocol or "tcp").lower()], int(number))


def _addresses(reader: Reader, whole: Value, given: list[Value]) -> tuple[bytes, ...]:
    """Read the addresses; at least one, each once, under one of the words for them."""
    if not given:
        reader.note(whole.place, "addresses is missing: an endpoint has at least one")
        return ()
    value, *others = given
    for other in others:
        reader.note(other.place, f"says the same as {value.place.path}: give one")
    is_one = value.place.path.endswith("ip")
    addresses: list[bytes] = []
    items = (value,) if is_one else reader.items(value)
    for address, place in read_addresses(reader, items, "endpoint"):
        if address in addresses:
            reader.note(place, f"{format_address(address)} is given twice")
        addresses.append(address)
    if not addresses and isinstance(value.node, yaml.SequenceNode) and not value.node.value:
        reader.note(value.place, "an endpoint has at least one address")
    return tuple(addresses)


def read_addresses(
    reader: Reader, items: Iterable[Value], noun: str
) -> Iterator[tuple[bytes, Place]]:
    """Yield the addresses of a host, packed; `noun` says what it is, for problems."""
    for item in items:
        text = reader.text(item)
        try:
            address = parse_address(text)
        except ValueError as error:
            reader.note(item.place, str(error))
            continue
        if reason := why_unusable(address):
            reader.note(item.place, f"{text} {reason}: no {noun} can have it")
        yield address, item.place


def _namespace(reader: Reader, value: Value | None) -> str:
    text = "" if value is None else reader.text(value)
    if value is None or not text:
        return "default"
    if not _NAMESPACE.fullmatch(text):
        reader.note(
            value.place,
            f"{text!r} is no namespace: at most 63 letters, digits, '-', '_' and '.'",
        )
    return text


def _labels(reader: Reader, value: Value | None, namespace: str) -> LabelSet:
    """Read labels as a list of texts or as a mapping, and add the namespace's."""
    texts: list[tuple[str, Place]] = []
    if value is not None and isinstance(value.node, yaml.MappingNode):
        for key, item in reader.pairs(value):
            # A label without a value has the empty one, as Kubernetes reads null.
            text = "" if is_null(item.node) else reader.text(item)
            texts.append((f"{key}={text}", item.place))
    elif value is not None:
        texts = [(reader.text(item), item.place) for item in reader.items(value)]
    labels: list[Label] = []
    for text, place in texts:
        try:
            parse_labels([text])
            labels.append(parse_label(text, K8S))
        except LabelError as error:
            reader.note(place, str(error))
    try:
        found = LabelSet(labels)
        if found.get(K8S, POD_NAMESPACE) not in (None, namespace):
            reader.note(texts[0][1], f"a label says another namespace than {namespace!r}")
        return in_namespace(found, namespace)
    except LabelError as error:
        reader.note(value.place if value else Place(""), str(error))
        return NO_LABELS


def in_namespace(labels: LabelSet, namespace: str) -> LabelSet:
    """Return labels with the one of their namespace; an endpoint without any is `reserved:init`.

    What it is, is not known yet: a policy for its whole namespace does not mean it. The first label
    that comes ends that.
    """
    init = RESERVED_LABELS[Reserved.INIT]
    known = labels.without(label.name for label in init)
    return known.with_labels([Label(K8S, POD_NAMESPACE, namespace)]) if known else init


def _port_text(reader: Reader, item: Value) -> str:
    """Return a port as `name:number/protocol`; it may be a mapping, as Kubernetes writes it."""
    if not isinstance(item.node, yaml.MappingNode):
        return reader.text(item)
    entries = reader.mapping(item, ("name", "port", "protocol"))
    texts = {key: reader.text(value) for key, value in entries.items()}
    return f"{texts.get('name', '')}:{texts.get('port', '')}/{texts.get('protocol', 'tcp')}"


def _ports(reader: Reader, value: Value) -> tuple[NamedPortRow, ...]:
    """Read named ports; one name and protocol has one number."""
    ports: dict[tuple[str, int], NamedPortRow] = {}
    for item in reader.items(value):
        try:
            port = parse_port(_port_text(reader, item))
        except ValueError as error:
            reader.note(item.place, str(error))
            continue
        if (port.name, port.protocol) in ports:
            reader.note(item.place, f"port {port.name} is given twice")
        ports[port.name, port.protocol] = port
    return tuple(ports.values())
