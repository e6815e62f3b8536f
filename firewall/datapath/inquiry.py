"""Asks the kernel's conntrack about one flow at a time, or changes its mark.

Theory of operation. Our tuple of a flow is what its packets bear between two translations. If one
end is translated, one of the kernel's two tuples is ours; if both are (a service that is
masqueraded, too), none is, and the kernel cannot look it up. It can be asked for the flows that
were begun from the source's port, which is never translated on its way here; for that it goes over
its table, which takes milliseconds. So at most a twentieth of the worker's processor time is spent
on it, and what was found is remembered.
"""

import errno
import time
from collections.abc import Iterator
from contextlib import closing

from conntrack.flow import FlowTuple, reply
from firewall.datapath import netlink
from firewall.datapath.ctnetlink import (
    FAMILY_HEADER_BYTES,
    GET,
    MARK,
    MARK_MASK,
    NEW,
    begun_by,
    decode,
    identities,
    named,
    number_attribute,
    state_in,
    tuples_in,
)
from firewall.datapath.kernel_flows import RECEIVE_BYTES, TIMEOUT_S, Dump, connection
from firewall.datapath.netlink import ACK, ERROR, HEADER, REQUEST, error_code

_PAUSE_PER_WALK = 20.0
_REMEMBERED_COUNT = 1024  # flows; all are forgotten when there are more


class Inquiry:
    """Asks about one flow at a time, or changes its mark.

    The kernel answers before the question's system call returns.

    Raises:
        OSError: no permission, or the kernel has no ctnetlink.
    """

    def __init__(self) -> None:
        self._socket = connection()
        self._socket.settimeout(TIMEOUT_S)
        self._walks_at = 0.0
        self._remembered: dict[FlowTuple, FlowTuple] = {}

    def close(self) -> None:
        """Ask no more."""
        self._socket.close()

    def state(self, flow: FlowTuple) -> int | None:
        """Return the number of a flow's TCP state (enum tcp_conntrack); None = no such flow.

        Raises:
            OSError: the kernel refuses.
        """
        for identity in self._identities(flow):
            found = self._look_up(identity)
            if found is not None:
                return state_in(found)
        return None

    def clear_mark(self, flow: FlowTuple, ours: int) -> bool:
        """Take our bits out of a flow's connmark; return whether the kernel knows the flow.

        Raises:
            OSError: the kernel refuses.
        """
        return any(self._clear(identity, ours) for identity in self._identities(flow))

    def dialed(self, packet: FlowTuple) -> tuple[FlowTuple, FlowTuple] | None:
        """Return what packets that we make must bear for the kernel to translate them.

        Args:
            packet: what a packet of the flow bears between both translations.

        Returns:
            The tuples before any translation, of this packet and of its replies; None if their own
            will do.

        Raises:
            OSError: the kernel refuses.
        """
        if any(self._look_up(identity) is not None for identity in identities(packet)):
            return None
        for direction, flow in enumerate((packet, reply(packet))):
            original = self._remembered.get(flow)
            found = None if original is None else self._look_up(named(original))
            tuples = None if found is None else tuples_in(found)
            if tuples is not None:
                return tuples[direction], tuples[1 - direction]
        if self._walk(packet, reply(packet)):
            return self.dialed(packet)
        return None

    def _identities(self, flow: FlowTuple) -> Iterator[bytes]:
        """Yield the ways to name a flow to the kernel, the dear one last."""
        yield from identities(flow)
        if flow in self._remembered or self._walk(flow):
            yield named(self._remembered[flow])

    def _look_up(self, identity: bytes) -> bytes | None:
        """Return the attributes of a flow."""
        self._socket.send(netlink.message(GET, REQUEST, identity))
        answer = self._socket.recv(RECEIVE_BYTES)
        if HEADER.unpack_from(answer)[1] != ERROR:
            return answer[HEADER.size + FAMILY_HEADER_BYTES :]
        code = error_code(answer)
        if code != -errno.ENOENT:
            raise OSError(-code, "ctnetlink refuses a question about a flow")
        return None

    def _walk(self, *flows: FlowTuple) -> bool:
        """Look for flows both ends of which are translated; return whether one was found."""
        if time.monotonic() < self._walks_at:
            return False
        began_at = time.thread_time()
        if len(self._remembered) >= _REMEMBERED_COUNT:
            self._remembered.clear()
        found = False
        for flow in flows:
            self._remembered.pop(flow, None)
            with closing(Dump(chosen=begun_by(flow))) as dump:
                while not dump.ended:
                    for _, message in dump.messages():
                        known, tuples = decode(message), tuples_in(message)
                        if known is not None and tuples is not None and known.original == flow:
                            self._remembered[flow] = tuples[0]
                            found = True
        cost_s = time.thread_time() - began_at
        self._walks_at = time.monotonic() + _PAUSE_PER_WALK * cost_s
        return found

    def _clear(self, identity: bytes, ours: int) -> bool:
        """Clear the mark of a flow; return whether the kernel knows it."""
        change = number_attribute(MARK, 0) + number_attribute(MARK_MASK, ours)
        self._socket.send(netlink.message(NEW, REQUEST | ACK, identity + change))
        code = error_code(self._socket.recv(RECEIVE_BYTES))
        if code not in (0, -errno.ENOENT):
            raise OSError(-code, "ctnetlink refuses to change a flow's mark")
        return not code
