"""The readers against Cilium's CRDs: every field is read, or refused with a reason."""

import functools
import json

import pytest
from policy_reading import CORPUS, EVERY_CAPABILITY, load_yaml

from firewall.policy.readers import read

CRDS = CORPUS / "cilium/crds/v2"

pytestmark = pytest.mark.skipif(not CRDS.is_dir(), reason="needs ../shared/corpus/cilium/crds")

KINDS = {
    "CiliumNetworkPolicy": "ciliumnetworkpolicies.yaml",
    "CiliumClusterwideNetworkPolicy": "ciliumclusterwidenetworkpolicies.yaml",
}
REFUSED = {
    "fromRequires": "removed in Cilium 1.19",
    "toRequires": "removed in Cilium 1.19",
    "fromGroups": "no cloud provider is asked",
    "toGroups": "no cloud provider is asked",
}
"""Fields of the schema that are refused, and what the error says."""

NAMESPACED = {"nodeSelector": "rule cannot have nodeSelector"}
REFUSED_BY_KIND = {"CiliumNetworkPolicy": REFUSED | NAMESPACED}


@functools.cache
def schema(kind):
    versions = load_yaml(CRDS / KINDS[kind])["spec"]["versions"]
    return versions[0]["schema"]["openAPIV3Schema"]["properties"]


def paths(node, path=()):
    """Yield the path of every field; a step is a name, or 0 for a list's item."""
    for name, child in (node.get("properties") or {}).items():
        yield (*path, name)
        yield from paths(child, (*path, name))
    if "items" in node:
        yield from paths(node["items"], (*path, 0))


def document(path):
    """Build the smallest document that has a field: a value of the wrong kind at its end."""
    value = [["wrong"]]
    for step in reversed(path):
        value = [value] if step == 0 else {step: value}
    return value


def problem_with(kind, path):
    """Return what is wrong with how a field is read, None if it is read or refused as it should."""
    text = json.dumps(
        {
            "apiVersion": "cilium.io/v2",
            "kind": kind,
            "metadata": {"name": "p"},
            "spec": document(path),
        }
    )
    errors = [str(p) for p in read(text, "f", settings=EVERY_CAPABILITY).errors]
    reasons = REFUSED_BY_KIND.get(kind, REFUSED)
    refused = [step for step in path if step in reasons]
    if refused:
        return None if any(reasons[refused[0]] in e for e in errors) else "not refused"
    unknown = [e for e in errors if "unknown field" in e]
    if unknown:
        return unknown[0]
    # Proof that the reader came that far: the wrong value is told with its path.
    shown = "spec" + "".join(f"[{s}]" if s == 0 else f".{s}" for s in path)
    return None if any(shown in e for e in errors) else "not read"


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_the_schema_is_read_or_refused(kind):
    found = {
        ".".join(map(str, path)): problem_with(kind, path) for path in paths(schema(kind)["spec"])
    }
    assert len(found) > 250
    assert {path: why for path, why in found.items() if why} == {}


@pytest.mark.parametrize("kind", KINDS)
def test_specs_is_a_list_of_spec(kind):
    """One reader serves both, so the schemas must be one as well."""
    properties = schema(kind)
    assert set(paths(properties["specs"]["items"])) == set(paths(properties["spec"]))


def test_a_field_that_the_schema_does_not_have_is_unknown():
    text = json.dumps(
        {
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": {"name": "p"},
            "spec": document(("ingress", 0, "fromNowhere")),
        }
    )
    assert any("unknown field" in str(p) for p in read(text, "f").errors)
