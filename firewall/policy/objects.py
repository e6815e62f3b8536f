"""Objects beside policies that give their peers addresses: CIDR groups, services, namespaces.

They are plain values read from the same files as policies. A policy names them (`cidrGroupRef`,
`toServices`, a namespaceSelector); whoever resolves policies looks them up. `document` is the
mapping as read, for `policy get`.
"""

from dataclasses import dataclass, field

from conntrack.address import Prefix
from firewall.identities.labels import LabelSet


@dataclass(frozen=True, slots=True, kw_only=True)
class CidrGroupObject:
    """A CiliumCIDRGroup: prefixes under a name and labels."""

    name: str
    labels: LabelSet
    prefixes: tuple[Prefix, ...]
    file: str = ""
    document: dict[str, object] = field(default_factory=dict, hash=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceObject:
    """A Service. `selector`: the pods behind it; None = its backends come from endpoint slices."""

    namespace: str
    name: str
    labels: LabelSet
    selector: tuple[tuple[str, str], ...] | None
    file: str = ""
    document: dict[str, object] = field(default_factory=dict, hash=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendsObject:
    """An EndpointSlice or Endpoints: addresses behind a service, packed.

    One service may have many; `name` tells them apart. `service` "" = belongs to none.
    """

    kind: str
    namespace: str
    name: str
    service: str
    addresses: tuple[bytes, ...]
    file: str = ""
    document: dict[str, object] = field(default_factory=dict, hash=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceObject:
    """A Namespace and its labels, which endpoints inherit with the prefix of Cilium."""

    name: str
    labels: LabelSet
    file: str = ""
    document: dict[str, object] = field(default_factory=dict, hash=False, compare=False)


Resource = CidrGroupObject | ServiceObject | BackendsObject | NamespaceObject
"""What a file may hold besides policies."""


def resource_key(resource: Resource) -> tuple[str, str, str]:
    """Return (kind, namespace, name), which makes a resource the same resource."""
    match resource:
        case CidrGroupObject(name=name):
            return ("CiliumCIDRGroup", "", name)
        case ServiceObject(namespace=namespace, name=name):
            return ("Service", namespace, name)
        case BackendsObject(kind=kind, namespace=namespace, name=name):
            return (kind, namespace, name)
        case NamespaceObject(name=name):
            return ("Namespace", "", name)
