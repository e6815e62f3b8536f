"""The nodes: their settings, labels and numbers."""

import pytest

from conntrack.address import parse_address
from firewall.agent.document import DocumentError
from firewall.agent.engine import reader_settings
from firewall.agent.loading import read
from firewall.agent.nodes import HOST_ENDPOINT_ID, NodeNumbers, host_labels, host_row
from firewall.identities.labels import Label, LabelError
from firewall.identities.local import LocalNumbers
from firewall.identities.reserved import NODE_MAX, NODE_MIN
from firewall.policy.readers import read as read_policy

TWO = (
    "nodes:\n"
    "- {name: n2, addresses: [192.0.2.2, '2001:db8::2'],\n"
    "   labels: [zone=b, 'reserved:kube-apiserver']}\n"
    "- {name: n3, addresses: [192.0.2.3]}\n"
)
HOST_POLICY = (
    "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: n}\n"
    "spec: {nodeSelector: {}, ingress: [{}]}"
)


def test_other_nodes_have_node_labels_and_their_name():
    """Research a.6: fromNodes matches node labels of remote nodes."""
    near, far = read(TWO).config.nodes
    assert near.addresses == (parse_address("192.0.2.2"), parse_address("2001:db8::2"))
    assert near.labels.strings() == (
        "node:kubernetes.io/hostname=n2",
        "node:zone=b",
        "reserved:kube-apiserver",
        "reserved:remote-node",
    )
    assert far.labels.strings() == ("node:kubernetes.io/hostname=n3", "reserved:remote-node")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: [{addresses: [192.0.2.2]}]", "name is missing"),
        ("nodes: [{name: a}]", "addresses is missing"),
        ("nodes: [{name: a, addresses: [nowhere]}]", "nowhere"),
        ("nodes: [{name: a, addresses: [192.0.2.2], labels: ['reserved:host']}]", "is reserved"),
        ("nodes: [{name: a, addresses: [192.0.2.2], zone: b}]", "unknown setting 'zone'"),
        (
            "nodes:\n- {name: a, addresses: [192.0.2.2]}\n- {name: a, addresses: [192.0.2.3]}",
            "node a is given twice; first at line 2",
        ),
        (
            "nodes:\n- {name: a, addresses: [192.0.2.2]}\n- {name: b, addresses: [192.0.2.2]}",
            "192.0.2.2 belongs to node a already (line 2)",
        ),
        ("node_labels: ['reserved:host']", "is reserved"),
        ("nodes: [{name: a, addresses: [224.0.0.1]}]", "224.0.0.1 is a multicast address"),
        (
            "nodes: [{name: n, addresses: [192.0.2.2]}]\nendpoints: [{name: a, ip: 192.0.2.2}]",
            "endpoints[0]: 192.0.2.2 belongs to node n already (line 1)",
        ),
    ],
)
def test_wrong_nodes_are_refused_with_their_place(text, said):
    with pytest.raises(DocumentError) as refused:
        read(text, "b.yaml")
    (problem,) = refused.value.problems
    assert said in str(problem)
    assert str(problem).startswith("b.yaml:")


def test_nodes_can_be_given_by_a_flag():
    """`--set nodes='[...]'`, as endpoints can."""
    (node,) = read("", overrides={"nodes": "[{name: n, addresses: [192.0.2.9]}]"}).config.nodes
    assert node.name == "n"


def test_the_node_has_its_name_as_a_label_and_may_change_it():
    """Cilium: k8s:kubernetes.io/hostname."""
    assert host_labels("n1", ["zone=a"]) == (
        Label("k8s", "kubernetes.io/hostname", "n1"),
        Label("k8s", "zone", "a"),
    )
    (only,) = host_labels("n1", ["kubernetes.io/hostname=n1.example"])
    assert only.value == "n1.example"
    with pytest.raises(LabelError):
        host_labels("n1", ["reserved:remote-node"])


def test_the_node_as_an_endpoint_leaves_loopback_out():
    addresses = [parse_address(text) for text in ("127.0.0.1", "::1", "192.0.2.1", "fe80::1")]
    row = host_row("n1", addresses, audit=True)
    assert (row.id, row.identity, row.audit) == (HOST_ENDPOINT_ID, 1, True)
    assert row.addresses == (parse_address("192.0.2.1"), parse_address("fe80::1"))


def test_numbers_are_cilium_s_remote_node_scope_and_outlive_a_restart(tmp_path):
    """Research d.1: 2<<24 + n."""
    near, far = read(TWO).config.nodes
    first = NodeNumbers(tmp_path, LocalNumbers(NODE_MIN, NODE_MAX))
    first.follow((near, far))
    before = dict(first.addresses())
    assert {number >> 24 for number in before.values()} == {2}
    assert len(set(before.values())) == 2
    second = NodeNumbers(tmp_path, LocalNumbers(NODE_MIN, NODE_MAX))
    second.restore()
    second.follow((far,))
    assert dict(second.addresses()).items() <= before.items()
    second.follow((far, near))
    assert dict(second.addresses())[next(iter(before))]


def test_numbers_that_cannot_be_read_are_given_anew(tmp_path):
    """A damaged file costs the numbers only, and is kept aside."""
    (tmp_path / "nodes").write_text("nonsense")
    numbers = NodeNumbers(tmp_path, LocalNumbers(NODE_MIN, NODE_MAX))
    numbers.restore()
    assert (tmp_path / "nodes.unusable").exists()
    numbers.follow(read(TWO).config.nodes)
    assert len(list(numbers.addresses())) == 3


def test_settings_decide_which_policies_are_read():
    """`host_firewall` off: refused, and the error names it; on: accepted."""
    off = read_policy(HOST_POLICY, "n.yaml", settings=reader_settings(read("").config))
    (error,) = off.errors
    assert "needs `host_firewall: on` in the configuration" in error.message
    on = read_policy(
        HOST_POLICY, "n.yaml", settings=reader_settings(read("host_firewall: on").config)
    )
    assert on.errors == ()
