"""The flows that the kernel's own conntrack knows: what a new worker takes over from a dead one.

Theory of operation. A worker's table dies with it; the kernel's lives on, and holds a confirmed
entry for every flow that some verdict has let through. A new worker dumps it over ctnetlink before
it binds its queue, so that no established connection breaks, not even after `kill -9`. A flow taken
over has no ruling: its next packet is judged by the present policy, on the tuple of the flow's
first packet, like any flow after a change. So what the kernel remembers can never open what policy
closes.

One dump is a sequence of netlink messages; each holds attributes (type, length, value), nested by
kind (linux/netfilter/nfnetlink_conntrack.h). `decode` and `take_over` are pure.
"""

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from conntrack.flow import ICMP, ICMPV6, SCTP, TCP, FlowTuple
from conntrack.sctp_states import SctpState
from conntrack.tcp_states import TcpState
from conntrack.tracker import Tracker

_NETLINK_NETFILTER = 12  # linux/netlink.h
_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET
_NEW = 1 << 8  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW
_REQUEST_DUMP = 0x1 | 0x300  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_FAMILY_HEADER_BYTES = 4  # struct nfgenmsg
_RECEIVE_BYTES = 1 << 18
_TIMEOUT_S = 5.0

_ORIGINAL, _STATUS, _PROTOCOL_INFO, _TIMEOUT = 1, 3, 4, 7  # CTA_...
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2  # CTA_TUPLE_...
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3  # CTA_PROTO_...
_ICMP_ID, _ICMP_TYPE, _ICMPV6_ID, _ICMPV6_TYPE = 4, 5, 7, 8  # CTA_PROTO_...
_SEEN_REPLY, _ASSURED, _DYING = 1 << 1, 1 << 2, 1 << 9  # IPS_..., nf_conntrack_common.h


# Our states have the kernel's numbers (enum tcp_conntrack, enum sctp_conntrack).
_TCP_TAKEN = frozenset(range(TcpState.ESTABLISHED, TcpState.TIME_WAIT))
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
    """

    original: FlowTuple
    icmp_type: int
    state: int
    timeout_s: int
    seen_reply: bool
    assured: bool


def read_flows() -> Iterator[KernelFlow]:
    """Dump the kernel's table of this network namespace.

    Raises:
        OSError: no permission, or the kernel has no ctnetlink.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as asking:
        asking.settimeout(_TIMEOUT_S)
        every_family = bytes(_FAMILY_HEADER_BYTES)  # AF_UNSPEC
        length = _HEADER.size + len(every_family)
        asking.send(_HEADER.pack(length, _GET, _REQUEST_DUMP, 0, 0) + every_family)
        while True:
            data = asking.recv(_RECEIVE_BYTES)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, at)
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    code: int = struct.unpack_from("=i", data, at + _HEADER.size)[0]
                    raise OSError(-code, "ctnetlink refuses the dump")
                if kind == _NEW:
                    start = at + _HEADER.size + _FAMILY_HEADER_BYTES
                    flow = decode(data[start : at + length])
                    if flow is not None:
                        yield flow
                at += length + 3 & ~3


def take_over(flow: KernelFlow, tracker: Tracker, now: float) -> bool:
    """Give a flow of the kernel to our tracker; say whether it was taken.

    Flows that are being opened or have ended are left out: the ends repeat what is needed.
    """
    protocol = flow.original.protocol
    timeouts = tracker.profile.timeouts
    timeout_s = float(flow.timeout_s)
    state = 0
    if protocol == TCP:
        if flow.state not in _TCP_TAKEN:
            return False
        state, timeout_s = flow.state, min(timeout_s, timeouts.tcp[flow.state])
    elif protocol == SCTP:
        if flow.state not in _SCTP_TAKEN:
            return False
        state, timeout_s = flow.state, min(timeout_s, timeouts.sctp[flow.state])
    entry = tracker.restore(
        flow.original,
        now,
        timeout_s=timeout_s,
        state=state,
        seen_reply=flow.seen_reply,
        assured=flow.assured,
        icmp_type=flow.icmp_type,
    )
    return entry is not None


def decode(message: bytes) -> KernelFlow | None:
    """Read the attributes of one entry; None if it is dying or of a kind that we do not track."""
    found = _attributes(message)
    status = _number(found.get(_STATUS, b""))
    nested = _attributes(found.get(_ORIGINAL, b""))
    addresses = _attributes(nested.get(_TUPLE_IP, b""))
    protocol = _attributes(nested.get(_TUPLE_PROTOCOL, b""))
    if status & _DYING or len(addresses) != 2 or _NUMBER not in protocol:
        return None
    # Source before destination in both families: types 1 and 2, or 3 and 4.
    source, destination = (addresses[kind] for kind in sorted(addresses))
    number = _number(protocol[_NUMBER])
    kind = 0
    if number in (ICMP, ICMPV6):
        names = (_ICMP_ID, _ICMP_TYPE) if number == ICMP else (_ICMPV6_ID, _ICMPV6_TYPE)
        identifier, kind = (_number(protocol.get(name, b"")) for name in names)
        ports = identifier, identifier
    else:
        ports = (
            _number(protocol.get(_SOURCE_PORT, b"")),
            _number(protocol.get(_DESTINATION_PORT, b"")),
        )
    return KernelFlow(
        original=FlowTuple(source, destination, number, *ports),
        icmp_type=kind,
        state=_state(found.get(_PROTOCOL_INFO, b"")),
        timeout_s=_number(found.get(_TIMEOUT, b"")),
        seen_reply=bool(status & _SEEN_REPLY),
        assured=bool(status & _ASSURED),
    )


def _state(info: bytes) -> int:
    """Return the state within CTA_PROTOINFO: the first attribute of whichever protocol it is."""
    for of_protocol in _attributes(info).values():
        return _number(_attributes(of_protocol).get(1, b""))
    return 0


def _attributes(data: bytes) -> dict[int, bytes]:
    """Split netlink attributes, which are aligned to 4 bytes; one that leaves `data` ends them."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            break
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
    return found


def _number(data: bytes) -> int:
    """Read a big-endian number of whatever width; absent = 0."""
    return int.from_bytes(data, "big")
