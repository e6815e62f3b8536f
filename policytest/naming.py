"""Names and addresses of a test file: what is well formed, whose an address is, which are free."""

import re

from conntrack.address import format_address, parse_address, why_unusable
from firewall.policy.readers.document import Value

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS label (RFC 1123 section 2.1), as Kubernetes asks of names of pods and namespaces."""

_HOSTS_PER_BLOCK = 250


def is_name(text: str) -> bool:
    """Say whether a text may name an endpoint, host or namespace."""
    return _NAME.fullmatch(text) is not None


def chosen_address(number: int) -> bytes:
    """Return the address of the Nth endpoint that gives none: 10.0.1.1 for 1, and so on."""
    block, last = divmod(number - 1, _HOSTS_PER_BLOCK)
    return bytes((10, 0, 1 + block, 1 + last))


class AddressBook:
    """Whose each address is. Given addresses are reserved before any is chosen."""

    def __init__(self) -> None:
        self._given: set[bytes] = set()
        self._owners: dict[bytes, str] = {}
        self._chosen: dict[str, bytes] = {}

    def reserve(self, value: Value) -> None:
        """Note the addresses of an endpoint or host, silently; reading them comes later."""
        for text in (value.child("ip"), *_list(value.child("ips"))):
            written = getattr(text.node, "text", "") if text is not None else ""
            try:
                self._given.add(parse_address(written))
            except ValueError:
                continue

    def addresses(self, fields: dict[str, Value], owner: str) -> tuple[bytes, ...]:
        """Return the addresses of `owner`: those given, or one chosen for it.

        An endpoint may be read twice, because it comes back in a later step.
        """
        given = [fields["ip"]] if "ip" in fields else []
        if "ips" in fields:
            if given:
                fields["ips"].error("ip is given as well: write all addresses here")
            given += fields["ips"].items()
        if not given:
            if "ips" in fields:
                fields["ips"].error("is empty; leave it out to get an address")
            return (self._choose(owner),)
        found: list[bytes] = []
        for item in given:
            address = self._address(item)
            if address is None:
                continue
            other = self._owners.setdefault(address, owner)
            if other != owner or address in found:
                item.error(f"{format_address(address)} belongs to {other} already")
            found.append(address)
        return tuple(found)

    @staticmethod
    def _address(item: Value) -> bytes | None:
        text = item.text()
        if text is None:
            return None
        try:
            address = parse_address(text)
        except ValueError as error:
            item.error(str(error))
            return None
        if reason := why_unusable(address):
            item.error(f"{text} {reason}: nobody can have it")
            return None
        return address

    def _choose(self, owner: str) -> bytes:
        number = len(self._chosen) + 1
        while owner not in self._chosen:
            address = chosen_address(number)
            if address not in self._given and address not in self._owners:
                self._chosen[owner] = address
                self._owners[address] = owner
            number += 1
        return self._chosen[owner]

    def node_address(self) -> bytes:
        """Return an address for a node that gives none: 10.0.0.1, or the next free one."""
        last = 1
        while (address := bytes((10, 0, 0, last))) in self._given:
            last += 1
        self._owners[address] = "node"
        return address


def _list(value: Value | None) -> list[Value]:
    """Return the items of a list without judging anything."""
    if value is None or not hasattr(value.node, "items"):
        return []
    return [Value(item, "", value.report) for item in value.node.items]
