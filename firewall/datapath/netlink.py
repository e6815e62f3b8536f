"""Netlink messages to netfilter, as bytes (linux/netlink.h, linux/netfilter/nfnetlink.h). Pure."""

import struct
from collections.abc import Iterator
from typing import Final

HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""

ATTRIBUTE: Final = struct.Struct("=HH")
"""struct nlattr: length, type."""

NESTED: Final = 0x8000
"""Flag of an attribute that holds attributes (NLA_F_NESTED)."""

SOL_NETLINK: Final = 270
"""The level of netlink's socket options (linux/socket.h)."""

NETFILTER: Final = 12
"""The protocol of sockets to netfilter (NETLINK_NETFILTER)."""

REQUEST: Final = 0x1
"""Flag of every message to the kernel (NLM_F_REQUEST)."""

ACK: Final = 0x4
"""Flag: the kernel shall answer also if all is well (NLM_F_ACK)."""

ERROR: Final = 2
"""Type of the kernel's answer to a request (NLMSG_ERROR)."""

_CODE: Final = struct.Struct("=i")  # struct nlmsgerr


def message(kind: int, flags: int, body: bytes, sequence: int = 0) -> bytes:
    """Return a message; `body` begins with a struct nfgenmsg."""
    return HEADER.pack(HEADER.size + len(body), kind, flags, sequence, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield type, begin and end of each message; one that states less than a header ends them."""
    at = 0
    while at + HEADER.size <= len(data):
        length, kind, _, _, _ = HEADER.unpack_from(data, at)
        if length < HEADER.size:
            return
        yield kind, at, at + length
        at += length + 3 & ~3


def error_code(data: bytes, at: int = 0) -> int:
    """Return what the answer of type `ERROR` at this offset says: 0, or a negative errno."""
    code: int = _CODE.unpack_from(data, at + HEADER.size)[0]
    return code


def attribute(kind: int, data: bytes) -> bytes:
    """Return an attribute, padded to 4 bytes."""
    padding = bytes(-len(data) % 4)
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(data), kind) + data + padding
