"""Messages of nfnetlink_queue: what the kernel tells of a packet, and how it is answered. Pure.

A message is a struct nlmsghdr, a struct nfgenmsg and attributes (`netlink`, and
linux/netfilter/nfnetlink_queue.h). Headers, those of attributes too, are in the machine's byte
order, values in the network's.

Nearly every packet comes from an Ethernet link and bears no mark. Then interface and sender's link
address come first, and the packet itself comes last, with the state of its checksum before it or
not: two layouts that one `Struct` recognises. All others are walked.
"""

from struct import Struct
from typing import Final

from firewall.datapath.netlink import ACK, ATTRIBUTE, ERROR, HEADER, REQUEST, attribute, message

QueuedPacket = tuple[int, int, int, int, int, bytes]
"""What the kernel tells of a packet:

- its number in its queue, which rises with every packet;
- the hook: NF_INET_PRE_ROUTING (0) to NF_INET_POST_ROUTING (4), linux/netfilter.h;
- the index of the interface where it arrived, 0 = sent by this node;
- the index of the port of the bridge where it arrived, 0 = through no bridge;
- its mark;
- its copied head, from the IP header on.
"""

METADATA_BYTES: Final = 208
"""More than comes with a packet: 136, with everything that Linux 6.18 tells without being asked.
With the usual 256 bytes of packet it makes what CPython's own allocator has (512 bytes)."""

_QUEUE: Final = Struct("!BBH")  # struct nfgenmsg: family, version, queue
_NUMBER: Final = Struct("!I")
_ATTRIBUTES_AT: Final = HEADER.size + _QUEUE.size

_ERROR_TYPE: Final = Struct("=H").pack(ERROR)
_SUBSYSTEM: Final = 3 << 8  # NFNL_SUBSYS_QUEUE
_VERDICT: Final = _SUBSYSTEM | 1  # NFQNL_MSG_VERDICT
_CONFIG: Final = _SUBSYSTEM | 2  # NFQNL_MSG_CONFIG
_VERDICT_BATCH: Final = _SUBSYSTEM | 3  # NFQNL_MSG_VERDICT_BATCH
_UNSPECIFIED: Final = 0  # AF_UNSPEC

# --- packets ------------------------------------------------------------------------------------

_MARK: Final = 3  # NFQA_MARK
_INDEV: Final = 5  # NFQA_IFINDEX_INDEV
_PHYSINDEV: Final = 7  # NFQA_IFINDEX_PHYSINDEV
_HWADDR: Final = 9  # NFQA_HWADDR
_PAYLOAD: Final = 10  # NFQA_PAYLOAD
_SKB_INFO: Final = 14  # NFQA_SKB_INFO

# NFQA_PACKET_HDR is always the first attribute (struct nfqnl_msg_packet_hdr: number, protocol,
# hook); behind it, at byte 36, the interface, if there is one.
_PACKET: Final = Struct("!24xIxxB")
_PLACE: Final = Struct("!24xIxxBx4xI")

# The types of the attributes at bytes 32 and 40, and lengths and types of those at 56 and 64.
_LAYOUT: Final = Struct("=34xH6xH12xHH4xHH")
_LAYOUT_BYTES: Final = _LAYOUT.size


def is_error(data: bytes) -> bool:
    """Say whether a message is the kernel's answer to a request (NLMSG_ERROR), not a packet."""
    return data[4:6] == _ERROR_TYPE


def read_packet(data: bytes) -> QueuedPacket:
    """Read NFQNL_MSG_PACKET.

    Args:
        data: the message as it was received. If it was cut, so is the packet, and shorter than
            it states.
    """
    if len(data) >= _LAYOUT_BYTES:
        first, second, size, third, last_size, last = _LAYOUT.unpack_from(data)
        if first == _INDEV and second == _HWADDR:
            number, hook, indev = _PLACE.unpack_from(data)
            if third == _PAYLOAD:
                return number, hook, indev, 0, 0, data[60 : 56 + size]
            if third == _SKB_INFO and last == _PAYLOAD:
                return number, hook, indev, 0, 0, data[68 : 64 + last_size]
    return _walked(data)


def _walked(data: bytes) -> QueuedPacket:
    """Read NFQNL_MSG_PACKET in any layout; what is not stated is 0, or empty."""
    number, hook = _PACKET.unpack_from(data)
    indev = physindev = mark = 0
    payload = b""
    at = _ATTRIBUTES_AT
    end = len(data)
    while at + ATTRIBUTE.size <= end:
        size, kind = ATTRIBUTE.unpack_from(data, at)
        value = data[at + ATTRIBUTE.size : at + size]
        if kind == _PAYLOAD:
            payload = value
        elif kind == _INDEV:
            indev = int.from_bytes(value, "big")
        elif kind == _PHYSINDEV:
            physindev = int.from_bytes(value, "big")
        elif kind == _MARK:
            mark = int.from_bytes(value, "big")
        at += max(size + 3 & ~3, ATTRIBUTE.size)
    return number, hook, indev, physindev, mark, payload


# --- verdicts -----------------------------------------------------------------------------------

_DROP: Final = 0  # NF_DROP, linux/netfilter.h
_ACCEPT: Final = 1  # NF_ACCEPT
_REPEAT: Final = 4  # NF_REPEAT
_VERDICT_HDR: Final = 2  # NFQA_VERDICT_HDR
_VERDICT_BODY: Final = Struct("!II")  # struct nfqnl_msg_verdict_hdr: verdict, packet number
_VERDICT_BYTES: Final = ATTRIBUTE.size + _VERDICT_BODY.size
_MARK_BYTES: Final = ATTRIBUTE.size + _NUMBER.size
_MARK_HEAD: Final = ATTRIBUTE.pack(_MARK_BYTES, _MARK)


class Verdicts:
    """Writes the verdict messages of one queue; the kernel takes any number of them in one send."""

    __slots__ = ("_batch_head", "_head", "_head_with_mark")

    def __init__(self, queue: int) -> None:
        self._batch_head = _verdict_head(_VERDICT_BATCH, queue, _VERDICT_BYTES)
        self._head = _verdict_head(_VERDICT, queue, _VERDICT_BYTES)
        self._head_with_mark = _verdict_head(_VERDICT, queue, _VERDICT_BYTES + _MARK_BYTES)

    def accept_up_to(self, number: int) -> bytes:
        """Accept all packets that wait, up to this one."""
        return self._batch_head + _VERDICT_BODY.pack(_ACCEPT, number)

    def drop(self, number: int) -> bytes:
        """Drop one packet."""
        return self._head + _VERDICT_BODY.pack(_DROP, number)

    def accept(self, number: int, mark: int) -> bytes:
        """Accept one packet, with this mark from now on."""
        return self._marked(_ACCEPT, number, mark)

    def repeat(self, number: int, mark: int) -> bytes:
        """Send one packet through the rules of its hook once more, with this mark."""
        return self._marked(_REPEAT, number, mark)

    def _marked(self, verdict: int, number: int, mark: int) -> bytes:
        body = _VERDICT_BODY.pack(verdict, number) + _MARK_HEAD + _NUMBER.pack(mark)
        return self._head_with_mark + body


def _verdict_head(kind: int, queue: int, body_bytes: int) -> bytes:
    """Return what precedes verdict and packet number in a verdict message of this queue."""
    body = _QUEUE.pack(_UNSPECIFIED, 0, queue) + ATTRIBUTE.pack(_VERDICT_BYTES, _VERDICT_HDR)
    whole = message(kind, REQUEST, body + bytes(body_bytes - ATTRIBUTE.size))
    return whole[: HEADER.size + len(body)]


# --- configuration ------------------------------------------------------------------------------

_CFG_MASK: Final = 4  # NFQA_CFG_MASK
_CFG_FLAGS: Final = 5  # NFQA_CFG_FLAGS
FLAG_GSO: Final = 1 << 2  # NFQA_CFG_F_GSO


def flags_message(queue: int, flags: int) -> bytes:
    """Return NFQNL_MSG_CONFIG that sets these flags and no others."""
    body = _QUEUE.pack(_UNSPECIFIED, 0, queue)
    for kind in (_CFG_FLAGS, _CFG_MASK):
        body += attribute(kind, _NUMBER.pack(flags))
    return message(_CONFIG, REQUEST | ACK, body)
