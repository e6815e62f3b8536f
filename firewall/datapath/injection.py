"""Sends segments that we have made to where the ends of their connections find them.

Where the kernel translates a connection (NAT), what we send must bear the addresses that its ends
dialed, or it would meet nobody; the kernel is asked for them.
"""

from collections.abc import Iterable

from conntrack.flow import FlowTuple, reply
from firewall.datapath.inquiry import Inquiry
from firewall.datapath.raw import RawSender
from firewall.datapath.reset import ends_of, readdressed
from firewall.datapath.troubles import Troubles


class Injector:
    """Of one worker.

    Args:
        mark: of the packets, so that no rule of ours queues them.
        inquiry: asks the kernel about flows.
        troubles: the worker's.
    """

    def __init__(self, mark: int, inquiry: Inquiry, troubles: Troubles) -> None:
        self._sender = RawSender(mark)
        self._inquiry = inquiry
        self._troubles = troubles

    def send(self, segments: Iterable[bytes]) -> None:
        """Send segments, whole IP packets that bear what they have between both translations."""
        dialed: dict[FlowTuple, FlowTuple | None] = {}
        for segment in segments:
            ends = ends_of(segment)
            if ends not in dialed:
                dialed[ends], dialed[reply(ends)] = self._dialed(ends)
            before = dialed[ends]
            made = segment if before is None else readdressed(segment, before)
            self._sender.send(made, ends.destination)

    def close(self) -> None:
        """Send no more."""
        self._sender.close()

    def _dialed(self, ends: FlowTuple) -> tuple[FlowTuple | None, FlowTuple | None]:
        """Return what packets of a connection bear before they are translated; None = the same."""
        try:
            return self._inquiry.dialed(ends) or (None, None)
        except OSError as error:
            self._troubles.complain("the kernel cannot be asked about a flow", error)
            return None, None
