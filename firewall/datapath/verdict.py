"""What happens to one packet, and what is worth telling about it.

The policy-level answer (`firewall.policy.verdict.Verdict`) is about a flow; this is about a packet:
it also knows packets that no policy is asked about, and how the answer is carried out.
"""

from typing import Final, NamedTuple

from conntrack.packet import Packet
from conntrack.tracker import CtState
from firewall.policy.verdict import DropReason
from firewall.policy.view import Decision


class Accept(NamedTuple):
    """Let the packet go on."""


class Drop(NamedTuple):
    """Stop the packet silently.

    Attributes:
        reason: Cilium's name for it.
        detail: what the reason alone does not say, or "".
    """

    reason: DropReason
    detail: str = ""


class Reset(NamedTuple):
    """Stop the packet, and end its TCP connection.

    Attributes:
        drop: what it counts as.
        segments: IP packets to send, which tell both ends.
    """

    drop: Drop
    segments: tuple[bytes, ...]


class Redirect(NamedTuple):
    """Hand the packet to the L7 proxy that listens on `port`."""

    port: int


class Offload(NamedTuple):
    """Let the packet go on, and have the kernel accept its flow's further packets."""


class Defer(NamedTuple):
    """Decide again after the routing decision, when translated addresses are known."""


class PassOn(NamedTuple):
    """Let the next worker look: the packet may belong to a flow that only it tracks.

    Attributes:
        otherwise: the verdict if there is no next worker.
    """

    otherwise: Accept | Drop


PacketVerdict = Accept | Drop | Reset | Redirect | PassOn | Offload | Defer


class Report(NamedTuple):
    """What an event is made of; kept apart from it because it is made after the verdict is sent.

    Attributes:
        verdict: what was done.
        packet: None if it could not be parsed; then `source` and `destination` may be empty too.
        source: packed address as it stands in the packet.
        destination: as `source`.
        interface_index: where the packet came from; 0 = from this node.
        ctstate: None if the packet was stopped before it was tracked.
        reply: whether it goes against its flow's first packet; None = not known.
        decision: what policy said, None if it was not asked.
    """

    verdict: PacketVerdict
    packet: Packet | None
    source: bytes
    destination: bytes
    interface_index: int
    ctstate: CtState | None = None
    reply: bool | None = None
    decision: Decision | None = None


class PacketDecision(NamedTuple):
    """The pipeline's whole answer.

    `report` None: nothing happened that anybody must know. That of PassOn is about its `otherwise`.
    """

    verdict: PacketVerdict
    report: Report | None


ACCEPT: Final = Accept()
"""The one value of Accept, so that the hot path may compare by identity."""

OFFLOAD: Final = Offload()
"""The one value of Offload."""

QUIETLY: Final = PacketDecision(ACCEPT, None)
"""One more packet of an accepted flow: shared, because nearly every packet gets it."""

DEFERRING: Final = PacketDecision(Defer(), None)
"""To be decided later; nothing has happened yet."""

OFFLOADING: Final = PacketDecision(OFFLOAD, None)
"""The same, with the flow given to the kernel."""
