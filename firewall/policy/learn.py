"""From requests that were seen to a policy with http rules that allows them. Pure.

A rule is as narrow as what was seen: methods and paths are quoted, and only segments that are
plainly identifiers become classes of characters: a number, a UUID, a hexadecimal string. Nothing
becomes `.*`. The values of a query are treated in the same way, its names and their order stay.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from firewall.identities.labels import POD_NAMESPACE

_OPERATORS = re.compile(r"[\\.+*?()|\[\]{}^$]")

_CLASSES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"[0-9]+"), "[0-9]+"),
    (
        re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"),
        "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    ),
)
_HEX = re.compile(r"(?=[a-f]*[0-9])(?=[0-9]*[a-f])[0-9a-f]{8,}")
"""A digest or an object's id; 8 digits as git's short names, and both kinds, to spare words."""

_IGNORED = ("io.kubernetes.", "io.cilium.", "app.kubernetes.io/managed-by", "pod-template-hash")
"""Labels that an author would not write: where an object is, and which copy of it."""


class Party(NamedTuple):
    """One end: `source:key=value` labels, and its namespace, "" if it is no endpoint."""

    labels: tuple[str, ...]
    namespace: str


class Seen(NamedTuple):
    """One request that was allowed; `path` with its query."""

    source: Party
    destination: Party
    port: int
    method: str
    path: str


def policies(seen: Iterable[Seen], *, exact: bool = False) -> list[dict[str, Any]]:
    """Return CiliumNetworkPolicies, one for each destination, that allow these requests.

    Args:
        seen: the requests; those to something that is no endpoint are left out.
        exact: identifiers stay as they are.
    """
    by_destination: dict[Party, dict[Party, dict[int, set[tuple[str, str]]]]] = {}
    for one in seen:
        if not one.destination.namespace:
            continue
        ports = by_destination.setdefault(one.destination, {}).setdefault(one.source, {})
        path = _quoted(one.path) if exact else pattern(one.path)
        ports.setdefault(one.port, set()).add((one.method, path))
    return [
        _policy(destination, sources, number)
        for number, (destination, sources) in enumerate(sorted(by_destination.items()), 1)
    ]


def _policy(
    destination: Party, sources: dict[Party, dict[int, set[tuple[str, str]]]], number: int
) -> dict[str, Any]:
    ingress = [
        {
            **_peers(source, destination.namespace),
            "toPorts": [
                {
                    "ports": [{"port": str(port), "protocol": "TCP"}],
                    "rules": {"http": rules(requests)},
                }
                for port, requests in sorted(ports.items())
            ],
        }
        for source, ports in sorted(sources.items())
    ]
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": f"l7-seen-{number}", "namespace": destination.namespace},
        "spec": {"endpointSelector": {"matchLabels": _matching(destination)}, "ingress": ingress},
    }


def rules(requests: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Return http rules for (method, path pattern); methods of one path share a rule."""
    methods: dict[str, set[str]] = {}
    for method, path in requests:
        methods.setdefault(path, set()).add(method)
    return [
        {"method": "|".join(map(_quoted, sorted(named))), "path": path}
        for path, named in sorted(methods.items())
    ]


def _peers(source: Party, namespace: str) -> dict[str, Any]:
    entities = [
        label.removeprefix("reserved:") for label in source.labels if label.startswith("reserved:")
    ]
    if entities:
        return {"fromEntities": entities}
    labels = _matching(source)
    if source.namespace != namespace:
        labels[f"k8s:{POD_NAMESPACE}"] = source.namespace
    return {"fromEndpoints": [{"matchLabels": labels}]}


def _matching(party: Party) -> dict[str, str]:
    """Return the labels that a selector would name."""
    found: dict[str, str] = {}
    for label in sorted(party.labels):
        source, _, rest = label.partition(":")
        key, _, value = rest.partition("=")
        if not key.startswith(_IGNORED):
            found[key if source == "k8s" else f"{source}:{key}"] = value
    return found


def pattern(target: str) -> str:
    """Return an RE2 for a path with its query: quoted, with classes for identifiers."""
    path, question, query = target.partition("?")
    written = "/".join(map(_segment, path.split("/")))
    if not question:
        return written
    pairs = []
    for pair in query.split("&"):
        name, equals, value = pair.partition("=")
        pairs.append(_quoted(name) + equals + _segment(value))
    return f"{written}\\?{'&'.join(pairs)}"


def _segment(text: str) -> str:
    for kind, written in _CLASSES:
        if kind.fullmatch(text):
            return written
    if _HEX.fullmatch(text):
        return f"[0-9a-f]{{{len(text)}}}"
    return _quoted(text)


def _quoted(text: str) -> str:
    """Return an RE2 that matches this text only."""
    return _OPERATORS.sub(lambda found: f"\\{found[0]}", text)
