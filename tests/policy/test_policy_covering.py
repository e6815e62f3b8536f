"""Which entries cover which: the index finds what asking each pair finds, in the same order."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from conntrack.address import parse_prefix
from firewall.identities.selector import Operator, Selector, from_labels, require
from firewall.policy.covering import Covers, peers_cover, selector_covers
from firewall.policy.model import (
    Action,
    CidrPeer,
    EntityPeer,
    FqdnPeer,
    LabelPeer,
    Origin,
    PolicyEntry,
    PortRange,
)
from firewall.policy.verdict import TrafficDirection

NAMESPACE = {"k8s:io.kubernetes.pod.namespace": "x"}
SELECTORS = (
    Selector(),
    from_labels({"app": "a"}),
    from_labels({"app": "a", "tier": "b"}),
    from_labels({"app": "a"} | NAMESPACE),
    from_labels({"k8s:zone": "z"} | NAMESPACE),
    from_labels(NAMESPACE),
    Selector((require("app", Operator.IN, ["a", "b"]),)),
    Selector((require("app", Operator.DOES_NOT_EXIST),)),
)
PEERS = (
    *map(LabelPeer, SELECTORS),
    CidrPeer(parse_prefix("10.0.0.0/8")),
    CidrPeer(parse_prefix("10.1.0.0/16")),
    CidrPeer(parse_prefix("10.0.0.0/8"), (parse_prefix("10.1.0.0/16"),)),
    CidrPeer(parse_prefix("10.1.0.0/16"), (), True),
    CidrPeer(parse_prefix("0.0.0.0/0")),
    CidrPeer(parse_prefix("::/0")),
    EntityPeer("world"),
    EntityPeer("all"),
    EntityPeer("host"),
    FqdnPeer("a.example", None),
)
PORTS = (
    None,
    (PortRange(6),),
    (PortRange(6, 80, 90),),
    (PortRange(6, 81, 81), PortRange(17, 53, 53)),
    (PortRange(6, 0, 0, "http"),),
)


@st.composite
def entries(draw):
    peers = draw(st.none() | st.lists(st.sampled_from(PEERS), min_size=1, max_size=3))
    return PolicyEntry(
        origin=Origin(kind="T", namespace="", name="n", path=str(draw(st.integers(0, 999)))),
        direction=TrafficDirection.INGRESS,
        action=Action.ALLOW,
        subject=draw(st.sampled_from(SELECTORS)),
        peers=None if peers is None else tuple(peers),
        ports=draw(st.sampled_from(PORTS)),
    )


def covers(outer, inner):
    """One by one: subjects and peers by the functions, ports with everybody as peer."""
    ports = Covers()
    ports.add(replace(outer, peers=None))
    return (
        selector_covers(outer.subject, inner.subject)
        and peers_cover(outer.peers, inner.peers)
        and any(ports.of(replace(inner, peers=None)))
    )


@given(st.lists(entries(), max_size=12), entries())
def test_the_index_finds_what_asking_each_finds(known, inner):
    index = Covers()
    for entry in known:
        index.add(entry)
    assert list(index.of(inner)) == [entry for entry in known if covers(entry, inner)]
