"""Packets of which only the kernel knows what they have done to their flow. Pure.

Theory of operation. The worker does not know the numbers of a TCP flow that the kernel carries, or
that it has taken over from a dead worker and not heard of since. The kernel's own tracker does, and
it has judged every packet before it came here. What it calls INVALID is dropped. But some packets
that it lets pass it does not believe: a reset inside the window but not at its edge, which the
receiver will challenge (RFC 5961 section 3.2), or a FIN from before the window. So after a reset or
FIN of such a flow, and after its verdict, the kernel is asked which state the flow is in now.

Of an ICMP error about such a flow it does not compare the quoted number (RFC 5927 section 4.1). The
error is dropped, but a flow that the kernel carries is brought back: the worker learns its numbers
from the next segment, and the next error about one, which is sent again as long as it is not
acknowledged, is judged exactly.

The worker asks and tells the kernel (`inquiry`), once per doubt, between two turns.
"""

from enum import IntEnum
from typing import Final, NamedTuple

from conntrack.tcp_states import TcpState
from conntrack.tracker import Entry, Tracker

_ESTABLISHED: Final = int(TcpState.ESTABLISHED)
_CLOSE: Final = int(TcpState.CLOSE)


class Cause(IntEnum):
    """What kind of packet raises a doubt."""

    FIN = 0
    RESET = 1
    QUOTED = 2
    """An ICMP error: the flow is to be brought back."""


class Doubt(NamedTuple):
    """A flow, and the packet that has left it uncertain."""

    entry: Entry
    cause: Cause


class Doubts:
    """The doubts of one turn."""

    __slots__ = ("_open", "_tracker")

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._open: list[Doubt] = []

    def __len__(self) -> int:
        return len(self._open)

    def note(self, entry: Entry, cause: Cause) -> None:
        """Remember to ask about a flow."""
        self._open.append(Doubt(entry, cause))

    def take(self) -> list[Doubt]:
        """Return the doubts about flows that still exist, and forget them."""
        taken, self._open = self._open, []
        return [doubt for doubt in taken if doubt.entry.serial >= 0]

    def settle(self, doubt: Doubt, state: int | None, now: float) -> None:
        """Go by the kernel's state of a flow after a reset or FIN; None = it knows no such flow.

        The kernel may be ahead: it has seen what still waits in the queue.
        """
        entry = doubt.entry
        if state == _ESTABLISHED:
            if entry.state != _ESTABLISHED:
                self._tracker.settle(entry, state, now)
        elif doubt.cause is Cause.RESET and (state is None or state == _CLOSE):
            self._tracker.settle(entry, state, now)
