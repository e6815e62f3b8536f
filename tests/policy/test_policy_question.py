"""Questions in an operator's words: what each word means, and what is refused with a reason."""

import pytest

from conntrack.address import format_address, parse_address
from firewall.identities.labels import LabelFilter, LabelSet
from firewall.identities.reserved import Reserved
from firewall.policy.question import (
    Question,
    QuestionError,
    parse_request,
    port_number,
    split_destination,
)
from firewall.policy.readers import SWITCHED, ReaderSettings, read
from firewall.policy.realm import Actor, actor_labels, ask, joined, make_realm
from firewall.policy.snapshot import NamedPortRow
from firewall.policy.verdict import Verdict

WEB = NamedPortRow("web", 6, 8080)
DNS = NamedPortRow("dns", 17, 53)

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: p, namespace: x}
spec:
  endpointSelector: {matchLabels: {app: b}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: a}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
  - fromEntities: [host]
    icmps: [{fields: [{type: 8}, {family: IPv6, type: EchoRequest}]}]
---
apiVersion: v1
kind: Namespace
metadata: {name: red, labels: {team: red}}
"""


def actor(name, namespace, *addresses, ports=()):
    own = LabelSet.parse([f"app={name}"], default_source="k8s")
    return Actor(
        name=name,
        namespace=namespace,
        labels=actor_labels(own, namespace, "default", None, LabelFilter()),
        addresses=tuple(map(parse_address, addresses)),
        named_ports=ports,
    )


@pytest.fixture
def realm():
    result = read(POLICY, "p.yaml")
    assert not result.errors
    actors = [
        actor("a", "x", "10.0.0.1", "fd00::1"),
        actor("b", "x", "fd00::2", "10.0.0.2", ports=(WEB, DNS)),
        actor("c", "y", "10.0.0.3"),
        actor("same", "x", "10.0.0.4"),
        actor("same", "y", "10.0.0.5"),
    ]
    return make_realm(actors, result.objects, result.resources)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x/b:80/TCP", ("x/b", "80/TCP")),
        ("b:EchoRequest/ICMP", ("b", "EchoRequest/ICMP")),
        ("b", ("b", "")),
        ("10.0.0.2:53/UDP", ("10.0.0.2", "53/UDP")),
        ("fd00::2", ("fd00::2", "")),
        ("[fd00::2]:53/UDP", ("fd00::2", "53/UDP")),
        ("[fd00::2]", ("fd00::2", "")),
    ],
)
def test_a_destination_is_an_end_and_a_port(text, parts):
    """An IPv6 address needs brackets before a port (RFC 3986 section 3.2.2)."""
    assert split_destination(text) == parts


@pytest.mark.parametrize(
    ("text", "ipv6", "number"),
    [
        ("80", False, (6, 80)),
        ("80/tcp", False, (6, 80)),
        ("53/UDP", False, (17, 53)),
        ("9/SCTP", False, (132, 9)),
        ("web", False, (6, 8080)),
        ("WEB/TCP", False, (6, 8080)),
        ("dns", False, (17, 53)),
        ("8/ICMP", False, (1, 8)),
        ("EchoRequest/ICMP", False, (1, 8)),
        ("EchoRequest/ICMP", True, (58, 128)),
        ("echorequest/ICMPv6", True, (58, 128)),
        ("icmp", False, (1, 8)),
        ("GRE", False, (47, 0)),
        ("0/TCP", False, (6, 0)),
    ],
)
def test_a_port_is_a_number_a_name_or_a_message_type(text, ipv6, number):
    """ICMP takes the number of the family; names are the destination's."""
    assert port_number(text, ipv6=ipv6, named=(WEB, DNS)) == number


@pytest.mark.parametrize(
    ("text", "ipv6", "message"),
    [
        ("", False, "which port"),
        ("70000/TCP", False, "highest is 65535"),
        ("http/TCP", False, 'no port named "http"; it has web, dns'),
        ("web/UDP", False, "no port named"),
        ("80/XTP", False, "XTP is none of"),
        ("256/ICMP", False, "no ICMP type"),
        ("EchoRequest/ICMPv6", False, "IPv4"),
        ("5/GRE", False, "no ports"),
    ],
)
def test_a_port_that_means_nothing_is_refused(text, ipv6, message):
    """The word and what it could be."""
    with pytest.raises(QuestionError, match=message):
        port_number(text, ipv6=ipv6, named=(WEB, DNS))


def test_a_request_has_its_host_from_the_url_or_a_header():
    """Absolute and origin form (RFC 9112 section 3.2)."""
    found = parse_request("PUT http://b.x:8080/v1/x?y=1", ["K: v: w"])
    assert found[:3] == (b"PUT", b"/v1/x?y=1", b"b.x:8080")
    assert found.headers == ((b"K", b"v: w"),)
    assert parse_request("/v1", ["Host: b"])[:3] == (b"GET", b"/v1", b"b")
    assert parse_request("GET http://b", [])[1:3] == (b"/", b"b")


@pytest.mark.parametrize(
    ("text", "headers"), [("PUT", []), ("PUT x", []), ("GET /a b", []), ("GET /", ["novalue"])]
)
def test_what_is_no_request_is_refused(text, headers):
    """Nothing is guessed."""
    with pytest.raises(QuestionError):
        parse_request(text, headers)


@pytest.mark.parametrize(
    ("question", "addresses"),
    [
        ({"source": "x/a", "destination": "b"}, ("10.0.0.1", "10.0.0.2")),
        ({"source": "x:a", "destination": "x/b"}, ("10.0.0.1", "10.0.0.2")),
        ({"source": "a", "destination": "b", "ipv6": True}, ("fd00::1", "fd00::2")),
        ({"source": "fd00::9", "destination": "b"}, ("fd00::9", "fd00::2")),
        ({"source": "world", "destination": "y/same"}, ("203.0.113.1", "10.0.0.5")),
        ({"source": "host", "destination": "c"}, ("198.18.255.254", "10.0.0.3")),
        ({"source": "c", "destination": "192.0.2.7"}, ("10.0.0.3", "192.0.2.7")),
    ],
)
def test_ends_are_found_by_name_address_or_entity(realm, question, addresses):
    """The first family that both ends have, unless one is asked for."""
    asked = ask(realm, Question(port="80", **question))
    assert tuple(map(format_address, asked.traffic[:2])) == addresses


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"source": "aa", "destination": "b"}, 'no endpoint is called aa; did you mean "a"'),
        ({"source": "same", "destination": "b"}, "several endpoints"),
        ({"source": "c", "destination": "fd00::2"}, "no addresses of one family"),
        ({"source": "c", "destination": "b", "ipv6": True}, "no addresses of IPv6"),
        ({"destination": "b"}, "say the source once"),
        ({"source": "a", "source_labels": ("app=a",), "destination": "b"}, "say the source once"),
        ({"source": "a", "destination": "b", "headers": ("K: v",)}, "headers belong to a request"),
        ({"source": "a", "destination_identity": 999}, "identity 999 is not known"),
        ({"source": "a", "destination_labels": ("=x",)}, "label"),
    ],
)
def test_an_end_that_means_nothing_is_refused(realm, question, message):
    """The message says which word and what to write instead."""
    with pytest.raises(QuestionError, match=message):
        ask(realm, Question(port="80", **question))


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        (("app=a", "k8s:io.kubernetes.pod.namespace=x"), "allowed"),
        (("app=a",), "denied"),  # in namespace default
        (("k8s:app=z", "k8s:io.kubernetes.pod.namespace=x"), "denied"),
        (("reserved:world",), "denied"),
    ],
)
def test_labels_stand_for_an_endpoint_that_need_not_exist(realm, source, verdict):
    """As `cilium policy trace -s` did."""
    question = Question(source_labels=source, destination="x/b", port="8080/TCP")
    assert ask(realm, question).answer().verdict == verdict


def test_an_identity_stands_for_an_endpoint_that_has_it(realm):
    """The number that `bartizan identity list` shows."""
    number = realm.view.peer(parse_address("10.0.0.1")).identity
    question = Question(source_identity=number, destination="x/b", port="8080")
    assert ask(realm, question).answer().verdict == "allowed"


def test_labels_get_those_of_a_declared_namespace(realm):
    """So that namespace selectors can be asked about."""
    question = Question(
        source_labels=("app=a", "k8s:io.kubernetes.pod.namespace=red"),
        destination="x/b",
        port="80",
    )
    view = ask(realm, question).realm.view
    labels = {text for row in view.snapshot.identities for text in row.labels}
    assert "k8s:io.cilium.k8s.namespace.labels.team=red" in labels


@pytest.mark.parametrize(("source", "verdict"), [("host", "allowed"), ("x/a", "denied")])
@pytest.mark.parametrize("ipv6", [False, True])
def test_icmp_is_asked_by_the_name_of_its_type(realm, source, verdict, ipv6):
    """One word for both families."""
    question = Question(source=source, destination="b", port="EchoRequest/ICMP", ipv6=ipv6)
    assert ask(realm, question).answer().verdict == verdict


def test_a_policy_for_nodes_makes_the_node_one_of_them():
    """Asked without a daemon; joining further endpoints keeps it the host."""
    text = (
        "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: n}\n"
        "spec: {nodeSelector: {}, ingress: [{fromEntities: [cluster]}]}"
    )
    found = read(text, "n.yaml", settings=ReaderSettings(assumed=frozenset(SWITCHED)))
    asked = make_realm((), found.objects)
    for world in (asked, joined(asked, [actor("a", "x", "10.0.0.9")])):
        (node,) = [row for row in world.view.snapshot.endpoints if row.identity == Reserved.HOST]
        denied = world.view.decide(parse_address("203.0.113.1"), node.addresses[0], 6, 22)
        assert denied.verdict is Verdict.DROP
    assert make_realm((), ()).view.snapshot.endpoints == ()


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("to: [{ipBlock: {cidr: 0.0.0.0/0}}]", Verdict.ACCEPT),
        ("to: [{ipBlock: {cidr: 0.0.0.0/0, except: [198.18.255.0/24]}}]", Verdict.DROP),
    ],
)
def test_an_ip_block_means_the_nodes_own_address_too(kind, verdict):
    """As it means those of pods and other nodes; the daemon says the same."""
    text = (
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: n, namespace: x}\n"
        f"spec: {{podSelector: {{}}, policyTypes: [Egress], egress: [{{{kind}}}]}}"
    )
    asked = make_realm([actor("a", "x", "10.0.0.9")], read(text, "n.yaml").objects)
    host = asked.view.snapshot.settings.local_addresses[0]
    assert asked.view.decide(parse_address("10.0.0.9"), host, 6, 22).verdict is verdict
