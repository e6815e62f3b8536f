"""Link-layer headers: from a captured frame to its IP packet, or to the word why it has none. Pure.

Sources: tcpdump.org/linktypes.html and the pages it links to (Linux cooked v1 and v2, NULL,
LOOP); IEEE 802.1Q and 802.1ad tags, which may be nested.
"""

from typing import Final, NamedTuple

from firewall.replay.capture import Frame

_IPV4, _IPV6 = 0x0800, 0x86DD
_TAGS: Final = frozenset({0x8100, 0x88A8, 0x9100})  # 802.1Q, 802.1ad, and what came before it
_NAMES: Final = {0x0806: "ARP", 0x8035: "RARP", 0x88CC: "LLDP", 0x888E: "EAPOL", 0x8863: "PPPoE"}
_LEAST_ETHERTYPE: Final = 0x0600  # IEEE 802.3 clause 3.2.6: below, the field is a length

_FAMILIES: Final = {
    # Values of AF_INET and AF_INET6 that captures of loopback interfaces hold.
    2: _IPV4,
    10: _IPV6,  # Linux
    24: _IPV6,  # NetBSD, OpenBSD
    28: _IPV6,  # FreeBSD
    30: _IPV6,  # macOS
}

LINK_TYPES: Final[dict[int, str]] = {
    0: "loopback (BSD, writer's byte order)",
    1: "Ethernet",
    12: "raw IP",
    14: "raw IP",
    101: "raw IP",
    108: "loopback (OpenBSD, network order)",
    113: "Linux cooked v1",
    228: "raw IPv4",
    229: "raw IPv6",
    276: "Linux cooked v2",
}
"""Link types that can be read, by LINKTYPE number."""


class Carried(NamedTuple):
    """What a frame carries.

    Attributes:
        packet: from the IP header on; link padding may follow. Empty if `missing` is set.
        cut: bytes of the frame that were not captured.
        missing: why there is no IP packet; "" = there is one.
    """

    packet: bytes
    cut: int
    missing: str = ""


def open_frame(frame: Frame) -> Carried:
    """Take the link-layer header off."""
    data = frame.data
    cut = frame.length - len(data)
    if frame.link_type not in LINK_TYPES:
        return Carried(b"", cut, f"link type {frame.link_type} is not known")
    found = _payload(frame.link_type, data)
    if found is None:
        return Carried(b"", cut, "the link header is cut")
    ethertype, start = found
    while ethertype in _TAGS:
        if start + 4 > len(data):
            return Carried(b"", cut, "the VLAN tag is cut")
        ethertype, start = int.from_bytes(data[start + 2 : start + 4], "big"), start + 4
    if ethertype in (_IPV4, _IPV6, None):
        return Carried(data[start:], cut)
    if ethertype < _LEAST_ETHERTYPE:
        return Carried(b"", cut, "not IP: 802.2 LLC" if frame.link_type == 1 else "not IP")
    return Carried(b"", cut, f"not IP: {_NAMES.get(ethertype, f'EtherType {ethertype:#06x}')}")


def _payload(link_type: int, data: bytes) -> tuple[int | None, int] | None:
    """Return EtherType (None = IP, the version nibble tells) and start; None: the header is cut."""
    match link_type:
        case 1:
            return (int.from_bytes(data[12:14], "big"), 14) if len(data) >= 14 else None
        case 113:
            return (int.from_bytes(data[14:16], "big"), 16) if len(data) >= 16 else None
        case 276:
            return (int.from_bytes(data[0:2], "big"), 20) if len(data) >= 20 else None
        case 0 | 108:
            if len(data) < 4:
                return None
            # A family is a small number, so the byte order shows itself.
            family = min(int.from_bytes(data[:4], "big"), int.from_bytes(data[:4], "little"))
            return _FAMILIES.get(family, 0), 4
        case _:
            return None, 0
