"""HTTP under policy: each request on a kept-alive connection is decided for itself."""

import http.client
import re
import sys

import pytest
from evidence import dropped, flow
from rules import peers, policy, ports
from traffic import DEADLINE_S, FAMILIES, V4, curl, eventually, is_tcp, tcp

FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])

LANDING = policy(
    "app=b",
    ingress=[
        {
            **peers("app=a"),
            **ports("80/TCP", http=[{"method": "POST", "path": "/v1/request-landing"}]),
        }
    ],
)

pytestmark = pytest.mark.needs("tproxy", "socket", "connmark", "curl")


@pytest.fixture(scope="module")
def running(module_lab, module_bartizan):
    made = module_lab(a="app=a", b="app=b", c="app=c")
    made.host("b").start([sys.executable, "-m", "lab.demo.deathstar"])
    eventually(lambda: "operational" in made.host("b").log(), "the server runs")
    made.firewall = module_bartizan(made)
    return made


@pytest.fixture
def three(running):
    """a may ask b's deathstar to land, c may not reach it; `served()`: its log of this test."""
    running.firewall.clear()
    running.firewall.apply(LANDING)
    begin = len(running.host("b").log())
    running.served = lambda: running.host("b").log()[begin:]
    return running


def _client(host, address) -> http.client.HTTPConnection:
    """A connection from inside the host, spoken from here."""
    client = http.client.HTTPConnection(address, 80, timeout=DEADLINE_S)
    client.sock = host.connect(address, 80)
    client.auto_open = 0  # a connection that was closed must be seen, not opened again
    return client


def _ask(client: http.client.HTTPConnection, method: str, path: str) -> tuple[int, bytes]:
    client.request(method, path)
    answer = client.getresponse()
    return answer.status, answer.read()


def _http(verdict: str, method: str, path: str, kind: str = "REQUEST"):
    def matches(record) -> bool:
        http = record.get("l7", {}).get("http", {})
        return (
            record.get("l7", {}).get("type") == kind
            and http.get("method") == method
            and http.get("url", "").endswith(path)
        )

    return {"matches": matches, "verdict": verdict}


@FAMILY
def test_on_one_connection_each_request_is_allowed_or_refused_for_itself(three, family):
    """200, 403, 200 on the same kept-alive connection; the refused one never reaches b."""
    a, b = three.host("a"), three.host("b")
    client = _client(a, b.address(family))
    assert _ask(client, "POST", "/v1/request-landing") == (200, b"Ship landed\n")
    assert _ask(client, "PUT", "/v1/exhaust-port") == (403, b"Access denied\r\n")
    assert _ask(client, "POST", "/v1/request-landing") == (200, b"Ship landed\n")
    client.close()
    served = three.served()
    assert served.count("POST /v1/request-landing") == 2
    assert "exhaust-port" not in served
    flow(three.firewall, **_http("FORWARDED", "POST", "/v1/request-landing"))
    record = flow(three.firewall, **_http("DROPPED", "PUT", "/v1/exhaust-port"))
    assert record["source"]["pod_name"] == "a"
    assert record["destination"]["pod_name"] == "b"


@FAMILY
def test_the_server_sees_the_clients_own_address(three, family):
    """The proxy is transparent in both directions."""
    a, b = three.host("a"), three.host("b")
    client = _client(a, b.address(family))
    assert client.sock.getpeername()[0] == b.address(family)
    assert _ask(client, "POST", "/v1/request-landing")[0] == 200
    client.close()
    assert re.search(rf"{re.escape(a.address(family))} .*request-landing", three.served())


@FAMILY
def test_a_peer_without_a_rule_does_not_even_reach_the_proxy(three, family):
    """L3 and L4 come first: its SYN is dropped."""
    b, c = three.host("b"), three.host("c")
    syn = tcp(c, b, 80, family=family)
    with c.capture() as at_c:
        c.send(bytes(syn))
        dropped(three.firewall, syn)
        assert not [p for p in at_c.so_far() if is_tcp(source_port=80)(p)]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/request-landing"),
        ("POST", "/v1/request-landing/"),
        ("POST", "/V1/request-landing"),
        ("POST", "/v1/request-landing/../exhaust-port"),
        ("POST", "/v1/request-landing%2f..%2fexhaust-port"),
        ("POST", "//v1/request-landing"),
        ("POST", "/v1/request-landingx"),
    ],
)
def test_nothing_but_the_rules_own_target_reaches_the_server(three, method, path):
    """Refused, or normalised to the very target that the rule allows (as for `//`)."""
    client = _client(three.host("a"), three.host("b").address4)
    client.putrequest(method, path)
    client.putheader("Content-Length", "0")
    client.endheaders()
    answer = client.getresponse()
    assert answer.status in (200, 400, 403)
    answer.read()
    client.close()
    served = re.findall(r'"(\S+ \S+) HTTP/1.1"', three.served())
    assert set(served) <= {"POST /v1/request-landing"}
    assert len(served) == (answer.status == 200)


@FAMILY
def test_curl_sees_http_403_and_access_denied(three, family):
    """What a user of the demo sees."""
    a, b = three.host("a"), three.host("b")
    address = b.address4 if family == V4 else f"[{b.address6}]"
    code, status, body = curl(a, f"http://{address}/v1/exhaust-port", "-X", "PUT")
    assert (code, status, body) == (0, "403", "Access denied\n")


def test_a_change_of_the_rule_reaches_an_open_connection(three):
    """The next request on a connection is decided by the policy of now."""
    client = _client(three.host("a"), three.host("b").address4)
    assert _ask(client, "POST", "/v1/request-landing")[0] == 200
    three.firewall.apply(LANDING.replace("/v1/request-landing", "/v1/").replace("POST", "GET"))
    assert _ask(client, "POST", "/v1/request-landing")[0] == 403
    assert _ask(client, "GET", "/v1/")[0] == 200
    client.close()


def test_a_large_body_crosses_the_proxy_whole(three):
    """A megabyte up; nothing is lost, doubled or kept back."""
    client = _client(three.host("a"), three.host("b").address4)
    body = bytes(range(256)) * 4096
    client.request("POST", "/v1/request-landing", body=body)
    assert client.getresponse().read() == b"Ship landed\n"
    client.close()
