"""What is in force, or would be: everything that an explanation or a suggestion needs.

A realm is a view with the policies behind it. The agent's comes from the published snapshot; an
offline one is resolved here from endpoints and objects, by the very resolver that the agent uses.
`joined` adds endpoints that do not exist, for questions by label. `rehearsed` answers "and with
these policies instead?" for one question: only the two ends are resolved again, so that it costs
little however many policies there are.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from conntrack.address import (
    Prefix,
    format_address,
    is_link_local,
    is_loopback,
    parse_address,
    prefix_contains,
)
from firewall.identities.labels import (
    K8S,
    POD_NAMESPACE,
    RESERVED,
    LabelError,
    LabelFilter,
    LabelSet,
)
from firewall.identities.local import fqdn_labels, prefix_labels
from firewall.identities.reserved import CLUSTER_MIN, LOCAL_MIN, RESERVED_LABELS, Reserved
from firewall.identities.workload import workload_labels
from firewall.policy.course import Form
from firewall.policy.explain import explain
from firewall.policy.explanation import Explanation, Request
from firewall.policy.model import Peer, PolicyObject
from firewall.policy.name_match import NameMatcher, normalise
from firewall.policy.objects import NamespaceObject, Resource
from firewall.policy.problem import did_you_mean
from firewall.policy.question import (
    Question,
    QuestionError,
    form_of,
    parse_request,
    port_number,
)
from firewall.policy.repository import Repository
from firewall.policy.resolve import Resolver
from firewall.policy.snapshot import EndpointRow, NamedPortRow, Settings, Snapshot
from firewall.policy.view import View

NODE_ADDRESSES = (parse_address("198.18.255.254"), parse_address("2001:db8:ffff::fffe"))
"""The node's addresses where there is no node (RFC 2544 and RFC 3849 ranges)."""

WORLD_ADDRESSES = (parse_address("203.0.113.1"), parse_address("2001:db8:ffff::1"))
"""What `world` means in a question: documentation addresses (RFC 5737, RFC 3849)."""

CIDR = "cidr"
"""Source of the labels of addresses outside."""

_INVENTED = ("198.18.0.", "2001:db8:fffe::")

Traffic = tuple[bytes, bytes, int, int]
"""Source and destination (packed), IANA protocol, destination port or ICMP type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """An endpoint as a question needs it; `labels` are those of its identity."""

    name: str
    namespace: str
    labels: LabelSet
    addresses: tuple[bytes, ...]
    named_ports: tuple[NamedPortRow, ...] = ()
    audit: bool = False


class Realm(NamedTuple):
    """A view and what it was made from.

    Attributes:
        view: answers questions.
        selectors: what its selector numbers mean.
        objects: the policies.
        resources: the services, CIDR groups and namespaces that policies name.
        cluster: the name of the own cluster.
        names: the packed addresses that DNS answered for a name (lower case, trailing dot).
    """

    view: View
    selectors: Mapping[int, Peer]
    objects: tuple[PolicyObject, ...]
    resources: tuple[Resource, ...] = ()
    cluster: str = "default"
    names: Mapping[str, tuple[bytes, ...]] = {}


class Asked(NamedTuple):
    """A question in numbers, with the realm that can answer it."""

    realm: Realm
    traffic: Traffic
    request: Request | None
    form: Form | None = None

    def answer(self) -> Explanation:
        """Return the explanation."""
        realm = self.realm
        return explain(realm.view, realm.selectors, self.traffic, self.request, self.form)


# --- making realms ----------------------------------------------------------------------------


def make_realm(
    actors: Iterable[Actor],
    objects: Iterable[PolicyObject],
    resources: Iterable[Resource] = (),
    *,
    settings: Settings | None = None,
    cluster: str = "default",
    names: Mapping[str, tuple[bytes, ...]] = MappingProxyType({}),
) -> Realm:
    """Resolve policies for endpoints that no agent knows.

    If a policy selects nodes, the node is one of them, with no label but `reserved:host`, unless
    the actors say more of it. `names` are what DNS is taken to have answered, as in a realm; those
    of an endpoint or of the node open nothing.
    """
    settings = settings or Settings(local_addresses=NODE_ADDRESSES)
    resolver = Resolver(cluster=cluster)
    given, known = tuple(objects), tuple(resources)
    resolver.set_resources(known)
    numbers: dict[LabelSet, int] = {labels: int(n) for n, labels in RESERVED_LABELS.items()}
    rows = []
    addresses: dict[Prefix, int] = {}
    for at, actor in enumerate(_with_node(actors, given, settings), start=1):
        number = numbers.setdefault(actor.labels, CLUSTER_MIN + len(numbers))
        if _is_node(actor):
            number = int(Reserved.HOST)
        resolver.upsert_identity(number, actor.labels)
        rows.append(_row(at, actor, number))
    resolver.apply(Repository().apply(given))
    for at, prefix in enumerate(sorted(resolver.prefixes())):
        addresses[prefix] = LOCAL_MIN + at
        resolver.upsert_identity(LOCAL_MIN + at, prefix_labels(prefix))
    numbered = LOCAL_MIN + len(addresses)
    for at, (address, labels) in enumerate(_named(names, resolver.fqdns()).items()):
        own = address in settings.local_addresses
        if not (own or is_loopback(address) or is_link_local(address)):
            addresses[_host(address)] = numbered + at
            resolver.upsert_identity(numbered + at, labels)
    addresses.update(dict.fromkeys(map(_host, settings.local_addresses), int(Reserved.HOST)))
    addresses.update({_host(a): row.identity for row in rows for a in row.addresses})
    resolver.set_endpoints(rows)
    snapshot = resolver.snapshot(settings=settings, ipcache=addresses.items())
    return Realm(View(snapshot), resolver.selectors, given, known, cluster, names)


def _named(names: Mapping[str, tuple[bytes, ...]], texts: Iterable[str]) -> dict[bytes, LabelSet]:
    """Return the labels of every address to which a name leads that some selector means."""
    found: dict[bytes, set[str]] = {}
    for text in texts:
        matcher = NameMatcher((text,))
        for name, addresses in names.items():
            if matcher.matches(name):
                for address in addresses:
                    found.setdefault(address, set()).add(text)
    return {address: fqdn_labels(tuple(sorted(meant))) for address, meant in found.items()}


def joined(realm: Realm, actors: Iterable[Actor]) -> Realm:
    """Return the realm with further endpoints in it."""
    fresh = tuple(actors)
    if not fresh:
        return realm
    snapshot = realm.view.snapshot
    labels = _labels(snapshot)
    present = [
        Actor(
            name=row.name,
            namespace=row.namespace,
            labels=labels.get(row.identity, LabelSet()),
            addresses=row.addresses,
            named_ports=row.named_ports,
            audit=row.audit,
        )
        for row in snapshot.endpoints
    ]
    return make_realm(
        [*present, *fresh],
        realm.objects,
        realm.resources,
        settings=snapshot.settings,
        cluster=realm.cluster,
        names=realm.names,
    )


def rehearsed(realm: Realm, traffic: Traffic, objects: Iterable[PolicyObject]) -> Realm:
    """Return the realm as it would be with other policies, good for this traffic only.

    Both ends keep their labels and addresses, except that an address outside is labelled by the
    longest prefix that these policies name; nobody else is there.
    """
    view = realm.view
    snapshot = view.snapshot
    ends = {address: view.peer(address).identity for address in traffic[:2]}
    labels = _labels(snapshot, set(ends.values()))
    resolver = Resolver(cluster=realm.cluster)
    resolver.set_resources(realm.resources)
    rows = tuple(row for row in snapshot.endpoints if row.identity in ends.values())
    about = [labels[row.identity] for row in rows]
    given = tuple(objects)
    speaking = [one for one in given if _selects(one, about)]
    resolver.apply(Repository().apply(speaking))
    prefixes = resolver.prefixes()
    for at, (address, number) in enumerate(ends.items()):
        known = labels.get(number)
        if known is not None and _is_outside(known):
            ends[address] = LOCAL_MIN + at
            known = _outside_labels(known, address, prefixes)
        if known is not None:
            resolver.upsert_identity(ends[address], known)
    resolver.set_endpoints(rows)
    addresses = {_host(a): row.identity for row in rows for a in row.addresses}
    addresses.update({_host(address): number for address, number in ends.items()})
    new = resolver.snapshot(settings=snapshot.settings, ipcache=addresses.items())
    return Realm(View(new), resolver.selectors, given, realm.resources, realm.cluster)


def _is_outside(labels: LabelSet) -> bool:
    return any(one.source == RESERVED and one.key.startswith("world") for one in labels)


def _outside_labels(labels: LabelSet, address: bytes, prefixes: set[Prefix]) -> LabelSet:
    """Return the labels that an address outside gets where rules name these prefixes."""
    around = [prefix for prefix in prefixes if prefix_contains(prefix, _host(address))]
    kept = [label for label in labels if label.source != CIDR]
    if not around:
        return LabelSet(kept)
    longest = max(around, key=lambda prefix: prefix.length)
    return prefix_labels(longest).with_labels(kept)


def _selects(one: PolicyObject, ends: list[LabelSet]) -> bool:
    return any(entry.subject.matches(labels) for entry in one.entries for labels in ends)


def _labels(snapshot: Snapshot, wanted: set[int] | None = None) -> dict[int, LabelSet]:
    """Return the labels of some identities, or of all: parsing thousands takes a second."""
    return {
        row.number: LabelSet.parse(row.labels)
        for row in snapshot.identities
        if wanted is None or row.number in wanted
    }


def _with_node(
    actors: Iterable[Actor], objects: Iterable[PolicyObject], settings: Settings
) -> list[Actor]:
    """Return the actors, and the node if a policy is about nodes and it is not among them."""
    found = list(actors)
    about_nodes = any(entry.subject_is_node for one in objects for entry in one.entries)
    if about_nodes and settings.local_addresses and not any(map(_is_node, found)):
        host, addresses = RESERVED_LABELS[Reserved.HOST], settings.local_addresses
        found.append(
            Actor(name=Reserved.HOST.label, namespace="", labels=host, addresses=addresses)
        )
    return found


def _is_node(actor: Actor) -> bool:
    return actor.labels.get(RESERVED, Reserved.HOST.label) is not None


def _row(at: int, actor: Actor, number: int) -> EndpointRow:
    return EndpointRow(
        id=at,
        name=actor.name,
        namespace=actor.namespace,
        identity=number,
        addresses=actor.addresses,
        named_ports=actor.named_ports,
        audit=actor.audit,
    )


def _host(address: bytes) -> Prefix:
    return Prefix(address, 8 * len(address))


# --- asking -----------------------------------------------------------------------------------


def ask(realm: Realm, question: Question, label_filter: LabelFilter | None = None) -> Asked:
    """Turn the words of a question into numbers.

    Args:
        realm: where names are looked up.
        question: who to whom.
        label_filter: which labels count for identities, for ends given by labels.

    Raises:
        QuestionError: a word means nothing here.
    """
    chosen = label_filter or LabelFilter()
    ends = (
        ("source", question.source, question.source_labels, question.source_identity),
        (
            "destination",
            question.destination,
            question.destination_labels,
            question.destination_identity,
        ),
    )
    invented: list[Actor] = []
    found: list[tuple[bytes, ...]] = []
    for at, (word, name, labels, identity) in enumerate(ends, start=1):
        if sum(map(bool, (name, labels, identity))) != 1:
            raise QuestionError(f"say the {word} once: by name or address, labels, or identity")
        entity = _entity(labels)
        if name or entity:
            found.append(_addresses(realm, name or entity))
            continue
        actor = _invented(realm, at, labels, identity, chosen)
        invented.append(actor)
        found.append(actor.addresses)
    realm = joined(realm, invented)
    source, destination = _same_family(question, *found)
    named = _named_ports(realm, destination)
    protocol, port = port_number(question.port, ipv6=len(destination) == 16, named=named)
    request = parse_request(question.http, question.headers) if question.http else None
    if question.headers and request is None:
        raise QuestionError("headers belong to a request: say which by http")
    return Asked(realm, (source, destination, protocol, port), request, form_of(question))


def _entity(labels: tuple[str, ...]) -> str:
    """Return the reserved label that is all that labels say; an endpoint can only be `init`."""
    only = labels[0] if len(labels) == 1 else ""
    return only if only.startswith(f"{RESERVED}:") and only != f"{RESERVED}:init" else ""


def _named_ports(realm: Realm, address: bytes) -> tuple[NamedPortRow, ...]:
    endpoint = realm.view.endpoint_at(address)
    return endpoint.named_ports if endpoint is not None else ()


def _same_family(
    question: Question, sources: tuple[bytes, ...], destinations: tuple[bytes, ...]
) -> tuple[bytes, bytes]:
    for source in sources:
        for destination in destinations:
            if len(source) == len(destination) and question.ipv6 in (None, len(source) == 16):
                return source, destination
    family = {None: "of one family", True: "of IPv6", False: "of IPv4"}[question.ipv6]
    raise QuestionError(f"the two ends have no addresses {family}")


def _addresses(realm: Realm, text: str) -> tuple[bytes, ...]:
    """Return the addresses of an end by its name, address, entity or DNS name."""
    try:
        return (parse_address(text),)
    except ValueError:
        pass
    found = [row for row in realm.view.snapshot.endpoints if text in set(_names(row))]
    if len(found) > 1:
        raise QuestionError(f"{text} is the name of several endpoints: write namespace/name")
    if found:
        return found[0].addresses
    entity = text.removeprefix(f"{RESERVED}:")
    if entity in ("world", "world-ipv4", "world-ipv6"):
        wanted = {"world": (4, 16), "world-ipv4": (4,), "world-ipv6": (16,)}[entity]
        return tuple(address for address in WORLD_ADDRESSES if len(address) in wanted)
    if entity == "host":
        own = realm.view.snapshot.settings.local_addresses
        # Others see the node by these; loopback is nobody's peer and under no host policy.
        seen = tuple(a for a in own if not is_loopback(a) and not is_link_local(a))
        if seen or own:
            return seen or own
        raise QuestionError("host: the node's addresses are not known")
    labels = _labels(realm.view.snapshot)
    known = [
        row.network
        for row in realm.view.snapshot.ipcache
        if row.length == 8 * len(row.network)
        and row.identity in labels
        and labels[row.identity].get(RESERVED, entity) is not None
    ]
    if known:
        return tuple(known)
    if addresses := realm.names.get(normalise(text)):
        return addresses
    names = [name for row in realm.view.snapshot.endpoints for name in _names(row)]
    unasked = f"; DNS answered no endpoint for {text}" if "." in text else ""
    raise QuestionError(f"no endpoint is called {text}{did_you_mean(text, names)}{unasked}")


def _names(row: EndpointRow) -> Iterator[str]:
    yield row.name
    if row.namespace and not row.name.startswith(f"{row.namespace}/"):
        yield f"{row.namespace}/{row.name}"
        yield f"{row.namespace}:{row.name}"


def _invented(
    realm: Realm, at: int, texts: tuple[str, ...], identity: int, label_filter: LabelFilter
) -> Actor:
    """Make an endpoint of labels or of an identity that may have no endpoint here."""
    addresses = tuple(parse_address(f"{prefix}{at}") for prefix in _INVENTED)
    if identity:
        labels = _labels(realm.view.snapshot).get(identity)
        if labels is None:
            raise QuestionError(f"identity {identity} is not known here")
        namespace = labels.get(K8S, POD_NAMESPACE) or ""
        return Actor(
            name=f"identity {identity}", namespace=namespace, labels=labels, addresses=addresses
        )
    try:
        own = LabelSet.parse(texts, default_source=K8S)
    except LabelError as error:
        raise QuestionError(str(error)) from error
    namespace = own.get(K8S, POD_NAMESPACE) or "default"
    declared = next(
        (
            one
            for one in realm.resources
            if isinstance(one, NamespaceObject) and one.name == namespace
        ),
        None,
    )
    labels = actor_labels(own, namespace, realm.cluster, declared, label_filter)
    words = [str(x).removeprefix(f"{K8S}:") for x in own if x.key != POD_NAMESPACE]
    name = ",".join(words) or format_address(addresses[0])
    return Actor(name=name, namespace=namespace, labels=labels, addresses=addresses)


def actor_labels(
    own: LabelSet,
    namespace: str,
    cluster: str,
    declared: NamespaceObject | None,
    label_filter: LabelFilter,
) -> LabelSet:
    """Return the labels of the identity that an endpoint would get from the agent."""
    more = [] if declared is None else [(key, value) for _, key, value in declared.labels]
    everything = workload_labels(own, namespace=namespace, cluster=cluster, namespace_labels=more)
    relevant, _ = label_filter.split(everything)
    return relevant or RESERVED_LABELS[Reserved.INIT]
