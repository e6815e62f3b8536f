"""Selectors: which label sets a policy means."""

import pytest

from firewall.identities.labels import LabelError, LabelSet
from firewall.identities.selector import (
    EVERYTHING,
    Key,
    Operator,
    Selector,
    from_labels,
    parse_key,
    require,
    reserved,
)

DEATHSTAR = LabelSet.parse(
    ["k8s:class=deathstar", "k8s:org=empire", "k8s:io.kubernetes.pod.namespace=default"]
)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("app", Key("any", "app")),
        ("any:app", Key("any", "app")),
        ("k8s:app", Key("k8s", "app")),
        ("reserved:host", Key("reserved", "host")),
        ("$host", Key("reserved", "host")),
        ("reserved.host", Key("reserved", "host")),
        ("app.kubernetes.io/name", Key("any", "app.kubernetes.io/name")),
    ],
)
def test_a_key_without_source_means_every_source(text, key):
    assert parse_key(text) == key


@pytest.mark.parametrize("text", ["", "k8s:", "$", "nosuch:app"])
def test_a_key_that_names_nothing_is_refused(text):
    with pytest.raises(LabelError):
        parse_key(text)


def test_the_empty_selector_matches_every_label_set():
    assert EVERYTHING.matches(DEATHSTAR)
    assert EVERYTHING.matches(LabelSet())


def test_a_reserved_selector_matches_only_the_reserved_label():
    assert reserved("host").matches(LabelSet.parse(["reserved:host"]))
    assert not reserved("host").matches(LabelSet.parse(["k8s:host"]))


def test_both_notations_of_one_meaning_are_one_selector():
    """Equal selectors share one number in the snapshot."""
    one = from_labels({"org": "empire", "class": "deathstar"})
    two = Selector(
        (
            require("any:class", Operator.IN, ["deathstar"]),
            require("org", Operator.IN, ["empire", "empire"]),
        )
    )
    assert one == two
    assert hash(one) == hash(two)
    assert str(one) == str(two)


def test_the_text_is_what_cilium_prints():
    """The form of `cilium-dbg policy selectors`."""
    selector = Selector(
        (
            require("org", Operator.IN, ["empire"]),
            require("k8s:class", Operator.IN, ["deathstar"]),
            require("tier", Operator.NOT_IN, ["b", "a"]),
            require("x", Operator.EXISTS),
        )
    )
    assert str(selector) == (
        "&LabelSelector{MatchLabels:map[string]string{any.org: empire,k8s.class: deathstar,},"
        "MatchExpressions:[]LabelSelectorRequirement{"
        "LabelSelectorRequirement{Key:any.tier,Operator:NotIn,Values:[a b],},"
        "LabelSelectorRequirement{Key:any.x,Operator:Exists,Values:[],},},}"
    )
    assert selector.describe() == (
        "any:org=empire, any:tier NotIn (a, b), any:x Exists, k8s:class=deathstar"
    )


def test_a_requirement_can_be_added():
    selector = from_labels({"app": "a"})
    narrower = selector.with_requirement(
        require("k8s:io.kubernetes.pod.namespace", Operator.EXISTS)
    )
    assert selector.matches(LabelSet.parse(["k8s:app=a"]))
    assert not narrower.matches(LabelSet.parse(["k8s:app=a"]))
    assert narrower.matches(LabelSet.parse(["k8s:app=a", "k8s:io.kubernetes.pod.namespace=x"]))


def test_a_forced_label_overrides_what_the_author_wrote():
    """A CNP's subject is always in its own namespace, whatever it says."""
    selector = from_labels({"io.kubernetes.pod.namespace": "other", "app": "a"}).with_label(
        "k8s", "io.kubernetes.pod.namespace", "mine"
    )
    assert selector.describe() == "any:app=a, k8s:io.kubernetes.pod.namespace=mine"


def test_a_selector_tells_which_keys_it_speaks_of():
    selector = from_labels({"k8s:io.cilium.k8s.namespace.labels.team": "a", "reserved:host": ""})
    assert selector.has_key("io.cilium.k8s.namespace.labels.team")
    assert selector.has_key_prefix("io.cilium.k8s.namespace.labels.")
    assert selector.has_source("reserved")
    assert not selector.has_key("host")
    assert selector.has_key("host", ("reserved",))
