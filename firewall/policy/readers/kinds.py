"""Kinds of objects: which reader takes which, and what is said about the others.

A kind that is a policy, or changes what a policy means, and is not read here is an error: its
author would believe in it. Workloads and the like, which share files with policies, are skipped
with a warning.
"""

from collections.abc import Callable
from typing import NamedTuple

from firewall.policy.model import PolicyObject
from firewall.policy.objects import Resource
from firewall.policy.problem import did_you_mean
from firewall.policy.readers import cilium, kubernetes, network_policy_api, resources
from firewall.policy.readers.document import Value, shorten
from firewall.policy.readers.settings import ReaderSettings

ObjectReader = Callable[[Value, ReaderSettings], PolicyObject | Resource | None]


class Kind(NamedTuple):
    """One kind with the apiVersions that are read; the first is the current one."""

    versions: tuple[str, ...]
    read: ObjectReader


def _cilium(kind: str) -> Kind:
    def read(root: Value, settings: ReaderSettings) -> PolicyObject | None:
        return cilium.read_policy(root, settings, kind=kind)

    return Kind(("cilium.io/v2",), read)


def _tiered(dialect: network_policy_api.Dialect, version: str) -> Kind:
    def read(root: Value, settings: ReaderSettings) -> PolicyObject | None:
        return network_policy_api.read_policy(root, settings, dialect)

    return Kind((f"policy.networking.k8s.io/{version}",), read)


KINDS: dict[str, Kind] = {
    cilium.NAMESPACED_KIND: _cilium(cilium.NAMESPACED_KIND),
    cilium.CLUSTERWIDE_KIND: _cilium(cilium.CLUSTERWIDE_KIND),
    "CiliumCIDRGroup": Kind(("cilium.io/v2", "cilium.io/v2alpha1"), resources.read_cidr_group),
    kubernetes.KIND: Kind(("networking.k8s.io/v1",), kubernetes.read_policy),
    "ClusterNetworkPolicy": _tiered(network_policy_api.CLUSTER_NETWORK_POLICY, "v1alpha2"),
    "AdminNetworkPolicy": _tiered(network_policy_api.ADMIN_NETWORK_POLICY, "v1alpha1"),
    "BaselineAdminNetworkPolicy": _tiered(
        network_policy_api.BASELINE_ADMIN_NETWORK_POLICY, "v1alpha1"
    ),
    "Service": Kind(("v1",), resources.read_service),
    "EndpointSlice": Kind(("discovery.k8s.io/v1",), resources.read_endpoint_slice),
    "Endpoints": Kind(("v1",), resources.read_endpoints),
    "Namespace": Kind(("v1",), resources.read_namespace),
}
"""Every kind that is read."""

STRICT_GROUPS = ("cilium.io", "networking.k8s.io", "policy.networking.k8s.io")
"""API groups whose kinds decide about traffic: an unknown kind of theirs is an error."""

HARMLESS_KINDS = frozenset(
    {
        "Ingress",
        "IngressClass",
        "CiliumIdentity",
        "CiliumEndpoint",
        "CiliumEndpointSlice",
        "CiliumNode",
        "CustomResourceDefinition",
    }
)
"""Kinds of those groups that say nothing about what is allowed."""


def read_object(root: Value, settings: ReaderSettings) -> PolicyObject | Resource | None:
    """Read one object of any kind; None when it is refused or skipped."""
    kind, version = _type_of(root)
    if not kind:
        return None
    found = KINDS.get(kind)
    group = version.rpartition("/")[0]
    if found is None:
        place = root.child("kind") or root
        if group in STRICT_GROUPS and kind not in HARMLESS_KINDS:
            place.error(f'kind "{shorten(kind)}" is not supported{did_you_mean(kind, KINDS)}')
        elif not version and did_you_mean(kind, KINDS):
            place.error(f'unknown kind "{shorten(kind)}"{did_you_mean(kind, KINDS)}')
        else:
            place.warning(f'kind "{shorten(kind)}" is no policy and is skipped')
        return None
    if version not in found.versions:
        place = root.child("apiVersion") or root
        wanted = " or ".join(found.versions)
        said = f', not "{shorten(version)}"' if version else ""
        place.error(f"apiVersion of a {kind} must be {wanted}{said}")
        return None
    return found.read(root, settings)


def _type_of(root: Value) -> tuple[str, str]:
    if not root.is_mapping:
        root.error("must be an object with apiVersion and kind, or a list of rules")
        return "", ""
    kind, version = root.child("kind"), root.child("apiVersion")
    if kind is None:
        root.error("needs apiVersion and kind")
        return "", ""
    return kind.text() or "", (version.text() or "") if version is not None else ""
