"""Warnings about policies that are valid and not meant."""

import pytest
from policy_reading import accept, ccnp, cnp

from firewall.identities.labels import LabelFilter, LabelSet
from firewall.policy.lint import lint
from firewall.policy.lint_http import lint_http
from firewall.policy.model import HeaderMatch, HttpRule


def found(*texts, **known):
    return [str(problem) for problem in lint([accept(text) for text in texts], **known)]


def named(text, name):
    return text.replace("name: p,", f"name: {name},")


DNS = "- {toEntities: [all], toPorts: [{ports: [{port: '53', protocol: UDP}]}]}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/", 'write "/v1/.*"'),
        ("/", "the root only"),
        ("v1/.*", 'the path begins with "/"'),
        ("[a-z]+", 'the path begins with "/"'),
        ("http://x/", 'the path begins with "/"'),
        ("/a?b=c", "query string"),
        ("/a#top", "fragments are never sent"),
        ("/%c3%a9", 'rules see "%C3"'),
        ("/a%41", 'rules see "A"'),
        ("/a//b", "slashes are merged before"),
    ],
)
def test_paths_that_match_nothing_or_not_what_is_meant(path, message):
    assert any(message in text for _, text in lint_http(HttpRule(path=path)))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/.*",
        "^/v1$",
        "/v1",
        ".*",
        r"/a\?b=c",
        "(/a|/b)",
        "/public$",
        ".*/public$",
        "/a/?",
        "/%C3%A9",
        "/a%20b",
        "(?i)/%c3",
        "/a//?b",
    ],
)
def test_paths_that_are_fine(path):
    assert list(lint_http(HttpRule(path=path))) == []


@pytest.mark.parametrize(
    ("method", "message"),
    [("get", "case-sensitive"), ("GET, POST", "none of the common methods"), ("GE", "none of")],
)
def test_methods_that_match_nothing(method, message):
    ((field, text),) = lint_http(HttpRule(method=method))
    assert field == "method"
    assert message in text


@pytest.mark.parametrize("method", ["GET", "GET|POST", ".*", "(?i)get", "P.*"])
def test_methods_that_are_fine(method):
    assert list(lint_http(HttpRule(method=method))) == []


def test_a_header_without_space_asks_for_a_name_that_cannot_be():
    ((field, text),) = lint_http(HttpRule(headers=("X-A: 1", "X-B", "X-C:1")))
    assert (field, 'write "X-C: 1"' in text) == ("headers[2]", True)


def test_a_header_that_ends_at_the_proxy_is_never_seen():
    rule = HttpRule(
        headers=("Connection: close", "Host: a", "Upgrade: websocket", "X-A"),
        header_matches=(HeaderMatch(name="Transfer-Encoding"), HeaderMatch(name="X-B")),
    )
    fields = [field for field, text in lint_http(rule) if "rules never see it" in text]
    assert fields == ["headers[0]", "headerMatches[0].name"]


def test_http_findings_point_to_the_rule():
    spec = """
        endpointSelector: {}
        ingress:
        - toPorts:
          - ports: [{port: "80", protocol: TCP}]
            rules: {http: [{path: /a}, {path: /v1/}]}
    """
    (line,) = found(cnp(spec))
    assert line.startswith("p.yaml:8:7: spec.ingress[0].toPorts[0].rules.http[1].path: ")


@pytest.mark.parametrize("kind", ["ingress", "egress"])
def test_an_entry_of_nothing_allows_nothing(kind):
    (line,) = found(cnp(f"endpointSelector: {{}}\n{kind}: [{{}}]"))
    assert "allows nothing and isolates the subject" in line
    assert f"{'from' if kind == 'ingress' else 'to'}Entities: [all]" in line


def test_a_deny_of_nothing_denies_nothing():
    (line,) = found(cnp("endpointSelector: {}\ningressDeny: [{}]"))
    assert "denies nothing" in line


def test_a_kubernetes_policy_of_nothing_is_meant():
    text = """
        apiVersion: networking.k8s.io/v1
        kind: NetworkPolicy
        metadata: {name: p}
        spec: {podSelector: {}}
    """
    assert found(text) == []


WEB = """endpointSelector: {matchLabels: {app: a}}
egress:
- {toCIDR: [10.0.0.0/8], toPorts: [{ports: [{port: '443', protocol: TCP}]}]}"""


def test_isolated_egress_without_dns():
    (line,) = found(cnp(WEB))
    assert "nothing allows DNS" in line
    assert found(cnp(f"{WEB}\n{DNS}")) == []


def test_dns_may_be_allowed_by_another_policy_for_the_same_or_more_subjects():
    web = cnp(WEB)
    for_all = named(cnp(f"endpointSelector: {{}}\negress:\n{DNS}"), "q")
    for_others = named(cnp(f"endpointSelector: {{matchLabels: {{app: b}}}}\negress:\n{DNS}"), "q")
    assert found(web, for_all) == []
    assert len(found(web, for_others)) == 1


def test_total_isolation_needs_no_dns():
    assert not any("DNS" in line for line in found(cnp("endpointSelector: {}\negress: [{}]")))


def test_names_need_a_dns_rule():
    spec = f"endpointSelector: {{}}\negress:\n- {{toFQDNs: [{{matchName: a.com}}]}}\n{DNS}"
    (line,) = found(cnp(spec))
    assert "toFQDNs learns addresses from DNS rules" in line
    rule = DNS.replace("UDP}]}", "UDP}], rules: {dns: [{matchPattern: '*'}]}}")
    assert found(cnp(f"{spec}\n{rule}")) == []


@pytest.mark.parametrize(
    "spec",
    [
        "endpointSelector: {matchLabels: {pod-template-hash: x}}\ningress: [{fromEntities: [all]}]",
        "endpointSelector: {}\ningress: [{fromEndpoints: [{matchLabels: {controller-uid: x}}]}]",
    ],
)
def test_labels_that_no_identity_has(spec):
    (line,) = found(cnp(spec))
    assert "is not security-relevant" in line


def test_the_label_filter_in_force_decides():
    text = cnp("endpointSelector: {matchLabels: {app: x}}\ningress: [{fromEntities: [all]}]")
    assert found(text) == []
    only_id = LabelFilter(("k8s:id",))
    assert any('label "app"' in line for line in found(text, label_filter=only_id))


def test_labels_that_cilium_adds_are_relevant():
    spec = "endpointSelector: {}\ningress: [{fromEndpoints: [{matchLabels: {app: a}}]}]"
    assert found(cnp(spec)) == []


def both(allow, deny, subject="{}"):
    spec = f"endpointSelector: {subject}\ningress: [{allow}]"
    return cnp(spec), named(cnp(f"endpointSelector: {{}}\ningressDeny: [{deny}]"), "q")


PORT = "toPorts: [{ports: [{port: '80', protocol: TCP}]}]"
RANGE = "toPorts: [{ports: [{port: '1', endPort: 99, protocol: TCP}]}]"


@pytest.mark.parametrize(
    ("allow", "deny"),
    [
        ("{fromEntities: [world]}", "{fromEntities: [all]}"),
        ("{fromEntities: [world]}", "{fromEntities: [world]}"),
        (f"{{fromEntities: [world], {PORT}}}", "{fromEntities: [world]}"),
        (f"{{{PORT}}}", f"{{{RANGE}}}"),
        ("{fromCIDR: [10.1.0.0/16]}", "{fromCIDR: [10.0.0.0/8]}"),
        ("{fromCIDR: [10.1.0.0/16]}", "{fromEntities: [world]}"),
        (
            "{fromCIDRSet: [{cidr: 10.1.0.0/16, except: [10.1.1.0/24]}]}",
            "{fromCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.1.0/25]}]}",
        ),
        (
            "{fromEndpoints: [{matchLabels: {a: b, c: d}}]}",
            "{fromEndpoints: [{matchLabels: {a: b}}]}",
        ),
    ],
)
def test_what_a_deny_covers_never_takes_effect(allow, deny):
    (line,) = found(*both(allow, deny))
    assert "never takes effect: q spec.ingressDeny[0]" in line


@pytest.mark.parametrize(
    ("allow", "deny"),
    [
        ("{fromEntities: [all]}", "{fromEntities: [world]}"),
        ("{fromEntities: [world]}", f"{{fromEntities: [world], {PORT}}}"),
        (f"{{{RANGE}}}", f"{{{PORT}}}"),
        ("{fromCIDR: [10.0.0.0/8]}", "{fromCIDR: [10.1.0.0/16]}"),
        (
            "{fromCIDR: [10.1.0.0/16]}",
            "{fromCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.1.0/24]}]}",
        ),
        (
            "{fromCIDR: [10.1.1.0/25]}",
            "{fromCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.1.0/24]}]}",
        ),
        ("{fromEndpoints: [{}]}", "{fromEndpoints: [{matchLabels: {a: b}}]}"),
    ],
)
def test_what_a_deny_does_not_cover_is_not_called_shadowed(allow, deny):
    assert not any("never takes effect" in line for line in found(*both(allow, deny)))


def test_a_deny_for_other_subjects_shadows_nothing():
    allow = cnp("endpointSelector: {}\ningress: [{fromEntities: [world]}]")
    deny = "endpointSelector: {matchLabels: {a: b}}\ningressDeny: [{fromEntities: [all]}]"
    assert found(allow, named(cnp(deny), "q")) == []


def test_policies_that_select_nothing():
    web = LabelSet.parse(["k8s:app=web", "k8s:io.kubernetes.pod.namespace=shop"])
    spec = "endpointSelector: {matchLabels: {app: NAME}}\ningress: [{fromEntities: [all]}]"
    assert found(cnp(spec.replace("NAME", "web")), endpoints=[web]) == []
    (line,) = found(cnp(spec.replace("NAME", "wbe")), endpoints=[web])
    assert "selects no endpoint: any:app=wbe" in line
    assert found(cnp(spec.replace("NAME", "wbe"))) == []


def test_peers_that_are_nobody():
    web = LabelSet.parse(["k8s:app=web", "k8s:io.kubernetes.pod.namespace=shop"])
    spec = "endpointSelector: {}\ningress: [{fromEndpoints: [{matchLabels: {app: db}}]}]"
    (line,) = found(cnp(spec), endpoints=[web])
    assert "peer is no endpoint" in line


@pytest.mark.parametrize(
    ("one", "other", "nothing"),
    [
        ("{key: a, operator: In, values: [b]}", "{key: a, operator: In, values: [c]}", True),
        ("{key: a, operator: In, values: [b, c]}", "{key: a, operator: In, values: [c]}", False),
        ("{key: a, operator: In, values: [b]}", "{key: a, operator: NotIn, values: [b, c]}", True),
        ("{key: a, operator: NotIn, values: [b]}", "{key: a, operator: In, values: [b, c]}", False),
        ("{key: a, operator: DoesNotExist}", "{key: a, operator: In, values: [b]}", True),
        ("{key: a, operator: Exists}", "{key: a, operator: DoesNotExist}", True),
        ("{key: a, operator: NotIn, values: [b]}", "{key: a, operator: DoesNotExist}", False),
        ("{key: a, operator: Exists}", "{key: c, operator: DoesNotExist}", False),
    ],
)
def test_selectors_that_contradict_themselves(one, other, nothing):
    spec = (
        f"endpointSelector: {{matchExpressions: [{one}, {other}]}}\n"
        "ingress: [{fromEntities: [all]}]"
    )
    lines = [line for line in found(cnp(spec)) if "exclude each other" in line]
    assert len(lines) == nothing


def test_nodes_are_not_judged_by_endpoint_labels():
    spec = (
        "nodeSelector: {matchLabels: {kubernetes.io/os: linux}}\ningress: [{fromEntities: [all]}]"
    )
    assert found(ccnp(spec), endpoints=[]) == []


NAMED = (
    "- {toEntities: [world], toPorts: [{ports: [{port: '443', protocol: TCP}], "
    "serverNames: [a.example]}]}"
)
BY_NAME = (
    "- {toFQDNs: [{matchName: a.example}], toPorts: [{ports: [{port: '443', protocol: ANY}]}]}"
)


@pytest.mark.parametrize("first", [NAMED, BY_NAME], ids=["serverNames", "toFQDNs"])
@pytest.mark.parametrize(
    ("other", "warned"),
    [
        ("{toEntities: [world], toPorts: [{ports: [{port: '443', protocol: UDP}]}]}", True),
        ("{toEntities: [world], toPorts: [{ports: [{port: '443'}]}]}", True),
        ("{toEntities: [all]}", True),
        ("{toEntities: [world], toPorts: [{ports: [{port: '400', endPort: 500}]}]}", True),
        ("{toEntities: [world], toPorts: [{ports: [{port: '444', protocol: UDP}]}]}", False),
        ("{toEntities: [world], toPorts: [{ports: [{port: '443', protocol: TCP}]}]}", False),
        ("{toEndpoints: [{matchLabels: {a: b}}]}", False),
    ],
)
def test_quic_beside_names_is_a_hole(first, other, warned):
    """No rule sees names in UDP."""
    egress = f"{DNS}\n{first}\n- {other}"
    told = [
        text for text in found(cnp(f"endpointSelector: {{}}\negress:\n{egress}")) if "QUIC" in text
    ]
    assert bool(told) is warned, told
