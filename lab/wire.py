"""A host's end of its link, as bytes: send any packet, see every packet that arrived.

Packets are layer-3 bytes, as scapy's `bytes(IP(...)/...)` gives them; the Ethernet header is ours.
Nothing here waits by sleeping: what is awaited has a deadline, and the wait ends when it comes.

Source: packet(7).
"""

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from lab.closing import Closing

ETH_P_ALL = 0x0003
ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
"""EtherTypes, from linux/if_ether.h."""

_SOL_PACKET = 263
_PACKET_IGNORE_OUTGOING = 23
_SO_RCVBUFFORCE = 33
_RECEIVE_BUFFER_BYTES = 4 * 1024 * 1024
_ETHERNET = struct.Struct("!6s6sH")


class NothingArrivedError(TimeoutError):
    """The awaited packet did not come; `seen` holds those that did, oldest first."""

    def __init__(self, what: str, within_s: float, seen: list[bytes]) -> None:
        arrived = "".join(f"\n  {packet[:80].hex()}" for packet in seen)
        super().__init__(f"{what} within {within_s} s; {len(seen)} other packets came{arrived}")
        self.seen = seen


class Link(NamedTuple):
    """One veth pair. `interface` is the node's end; MACs are 6 bytes."""

    interface: str
    node_mac: bytes
    host_mac: bytes


def frame(link: Link, packet: bytes, ethertype: int | None = None) -> bytes:
    """The Ethernet frame that carries `packet` from the host to the node.

    `ethertype` None = by the version nibble: 6 is IPv6, everything else is called IPv4.
    """
    if ethertype is None:
        ethertype = ETH_P_IPV6 if packet[:1] and packet[0] >> 4 == 6 else ETH_P_IP
    return _ETHERNET.pack(link.node_mac, link.host_mac, ethertype) + packet


class Capture(Closing):
    """Every IP packet that arrives at a host from now on, in order.

    `packets` holds those that were read so far. Its own socket sees packets before the host's
    stack does, so also those that nobody there listens for.
    """

    def __init__(self, tap: socket.socket, interface: str) -> None:
        """Take over `tap`, an AF_PACKET socket of the host's namespace."""
        self._tap = tap
        self.packets: list[bytes] = []
        self._poll = select.poll()
        tap.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        # More than net.core.rmem_max allows is for real root only; the default serves as well.
        with contextlib.suppress(PermissionError):
            tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
        tap.bind((interface, ETH_P_ALL))
        tap.setblocking(False)
        self._poll.register(tap, select.POLLIN)

    def close(self) -> None:
        """Stop listening; what has arrived until now can still be asked for."""
        self._read()
        self._tap.close()

    def _read(self) -> list[bytes]:
        fresh = []
        while True:
            try:
                data = self._tap.recv(65535 + _ETHERNET.size)
            except BlockingIOError:
                break
            except OSError:
                break
            _, _, ethertype = _ETHERNET.unpack_from(data)
            if ethertype in (ETH_P_IP, ETH_P_IPV6):
                fresh.append(data[_ETHERNET.size :])
        self.packets += fresh
        return fresh

    def expect(
        self,
        matches: Callable[[bytes], bool],
        within_s: float = 30.0,
        *,
        what: str = "no matching packet",
    ) -> bytes:
        """The first packet since the capture began, or yet to come, that `matches`.

        Raises:
            NothingArrivedError: none came in time.
        """
        for packet in self.packets:
            if matches(packet):
                return packet
        deadline = time.monotonic() + within_s
        while (left_s := deadline - time.monotonic()) > 0:
            self._poll.poll(left_s * 1000)
            for packet in self._read():
                if matches(packet):
                    return packet
        raise NothingArrivedError(what, within_s, self.packets)

    def so_far(self) -> list[bytes]:
        """All packets that have arrived since the capture began; does not wait."""
        self._read()
        return list(self.packets)
