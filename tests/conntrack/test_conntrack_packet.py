"""What the parser accepts, and with which fault it refuses."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conntrack.packet import Fault, Oddity, Packet, PacketError, parse, policy_port

A4, B4 = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
A6, B6 = bytes(15) + b"\1", bytes(15) + b"\2"


def v4(
    protocol: int, body: bytes, *, options: bytes = b"", total: int | None = None, frag: int = 0
) -> bytes:
    size = 20 + len(options) + len(body) if total is None else total
    ihl = 0x40 | (20 + len(options)) // 4
    head = struct.pack("!BBHHHBBH", ihl, 0, size, 1, frag, 64, protocol, 0)
    return head + A4 + B4 + options + body


def v6(protocol: int, body: bytes, *, payload: int | None = None) -> bytes:
    size = len(body) if payload is None else payload
    return struct.pack("!IHBB", 6 << 28, size, protocol, 64) + A6 + B6 + body


def tcp(*, offset: int = 5, flags: int = 2, options: bytes = b"", data: bytes = b"") -> bytes:
    head = struct.pack("!HHIIBBHHH", 4000, 80, 7, 9, offset << 4, flags, 512, 0, 0)
    return head + options + data


def udp(*, length: int = 8, checksum: int = 1, data: bytes = b"") -> bytes:
    return struct.pack("!HHHH", 4000, 53, length, checksum) + data


def fault(data: bytes, *, complete: bool = True, verify: bool = False) -> Fault | None:
    try:
        parse(data, complete=complete, verify=verify)
    except PacketError as error:
        return error.fault
    return None


def header(kind: int, following: int, size: int = 8) -> bytes:
    """An IPv6 extension header of `size` bytes; routing headers get type 4."""
    return bytes((following, size // 8 - 1, 4 if kind == 43 else 0, 0)) + bytes(size - 4)


REFUSED = [
    (b"", Fault.TRUNCATED, "no bytes"),
    (bytes((0x55,)) + bytes(39), Fault.BAD_VERSION, "version 5"),
    (v4(6, tcp())[:19], Fault.TRUNCATED, "IPv4 header cut"),
    (bytes((0x44,)) + v4(6, tcp())[1:], Fault.BAD_HEADER_LENGTH, "IHL 4"),
    (v4(17, udp(), total=19), Fault.BAD_LENGTH, "total length below the header"),
    (v4(17, udp(), total=29), Fault.TRUNCATED, "total length behind the bytes"),
    (v4(6, tcp(), total=39), Fault.TRUNCATED, "TCP header beyond the packet"),
    (v4(6, tcp(offset=4)), Fault.BAD_HEADER_LENGTH, "data offset 4"),
    (v4(6, tcp(offset=6)), Fault.BAD_HEADER_LENGTH, "data offset behind the segment"),
    (v4(17, udp(length=7)), Fault.BAD_LENGTH, "UDP length 7"),
    (v4(17, udp(length=9)), Fault.BAD_LENGTH, "UDP length behind the packet"),
    (v4(17, udp()[:7]), Fault.TRUNCATED, "UDP header cut"),
    (v4(6, tcp(), frag=0x2000), Fault.FRAGMENT, "first fragment"),
    (v4(6, tcp(), frag=0x0001), Fault.FRAGMENT, "later fragment"),
    (v4(17, udp(), frag=0x2000), Fault.FRAGMENT, "first fragment of UDP"),
    (v4(17, udp(), options=b"\x07\x01\x00\x00"), Fault.BAD_OPTION, "option length 1"),
    (v4(17, udp(), options=b"\x07\x09\x00\x00"), Fault.BAD_OPTION, "option leaves the header"),
    (v4(17, udp(), options=b"\x01\x01\x01\x07"), Fault.BAD_OPTION, "option without length"),
    (v4(58, bytes(8)), Fault.WRONG_FAMILY, "ICMPv6 over IPv4"),
    (v6(1, bytes(8)), Fault.WRONG_FAMILY, "ICMP over IPv6"),
    (v4(1, bytes(7)), Fault.TRUNCATED, "ICMP header cut"),
    (v4(132, bytes(11)), Fault.TRUNCATED, "SCTP header cut"),
    (v4(47, b"\x20\x01\x08\x00\0\0\0\0"), Fault.UNKNOWN_L4, "GRE 1 without PPP"),
    (v4(47, bytes(3)), Fault.TRUNCATED, "GRE header cut"),
    (v6(6, tcp(), payload=19), Fault.TRUNCATED, "IPv6 payload below TCP"),
    (v6(6, tcp(), payload=21), Fault.TRUNCATED, "IPv6 payload behind the bytes"),
    (v6(59, b""), Fault.NO_TRANSPORT, "no next header"),
    (v6(60, header(60, 59)), Fault.NO_TRANSPORT, "no next header behind options"),
    (v6(44, b"\x11\0\0\x01" + bytes(4) + udp()), Fault.FRAGMENT, "first IPv6 fragment"),
    (v6(44, b"\x11\0\0\x08" + bytes(4) + udp()), Fault.FRAGMENT, "later IPv6 fragment"),
    (v6(60, header(60, 44) + b"\6\0\0\x01" + bytes(4)), Fault.FRAGMENT, "fragment in a chain"),
    (v6(60, bytes((6, 255)) + bytes(30)), Fault.BAD_LENGTH, "options beyond the packet"),
    (v6(60, bytes((60, 0)) + bytes(5)), Fault.TRUNCATED, "options cut"),
    (v6(51, bytes((6, 0)) + bytes(30)), Fault.BAD_HEADER_LENGTH, "AH shorter than its fields"),
]


@pytest.mark.parametrize(("data", "expected", "why"), REFUSED, ids=[row[2] for row in REFUSED])
def test_a_lie_is_refused_with_its_own_fault(data: bytes, expected: Fault, why: str) -> None:
    """Faults stay distinct, because each becomes another drop reason."""
    assert fault(data) == expected, why


CHAINS = [
    ([60], "destination options"),
    ([0], "hop-by-hop"),
    ([43], "routing"),
    ([51], "authentication"),
    ([0, 60, 43, 60, 51], "the recommended order"),
    ([60] * 30, "thirty headers"),
    ([43, 43, 60, 51, 60], "repeated and out of order"),
    ([44], "atomic fragment"),
]


@pytest.mark.parametrize(("kinds", "why"), CHAINS, ids=[row[1] for row in CHAINS])
def test_tcp_is_found_behind_any_chain(kinds: list[int], why: str) -> None:
    """RFC 8200 4.1: in any order and number, as long as the bytes are there."""
    chain = b""
    for index, kind in enumerate(kinds):
        following = kinds[index + 1] if index + 1 < len(kinds) else 6
        if kind == 51:
            chain += bytes((following, 4)) + bytes(22)
        else:
            chain += header(kind, following) if kind != 44 else bytes((following,)) + bytes(7)
    whole = v6(kinds[0], chain + tcp(data=b"x" * 300))
    packet = parse(whole)
    assert (packet.protocol, packet.source_port, packet.destination_port) == (6, 4000, 80), why
    assert packet.payload_bytes == 300
    head = parse(whole[: 40 + len(chain) + 20], complete=False)
    assert head.key == packet.key
    assert fault(whole[: 40 + len(chain) + 19], complete=False) == Fault.TRUNCATED


def test_an_extension_header_changes_no_key() -> None:
    """A flow is the same flow with and without options in a packet."""
    assert parse(v6(60, header(60, 6) + tcp())).key == parse(v6(6, tcp())).key


def test_options_move_the_transport_header() -> None:
    """IHL counts, not 20."""
    plain, routed = parse(v4(6, tcp())), parse(v4(6, tcp(), options=b"\x07\x07\x04\0\0\0\0\0"))
    assert plain.key == routed.key
    assert routed.oddities == 0


@pytest.mark.parametrize("kind", [131, 137])
def test_a_source_route_is_odd(kind: int) -> None:
    """RFC 7126 4.3 and 4.4: the tracker refuses it when strict."""
    packet = parse(v4(6, tcp(), options=bytes((1, kind, 3, 0))))
    assert packet.oddities == Oddity.SOURCE_ROUTE


def test_oddities_of_ipv6() -> None:
    """Routing type 0, late hop-by-hop options, UDP without checksum."""
    assert parse(v6(43, bytes((6, 0, 0, 1)) + bytes(4) + tcp())).oddities == Oddity.ROUTING_0
    late = v6(60, header(60, 0) + header(0, 6) + tcp())
    assert parse(late).oddities == Oddity.HOP_BY_HOP_LATE
    assert parse(v6(17, udp(checksum=0))).oddities == Oddity.NO_CHECKSUM
    assert parse(v4(17, udp(checksum=0))).oddities == 0


@pytest.mark.parametrize("gre", [b"\0\2\x08\0", b"\0\7\x88\x0b\0\0\0\0", b"\0\1\x88\x0b"])
def test_a_gre_header_that_nobody_defined_is_odd(gre: bytes) -> None:
    """Linux tracks it by address pair; the tracker refuses it when strict."""
    assert parse(v4(47, gre)).oddities == Oddity.GRE_HEADER
    for known in (b"\0\0\x08\0", b"\x30\1\x88\x0b\0\0\0\0"):
        assert parse(v4(47, known)).oddities == 0


def test_a_large_packet_shows_its_length_through_a_short_copy() -> None:
    """GSO: the header says 64 kB, 256 bytes were copied."""
    whole = v4(6, tcp(flags=0x10, data=b"x" * 60000))
    packet = parse(whole[:256], complete=False)
    assert (packet.length, packet.payload_bytes) == (60040, 60000)
    assert fault(whole[:256]) == Fault.TRUNCATED


def test_padding_behind_the_packet_is_ignored() -> None:
    """Ethernet pads to 60 bytes."""
    plain, padded = parse(v4(17, udp())), parse(v4(17, udp()) + bytes(18))
    assert (padded.length, padded.payload_bytes) == (plain.length, plain.payload_bytes)


def test_policy_ports() -> None:
    """Destination port, ICMP type, or 0."""
    assert policy_port(parse(v4(6, tcp()))) == 80
    assert policy_port(parse(v4(17, udp()))) == 53
    assert policy_port(parse(v4(1, b"\x08\0\0\0\0\x07\0\1"))) == 8
    assert policy_port(parse(v4(1, b"\0\0\0\0\0\x07\0\1"))) == 0
    assert policy_port(parse(v4(50, bytes(8)))) == 0


def quoting(inner: bytes) -> Packet:
    return parse(v4(1, struct.pack("!BBHI", 3, 1, 0, 0) + inner))


def test_a_quote_names_the_flow_in_its_own_direction() -> None:
    """The quoted packet has the key that the flow's packets have."""
    inner = v4(6, tcp())
    quoted = quoting(inner[:28]).quoted
    assert quoted is not None
    assert quoted.key == parse(inner).key
    assert quoted.sequence == 7


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        (b"", "nothing quoted"),
        (v4(17, udp())[:19], "half an IP header"),
        (v4(17, udp())[:23], "half the ports"),
        (b"\x4a" + v4(50, bytes(8))[1:], "options that were not quoted"),
        (v4(17, udp(), frag=0x0002), "a later fragment has no ports"),
        (v4(1, struct.pack("!BBHI", 3, 1, 0, 0) + bytes(28)), "an error about an error"),
        (v6(17, udp()), "another family"),
    ],
)
def test_an_unreadable_quote_names_nothing(inner: bytes, why: str) -> None:
    """Then the error belongs to no flow."""
    assert quoting(inner).quoted is None, why


def test_verification_finds_a_changed_byte() -> None:
    """RFC 1071: the sum is wrong for one flipped bit."""
    good = bytes.fromhex(
        "45000028000100004006623a0ac901020ac902029c400050000003e8000000005002fffff6d40000"
    )
    assert fault(good, verify=True) is None
    for at in (0, 8, 15, 21, 39):
        bad = good[:at] + bytes((good[at] ^ (0x04 if at == 0 else 1),)) + good[at + 1 :]
        assert fault(bad, verify=True) is not None


@given(
    st.integers(0, 60), st.integers(0, 60), st.sampled_from([0, 1, 0x2000, 0x4000]),
    st.integers(20, 48), st.booleans(),
)  # fmt: skip
def test_a_plain_datagram_is_read_as_one_with_ip_options(
    total: int, stated: int, fragment: int, copied: int, complete: bool
) -> None:
    """The short way for headers without options judges as the long one does."""

    def outcome(options: bytes) -> tuple[object, ...]:
        extra = len(options)
        head = struct.pack(
            "!BBHHHBBH4s4s", 0x45 + extra // 4, 0, total + extra, 0, fragment, 64, 17, 0, A4, B4
        )
        data = head + options + struct.pack("!4H", 7, 9, stated, 0) + bytes(20)
        try:
            packet = parse(data[: copied + extra], complete=complete)
        except PacketError as error:
            return (error.fault,)
        ports = packet.source_port, packet.destination_port
        rest = packet.icmp_type, packet.tcp_flags, packet.sequence, packet.oddities, packet.quoted
        return packet.key, packet.length - extra, packet.payload_bytes, *ports, *rest

    assert outcome(b"") == outcome(b"\x01" * 4)
