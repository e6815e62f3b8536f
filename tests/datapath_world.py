"""A small world for datapath tests: three hosts, their snapshot, and packets between them.

a  10.0.0.1 fd00::1  interface 11, identity 1001
b  10.0.0.2 fd00::2  interface 12, identity 1002
w  10.9.9.9 fd99::9  interface 99, nobody's endpoint
"""

from typing import NamedTuple

from scapy.layers.inet import IP
from scapy.layers.inet import UDP as DATAGRAM

from conntrack.address import parse_address
from conntrack.profile import STRICT, Profile
from conntrack.tracker import Tracker
from firewall.datapath.pipeline import OUTPUT, PREROUTING, Pipeline, PipelineSettings
from firewall.datapath.verdict import OFFLOAD, PacketDecision
from firewall.policy.model import Action, Tier
from firewall.policy.snapshot import (
    DirectionRow,
    EndpointRow,
    EntryRow,
    IdentityRow,
    L7Row,
    OriginRow,
    PolicyRow,
    Settings,
    Snapshot,
)
from firewall.policy.view import View

A4, B4, W4 = "10.0.0.1", "10.0.0.2", "10.9.9.9"
A6, B6, W6 = "fd00::1", "fd00::2", "fd99::9"
ON_A, ON_B, ON_W, HERE = 11, 12, 99, 0
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
ORIGIN = OriginRow("CiliumNetworkPolicy", "default", "test", "spec.ingress[0]")


class Rule(NamedTuple):
    """Identity `source` (0 = anybody) may reach `destination`; `l7` is a kind of L7 rule."""

    source: int
    destination: int
    protocol: int = 0
    port: int | None = None
    l7: str = ""
    action: Action = Action.ALLOW


def snapshot(*rules: Rule, revision: int = 1, closed=(1001, 1002), **settings) -> Snapshot:
    """Ingress of `closed` allows what the rules say; egress is open."""
    kinds = sorted({rule.l7 for rule in rules if rule.l7})
    policies = []
    for identity in (1001, 1002):
        entries = tuple(
            EntryRow(
                action=rule.action,
                tier=Tier.NORMAL,
                priority=0.0,
                selector=rule.source,
                protocol=rule.protocol,
                port_low=0 if rule.port is None else rule.port,
                port_high=65535 if rule.port is None else rule.port,
                port_name="",
                l7=kinds.index(rule.l7) if rule.l7 else -1,
                origin=0,
                log="noted",
            )
            for rule in rules
            if rule.destination == identity
        )
        ingress = DirectionRow(identity in closed, identity in closed, entries, (0,))
        policies.append(PolicyRow(identity, ingress, DirectionRow(False, False)))
    rows = (("a", 1, 1001, (A4, A6), ON_A), ("b", 2, 1002, (B4, B6), ON_B))
    return Snapshot(
        revision=revision,
        policy_revision=revision + 100,
        settings=Settings(**settings),
        endpoints=tuple(
            EndpointRow(
                number, name, "default", identity, tuple(map(parse_address, texts)), name, i
            )
            for name, number, identity, texts, i in rows
        ),
        identities=(IdentityRow(1001, ("k8s:app=a",), (1001,)), IdentityRow(1002, (), (1002,))),
        policies=tuple(policies),
        l7=tuple(L7Row(kind) for kind in kinds),
        origins=(ORIGIN,),
    )


class World:
    """A pipeline, a clock, and hands to feed it."""

    def __init__(self, *rules: Rule, workers: int = 1, limit: int = 1000, **settings) -> None:
        self.now = 1000.0
        self.revision = 1
        self.settings = settings
        self.tracker = Tracker(limit_count=limit)
        view = View(snapshot(*rules, **settings))
        self.pipeline = Pipeline(self.tracker, view, PipelineSettings(worker_count=workers))

    def change(self, *rules: Rule, **settings) -> None:
        """Publish another snapshot."""
        self.revision += 1
        self.settings |= settings
        self.pipeline.view = View(snapshot(*rules, revision=self.revision, **self.settings))

    def at(self, interface: int, packet, *, cut: int | None = None) -> PacketDecision:
        """Feed a scapy packet or bytes that arrive at an interface."""
        data = bytes(packet)
        self.now += 0.001
        hook = OUTPUT if interface == HERE else PREROUTING
        return self.pipeline.decide(data[:cut], interface, hook, self.now, cut is None)

    def a(self, packet) -> PacketDecision:
        return self.at(ON_A, packet)

    def b(self, packet) -> PacketDecision:
        return self.at(ON_B, packet)

    def w(self, packet) -> PacketDecision:
        return self.at(ON_W, packet)

    def node(self, packet) -> PacketDecision:
        return self.at(HERE, packet)


ALLOWED = Rule(1001, 1002)


class Carrier:
    """A pipeline that may offload, and one datagram flow a -> b."""

    def __init__(self, *rules: Rule, profile: Profile = STRICT, **settings) -> None:
        self.now = 1000.0
        self.revision = 1
        self.tracker = Tracker(profile)
        bypass = PipelineSettings(bypass=True, defers=True)
        self.pipeline = Pipeline(self.tracker, View(snapshot(*rules, **settings)), bypass)

    def change(self, *rules: Rule) -> None:
        self.revision += 1
        self.pipeline.view = View(snapshot(*rules, revision=self.revision))

    def feed(self, packet, *, suspect: bool = False, hook: int = PREROUTING):
        self.now += 0.001
        interface = ON_A if packet.src == A4 else ON_B
        data = bytes(packet)
        return self.pipeline.decide(data, interface, hook, self.now, True, suspect).verdict

    def ask(self, **how):
        return self.feed(IP(src=A4, dst=B4) / DATAGRAM(sport=4000, dport=53) / b"ask", **how)

    def answer(self, **how):
        return self.feed(IP(src=B4, dst=A4) / DATAGRAM(sport=53, dport=4000) / b"yes", **how)

    def until_carried(self) -> int:
        """Talk until the flow is given away; return how many packets that took."""
        for count in range(1, 100):
            if (self.answer if count % 2 == 0 else self.ask)() is OFFLOAD:
                return count
        raise AssertionError("it is never given away")

    @property
    def entry(self):
        (entry,) = self.tracker.entries()
        return entry
