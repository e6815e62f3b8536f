"""Names that count only for who asked: what one endpoint was told opens nothing for another."""

import pytest

from conntrack.address import Prefix, parse_address
from firewall.identities.labels import LabelSet
from firewall.policy.difference import difference, patch
from firewall.policy.readers import read
from firewall.policy.repository import Repository
from firewall.policy.resolve import Resolver
from firewall.policy.snapshot import EndpointRow
from firewall.policy.verdict import Verdict
from firewall.policy.view import View

A, B, WEB = map(parse_address, ("10.0.0.1", "10.0.0.2", "192.0.2.1"))
NAMED = LabelSet.parse(["fqdn:*.example", "fqdn:www.example", "reserved:world"])
TCP = 6

RULES = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: names}
spec:
  endpointSelector: {}
  egress:
  - toFQDNs: [{matchName: www.example}]
    toPorts: [{ports: [{port: "80", protocol: TCP}]}]
  - toFQDNs: [{matchPattern: "*.example"}]
    toPorts: [{ports: [{port: "443", protocol: TCP}]}]
"""


class Node:
    """Two endpoints of one identity and an address that both texts mean."""

    def __init__(self, *, names_by_identity: bool) -> None:
        self.resolver = Resolver(names_by_identity=names_by_identity)
        self.resolver.upsert_identity(
            1001, LabelSet.parse(["k8s:io.kubernetes.pod.namespace=default"])
        )
        self.resolver.upsert_identity(1 << 24, NAMED)
        self.resolver.set_endpoints(
            EndpointRow(id=n, name=f"e{n}", namespace="default", identity=1001, addresses=(a,))
            for n, a in ((1, A), (2, B))
        )
        self.resolver.apply(Repository().apply(read(RULES, "t.yaml").objects))

    def snapshot(self, *sights):
        known = [(Prefix(A, 32), 1001), (Prefix(B, 32), 1001), (Prefix(WEB, 32), 1 << 24)]
        return self.resolver.snapshot(ipcache=known, sights=sights)


def ports(view, source):
    """The ports of the address that are open for an endpoint."""
    return {
        port for port in (80, 443) if view.decide(source, WEB, TCP, port).verdict is Verdict.ACCEPT
    }


def test_by_identity_a_name_counts_for_everybody():
    node = Node(names_by_identity=True)
    view = View(node.snapshot())
    assert ports(view, A) == ports(view, B) == {80, 443}
    assert node.resolver.fqdns() == {"www.example", "*.example"}


def test_by_endpoint_a_name_counts_for_who_was_told_it():
    node = Node(names_by_identity=False)
    view = View(node.snapshot((1, WEB, ("*.example", "www.example")), (2, WEB, ("*.example",))))
    assert ports(view, A) == {80, 443}
    assert ports(view, B) == {443}
    assert node.resolver.fqdns() == {"www.example", "*.example"}
    assert ports(View(node.snapshot((1, WEB, ("*.example",)))), B) == set()


@pytest.mark.parametrize(
    ("after", "lost"),
    [
        ([(1, WEB, ("*.example", "www.example"))], False),
        ([(1, WEB, ("*.example",)), (2, WEB, ("*.example",))], False),
        ([], True),
        ([(1, WEB, ("www.example",))], True),
    ],
    ids=["another name", "another endpoint", "gone", "exchanged"],
)
def test_a_name_that_counts_no_more_takes_a_permission_away(after, lost):
    node = Node(names_by_identity=False)
    before = node.snapshot((1, WEB, ("*.example",)))
    now = node.snapshot(*after)
    assert (now.generation > before.generation) is lost
    step = difference(before, now)
    assert step is not None
    assert patch(before, step) == now
    assert len(step.identities) + len(step.policies) + len(step.ipcache) == 0


def test_a_view_that_follows_another_has_its_own_sights():
    node = Node(names_by_identity=False)
    first = View(node.snapshot((1, WEB, ("*.example",))))
    assert ports(first, A) == {443}
    assert ports(View(node.snapshot(), first), A) == set()
