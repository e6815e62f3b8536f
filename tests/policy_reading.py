"""Short ways to read policies in tests."""

from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import yaml

from firewall.identities.labels import LabelSet
from firewall.policy.model import PolicyEntry, PolicyObject
from firewall.policy.readers import CAPABILITIES, ReaderSettings, ReadResult, read

SHARED = Path(__file__).resolve().parents[1] / "../shared"
CORPUS = SHARED / "corpus"

EVERY_CAPABILITY = ReaderSettings(enforceable=frozenset(CAPABILITIES))


def pod(namespace: str = "shop", cluster: str = "default", **labels: str) -> LabelSet:
    """Labels of a pod; "" leaves the namespace or the cluster out."""
    texts = [f"k8s:{key}={value}" for key, value in labels.items()]
    if namespace:
        texts.append(f"k8s:io.kubernetes.pod.namespace={namespace}")
    if cluster:
        texts.append(f"k8s:io.cilium.k8s.policy.cluster={cluster}")
    return LabelSet.parse(texts)


HOST = LabelSet.parse(["reserved:host"])
WORLD = LabelSet.parse(["reserved:world"])


def load_yaml(path: Path) -> Any:
    with path.open() as stream:
        return yaml.load(stream, Loader=yaml.CSafeLoader)


def read_text(text: str, settings: ReaderSettings = EVERY_CAPABILITY) -> ReadResult:
    return read(dedent(text), "p.yaml", settings=settings)


def accept(text: str, settings: ReaderSettings = EVERY_CAPABILITY) -> PolicyObject:
    """Read one policy that must be right."""
    result = read_text(text, settings)
    assert [str(p) for p in result.errors] == []
    (found,) = result.objects
    return found


def refuse(text: str, settings: ReaderSettings = EVERY_CAPABILITY) -> list[str]:
    """Read one policy that must be wrong; return its errors without the file's name."""
    result = read_text(text, settings)
    assert result.objects == ()
    assert result.errors
    return [str(p).removeprefix("p.yaml:") for p in result.errors]


def cnp(spec: str, kind: str = "CiliumNetworkPolicy") -> str:
    """Put a spec (without its key) into an object; its first line is line 5."""
    body = indent(dedent(spec).strip("\n"), "  ")
    metadata = "{name: p, namespace: shop}"
    return f"apiVersion: cilium.io/v2\nkind: {kind}\nmetadata: {metadata}\nspec:\n{body}\n"


def ccnp(spec: str) -> str:
    return cnp(spec, "CiliumClusterwideNetworkPolicy").replace(", namespace: shop", "")


def entries(text: str, settings: ReaderSettings = EVERY_CAPABILITY) -> tuple[PolicyEntry, ...]:
    return accept(text, settings).entries


def entry(spec: str, settings: ReaderSettings = EVERY_CAPABILITY) -> PolicyEntry:
    """Read the spec of a CiliumNetworkPolicy with one entry."""
    (found,) = entries(cnp(spec), settings)
    return found


def ingress(item: str) -> PolicyEntry:
    """Read one ingress entry (a YAML flow mapping)."""
    return entry(f"endpointSelector: {{}}\ningress: [{item}]")


def egress(item: str) -> PolicyEntry:
    """Read one egress entry (a YAML flow mapping)."""
    return entry(f"endpointSelector: {{}}\negress: [{item}]")


def refuse_ingress(item: str) -> str:
    """Return the errors of one ingress entry."""
    return "\n".join(refuse(cnp(f"endpointSelector: {{}}\ningress: [{item}]")))


def refuse_egress(item: str) -> str:
    """Return the errors of one egress entry."""
    return "\n".join(refuse(cnp(f"endpointSelector: {{}}\negress: [{item}]")))
