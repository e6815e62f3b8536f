"""Ports, protocols and ICMP types, as Cilium and Kubernetes write them.

Cilium writes a port as a string: a number, or an IANA service name (RFC 6335 section 5.1) that
stands for a named port. Everything with a letter is a name, so `0x10` is one. Protocol ANY means
TCP, UDP and SCTP, never ICMP; port 0 means every port of the protocol.

Source: Cilium pkg/policy/api/l4.go, icmp.go, rule_validation.go, pkg/iana.
"""

import re

from firewall.policy.model import PortRange
from firewall.policy.problem import did_you_mean
from firewall.policy.readers.document import Value, shorten
from firewall.policy.readers.settings import ReaderSettings

MAX_PORTS = 40
"""Ports of one toPorts item, and fields of one icmps item (Cilium maxPorts, maxICMPFields)."""

HIGHEST_PORT = 65535

ICMP = 1
TCP = 6
UDP = 17
ICMPV6 = 58
SCTP = 132

PORT_PROTOCOLS: dict[str, int] = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
"""Protocols that have ports, by IANA number."""

EXTENDED_PROTOCOLS: dict[str, int] = {
    "IGMP": 2,
    "IPIP": 4,
    "IPV6": 41,
    "GRE": 47,
    "ESP": 50,
    "AH": 51,
    "VRRP": 112,
}
"""Protocols without ports (Cilium: enable-extended-ip-protocols), by IANA number."""

_ANY = "ANY"
_PROTOCOL_WORDS = (*PORT_PROTOCOLS, *EXTENDED_PROTOCOLS, _ANY)
_NAME = re.compile(r"(?=.{1,15}$)(?=.*[A-Za-z])[A-Za-z0-9]+(-[A-Za-z0-9]+)*")
_DECIMAL = re.compile(r"0|[1-9][0-9]*")

_ICMP_V4_TYPES: dict[str, int] = {
    "EchoReply": 0,
    "DestinationUnreachable": 3,
    "Redirect": 5,
    "Echo": 8,
    "EchoRequest": 8,
    "RouterAdvertisement": 9,
    "RouterSelection": 10,
    "TimeExceeded": 11,
    "ParameterProblem": 12,
    "Timestamp": 13,
    "TimestampReply": 14,
    "Photuris": 40,
    "ExtendedEchoRequest": 42,
    "ExtendedEchoReply": 43,
    "ExtendedEcho Reply": 43,  # the CRD's pattern has this spelling
}
_ICMP_V6_TYPES: dict[str, int] = {
    "DestinationUnreachable": 1,
    "PacketTooBig": 2,
    "TimeExceeded": 3,
    "ParameterProblem": 4,
    "EchoRequest": 128,
    "EchoReply": 129,
    "MulticastListenerQuery": 130,
    "MulticastListenerReport": 131,
    "MulticastListenerDone": 132,
    "RouterSolicitation": 133,
    "RouterAdvertisement": 134,
    "NeighborSolicitation": 135,
    "NeighborAdvertisement": 136,
    "RedirectMessage": 137,
    "RouterRenumbering": 138,
    "ICMPNodeInformationQuery": 139,
    "ICMPNodeInformationResponse": 140,
    "InverseNeighborDiscoverySolicitation": 141,
    "InverseNeighborDiscoveryAdvertisement": 142,
    "HomeAgentAddressDiscoveryRequest": 144,
    "HomeAgentAddressDiscoveryReply": 145,
    "MobilePrefixSolicitation": 146,
    "MobilePrefixAdvertisement": 147,
    "DuplicateAddressRequestCodeSuffix": 157,
    "DuplicateAddressConfirmationCodeSuffix": 158,
    "ExtendedEchoRequest": 160,
    "ExtendedEchoReply": 161,
}
ICMP_TYPES: dict[str, tuple[int, dict[str, int]]] = {
    "IPv4": (ICMP, _ICMP_V4_TYPES),
    "IPv6": (ICMPV6, _ICMP_V6_TYPES),
}
"""Family to protocol number and type names (Cilium pkg/policy/api/icmp.go; IANA registries)."""


def is_port_name(text: str) -> bool:
    """Say whether the text is an IANA service name: 1-15 characters with at least one letter."""
    return _NAME.fullmatch(text) is not None


def read_ports(value: Value, settings: ReaderSettings) -> tuple[PortRange, ...]:
    """Read `ports` of a Cilium toPorts item; ANY becomes three ranges."""
    items = value.items()
    if len(items) > MAX_PORTS:
        value.error(f"too many ports, the max is {MAX_PORTS}")
    return tuple(port for item in items for port in _read_port(item, settings))


def _read_port(item: Value, settings: ReaderSettings) -> tuple[PortRange, ...]:
    fields = item.fields(("port", "endPort", "protocol"))
    if not item.is_mapping:
        return ()
    protocols = read_protocol(fields.get("protocol"))
    extended = [p for p in protocols if p in EXTENDED_PROTOCOLS.values()]
    if extended:
        settings.require("extended-protocols", fields["protocol"])
    end = fields["endPort"].integer(0, HIGHEST_PORT) if "endPort" in fields else 0
    if "port" not in fields:
        if not extended:
            item.error("port must be specified")
        return tuple(PortRange(p) for p in extended)
    text = fields["port"].text()
    if text is None or end is None:
        return ()
    if extended:
        if text not in ("", "0") or end:
            fields["port"].error("must be empty or 0: the protocol has no ports")
        return tuple(PortRange(p) for p in extended)
    if is_port_name(text):
        if end:
            fields["endPort"].warning("is ignored: the port is a name")
        return tuple(PortRange(p, 0, 0, text.lower()) for p in protocols)
    low = _number(fields["port"], text)
    if low is None:
        return ()
    if low == 0:
        if end:
            fields["endPort"].error("cannot follow port 0, which already means every port")
        return tuple(PortRange(p) for p in protocols)
    if end and end < low:
        fields["endPort"].error(f"must not be lower than port {low}")
    return tuple(PortRange(p, low, max(low, end)) for p in protocols)


def _number(value: Value, text: str) -> int | None:
    if not text:
        value.error("port must be specified")
    elif not _DECIMAL.fullmatch(text):
        value.error(
            f'unable to parse port "{shorten(text)}": write a decimal number from 0 to '
            f"{HIGHEST_PORT}, or a port name of 1 to 15 letters, digits and single hyphens"
        )
    elif len(text) > 5 or int(text) > HIGHEST_PORT:
        value.error(f'unable to parse port "{shorten(text)}": the highest port is {HIGHEST_PORT}')
    else:
        return int(text)
    return None


def read_protocol(value: Value | None) -> tuple[int, ...]:
    """Read a Cilium protocol, case-insensitive; missing, empty and ANY are TCP, UDP and SCTP."""
    every = tuple(PORT_PROTOCOLS.values())
    if value is None:
        return every
    text = value.text()
    if text is None:
        return ()
    word = text.upper()
    if word in ("", _ANY):
        return every
    number = PORT_PROTOCOLS.get(word) or EXTENDED_PROTOCOLS.get(word)
    if number is not None:
        return (number,)
    if word in ("ICMP", "ICMPV6"):
        value.error(f'invalid protocol "{text}": ICMP has types, not ports; use icmps')
    else:
        hint = did_you_mean(text, _PROTOCOL_WORDS)
        value.error(f'invalid protocol "{shorten(text)}": must be {_listed(_PROTOCOL_WORDS)}{hint}')
    return ()


def _listed(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def read_icmps(value: Value) -> tuple[PortRange, ...]:
    """Read a Cilium `icmps` list: message types as "ports" of ICMP and ICMPv6."""
    found: list[PortRange] = []
    for item in value.items():
        fields = item.fields(("fields",))
        if "fields" not in fields:
            if item.is_mapping:
                item.error("needs fields")
            continue
        listed = fields["fields"].items()
        if len(listed) > MAX_PORTS:
            fields["fields"].error(f"too many types, the max is {MAX_PORTS}")
        found += [port for field in listed if (port := _icmp_field(field)) is not None]
    return tuple(found)


def _icmp_field(item: Value) -> PortRange | None:
    fields = item.fields(("family", "type"))
    family = "IPv4"
    if "family" in fields:
        written = fields["family"].text()
        if written is None:
            return None
        if written not in ICMP_TYPES and written:
            hint = did_you_mean(written, ICMP_TYPES)
            fields["family"].error(f"wrong family: {shorten(written)}{hint}")
            return None
        family = written or family
    if "type" not in fields:
        if item.is_mapping:
            item.error("needs type, a number from 0 to 255 or a name")
        return None
    protocol, names = ICMP_TYPES[family]
    text = fields["type"].text(or_integer=True)
    if text is None:
        return None
    number = names.get(text)
    if number is None and _DECIMAL.fullmatch(text) and len(text) <= 3 and int(text) <= 255:
        number = int(text)
    if number is None:
        hint = did_you_mean(text, names)
        fields["type"].error(f'"{shorten(text)}" is no type of ICMP over {family}{hint}')
        return None
    return PortRange(protocol, number, number)
