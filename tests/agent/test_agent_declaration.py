"""Endpoint declarations: the same words in files and in the API."""

import pytest

from conntrack.address import parse_address
from firewall.agent.declaration import (
    in_namespace,
    parse_declaration,
    parse_labels,
    parse_port,
    read_declarations,
)
from firewall.agent.document import DocumentError
from firewall.policy.snapshot import NamedPortRow


def one(text, name=""):
    return parse_declaration(text, "endpoints.yaml", name)


def messages(text, name=""):
    with pytest.raises(DocumentError) as caught:
        one(text, name)
    return "\n".join(map(str, caught.value.problems))


def test_yaml_and_json_say_the_same():
    """JSON is YAML here."""
    yaml = (
        "name: a\naddresses: [10.0.0.1, fd00::1]\nlabels: [app=web]\naudit: yes\nports: [http:80]"
    )
    json = (
        '{"name": "a", "addresses": ["10.0.0.1", "fd00::1"], "labels": {"app": "web"},'
        ' "audit": true, "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}'
    )
    first, second = one(yaml), one(json)
    assert first.addresses == second.addresses == (
        parse_address("10.0.0.1"), parse_address("fd00::1"),
    )  # fmt: skip
    assert first.labels == second.labels
    assert first.ports == second.ports == (NamedPortRow("http", 6, 80),)
    assert first.audit and second.audit


def test_labels_without_source_are_the_workloads_and_the_namespace_is_one():
    """k8s: is the default source; policies match the namespace's label implicitly."""
    labels = one("name: a\nnamespace: empire\naddresses: [10.0.0.1]\nlabels: [app=web]").labels
    assert labels.strings() == ("k8s:app=web", "k8s:io.kubernetes.pod.namespace=empire")


@pytest.mark.parametrize("said", ["addresses: [10.0.0.1]", "ips: [10.0.0.1]", "ip: 10.0.0.1"])
def test_addresses_go_by_the_words_of_policy_tests_too(said):
    assert one(f"name: a\n{said}").addresses == (parse_address("10.0.0.1"),)


def test_a_label_without_a_value_has_the_empty_one():
    """Kubernetes reads null in a map of strings so; `app: null` is no label `app=null`."""
    labels = one("name: a\nip: 10.0.0.1\nlabels: {app: , tier: ~, role: null}").labels
    assert {label.value for label in labels if label.key in ("app", "tier", "role")} == {""}


def test_endpoints_of_a_larger_document_may_be_none_or_lack_addresses():
    """A policy test chooses addresses itself."""
    assert read_declarations("endpoints:\n", "t.yaml", parts=True) == ()
    (found,) = read_declarations("endpoints: [{name: a}]", "t.yaml", parts=True)
    assert found.addresses == ()
    with pytest.raises(DocumentError, match="endpoints: expected a list, got '5'"):
        read_declarations("endpoints: 5", "t.yaml", parts=True)


def test_endpoints_of_a_larger_document_are_read_if_asked_for():
    text = "workers: 2\nendpoints:\n- {name: a, ip: 10.0.0.1}\n---\n- {name: b, ip: 10.0.0.2}\n"
    found = read_declarations(text, "bartizan.yaml", parts=True)
    assert [(one.name, one.place.line) for one in found] == [("a", 3), ("b", 5)]
    with pytest.raises(DocumentError, match="unknown setting 'workers'"):
        read_declarations(text, "endpoints/all.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\naddresses: [10.0.0.1]\nip: 10.0.0.2", "says the same as addresses"),
        ("name: a", "addresses is missing"),
        ("name: a\naddresses: []", "at least one address"),
        ("name: a\naddresses: [10.0.0.1, 10.0.0.1]", "is given twice"),
        ("addresses: [10.0.0.1]", "name is missing"),
        ("name: ../a\naddresses: [10.0.0.1]", "is no name"),
        ("name: a\naddresses: [10.0.0.1]\nlabels: [reserved:host]", "is reserved"),
        ("name: a\naddresses: [10.0.0.1]\nlabels: [a=1, a=2]", "two values"),
        ("name: a\naddresses: [10.0.0.1]\nnetns: x\ninterface: y", "say the same"),
        ("name: a\naddresses: [10.0.0.1]\nports: [http]", "is no named port"),
        ("name: a\naddresses: [10.0.0.1]\nports: [h:1, h:2]", "given twice"),
        (
            "{name: a, namespace: x, addresses: ['::1'], labels: {io.kubernetes.pod.namespace: y}}",
            "another namespace",
        ),
        ("name: a\nnamespace: 'x;k8s:a=b'\nip: 10.0.0.1", "is no namespace"),
        ("name: a\nip: '::ffff:10.0.0.1'", "write 10.0.0.1: no endpoint can have it"),
        ("name: a\nip: 127.0.0.1", "ip: 127.0.0.1 is a loopback address"),
        ("name: a\nip: 10.0.0.1\nlabels:\n  a: b\n  c: d e", ":5:3: labels.c: label 'c=d e'"),
        ("nme: a\naddresses: [10.0.0.1]", "did you mean name?"),
        ("- a\n- b", "expected a mapping"),
        ("", "expected one endpoint, got 0"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    """Every mistake has its message."""
    assert message in messages(text)


def test_the_name_in_the_address_of_a_request_counts():
    """PUT /v1/endpoint/a with a body that says b is a mistake."""
    assert one("addresses: [10.0.0.1]", "a").name == "a"
    assert "is 'b', but the endpoint is called 'a'" in messages(
        "name: b\naddresses: [1.1.1.1]", "a"
    )


def test_a_file_holds_documents_or_lists():
    """Both are common."""
    text = (
        "name: a\naddresses: [10.0.0.1]\n---\n"
        "- {name: b, addresses: [10.0.0.2]}\n- {name: c, addresses: [10.0.0.3]}"
    )
    assert [item.name for item in read_declarations(text, "f")] == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["http:0", "http:65536", "http:80/icmp", "80:80", "a" * 16 + ":1"])
def test_ports_that_cannot_be_are_refused(text):
    """1-65535; a name of 1-15 characters with a letter (RFC 6335 5.1)."""
    with pytest.raises(ValueError, match=r"port|none of"):
        parse_port(text)


def test_an_endpoint_without_labels_is_in_init_until_one_comes():
    """Its namespace alone says nothing about it."""
    one = parse_declaration("name: a\nnamespace: red\naddresses: [10.0.0.1]", "f.yaml", "a")
    assert one.labels.strings() == ("reserved:init",)
    labels = one.labels.with_labels(parse_labels(["app=web"]))
    assert in_namespace(labels, "red").strings() == (
        "k8s:app=web",
        "k8s:io.kubernetes.pod.namespace=red",
    )


def test_a_document_with_a_mistake_is_told_of_once():
    assert messages("addresses: [10.0.0.1]\nlabels: ['cloud:a=b']", "a").count("\n") == 0
    assert messages("", "a") == "endpoints.yaml: expected one endpoint, got 0 documents"
