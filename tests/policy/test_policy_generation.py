"""What takes a permission away raises the generation; everyday growth does not."""

import msgspec
import pytest
from policy.stage import Stage

from conntrack.address import parse_address
from firewall.policy.model import ObjectKey
from firewall.policy.readers import CAPABILITIES, ReaderSettings, read
from firewall.policy.resolve import Resolver
from firewall.policy.snapshot import Settings, Snapshot

_SETTINGS = ReaderSettings(enforceable=frozenset(CAPABILITIES))
_COMMON = ["k8s:io.kubernetes.pod.namespace=default", "k8s:io.cilium.k8s.policy.cluster=default"]
ALLOW_DB = "ingress: [{fromEndpoints: [{matchLabels: {app: db}}]}]"


def policy(name, rules, subject="web"):
    text = (
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n"
        f"metadata: {{name: {name}}}\n"
        f"spec: {{endpointSelector: {{matchLabels: {{app: {subject}}}}}, {rules}}}\n"
    )
    result = read(text, f"{name}.yaml", settings=_SETTINGS)
    assert not result.errors, list(map(str, result.errors))
    return result.objects[0]


@pytest.fixture
def made():
    found = Stage()
    for at, name in enumerate(("web", "db", "cache")):
        found.endpoint(name, f"10.0.0.{at + 1}", [f"k8s:app={name}", *_COMMON])
    found.apply(policy("base", ALLOW_DB))
    found.snapshot()
    return found


def change(made, act):
    """Return why the change raised the generation, None if it did not."""
    old = made.snapshot()
    act(made)
    new = made.snapshot()
    assert (new.generation > old.generation) == (made.resolver.reason is not None)
    assert new.revision == old.revision + 1
    return made.resolver.reason


GROWTH = {
    "one more allow for an isolated subject": policy(
        "more", "ingress: [{fromEndpoints: [{matchLabels: {app: cache}}]}]"
    ),
    "one more allow with ports": policy(
        "more", 'ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}]}]}]'
    ),
    "one more allow with http rules": policy(
        "more",
        'ingress: [{toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{}]}}]}]',
    ),
    "one more allow for addresses": policy("more", "ingress: [{fromCIDR: [192.0.2.0/24]}]"),
    "a rule for nobody here": policy("more", ALLOW_DB, subject="nobody"),
    "a rule that only watches": policy(
        "more",
        "enableDefaultDeny: {ingress: false}, ingress: [{fromEntities: [all], toPorts: "
        '[{ports: [{port: "80", protocol: TCP}], rules: {http: [{method: GET}]}}]}]',
        subject="cache",
    ),
}
LOSS = {
    "an endpoint becomes isolated": policy("more", ALLOW_DB, subject="cache"),
    "an allow is taken out": policy("base", "ingress: [{}]"),
    "an allow is narrowed to a port": policy(
        "base",
        "ingress: [{fromEndpoints: [{matchLabels: {app: db}}], "
        'toPorts: [{ports: [{port: "80", protocol: TCP}]}]}]',
    ),
    "a deny is added": policy("more", "ingressDeny: [{fromEntities: [world]}]"),
    "authentication is demanded": policy(
        "more", "ingress: [{fromEndpoints: [{}], authentication: {mode: required}}]"
    ),
}


@pytest.mark.parametrize("what", GROWTH)
def test_growth_keeps_the_generation(made, what):
    assert change(made, lambda m: m.apply(GROWTH[what])) is None


@pytest.mark.parametrize("what", LOSS)
def test_loss_raises_the_generation(made, what):
    assert change(made, lambda m: m.apply(LOSS[what]))


def test_removing_the_only_policy_frees_its_subject_and_raises_nothing(made):
    key = ObjectKey(kind="CiliumNetworkPolicy", namespace="default", name="base")
    assert change(made, lambda m: m.delete(key)) is None


def test_removing_one_of_two_policies_raises_the_generation(made):
    """BEH-03: the live connection that it allowed must be looked at again."""
    made.apply(policy("more", "ingress: [{fromEndpoints: [{matchLabels: {app: cache}}]}]"))
    key = ObjectKey(kind="CiliumNetworkPolicy", namespace="default", name="more")
    assert change(made, lambda m: m.delete(key)) == "identity 256: an allow is gone"


def test_removing_a_doubled_allow_raises_nothing(made):
    made.apply(policy("twin", ALLOW_DB))
    key = ObjectKey(kind="CiliumNetworkPolicy", namespace="default", name="twin")
    assert change(made, lambda m: m.delete(key)) is None


def test_a_new_identity_raises_nothing(made):
    """Labels that no endpoint here has, at an address that nothing was known about."""
    act = lambda m: m.endpoint("far", "10.0.9.9", ["k8s:app=db", "k8s:x=1"], managed=False)
    assert change(made, act) is None


def test_a_new_endpoint_raises_the_generation_only_if_it_is_isolated(made):
    """Flows of its address may live already; nobody has decided about them."""
    act = lambda m: m.endpoint("free", "10.0.9.9", ["k8s:app=free", *_COMMON])
    assert change(made, act) is None
    act = lambda m: m.endpoint("shut", "10.0.9.8", ["k8s:app=web", *_COMMON])
    assert "newly managed and isolated" in change(made, act)


def test_a_relabelled_peer_loses_what_its_labels_allowed(made):
    assert change(made, lambda m: m.relabel("db", ["k8s:app=other", *_COMMON]))


def test_a_peer_that_gains_a_label_raises_nothing(made):
    assert change(made, lambda m: m.relabel("cache", ["k8s:app=db", *_COMMON])) is None


NAMED = "egress: [{toPorts: [{ports: [{port: http, protocol: TCP}]}]}]"


def test_a_peer_that_leaves_an_identity_leaves_its_named_ports(made):
    """Of two endpoints with one identity, only one has the port; the other had it, too."""
    labels = ["k8s:app=shop", *_COMMON]
    made.endpoint("one", "10.0.0.11", labels, ports=[("http", 6, 80)])
    made.endpoint("two", "10.0.0.12", labels)
    act = lambda m: m.relabel("two", ["k8s:app=other", *_COMMON])
    assert change(made, act) is None
    made.relabel("two", labels)
    made.apply(policy("named", NAMED))
    assert change(made, act) == "10.0.0.12/32 has other named ports"


def test_a_peer_with_more_named_ports_loses_nothing_unless_one_is_denied(made):
    act = lambda m: m.endpoint("far", "10.0.0.11", _COMMON, ports=[("http", 6, 80)])
    made.apply(policy("named", NAMED))
    assert change(made, act) is None
    made.apply(policy("denied", NAMED.replace("egress", "egressDeny")))
    act = lambda m: m.endpoint("farther", "10.0.0.12", _COMMON, ports=[("http", 6, 80)])
    assert change(made, act) == "10.0.0.12/32 has other named ports"


def test_a_relabelled_subject_may_become_isolated(made):
    assert change(made, lambda m: m.relabel("cache", ["k8s:app=web", *_COMMON]))


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        ({}, {"enforcement": "always"}, True),
        ({}, {"allow_localhost": "policy"}, True),
        ({"allow_localhost": "policy"}, {}, False),
        ({"policy_audit_mode": True}, {}, True),
        ({}, {"policy_audit_mode": True}, False),
        ({}, {"http_proxy_port": 9}, False),
        ({}, {"allow_icmp_frag_needed": False}, True),
        ({"local_addresses": (parse_address("10.0.0.9"),)}, {}, True),
    ],
)
def test_settings_count_by_what_they_take(made, before, after, lost):
    made.settings = Settings(**before)
    made.snapshot()

    def act(stage):
        stage.settings = Settings(**after)

    assert (change(made, act) is not None) == lost


def test_a_new_agent_goes_on_from_the_last_snapshot(made):
    """Numbers of another life mean nothing here, so the generation rises once."""
    last = made.snapshot()
    last = msgspec.structs.replace(last, revision=41, generation=7)
    again = Resolver(last=last)
    first = again.snapshot(settings=Settings())
    assert (first.revision, first.generation) == (42, 8)
    assert again.snapshot(settings=Settings()) is first
    second = again.snapshot(settings=Settings(http_proxy_port=1))
    assert (second.revision, second.generation) == (43, 8)


def test_the_first_snapshot_ever_has_revision_1():
    first = Resolver().snapshot()
    assert (first.revision, first.generation, first.policy_revision) == (1, 0, 1)
    assert isinstance(first, Snapshot)
