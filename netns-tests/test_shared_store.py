"""Two agents on one kvstore: what one knows of its endpoints, the other enforces.

    a ── node (first agent) ── far (second agent) ── pod

a is the first agent's endpoint, pod the second's.
"""

import pytest
from rules import peers, policy, ports
from traffic import DEADLINE_S, Echo, eventually, exchange, token

from lab.daemon import Bartizan
from lab.laboratory import LabError, Machine
from lab.topology import HostPlan, Topology, assigned

pytestmark = pytest.mark.needs("nfqueue", "tproxy", "socket", "connmark", "ipset", "set")

POD = "10.9.0.1"
PLAN = assigned(
    Topology(
        hosts=(
            HostPlan(name="a", labels={"app": "a"}),
            HostPlan(name="far", managed=False),
        )
    )
)
TO_POD = policy("app=pod", ingress=[{**peers("app=a"), **ports("80/TCP")}])


def towards(selector):
    """An egress rule to port 80 of these endpoints."""
    return {"toEndpoints": peers(selector)["fromEndpoints"], **ports("80/TCP")}


def join(made):
    """Put pod behind far; each of the two knows the way to the other side."""
    far, pod = made.host("far"), Machine("pod", [POD], made.folder)
    far.netns.set(ipv4__ip_forward="1", ipv4__conf__all__rp_filter="0")
    for machine, line in (
        (far, "link add to-pod type veth peer eth0 netns pod"),
        (far, "link set to-pod up"),
        (far, "address add 169.254.1.2/32 dev to-pod scope link"),
        (far, f"route add {POD}/32 dev to-pod"),
        (pod, "link set eth0 up"),
        (pod, f"address add {POD}/32 dev eth0"),
        (pod, "route add 169.254.1.2 dev eth0 scope link"),
        (pod, "route add default via 169.254.1.2 dev eth0"),
        (made.node, f"route add {POD}/32 via {far.address4} dev {far.interface} onlink"),
    ):
        machine.run(["ip", *line.split()], check=True)
    return pod


@pytest.fixture(scope="module")
def nodes(module_lab, module_bartizan):
    """The lab with `pod`, and the two agents: `first` has no endpoint yet."""
    made = module_lab(PLAN)
    made.pod = join(made)
    made.shared = {"kvstore": {"path": str(made.folder / "kv.db")}, "workers": 1}
    made.first = module_bartizan(made, made.shared, endpoints=False)
    made.second = module_bartizan(made, made.shared, endpoints=False, machine=made.host("far"))
    made.second.put(
        "/v1/endpoint/pod",
        {"addresses": [POD], "labels": ["app=pod"], "namespace": "default",
         "netns": str(made.pod.namespace_path)},
        wait=10,
    )  # fmt: skip
    yield made
    made.pod.end_processes()
    made.pod.netns.close()


def number_of(agent, label):
    """The identity that an agent knows for a label, 0 = none."""
    rows = agent.get("/v1/identity")
    return next((row["id"] for row in rows if f"k8s:app={label}" in row["labels"]), 0)


def reaches(nodes, within_s=1.0):
    """Whether a's connection to pod works, both ways."""
    with Echo(nodes.pod, 80) as server:
        server.server.settimeout(within_s)
        try:
            with nodes.host("a").connect(POD, 80, timeout_s=within_s) as client:
                accepted = server.accept()
                accepted.settimeout(within_s)
                return exchange(client, accepted, token())
        except TimeoutError:  # whichever packet met the end of a permission
            return False


def verdict_on_a(nodes):
    """What the second agent said last about a packet from a."""
    flows = nodes.second.flows(**{"from-ip": nodes.host("a").address4, "type": "policy-verdict"})
    return flows[-1] if flows else {}


def is_denied_as(nodes, labels):
    """Whether a is refused, and by the second agent, under these labels.

    The first one may be what loses a connection while its endpoint changes.
    """
    if reaches(nodes):
        return False
    verdict = verdict_on_a(nodes)
    return verdict.get("verdict") == "DROPPED" and set(labels) <= set(verdict["source"]["labels"])


def test_a_stranger_becomes_a_peer_when_its_own_agent_knows_it(nodes):
    """Before, a is the world; after, both agents call it by one number and one name."""
    nodes.second.apply(TO_POD)
    assert not reaches(nodes)
    assert verdict_on_a(nodes)["source"]["labels"] == ["reserved:world"]
    number = nodes.first.add(nodes.host("a"))["identity"]["id"]
    eventually(lambda: reaches(nodes), "the second agent learnt whose address it is")
    assert number_of(nodes.second, "a") == number
    source = verdict_on_a(nodes)["source"]
    assert (source["identity"], source["pod_name"]) == (number, "a")
    assert source["namespace"] == "default"
    assert "shared: 1 other nodes" in nodes.second.cli("status").stdout


def test_a_rule_selects_an_identity_that_another_agent_allocated(nodes):
    """Egress of a names pod, of which the first agent knows by the store only."""
    nodes.first.add(nodes.host("a"))
    nodes.second.apply(TO_POD)
    nodes.first.apply(policy("app=a", egress=[towards("app=pod")]))
    try:
        eventually(lambda: reaches(nodes), "egress to another node's endpoint")
        flow = nodes.first.flows(last=1, type="policy-verdict")[-1]
        assert flow["destination"]["pod_name"] == "pod"
        assert flow["destination"]["identity"] == number_of(nodes.second, "pod")
        nodes.first.apply(policy("app=a", egress=[towards("app=other")]))
        assert not reaches(nodes)
    finally:
        nodes.first.clear()


def test_another_label_on_one_node_counts_on_the_other(nodes):
    """Within the store's interval; the open permission ends with it."""
    nodes.first.add(nodes.host("a"))
    nodes.second.apply(TO_POD)
    eventually(lambda: reaches(nodes), "as before")
    nodes.first.relabel("a", app="exile")
    eventually(lambda: is_denied_as(nodes, ["k8s:app=exile"]), "app=exile may not")
    assert verdict_on_a(nodes)["source"]["identity"] == number_of(nodes.second, "exile")
    nodes.first.relabel("a", app="a")
    eventually(lambda: reaches(nodes), "app=a may again")


def test_an_endpoint_that_is_removed_is_the_world_again(nodes):
    nodes.first.add(nodes.host("a"))
    nodes.second.apply(TO_POD)
    eventually(lambda: reaches(nodes), "as before")
    nodes.first.request("DELETE", "/v1/endpoint/a")
    eventually(lambda: is_denied_as(nodes, ["reserved:world"]), "nobody vouches for a")


def test_what_a_dead_agent_said_goes_on_to_count(nodes):
    """As its workers do; the one that follows it takes the same name and says the same."""
    nodes.first.add(nodes.host("a"))
    nodes.second.apply(TO_POD)
    eventually(lambda: reaches(nodes), "as before")
    nodes.first.kill()
    try:
        assert reaches(nodes, DEADLINE_S)
        nodes.second.stop()
        nodes.second.start()
        assert reaches(nodes, DEADLINE_S)
    finally:
        nodes.first.start()
    assert reaches(nodes, DEADLINE_S)


def test_a_second_agent_of_the_same_name_is_refused(nodes):
    """Else each would delete what the other needs."""
    third = Bartizan(nodes, {**nodes.shared, "node_name": "node"}, machine=nodes.pod)
    with pytest.raises(LabError, match="node_name node is taken: the agent with state_dir") as said:
        third.start()
    assert "give this one another node_name" in str(said.value)
