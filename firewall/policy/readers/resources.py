"""Objects that policies refer to: CIDR groups, services, endpoint slices, namespaces.

Only a CIDR group is ours to judge field by field. Of Kubernetes' own objects just what policies
need is read; the rest belongs to others.
"""

from conntrack.address import parse_address
from firewall.identities.labels import K8S, Label, LabelSet
from firewall.policy.objects import (
    BackendsObject,
    CidrGroupObject,
    NamespaceObject,
    ServiceObject,
)
from firewall.policy.readers.document import Value, document_of, shorten
from firewall.policy.readers.metadata import Metadata, read_metadata
from firewall.policy.readers.peers import read_prefix
from firewall.policy.readers.selectors import is_label_key, read_label_value
from firewall.policy.readers.settings import ReaderSettings

_SERVICE_OF_SLICE = "kubernetes.io/service-name"
_CIDR_GROUP_SOURCE = "cidrgroup"


def read_cidr_group(root: Value, settings: ReaderSettings) -> CidrGroupObject | None:
    """Read a CiliumCIDRGroup."""
    root.fields(("apiVersion", "kind", "metadata", "spec", "status"))
    settings.require("cidr-groups", root)
    metadata = read_metadata(root, default_namespace="", namespaced=False)
    spec = root.child("spec")
    fields = spec.fields(("externalCIDRs",)) if spec is not None else {}
    if "externalCIDRs" not in fields:
        (spec or root).error("needs externalCIDRs")
        return None
    prefixes = [read_prefix(item) for item in fields["externalCIDRs"].items()]
    if metadata is None:
        return None
    return CidrGroupObject(
        name=metadata.name,
        labels=_labels(metadata, _CIDR_GROUP_SOURCE),
        prefixes=tuple(dict.fromkeys(p for p in prefixes if p is not None)),
        file=root.report.file,
        document=document_of(root),
    )


def _labels(metadata: Metadata, source: str) -> LabelSet:
    return LabelSet(Label(source, key, value) for key, value in metadata.labels)


def _skipped(root: Value, settings: ReaderSettings, capability: str) -> bool:
    """Say whether nothing here makes use of the object; a file of a workload may well hold it."""
    if capability in settings.enforceable:
        return False
    root.warning("is no policy and is skipped")
    return True


def read_service(root: Value, settings: ReaderSettings) -> ServiceObject | None:
    """Read a Service: its labels and which pods are behind it."""
    if _skipped(root, settings, "services"):
        return None
    metadata = read_metadata(root, default_namespace=settings.default_namespace, namespaced=True)
    spec = root.child("spec")
    selector = spec.child("selector") if spec is not None else None
    pairs = None
    if selector is not None:
        texts = {key: read_label_value(value) for key, value in selector.pairs().items()}
        for key in selector.pairs():
            if not is_label_key(key):
                selector.error(f'"{shorten(key)}" is no Kubernetes label key')
        pairs = tuple(sorted((key, text or "") for key, text in texts.items())) or None
    if metadata is None:
        return None
    return ServiceObject(
        namespace=metadata.namespace,
        name=metadata.name,
        labels=_labels(metadata, K8S),
        selector=pairs,
        file=root.report.file,
        document=document_of(root),
    )


def read_endpoint_slice(root: Value, settings: ReaderSettings) -> BackendsObject | None:
    """Read an EndpointSlice: the addresses behind the service that its label names."""
    found: list[bytes] = []
    if _skipped(root, settings, "services"):
        return None
    kind = root.child("addressType")
    listed = root.child("endpoints") if kind is None or kind.text() != "FQDN" else None
    for endpoint in listed.items() if listed is not None else ():
        conditions = endpoint.child("conditions")
        ready = conditions.child("ready") if conditions is not None else None
        addresses = endpoint.child("addresses")
        if addresses is not None and (ready is None or ready.boolean() is not False):
            found += _addresses(addresses.items())
    metadata = read_metadata(root, default_namespace=settings.default_namespace, namespaced=True)
    if metadata is None:
        return None
    service = dict(metadata.labels).get(_SERVICE_OF_SLICE, "")
    return _backends("EndpointSlice", root, metadata, service, found)


def read_endpoints(root: Value, settings: ReaderSettings) -> BackendsObject | None:
    """Read an Endpoints object: the addresses behind the service of the same name."""
    found: list[bytes] = []
    if _skipped(root, settings, "services"):
        return None
    subsets = root.child("subsets")
    for subset in subsets.items() if subsets is not None else ():
        addresses = subset.child("addresses")
        items = addresses.items() if addresses is not None else []
        found += _addresses([ip for item in items if (ip := item.child("ip")) is not None])
    metadata = read_metadata(root, default_namespace=settings.default_namespace, namespaced=True)
    if metadata is None:
        return None
    return _backends("Endpoints", root, metadata, metadata.name, found)


def _addresses(values: list[Value]) -> list[bytes]:
    found = []
    for value in values:
        text = value.text()
        if text is None:
            continue
        try:
            found.append(parse_address(text))
        except ValueError:
            value.error(f'"{shorten(text)}" is no IP address')
    return found


def _backends(
    kind: str, root: Value, metadata: Metadata, service: str, addresses: list[bytes]
) -> BackendsObject:
    return BackendsObject(
        kind=kind,
        namespace=metadata.namespace,
        name=metadata.name,
        service=service,
        addresses=tuple(dict.fromkeys(addresses)),
        file=root.report.file,
        document=document_of(root),
    )


def read_namespace(root: Value, settings: ReaderSettings) -> NamespaceObject | None:
    """Read a Namespace: its labels."""
    if _skipped(root, settings, "namespaces"):
        return None
    metadata = read_metadata(root, default_namespace="", namespaced=False)
    if metadata is None:
        return None
    return NamespaceObject(
        name=metadata.name,
        labels=_labels(metadata, K8S),
        file=root.report.file,
        document=document_of(root),
    )
