"""Which reset ends a TCP flow (RFC 9293 section 3.10.7, RFC 5961 section 3.2).

Only one with the exact number the receiver waits for, in every synchronised state. Inside the
window but inexact it passes without a change, so that the receiver may answer with a challenge ACK;
outside it is INVALID. One that follows data which nobody has acknowledged is believed if nobody
says anything more. A reset that the next router will discard (hop limit 1) changes nothing.
"""

from typing import Final

from conntrack.entry import Entry, Judgement, Update, invalid, passes
from conntrack.flow import Direction
from conntrack.packet import Packet
from conntrack.profile import Profile
from conntrack.tcp_opening import CHALLENGE_PLACES, acknowledges_syn
from conntrack.tcp_states import IG, TcpState
from conntrack.tcp_window import ACKED, MODULUS_MASK, Window, after

_ACK: Final = 0x10
_SYN_SENT: Final = int(TcpState.SYN_SENT)
_ESTABLISHED: Final = int(TcpState.ESTABLISHED)


def reset(
    entry: Entry,
    packet: Packet,
    direction: int,
    profile: Profile,
    *,
    sender: Window,
    receiver: Window,
    cell: int,
) -> Judgement:
    """A reset (RFC 9293 section 3.10.7, RFC 5961 section 3.2)."""
    sequence = packet.sequence
    acknowledges = packet.tcp_flags & _ACK
    if packet.hop_limit <= 1:
        return passes("reset that the next router discards")
    if entry.state == _SYN_SENT:
        return _reset_half_open(entry, packet, direction, profile, sender=sender, receiver=receiver)
    if acknowledges and packet.acknowledgment and after(packet.acknowledgment, receiver.end):
        return invalid("reset acknowledges data that was not sent")
    expected = receiver.max_ack if receiver.flags & ACKED else sender.initial
    if after(expected, sequence) or after(sequence, sender.max_end):
        return invalid("reset outside the window")
    if cell == IG:
        return passes("the flow is over")
    if sequence not in (expected, sender.end):
        return passes("inexact reset: its receiver will challenge it")
    if sequence == expected or entry.state != _ESTABLISHED:
        return _closed(entry, profile)
    # It follows data that nobody has acknowledged. If both are genuine the flow is over; if both
    # were forged its receiver challenges it, and whatever an end says makes it live on.
    timeout_s = profile.timeouts.tcp[TcpState.CLOSE]
    windows, memory = entry.windows, entry.memory
    update = Update(_ESTABLISHED, timeout_s, False, False, windows, memory, False)
    return passes("reset behind data that is not acknowledged", update)


def _reset_half_open(
    entry: Entry,
    packet: Packet,
    direction: int,
    profile: Profile,
    *,
    sender: Window,
    receiver: Window,
) -> Judgement:
    """A reset before the SYN was answered."""
    if direction == Direction.REPLY:
        if not packet.tcp_flags & _ACK or not acknowledges_syn(packet.acknowledgment, receiver):
            return invalid("reset does not acknowledge the SYN")
        return _closed(entry, profile)
    memory = entry.memory
    if memory is not None and len(memory) == CHALLENGE_PLACES and memory[0] == packet.sequence:
        # Ends the server's older flow; the SYN will be repeated and belongs to this entry.
        return passes("answers a challenge ACK")
    # From the SYN's own number to behind its data: a client that gives up.
    span = (sender.end - sender.initial + 1) & MODULUS_MASK
    if (packet.sequence - sender.initial + 1) & MODULUS_MASK > span:
        return invalid("reset outside the window")
    return _closed(entry, profile)


def _closed(entry: Entry, profile: Profile) -> Judgement:
    """The flow ends. One that was never answered leaves no trace; others linger for stragglers."""
    state = int(TcpState.CLOSE)
    timeout_s = profile.timeouts.tcp[state]
    answered = entry.seen_reply
    update = Update(state, timeout_s, False, answered, entry.windows, None, not answered)
    return passes("reset", update)
