"""Who may talk to whom, as tables: from -> to:port, verdict, because of which rule."""

import pytest
from policy.stage import Stage

from conntrack.address import Prefix, parse_address
from firewall.identities.selector import EVERYTHING
from firewall.policy.model import (
    Action,
    LabelPeer,
    ObjectKey,
    Origin,
    PolicyEntry,
    PolicyObject,
    PortRange,
)
from firewall.policy.policymap import LOCAL_HOST_ORIGIN
from firewall.policy.readers import CAPABILITIES, ReaderSettings, read
from firewall.policy.snapshot import (
    DirectionRow,
    EndpointRow,
    IdentityRow,
    IpcacheRow,
    PolicyRow,
    Settings,
    Snapshot,
)
from firewall.policy.verdict import DropReason, PolicyMatch, TrafficDirection, Verdict
from firewall.policy.view import View

_SETTINGS = ReaderSettings(enforceable=frozenset(CAPABILITIES))
_NAMESPACE = "k8s:io.kubernetes.pod.namespace=default"
_CLUSTER = "k8s:io.cilium.k8s.policy.cluster=default"


def stage(*specs, audit=(), **settings):
    made = Stage(settings=Settings(**settings))
    for at, name in enumerate(("web", "db", "cache")):
        made.endpoint(
            name,
            f"10.0.0.{at + 1}",
            [f"k8s:app={name}", _NAMESPACE, _CLUSTER],
            ports=[("main", 6, 8000 + at)],
            audit=name in audit,
        )
    made.host("10.0.0.254")
    for at, spec in enumerate(specs):
        text = (
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n"
            f"metadata: {{name: p{at}}}\nspec: {spec}\n"
        )
        result = read(text, f"p{at}.yaml", settings=_SETTINGS)
        assert not result.errors, list(map(str, result.errors))
        made.apply(*result.objects)
    return made


def subject(name, rules):
    return f"{{endpointSelector: {{matchLabels: {{app: {name}}}}}, {rules}}}"


def ask(made, question):
    """`web -> db:5432/TCP`."""
    source, _, rest = question.partition(" -> ")
    destination, _, what = rest.rpartition(":")
    port, _, protocol = what.partition("/")
    return made.decide(source, destination, protocol, int(port))


LAYERS = subject(
    "db",
    "ingress: [{fromEndpoints: [{matchLabels: {app: web}}], toPorts: [{ports: "
    '[{port: "5432", protocol: TCP}]}]}, {fromEndpoints: [{matchLabels: {app: cache}}]}, '
    '{toPorts: [{ports: [{port: "9000", protocol: TCP}, {port: main, protocol: TCP}, '
    '{port: "0", protocol: UDP}]}]}, {fromEntities: [all], icmps: [{fields: '
    "[{type: 8, family: IPv4}]}]}, {fromCIDR: [192.0.2.0/24], toPorts: [{ports: "
    '[{port: "0", protocol: SCTP}]}]}], '
    'ingressDeny: [{toPorts: [{ports: [{port: "666", protocol: TCP}]}]}]',
)


@pytest.mark.parametrize(
    ("question", "verdict", "match", "because"),
    [
        ("web -> db:5432/TCP", Verdict.ACCEPT, PolicyMatch.L3_L4, "spec.ingress[0].toPorts[0]"),
        ("web -> db:5433/TCP", Verdict.DROP, PolicyMatch.NONE, None),
        (
            "web -> db:5432/UDP",
            Verdict.ACCEPT,
            PolicyMatch.PROTO_ONLY,
            "spec.ingress[2].toPorts[0]",
        ),
        ("cache -> db:22/TCP", Verdict.ACCEPT, PolicyMatch.L3_ONLY, "spec.ingress[1]"),
        ("cache -> db:13/ICMP", Verdict.ACCEPT, PolicyMatch.L3_ONLY, "spec.ingress[1]"),
        (
            "cache -> db:666/TCP",
            Verdict.DROP,
            PolicyMatch.L4_ONLY,
            "spec.ingressDeny[0].toPorts[0]",
        ),
        ("web -> db:9000/TCP", Verdict.ACCEPT, PolicyMatch.L4_ONLY, "spec.ingress[2].toPorts[0]"),
        ("web -> db:8001/TCP", Verdict.ACCEPT, PolicyMatch.L4_ONLY, "spec.ingress[2].toPorts[0]"),
        ("web -> db:8000/TCP", Verdict.DROP, PolicyMatch.NONE, None),
        ("web -> db:8/ICMP", Verdict.ACCEPT, PolicyMatch.L4_ONLY, "spec.ingress[3]"),
        (
            "192.0.2.7 -> db:5/SCTP",
            Verdict.ACCEPT,
            PolicyMatch.L3_PROTO,
            "spec.ingress[4].toPorts[0]",
        ),
        ("198.51.100.7 -> db:5/SCTP", Verdict.DROP, PolicyMatch.NONE, None),
        ("db -> web:1/TCP", Verdict.ACCEPT, PolicyMatch.ALL, None),
    ],
)
def test_the_deciding_rule_and_how_specific_it_is(question, verdict, match, because):
    """Research a.10: match types."""
    decision = ask(stage(LAYERS), question)
    side = decision.ingress
    assert (decision.verdict, side.match) == (verdict, match)
    by = side.allowed_by or side.denied_by
    assert [origin.path for origin in by] == ([because] if because else [])


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("web -> db:5433/TCP", DropReason.POLICY_DENIED),
        ("web -> db:666/TCP", DropReason.POLICY_DENY),
    ],
)
def test_a_default_deny_and_a_deny_rule_have_their_own_reasons(question, reason):
    decision = ask(stage(LAYERS), question)
    assert (decision.reason, decision.direction) == (reason, TrafficDirection.INGRESS)
    assert [(o.name, o.file) for o in decision.ingress.isolated_by] == [("p0", "p0.yaml")]


def test_both_sides_are_asked_and_egress_first():
    nothing_leaves = subject("web", "egress: [{toEndpoints: []}]")
    decision = ask(stage(LAYERS, nothing_leaves), "web -> db:5433/TCP")
    assert decision.direction is TrafficDirection.EGRESS
    assert not decision.egress.allowed
    assert not decision.ingress.allowed
    assert ask(stage(nothing_leaves), "cache -> web:1/TCP").verdict is Verdict.ACCEPT


def test_a_side_without_an_endpoint_has_no_verdict():
    decision = ask(stage(LAYERS), "198.51.100.1 -> web:80/TCP")
    assert (decision.egress, decision.direction) == (None, TrafficDirection.INGRESS)
    decision = ask(stage(LAYERS), "web -> 198.51.100.1:80/TCP")
    assert (decision.ingress, decision.direction) == (None, TrafficDirection.EGRESS)
    decision = ask(stage(LAYERS), "198.51.100.2 -> 198.51.100.1:80/TCP")
    assert (decision.verdict, decision.direction) == (Verdict.ACCEPT, None)


def test_an_endpoint_that_reaches_itself_needs_no_rule():
    """BEH-19."""
    closed = subject("web", "ingress: [{}], egress: [{}]")
    assert ask(stage(closed), "web -> web:80/TCP").verdict is Verdict.ACCEPT
    assert ask(stage(closed), "web -> db:80/TCP").verdict is Verdict.DROP


@pytest.mark.parametrize("mode", ["always", "policy"])
def test_the_local_host_reaches_endpoints_unless_that_is_left_to_policy(mode):
    closed = subject("web", "ingress: [{}]")
    decision = ask(stage(closed, allow_localhost=mode), "host -> web:80/TCP")
    assert (decision.verdict is Verdict.ACCEPT) == (mode == "always")
    if mode == "always":
        assert decision.ingress.allowed_by == (LOCAL_HOST_ORIGIN,)


def test_the_local_host_is_unrestricted_at_layer_7_and_denied_only_by_a_deny():
    """Research a.8: allow-localhost holds at L7 too."""
    http = subject(
        "web",
        'ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], '
        "rules: {http: [{method: GET}]}}]}]",
    )
    side = ask(stage(http), "host -> web:80/TCP").ingress
    assert side.l7 is not None
    assert side.unrestricted
    assert not ask(stage(http), "db -> web:80/TCP").ingress.unrestricted
    deny = subject("web", "ingressDeny: [{fromEntities: [host]}]")
    assert ask(stage(deny), "host -> web:80/TCP").verdict is Verdict.DROP


@pytest.mark.parametrize("mode", ["required", "test-always-fail"])
def test_an_allow_that_demands_authentication_drops_for_lack_of_it(mode):
    """BEH-17."""
    spec = subject(
        "web",
        "ingress: [{fromEndpoints: [{matchLabels: {app: db}}], "
        f"authentication: {{mode: {mode}}}}}, "
        "{fromEndpoints: [{matchLabels: {app: cache}}]}]",
    )
    decision = ask(stage(spec), "db -> web:80/TCP")
    assert decision.reason is DropReason.AUTH_REQUIRED
    assert [origin.path for origin in decision.ingress.denied_by] == ["spec.ingress[0]"]
    assert ask(stage(spec), "cache -> web:80/TCP").verdict is Verdict.ACCEPT


@pytest.mark.parametrize("how", [{"policy_audit_mode": True}, {"audit": ("web",)}])
def test_audit_mode_lets_a_denial_pass_and_says_so(how):
    closed = subject("web", "ingress: [{}]")
    decision = ask(stage(closed, **how), "db -> web:80/TCP")
    assert (decision.verdict, decision.audited) == (Verdict.ACCEPT, True)
    assert (decision.ingress.allowed, decision.ingress.reason) == (True, DropReason.POLICY_DENIED)
    allowed = ask(stage(**how), "db -> web:80/TCP")
    assert not allowed.audited


def test_audit_mode_of_one_endpoint_leaves_the_others_closed():
    closed = subject("db", "ingress: [{}]")
    assert ask(stage(closed, audit=("web",)), "web -> db:80/TCP").verdict is Verdict.DROP


def test_named_ports_of_egress_are_those_of_the_peers_identity():
    spec = subject(
        "web", "egress: [{toEndpoints: [{}], toPorts: [{ports: [{port: main, protocol: TCP}]}]}]"
    )
    made = stage(spec)
    assert ask(made, "web -> db:8001/TCP").verdict is Verdict.ACCEPT
    assert ask(made, "web -> db:8002/TCP").verdict is Verdict.DROP
    assert ask(made, "web -> cache:8002/TCP").verdict is Verdict.ACCEPT


def test_an_http_rule_redirects_only_where_it_decides():
    spec = subject(
        "web",
        'egress: [{toEndpoints: [{matchLabels: {app: db}}], toPorts: [{ports: [{port: "80"}], '
        "rules: {http: []}}]}, {toEndpoints: [{matchLabels: {app: cache}}]}]",
    )
    spec = spec.replace('{port: "80"}', '{port: "80", protocol: TCP}')
    decision = ask(stage(spec), "web -> db:80/TCP")
    assert (decision.verdict, decision.direction) == (Verdict.REDIRECT, TrafficDirection.EGRESS)
    [row] = decision.egress.l7
    assert len(row.http) == 1, "an empty list is one item without fields"
    assert ask(stage(spec), "web -> cache:80/TCP").verdict is Verdict.ACCEPT


def test_the_log_value_of_the_deciding_rule_comes_along():
    spec = subject("web", "log: {value: tell}, ingress: [{fromEndpoints: [{}]}]")
    assert ask(stage(spec), "db -> web:1/TCP").ingress.log == ("tell",)


def test_peers_are_found_by_the_longest_prefix():
    row = EndpointRow(7, "e", "", 300, (parse_address("10.1.2.3"),), "veth7", 9)
    snapshot = Snapshot(
        revision=5,
        generation=2,
        endpoints=(row,),
        identities=(IdentityRow(300, (), (4,)), IdentityRow(2, ("reserved:world",), (1,))),
        ipcache=(IpcacheRow(bytes([10, 0, 0, 0]), 8, 16777217, (6,)),),
        settings=Settings(local_addresses=(parse_address("10.1.0.1"),)),
    )
    view = View(snapshot)
    assert (view.revision, view.generation) == (5, 2)
    assert view.peer(parse_address("10.1.2.3")) == (300, {0, 4}, row)
    assert view.peer(parse_address("10.9.9.9")) == (16777217, {0, 6}, None)
    assert view.peer(parse_address("8.8.8.8")) == (2, {0, 1}, None)
    assert view.peer(parse_address("fd00::8")).identity == 2
    assert view.peer(parse_address("10.1.0.1")).identity == 1
    assert (view.endpoint_on(9), view.endpoint_on(0)) == (row, None)


def test_the_world_has_a_number_per_family_in_a_dual_stack():
    view = View(Snapshot(settings=Settings(dual_stack=True)))
    assert view.peer(parse_address("8.8.8.8")).identity == 9
    assert view.peer(parse_address("fd00::8")).identity == 10


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(
    ("peer", "four", "six"),
    [
        ("toEntities: [world]", True, True),
        ("toEntities: [world-ipv4]", True, False),
        ("toEntities: [world-ipv6]", False, True),
        ("toCIDR: [0.0.0.0/0]", True, False),
        ('toCIDR: ["::/0"]', False, True),
        ("toEntities: [all]", True, True),
        ("toEntities: [cluster]", False, False),
        ("toEntities: [none]", False, False),
    ],
)
def test_the_world_is_selected_family_by_family(peer, four, six, dual):
    spec = subject("web", f"egress: [{{{peer}}}, {{toCIDR: [192.0.2.0/24, 'fd01::/16']}}]")
    made = stage(spec, dual_stack=dual)
    assert (ask(made, "web -> 198.51.100.1:80/TCP").verdict is Verdict.ACCEPT) == four
    made.endpoint("six", "fd00::6", ["k8s:app=web", _NAMESPACE, _CLUSTER])
    assert (ask(made, "six -> fd00::1:80/TCP").verdict is Verdict.ACCEPT) == six
    assert ask(made, "six -> fd01::1:80/TCP").verdict is Verdict.ACCEPT
    assert ask(made, "web -> 192.0.2.1:80/TCP").verdict is Verdict.ACCEPT


def test_an_endpoint_without_policy_is_closed():
    """Not ready is not open: the agent has not resolved this identity yet."""
    row = EndpointRow(1, "e", "", 300, (parse_address("10.1.2.3"),))
    view = View(Snapshot(endpoints=(row,)))
    decision = view.decide(parse_address("10.1.2.3"), parse_address("8.8.8.8"), 6, 80)
    assert (decision.verdict, decision.reason) == (Verdict.DROP, DropReason.DROP_EP_NOT_READY)


def test_an_address_of_an_endpoint_never_falls_into_a_wider_row():
    open_ = DirectionRow(enforced=False, default_deny=False)
    row = EndpointRow(1, "e", "", 300, (parse_address("10.1.2.3"),))
    view = View(
        Snapshot(
            endpoints=(row,),
            ipcache=(IpcacheRow(bytes([10, 0, 0, 0]), 8, 16777217, (6,)),),
            policies=(PolicyRow(300, open_, open_),),
        )
    )
    assert view.peer(parse_address("10.1.2.3")).identity == 300


def test_memos_stay_bounded():
    made = stage(LAYERS)
    view = made.view
    for number in range(40000):
        view.decide(number.to_bytes(4, "big"), made.address("db"), 6, 80)
    assert len(view._decisions) <= 16384
    assert len(view._peers) <= 16384


def test_named_ports_of_ingress_are_the_endpoints_own():
    """Two endpoints share an identity, but each answers for its own ports."""
    made = Stage()
    for at, port in enumerate((8080, 9090)):
        made.endpoint(
            f"e{at}", f"10.0.0.{at + 1}", ["k8s:app=web", _NAMESPACE], ports=[("http", 6, port)]
        )
    text = (
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: n}\n"
        "spec: {podSelector: {}, ingress: [{ports: [{port: http}]}]}"
    )
    made.apply(*read(text, "n.yaml", settings=_SETTINGS).objects)
    for name, port, verdict in (
        ("e0", 8080, Verdict.ACCEPT),
        ("e0", 9090, Verdict.DROP),
        ("e1", 9090, Verdict.ACCEPT),
        ("e1", 8080, Verdict.DROP),
    ):
        assert made.decide("192.0.2.1", name, "TCP", port).verdict is verdict, (name, port)


def test_ip_block_means_endpoints_only_in_kubernetes_own_formats():
    knp = (
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: n}\nspec: "
        "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{ipBlock: "
        "{cidr: 10.0.0.0/24, except: [10.0.0.3/32]}}]}]}"
    )
    made = stage()
    made.apply(*read(knp, "n.yaml", settings=_SETTINGS).objects)
    assert ask(made, "db -> web:80/TCP").verdict is Verdict.ACCEPT
    assert ask(made, "cache -> web:80/TCP").verdict is Verdict.DROP
    cnp = subject("web", "ingress: [{fromCIDR: [10.0.0.0/24]}]")
    assert ask(stage(cnp), "db -> web:80/TCP").verdict is Verdict.DROP
    assert ask(stage(cnp), "10.0.0.99 -> web:80/TCP").verdict is Verdict.ACCEPT


def test_cidr_groups_and_services_are_looked_up_when_they_change():
    spec = subject(
        "web",
        "egress: [{toCIDRSet: [{cidrGroupRef: g}]}, {toServices: [{k8sService: "
        "{serviceName: s, namespace: default}}]}]",
    )
    made = stage(spec)
    group = (
        "apiVersion: cilium.io/v2\nkind: CiliumCIDRGroup\nmetadata: {name: g}\n"
        "spec: {externalCIDRs: [192.0.2.0/24]}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: default}\n"
        "spec: {selector: {app: db}}"
    )
    questions = ("web -> 192.0.2.1:80/TCP", "web -> db:80/TCP")
    assert [ask(made, q).verdict for q in questions] == [Verdict.DROP] * 2
    made.resolver.set_resources(read(group, "g.yaml", settings=_SETTINGS).resources)
    assert [ask(made, q).verdict for q in questions] == [Verdict.ACCEPT] * 2
    assert ask(made, "web -> cache:80/TCP").verdict is Verdict.DROP
    made.resolver.set_resources(())
    assert [ask(made, q).verdict for q in questions] == [Verdict.DROP] * 2


def test_a_service_without_selector_means_its_addresses():
    spec = subject(
        "web", "egress: [{toServices: [{k8sService: {serviceName: s, namespace: default}}]}]"
    )
    made = stage(spec)
    text = (
        "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: default}\nspec: {}\n---\n"
        "apiVersion: v1\nkind: Endpoints\nmetadata: {name: s, namespace: default}\n"
        "subsets: [{addresses: [{ip: 198.51.100.9}]}]"
    )
    made.resolver.set_resources(read(text, "s.yaml", settings=_SETTINGS).resources)
    assert Prefix(parse_address("198.51.100.9"), 32) in made.resolver.prefixes()
    assert ask(made, "web -> 198.51.100.9:80/TCP").verdict is Verdict.ACCEPT
    assert ask(made, "web -> 198.51.100.8:80/TCP").verdict is Verdict.DROP


def test_the_local_host_need_not_authenticate_whatever_rule_lets_it_in_as_well():
    """`allow_localhost` is an allow of its own, and asks for nothing."""
    origin = Origin(kind="T", namespace="", name="n", path="0")
    stage = Stage()
    stage.host("10.9.9.9")
    stage.endpoint("a", "10.0.0.1", ["k8s:app=a"])
    stage.endpoint("b", "10.0.0.2", ["k8s:app=b"])
    demand = PolicyEntry(
        origin=origin,
        direction=TrafficDirection.INGRESS,
        action=Action.ALLOW,
        subject=EVERYTHING,
        peers=(LabelPeer(EVERYTHING),),
        ports=(PortRange(6, 80, 80),),
        authentication="required",
    )
    key = ObjectKey(kind="T", namespace="", name="p")
    stage.apply(PolicyObject(key=key, entries=(demand,)))
    assert stage.decide("host", "a", "TCP", 80).verdict is Verdict.ACCEPT
    assert stage.decide("b", "a", "TCP", 80).reason is DropReason.AUTH_REQUIRED
