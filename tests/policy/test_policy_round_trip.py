"""`policy get -o yaml` gives back what was written: reading it again makes the same objects."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_reading import CORPUS, EVERY_CAPABILITY

from firewall.cli.output import as_yaml
from firewall.policy.objects import resource_key
from firewall.policy.readers import read


def entries_of(found):
    """The entries, wherever they stand in a file."""
    return [
        replace(entry, origin=replace(entry.origin, path="", file="", line=0, column=0))
        for entry in found.entries
    ]


def assert_same_after_dumping(text):
    """Dump every accepted object as `policy get` does and read the dump."""
    first = read(text, "first.yaml", settings=EVERY_CAPABILITY)
    for found in first.objects:
        again = read(as_yaml(found.document), "again.yaml", settings=EVERY_CAPABILITY)
        assert again.errors == ()
        (same,) = again.objects
        assert same.key == found.key
        assert entries_of(same) == entries_of(found)
        assert same.labels == found.labels
    for resource in first.resources:
        again = read(as_yaml(resource.document), "again.yaml", settings=EVERY_CAPABILITY)
        (same,) = again.resources
        assert resource_key(same) == resource_key(resource)
        assert replace(same, file="") == replace(resource, file="")


def files():
    suffixes = {".yaml", ".yml", ".json", ".txt"}
    return sorted(file for file in CORPUS.rglob("*") if file.suffix in suffixes)


@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs ../shared/corpus")
def test_every_file_of_the_corpus():
    """Thousands of policies in every format, also those inside the cases' own documents."""
    count = 0
    for file in files():
        text = file.read_text()
        if "NetworkPolicy" in text or "endpointSelector" in text or "CIDRGroup" in text:
            assert_same_after_dumping(text)
            count += 1
    assert count > 100


TRUTHS = ["on", "off", "yes", "no", "true", "false", "True", "y", "null", "~"]
NUMBERS = ["-0", "0", "080", "1e3", "0x10", "22:22", "1_000", "2020-01-01", ".5", "1.10", 20 * "9"]
WORDS = st.sampled_from([*TRUTHS, *NUMBERS, "=", "<<", "-"])
BOOLEANS = st.sampled_from(["on", "off", "yes", "no", "true", "false", "Yes", "OFF"])


@given(label=WORDS, quoted=st.booleans(), ingress=BOOLEANS, egress=BOOLEANS)
def test_words_that_yaml_reads_in_two_ways(label, quoted, ingress, egress):
    """`on` is a label's text in one place and a truth value in another."""
    value = f'"{label}"' if quoted else label
    for head, tail in (
        ("apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: r}\nspec:\n", "  "),
        ("", ""),
    ):
        assert_same_after_dumping(
            f"{head}{tail}endpointSelector: {{matchLabels: {{app: {value}}}}}\n"
            f"{tail}enableDefaultDeny: {{ingress: {ingress}, egress: {egress}}}\n"
            f"{tail}ingress: [{{}}]\n{tail}egressDeny: [{{toEntities: [world]}}]\n"
        )


@given(ready=BOOLEANS)
def test_conditions_of_an_endpoint_slice(ready):
    """What is not ready is no backend, before and after."""
    assert_same_after_dumping(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n"
        "metadata: {name: s-1, labels: {kubernetes.io/service-name: s}}\n"
        f"endpoints: [{{addresses: [192.0.2.1], conditions: {{ready: {ready}}}}}]\n"
    )
