"""TCP flows whose windows are unknown: picked up, restored, carried by the kernel meanwhile.

They learn them from the next segment; the scale is then taken as 14, the largest, so that no
genuine segment is refused.
"""

from typing import Final

from conntrack.entry import REOPENS, Entry, Judgement, Update, invalid, passes
from conntrack.packet import Packet
from conntrack.profile import Profile
from conntrack.tcp_states import IG, IV, NW, STRICT_TABLE, TcpEvent
from conntrack.tcp_window import (
    ACKED,
    LEARNT,
    MAX_SCALE,
    MODULUS_MASK,
    NO_FIN,
    UNACKNOWLEDGED,
    Window,
    segment_end,
)

_FIN: Final = 0x01
_EVENT_RST: Final = int(TcpEvent.RST)
_LARGEST_WINDOW: Final = 0xFFFF << MAX_SCALE  # bytes; RFC 7323 section 2.3


def learn(
    packet: Packet, direction: int, known: tuple[Window, Window] | None = None
) -> tuple[Window, Window]:
    """Windows of a flow that is met in its middle.

    Generous where nothing is known: the scale may be 14, and each side may have sent a whole window
    that was not seen, its sender, too, if the segment is a repeated one (`LEARNT`). What the
    handshake has told (scales, largest windows, FINs) still holds.
    """
    if known is None:
        own = other = Window(0, 0, _LARGEST_WINDOW, 0, MAX_SCALE, 0, 0, NO_FIN)
    else:
        own, other = known[direction], known[1 - direction]
    end = segment_end(packet.sequence, packet.payload_bytes, packet.tcp_flags & ~_FIN)
    acknowledgment = packet.acknowledgment
    window = max(packet.window << own.scale, own.max_window if known is not None else 1)
    granted = (acknowledgment + window) & MODULUS_MASK
    sender = own._replace(
        end=end,
        max_end=(end + other.max_window) & MODULUS_MASK,
        max_window=window,
        max_ack=acknowledgment,
        flags=(own.flags | ACKED | LEARNT) & ~UNACKNOWLEDGED,
        initial=packet.sequence,
    )
    receiver = other._replace(
        end=granted,
        max_end=granted,
        flags=other.flags & ~(ACKED | LEARNT | UNACKNOWLEDGED),
        initial=acknowledgment,
    )
    return (receiver, sender) if direction else (sender, receiver)


def blind(entry: Entry, direction: int, event: int, profile: Profile) -> Judgement:
    """A SYN, SYN/ACK or reset in a flow whose windows are unknown.

    Whether a reset is exact, or one that its receiver will challenge (RFC 5961 section 3.2), nobody
    can tell here: it passes, and the flow stays until somebody who can has said so
    (`Tracker.settle`).
    """
    cell = STRICT_TABLE[direction][event][entry.state]
    if cell == IV:
        return invalid("this kind of segment has no place in this state")
    if cell == NW:
        return REOPENS
    if event == _EVENT_RST:
        return passes("reset whose number cannot be judged")
    if cell == IG:
        return passes("says nothing new")
    timeout_s = profile.timeouts.tcp[cell]
    return Update(cell, timeout_s, entry.assured, True, None, None, False)
