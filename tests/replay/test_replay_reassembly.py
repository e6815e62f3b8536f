"""Pieces become a datagram where the kernel makes one of them, and nowhere else."""

import pytest
from fragment_plans import PAYLOAD_BYTES, PLANS, cut

from conntrack.packet import PacketError, parse
from firewall.replay.reassembly import Reassembly

ENDS = ((bytes(3) + b"\1", bytes(3) + b"\2"), (bytes(15) + b"\1", bytes(15) + b"\2"))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_comes_out_as_the_kernel_has_it(plan, version):
    reassembly = Reassembly()
    parsed = []
    for piece in cut(plan, *ENDS[version == 6], 7):
        whole = reassembly.add(piece, 0.0)
        if isinstance(whole, bytes):
            try:
                parsed.append(parse(whole, verify=True).payload_bytes)
            except PacketError:
                assert whole == piece
    expected = PLANS[plan][version == 6]
    assert parsed == ([PAYLOAD_BYTES - 8] if expected else [])


def first_of_ipv6(protocol: int, body: bytes, size: int) -> bytes:
    """The first piece of a datagram that has 64 bytes more."""
    head = (6 << 28).to_bytes(4, "big") + (8 + size).to_bytes(2, "big") + bytes((44, 64))
    return head + b"".join(ENDS[1]) + bytes((protocol, 0, 0, 1)) + bytes(4) + body[:size]


@pytest.mark.parametrize(
    ("protocol", "body", "size", "waits"),
    [
        (6, bytes(64), 16, False),  # TCP: 20 bytes of header
        (6, bytes(64), 24, True),
        (58, bytes(64), 8, True),
        (132, bytes(64), 8, True),
        (60, bytes((6, 0)) + bytes(62), 24, False),  # options, then 16 bytes of TCP
        (60, bytes((17, 0)) + bytes(62), 16, True),
        (51, bytes((6, 4)) + bytes(62), 40, False),  # authentication, then 16 bytes of TCP
        (60, bytes((6, 3)) + bytes(62), 24, False),  # ends inside the options
        (60, bytes((60, 0)) + bytes(62), 8, True),  # ends between two headers: Linux takes it
    ],
)
def test_a_first_piece_has_the_transports_header(protocol, body, size, waits):
    """RFC 8200 section 4.5; what has not goes on as it is, and the parser refuses it."""
    piece = first_of_ipv6(protocol, body, size)
    assert (Reassembly().add(piece, 0.0) == piece) is not waits
    with pytest.raises(PacketError):
        parse(piece)
