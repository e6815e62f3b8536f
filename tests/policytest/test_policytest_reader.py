"""What a test file may say, and how it is told what is wrong."""

import pytest
from policytest_reading import HEAD, WEB, case_of, failures, read, text_of, written

from policytest.placing import text_of as placed
from policytest.reader import read_case

ALLOWED = {"from": "x/a", "to": "x/b", "port": "80/TCP", "verdict": "allow"}


def problems(text):
    return [str(problem) for problem in read(text).errors]


def test_a_check_that_holds_and_one_that_does_not():
    denied = {**ALLOWED, "verdict": "deny"}
    case = case_of(written(policies=[WEB], expect=[ALLOWED, denied]))
    [fault] = failures(case)
    assert fault.startswith(": x/a -> x/b 80/TCP: expected deny, got allow")


def test_every_problem_of_a_file_is_told_at_once_with_its_place():
    text = """\
apiVersion: bartizan.dev/v1
kind: PolicyTests
endpoints:
  - {namespace: x, name: a, label: {app: a}, ip: 10.244.1.1}
  - {namespace: x, name: a, ip: 10.244.1.1}
  - {namespace: x, name: B}
hosts: [{name: out, ip: 10.244.1.1}]
policies: [nowhere/, {apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy, metadata: {name: r},
                      spec: {endpointSelector: {}, ingres: []}}]
steps:
  - label: {x/c: {app: b}}
    delete: [CiliumNetworkPolicy/x/r, CiliumNetworkPolicie/x/r]
    remove: [x/z]
    namespaces: {z: {labels: {a: b}}}
    expect:
      - {from: x/a, to: x/z, port: 80/TPC, verdict: allowed}
      - {from: x/a, to: host:internet, port: 80/TCP, verdict: allow, becaus: x}
    matrix:
      - {port: 80, rows: {x/a: "..Z", host:out: "."}}
"""
    assert problems(text) == [
        "t.yaml:2:7: kind: must be PolicyTest",
        't.yaml:4:29: endpoints[0].label: unknown field "label"; did you mean "labels"?',
        "t.yaml:5:5: endpoint x/a is given twice",
        (
            't.yaml:6:26: endpoints[2].name: "B" is no name: '
            'at most 63 lower-case letters, digits and "-"'
        ),
        "t.yaml:7:25: hosts[0].ip: 10.244.1.1 belongs to x/a already",
        't.yaml:8:12: policies[0]: "nowhere/" is not there (looked for nowhere)',
        (
            "t.yaml:9:29: spec: rule must have at least one of ingress, ingressDeny, egress, "
            "egressDeny, with at least one entry"
        ),
        't.yaml:9:52: spec.ingres: unknown field "ingres"; did you mean "ingress"?',
        't.yaml:11:18: steps[].label: no "x/c" in this step; did you mean "x/B"?',
        "t.yaml:12:14: steps[].delete: there is no CiliumNetworkPolicy/x/r in this step",
        (
            't.yaml:12:39: steps[0].delete[1]: unknown kind "CiliumNetworkPolicie"; '
            'did you mean "CiliumNetworkPolicy"?'
        ),
        't.yaml:13:14: steps[].remove: no "x/z" in this step; did you mean "x/B"?',
        't.yaml:14:21: steps[].namespaces: no namespace "z"',
        (
            't.yaml:16:36: steps[0].expect[0].port: "80/TPC": the protocol is none of '
            'TCP, UDP, SCTP; did you mean "TCP"?'
        ),
        (
            't.yaml:16:53: steps[0].expect[0].verdict: "allowed" is none of allow, deny; '
            'did you mean "allow"?'
        ),
        't.yaml:17:9: to: no "host:internet" in this step',
        't.yaml:17:70: steps[0].expect[1].becaus: unknown field "becaus"',
        (
            't.yaml:19:32: steps[0].matrix[0].rows["x/a"]: "..Z": \'Z\' is no sign; '
            "write . allowed, X denied, -"
        ),
        't.yaml:19:49: steps[0].matrix[0].rows["host:out"]: has 1 signs for 2 columns',
    ]


@pytest.mark.parametrize(
    ("check", "told"),
    [
        ({"from": "x/a", "verdict": "deny", "port": 80}, "needs to:"),
        ({"from": "x/a", "to": "x/b", "port": 80}, "needs verdict"),
        ({"from": "x/a", "to": "x/b", "verdict": "deny"}, "needs port"),
        ({**ALLOWED, "tls": {}}, "needs sni"),
        ({**ALLOWED, "tls": {"sni": "a b"}}, "is not a server name"),
        ({**ALLOWED, "port": "443/UDP", "tls": {"sni": "a"}, "http": {}}, "http needs TCP"),
        ({**ALLOWED, "port": "80/UDP", "tls": {"sni": "a"}}, "tls needs TCP, not UDP"),
        ({**ALLOWED, "icmp": "EchoRequest"}, "icmp has types, not ports"),
        ({**ALLOWED, "port": "0/TCP"}, "is no port"),
        ({**ALLOWED, "port": "web"}, "is no port"),
        ({**ALLOWED, "port": "53/UDP", "http": {}}, "http needs TCP, not UDP"),
        ({**ALLOWED, "http": {"path": "/a b"}}, "is not a request target"),
        ({**ALLOWED, "http": {"headers": {"Host": "x"}}}, "http.host"),
        ({**ALLOWED, "http": {"headers": {"A": "b\r\nC: d"}}}, "is no header value"),
        ({**ALLOWED, "reason": "POLICY_DENIED"}, "only what is denied has a reason"),
        ({**ALLOWED, "verdict": "deny", "reason": "POLICY_DENIDE"}, 'did you mean "POLICY_DENIED"'),
        ({**ALLOWED, "to": "2001:db8::1"}, "no IPv4 or IPv6 address in common"),
        ({"from": "x/a", "to": "x/b", "icmp": "EchoRequst", "verdict": "deny"}, "no ICMP type"),
        ({"from": "x/a", "to": "x/b", "icmp": "PacketTooBig", "verdict": "deny"}, "in common"),
    ],
)
def test_a_check_that_cannot_be_asked_is_refused(check, told):
    [problem] = problems(written(expect=[check]))
    assert told in problem


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"endpoints": [{"name": "a", "ips": []}]}, "is empty; leave it out"),
        ({"endpoints": [{"name": "a", "ip": "10.0.0.1", "ips": ["::1"]}]}, "write all addresses"),
        ({"endpoints": [{"name": "a", "ip": "10.0.0.256"}]}, "10.0.0.256"),
        ({"endpoints": [{"name": "a", "ip": "::ffff:10.0.0.1"}]}, "write 10.0.0.1"),
        ({"hosts": [{"name": "h", "ip": "224.0.0.1"}]}, "is a multicast address"),
        ({"namespaces": {"x": {"labels": {"a;b": "c"}}}}, '"a;b" is no Kubernetes label key'),
        ({"namespaces": {"x": {"labels": {"a": "b;c"}}}}, "which no label may hold"),
        ({"endpoints": [{"name": "a", "labels": {"reserved:host": ""}}]}, "is reserved"),
        ({"endpoints": [{"name": "a", "ports": [{"name": "80", "port": 80}]}]}, "is no port name"),
        ({"hosts": [{"name": "h"}, {"name": "h"}]}, 'host "h" is given twice'),
        ({"settings": {"enforcement": "alway"}}, 'did you mean "always"'),
        ({"settings": {"assume": ["node"]}}, 'did you mean "nodes"'),
        ({"policies": [WEB, WEB]}, "is given more than once"),
    ],
)
def test_a_world_that_cannot_be_is_refused(fields, told):
    assert any(told in problem for problem in problems(written(**fields)))


def test_an_end_with_a_wrong_address_is_told_of_once():
    """Not once more wherever it is used."""
    [problem] = problems(written(endpoints=[{"name": "a", "ip": "10.0.0.256"}, {"name": "b"}],
                                 expect=[{**ALLOWED, "from": "a", "to": "b"}]))  # fmt: skip
    assert "10.0.0.256" in problem


def test_an_entity_is_no_end():
    [problem] = problems(written(expect=[{**ALLOWED, "from": "world"}]))
    assert 'from: "world" is an entity, not an end; write an address, host:NAME or node' in problem


def test_a_policy_that_the_firewall_would_refuse_is_refused_here():
    """Accepting what is not enforced would make the test a lie."""
    ingress = [{"fromEndpoints": [{}], "authentication": {"mode": "required"}}]
    policy = {**WEB, "spec": {"endpointSelector": {}, "ingress": ingress}}
    [problem] = problems(written(policies=[policy]))
    assert "is not enforced by this version" in problem
    assume = {"assume": ["authentication", "http"]}
    case = case_of(written(policies=[policy], settings=assume, expect=[ALLOWED]))
    assert case.model_only == "it assumes authentication, which the firewall does not do"


def test_a_policy_for_the_node_needs_the_host_firewall():
    policy = {"apiVersion": "cilium.io/v2", "kind": "CiliumClusterwideNetworkPolicy"}
    policy |= {"metadata": {"name": "n"}, "spec": {"nodeSelector": {}, "ingress": [{}]}}
    [problem] = problems(written(policies=[policy]))
    assert "host_firewall" in problem
    check = {**ALLOWED, "to": "node", "verdict": "deny"}
    settings = {"hostFirewall": True}
    assert failures(case_of(written(policies=[policy], settings=settings, expect=[check]))) == []


def test_files_and_folders_of_policies_are_found_beside_the_test(tmp_path):
    (tmp_path / "policies/deep").mkdir(parents=True)
    (tmp_path / "policies/deep/web.yaml").write_text(text_of(WEB))
    (tmp_path / "policies/README").write_text("no policy")
    (tmp_path / "a.test.yaml").write_text(written(policies=["policies/"], expect=[ALLOWED]))
    found = read_case(tmp_path / "a.test.yaml")
    assert not found.problems
    [source] = found.case.sources
    assert source.file == str(tmp_path / "policies/deep/web.yaml")
    assert failures(found.case) == []


def test_a_file_that_is_not_there_is_a_problem_like_others(tmp_path):
    [problem] = read_case(tmp_path / "none.yaml").errors
    assert "cannot be read" in problem.message


@pytest.mark.parametrize("text", ["", "---\na: 1\n---\nb: 1\n"])
def test_a_test_file_is_one_document(text):
    [problem] = problems(text)
    assert "documents; a test file is one" in problem


def test_broken_yaml_is_told_by_its_place():
    assert problems("a: [1\nb: 2\n")[0].startswith("t.yaml:2:")


def test_endpoints_without_an_address_get_one_that_nobody_gave():
    case = case_of(
        written(
            endpoints=[
                {"name": "a"},
                {"name": "b", "ip": "10.0.1.1"},
                {"name": "c"},
                {"name": "d", "ips": ["10.0.0.1", "fd00::9"]},
            ]
        )
    )
    addresses = [one.addresses for one in case.endpoints]
    assert addresses[:3] == [(bytes((10, 0, 1, n)),) for n in (2, 1, 3)]
    assert case.node == (bytes((10, 0, 0, 2)),)
    assert len(addresses[3]) == 2


def test_a_name_without_a_namespace_is_in_default():
    endpoints = [{"name": "a"}, {"name": "b"}]
    case = case_of(
        written(endpoints=endpoints, expect=[{**ALLOWED, "from": "a", "to": "default/b"}])
    )
    assert [check.title for check in case.steps[0].checks] == ["default/a -> default/b 80/TCP"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hosts": [{"name": "h", "names": ["www.example"]}]},
            "hosts: names need a resolver",
        ),
        (
            {"hosts": [{"name": "h", "names": ["a b"]}], "resolver": "host:h"},
            'hosts[0].names[0]: "a b" is no DNS name',
        ),
        (
            {"hosts": [{"name": "dns"}], "resolver": "host:dnss"},
            'resolver: no endpoint or host "host:dnss"; did you mean "host:dns"?',
        ),
    ],
)
def test_names_need_somebody_who_answers_for_them(fields, message):
    [problem] = problems(written(**fields))
    assert message in problem


def test_columns_default_to_the_rows_and_then_the_hosts():
    case = case_of(
        written(
            hosts=[{"name": "out", "ip": "203.0.113.7"}],
            matrix=[{"port": 80, "rows": {"x/b": "- . .", "x/a": ".-X"}}],
        )
    )
    [matrix] = case.steps[0].matrices
    assert matrix.columns == ("x/b", "x/a", "host:out")
    titles = [(check.title, check.expected.allowed) for check in case.steps[0].checks]
    assert titles == [
        ("x/b -> x/a 80/TCP", True),
        ("x/b -> host:out 80/TCP", True),
        ("x/a -> x/b 80/TCP", True),
        ("x/a -> host:out 80/TCP", False),
    ]


def test_expectations_beside_steps_are_the_state_before_the_first_step():
    case = case_of(written(expect=[ALLOWED], steps=[{"name": "later", "expect": [ALLOWED]}]))
    assert [step.name for step in case.steps] == ["", "later"]
    assert [check.step for step in case.steps for check in step.checks] == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        "spec:\n  a: {b: [1, 'x: y', \"q\\\"\"]}\n  c:\n  - d: ''\n    e:\n  - |\n    two\n    l\n",
        "[a, {b: c}, [], {}]",
        "a: &x {k: v}\nb: *x\nc: 2026-01-01\nd: on\ne: '{'\nf: 0x10\n",
        "key with: colon # comment\nö: ü\n",
    ],
)
def test_a_part_written_anew_means_the_same_and_stands_in_its_lines(text):
    """Errors and origins of inline policies name the line of the test file."""
    import yaml

    from firewall.policy.readers.composition import compose

    shifted = "\n\n\n" + "".join(f"    {line}" for line in text.splitlines(keepends=True))
    [(node, _)] = compose(shifted, "t", [])
    again = placed(node)
    assert yaml.safe_load(again) == yaml.safe_load(text)
    [(other, _)] = compose(again, "t", [])
    assert other.mark == node.mark
    if "&" not in text:
        assert list(_lines(other)) == list(_lines(node))


def _lines(node):
    yield type(node).__name__, node.mark.line
    for child in getattr(node, "items", ()):
        yield from _lines(child)
    for key, pair in getattr(node, "pairs", {}).items():
        yield key, pair.mark.line
        yield from _lines(pair.value)


def test_inline_policies_are_told_by_the_lines_of_the_test_file():
    text = text_of(HEAD) + (
        "endpoints: [{namespace: x, name: a, labels: {app: a}}, {namespace: x, name: b}]\n"
        "policies:\n"
        "  - apiVersion: networking.k8s.io/v1\n"
        "    kind: NetworkPolicy\n"
        "    metadata: {name: n, namespace: x}\n"
        "    spec:\n"
        "      podSelector: {}\n"
        "      ingress:\n"
        "        - from:\n"
        "            - podSelector: {matchLabels: {app: a}}\n"
        "expect: []\n"
    )
    case = case_of(text)
    [entry] = case.sources[0].objects[0].entries
    assert (entry.origin.file, entry.origin.line) == ("t.yaml", 11)
    from firewall.policy.readers import read as read_policies

    again = read_policies(case.sources[0].text, "t.yaml")
    assert again.objects[0].entries[0].origin.line == 11
