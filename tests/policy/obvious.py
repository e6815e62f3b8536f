"""A second opinion: policy evaluated straight from its objects, flow by flow.

Written from the specification (../shared/research/cilium.md a.4-a.12, b, c), not from the resolver:
no numbers, no maps, no identities, no caches; every question walks every entry of every object.
"""

from dataclasses import dataclass, field

from conntrack.address import Prefix, address_in
from firewall.identities.labels import LabelSet
from firewall.policy.model import Action, CidrPeer, EntityPeer, LabelPeer
from firewall.policy.verdict import TrafficDirection

CLUSTER = {"host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver"}


@dataclass
class Someone:
    """An endpoint, the host, or an address that nobody knows."""

    address: bytes
    labels: LabelSet
    managed: bool = False
    ports: dict = field(default_factory=dict)  # (protocol, number) -> names
    identity_ports: dict = field(default_factory=dict)
    audit: bool = False

    def reserved(self, name):
        return self.labels.get("reserved", name) is not None


@dataclass
class Answer:
    """allowed; through the proxy or not; which http items the proxy then has (None = all)."""

    allowed: bool
    proxied: bool = False
    items: tuple | None = None


ALLOW = Answer(True)
DENY = Answer(False)


@dataclass
class Law:
    """The objects in force and the settings."""

    objects: list
    settings: object

    def flow(self, source, destination, protocol, port):
        """Both sides: the sender's egress and the receiver's ingress."""
        if source.managed and source.address == destination.address:
            return ALLOW, ALLOW
        egress = ingress = ALLOW
        if source.managed:
            names = destination.identity_ports.get((protocol, port), set())
            what = protocol, port, names
            egress = self.side(TrafficDirection.EGRESS, source, destination, what)
        if destination.managed:
            what = protocol, port, destination.ports.get((protocol, port), set())
            ingress = self.side(TrafficDirection.INGRESS, destination, source, what)
        return egress, ingress

    def side(self, direction, subject, peer, what):
        answer = self.judge(direction, subject, peer, what)
        if not answer.allowed and (self.settings.policy_audit_mode or subject.audit):
            return ALLOW
        return answer

    def judge(self, direction, subject, peer, what):
        host = subject.reserved("host")
        about_me = [
            entry
            for one in self.objects
            for entry in one.entries
            if entry.direction == direction
            and entry.subject_is_node == host
            and entry.subject.matches(subject.labels)
        ]
        mode = self.settings.enforcement
        if mode == "never":
            return ALLOW
        enforced = bool(about_me)
        default_deny = any(entry.default_deny for entry in about_me)
        if subject.reserved("init") or (mode == "always" and not host):
            enforced = default_deny = True
        if not enforced:
            return ALLOW
        # allow-localhost is one more allow among the ordinary ones (a.8).
        local_host = (
            direction == TrafficDirection.INGRESS
            and not host
            and self.settings.allow_localhost == "always"
            and peer.reserved("host")
        )
        isolating = [entry.tier for entry in about_me if entry.default_deny]
        for tier in sorted({200, *(entry.tier for entry in about_me)}):
            if isolating and tier > max(200, *isolating):  # their default deny stands before it
                return DENY
            here = [entry for entry in about_me if entry.tier == tier]
            answer = ask_tier(here, peer, what, local_host=local_host and tier == 200)
            if answer is not None:
                return answer
        return DENY if default_deny else ALLOW


def ask_tier(entries, peer, what, *, local_host):
    """The tier's answer; None = passed on, or nothing in it speaks of this traffic."""
    for priority in sorted({0, *(entry.priority for entry in entries)}):
        speaking = [
            entry
            for entry in entries
            if entry.priority == priority and is_peer(entry, peer) and is_port(entry, *what)
        ]
        if any(entry.action == Action.DENY for entry in speaking):
            return DENY
        allows = [entry for entry in speaking if entry.action == Action.ALLOW]
        if allows or (local_host and priority == 0):
            return merge(allows, unrestricted=local_host and priority == 0)
        if speaking:
            return None
    return None


def merge(allows, *, unrestricted):
    if not unrestricted and any(entry.authentication == "required" for entry in allows):
        return DENY
    restricted = [entry for entry in allows if entry.l7 is not None]
    if not restricted:
        return ALLOW
    open_door = unrestricted or any(entry.l7 is None or not entry.default_deny for entry in allows)
    if open_door:
        return Answer(True, proxied=True)
    items = [item for entry in restricted for item in entry.l7.http]
    if any(not entry.l7.http for entry in restricted):
        return Answer(True, proxied=True)
    return Answer(True, proxied=True, items=tuple(items))


def is_peer(entry, peer):
    return entry.peers is None or any(means(one, peer) for one in entry.peers)


def means(wanted, peer):
    if isinstance(wanted, LabelPeer):
        return wanted.selector.matches(peer.labels)
    if isinstance(wanted, EntityPeer):
        return is_entity(wanted.entity, peer)
    assert isinstance(wanted, CidrPeer)
    if not wanted.match_endpoints and not peer.reserved("world"):
        return False
    return address_in(peer.address, wanted.prefix) and not any(
        address_in(peer.address, hole) for hole in wanted.excepts
    )


def is_entity(entity, peer):
    width = len(peer.address)
    if entity == "all":
        return True
    if entity == "world-ipv4":
        return peer.reserved("world") and width == 4
    if entity == "world-ipv6":
        return peer.reserved("world") and width == 16
    if entity == "cluster":
        return any(peer.reserved(name) for name in CLUSTER) or not any(
            label.source == "reserved" for label in peer.labels
        )
    return peer.reserved(entity)


def is_port(entry, protocol, port, names):
    if entry.ports is None:
        return True
    for one in entry.ports:
        if one.protocol != protocol:
            continue
        if one.name is not None:
            if one.name in names:
                return True
        elif one.low <= port <= one.high:
            return True
    return False


def whole(address):
    return Prefix(address, 8 * len(address))
