"""The second pass of the reader: do the names that steps and checks use exist by then?"""

from collections.abc import Iterable, Mapping

from conntrack.address import parse_address
from firewall.policy.objects import resource_key
from firewall.policy.problem import did_you_mean
from firewall.policy.readers.composition import Mark
from firewall.policy.readers.document import Report
from firewall.policy.readers.peers import ENTITIES
from policytest.case import NODE, Case, Check, Endpoint, Source, Step

Marks = Mapping[tuple[int, str, str], Mark]


class _Rehearsal:
    """Names known at a moment, and what is wrong with their use."""

    def __init__(self, case: Case, report: Report, marks: Marks) -> None:
        self._report = report
        self._marks = marks
        self._hosts = {host.title: host.addresses for host in case.hosts}
        self._endpoints: dict[str, tuple[bytes, ...]] = {}
        self._namespaces = set(case.namespaces)
        self._keys: set[str] = set()
        self._node = case.node
        for endpoint in case.endpoints:
            self._add(endpoint)
        self._apply(case.sources)

    def _error(self, mark: Mark, path: str, message: str) -> None:
        self._report.error(mark, path, message)

    def _add(self, endpoint: Endpoint) -> None:
        if endpoint.title in self._endpoints:
            self._error(Mark(*endpoint.place), "", f"endpoint {endpoint.title} is given twice")
        self._endpoints[endpoint.title] = endpoint.addresses
        self._namespaces.add(endpoint.namespace)

    def _apply(self, sources: Iterable[Source]) -> None:
        for source in sources:
            self._keys.update(str(one.key) for one in source.objects)
            self._keys.update("/".join(filter(None, resource_key(r))) for r in source.resources)
            self._namespaces.update(
                resource_key(r)[2] for r in source.resources if resource_key(r)[0] == "Namespace"
            )

    def step(self, number: int, step: Step) -> None:
        for title in step.remove:
            if self._endpoints.pop(title, None) is None:
                self._misused(number, "remove", title, self._unknown(title))
        for endpoint in step.add:
            self._add(endpoint)
        for name in step.namespaces:
            if name not in self._namespaces:
                hint = did_you_mean(name, self._namespaces)
                self._misused(number, "namespaces", name, f'no namespace "{name}"{hint}')
        for title in step.labels:
            if title not in self._endpoints:
                self._misused(number, "label", title, self._unknown(title))
        for key in map(str, step.delete):
            if key not in self._keys:
                hint = did_you_mean(key, self._keys)
                self._misused(number, "delete", key, f"there is no {key} in this step{hint}")
            self._keys.discard(key)
        self._apply(step.apply)
        said: set[Mark] = set()
        for check in step.checks:
            place = Mark(check.line, check.column)
            if place not in said and self._wrong(check, place):
                said.add(place)

    def _misused(self, step: int, word: str, name: str, message: str) -> None:
        self._error(self._marks[step, word, name], f"steps[].{word}", message)

    def _unknown(self, title: str) -> str:
        word = title.rpartition("/")[2]
        if word in ENTITIES:
            return f'"{word}" is an entity, not an end; write an address, host:NAME or {NODE}'
        known = (*self._endpoints, *self._hosts, NODE)
        return f'no "{title}" in this step{did_you_mean(title, known)}'

    def _wrong(self, check: Check, mark: Mark) -> bool:
        """Report what is wrong with a check's ends; say whether something is."""
        families = []
        for word, title in (("from", check.source), ("to", check.destination)):
            addresses = self._addresses(title)
            if addresses is None:
                self._error(mark, word, self._unknown(title))
                return True
            if not addresses:
                return True  # those given were refused, which was said where they stand
            families.append({len(address) for address in addresses})
        shared = families[0] & families[1]
        types = check.traffic.icmp
        if types is not None and shared:
            shared = {size for size in shared if types[size == 16] >= 0}
        if not shared:
            what = "no IPv4 or IPv6 address in common"
            self._error(mark, "", f"{check.source} and {check.destination} have {what} for this")
            return True
        return False

    def _addresses(self, title: str) -> tuple[bytes, ...] | None:
        if title == NODE:
            return self._node
        found = self._endpoints.get(title, self._hosts.get(title))
        if found is not None:
            return found
        try:
            return (parse_address(title),)
        except ValueError:
            return None


def rehearse(case: Case, report: Report, marks: Marks) -> None:
    """Walk through the steps of a case; what is used before it exists goes to the report.

    Args:
        case: as read.
        report: receives the problems.
        marks: where each step uses which name, by step, field and name.
    """
    rehearsal = _Rehearsal(case, report, marks)
    for number, step in enumerate(case.steps):
        rehearsal.step(number, step)
