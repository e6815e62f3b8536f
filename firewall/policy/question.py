"""A question about traffic, as an operator words it: who, to whom, which port, which request.

    x/a -> x/b:80/TCP         10.0.0.1 -> [fd00::2]:53/UDP       host -> x/b:EchoRequest/ICMP

The words become addresses and numbers only beside a realm (`firewall.policy.realm`), because a name
may have an IPv4 and an IPv6 address, a port may be named by the endpoint that has it, and an ICMP
type has one number per family. Port 0 of a protocol without ports is written as `0/GRE`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from conntrack.address import parse_address
from firewall.policy.course import Form, host_name
from firewall.policy.explanation import Request
from firewall.policy.readers.ports import (
    EXTENDED_PROTOCOLS,
    HIGHEST_PORT,
    ICMP,
    ICMP_TYPES,
    ICMPV6,
    PORT_PROTOCOLS,
    TCP,
)
from firewall.policy.snapshot import NamedPortRow

ICMP_WORDS = {"ICMP": ICMP, "ICMPV4": ICMP, "ICMPV6": ICMPV6}
"""How a question may call the two; `ICMP` to an IPv6 address means ICMPv6."""

_PROTOCOLS = {**PORT_PROTOCOLS, **EXTENDED_PROTOCOLS, **ICMP_WORDS}
_SERVER_NAME = re.compile(r"|([A-Za-z0-9_]([-A-Za-z0-9_]*[A-Za-z0-9_])?(\.(?!$)|$))+")
_HIGHEST_ICMP_TYPE = 255


class QuestionError(ValueError):
    """The question cannot be asked; the text says what is wrong with which word."""


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):  # noqa: E501  # fmt: skip
    """One question. Each end is given by name or address, by labels, or by identity number.

    Attributes:
        source, destination: `namespace/name`, `name`, an address, or an entity such as `host`.
        source_labels, destination_labels: of an endpoint that need not exist.
        source_identity, destination_identity: a number, 0 = not given.
        port: `80/TCP`, `http`, `EchoRequest/ICMP`.
        http: `PUT /v1/x` or `PUT http://b.x/v1/x`, "" = the connection only.
        headers: `Name: value` of the request.
        sni: the connection begins TLS with this server name, "" = without one; None = not said (a
            request by an https URL begins it with the URL's host).
        ipv6: which of several addresses of a name; None = the first that both ends have.
    """

    source: str = ""
    source_labels: tuple[str, ...] = ()
    source_identity: int = 0
    destination: str = ""
    destination_labels: tuple[str, ...] = ()
    destination_identity: int = 0
    port: str = ""
    http: str = ""
    headers: tuple[str, ...] = ()
    sni: str | None = None
    ipv6: bool | None = None


class PortText(NamedTuple):
    """A port as written, split: `protocol` 0 = not said; `word` a number, a name, or ""."""

    word: str
    protocol: int


def split_destination(text: str) -> tuple[str, str]:
    """Split `x/b:80/TCP` into the end and the port; the port "" if none is there.

    An IPv6 address with a port stands in brackets.

    Raises:
        QuestionError: a bracket is not closed.
    """
    if text.startswith("["):
        address, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise QuestionError(f"{text}: an IPv6 address with a port is written [fd00::1]:80/TCP")
        return address, rest[1:]
    try:
        parse_address(text)
    except ValueError:
        end, _, port = text.rpartition(":")
        return (end, port) if end else (text, "")
    return text, ""


def split_port(text: str) -> PortText:
    """Split `80/TCP`.

    Raises:
        QuestionError: the protocol is unknown.
    """
    word, _, protocol = text.partition("/")
    if not protocol and word.upper() in _PROTOCOLS:
        word, protocol = "", word
    if not protocol:
        return PortText(word, 0)
    number = _PROTOCOLS.get(protocol.upper())
    if number is None:
        raise QuestionError(f"{text}: {protocol} is none of {', '.join(_PROTOCOLS)}")
    return PortText(word, number)


def port_number(text: str, *, ipv6: bool, named: Iterable[NamedPortRow]) -> tuple[int, int]:
    """Return protocol and port (for ICMP the type) that a text means.

    Args:
        text: as in `Question.port`.
        ipv6: the family that the traffic has.
        named: the ports that the destination has names for.

    Raises:
        QuestionError: it means nothing here.
    """
    word, protocol = split_port(text)
    if protocol in (ICMP, ICMPV6):
        return _icmp_type(text, word, ipv6=ipv6, said=protocol)
    if not word and not protocol:
        raise QuestionError("which port? write it behind the destination: x/b:80/TCP")
    if protocol in EXTENDED_PROTOCOLS.values():
        if word not in ("", "0"):
            raise QuestionError(f"{text}: the protocol has no ports; write 0/PROTOCOL")
        return protocol, 0
    if word.isascii() and word.isdecimal():
        number = int(word)
        if number > HIGHEST_PORT:
            raise QuestionError(f"{text}: {word} is no port, the highest is {HIGHEST_PORT}")
        return protocol or TCP, number
    rows = list(named)
    for row in rows:
        if row.name == word.lower() and protocol in (0, row.protocol):
            return row.protocol, row.port
    known = ", ".join(row.name for row in rows) or "none"
    raise QuestionError(f'{text}: the destination has no port named "{word}"; it has {known}')


def _icmp_type(text: str, word: str, *, ipv6: bool, said: int) -> tuple[int, int]:
    if said == ICMPV6 and not ipv6:
        raise QuestionError(f"{text}: the destination's address is IPv4")
    protocol, names = ICMP_TYPES["IPv6" if ipv6 else "IPv4"]
    word = word or "EchoRequest"
    if word.isascii() and word.isdecimal() and int(word) <= _HIGHEST_ICMP_TYPE:
        return protocol, int(word)
    for name, number in names.items():
        if name.lower() == word.lower():
            return protocol, number
    raise QuestionError(f"{text}: {word} is no ICMP type of this family; it has {', '.join(names)}")


def form_of(question: Question) -> Form | None:
    """Return how the connection begins, None if the question does not say.

    Raises:
        QuestionError: a name that no hello could hold.
    """
    name = question.sni
    if name is None:
        _, scheme, rest = question.http.partition("https://")
        if not scheme:
            return None
        name = host_name(rest.partition("/")[0].encode())
        try:
            parse_address(name)
        except ValueError:
            pass
        else:
            name = ""  # RFC 6066 3: addresses are not named
    if not _SERVER_NAME.fullmatch(name):
        raise QuestionError(f"{name!r} is no server name: letters, digits, -, _ and dots")
    return Form(tls=True, server_name=name.lower())


def parse_request(text: str, headers: Iterable[str]) -> Request:
    """Read `PUT /v1/x` or `PUT http://host/v1/x` with headers `Name: value`.

    `Host` comes from the URL or from a header of that name.

    Raises:
        QuestionError: it is no request.
    """
    method, _, target = text.strip().partition(" ")
    target = target.strip()
    if not target and method.startswith(("/", "http://", "https://")):
        method, target = "GET", method
    host = ""
    for scheme in ("http://", "https://"):
        if target.startswith(scheme):
            host, slash, rest = target.removeprefix(scheme).partition("/")
            target = slash + rest or "/"
    if not method or not target.startswith("/") or " " in target:
        raise QuestionError(f"{text!r} is no request; write PUT /v1/x or PUT http://host/v1/x")
    pairs = []
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise QuestionError(f"{header!r} is no header; write Name: value")
        if name.strip().lower() == "host":
            host = value.strip()
        pairs.append((name.strip().encode(), value.strip().encode()))
    return Request(method.encode(), target.encode(), host.encode(), tuple(pairs))
