"""L7 rules on flows whose destination is translated on the node: DNAT, REDIRECT, published ports.

The user's rules are made with iptables. Clients dial what they know, an address that nobody has or
the node's; policy and records are about the server behind it; what the client hears comes from what
it dialed, or its kernel would not take it. A server that sees the client's own port got the
connection directly, from another port it is the proxy's.
"""

import http.client
import sys
from contextlib import closing, suppress

import pytest
import questions
from evidence import dropped, flow, stopped
from rules import peers, policy, ports
from test_firewall_resets import is_reset
from traffic import (
    DEADLINE_S,
    FAMILIES,
    V4,
    V6,
    Echo,
    NothingArrivedError,
    carries,
    eventually,
    exchange,
    is_tcp,
    tcp,
    token,
    udp,
)

from conntrack.address import parse_address

FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])

SERVICE = {V4: "10.96.0.10", V6: "fd00:96::10"}
"""Addresses that nobody has."""

SERVED = "/v1/request-landing"
HTTP = [{"method": "POST", "path": SERVED}]
LANDING = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", http=HTTP)}], name="to-b")
PLAIN = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", "7/TCP")}], name="to-b")

pytestmark = pytest.mark.needs(
    "nfqueue", "nfqueue6", "tproxy", "tproxy6", "socket", "connmark", "ipset", "nft", "ipv6",
    "conntrack-tool",
)  # fmt: skip


@pytest.fixture(scope="module")
def running(module_lab, module_bartizan):
    made = module_lab(a="app=a", b="app=b", c="app=c", w="app=w")
    for server in (made.host("b"), made.node):
        server.start([sys.executable, "-m", "lab.demo.deathstar"])
        eventually(lambda server=server: "operational" in server.log(), "the server runs")
    settings = {"workers": 2, "policy": {"allow_localhost": "policy"}}
    made.firewall = module_bartizan(made, settings, endpoints=False)
    for name in "abc":
        made.firewall.add(made.host(name))
    return made


@pytest.fixture
def node(running):
    """a, b and c are endpoints, w is the world outside; b serves HTTP. No rules of the user's."""
    running.firewall.clear()
    yield running
    for program in ("iptables", "ip6tables"):
        running.node.run([program, "-t", "nat", "-F"], check=True)
    running.node.run(["conntrack", "-F"])


def nat(node, family: int, *rule: str) -> None:
    program = "iptables" if family == V4 else "ip6tables"
    node.node.run([program, "-t", "nat", *rule], check=True)


def translate(
    node, family: int, target: int = 80, port: int = 8000, protocol: str = "tcp", **where: str
) -> None:
    """`address` (SERVICE) at `port` becomes b at `target`, in `chain` (PREROUTING)."""
    address = node.host("b").address(family)
    shown = f"[{address}]" if family == V6 else address
    dialed = ["-d", where.get("address", SERVICE[family]), "-p", protocol, "--dport", str(port)]
    chain = where.get("chain", "PREROUTING")
    nat(node, family, "-A", chain, *dialed, "-j", "DNAT", "--to", f"{shown}:{target}")


def client(machine, address: str, port: int = 8000) -> http.client.HTTPConnection:
    made = http.client.HTTPConnection(address, port, timeout=DEADLINE_S)
    made.sock = machine.connect(address, port, timeout_s=DEADLINE_S)
    made.auto_open = 0
    return made


def ask(connection: http.client.HTTPConnection, method: str, path: str) -> int:
    connection.request(method, path)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def same(one: str, other: str) -> bool:
    return parse_address(one) == parse_address(other)


def await_table(node) -> None:
    """The agent looks for its table every ten seconds."""

    def whole() -> bool:
        listed = node.node.run(["nft", "list table ip bartizan"]).stdout
        return "chain arriving" in listed and node.host("b").address4 in listed

    eventually(whole, "the table is made again")


def between(source: str, destination: str):
    """Matches records about two addresses."""

    def matches(record) -> bool:
        ends = record.get("IP", {})
        return (ends.get("source"), ends.get("destination")) == (source, destination)

    return matches


@FAMILY
def test_each_request_through_a_service_is_judged_by_its_backend(node, family):
    """200, 403, 200 on one connection; another port than dialed; the records name a and b."""
    a, b, c = (node.host(name) for name in "abc")
    translate(node, family)
    node.firewall.apply(LANDING)
    begin = len(b.log())
    asking = client(a, SERVICE[family])
    assert ask(asking, "POST", SERVED) == 200
    assert ask(asking, "PUT", "/v1/exhaust-port") == 403
    assert ask(asking, "POST", SERVED) == 200
    assert same(asking.sock.getpeername()[0], SERVICE[family])
    asking.close()
    assert "exhaust-port" not in b.log()[begin:]
    a_to_b = between(a.address(family), b.address(family))
    for verdict, method in (("FORWARDED", "POST"), ("DROPPED", "PUT")):
        record = flow(
            node.firewall,
            lambda record, method=method: (
                a_to_b(record) and record.get("l7", {}).get("http", {}).get("method") == method
            ),
            verdict=verdict,
        )
        assert record["l4"]["TCP"]["destination_port"] == 80
        assert "k8s:app=a" in record["source"]["labels"]
        assert "k8s:app=b" in record["destination"]["labels"]
    with pytest.raises(TimeoutError):
        c.connect(SERVICE[family], 8000, timeout_s=0.5)
    c_to_b = between(c.address(family), b.address(family))
    flow(node.firewall, c_to_b, verdict="DROPPED", reason="POLICY_DENIED")


@FAMILY
def test_a_plain_rule_beside_it_leads_past_the_proxy(node, family):
    """The same client, the same service, another port: the server sees the client's own port."""
    a, b = node.host("a"), node.host("b")
    translate(node, family)
    translate(node, family, target=7, port=7000)
    rules = [{**peers("app=a"), **ports("80/TCP", http=HTTP)}, {**peers("app=a"), **ports("7/TCP")}]
    node.firewall.apply(policy("app=b", ingress=rules, name="to-b"))
    with Echo(b, 7, family) as server, a.connect(SERVICE[family], 7000) as direct:
        accepted = server.accept()
        assert accepted.getpeername()[1] == direct.getsockname()[1]
        for _ in range(20):
            assert exchange(direct, accepted, token())
    asking = client(a, SERVICE[family])
    assert ask(asking, "GET", "/v1/") == 403
    asking.close()


@FAMILY
def test_a_port_of_the_node_is_published_to_the_world(node, family):
    """As Docker does it; the world is nobody's endpoint, and is asked for its requests as well."""
    b, w = node.host("b"), node.host("w")
    address = node.node.address(family)
    translate(node, family, address=address)
    world = {"fromEntities": ["world"], **ports("80/TCP", http=HTTP)}
    node.firewall.apply(policy("app=b", ingress=[world], name="to-b"))
    asking = client(w, address)
    assert ask(asking, "POST", SERVED) == 200
    assert ask(asking, "GET", "/v1/") == 403
    assert same(asking.sock.getpeername()[0], address)
    asking.close()
    flow(node.firewall, between(w.address(family), b.address(family)), verdict="DROPPED")


@FAMILY
def test_what_is_redirected_to_the_node_itself_is_judged(node, family):
    """Egress rules of a for the node, wherever a wanted to go."""
    a = node.host("a")
    # REDIRECT of IPv6 means a link-local address, where the proxy cannot follow (docs/datapath.md).
    to = ["REDIRECT", "--to-ports", "80"]
    if family == V6:
        to = ["DNAT", "--to", f"[{node.node.address6}]:80"]
    nat(node, family, "-A", "PREROUTING", "-p", "tcp", "--dport", "8000", "-j", *to)
    host = {"toEntities": ["host"], **ports("80/TCP", http=HTTP)}
    node.firewall.apply(policy("app=a", egress=[host], name="from-a"))
    begin = len(node.node.log())
    for address in (node.node.address(family), SERVICE[family]):
        asking = client(a, address)
        assert ask(asking, "POST", SERVED) == 200
        assert ask(asking, "GET", "/v1/") == 403
        assert same(asking.sock.getpeername()[0], address)
        asking.close()
    assert "GET" not in node.node.log()[begin:]


@FAMILY
def test_masquerading_on_top_changes_nothing(node, family):
    """The proxy's own connection is masqueraded, and its answers find it."""
    a, b = node.host("a"), node.host("b")
    translate(node, family)
    nat(node, family, "-A", "POSTROUTING", "-o", b.interface, "-j", "MASQUERADE")
    node.firewall.apply(LANDING)
    asking = client(a, SERVICE[family])
    assert ask(asking, "POST", SERVED) == 200
    assert ask(asking, "GET", "/v1/") == 403
    asking.close()


@FAMILY
def test_the_nodes_own_requests_to_a_service_are_judged(node, family):
    """OUTPUT is translated behind mangle, too; the proxy asks in the node's name."""
    b = node.host("b")
    translate(node, family, chain="OUTPUT")
    host = {"fromEntities": ["host"], **ports("80/TCP", http=HTTP)}
    node.firewall.apply(policy("app=b", ingress=[host], name="to-b"))
    route = ["ip", "-6" if family == V6 else "-4", "route"]
    node.node.run([*route, "add", SERVICE[family], "dev", b.interface], check=True)
    asking = client(node.node, SERVICE[family])
    assert ask(asking, "POST", SERVED) == 200
    assert ask(asking, "GET", "/v1/") == 403
    asking.close()
    node.node.run([*route, "del", SERVICE[family]], check=True)


def test_what_was_redirected_by_the_address_dialed_is_judged_again(node):
    """Rules for the service's own address want the proxy, those for its backend do not."""
    a, b = node.host("a"), node.host("b")
    translate(node, V4, target=7)
    service = {"toCIDR": [f"{SERVICE[V4]}/32"], **ports("8000/TCP", http=HTTP)}
    backend = {"toEndpoints": [{"matchLabels": {"app": "b"}}], **ports("7/TCP")}
    node.firewall.apply(policy("app=a", egress=[service, backend], name="from-a"))
    with Echo(b, 7) as server, a.connect(SERVICE[V4], 8000) as direct:
        accepted = server.accept()
        assert accepted.getpeername()[1] == direct.getsockname()[1]
        assert exchange(direct, accepted, token())


@pytest.mark.parametrize("speaks", [True, False], ids=["speaking", "silent"])
@FAMILY
def test_a_connection_older_than_the_rule_is_reset_and_the_next_is_judged(node, family, speaks):
    """Carried by the kernel until then; and without the rule connections pass directly again."""
    a, b = node.host("a"), node.host("b")
    translate(node, family, target=7)
    node.firewall.apply(PLAIN)
    rule = policy("app=b", ingress=[{**peers("app=a"), **ports("7/TCP", http=HTTP)}], name="to-b")
    with Echo(b, 7, family) as server:
        with a.connect(SERVICE[family], 8000) as older:
            accepted = server.accept()
            for _ in range(30):
                assert exchange(older, accepted, token())
            node.firewall.apply(rule)
            if speaks:
                with suppress(ConnectionResetError):
                    older.send(b"are you there?")
            for end in (older, accepted):
                eventually(lambda end=end: is_reset(end), "the end is told")
        asking = client(a, SERVICE[family])
        assert ask(asking, "GET", "/v1/") == 403
        node.firewall.apply(PLAIN)
        with a.connect(SERVICE[family], 8000) as newer:
            assert server.accept().getpeername()[1] == newer.getsockname()[1]
        asking.close()


def test_a_new_policy_counts_for_the_next_request_and_a_lost_permission_ends_it(node):
    """On one connection by way of a service."""
    a = node.host("a")
    translate(node, V4)
    node.firewall.apply(LANDING)
    asking = client(a, SERVICE[V4])
    assert ask(asking, "POST", SERVED) == 200
    other = [{**peers("app=a"), **ports("80/TCP", http=[{"method": "GET"}])}]
    node.firewall.apply(policy("app=b", ingress=other, name="to-b"))
    assert ask(asking, "POST", SERVED) == 403
    assert ask(asking, "GET", "/v1/") == 200
    node.firewall.apply(policy("app=b", ingress=[{}], name="to-b"))
    eventually(lambda: is_reset(asking.sock), "the connection is reset")
    asking.close()


@FAMILY
def test_names_are_asked_of_a_translated_name_server(node, family, tmp_path):
    """UDP: each datagram is redirected for itself, and answered from the address that was asked."""
    a, b = node.host("a"), node.host("b")
    zone = tmp_path / "zone"
    zone.write_text("good.example. 60 IN A 203.0.113.9\nbad.example. 60 IN A 203.0.113.8\n")
    begin = len(b.log())
    questions.serve(b, zone, b.address(family))
    eventually(lambda: "serving" in b.log()[begin:], "the name server serves")
    translate(node, family, target=53, port=53, protocol="udp")
    rule = ports("53/UDP", dns=[{"matchName": "good.example"}])
    to_b = {"toEndpoints": [{"matchLabels": {"app": "b"}}], **rule}
    node.firewall.apply(policy("app=a", egress=[to_b], name="from-a"))
    answer = questions.udp(a, SERVICE[family], questions.query("good.example"))
    assert questions.addresses(answer) == {"203.0.113.9"}
    refused = questions.udp(a, SERVICE[family], questions.query("bad.example"))
    assert not questions.addresses(refused)


def test_without_its_table_nothing_passes_unread_and_it_is_made_again(node):
    """Somebody deletes our table: dropped with the reason, until the agent has noticed."""
    a, b = node.host("a"), node.host("b")
    translate(node, V4)
    node.firewall.apply(LANDING)
    with stopped(node.firewall.process.pid):  # or it might notice at once
        node.node.run(["nft", "delete table ip bartizan"], check=True)
        with pytest.raises(TimeoutError):
            a.connect(SERVICE[V4], 8000, timeout_s=0.5)
    flow(
        node.firewall,
        between(a.address4, b.address4),
        verdict="DROPPED",
        reason="PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL",
    )
    await_table(node)
    with closing(client(a, SERVICE[V4])) as asking:
        assert ask(asking, "POST", SERVED) == 200


def test_a_users_rules_that_set_all_bits_of_marks_open_nothing(node):
    """Between mangle and our table, and with nobody there to decide behind nat at all."""
    a, b, w = (node.host(name) for name in "abw")
    translate(node, V4)
    node.firewall.apply(LANDING)
    to_b = {"toEndpoints": [{"matchLabels": {"app": "b"}}]}
    node.firewall.apply(policy("app=a", egress=[to_b], name="from-a"))
    run, wipe = node.node.run, ["-j", "MARK", "--set-mark", "1"]
    run(["iptables", "-t", "mangle", "-A", "PREROUTING", *wipe], check=True)
    chain = "type filter hook prerouting priority -95; meta mark set 1;"
    run(["nft", f"table ip user {{ chain c {{ {chain} }}; }}"], check=True)
    try:
        with b.capture() as at_b, w.capture() as at_w:
            for table in (True, False):
                payload = token()
                refused = udp(a, w, 9, payload)
                with stopped(node.firewall.process.pid):  # or it might make the table again
                    if not table:
                        run(["nft", "delete table ip bartizan"], check=True)
                    a.send(bytes(refused), bytes(tcp(a, SERVICE[V4], 8000)), bytes(tcp(a, b, 80)))
                    allowed = token()
                    a.send(bytes(udp(a, b, 7, allowed)))
                    with suppress(NothingArrivedError):
                        at_b.expect(carries(allowed), 1.0)
                dropped(node.firewall, refused)
                assert not [data for data in at_w.so_far() if payload in data]
            assert not [data for data in at_b.so_far() if is_tcp(flags="S")(data)]
    finally:
        run(["iptables", "-t", "mangle", "-D", "PREROUTING", *wipe], check=True)
        run(["nft", "delete table ip user"], check=True)
        await_table(node)


def test_a_spoofed_source_is_no_client_of_the_proxy(node):
    """c speaks with a's address on a's open connection by way of the service."""
    a, c = node.host("a"), node.host("c")
    translate(node, V4)
    node.firewall.apply(LANDING)
    asking = client(a, SERVICE[V4])
    assert ask(asking, "POST", SERVED) == 200
    forged = tcp(a.address4, SERVICE[V4], 8000, source_port=asking.sock.getsockname()[1], flags="R")
    c.send(bytes(forged))
    flow(
        node.firewall,
        lambda record: record.get("IP", {}).get("source") == a.address4,
        verdict="DROPPED",
        reason="INVALID_SOURCE_IP",
    )
    assert ask(asking, "POST", SERVED) == 200
    asking.close()
