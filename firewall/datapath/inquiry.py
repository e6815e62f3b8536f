"""Asks the kernel's conntrack about one flow at a time, or changes its mark."""

import errno

from conntrack.flow import FlowTuple
from firewall.datapath import netlink
from firewall.datapath.ctnetlink import (
    FAMILY_HEADER_BYTES,
    GET,
    MARK,
    MARK_MASK,
    NEW,
    identities,
    number_attribute,
    state_in,
)
from firewall.datapath.kernel_flows import RECEIVE_BYTES, TIMEOUT_S, connection
from firewall.datapath.netlink import ACK, ERROR, HEADER, REQUEST, error_code


class Inquiry:
    """Asks about one flow at a time, or changes its mark.

    The kernel answers before the question's system call returns. A flow is looked for by both its
    tuples: where one end is translated, the other tuple is ours.

    Raises:
        OSError: no permission, or the kernel has no ctnetlink.
    """

    def __init__(self) -> None:
        self._socket = connection()
        self._socket.settimeout(TIMEOUT_S)

    def close(self) -> None:
        """Ask no more."""
        self._socket.close()

    def state(self, flow: FlowTuple) -> int | None:
        """Return the number of a flow's TCP state (enum tcp_conntrack); None = no such flow.

        Raises:
            OSError: the kernel refuses.
        """
        for identity in identities(flow):
            self._socket.send(netlink.message(GET, REQUEST, identity))
            answer = self._socket.recv(RECEIVE_BYTES)
            if HEADER.unpack_from(answer)[1] != ERROR:
                return state_in(answer[HEADER.size + FAMILY_HEADER_BYTES :])
            code = error_code(answer)
            if code != -errno.ENOENT:
                raise OSError(-code, "ctnetlink refuses a question about a flow")
        return None

    def clear_mark(self, flow: FlowTuple, ours: int) -> bool:
        """Take our bits out of a flow's connmark; return whether the kernel knows the flow.

        Raises:
            OSError: the kernel refuses.
        """
        change = number_attribute(MARK, 0) + number_attribute(MARK_MASK, ours)
        for identity in identities(flow):
            self._socket.send(netlink.message(NEW, REQUEST | ACK, identity + change))
            code = error_code(self._socket.recv(RECEIVE_BYTES))
            if not code:
                return True
            if code != -errno.ENOENT:
                raise OSError(-code, "ctnetlink refuses to change a flow's mark")
        return False
