"""When somebody takes rules away: nftables tells, whoever does it (`nft`, `iptables-nft`).

A service that begins with `flush ruleset` (Debian's nftables.service, when it is restarted) would
leave the firewall open until the next look at the rules. iptables-legacy has no such events.
"""

import socket

from firewall.datapath import netlink
from firewall.datapath.netlink import NETFILTER, SOL_NETLINK

_ADD_MEMBERSHIP = 1  # NETLINK_ADD_MEMBERSHIP, linux/netlink.h
_GROUP = 7  # NFNLGRP_NFTABLES, linux/netfilter/nfnetlink.h
_DELETIONS = frozenset(10 << 8 | kind for kind in (2, 5, 8))
"""NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE, DELCHAIN, DELRULE (linux/netfilter/nf_tables.h)."""
_READ_BYTES = 65_536


class RuleMonitor:
    """Readable (`fileno`) when rules of this network namespace changed.

    Raises:
        OSError: the kernel has no nftables, or no permission.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
            NETFILTER,
        )
        try:
            self._socket.bind((0, 0))  # a socket without a number of its own hears nothing
            self._socket.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor to watch."""
        return self._socket.fileno()

    def drain(self) -> bool:
        """Take the messages; return whether something was deleted, by us or others."""
        deleted = False
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return deleted
            except OSError:  # ENOBUFS: some were lost
                return True
            deleted = deleted or deletes(data)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def deletes(data: bytes) -> bool:
    """Return whether one of the messages says that a table, chain or rule is gone. Pure."""
    return any(kind in _DELETIONS for kind, _, _ in netlink.messages(data))
