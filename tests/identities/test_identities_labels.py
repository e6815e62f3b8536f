"""Labels and the filter that picks the ones that make an identity."""

import pytest

from firewall.identities.labels import (
    DEFAULT_FILTER,
    Label,
    LabelError,
    LabelFilter,
    LabelSet,
    parse_label,
)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("k8s:app=web", Label("k8s", "app", "web")),
        ("app=web", Label("unspec", "app", "web")),
        ("reserved:host", Label("reserved", "host", "")),
        ("$host", Label("reserved", "host", "")),
        ("reserved:=host", Label("reserved", "host", "")),
        ("k8s:url=http://x", Label("k8s", "url", "http://x")),
        ("url=http://x", Label("unspec", "url", "http://x")),
        ("k8s:a=b=c", Label("k8s", "a", "b=c")),
        (":app=web", Label("unspec", "app", "web")),
        ("cidr:10.0.0.0/8", Label("cidr", "10.0.0.0/8", "")),
    ],
)
def test_a_label_is_source_key_value(text, label):
    """Cilium pkg/labels ParseLabel; a colon after the equals sign belongs to the value."""
    assert parse_label(text) == label


def test_a_label_without_source_takes_the_callers_default():
    assert parse_label("app=web", "k8s") == Label("k8s", "app", "web")


@pytest.mark.parametrize("text", ["", "=x", "k8s:", "k8s:=x", "a b=c", "a=b;c", "a=\x1b[31m"])
def test_what_has_no_key_or_would_break_the_canonical_text_is_refused(text):
    with pytest.raises(LabelError):
        parse_label(text)


def test_an_unknown_source_is_refused_and_the_known_ones_are_named():
    with pytest.raises(LabelError, match=r"unknown label source 'kubernetes'.*k8s.*reserved"):
        parse_label("kubernetes:app=web")


def test_equal_sets_have_equal_text_whatever_their_order():
    """The text is what nodes compare, so order and doubles must not show."""
    one = LabelSet.parse(["k8s:b=2", "k8s:a=1", "k8s:b=2"])
    two = LabelSet.parse(["k8s:a=1", "k8s:b=2"])
    assert one == two
    assert hash(one) == hash(two)
    assert one.text == "k8s:a=1;k8s:b=2;"


def test_a_set_is_sorted_by_key_before_source():
    """Cilium's SortedList sorts by key."""
    labels = LabelSet.parse(["k8s:b=1", "reserved:a", "cidr:c"])
    assert labels.text == "reserved:a=;k8s:b=1;cidr:c=;"
    assert labels.strings() == ("cidr:c", "k8s:b=1", "reserved:a")


def test_the_canonical_text_reads_back():
    labels = LabelSet.parse(["k8s:app=web", "reserved:init", "k8s:eq=a=b"])
    assert LabelSet.from_text(labels.text) == labels


def test_a_canonical_text_that_was_cut_is_refused():
    with pytest.raises(LabelError, match="cut short"):
        LabelSet.from_text("k8s:app=web;k8s:x=")


def test_two_values_for_one_label_are_refused():
    with pytest.raises(LabelError, match="k8s:app has two values: 'a' and 'b'"):
        LabelSet.parse(["k8s:app=a", "k8s:app=b"])


def test_changes_make_a_new_set():
    labels = LabelSet.parse(["k8s:app=a", "k8s:x=1"])
    assert labels.with_labels([Label("k8s", "app", "b")]).text == "k8s:app=b;k8s:x=1;"
    assert labels.without(["k8s:app"]).text == "k8s:x=1;"
    assert labels.text == "k8s:app=a;k8s:x=1;"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("k8s:app=web", True),
        ("reserved:init", True),
        ("k8s:io.kubernetes.pod.namespace=default", True),
        ("k8s:io.cilium.k8s.namespace.labels.team=a", True),
        ("k8s:app.kubernetes.io/name=x", True),
        ("k8s:io.cilium.k8s.policy.cluster=c", True),
        ("k8s:io.kubernetes.container.name=x", False),
        ("k8s:kubernetes.io/arch=amd64", False),
        ("k8s:beta.kubernetes.io/os=linux", False),
        ("k8s:pod-template-hash=123", False),
        ("k8s:controller-revision-hash=123", False),
        ("k8s:controller-uid=123", False),
        ("k8s:batch.kubernetes.io/controller-uid=1", False),
        ("k8s:statefulset.kubernetes.io/pod-name=db-0", False),
        ("k8s:apps.kubernetes.io/pod-index=0", False),
        ("k8s:topology.kubernetes.io/zone=z", False),
        ("k8s:annotation.x=1", False),
        ("k8s:etcd_node=1", False),
        ("k8s:example.com/kubernetes.io=1", True),  # a pattern matches at the start of the key
    ],
)
def test_the_default_filter_is_ciliums(text, kept):
    """Documentation/operations/performance/scalability/identity-relevant-labels.rst."""
    assert LabelFilter().keeps(parse_label(text)) is kept


def test_one_include_of_the_operator_makes_it_a_whitelist():
    """filter.go: only a user's include sets whitelist; the defaults' own includes stay."""
    chosen = LabelFilter(("k8s:app",))
    assert chosen.keeps(parse_label("k8s:app=web"))
    assert not chosen.keeps(parse_label("k8s:tier=db"))
    assert not chosen.keeps(parse_label("container:app=web"))
    assert chosen.keeps(parse_label("k8s:io.kubernetes.pod.namespace=a"))


def test_an_exclude_of_the_operator_leaves_the_rest():
    chosen = LabelFilter(("!k8s:tier",))
    assert chosen.keeps(parse_label("k8s:app=web"))
    assert not chosen.keeps(parse_label("k8s:tier=db"))
    assert chosen.keeps(parse_label("container:tier=db"))


def test_the_longer_match_wins_between_include_and_exclude():
    """Kept if longest_include > shortest_exclude: an equal length excludes."""
    assert not LabelFilter(("!tier", "tier")).keeps(parse_label("k8s:tier=db"))
    assert LabelFilter(("!tier", "tier-x")).keeps(parse_label("k8s:tier-x=db"))
    assert not LabelFilter(("!tier-x", "tier")).keeps(parse_label("k8s:tier-x=db"))


def test_the_filter_divides_labels_and_loses_none():
    labels = LabelSet.parse(["k8s:app=web", "k8s:pod-template-hash=1"])
    relevant, informational = LabelFilter().split(labels)
    assert relevant.text == "k8s:app=web;"
    assert informational.text == "k8s:pod-template-hash=1;"


@pytest.mark.parametrize("option", ["k8s:(", "nosuch:app", "!", "k8s:"])
def test_a_filter_option_that_says_nothing_is_refused(option):
    with pytest.raises(LabelError):
        LabelFilter((option,))


def test_the_default_list_is_complete():
    """filter.go has 6 includes and 15 excludes."""
    assert sum(rule.startswith("!") for rule in DEFAULT_FILTER) == 15
    assert len(DEFAULT_FILTER) == 21


@pytest.mark.parametrize(
    ("key", "value"), [("a", "b;k8s:c=d"), ("a;k8s:b", ""), ("a b", ""), ("a", "\n")]
)
def test_no_label_tears_the_text_of_its_set(key, value):
    """Made without parsing, it would be read back as others."""
    with pytest.raises(LabelError, match="would tear"):
        LabelSet([Label("k8s", key, value)])
