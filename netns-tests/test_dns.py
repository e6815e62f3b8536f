"""Names under policy, with a real name server outside: who may ask, and what an answer opens."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dns.flags
import pytest
import questions
from evidence import flow, opens, workers
from questions import addresses, query
from traffic import DEADLINE_S, FAMILIES, V4, Echo, eventually, exchange

from firewall.identities.reserved import LOCAL_MIN
from lab import daemon, topology
from lab.laboratory import Host
from lab.topology import HostPlan, Topology

FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])
DOCS = Path(__file__).resolve().parents[1] / "docs" / "dns.md"

pytestmark = pytest.mark.needs("tproxy", "tproxy6", "socket", "connmark")

COUNT = 60
V4S = tuple(f"203.0.113.{n}" for n in range(1, COUNT + 1))
V6S = tuple(f"2001:db8::{n:x}" for n in range(1, COUNT + 1))
DNS4, DNS6 = V4S[-1], V6S[-1]
WEB = 80


def named(n: int, family: int = V4) -> str:
    """The address that belongs to number `n`."""
    return (V4S if family == V4 else V6S)[n]


NAMES = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: names, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: a}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: "53", protocol: ANY}, {port: "5353", protocol: ANY}]
      rules: {dns: [{matchPattern: "*.example"}]}
  - toFQDNs: [{matchPattern: "*.example"}]
    toPorts: [{ports: [{port: "80", protocol: TCP}]}]
"""


class World:
    """Endpoints a and b, and outside a name server and web servers at many addresses."""

    def __init__(self, make_lab, start_bartizan, **config) -> None:
        plan = topology.assigned(
            Topology(
                hosts=(
                    HostPlan(name="a", labels={"app": "a"}),
                    HostPlan(name="b", labels={"app": "b"}),
                    HostPlan(name="world", managed=False, addresses=(*V4S, *V6S)),
                )
            )
        )
        self.lab = make_lab(plan)
        self.a, self.b, self.world = (self.lab.host(name) for name in ("a", "b", "world"))
        self.zone = self.lab.folder / "zone"
        self.records: list[str] = []
        self.add(f"ns.example A {DNS4}")
        questions.serve(self.world, self.zone, DNS4, DNS6)
        self.world.start([sys.executable, "-m", "http.server", str(WEB), "--bind", "::"])
        self.echo = Echo(self.world, 7)
        eventually(lambda: "serving" in self.world.log(), "the name server serves")
        usual = {
            "workers": 2,
            "log": {"level": "info"},
            "fqdn": {"gc_interval_s": 0.5, "proxy_response_max_delay_s": 10},
        }
        self.firewall = start_bartizan(self.lab, usual | config)
        self.firewall.apply(NAMES)

    def add(self, *records: str) -> None:
        self.records += records
        self.zone.write_text("\n".join(self.records) + "\n")

    def name(self, name: str, n: int, ttl: int = 300) -> str:
        """Give a name the addresses of number `n`."""
        self.add(f"{name} {ttl} A {V4S[n]}", f"{name} {ttl} AAAA {V6S[n]}")
        return name

    def asked(self) -> str:
        return self.world.log()

    def opens(self, address: str, host: Host | None = None) -> bool:
        """Whether a, or another host, may reach the web server there."""
        return opens(self.firewall, host or self.a, address, WEB)

    def reaches(self, address: str, within_s: float = DEADLINE_S) -> bool:
        """Whether a reaches the web server, though no agent tells what was dropped."""
        try:
            self.a.connect(address, WEB, timeout_s=within_s).close()
        except TimeoutError:
            return False
        return True

    @contextmanager
    def policy(self, text: str) -> Iterator[None]:
        """Another text of the policy `names` meanwhile."""
        self.firewall.apply(text)
        try:
            yield
        finally:
            self.firewall.apply(NAMES)

    def cache(self, pattern: str) -> list[dict]:
        status, data = self.firewall.request(
            "GET", "/v1/fqdn/cache", None, {"matchpattern": pattern}
        )
        assert status == 200
        return json.loads(data)

    def counter(self, name: str) -> float:
        status, text = self.firewall.request("GET", "/v1/metrics")
        assert status == 200
        found = re.findall(rf"^cilium_{name}_total{{.*}} (\S+)$", text.decode(), re.MULTILINE)
        return sum(map(float, found))


@pytest.fixture(scope="module")
def world(module_lab, module_bartizan):
    made = World(module_lab, module_bartizan)
    yield made
    made.echo.__exit__()


@FAMILY
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_an_answer_opens_its_addresses_and_nothing_else(world, family, protocol):
    """By both protocols and families; the server sees the client's own address."""
    n = 10 + 2 * FAMILIES.index(family) + (protocol == "tcp")
    name = world.name(f"{protocol}-{family:d}.example", n)
    server, kind = (DNS4, "A") if family == V4 else (DNS6, "AAAA")
    assert not world.opens(named(n, family))
    asked = query(name, kind)
    (answer,) = (
        [questions.udp(world.a, server, asked)]
        if protocol == "udp"
        else questions.tcp(world.a, server, asked)
    )
    assert addresses(answer) == {named(n, family)}
    assert world.opens(named(n, family))
    assert not world.opens(named(n + 10, family))
    line = f"{protocol.upper()} {world.a.address(family)} {name}. {kind}"
    eventually(lambda: line in world.asked(), "the server has noted it")


def test_the_first_connection_after_the_answer_passes_always(world):
    """Thirty new names, each connected to at once: no SYN is dropped, none is sent twice."""
    names = [world.name(f"race{n}.example", n) for n in range(30, 60)]
    for name in names:
        (address,) = addresses(questions.udp(world.a, DNS4, query(name)))
        assert world.opens(address), name
    dropped = [
        record
        for record in world.firewall.flows(verdict="DROPPED")
        if record.get("IP", {}).get("destination") in V4S[30:60]
        and record.get("l4", {}).get("TCP", {}).get("destination_port") == WEB
    ]
    assert dropped == []
    assert world.counter("dns_hold_timeouts") == 0
    eventually(lambda: world.counter("dns_answers") >= 30, "the answers are counted")


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_a_forbidden_name_is_refused_and_never_asked_for(world, protocol):
    world.name("evil.org", 5)
    asked = query("secret.evil.org")
    if protocol == "udp":
        answer = questions.udp(world.a, DNS4, asked)
    else:
        (answer,) = questions.tcp(world.a, DNS4, asked)
    assert answer.rcode() == 5
    assert answer.question == asked.question
    assert "secret.evil.org" not in world.asked()
    record = flow(
        world.firewall,
        lambda r: r.get("l7", {}).get("dns", {}).get("query") == "secret.evil.org.",
        verdict="DROPPED",
        reason="POLICY_DENIED",
    )
    assert record["egress_denied_by"][0]["name"] == "names"


def test_a_cname_chain_opens_where_it_ends_under_the_name_that_was_asked_for(world):
    world.add("alias.example 60 CNAME cdn.net", f"cdn.net 20 A {V4S[6]}")
    assert addresses(questions.udp(world.a, DNS4, query("alias.example"))) == {V4S[6]}
    assert world.opens(V4S[6])
    (row,) = world.cache("alias.example")
    assert (row["source"], row["ttl"], row["ips"]) == ("lookup", 20, [V4S[6]])
    listed = world.firewall.cli("fqdn", "cache", "list", "-p", "alias.*").stdout
    assert listed.splitlines()[0].split() == [
        *("Endpoint", "Source", "FQDN", "TTL", "ExpirationTime", "IPs")
    ]
    assert "alias.example." in listed
    selectors = world.firewall.cli("fqdn", "names").stdout
    assert "*.example" in selectors
    assert V4S[6] in selectors


def test_names_are_words_of_questions_and_a_refused_one_is_explained(world):
    """`policy trace --to NAME`, and `why` about a question that no dns rule means."""
    questions.udp(world.a, DNS4, query(world.name("ask.example", 25)))
    cli = world.firewall.cli
    traced = cli("policy", "trace", "--from", "default/a", "--to", "ask.example:80/TCP")
    assert "Final verdict: ALLOWED" in traced.stdout
    assert "fqdn:*.example" in traced.stdout
    unknown = cli("policy", "trace", "--from", "default/a", "--to", "never.example:80/TCP")
    assert "DNS answered no endpoint for never.example" in unknown.stderr
    questions.udp(world.a, DNS4, query("why.evil.org"))
    asked = lambda r: r.get("l7", {}).get("dns", {}).get("query") == "why.evil.org."
    record = flow(world.firewall, asked, verdict="DROPPED")
    why = cli("why", record["uuid"]).stdout
    assert "dns rule matchPattern *.example: does not mean why.evil.org." in why


def test_a_truncated_answer_is_asked_for_again_over_tcp(world):
    """A name with more addresses than a small datagram holds; all of them open."""
    world.add(
        *(f"many.example 60 A 203.0.113.{n}" for n in range(100, 150)),
        f"many.example 60 A {V4S[7]}",
    )
    short = questions.udp(world.a, DNS4, query("many.example"))
    assert short.flags & dns.flags.TC
    (whole,) = questions.tcp(world.a, DNS4, query("many.example"))
    assert len(addresses(whole)) == 51
    large = questions.udp(world.a, DNS4, query("many.example", use_edns=0, payload=4096))
    assert len(addresses(large)) == 51


def test_questions_on_one_connection_are_judged_one_by_one(world):
    """Allowed and forbidden ones in one segment; each gets its own answer."""
    names = [world.name(f"pipe{n}.example", 20 + n) for n in range(4)]
    asked = [*map(query, names), query("no.org")]
    found = {str(a.question[0].name): a for a in questions.tcp(world.a, DNS4, *asked)}
    for n, name in enumerate(names):
        assert addresses(found[f"{name}."]) == {V4S[20 + n]}
    assert found["no.org."].rcode() == 5
    assert "no.org" not in world.asked()


def test_forged_answers_are_ignored(world):
    """Wrong port, id, question, or cut short: only the right one counts."""
    before = world.counter("dns_mismatched_answers")
    world.world.start([sys.executable, "-c", questions.LIAR, "5353", V4S[8], V4S[9], DNS4])
    eventually(lambda: world.asked().count("serving") == 2, "the liar serves")
    answer = questions.udp(world.a, DNS4, query("liar.example"), 5353)
    assert addresses(answer) == {V4S[9]}
    (row,) = world.cache("liar.example")
    assert row["ips"] == [V4S[9]]
    mismatched = lambda: world.counter("dns_mismatched_answers")
    eventually(lambda: mismatched() == before + 3, "the others are counted")
    assert not world.opens(V4S[8])


def test_no_name_leads_inside(world):
    """Names of an endpoint and of the node are answered; nothing opens."""
    inside = {"b": world.b.address4, "node": world.lab.node.address4, "loop": "127.0.0.1",
              "metadata": "169.254.169.254"}  # fmt: skip
    world.add(*(f"{name}.example A {address}" for name, address in inside.items()))
    listener = world.b.listen(WEB)
    for name, address in inside.items():
        assert addresses(questions.udp(world.a, DNS4, query(f"{name}.example"))) == {address}
    assert not world.opens(world.b.address4)
    listener.close()
    rows = world.firewall.get("/v1/ipcache")
    by_name = {row["prefix"] for row in rows if row["identity"] >= LOCAL_MIN}
    assert by_name
    assert by_name.isdisjoint(f"{address}/32" for address in inside.values())


def test_what_has_expired_stays_for_its_connection_only(world):
    """TTL 1: source lookup, then connection; when that ends the address is closed again."""
    name = world.name("short.example", 3, ttl=1)
    web = '{port: "80", protocol: TCP}'

    def connected():
        """On a busy machine the name may have expired before the connection is made."""
        questions.udp(world.a, DNS4, query(name))
        with suppress(TimeoutError):
            return world.a.connect(V4S[3], 7, timeout_s=0.9)

    with world.policy(NAMES.replace(web, f'{web}, {{port: "7", protocol: TCP}}')):
        client = eventually(connected, "a connection")
        server = world.echo.accept()
        while server.getpeername() != client.getsockname():
            server = world.echo.accept()
        sources = lambda: [row["source"] for row in world.cache(name)]
        eventually(lambda: sources() == ["connection"], "the name has expired")
        listed = lambda source: world.firewall.cli("fqdn", "cache", "list", "-s", source).stdout
        assert name in listed("connection")
        assert name not in listed("lookup")
        assert exchange(client, server, b"still there")
        client.close()
        server.close()
        eventually(lambda: sources() == [], "its connection is over", 60)
        eventually(lambda: not world.opens(V4S[3]), "its address is closed")


def test_a_name_counts_for_every_endpoint_whose_policy_means_it(world):
    """BEH-13: what a learnt opens for b, but only by b's own policy."""
    name = world.name("both.example", 2)
    questions.udp(world.a, DNS4, query(name))
    world.firewall.apply(NAMES.replace("{name: names,", "{name: forb,").replace("app: a", "app: b"))
    try:
        assert world.opens(V4S[2], world.b)
    finally:
        world.firewall.withdraw("CiliumNetworkPolicy", "forb")


def test_a_rule_that_is_gone_closes_its_addresses_at_once(world):
    name = world.name("gone.example", 4)
    questions.udp(world.a, DNS4, query(name))
    assert world.opens(V4S[4])
    pattern = 'toFQDNs: [{matchPattern: "*.example"}]'
    with world.policy(NAMES.replace(pattern, "toFQDNs: [{matchName: x.example}]")):
        assert not world.opens(V4S[4])
    assert world.opens(V4S[4])


def test_forgetting_a_name_closes_it_until_it_is_asked_for_again(world):
    name = world.name("clean.example", 1)
    questions.udp(world.a, DNS4, query(name))
    done = world.firewall.cli("fqdn", "cache", "clean", "-p", name)
    assert done.stdout == "1 addresses forgotten\n"
    assert not world.opens(V4S[1])
    questions.udp(world.a, DNS4, query(name))
    assert world.opens(V4S[1])


def test_the_example_of_the_page(world):
    """docs/dns.md: one name is a destination, another is only resolved, a third is refused."""
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    world.firewall.relabel("b", app="updater")
    world.firewall.apply(example)
    world.name("updates.example.com", 28)
    world.name("www.example.com", 27)
    for name in ("updates.example.com", "www.example.com"):
        assert questions.udp(world.b, DNS4, query(name)).rcode() == 0
    assert questions.udp(world.b, DNS4, query("evil.org")).rcode() == 5
    assert world.opens(V4S[28], world.b)
    assert not world.opens(V4S[27], world.b)
    record = flow(
        world.firewall,
        lambda r: r.get("IP", {}).get("destination") == V4S[27],
        verdict="DROPPED",
        reason="POLICY_DENIED",
    )
    assert record["destination_names"] == ["www.example.com"]
    world.firewall.withdraw("CiliumNetworkPolicy", "fetch-updates")
    world.firewall.relabel("b", app="b")


def test_a_question_waits_while_a_proxy_worker_is_replaced(world):
    """kill -9, and asked once right afterwards: the successor has the same sockets."""
    proxy = workers(world.firewall)["l7proxy", 0]
    os.kill(proxy, signal.SIGKILL)
    name = world.name("waits.example", 24)
    assert addresses(questions.udp(world.a, DNS4, query(name))) == {V4S[24]}
    assert workers(world.firewall)["l7proxy", 0] != proxy


def test_names_outlive_the_agent_and_its_workers(world):
    """kill -9 of the agent and of the proxy: learnt addresses stay, new ones open afterwards."""
    name = world.name("kept.example", 0)
    questions.udp(world.a, DNS4, query(name))
    proxy = next(
        w["pid"] for w in world.firewall.get("/v1/status")["workers"] if w["kind"] == "l7proxy"
    )
    world.firewall.kill()
    try:
        assert world.reaches(V4S[0])
        os.kill(proxy, signal.SIGKILL)
    finally:
        world.firewall.start()
    assert world.opens(V4S[0])
    assert [row["ips"] for row in world.cache(name)] == [[V4S[0]]]
    late = world.name("late.example", 29)
    questions.udp(world.a, DNS4, query(late))
    assert world.opens(V4S[29])
    assert "names" not in " ".join(world.firewall.get("/v1/status")["errors"])


def test_by_endpoint_an_answer_counts_for_who_asked(world):
    """`fqdn.visibility: endpoint`: the same labels and policy do not help who did not ask."""
    world.firewall.stop()
    config = {"fqdn": {"visibility": "endpoint", "proxy_response_max_delay_s": 10}}
    world.firewall = daemon.start(world.lab, config)
    world.firewall.relabel("b", app="a")
    name = world.name("own.example", 26)
    questions.udp(world.a, DNS4, query(name))
    assert world.opens(V4S[26])
    assert not world.opens(V4S[26], world.b)
    questions.udp(world.b, DNS4, query(name))
    assert world.opens(V4S[26], world.b)
