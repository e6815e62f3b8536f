"""Filters for one side of a flow: who sends, or who receives.

Each makes a test of one value; the value is checked then, and ValueError, LabelError or
SelectorError says what is wrong with it.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from conntrack.address import address_in, parse_address, parse_prefix
from firewall.flows.flow import Flow, FlowEndpoint
from firewall.flows.traits import Predicate
from firewall.identities.labels import LabelError, LabelSet
from firewall.identities.reserved import NUMBERS
from firewall.identities.selector import Operator, Requirement, Selector, require


class Side(NamedTuple):
    """The sender or the receiver of a flow."""

    endpoint: FlowEndpoint
    address: str
    port: int | None
    names: tuple[str, ...]


SideTest = Callable[[Side], bool]

_NOBODY = FlowEndpoint()


def one_side(test: SideTest, *, sender: bool) -> Predicate:
    """Return the filter that asks the sender, or else the receiver."""

    def matches(flow: Flow) -> bool:
        ports = None
        if flow.l4 is not None:
            ports = flow.l4.tcp or flow.l4.udp or flow.l4.sctp
        if sender:
            side = Side(
                flow.source or _NOBODY,
                flow.ip.source if flow.ip else "",
                ports.source_port if ports else None,
                flow.source_names,
            )
        else:
            side = Side(
                flow.destination or _NOBODY,
                flow.ip.destination if flow.ip else "",
                ports.destination_port if ports else None,
                flow.destination_names,
            )
        return test(side)

    return matches


def _pod(value: str) -> SideTest:
    """[namespace/]prefix of the name; without a namespace it is `default`."""
    namespace, slash, name = value.partition("/")
    if not slash:
        namespace, name = "default", value
    if not namespace and not name:
        raise ValueError("name a pod: [namespace/]name")

    def test(side: Side) -> bool:
        pod = side.endpoint.pod_name
        in_namespace = not namespace or side.endpoint.namespace == namespace
        return bool(pod) and in_namespace and pod.startswith(name)

    return test


def _namespace(value: str) -> SideTest:
    if not value:
        raise ValueError("name a namespace")
    return lambda side: side.endpoint.namespace == value


_IN = re.compile(r"(\S+)\s+(in|notin)\s*\(([^()]*)\)")
_COMMA = re.compile(r",(?![^()]*\))")


def parse_label_selector(text: str) -> Selector:
    """Read a selector as Hubble's `--label` and `kubectl -l` take it.

    Args:
        text: comma-separated `key`, `!key`, `key=value`, `key==value`, `key!=value`,
            `key in (a, b)`, `key notin (a, b)`; a key may have a source, `k8s:app`.

    Raises:
        ValueError: it is none of these.
    """
    return Selector(tuple(_label_requirement(part.strip()) for part in _COMMA.split(text)))


def _label_requirement(text: str) -> Requirement:
    if found := _IN.fullmatch(text):
        key, word, listed = found.groups()
        operator = Operator.IN if word == "in" else Operator.NOT_IN
        return require(key, operator, [value.strip() for value in listed.split(",")])
    if any(character in text for character in "() ") or not text:
        raise ValueError(f"{text!r} is no label term; write key=value, !key or key in (a, b)")
    if text.startswith("!"):
        return require(text[1:], Operator.DOES_NOT_EXIST)
    key, equals, value = text.partition("=")
    if not equals:
        return require(text, Operator.EXISTS)
    if key.endswith("!"):
        return require(key[:-1], Operator.NOT_IN, [value])
    return require(key, Operator.IN, [value.removeprefix("=")])


@lru_cache(maxsize=4096)
def _label_set(labels: tuple[str, ...]) -> LabelSet | None:
    try:
        return LabelSet.parse(labels)
    except LabelError:
        return None


def _label(value: str) -> SideTest:
    selector = parse_label_selector(value)

    def test(side: Side) -> bool:
        labels = _label_set(side.endpoint.labels)
        return labels is not None and selector.matches(labels)

    return test


@lru_cache(maxsize=4096)
def _packed(text: str) -> bytes:
    """Return a flow's address packed; empty if the record has none."""
    try:
        return parse_address(text)
    except ValueError:
        return b""


def _ip(value: str) -> SideTest:
    prefix = parse_prefix(value)

    def test(side: Side) -> bool:
        address = _packed(side.address)
        return len(address) == len(prefix.network) and address_in(address, prefix)

    return test


def _port(value: str) -> SideTest:
    if not value.isascii() or not value.isdecimal() or int(value) > 65535:
        raise ValueError("a port is a number 0-65535")
    number = int(value)
    return lambda side: side.port == number


def _identity(value: str) -> SideTest:
    """A number, or the name of a reserved identity, with or without `reserved:`."""
    name = value.removeprefix("reserved:")
    if name in NUMBERS:
        number = int(NUMBERS[name])
    elif value.isascii() and value.isdecimal():
        number = int(value)
    else:
        raise ValueError(f"neither a number nor one of {', '.join(NUMBERS)}")
    return lambda side: side.endpoint.identity == number and side.endpoint is not _NOBODY


def _fqdn(value: str) -> SideTest:
    """A name in which `*` stands for any characters; case and a final dot do not matter."""
    name = value.lower().removesuffix(".")
    if not name:
        raise ValueError("name a host; * stands for any characters")
    pattern = re.compile(".*".join(map(re.escape, name.split("*"))), re.DOTALL)
    return lambda side: any(pattern.fullmatch(n.lower().removesuffix(".")) for n in side.names)


SIDES: dict[str, Callable[[str], SideTest]] = {
    "pod": _pod,
    "namespace": _namespace,
    "label": _label,
    "ip": _ip,
    "port": _port,
    "identity": _identity,
    "fqdn": _fqdn,
}
"""By flag, without `from-` and `to-`."""
