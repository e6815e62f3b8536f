"""What the kernel knows about this node: its addresses, and when they change.

Every address of the network namespace that the daemon runs in is the identity `host`. pyroute2
reads them (blocking; callers use a thread); a plain rtnetlink socket of our own tells when to read
again, because all it has to do is become readable.
"""

import contextlib
import socket
from collections.abc import Iterator
from typing import Protocol

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from conntrack.address import is_multicast, parse_address

# linux/rtnetlink.h: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR.
_GROUPS = 0x1 | 0x10 | 0x100
_READ_BYTES = 65_536


class AddressMonitor:
    """Readable (`fileno`) when a link or an address of this network namespace changed."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
            socket.NETLINK_ROUTE,
        )
        self._socket.bind((0, _GROUPS))

    def fileno(self) -> int:
        """Return the descriptor to watch."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Take the messages; what they say is read anew anyway. An overrun is a change as well."""
        with contextlib.suppress(OSError):  # EAGAIN: that was all; ENOBUFS: some were lost
            while self._socket.recv(_READ_BYTES):
                pass

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def local_addresses() -> tuple[bytes, ...]:
    """Return the packed unicast addresses of this network namespace, in order. Blocks.

    Raises:
        OSError: netlink refuses.
    """
    try:
        with IPRoute() as route:
            found = {address for message in route.get_addr() for address in _addresses(message)}
    except NetlinkError as error:
        raise OSError(error.code, f"addresses of this node: {error}") from error
    return tuple(sorted(found))


class _Message(Protocol):
    """A netlink message, as far as it is looked at."""

    def get_attr(self, name: str) -> str | None:
        """Return an attribute, None if it is not there."""


def _addresses(message: _Message) -> Iterator[bytes]:
    """Yield the address that a netlink message carries; its own one, not a peer's."""
    for name in ("IFA_LOCAL", "IFA_ADDRESS"):
        text = message.get_attr(name)
        if text:
            address = parse_address(text)
            if not is_multicast(address):
                yield address
            return
