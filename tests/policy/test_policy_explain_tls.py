"""`policy trace` about TLS: which form is asked about, what each rule says, what would allow it."""

import pytest

from firewall.identities.labels import LabelFilter, LabelSet
from firewall.policy.course import CLEAR, Form
from firewall.policy.explanation import render
from firewall.policy.patch import unified
from firewall.policy.plan import Source, make_plan
from firewall.policy.question import Question, QuestionError, form_of
from firewall.policy.readers import ReaderSettings, read
from firewall.policy.realm import Actor, actor_labels, ask, make_realm
from firewall.policy.remedy import suggest

POLICY = """apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: tls, namespace: x}
spec:
  endpointSelector: {matchLabels: {app: a}}
  egress:
  - toEndpoints: [{matchLabels: {app: b}}]
    toPorts:
    - ports: [{port: "443", protocol: TCP}]
      serverNames: ["*.a.example"]
    - ports: [{port: "8443", protocol: TCP}]
      terminatingTLS: {secret: {namespace: keys, name: web}}
      rules: {http: [{method: GET, path: "/v1/.*"}]}
"""


@pytest.fixture
def realm():
    def actor(name, number):
        return Actor(
            name=name,
            namespace="x",
            labels=actor_labels(LabelSet.parse([f"k8s:app={name}"]), "x", "default", None,
                                LabelFilter()),
            addresses=(bytes((10, 0, 0, number)),),
        )  # fmt: skip

    result = read(POLICY, "p.yaml")
    assert not result.problems
    return make_realm([actor("a", 1), actor("b", 2)], result.objects)


def traced(realm, port, **question):
    return ask(realm, Question(source="x/a", destination="x/b", port=port, **question)).answer()


@pytest.mark.parametrize(
    ("port", "question", "verdict", "because"),
    [
        ("443", {}, "redirected", "through the proxy, which decides by how it begins"),
        ("443", {"sni": "www.a.example"}, "redirected", "lets every byte pass"),
        ("443", {"sni": "b.example"}, "denied", "no rule allows TLS to b.example"),
        ("443", {"sni": ""}, "denied", "no rule allows TLS that names no server"),
        ("443", {"http": "GET http://www.a.example/"}, "denied", "no rule allows clear text"),
        ("8443", {}, "redirected", "decides by how it begins, and each request"),
        ("8443", {"sni": "b.example"}, "redirected", "which decides each request"),
        ("8443", {"http": "GET https://b.example:8443/v1/x"}, "redirected", "a rule allows the"),
        ("8443", {"http": "GET https://10.0.0.2/v1/x"}, "redirected", "a rule allows the request"),
        ("8443", {"http": "GET https://b.example/v2/x"}, "denied", "no http rule allows it"),
        ("8443", {"http": "GET http://b.example/v1/x"}, "denied", "no rule allows clear text"),
        ("8443", {"http": "GET https://b.example/v1/x", "sni": "c.example"}, "denied", "421"),
    ],
)
def test_what_is_said_about_each_form(realm, port, question, verdict, because):
    side = traced(realm, f"{port}/TCP", **question).egress
    assert side.verdict == verdict
    assert because in side.because


def test_a_refused_name_is_held_against_the_rule_and_the_change_is_named(realm):
    lines = render(traced(realm, "443/TCP", sni="b.example")).splitlines()
    assert lines[0] == "DENIED x/a -> x/b 443/TCP (TLS to b.example)"
    assert "                  serverName wanted *.a.example, found b.example" in lines
    assert "    to allow      add - b.example under serverNames" in lines


def test_a_suggestion_adds_the_name_alone(realm):
    asked = ask(realm, Question(source="x/a", destination="x/b", port="443/TCP", sni="b.example"))
    (file,) = make_plan(suggest(asked), lambda _: Source("p.yaml", POLICY), ReaderSettings()).files
    changed = unified(file.before, file.after, file.file)
    assert '+      serverNames: ["*.a.example", b.example]' in changed


@pytest.mark.parametrize(
    ("question", "form"),
    [
        ({}, None),
        ({"http": "GET http://a.example/"}, None),
        ({"http": "GET https://A.example:8443/"}, Form(tls=True, server_name="a.example")),
        ({"http": "GET https://[fd00::1]/"}, Form(tls=True)),
        ({"sni": ""}, Form(tls=True)),
        ({"sni": "A.example"}, Form(tls=True, server_name="a.example")),
    ],
)
def test_how_a_question_begins(question, form):
    assert form_of(Question(**question)) == form
    assert str(CLEAR) == "clear text"


@pytest.mark.parametrize("name", ["a.example.", "*.example", "a b", "a..b", ".a"])
def test_a_name_that_no_hello_could_hold_is_no_question(name):
    with pytest.raises(QuestionError, match="no server name"):
        form_of(Question(sni=name))
