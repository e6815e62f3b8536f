"""Which identities each kind of peer means, and that the numbers keep up with changes."""

import pytest

from conntrack.address import parse_prefix
from firewall.identities.labels import LabelSet
from firewall.identities.reserved import RESERVED_LABELS, Reserved
from firewall.identities.selector import EVERYTHING, Operator, Selector, from_labels, require
from firewall.policy.model import CidrPeer, EntityPeer, FqdnPeer, LabelPeer, NodePeer
from firewall.policy.selectors import SelectorCache

MINE = 300  # an endpoint of the cluster "here"
THEIRS = 301  # an endpoint of another cluster
PLAIN = 302  # an endpoint without a cluster label
CIDR = (1 << 24) + 1  # 10.1.0.0/16
CIDR6 = (1 << 24) + 2  # fd00::/8
NAME = (1 << 24) + 3  # a name's address
NODE = (2 << 24) + 1

LABELS = {
    **{int(number): labels for number, labels in RESERVED_LABELS.items() if number},
    MINE: LabelSet.parse(["k8s:app=a", "k8s:io.cilium.k8s.policy.cluster=here"]),
    THEIRS: LabelSet.parse(["k8s:app=a", "k8s:io.cilium.k8s.policy.cluster=there"]),
    PLAIN: LabelSet.parse(["k8s:app=b"]),
    CIDR: LabelSet.parse(["cidr:10.0.0.0/8", "cidr:10.1.0.0/16", "reserved:world"]),
    CIDR6: LabelSet.parse(["cidr:fd00--/8", "reserved:world"]),
    NAME: LabelSet.parse(["fqdn:*.cilium.io", "reserved:world"]),
    NODE: LabelSet.parse(["reserved:remote-node", "node:os=linux"]),
}


def cache(**options):
    made = SelectorCache(cluster="here", **options)
    for number, labels in LABELS.items():
        made.upsert_identity(number, labels)
    return made


def meant(peer, made=None):
    made = made or cache()
    number = made.number(peer)
    return {identity for identity in LABELS if number in made.matched(identity)}


R = Reserved


@pytest.mark.parametrize(
    ("entity", "expected"),
    [
        ("world", {R.WORLD, R.WORLD_IPV4, R.WORLD_IPV6, CIDR, CIDR6, NAME}),
        ("world-ipv4", {R.WORLD_IPV4, CIDR}),
        ("world-ipv6", {R.WORLD_IPV6, CIDR6}),
        ("host", {R.HOST}),
        ("remote-node", {R.REMOTE_NODE, R.KUBE_APISERVER, NODE}),
        ("kube-apiserver", {R.KUBE_APISERVER}),
        ("init", {R.INIT}),
        ("ingress", {R.INGRESS}),
        ("unmanaged", {R.UNMANAGED}),
        ("health", {R.HEALTH}),
        ("none", set()),
        (
            "cluster",
            {
                R.HOST,
                R.REMOTE_NODE,
                R.KUBE_APISERVER,
                R.INIT,
                R.INGRESS,
                R.UNMANAGED,
                R.HEALTH,
                MINE,
                PLAIN,
                NODE,
            },
        ),
        (
            "cluster-mesh",
            {
                R.HOST,
                R.REMOTE_NODE,
                R.KUBE_APISERVER,
                R.INIT,
                R.INGRESS,
                R.UNMANAGED,
                R.HEALTH,
                MINE,
                PLAIN,
                THEIRS,
                NODE,
            },
        ),
    ],
)
def test_an_entity_means_these_identities(entity, expected):
    """Research a.6, pkg/policy/api/entity.go."""
    assert meant(EntityPeer(entity)) == set(map(int, expected))


def test_the_entity_all_is_number_0():
    assert cache().number(EntityPeer("all")) == 0


@pytest.mark.parametrize(
    ("prefix", "excepts", "expected"),
    [
        ("10.0.0.0/8", (), {CIDR}),
        ("10.1.0.0/16", (), {CIDR}),
        ("10.1.1.0/24", (), set()),
        ("0.0.0.0/0", (), {CIDR}),
        ("::/0", (), {CIDR6}),
        ("10.0.0.0/8", ("10.1.0.0/16",), set()),
        ("10.0.0.0/8", ("10.1.1.0/24",), {CIDR}),
        ("10.0.0.0/8", ("10.0.0.0/9",), set()),
    ],
)
def test_a_cidr_means_the_identities_whose_longest_prefix_lies_in_it(prefix, excepts, expected):
    peer = CidrPeer(parse_prefix(prefix), tuple(map(parse_prefix, excepts)))
    assert meant(peer) == expected


def test_labels_names_and_nodes():
    assert meant(LabelPeer(from_labels({"app": "a"}))) == {MINE, THEIRS}
    assert meant(LabelPeer(from_labels({"reserved:host": ""}))) == {1}
    assert meant(LabelPeer(EVERYTHING)) == set(LABELS)
    absent = Selector((require("app", Operator.DOES_NOT_EXIST),))
    assert meant(LabelPeer(absent)) == set(LABELS) - {MINE, THEIRS, PLAIN}
    either = Selector((require("app", Operator.IN, ["a", "b"]),))
    assert meant(LabelPeer(either)) == {MINE, THEIRS, PLAIN}
    there = Selector((require("app", Operator.EXISTS),))
    assert meant(LabelPeer(there)) == {MINE, THEIRS, PLAIN}
    assert meant(FqdnPeer(None, "*.cilium.io")) == {NAME}
    assert meant(FqdnPeer("cilium.io", None)) == set()
    assert meant(NodePeer(EVERYTHING)) == {1, 6, 7, NODE}
    assert meant(NodePeer(from_labels({"k8s:os": "linux"}))) == {NODE}


def test_order_of_arrival_makes_no_difference():
    peers = [LabelPeer(from_labels({"app": "a"})), EntityPeer("world"), LabelPeer(EVERYTHING)]
    early = SelectorCache(cluster="here")
    early.add(peers)
    for number, labels in LABELS.items():
        early.upsert_identity(number, labels)
    for peer in peers:
        assert meant(peer, early) == meant(peer)


def test_a_row_is_matched_by_its_prefix_where_the_identity_has_none():
    made = cache()
    outside = made.number(CidrPeer(parse_prefix("192.0.2.0/24"), (parse_prefix("192.0.2.9/32"),)))
    anyone = made.number(CidrPeer(parse_prefix("10.0.0.0/8"), (), match_endpoints=True))
    four = made.number(EntityPeer("world-ipv4"))
    assert made.matched_by_row(parse_prefix("192.0.2.1/32"), R.WORLD) == (outside, four)
    assert made.matched_by_row(parse_prefix("192.0.2.9/32"), R.WORLD) == (four,)
    assert made.matched_by_row(parse_prefix("192.0.0.0/16"), R.WORLD) == (four,)
    assert made.matched_by_row(parse_prefix("10.0.0.1/32"), MINE) == (anyone,)
    assert made.matched_by_row(parse_prefix("192.0.2.1/32"), MINE) == ()
    assert made.matched_by_row(parse_prefix("192.0.2.1/32"), NAME) == (outside, four)
    assert made.matched_by_row(parse_prefix("192.0.2.1/32"), NODE) == ()


def test_cidrs_mean_nodes_only_where_that_is_set():
    """Cilium's policy-cidr-match-mode: nodes."""
    made = cache(cidr_matches_nodes=True)
    number = made.number(CidrPeer(parse_prefix("192.0.2.0/24")))
    assert made.matched_by_row(parse_prefix("192.0.2.1/32"), NODE) == (number,)
    assert made.matched_by_row(parse_prefix("192.0.2.1/32"), MINE) == ()


def test_every_prefix_and_hole_needs_a_row_except_whole_families():
    made = cache()
    made.add(
        [
            CidrPeer(parse_prefix("10.0.0.0/8"), (parse_prefix("10.2.0.0/16"),)),
            CidrPeer(parse_prefix("0.0.0.0/0")),
        ]
    )
    assert made.prefixes() == {parse_prefix("10.0.0.0/8"), parse_prefix("10.2.0.0/16")}


def test_a_forgotten_selector_leaves_nothing_behind_and_its_number_is_not_reused():
    made = cache()
    peers = [
        LabelPeer(from_labels({"app": "a"})),
        CidrPeer(parse_prefix("10.0.0.0/8")),
        EntityPeer("world"),
        FqdnPeer(None, "*.cilium.io"),
        NodePeer(EVERYTHING),
        LabelPeer(EVERYTHING),
    ]
    numbers = [made.number(peer) for peer in peers]
    made.forget(set(numbers[1:]))
    assert made.prefixes() == set()
    assert made.texts() == set()
    assert made.peers() == {numbers[0]: peers[0]}
    for identity in LABELS:
        assert made.matched(identity) <= {numbers[0]}
    made.upsert_identity(400, LABELS[MINE])
    assert made.matched(400) == {numbers[0]}
    assert made.number(peers[1]) == max(numbers) + 1


def test_an_identity_that_left_matches_nothing():
    made = cache()
    number = made.number(EntityPeer("world"))
    made.remove_identity(CIDR)
    made.remove_identity(12345)
    assert made.matched(CIDR) == frozenset()
    assert made.labels(CIDR) is None
    made.upsert_identity(CIDR, LABELS[CIDR])
    assert made.matched(CIDR) == {number}


def test_new_labels_of_a_known_number_are_matched_anew():
    made = cache()
    number = made.number(LabelPeer(from_labels({"os": "linux"})))
    made.upsert_identity(1, LabelSet.parse(["reserved:host", "k8s:os=linux"]))
    assert number in made.matched(1)
    made.upsert_identity(1, LABELS[1])
    assert number not in made.matched(1)
