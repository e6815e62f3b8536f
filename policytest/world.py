"""Who is there at each step: endpoints with their labels, namespaces, hosts, the node.

Both judges follow one world, so that a name means the same addresses and labels to them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from conntrack.address import parse_address
from firewall.identities.labels import K8S, LabelSet, parse_label
from firewall.identities.workload import workload_labels
from firewall.policy.model import ObjectKey
from firewall.policy.objects import NamespaceObject
from policytest.case import ICMPV6, NODE, Case, Check, Endpoint, Source, Step


class Probe(NamedTuple):
    """One packet of a check: packed addresses, IANA protocol, port or ICMP type."""

    source: bytes
    destination: bytes
    protocol: int
    port: int


class Question(NamedTuple):
    """An endpoint (by title and address) asks a server about a name; addresses are packed."""

    endpoint: str
    source: bytes
    server: bytes
    name: str


class World:
    """The state of a case; `perform` takes it through its steps."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.namespaces: dict[str, dict[str, str]] = {
            name: dict(labels) for name, labels in case.namespaces.items()
        }
        self.endpoints: dict[str, Endpoint] = {one.title: one for one in case.endpoints}
        self._hosts = {host.title: host.addresses for host in case.hosts}
        self._take(case.sources)

    def perform(self, step: Step) -> None:
        """Make the step's changes."""
        for title in step.remove:
            del self.endpoints[title]
        self.endpoints |= {one.title: one for one in step.add}
        for name, changes in step.namespaces.items():
            self.namespaces[name] = _changed(self.namespaces.get(name, {}), changes)
        for title, changes in step.labels.items():
            self.endpoints[title] = _relabelled(self.endpoints[title], changes)
        self._forget(step.delete)
        self._take(step.apply)

    def _take(self, sources: Iterable[Source]) -> None:
        """Namespaces may also stand among the policies, as Kubernetes' own objects."""
        for source in sources:
            for resource in source.resources:
                if isinstance(resource, NamespaceObject):
                    self.namespaces[resource.name] = {
                        key: value for _, key, value in resource.labels
                    }

    def _forget(self, keys: Iterable[ObjectKey]) -> None:
        for key in keys:
            if key.kind == "Namespace":
                self.namespaces.pop(key.name, None)

    def labels_of(self, endpoint: Endpoint) -> LabelSet:
        """Return all labels of an endpoint, those of its namespace included."""
        return workload_labels(
            endpoint.labels,
            namespace=endpoint.namespace,
            cluster=self.case.settings.cluster_name,
            namespace_labels=self.namespaces.get(endpoint.namespace, {}).items(),
        )

    def addresses(self, title: str) -> tuple[bytes, ...]:
        """Return the addresses of one end of a check."""
        if title == NODE:
            return self.case.node
        if title in self.endpoints:
            return self.endpoints[title].addresses
        return self._hosts.get(title) or (parse_address(title),)

    def questions(self) -> Iterator[Question]:
        """Yield what every endpoint asks the resolver: the addresses of every host's names."""
        if not self.case.resolver:
            return
        names = [name for host in self.case.hosts for name in host.names]
        servers = self.addresses(self.case.resolver)
        for title, endpoint in self.endpoints.items():
            for source in endpoint.addresses:
                for server in servers:
                    if len(source) == len(server) and title != self.case.resolver:
                        for name in names:
                            yield Question(title, source, server, name)

    def named(self) -> Iterator[tuple[str, bytes]]:
        """Yield every name with each address that it leads to."""
        for host in self.case.hosts:
            for name in host.names:
                for address in host.addresses:
                    yield name, address

    def probes(self, check: Check) -> Iterator[Probe]:
        """Yield what a check sends: one packet per pair of addresses of one family."""
        _, protocol, port, types, _ = check.traffic
        for source in self.addresses(check.source):
            for destination in self.addresses(check.destination):
                if len(source) != len(destination):
                    continue
                if types is None:
                    yield Probe(source, destination, protocol, port)
                    continue
                six = len(source) == 16
                if types[six] >= 0:
                    yield Probe(source, destination, ICMPV6 if six else protocol, types[six])


def _changed(labels: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    merged = {**labels, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def _relabelled(endpoint: Endpoint, changes: Mapping[str, str | None]) -> Endpoint:
    labels = endpoint.labels
    for key, value in changes.items():
        label = parse_label(f"{key}={value or ''}", K8S)
        labels = labels.without([label.name]) if value is None else labels.with_labels([label])
    return replace(endpoint, labels=labels)
