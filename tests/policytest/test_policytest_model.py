"""What the model answers, and by whom."""

import pytest
from policytest_reading import WEB, case_of, failures, results, written

from policytest.answer import Answer, differences, same
from policytest.case import Expected
from policytest.model import ContradictionError

HTTP = {
    **WEB,
    "metadata": {"name": "l7", "namespace": "x"},
    "spec": {
        "endpointSelector": {"matchLabels": {"app": "b"}},
        "ingress": [
            {
                "fromEndpoints": [{"matchLabels": {"app": "a"}}],
                "toPorts": [
                    {
                        "ports": [{"port": "8080", "protocol": "TCP"}],
                        "rules": {
                            "http": [
                                {"method": "GET", "path": "/v1/.*"},
                                {"method": "PUT", "path": "/v1/x", "headers": ["X-Key: v"]},
                                {"method": "HEAD", "host": "b.x:8080"},
                            ]
                        },
                    }
                ],
            }
        ],
    },
}


def check(verdict="allow", **fields):
    return {"from": "x/a", "to": "x/b", "port": "80/TCP", "verdict": verdict, **fields}


def http(method, path, verdict="allow", headers=None, **fields):
    request = {"method": method, "path": path, "headers": headers or {}}
    return check(verdict, port=8080, http=request, **fields)


def holds(*checks, **fields):
    assert failures(case_of(written(expect=list(checks), **fields))) == []


def test_by_names_the_policies_and_the_words_that_stand_for_none():
    holds(
        check(by="x/web"),
        check(by="CiliumNetworkPolicy/x/web"),
        check("deny", port=81, by="default-deny", reason="POLICY_DENIED", direction="ingress"),
        {**check(by="no-policy"), "from": "x/b", "to": "x/a"},
        policies=[WEB],
    )


def test_by_names_the_deny_rule():
    spec = {"endpointSelector": {}, "ingressDeny": [{"fromEndpoints": [{}]}]}
    deny = {**WEB, "metadata": {"name": "no", "namespace": "x"}, "spec": spec}
    holds(check("deny", by="x/no", reason="POLICY_DENY"), policies=[WEB, deny])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (check(by="x/other"), "expected it by x/other, got it by x/web"),
        (check("deny", port=81, reason="POLICY_DENY"), "expected the reason POLICY_DENY"),
        (check("deny", port=81, direction="egress"), "expected egress to decide, got ingress"),
    ],
)
def test_a_right_verdict_for_a_wrong_reason_is_a_failure(wrong, told):
    [fault] = failures(case_of(written(policies=[WEB], expect=[wrong])))
    assert told in fault


def test_requests_are_judged_as_the_proxy_judges_them():
    """The same bytes, the same reading: what it normalises or refuses is so here too."""
    holds(
        check(port=8080),
        http("GET", "/v1/x", by="x/l7"),
        http("GET", "/v1/../v1//x?q=/../"),
        http("GET", "/v1/../secret", "deny", by="x/l7"),
        http("PUT", "/v1/x", headers={"X-Key": "v"}),
        http("PUT", "/v1/x", "deny", headers={"X-Key": ["v", "w"]}),
        http("PUT", "/v1/x", "deny", reason="POLICY_DENIED"),
        http("HEAD", "/"),
        http("GET", "/v1/%2e%2e%2fsecret", "deny", by="proxy", reason="INVALID_PACKET_DROPPED"),
        http("CONNECT", "/v1/x", "deny", by="proxy"),
        policies=[HTTP],
    )


def test_steps_change_labels_namespaces_policies_and_endpoints():
    namespaced = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "red-only", "namespace": "x"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "b"}},
            "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "red"}}}]}],
        },
    }
    steps = [
        {"name": "relabelled", "label": {"x/a": {"app": "c"}}, "expect": [check("deny")]},
        {"name": "back", "label": {"x/a": {"app": "a", "old": None}}, "expect": [check()]},
        {"name": "gone", "delete": ["CiliumNetworkPolicy/x/web"], "expect": [check(port=81)]},
        {"name": "by namespace", "apply": [namespaced], "expect": [check("deny")]},
        {
            "name": "red",
            "namespaces": {"x": {"labels": {"team": "red"}}},
            "expect": [check(), check(port=9)],
        },
        {
            "name": "blue",
            "namespaces": {"x": {"labels": {"team": None}}},
            "expect": [check("deny")],
        },
        {
            "name": "another",
            "add": [{"namespace": "y", "name": "n"}],
            "namespaces": {"y": {"labels": {"team": "red"}}},
            "expect": [{**check(), "from": "y/n"}],
        },
        {
            "name": "no b any more",
            "remove": ["x/b"],
            "add": [{"namespace": "x", "name": "b", "labels": {"app": "z"}}],
            "expect": [check(by="no-policy")],
        },
    ]
    holds(policies=[WEB], steps=steps)


def test_namespaces_may_stand_among_the_policies():
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}
    namespace["metadata"]["labels"] = {"team": "red"}
    spec = {
        "endpointSelector": {"matchLabels": {"app": "b"}},
        "ingress": [
            {"fromEndpoints": [{"matchLabels": {"k8s:io.cilium.k8s.namespace.labels.team": "red"}}]}
        ],
    }
    holds(check(), policies=[namespace, {**WEB, "spec": spec}])


def test_a_check_holds_for_every_pair_of_addresses():
    """One family denied is a failure that names the addresses."""
    spec = {
        "podSelector": {"matchLabels": {"app": "b"}},
        "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    }
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    policy |= {"metadata": {"name": "v4", "namespace": "x"}, "spec": spec}
    endpoints = [
        {"namespace": "x", "name": "a", "ips": ["10.1.1.1", "fd00::1"]},
        {"namespace": "x", "name": "b", "labels": {"app": "b"}, "ips": ["10.1.1.2", "fd00::2"]},
    ]
    case = case_of(written(endpoints=endpoints, policies=[policy], expect=[check()]))
    [fault] = failures(case)
    assert fault.endswith("(fd00::1 -> fd00::2)")


def test_hosts_addresses_and_the_node_are_no_endpoints():
    spec = {
        "endpointSelector": {"matchLabels": {"app": "b"}},
        "ingress": [{"fromCIDR": ["203.0.113.0/24"]}],
        "egress": [{"toEntities": ["host"]}],
    }
    hosts = [{"name": "in", "ip": "203.0.113.7"}, {"name": "out", "ip": "198.51.100.7"}]
    holds(
        {**check(by="x/web"), "from": "host:in"},
        {**check("deny"), "from": "host:out"},
        {**check(), "from": "203.0.113.9"},
        {**check(), "from": "node"},
        {**check(), "from": "x/b", "to": "node"},
        {**check("deny"), "from": "x/b", "to": "host:in"},
        {**check(by="no-policy"), "from": "host:in", "to": "host:out"},
        hosts=hosts,
        policies=[{**WEB, "spec": spec}],
    )


def test_settings_are_the_daemons():
    holds(check("deny"), settings={"enforcement": "always"})
    holds(check(port=81), settings={"enforcement": "never"}, policies=[WEB])
    holds(check(port=81, by="audit"), settings={"audit": True}, policies=[WEB])
    holds({**check("deny"), "from": "node"}, settings={"allowLocalhost": "policy"}, policies=[WEB])


def test_icmp_is_asked_by_the_names_of_both_families():
    spec = {
        "endpointSelector": {"matchLabels": {"app": "b"}},
        "ingress": [{"icmps": [{"fields": [{"family": "IPv4", "type": "EchoRequest"}]}]}],
    }
    endpoints = [
        {"namespace": "x", "name": "a", "ips": ["10.1.1.1", "fd00::1"]},
        {"namespace": "x", "name": "b", "labels": {"app": "b"}, "ips": ["10.1.1.2", "fd00::2"]},
    ]
    ping = {"from": "x/a", "to": "x/b", "icmp": "EchoRequest", "verdict": "allow"}
    policies = [{**WEB, "spec": spec}]
    [fault] = failures(case_of(written(endpoints=endpoints, policies=policies, expect=[ping])))
    assert "fd00::1" in fault
    spec["ingress"][0]["icmps"][0]["fields"].append({"family": "IPv6", "type": 128})
    holds(ping, endpoints=endpoints, policies=policies)


def test_rules_that_contradict_each_other_are_an_error_of_the_file():
    def proxied(name, rules):
        port = {"ports": [{"port": "53", "protocol": "TCP"}], "rules": rules}
        spec = {"endpointSelector": {}, "egress": [{"toPorts": [port]}]}
        return {**WEB, "metadata": {"name": name, "namespace": "x"}, "spec": spec}

    text = written(
        policies=[
            proxied("one", {"http": [{"method": "GET"}]}),
            proxied("two", {"dns": [{"matchPattern": "*"}]}),
        ],
        settings={"assume": ["dns"]},
        expect=[check()],
    )
    with pytest.raises(ContradictionError):
        results(case_of(text))


def test_only_chosen_checks_are_answered_and_later_steps_are_left():
    from policytest.play import play
    from policytest.selection import filtered

    steps = [
        {"name": "one", "expect": [check(), check("deny", port=81)]},
        {"name": "two", "label": {"x/a": {"app": "c"}}, "expect": [check("deny")]},
    ]
    case = case_of(written(policies=[WEB], steps=steps))
    chosen = filtered(["one: x/a -> x/b 81", "no such"])
    assert [result.check.title for result in play(case, chosen)] == ["x/a -> x/b 81/TCP"]
    assert [result.step for result in play(case, filtered(["two*80"]))] == ["two"]


def test_judges_mean_the_same_if_verdict_reason_and_deciders_are_the_same():
    one = Answer(True, ("x/a", "x/b"))
    assert same(one, Answer(True, ("x/b", "x/a"), why="in other words"))
    assert not same(one, Answer(False, ("x/a", "x/b")))
    assert not same(one, Answer(True, ("x/c",)))
    assert not same(Answer(False, ("d",), "POLICY_DENIED"), Answer(False, ("d",), "POLICY_DENY"))


def test_a_flow_record_that_names_the_first_policies_only_means_the_same():
    many = tuple(f"x/p{number}" for number in range(20))
    assert same(Answer(True, many), Answer(True, many[:16]))
    assert not same(Answer(True, many), Answer(True, many[:15]))
    assert not same(Answer(True, many), Answer(True, (*many[:15], "x/other")))


def test_what_a_check_does_not_state_is_not_held_against_the_answer():
    assert differences(Expected(allowed=True), Answer(True, ("x/a",), direction="egress")) == []
