"""Sends packets that we made, as they are, from addresses that are not ours (raw(7))."""

import logging
import socket

from conntrack.address import format_address

log = logging.getLogger(__name__)


class RawSender:
    """Two raw sockets, whose packets bear `mark`, so that no rule of ours queues them.

    A machine that has no IPv6, or does not give us raw sockets, is said once; what would be sent
    there is not.
    """

    def __init__(self, mark: int) -> None:
        self._sockets: dict[int, socket.socket] = {}
        for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
            try:
                sock = socket.socket(
                    family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW
                )
            except OSError as error:
                log.warning("no raw IPv%d socket: %s; connections are not reset", version, error)
                continue
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            self._sockets[version] = sock

    def send(self, packet: bytes, towards: bytes) -> None:
        """Send a whole IP packet without options; errors are nobody's.

        Args:
            packet: with any addresses.
            towards: the packed address by which it is routed, which need not be the packet's.
        """
        sock = self._sockets.get(packet[0] >> 4)
        if sock is None:
            return
        try:
            sock.sendto(packet, (format_address(towards), 0))
        except OSError as error:  # no route, a full buffer: the ends find out by time
            log.debug("reset not sent: %s", error)

    def close(self) -> None:
        """Close both."""
        for sock in self._sockets.values():
            sock.close()
