"""Random policies and histories: the resolver and the obvious evaluator never disagree.

Two more properties are read off the same histories: the order and number of steps leave no trace
in the answers, and whatever takes a permission away raises the generation.
"""

from hypothesis import given, settings
from hypothesis import strategies as st
from policy.obvious import Law, Someone
from policy.stage import Stage

from conntrack.address import parse_address, parse_prefix
from firewall.identities.labels import LabelSet
from firewall.identities.selector import Operator, Selector, require
from firewall.policy.http_match import HttpMatcher
from firewall.policy.model import (
    Action,
    CidrPeer,
    EntityPeer,
    HttpRule,
    L7Rules,
    LabelPeer,
    ObjectKey,
    Origin,
    PolicyEntry,
    PolicyObject,
    PortRange,
    Tier,
)
from firewall.policy.snapshot import Settings
from firewall.policy.snapshot_file import decode, encode
from firewall.policy.verdict import TrafficDirection, Verdict
from firewall.policy.view import View

ENDPOINTS = {
    "a": "10.0.0.1",
    "b": "10.0.0.2",
    "c": "10.0.0.130",
    "six": "fd00::1",
    "init": "10.0.0.5",
    "host": "10.0.0.254",
}
UNMANAGED = {"peer": "10.0.1.9"}
WORLD = ("192.0.2.1", "192.0.2.129", "198.51.100.1", "fd01::1", "10.0.0.77")
PORTS = ((6, 80), (6, 81), (6, 8080), (17, 80), (1, 8), (47, 0))
NAMED = {"a": [("web", 6, 80)], "b": [("web", 6, 8080), ("alt", 6, 81)], "c": []}
REQUESTS = ((b"GET", b"/a"), (b"GET", b"/b"), (b"PUT", b"/a"))

keys = st.sampled_from(["x", "y"])
values = st.sampled_from(["1", "2"])
label_sets = st.dictionaries(keys, values, max_size=2)


@st.composite
def requirements(draw):
    operator = draw(st.sampled_from(list(Operator)))
    wanted = draw(st.lists(values, min_size=1, max_size=2))
    needs = operator in (Operator.IN, Operator.NOT_IN)
    return require(draw(keys), operator, wanted if needs else ())


selectors = st.lists(requirements(), max_size=2).map(lambda found: Selector(tuple(found)))
PREFIXES = {
    "10.0.0.0/24": ("10.0.0.128/25", "10.0.0.1/32"),
    "10.0.0.0/8": ("10.0.0.0/24", "10.0.0.64/26"),
    "192.0.2.0/24": ("192.0.2.128/25",),
    "192.0.2.1/32": (),
    "0.0.0.0/0": ("10.0.0.0/8", "192.0.2.129/32"),
    "fd00::/7": ("fd01::/16",),
    "::/0": ("fd00::/8",),
}


@st.composite
def blocks(draw):
    prefix = draw(st.sampled_from(sorted(PREFIXES)))
    holes = PREFIXES[prefix]
    excepts = draw(st.lists(st.sampled_from(holes), unique=True)) if holes else []
    return CidrPeer(parse_prefix(prefix), tuple(map(parse_prefix, excepts)), draw(st.booleans()))


entities = st.sampled_from(
    ["all", "world", "world-ipv4", "world-ipv6", "host", "cluster", "init", "none", "remote-node"]
).map(EntityPeer)
peers = st.one_of(selectors.map(LabelPeer), blocks(), entities)
ranges = st.one_of(
    st.sampled_from(
        [
            PortRange(6, 80, 80),
            PortRange(6, 80, 81),
            PortRange(6),
            PortRange(17, 80, 80),
            PortRange(1, 8, 8),
            PortRange(6, 1, 65535),
            PortRange(6, 0, 0, "web"),
            PortRange(6, 0, 0, "alt"),
        ]
    )
)
http_rules = st.builds(
    HttpRule,
    method=st.sampled_from([None, "GET"]),
    path=st.sampled_from([None, "/a", "/[ab]"]),
)


@st.composite
def entries(draw):
    action = draw(st.sampled_from([Action.ALLOW] * 4 + [Action.DENY, Action.PASS]))
    ports = draw(st.one_of(st.none(), st.lists(ranges, max_size=2).map(tuple)))
    tcp = ports is not None and all(one.protocol == 6 for one in ports)
    l7 = None
    if action is Action.ALLOW and tcp and draw(st.booleans()):
        l7 = L7Rules(kind="http", http=tuple(draw(st.lists(http_rules, max_size=2))))
    return PolicyEntry(
        origin=Origin(kind="T", namespace="", name="n", path=str(draw(st.integers(0, 9)))),
        direction=draw(st.sampled_from(list(TrafficDirection))),
        action=action,
        subject=draw(selectors),
        subject_is_node=draw(st.sampled_from([False] * 5 + [True])),
        tier=draw(st.sampled_from([Tier.NORMAL] * 3 + [Tier.ADMIN, Tier.BASELINE])),
        priority=draw(st.sampled_from([0.0, 0.0, 1.0])),
        peers=draw(st.one_of(st.none(), st.lists(peers, max_size=2).map(tuple))),
        ports=ports,
        l7=l7,
        authentication=draw(st.sampled_from([""] * 7 + ["required"]))
        if action is Action.ALLOW
        else "",
        default_deny=draw(st.sampled_from([True, True, False])),
    )


def objects():
    return st.builds(
        lambda name, listed: PolicyObject(
            key=ObjectKey(kind="T", namespace="", name=name), entries=tuple(listed)
        ),
        st.sampled_from("pqr"),
        st.lists(entries(), min_size=1, max_size=4),
    )


changes = st.one_of(
    st.tuples(st.just("apply"), objects()),
    st.tuples(st.just("apply"), objects()),
    st.tuples(st.just("delete"), st.sampled_from("pqr")),
    st.tuples(st.just("label"), st.tuples(st.sampled_from("abc"), label_sets)),
    st.tuples(st.just("manage"), st.sampled_from("abc")),
    st.tuples(
        st.just("settings"),
        st.builds(
            Settings,
            enforcement=st.sampled_from(["default", "default", "always", "never"]),
            allow_localhost=st.sampled_from(["always", "policy"]),
            policy_audit_mode=st.sampled_from([False, False, True]),
        ),
    ),
)


class History:
    """One stage that lives through changes, and what the obvious evaluator must know of it."""

    def __init__(self, labels, settings):
        self.labels = {name: dict(labels.get(name, {})) for name in ENDPOINTS}
        self.managed = set(ENDPOINTS)
        self.settings = settings
        self.objects = {}
        self.stage = Stage(settings=settings)
        self.place()

    def texts(self, name):
        if name in ("init", "host"):
            return [f"reserved:{name}"]
        if name == "peer":
            return ["k8s:x=1"]
        return [f"k8s:{key}={value}" for key, value in self.labels[name].items()] + ["k8s:z=0"]

    def place(self, stage=None):
        stage = stage or self.stage
        stage.settings = self.settings
        stage.endpoints.clear()
        for name, address in (ENDPOINTS | UNMANAGED).items():
            stage.endpoint(
                name,
                address,
                self.texts(name),
                ports=NAMED.get(name, ()),
                managed=name in self.managed,
            )

    def perform(self, change):
        kind, value = change
        match kind:
            case "apply":
                self.objects[value.key] = value
                self.stage.apply(value)
            case "delete":
                key = ObjectKey(kind="T", namespace="", name=value)
                self.objects.pop(key, None)
                self.stage.delete(key)
            case "label":
                name, labels = value
                self.labels[name] = labels
            case "manage":
                self.managed ^= {value}
            case "settings":
                self.settings = value
        self.place()

    def someone(self, name):
        if name not in ENDPOINTS and name not in UNMANAGED:
            labels = LabelSet.parse(["reserved:world"])
            return Someone(parse_address(name), labels)
        address = parse_address((ENDPOINTS | UNMANAGED)[name])
        labels = LabelSet.parse(self.texts(name))
        same = [other for other in self.managed if self.texts(other) == self.texts(name)]
        return Someone(
            address,
            labels,
            managed=name in self.managed,
            ports=port_names([name]),
            identity_ports=port_names(same),
        )

    def answers(self, view):
        """Every pair of parties, every port: what the view says, and what is obvious."""
        parties = [*ENDPOINTS, *UNMANAGED, *WORLD]
        people = {name: self.someone(name) for name in parties}
        for source in parties:
            for destination in parties:
                one, other = people[source], people[destination]
                if len(one.address) != len(other.address):
                    continue
                for protocol, port in PORTS:
                    decision = view.decide(one.address, other.address, protocol, port)
                    yield (source, destination, protocol, port), decision, (one, other)


def port_names(owners):
    found = {}
    for owner in owners:
        for name, protocol, port in NAMED.get(owner, ()):
            found.setdefault((protocol, port), set()).add(name)
    return found


def of_side(verdict):
    """Reduce a side to what may pass: nothing, everything, or some requests through the proxy."""
    if verdict is None:
        return "all"
    if not verdict.allowed:
        return "none"
    if verdict.l7 is None:
        return "all"
    if verdict.unrestricted:
        return ("proxy", REQUESTS)
    matcher = HttpMatcher(tuple(rule for row in verdict.l7 for rule in row.http))
    passed = tuple(r for r in REQUESTS if matcher.match(*r, b"", ()) is not None)
    return ("proxy", passed)


def obviously(answer):
    if not answer.allowed:
        return "none"
    if not answer.proxied:
        return "all"
    if answer.items is None:
        return ("proxy", REQUESTS)
    passed = tuple(
        (method, path)
        for method, path in REQUESTS
        if any(
            item.method in (None, method.decode())
            and (
                item.path is None
                or (item.path == "/[ab]" and path in (b"/a", b"/b"))
                or item.path.encode() == path
            )
            for item in answer.items
        )
    )
    return ("proxy", passed)


def permitted(decision):
    """What a flow may do, to compare before and after: a set of requests, or one packet."""
    if decision.verdict is Verdict.DROP:
        return set()
    passed = set(REQUESTS)
    for side in (of_side(decision.egress), of_side(decision.ingress)):
        if side == "none":
            return set()
        if side != "all":
            passed &= set(side[1])
    return passed | {"connect"}


# About 2,000 (policies, flow) pairs an example: more than 100,000 in a run.
HISTORY = settings(max_examples=60)


@HISTORY
@given(
    st.dictionaries(st.sampled_from("abc"), label_sets),
    st.lists(changes, min_size=1, max_size=6),
)
def test_every_history_gives_the_obvious_answers(labels, history):
    lived = History(labels, Settings())
    before = None
    for change in history:
        lived.perform(change)
        snapshot = decode(encode(lived.stage.snapshot()))
        view = View(snapshot)
        law = Law(list(lived.objects.values()), lived.settings)
        after = {}
        for place, decision, (one, other) in lived.answers(view):
            egress, ingress = law.flow(one, other, place[2], place[3])
            found = of_side(decision.egress), of_side(decision.ingress)
            assert found == (obviously(egress), obviously(ingress)), (change, place)
            after[place] = permitted(decision)
        if before is not None and before[0] == snapshot.generation:
            lost = [place for place, had in before[1].items() if had - after[place]]
            assert not lost, f"{change[0]} took away {lost} without a new generation"
        before = snapshot.generation, after


@HISTORY
@given(
    st.dictionaries(st.sampled_from("abc"), label_sets),
    st.lists(changes, min_size=2, max_size=8),
)
def test_how_a_state_was_reached_leaves_no_trace_in_the_answers(labels, history):
    lived = History(labels, Settings())
    for change in history:
        lived.perform(change)
        lived.stage.snapshot()
    fresh = Stage(settings=lived.settings)
    lived.place(fresh)
    fresh.apply(*reversed(lived.objects.values()))
    scratch = View(fresh.snapshot())
    for place, decision, (one, other) in lived.answers(lived.stage.view):
        again = scratch.decide(one.address, other.address, place[2], place[3])
        assert of_side(decision.egress) == of_side(again.egress), place
        assert of_side(decision.ingress) == of_side(again.ingress), place
        assert (decision.verdict, decision.reason, decision.direction, decision.audited) == (
            again.verdict,
            again.reason,
            again.direction,
            again.audited,
        )


@HISTORY
@given(st.lists(objects(), min_size=1, max_size=3))
def test_unchanged_input_gives_the_same_snapshot(listed):
    lived = History({}, Settings())
    for one in listed:
        lived.perform(("apply", one))
    first = lived.stage.snapshot()
    lived.stage.apply(*lived.objects.values())
    assert lived.stage.snapshot() is first
