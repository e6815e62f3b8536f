"""Policies that are valid and probably not what their author meant.

Each check is a function of the entries; `lint` runs them all. A finding is a warning that points to
the entry. Checks across entries compare selectors by their requirements: a selector with fewer of
them covers one with more. That misses some cases and never claims a false one.
"""

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

from firewall.identities.labels import (
    ANY,
    K8S,
    POD_NAMESPACE,
    RESERVED,
    Label,
    LabelFilter,
    LabelSet,
)
from firewall.identities.selector import Operator, Requirement, Selector
from firewall.policy.covering import Covers, peers_cover, selector_covers
from firewall.policy.lint_http import lint_http
from firewall.policy.model import (
    Action,
    CidrPeer,
    EntityPeer,
    FqdnPeer,
    LabelPeer,
    Origin,
    PolicyEntry,
    PolicyObject,
)
from firewall.policy.problem import Problem
from firewall.policy.readers.ports import UDP
from firewall.policy.verdict import TrafficDirection

_DNS_PORT = 53
_HTTPS_PORT = 443
_KUBERNETES_KINDS = frozenset({"NetworkPolicy"})


class _Scene(NamedTuple):
    """What the checks look at."""

    entries: tuple[PolicyEntry, ...]
    endpoints: tuple[LabelSet, ...] | None
    label_filter: LabelFilter


def lint(
    objects: Iterable[PolicyObject],
    *,
    endpoints: Iterable[LabelSet] | None = None,
    label_filter: LabelFilter | None = None,
) -> tuple[Problem, ...]:
    """Return warnings about policies that will not do what they seem to.

    Args:
        objects: all policies to judge together; one policy's DNS rule serves another.
        endpoints: the labels of the endpoints, to find policies that select none; None = unknown.
        label_filter: which labels count for identities; default Cilium's list.

    Returns:
        Warnings ordered by file and place, each once.
    """
    scene = _Scene(
        entries=tuple(entry for one in objects for entry in one.entries),
        endpoints=None if endpoints is None else tuple(endpoints),
        label_filter=label_filter or LabelFilter(),
    )
    found = {problem for check in _CHECKS for problem in check(scene)}
    return tuple(sorted(found, key=lambda p: (p.file, p.line, p.column, p.path, p.message)))


def _warn(origin: Origin, message: str, path: str = "") -> Problem:
    where = f"{origin.path}.{path}" if path and origin.path else origin.path
    return Problem.warning(origin.file, origin.line, origin.column, where, message)


def _http(scene: _Scene) -> Iterator[Problem]:
    for entry in scene.entries:
        for at, rule in enumerate(entry.l7.http if entry.l7 else ()):
            for field, message in lint_http(rule):
                yield _warn(entry.origin, message, f"rules.http[{at}].{field}")


def _allows_nothing(scene: _Scene) -> Iterator[Problem]:
    """Find Cilium's `ingress: [{}]`, which in a Kubernetes NetworkPolicy allows everything."""
    for entry in scene.entries:
        if entry.peers != () or entry.ports is not None:
            continue
        if entry.origin.kind in _KUBERNETES_KINDS:
            continue
        word = "from" if entry.direction is TrafficDirection.INGRESS else "to"
        if entry.action is Action.DENY:
            yield _warn(entry.origin, f"denies nothing; to deny everything: {word}Entities: [all]")
        else:
            message = (
                "allows nothing and isolates the subject (in a Kubernetes NetworkPolicy {} would "
                f"allow everything); to allow everything: {word}Entities: [all]"
            )
            yield _warn(entry.origin, message)


class _Subjects:
    """Which subjects some entries have between them; asks many times over thousands of policies."""

    def __init__(self, entries: Iterable[PolicyEntry]) -> None:
        self._known = {frozenset(entry.subject.requirements) for entry in entries}

    def cover(self, subject: Selector) -> bool:
        """Say whether one entry selects whatever `subject` selects."""
        wanted = frozenset(subject.requirements)
        return wanted in self._known or any(known <= wanted for known in self._known)


def _dns_blocked(scene: _Scene) -> Iterator[Problem]:
    """Find subjects whose egress is isolated with exceptions, none of which is DNS."""
    egress = [e for e in scene.entries if e.direction is TrafficDirection.EGRESS]
    allows = [e for e in egress if e.action is Action.ALLOW and e.peers != ()]
    served = _Subjects(entry for entry in allows if _allows_dns(entry))
    subjects: dict[Selector, PolicyEntry] = {}
    for entry in allows:
        if entry.default_deny and not entry.subject_is_node:
            subjects.setdefault(entry.subject, entry)
    for subject, first in subjects.items():
        if not served.cover(subject):
            message = "egress is isolated and nothing allows DNS (port 53/UDP) for this subject"
            yield _warn(first.origin, message)


def _allows_dns(entry: PolicyEntry) -> bool:
    return entry.ports is None or any(
        port.name is not None or (port.protocol == UDP and port.low <= _DNS_PORT <= port.high)
        for port in entry.ports
    )


def _names_without_dns_rule(scene: _Scene) -> Iterator[Problem]:
    proxied = _Subjects(e for e in scene.entries if e.l7 is not None and e.l7.kind == "dns")
    for entry in scene.entries:
        by_name = any(isinstance(peer, FqdnPeer) for peer in entry.peers or ())
        if by_name and not proxied.cover(entry.subject):
            message = "toFQDNs learns addresses from DNS rules; no rule for this subject has one"
            yield _warn(entry.origin, message)


def _quic(scene: _Scene) -> Iterator[Problem]:
    """Find UDP that is allowed beside names on the same port: QUIC, in which no rule sees names."""
    allows = [
        entry
        for entry in scene.entries
        if entry.action is Action.ALLOW and entry.peers != () and _allows_quic(entry, _HTTPS_PORT)
    ]
    for entry in scene.entries:
        by_name = any(isinstance(peer, FqdnPeer) for peer in entry.peers or ())
        if not entry.server_names and not by_name:
            continue
        field = "serverNames" if entry.server_names else "toFQDNs"
        for allow in allows:
            if (
                allow is not entry
                and allow.direction is entry.direction
                and selector_covers(allow.subject, entry.subject)
                and _lets_names_out(allow, entry)
            ):
                place = f"{entry.origin.file}:{entry.origin.line}"
                yield _warn(
                    allow.origin,
                    f"allows UDP {_HTTPS_PORT}, where QUIC (HTTP/3) passes by the {field} of "
                    f"{place}; leave it out: clients fall back to TCP",
                )


def _allows_quic(entry: PolicyEntry, number: int) -> bool:
    return entry.ports is None or any(
        port.name is None and port.protocol == UDP and port.low <= number <= port.high
        for port in entry.ports
    )


def _lets_names_out(allow: PolicyEntry, entry: PolicyEntry) -> bool:
    """Say whether an entry opens to UDP what another opens to some names only."""
    if entry.server_names:
        at_https = any(port.low <= _HTTPS_PORT <= port.high for port in entry.ports or ())
        wider = peers_cover(allow.peers, entry.peers) or peers_cover(entry.peers, allow.peers)
        return at_https and wider
    addresses = (CidrPeer, EntityPeer)
    return allow.peers is None or any(isinstance(peer, addresses) for peer in allow.peers)


def _irrelevant_labels(scene: _Scene) -> Iterator[Problem]:
    for entry in scene.entries:
        selectors = [entry.subject]
        selectors += [peer.selector for peer in entry.peers or () if isinstance(peer, LabelPeer)]
        if entry.subject_is_node:
            selectors = selectors[1:]
        for selector in selectors:
            for key in selector.keys:
                source = K8S if key.source == ANY else key.source
                if source == RESERVED or scene.label_filter.keeps(Label(source, key.name)):
                    continue
                message = (
                    f'label "{key.name}" is not security-relevant: no identity has it, a selector '
                    "cannot see it"
                )
                yield _warn(entry.origin, message)


def _shadowed(scene: _Scene) -> Iterator[Problem]:
    """Find entries that allow only what an entry of the same tier, not after them, denies.

    Denies of an earlier tier are left out: a pass may lead past them.
    """
    denies: dict[tuple[TrafficDirection, bool, int], Covers] = {}
    for entry in scene.entries:
        if entry.action is Action.DENY and entry.peers != ():
            denies.setdefault(_rank(entry), Covers()).add(entry)
    for entry in scene.entries:
        known = denies.get(_rank(entry))
        if entry.action is not Action.ALLOW or entry.peers == () or known is None:
            continue
        for deny in known.of(entry):
            if deny.priority <= entry.priority:
                place = f"{deny.origin.name} {deny.origin.path}"
                if deny.origin.line:
                    place += f" ({deny.origin.file}:{deny.origin.line})"
                yield _warn(entry.origin, f"never takes effect: {place} denies all of it")
                break


def _rank(entry: PolicyEntry) -> tuple[TrafficDirection, bool, int]:
    return entry.direction, entry.subject_is_node, entry.tier


def _selects_nothing(scene: _Scene) -> Iterator[Problem]:
    if scene.endpoints is None:
        return
    for entry in scene.entries:
        if entry.subject_is_node:
            continue
        if not any(entry.subject.matches(labels) for labels in scene.endpoints):
            yield _warn(entry.origin, f"selects no endpoint: {entry.subject.describe()}")
        for peer in entry.peers or ():
            if isinstance(peer, LabelPeer) and not any(
                peer.selector.matches(labels) for labels in scene.endpoints
            ):
                yield _warn(entry.origin, f"peer is no endpoint: {peer.selector.describe()}")


def _contradictions(scene: _Scene) -> Iterator[Problem]:
    """Find selectors that no endpoint can match, whatever its labels."""
    for entry in scene.entries:
        selectors = [p.selector for p in entry.peers or () if isinstance(p, LabelPeer)]
        for selector in (entry.subject, *selectors):
            for one, other in combinations(selector.requirements, 2):
                if one.key.name != POD_NAMESPACE and _exclude(one, other):
                    yield _warn(
                        entry.origin, f"matches nothing: {one} and {other} exclude each other"
                    )


def _exclude(one: Requirement, other: Requirement) -> bool:
    """Say whether no label can meet both.

    Keys must be the same, source included: of `any:app` and `k8s:app` two labels may meet one each.
    """
    if one.key != other.key:
        return False
    for demand, refusal in ((one, other), (other, one)):
        match demand.operator, refusal.operator:
            case Operator.IN | Operator.EXISTS, Operator.DOES_NOT_EXIST:
                return True
            case Operator.IN, Operator.NOT_IN:
                return set(demand.values) <= set(refusal.values)
            case Operator.IN, Operator.IN:
                return not set(demand.values) & set(refusal.values)
            case _:
                continue
    return False


_CHECKS = (
    _http,
    _allows_nothing,
    _dns_blocked,
    _names_without_dns_rule,
    _quic,
    _irrelevant_labels,
    _shadowed,
    _selects_nothing,
    _contradictions,
)
