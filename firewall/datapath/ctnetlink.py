"""What the kernel's conntrack says of its flows over ctnetlink, and how it is asked. Pure.

A message holds attributes (type, length, value), nested by kind, behind a struct nfgenmsg
(linux/netfilter/nfnetlink_conntrack.h). What is handled here begins behind that.

A translated flow (NAT) has two pairs of addresses. Our tuple is what a forwarded packet bears
between the two translations, and what policy is asked about: the source of the original tuple, and
the source of the reply tuple as destination.
"""

import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

from conntrack.flow import ICMP, ICMPV6, SCTP, TCP, FlowTuple, reply
from conntrack.sctp_states import SctpState
from conntrack.tcp_states import TcpState
from conntrack.tracker import Entry, Tracker
from firewall.datapath.netlink import ATTRIBUTE, NESTED, attribute

GET: Final = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET
NEW: Final = 1 << 8  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW
DELETE: Final = 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE
FAMILY_HEADER_BYTES: Final = 4  # struct nfgenmsg
_IPV4, _IPV6 = 2, 10  # AF_INET, AF_INET6
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

_ORIGINAL, _REPLY, _STATUS, _PROTOCOL_INFO, _TIMEOUT = 1, 2, 3, 4, 7  # CTA_...
MARK, _COUNTERS_ORIGINAL, _COUNTERS_REPLY, _ZONE, MARK_MASK = 8, 9, 10, 18, 21
_PACKETS, _BYTES = 1, 2  # CTA_COUNTERS_...
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2  # CTA_TUPLE_...
_NUMBER, _SOURCE_PORT = 1, 2  # CTA_PROTO_...
_ICMP_ID, _ICMP_TYPE, _ICMPV6_ID, _ICMPV6_TYPE = 4, 5, 7, 8  # CTA_PROTO_...
_FILTER, _ORIGINAL_FLAGS = 25, 1  # CTA_FILTER, CTA_FILTER_ORIG_FLAGS
_SOURCE_FLAGS = 1 << 3 | 1 << 4  # CTA_PROTO_NUM, CTA_PROTO_SRC_PORT
_SEEN_REPLY, _ASSURED, _DYING = 1 << 1, 1 << 2, 1 << 9  # IPS_..., nf_conntrack_common.h

# Our states have the kernel's numbers (enum tcp_conntrack, enum sctp_conntrack).
_TCP_TAKEN = {
    TcpState.SYN_SENT: TcpState.SYN_SENT,
    TcpState.SYN_RECV: TcpState.SYN_RECV,
    TcpState.SYN_SENT2: TcpState.SYN_SENT2,
    **dict.fromkeys(range(TcpState.ESTABLISHED, TcpState.SYN_SENT2), TcpState.ESTABLISHED),
}
_SCTP_TAKEN = frozenset(range(SctpState.ESTABLISHED, SctpState.SHUTDOWN_ACK_SENT))


class KernelFlow(NamedTuple):
    """One entry of the kernel's table.

    Attributes:
        original: tuple of the first packet, as in `conntrack.flow`.
        icmp_type: of an ICMP query, else 0.
        state: the kernel's number of the TCP or SCTP state (enum tcp_conntrack), else 0.
        timeout_s: how long it may still be silent.
        seen_reply: the other side has answered.
        assured: the kernel would not evict it early.
        mark: the connmark, ours and everybody's.
        packets: per direction (original, reply), as the kernel counts them; None = it does not.
        bytes: as `packets`, of IP packets.
    """

    original: FlowTuple
    icmp_type: int
    state: int
    timeout_s: int
    seen_reply: bool
    assured: bool
    mark: int = 0
    packets: tuple[int, int] | None = None
    bytes: tuple[int, int] | None = None


def take_over(flow: KernelFlow, tracker: Tracker, now: float) -> Entry | None:
    """Give a flow of the kernel to our tracker; return its entry if it was taken.

    The kernel is ahead of us: it has seen what waits in the queue, or was lost with it. So of a TCP
    flow that it thinks is closing, or over, any segment of the end may still come, and the flow is
    taken for an established one. If it is over it may leave early, and it does not stay for longer.
    SCTP associations that are being opened are left out: nobody tells their verification tags.
    """
    protocol = flow.original.protocol
    timeouts = tracker.profile.timeouts
    timeout_s = float(flow.timeout_s)
    state, assured = 0, flow.assured
    if protocol == TCP:
        if flow.state not in _TCP_TAKEN:
            return None
        state, timeout_s = _TCP_TAKEN[flow.state], min(timeout_s, timeouts.tcp[flow.state])
        assured = assured and flow.state < TcpState.TIME_WAIT
    elif protocol == SCTP:
        if flow.state not in _SCTP_TAKEN:
            return None
        state, timeout_s = flow.state, min(timeout_s, timeouts.sctp[flow.state])
    return tracker.restore(
        flow.original,
        now,
        timeout_s=timeout_s,
        state=state,
        seen_reply=flow.seen_reply,
        assured=assured,
        icmp_type=flow.icmp_type,
    )


def decode(message: bytes) -> KernelFlow | None:
    """Read the attributes of one entry; None if it is dying or of a kind that we do not track."""
    found = _attributes(message)
    status = _number(found.get(_STATUS, b""))
    original = _end(found.get(_ORIGINAL, b""))
    answering = _end(found.get(_REPLY, b""))
    if status & _DYING or original is None or answering is None:
        return None
    protocol = original.protocol
    return KernelFlow(
        original=FlowTuple(
            original.address,
            answering.address,
            protocol,
            original.port,
            original.port_of(answering),
        ),
        icmp_type=original.icmp_type,
        state=_state(found.get(_PROTOCOL_INFO, b"")),
        timeout_s=_number(found.get(_TIMEOUT, b"")),
        seen_reply=bool(status & _SEEN_REPLY),
        assured=bool(status & _ASSURED),
        mark=_number(found.get(MARK, b"")),
        packets=_counters(found, _PACKETS),
        bytes=_counters(found, _BYTES),
    )


def tuples_in(message: bytes) -> tuple[FlowTuple, FlowTuple] | None:
    """Return both tuples (original, reply) of a flow with ports, as the kernel's hooks see them."""
    found = _attributes(message)
    both = [_tuple(found.get(kind, b"")) for kind in (_ORIGINAL, _REPLY)]
    return None if both[0] is None or both[1] is None else (both[0], both[1])


def _tuple(data: bytes) -> FlowTuple | None:
    parts = _parts(data)
    if parts is None:
        return None
    source, destination, protocol = parts
    ports = (_number(protocol.get(_SOURCE_PORT + end, b"")) for end in (0, 1))
    return FlowTuple(source, destination, _number(protocol[_NUMBER]), *ports)


def _parts(data: bytes) -> tuple[bytes, bytes, dict[int, bytes]] | None:
    """Split a tuple: source, destination, what its protocol tells; None if that is not all there.

    Source before destination in both families: types 1 and 2, or 3 and 4.
    """
    nested = _attributes(data)
    addresses = _attributes(nested.get(_TUPLE_IP, b""))
    protocol = _attributes(nested.get(_TUPLE_PROTOCOL, b""))
    if len(addresses) != 2 or _NUMBER not in protocol:
        return None
    source, destination = (addresses[kind] for kind in sorted(addresses))
    return source, destination, protocol


class _End(NamedTuple):
    """Who sends the packets of one direction."""

    address: bytes
    protocol: int
    port: int
    icmp_type: int

    def port_of(self, other: "_End") -> int:
        """Return the port at the other end; of an ICMP query, the identifier that both have."""
        return self.port if self.protocol in (ICMP, ICMPV6) else other.port


def _end(data: bytes) -> _End | None:
    """Read the source half of a tuple; None if there is none that we can track."""
    parts = _parts(data)
    if parts is None:
        return None
    source, _, protocol = parts
    number = _number(protocol[_NUMBER])
    port, kind = _number(protocol.get(_SOURCE_PORT, b"")), 0
    if number in (ICMP, ICMPV6):
        names = (_ICMP_ID, _ICMP_TYPE) if number == ICMP else (_ICMPV6_ID, _ICMPV6_TYPE)
        port, kind = (_number(protocol.get(name, b"")) for name in names)
    return _End(source, number, port, kind)


def _counters(found: dict[int, bytes], which: int) -> tuple[int, int] | None:
    """Return a counter of both directions; None where nf_conntrack_acct was off."""
    if _COUNTERS_ORIGINAL not in found or _COUNTERS_REPLY not in found:
        return None
    original, reply = (
        _number(_attributes(found[kind]).get(which, b""))
        for kind in (_COUNTERS_ORIGINAL, _COUNTERS_REPLY)
    )
    return original, reply


def _state(info: bytes) -> int:
    """Return the state within CTA_PROTOINFO: the first attribute of whichever protocol it is."""
    for of_protocol in _attributes(info).values():
        return _number(_attributes(of_protocol).get(1, b""))
    return 0


def state_in(message: bytes) -> int:
    """Return the number of the TCP or SCTP state that an entry's attributes tell, else 0."""
    return _state(_attributes(message).get(_PROTOCOL_INFO, b""))


def _attributes(data: bytes) -> dict[int, bytes]:
    """Split netlink attributes, which are aligned to 4 bytes; one that leaves `data` ends them."""
    found: dict[int, bytes] = {}
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, at)
        if length < ATTRIBUTE.size or at + length > len(data):
            break
        found[kind & _TYPE_MASK] = data[at + ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
    return found


def _number(data: bytes) -> int:
    """Read a big-endian number of whatever width; absent = 0."""
    return int.from_bytes(data, "big")


# --- questions ---


def identities(flow: FlowTuple) -> Iterator[bytes]:
    """Yield the ways to name a flow with ports: by its first packet's tuple, or by its replies'."""
    yield named(flow)
    yield named(reply(flow), _REPLY)


def named(ends: FlowTuple, which: int = _ORIGINAL) -> bytes:
    """Return the header of a question and the tuple of a flow with ports, of its first packet."""
    is_ipv4 = len(ends.source) == 4
    first = 1 if is_ipv4 else 3  # CTA_IP_V4_SRC, CTA_IP_V6_SRC
    addresses = attribute(first, ends.source) + attribute(first + 1, ends.destination)
    protocol = attribute(_NUMBER, bytes((ends.protocol,)))
    protocol += attribute(_SOURCE_PORT, ends.source_port.to_bytes(2, "big"))
    protocol += attribute(_SOURCE_PORT + 1, ends.destination_port.to_bytes(2, "big"))
    nested = attribute(_TUPLE_IP | NESTED, addresses)
    nested += attribute(_TUPLE_PROTOCOL | NESTED, protocol)
    family = bytes((_IPV4 if is_ipv4 else _IPV6, 0, 0, 0))
    return family + attribute(which | NESTED, nested)


def begun_by(ends: FlowTuple) -> bytes:
    """Return what asks for the flows that were begun from a port (CTA_FILTER, Linux 5.8).

    Not by the address as well: of IPv6, Linux 6.18 answers with those that are not the source's
    (ctnetlink_filter_match_tuple).
    """
    wanted = attribute(_ORIGINAL_FLAGS, _SOURCE_FLAGS.to_bytes(4, sys.byteorder))
    return named(ends) + attribute(_FILTER | NESTED, wanted)


def identity_of(message: bytes) -> bytes:
    """Return the attributes that name a flow to the kernel: its first packet's tuple, its zone."""
    attributes = _attributes(message)
    identity = attribute(_ORIGINAL | NESTED, attributes.get(_ORIGINAL, b""))
    if _ZONE in attributes:
        identity += attribute(_ZONE, attributes[_ZONE])
    return identity


def number_attribute(kind: int, number: int) -> bytes:
    """Return an attribute with a number of 32 bits, in the network's byte order."""
    return attribute(kind, number.to_bytes(4, "big"))
