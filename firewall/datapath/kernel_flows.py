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

One dump is a sequence of netlink messages (`ctnetlink`), read a piece at a time.
"""

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import closing

from firewall.datapath import netlink
from firewall.datapath.ctnetlink import (
    DELETE,
    FAMILY_HEADER_BYTES,
    GET,
    MARK,
    MARK_MASK,
    NEW,
    KernelFlow,
    decode,
    identity_of,
    number_attribute,
)
from firewall.datapath.marks import MaskedMark
from firewall.datapath.netlink import ACK, ERROR, HEADER, NETFILTER, REQUEST, error_code

_DUMP = 0x300  # NLM_F_DUMP
_DONE = 3  # NLMSG_DONE
RECEIVE_BYTES = 1 << 15  # the kernel fills 32 KiB at most: about 100 flows, 1 ms to read
_CLEAR_ROUNDS = 5
TIMEOUT_S = 5.0


class Dump:
    """One dump of the kernel's table of this network namespace, read in pieces.

    Attributes:
        ended: the kernel has said that this was all.

    Raises:
        OSError: no permission, or the kernel has no ctnetlink.
    """

    def __init__(self, mark: MaskedMark | None = None, *, chosen: bytes = b"") -> None:
        """Ask for every flow; for those whose connmark is `mark`; or as `chosen` has it."""
        self.ended = False
        self._socket = connection()
        try:
            self._socket.settimeout(TIMEOUT_S)
            body = chosen or bytes(FAMILY_HEADER_BYTES)  # AF_UNSPEC
            if mark is not None:
                body += number_attribute(MARK, mark.value)
                body += number_attribute(MARK_MASK, mark.mask)
            self._socket.send(netlink.message(GET, REQUEST | _DUMP, body))
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
        data = self._socket.recv(RECEIVE_BYTES)
        for kind, at, end in netlink.messages(data):
            if kind == _DONE:
                self.ended = True
                return
            if kind == ERROR:
                raise OSError(-error_code(data, at), "ctnetlink refuses the dump")
            if kind == NEW:
                start = at + HEADER.size
                yield data[start], data[start + FAMILY_HEADER_BYTES : end]

    def flows(self) -> Iterator[KernelFlow]:
        """Wait for the next piece; yield the flows in it that we can track."""
        for _, message in self.messages():
            flow = decode(message)
            if flow is not None:
                yield flow


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
    with closing(Dump()) as dump, connection() as changing:
        changing.settimeout(TIMEOUT_S)
        while not dump.ended:
            for family, message in dump.messages():
                flow = decode(message)
                if flow is None or not chosen(flow):
                    continue
                body = bytes((family, 0, 0, 0)) + identity_of(message)
                changing.send(netlink.message(DELETE, REQUEST | ACK, body))
                code = error_code(changing.recv(RECEIVE_BYTES))
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
        with connection() as changing:
            for family, identity in found:
                body = bytes((family, 0, 0, 0)) + identity
                body += number_attribute(MARK, 0) + number_attribute(MARK_MASK, ours)
                # What went wrong, such as a flow that has ended meanwhile, the next round shows.
                changing.send(netlink.message(NEW, REQUEST, body))
    raise OSError(errno.EBUSY, f"connmarks {mark} cannot be cleared")


def connection() -> socket.socket:
    """Return a socket to ctnetlink."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETFILTER)


def _marked(mark: MaskedMark) -> list[tuple[int, bytes]]:
    """Return family and identifying attributes (tuple, zone) of the flows with a connmark."""
    found: list[tuple[int, bytes]] = []
    with closing(Dump(mark)) as dump:
        while not dump.ended:
            found += [(family, identity_of(message)) for family, message in dump.messages()]
    return found
