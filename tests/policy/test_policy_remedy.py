"""Suggestions: whatever is refused, the change that is suggested lets it pass, and is small."""

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from conntrack.address import parse_address
from firewall.identities.labels import LabelFilter, LabelSet
from firewall.policy.patch import unified
from firewall.policy.plan import Source, make_plan
from firewall.policy.question import Question
from firewall.policy.readers import CAPABILITIES, ReaderSettings, read
from firewall.policy.realm import NODE_ADDRESSES, Actor, actor_labels, ask, make_realm
from firewall.policy.remedy import suggest
from firewall.policy.snapshot import NamedPortRow, Settings


class Plain(yaml.SafeDumper):
    """Policies have no anchors."""

    def ignore_aliases(self, _):
        return True


READER = ReaderSettings(enforceable=frozenset(CAPABILITIES))
PASSES = ("allowed", "redirected")


def actor(name, namespace, number, *labels):
    own = LabelSet.parse(labels, default_source="k8s")
    return Actor(
        name=name,
        namespace=namespace,
        labels=actor_labels(own, namespace, "default", None, LabelFilter()),
        addresses=(parse_address(f"10.0.0.{number}"), parse_address(f"fd00::{number}")),
        named_ports=(NamedPortRow("web", 6, 80),),
    )


ACTORS = (
    actor("a", "x", 1, "app=a", "tier=front"),
    actor("b", "x", 2, "app=b"),
    actor("c", "y", 3, "app=a", "team=red"),
    actor("d", "y", 4, "controller-revision-hash=1"),  # a label that no identity has
    actor("f", "y", 6),
    actor("e", "y", 5, "container:role=db"),
)


def realm_of(*texts, enforcement="default"):
    """The realm of policies under the names p0.yaml, p1.yaml, ..."""
    objects = []
    resources = []
    for at, text in enumerate(texts):
        result = read(text, f"p{at}.yaml", settings=READER)
        assert not result.errors, [*map(str, result.errors)]
        objects += result.objects
        resources += result.resources
    chosen = Settings(local_addresses=NODE_ADDRESSES, enforcement=enforcement)
    return make_realm(ACTORS, objects, resources, settings=chosen)


def carried_out(plan, texts):
    """The texts after a plan: files patched, objects without a file added or deleted."""
    left = {f"p{at}.yaml": text for at, text in enumerate(texts)}
    for change in plan.files:
        assert left[change.file] == change.before
        left[change.file] = change.after
    for one in plan.objects:
        if not one.file and one.document is not None:
            left[f"{one.kind}-{one.name}.yaml"] = yaml.safe_dump(one.document)
        assert one.file or one.says[-1].startswith("new policy"), one
    return list(left.values())


def mended(question, *texts, enforcement="default"):
    """Suggest, carry the plan out on the texts, ask again; the plan and the new explanation."""
    asked = ask(realm_of(*texts, enforcement=enforcement), question)
    plan = make_plan(
        suggest(asked, READER),
        lambda key: next(
            (
                Source(f"p{at}.yaml", text)
                for at, text in enumerate(texts)
                if key in {one.key for one in read(text, "", settings=READER).objects}
            ),
            None,
        ),
        READER,
    )
    after = ask(realm_of(*carried_out(plan, texts), enforcement=enforcement), question).answer()
    return plan, after


# --- any policies, any question ---------------------------------------------------------------

_labels = st.sampled_from(
    [{"app": "a"}, {"app": "b"}, {"tier": "front"}, {"team": "red"}, {"app": "zzz"}, {}]
)
_other_namespace = {"k8s:io.kubernetes.pod.namespace": "y"}
_peer_labels = st.one_of(_labels, st.just(_other_namespace), st.just({"container:role": "db"}))
_cidrs = st.sampled_from(
    ["203.0.113.0/24", "203.0.113.1/32", "198.51.100.0/24", "0.0.0.0/0", "2001:db8::/32", "::/0"]
)
_cidr_sets = st.one_of(
    _cidrs.map(lambda cidr: {"cidr": cidr}),
    st.just({"cidr": "203.0.113.0/24", "except": ["203.0.113.0/28"]}),
)
_entities = st.sampled_from(["world", "host", "cluster", "all", "remote-node"])
_ports = st.one_of(
    st.sampled_from(
        [
            {"port": "80", "protocol": "TCP"},
            {"port": "443"},
            {"port": "53", "protocol": "UDP"},
            {"port": "8000", "endPort": 8100, "protocol": "TCP"},
            {"port": "1", "endPort": 600, "protocol": "TCP"},
            {"port": "0", "protocol": "TCP"},
            {"port": "web", "protocol": "TCP"},
            {"port": "9", "protocol": "SCTP"},
        ]
    )
)
_http = st.lists(
    st.sampled_from(
        [
            {"method": "GET"},
            {"path": "/v1/.*"},
            {"method": "POST", "path": "/a", "headers": ["X-Key: 1"]},
            {"host": "b[.]x"},
        ]
    ),
    max_size=2,
)


@st.composite
def _entries(draw, word, *, deny):
    entry = {}
    kind = draw(st.sampled_from(["Endpoints", "CIDR", "CIDRSet", "Entities", "", "none"]))
    if kind == "none":
        return {}
    match kind:
        case "Endpoints":
            listed = draw(st.lists(_peer_labels, max_size=2))
            entry[f"{word}Endpoints"] = [{"matchLabels": labels} for labels in listed]
        case "CIDR" | "CIDRSet":
            items = _cidrs if kind == "CIDR" else _cidr_sets
            entry[f"{word}{kind}"] = draw(st.lists(items, min_size=1, max_size=2))
        case "Entities":
            entry["fromEntities" if word == "from" else "toEntities"] = [draw(_entities)]
    more = draw(st.sampled_from(["", "ports", "ports", "icmps", "http"]))
    if more == "icmps":
        fields = draw(st.lists(st.sampled_from([{"type": 8}, {"type": 0}]), min_size=1, max_size=2))
        entry["icmps"] = [{"fields": fields}]
    elif more == "http" and not deny:
        rules = {"http": draw(_http)}
        ports = [{"port": "80", "protocol": "TCP"}]
        entry["toPorts"] = [{"ports": ports, "rules": rules}]
    elif more or not kind:
        listed = draw(st.lists(st.lists(_ports, min_size=1, max_size=3), min_size=1, max_size=2))
        entry["toPorts"] = [{"ports": ports} for ports in listed]
    return entry


@st.composite
def _cilium_policies(draw):
    clusterwide = draw(st.booleans())
    kind = "CiliumClusterwideNetworkPolicy" if clusterwide else "CiliumNetworkPolicy"
    spec = {"endpointSelector": {"matchLabels": draw(_labels)}}
    for field, word, deny in (
        ("ingress", "from", False),
        ("egress", "to", False),
        ("ingressDeny", "from", True),
        ("egressDeny", "to", True),
    ):
        if draw(st.booleans()):
            spec[field] = draw(st.lists(_entries(word, deny=deny), min_size=1, max_size=2))
    if len(spec) == 1:
        spec["ingress"] = [{}]
    namespace = {} if clusterwide else {"namespace": draw(st.sampled_from("xy"))}
    return {
        "apiVersion": "cilium.io/v2",
        "kind": kind,
        "metadata": {"name": draw(st.sampled_from(["p", "q", "r"])), **namespace},
        "spec": spec,
    }


@st.composite
def _kubernetes_policies(draw):
    rule = {}
    if draw(st.booleans()):
        rule["from"] = [{"podSelector": {"matchLabels": draw(_labels)}}]
    if draw(st.booleans()):
        rule["ports"] = [{"port": draw(st.sampled_from([80, 443, "web"]))}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "k", "namespace": draw(st.sampled_from("xy"))},
        "spec": {
            "podSelector": {"matchLabels": draw(_labels)},
            "policyTypes": draw(st.sampled_from([["Ingress"], ["Egress"], ["Ingress", "Egress"]])),
            "ingress": [rule],
        },
    }


@st.composite
def _tiered_policies(draw):
    everybody = {"namespaces": {}}
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha1",
        "kind": "AdminNetworkPolicy",
        "metadata": {"name": "admin"},
        "spec": {
            "priority": draw(st.integers(0, 9)),
            "subject": everybody,
            "ingress": [
                {"action": draw(st.sampled_from(["Deny", "Pass", "Allow"])), "from": [everybody]}
                for _ in range(draw(st.integers(1, 2)))
            ],
        },
    }


_ends = st.sampled_from(["x/a", "x/b", "y/c", "y/d", "y/e", "y/f", "world", "host", "203.0.113.77"])
_questions = st.builds(
    lambda ends, port, http: Question(
        source=ends[0], destination=ends[1], port=port, http=http if port == "80/TCP" else ""
    ),
    st.tuples(_ends, _ends).filter(lambda ends: ends[0] != ends[1]),
    st.sampled_from(["80/TCP", "443/TCP", "8050/TCP", "53/UDP", "EchoRequest/ICMP", "9/SCTP"]),
    st.sampled_from(["", "GET /v1/x", "PUT /a.b?x=[1]"]),
)
_documents = st.lists(
    st.one_of(_cilium_policies(), _cilium_policies(), _kubernetes_policies(), _tiered_policies()),
    min_size=1,
    max_size=3,
    unique_by=lambda one: (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(documents=_documents, question=_questions, flow_style=st.booleans())
def test_whatever_is_refused_passes_after_the_suggested_change(documents, question, flow_style):
    """The change is carried out on the files as a user would, and everything is resolved anew."""
    texts = [
        yaml.dump(one, Dumper=Plain, sort_keys=False, default_flow_style=flow_style)
        for one in documents
    ]
    assume(not any(read(text, "", settings=READER).errors for text in texts))
    assume(ask(realm_of(*texts), question).answer().verdict == "denied")
    plan, after = mended(question, *texts)
    assert plan.objects
    assert after.verdict in PASSES, [*texts, *(one.says for one in plan.objects)]
    assert plan.after.verdict == after.verdict


# --- which change it is -----------------------------------------------------------------------

GUARD = """\
# who may reach b
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: guard, namespace: x}
spec:
  endpointSelector: {matchLabels: {app: b}}
  ingress:
  - fromEndpoints:
    - matchLabels: {app: a}    # only ours
    toPorts:
    - ports:
      - {port: "443", protocol: TCP}
    - ports: [{port: "80", protocol: TCP}]
      rules:
        http:
        - {method: GET, path: "/v1/x"}
"""


def deny(entry):
    """A policy that denies b `entry`, and one that allows everything else."""
    head = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: %s, namespace: x}"
    body = "\nspec:\n  endpointSelector: {matchLabels: {app: b}}\n"
    allow = "  ingress: [{fromEntities: [all]}]\n"
    return [head % "deny" + body + f"  ingressDeny:\n  - {entry}\n", head % "allow" + body + allow]


def changed_lines(plan, texts):
    """The lines that a plan takes out (-) and puts in (+), and the objects without a file."""
    lines = []
    for change in plan.files:
        patch = unified(change.before, change.after, change.file).splitlines()[2:]
        lines += [line for line in patch if line[:1] in ("+", "-")]
    return lines


@pytest.mark.parametrize(
    ("source", "port", "http", "lines"),
    [
        (
            "y/c",
            "443/TCP",
            "",
            ["+    - matchLabels: {app: a, 'k8s:io.kubernetes.pod.namespace': 'y'}"],
        ),
        ("x/a", "444/TCP", "", ["+      - {port: '444', protocol: TCP}"]),
        ("x/a", "80/TCP", "PUT /v1/x", ["+        - {method: PUT, path: /v1/x}"]),
        ("host", "53/UDP", "", None),
    ],
)
def test_the_closest_rule_is_widened_where_one_condition_failed(source, port, http, lines):
    """One line more in the author's file; comments and layout stay."""
    question = Question(source=source, destination="x/b", port=port, http=http)
    if lines is None:  # allow-localhost: nothing refuses it
        assert ask(realm_of(GUARD), question).answer().verdict == "allowed"
        return
    plan, after = mended(question, GUARD)
    assert changed_lines(plan, [GUARD]) == lines
    assert after.verdict in PASSES


def test_where_two_conditions_failed_an_entry_of_its_own_is_added():
    """Neither the port for everybody nor the peer for every port."""
    plan, after = mended(Question(source="y/d", destination="x/b", port="53/UDP"), GUARD)
    [one] = plan.objects
    assert one.document["spec"]["ingress"][-1] == {
        "fromEndpoints": [{"matchLabels": {"k8s:io.kubernetes.pod.namespace": "y"}}],
        "toPorts": [{"ports": [{"port": "53", "protocol": "UDP"}]}],
    }
    assert after.verdict == "allowed"


@pytest.mark.parametrize(
    ("entry", "source", "port", "left"),
    [
        (
            "fromCIDR: [203.0.113.0/24]",
            "203.0.113.77",
            "80/TCP",
            {"fromCIDRSet": [{"cidr": "203.0.113.0/24", "except": ["203.0.113.77/32"]}]},
        ),
        (
            "fromCIDRSet: [{cidr: 203.0.113.0/24, except: [203.0.113.0/28]}, {cidr: 10.0.0.0/8}]",
            "203.0.113.77",
            "80/TCP",
            {
                "fromCIDRSet": [
                    {"cidr": "203.0.113.0/24", "except": ["203.0.113.0/28", "203.0.113.77/32"]},
                    {"cidr": "10.0.0.0/8"},
                ]
            },
        ),
        (
            "toPorts: [{ports: [{port: '79', endPort: 81, protocol: TCP}]}]",
            "y/c",
            "80/TCP",
            {
                "toPorts": [
                    {
                        "ports": [
                            {"port": "79", "protocol": "TCP"},
                            {"port": "81", "protocol": "TCP"},
                        ]
                    }
                ]
            },
        ),
        (
            "toPorts: [{ports: [{port: '80'}]}]",
            "y/c",
            "80/TCP",
            {
                "toPorts": [
                    {
                        "ports": [
                            {"port": "80", "protocol": "UDP"},
                            {"port": "80", "protocol": "SCTP"},
                        ]
                    }
                ]
            },
        ),
        (
            "fromEndpoints: [{matchLabels: {'k8s:io.kubernetes.pod.namespace': y, app: a}}]",
            "y/c",
            "80/TCP",
            {
                "fromEndpoints": [
                    {
                        "matchLabels": {"k8s:io.kubernetes.pod.namespace": "y", "app": "a"},
                        "matchExpressions": [
                            {"key": "team", "operator": "NotIn", "values": ["red"]}
                        ],
                    }
                ]
            },
        ),
        ("fromEntities: [world, cluster]", "x/a", "80/TCP", {"fromEntities": ["world"]}),
        ("fromEntities: [cluster]", "x/a", "80/TCP", {}),
    ],
)
def test_an_explicit_deny_is_narrowed_before_it_is_taken_away(entry, source, port, left):
    """What else the rule denies stays denied; the endpoint stays isolated."""
    texts = deny(entry)
    plan, after = mended(Question(source=source, destination="x/b", port=port), *texts)
    [one] = plan.objects
    assert (one.name, one.document["spec"]["ingressDeny"]) == ("deny", [left])
    assert "deny" in one.says[0]
    assert after.verdict == "allowed"


def test_both_directions_are_mended():
    """An egress rule for the sender and an ingress rule for the receiver, one object each."""
    closed = GUARD.replace("app: b}", "app: a}").replace("guard", "sender")
    closed = closed[: closed.index("  ingress:")] + "  egress: [{}]\n"
    question = Question(source="x/a", destination="x/b", port="81/TCP")
    plan, after = mended(question, GUARD, closed)
    assert {one.name for one in plan.objects} == {"guard", "sender"}
    assert after.verdict == "allowed"


def test_without_a_policy_to_change_there_is_a_new_one():
    """Enforcement always: nobody's policy isolates, so a policy of its own allows."""
    question = Question(source="x/a", destination="x/b", port="EchoRequest/ICMP")
    plan, after = mended(question, enforcement="always")
    assert {one.kind for one in plan.objects} == {"CiliumNetworkPolicy"}
    for one in plan.objects:
        assert one.document["metadata"]["name"].startswith("allow-")
        assert False in one.document["spec"]["enableDefaultDeny"].values()
    assert after.verdict == "allowed"


def test_what_is_allowed_needs_no_change():
    """An empty plan, not an error."""
    plan, _ = mended(Question(source="x/a", destination="x/b", port="443/TCP"), GUARD)
    assert (plan.objects, plan.files) == ((), ())


def test_a_tiered_deny_goes_although_a_lower_tier_denies_too():
    """Each step removes one deny that applies, whichever decided."""
    admin = {
        "apiVersion": "policy.networking.k8s.io/v1alpha1",
        "kind": "AdminNetworkPolicy",
        "metadata": {"name": "admin"},
        "spec": {
            "priority": 0,
            "subject": {"namespaces": {}},
            "ingress": [{"action": "Deny", "from": [{"namespaces": {}}]}],
        },
    }
    texts = [*deny("toPorts: [{ports: [{port: '80'}]}]"), yaml.safe_dump(admin)]
    plan, after = mended(Question(source="y/c", destination="x/b", port="80/TCP"), *texts)
    assert {one.kind for one in plan.objects} == {"AdminNetworkPolicy", "CiliumNetworkPolicy"}
    assert after.verdict == "allowed"
