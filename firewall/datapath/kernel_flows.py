"""The flows that the kernel's own conntrack knows: what a new worker takes over from a dead one.

Theory of operation. A worker's table dies with it; the kernel's lives on, and holds a confirmed
entry for every flow that some verdict has let through. A new worker dumps it over ctnetlink before
it binds its queue, so that no established connection breaks, not even after `kill -9`. A flow taken
over has no ruling: its next packet is judged by the present policy, on the tuple of the flow's
first packet, like any flow after a change. So what the kernel remembers can never open what policy
closes.

While the kernel carries flows past the workers (`offload`), the same dump, restricted to flows with
our connmark, says which of them live, until when, and what they have carried. It is read in pieces
between packets. And a generation's number must never meet a connmark of an earlier generation with
the same number: `clear_marks` sees to it, and looks again afterwards.

One dump is a sequence of netlink messages; each holds attributes (type, length, value), nested by
kind (linux/netfilter/nfnetlink_conntrack.h). `decode` and `take_over` are pure.

A translated flow (NAT) has two pairs of addresses. Our tuple is what a forwarded packet bears
between the two translations, and what policy is asked about: the source of the original tuple, and
the source of the reply tuple as destination.
"""

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

from conntrack.flow import ICMP, ICMPV6, SCTP, TCP, FlowTuple, reply
from conntrack.sctp_states import SctpState
from conntrack.tcp_states import TcpState
from conntrack.tracker import Entry, Tracker
from firewall.datapath import netlink
from firewall.datapath.marks import MaskedMark
from firewall.datapath.netlink import (
    ACK,
    ATTRIBUTE,
    ERROR,
    HEADER,
    NESTED,
    NETFILTER,
    REQUEST,
    error_code,
)

_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET
_NEW = 1 << 8  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW
_DELETE = 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE
_DUMP = 0x300  # NLM_F_DUMP
_DONE = 3  # NLMSG_DONE
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_FAMILY_HEADER_BYTES = 4  # struct nfgenmsg
_RECEIVE_BYTES = 1 << 15  # the kernel fills 32 KiB at most: about 100 flows, 1 ms to read
_CLEAR_ROUNDS = 5
_TIMEOUT_S = 5.0

_ORIGINAL, _REPLY, _STATUS, _PROTOCOL_INFO, _TIMEOUT = 1, 2, 3, 4, 7  # CTA_...
_MARK, _COUNTERS_ORIGINAL, _COUNTERS_REPLY, _ZONE, _MARK_MASK = 8, 9, 10, 18, 21
_PACKETS, _BYTES = 1, 2  # CTA_COUNTERS_...
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2  # CTA_TUPLE_...
_NUMBER, _SOURCE_PORT = 1, 2  # CTA_PROTO_...
_ICMP_ID, _ICMP_TYPE, _ICMPV6_ID, _ICMPV6_TYPE = 4, 5, 7, 8  # CTA_PROTO_...
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


class Dump:
    """One dump of the kernel's table of this network namespace, read in pieces.

    Attributes:
        ended: the kernel has said that this was all.

    Raises:
        OSError: no permission, or the kernel has no ctnetlink.
    """

    def __init__(self, mark: MaskedMark | None = None) -> None:
        """Ask for every flow, or for those whose connmark is `mark`."""
        self.ended = False
        self._socket = _connection()
        try:
            self._socket.settimeout(_TIMEOUT_S)
            body = bytes(_FAMILY_HEADER_BYTES)  # AF_UNSPEC
            if mark is not None:
                body += _number_attribute(_MARK, mark.value)
                body += _number_attribute(_MARK_MASK, mark.mask)
            self._socket.send(netlink.message(_GET, REQUEST | _DUMP, body))
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor that is readable when the next piece is there."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the dump, finished or not."""
        self._socket.close()

    def messages(self) -> Iterator[tuple[int, bytes]]:
        """Wait for the next piece; yield address family and attributes of each flow in it.

        Raises:
            OSError: the kernel refuses the dump.
        """
        data = self._socket.recv(_RECEIVE_BYTES)
        at = 0
        while at + HEADER.size <= len(data):
            length, kind, _, _, _ = HEADER.unpack_from(data, at)
            if kind == _DONE:
                self.ended = True
                return
            if kind == ERROR:
                raise OSError(-error_code(data, at), "ctnetlink refuses the dump")
            if kind == _NEW:
                start = at + HEADER.size
                yield data[start], data[start + _FAMILY_HEADER_BYTES : at + length]
            at += length + 3 & ~3

    def flows(self) -> Iterator[KernelFlow]:
        """Wait for the next piece; yield the flows in it that we can track."""
        for _, message in self.messages():
            flow = decode(message)
            if flow is not None:
                yield flow


class Inquiry:
    """Asks about one flow at a time, or changes its mark.

    The kernel answers before the question's system call returns.

    A flow is looked for by both its tuples: where one end is translated, the other tuple is ours.

    Raises:
        OSError: no permission, or the kernel has no ctnetlink.
    """

    def __init__(self) -> None:
        self._socket = _connection()
        self._socket.settimeout(_TIMEOUT_S)

    def close(self) -> None:
        """Ask no more."""
        self._socket.close()

    def state(self, flow: FlowTuple) -> int | None:
        """Return the number of a flow's TCP state (enum tcp_conntrack); None = no such flow.

        Raises:
            OSError: the kernel refuses.
        """
        for identity in _identities(flow):
            self._socket.send(netlink.message(_GET, REQUEST, identity))
            answer = self._socket.recv(_RECEIVE_BYTES)
            if HEADER.unpack_from(answer)[1] != ERROR:
                found = _attributes(answer[HEADER.size + _FAMILY_HEADER_BYTES :])
                return _state(found.get(_PROTOCOL_INFO, b""))
            code = error_code(answer)
            if code != -errno.ENOENT:
                raise OSError(-code, "ctnetlink refuses a question about a flow")
        return None

    def clear_mark(self, flow: FlowTuple, ours: int) -> bool:
        """Take our bits out of a flow's connmark; return whether the kernel knows the flow.

        Raises:
            OSError: the kernel refuses.
        """
        change = _number_attribute(_MARK, 0) + _number_attribute(_MARK_MASK, ours)
        for identity in _identities(flow):
            self._socket.send(netlink.message(_NEW, REQUEST | ACK, identity + change))
            code = error_code(self._socket.recv(_RECEIVE_BYTES))
            if not code:
                return True
            if code != -errno.ENOENT:
                raise OSError(-code, "ctnetlink refuses to change a flow's mark")
        return False


def _identities(flow: FlowTuple) -> Iterator[bytes]:
    """Yield the ways to name a flow with ports: by its first packet's tuple, or by its replies'."""
    family = socket.AF_INET if len(flow.source) == 4 else socket.AF_INET6
    first = 1 if family == socket.AF_INET else 3  # CTA_IP_V4_SRC, CTA_IP_V6_SRC
    for which, ends in ((_ORIGINAL, flow), (_REPLY, reply(flow))):
        addresses = netlink.attribute(first, ends.source) + netlink.attribute(
            first + 1, ends.destination
        )
        protocol = netlink.attribute(_NUMBER, bytes((ends.protocol,)))
        protocol += netlink.attribute(_SOURCE_PORT, ends.source_port.to_bytes(2, "big"))
        protocol += netlink.attribute(_SOURCE_PORT + 1, ends.destination_port.to_bytes(2, "big"))
        nested = netlink.attribute(_TUPLE_IP | NESTED, addresses)
        nested += netlink.attribute(_TUPLE_PROTOCOL | NESTED, protocol)
        yield bytes((family, 0, 0, 0)) + netlink.attribute(which | NESTED, nested)


def read_flows() -> Iterator[KernelFlow]:
    """Dump the kernel's table of this network namespace.

    Raises:
        OSError: no permission, or the kernel has no ctnetlink.
    """
    with closing(Dump()) as dump:
        while not dump.ended:
            yield from dump.flows()


def delete_flows(chosen: Callable[[KernelFlow], bool]) -> int:
    """Take flows out of the kernel's table; return how many.

    Raises:
        OSError: no permission, or the kernel has no ctnetlink.
    """
    count = 0
    with closing(Dump()) as dump, _connection() as changing:
        changing.settimeout(_TIMEOUT_S)
        while not dump.ended:
            for family, message in dump.messages():
                flow = decode(message)
                if flow is None or not chosen(flow):
                    continue
                body = bytes((family, 0, 0, 0)) + _identity(message)
                changing.send(netlink.message(_DELETE, REQUEST | ACK, body))
                code = error_code(changing.recv(_RECEIVE_BYTES))
                if code not in (0, -errno.ENOENT):  # it may have ended meanwhile
                    raise OSError(-code, "ctnetlink refuses to delete a flow")
                count += not code
    return count


def clear_marks(mark: MaskedMark, ours: int) -> int:
    """Take our bits out of every connmark that is `mark`; return how many there were.

    Args:
        mark: which connmarks.
        ours: the bits to clear; all others stay.

    Raises:
        OSError: the kernel does not let us, or new ones keep appearing.
    """
    count = 0
    for _ in range(_CLEAR_ROUNDS):
        found = _marked(mark)
        if not found:
            return count
        count += len(found)
        with _connection() as changing:
            for family, identity in found:
                body = bytes((family, 0, 0, 0)) + identity
                body += _number_attribute(_MARK, 0) + _number_attribute(_MARK_MASK, ours)
                # What went wrong, such as a flow that has ended meanwhile, the next round shows.
                changing.send(netlink.message(_NEW, REQUEST, body))
    raise OSError(errno.EBUSY, f"connmarks {mark} cannot be cleared")


def _connection() -> socket.socket:
    """Return a socket to ctnetlink."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETFILTER)


def _marked(mark: MaskedMark) -> list[tuple[int, bytes]]:
    """Return family and identifying attributes (tuple, zone) of the flows with a connmark."""
    found: list[tuple[int, bytes]] = []
    with closing(Dump(mark)) as dump:
        while not dump.ended:
            found += [(family, _identity(message)) for family, message in dump.messages()]
    return found


def _identity(message: bytes) -> bytes:
    """Return the attributes that name a flow to the kernel: its first packet's tuple, its zone."""
    attributes = _attributes(message)
    identity = netlink.attribute(_ORIGINAL | NESTED, attributes.get(_ORIGINAL, b""))
    if _ZONE in attributes:
        identity += netlink.attribute(_ZONE, attributes[_ZONE])
    return identity


def _number_attribute(kind: int, number: int) -> bytes:
    return netlink.attribute(kind, number.to_bytes(4, "big"))


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
        mark=_number(found.get(_MARK, b"")),
        packets=_counters(found, _PACKETS),
        bytes=_counters(found, _BYTES),
    )


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
    nested = _attributes(data)
    addresses = _attributes(nested.get(_TUPLE_IP, b""))
    protocol = _attributes(nested.get(_TUPLE_PROTOCOL, b""))
    if len(addresses) != 2 or _NUMBER not in protocol:
        return None
    number = _number(protocol[_NUMBER])
    port, kind = _number(protocol.get(_SOURCE_PORT, b"")), 0
    if number in (ICMP, ICMPV6):
        names = (_ICMP_ID, _ICMP_TYPE) if number == ICMP else (_ICMPV6_ID, _ICMPV6_TYPE)
        port, kind = (_number(protocol.get(name, b"")) for name in names)
    # Source before destination in both families: types 1 and 2, or 3 and 4.
    return _End(addresses[min(addresses)], number, port, kind)


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
