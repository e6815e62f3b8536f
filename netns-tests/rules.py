"""Policies for tests, in Cilium's own format, built from what a test wants to say."""

from collections.abc import Sequence
from typing import Any

import yaml


def labels(text: str) -> dict[str, str]:
    """`app=a,tier=db` as matchLabels."""
    return dict(pair.split("=", 1) for pair in text.split(",") if pair)


def peers(*selectors: str) -> dict[str, Any]:
    """A rule's `fromEndpoints`; a selector is `app=a,tier=db`."""
    return {"fromEndpoints": [{"matchLabels": labels(text)} for text in selectors]}


def ports(*texts: str, **rules: Any) -> dict[str, Any]:
    """A rule's `toPorts`: `80/TCP`; `rules` such as http=[{"method": "GET"}]."""
    entries = [dict(zip(("port", "protocol"), text.split("/"), strict=True)) for text in texts]
    return {"toPorts": [{"ports": entries, **({"rules": rules} if rules else {})}]}


def echo_requests() -> dict[str, Any]:
    """A rule's `icmps`: echo requests of both families."""
    fields = [{"family": "IPv4", "type": 8}, {"family": "IPv6", "type": 128}]
    return {"icmps": [{"fields": fields}]}


def policy(
    subject: str,
    *,
    ingress: Sequence[dict[str, Any]] | None = None,
    egress: Sequence[dict[str, Any]] | None = None,
    deny: Sequence[dict[str, Any]] = (),
    name: str = "rule",
) -> str:
    """A CiliumNetworkPolicy for the endpoints with labels `subject`; `deny` is ingressDeny.

    `ingress=[{}]` isolates and allows nothing; None says nothing about the direction.
    """
    spec: dict[str, Any] = {"endpointSelector": {"matchLabels": labels(subject)}}
    if ingress is not None:
        spec["ingress"] = list(ingress)
    if egress is not None:
        spec["egress"] = list(egress)
    if deny:
        spec["ingressDeny"] = list(deny)
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": name, "namespace": "default"},
        "spec": spec,
    }
    return yaml.safe_dump(document, sort_keys=False)
