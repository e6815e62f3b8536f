"""Netlink messages to netfilter, as bytes (linux/netlink.h, linux/netfilter/nfnetlink.h). Pure."""

import struct
from typing import Final

HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""

ATTRIBUTE: Final = struct.Struct("=HH")
"""struct nlattr: length, type."""

NESTED: Final = 0x8000
"""Flag of an attribute that holds attributes (NLA_F_NESTED)."""


def message(kind: int, flags: int, body: bytes, sequence: int = 0) -> bytes:
    """Return a message; `body` begins with a struct nfgenmsg."""
    return HEADER.pack(HEADER.size + len(body), kind, flags, sequence, 0) + body


def attribute(kind: int, data: bytes) -> bytes:
    """Return an attribute, padded to 4 bytes."""
    padding = bytes(-len(data) % 4)
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(data), kind) + data + padding
