"""L7 rules towards a server on the node itself: its answers find the way back to the proxy."""

import sys

import pytest
from evidence import flow
from rules import policy, ports
from traffic import FAMILIES, curl, eventually

pytestmark = pytest.mark.needs("nfqueue", "nfqueue6", "tproxy", "socket", "connmark", "curl")

SERVER = """
import http.server, socket
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
print("serving", flush=True)
Server(("::", 80), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


@pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])
def test_requests_to_the_node_are_judged_one_by_one(lab, bartizan, family):
    """GET / is answered by the node's server, POST / by the proxy; the log says so."""
    made = lab(a="app=a")
    made.node.start([sys.executable, "-c", SERVER])
    eventually(lambda: "serving" in made.node.log(), "the server runs")
    firewall = bartizan(made)
    rules = ports("80/TCP", http=[{"method": "GET"}])
    firewall.apply(policy("app=a", egress=[{"toEntities": ["host"], **rules}]))
    address = made.node.address(family)
    url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
    a = made.host("a")
    code, status, body = curl(a, url)
    assert (code, status) == (0, "200"), body
    assert "Directory listing" in body
    assert curl(a, url, "-X", "POST")[1] == "403"
    flow(
        firewall,
        lambda record: record.get("l7", {}).get("http", {}).get("method") == "POST",
        verdict="DROPPED",
    )
