"""How a TCP flow begins: the handshake, and the one that takes the place of a living flow.

While a handshake lasts, numbers are exact: a SYN/ACK acknowledges the SYN or its data (RFC 9293
section 3.10.7.3, RFC 7413), the last ACK acknowledges the SYN/ACK.

Resynchronisation: a SYN inside a living flow passes, because its receiver will challenge it. If the
other end has forgotten the flow it answers that SYN instead. Three segments with fitting numbers,
and none of the old flow between them, begin the flow anew. The tuple, and so the verdict, is the
same.

Sources: RFC 9293, RFC 5961, RFC 7323, RFC 7413.
"""

from typing import Final

from conntrack.entry import Entry, Judgement, Update, invalid, passes
from conntrack.flow import Direction
from conntrack.packet import Packet
from conntrack.profile import Profile
from conntrack.tcp_states import TcpState
from conntrack.tcp_window import (
    ACKED,
    MODULUS_MASK,
    NO_FIN,
    OPENING,
    SCALING,
    UNKNOWN,
    Window,
    after,
    make,
    segment_end,
    syn_options,
    with_flags,
)

_SYN: Final = 0x02
_NO_TIMER: Final = -1.0
_SYN_SENT: Final = int(TcpState.SYN_SENT)
_ESTABLISHED: Final = int(TcpState.ESTABLISHED)
_new: Final = tuple.__new__  # builds a NamedTuple in a third of the time of calling its class

# What a flow remembers besides its windows: the acknowledgment of a challenge ACK that passed in
# SYN_SENT; or a SYN that passed in a living flow (end, window, scale, flags); or that SYN and the
# SYN/ACK that answers it (the same four of the server).
CHALLENGE_PLACES: Final = 1
_SYN_PLACES: Final = 4
_CANDIDATE_PLACES: Final = 8


def opened(packet: Packet) -> Window:
    """Sequence space of a side that has sent its SYN or SYN/ACK."""
    end = segment_end(packet.sequence, packet.payload_bytes, packet.tcp_flags)
    scale, flags = syn_options(packet.options)
    initial = (packet.sequence + 1) & MODULUS_MASK
    return make(end, end, packet.window or 1, 0, scale, flags, initial, NO_FIN)


def syn(entry: Entry, packet: Packet, windows: tuple[Window, Window], cell: int) -> Judgement:
    """A SYN of the side that opened the flow, again."""
    asked = opened(packet)
    if cell == _SYN_SENT:
        # The latest SYN is the one that will be answered, whether its number is higher or lower
        # (RFC 9293 section 3.4.2); repeating it does not prolong the flow. Repeated without its
        # data (RFC 7413 section 4.1.3.1), either may be answered.
        sent = windows[0]
        if asked.initial == sent.initial and after(sent.end, asked.end):
            asked = asked._replace(end=sent.end, max_end=sent.end)
        return Update(cell, _NO_TIMER, False, False, (asked, windows[1]), None, False)
    kept = (asked.end, asked.max_window, asked.scale, asked.flags)
    update = Update(entry.state, _NO_TIMER, False, False, windows, kept, False)
    return passes("SYN in a living flow: its receiver will challenge it", update)


def syn_ack(
    packet: Packet, direction: int, receiver: Window, cell: int, profile: Profile
) -> Judgement:
    """The answer to the SYN that opened the flow, or to the other one if both sides opened."""
    if not receiver.max_window:
        return invalid("answers a SYN that nobody has seen")
    if not acknowledges_syn(packet.acknowledgment, receiver):
        return invalid("SYN/ACK does not acknowledge the SYN")
    client, server = windows = answered(receiver, opened(packet), packet.acknowledgment)
    if direction:
        windows = (with_flags(client, client.flags | OPENING), server)
    else:
        windows = (windows[1], windows[0])
    return _new(Update, (cell, profile.timeouts.tcp[cell], False, True, windows, None, False))


def answered(client: Window, server: Window, acknowledgment: int) -> tuple[Window, Window]:
    """Windows of both sides once a SYN is answered."""
    c_end, _, c_window, c_ack, c_scale, c_flags, c_initial, c_fin = client
    s_end, _, s_window, _, s_scale, s_flags, s_initial, s_fin = server
    if not s_flags & c_flags & SCALING:
        # RFC 7323 section 2.2: scaling needs the option in both SYNs.
        c_scale = s_scale = 0
    c_max_end = (acknowledgment + s_window) & MODULUS_MASK
    s_max_end = (s_end + c_window) & MODULUS_MASK
    s_flags |= ACKED
    return (
        make(c_end, c_max_end, c_window, c_ack, c_scale, c_flags, c_initial, c_fin),
        make(s_end, s_max_end, s_window, acknowledgment, s_scale, s_flags, s_initial, s_fin),
    )


def syn_ack_again(entry: Entry, packet: Packet) -> Judgement:
    """A SYN/ACK in a flow that is open: repeated, or the answer to a SYN that passed.

    It only makes a candidate. The flow begins anew when the client acknowledges it; a segment of
    the old flow shows before that the flow lives and the two were forged.
    """
    memory = entry.memory
    if memory is None or len(memory) < _SYN_PLACES or packet.acknowledgment != memory[0]:
        # When both sides have opened, this one's SYN/ACK may be the first reply.
        update = Update(entry.state, _NO_TIMER, False, True, entry.windows, memory, False)
        return passes("says nothing new", None if entry.seen_reply else update)
    server = opened(packet)
    kept = (*memory[:_SYN_PLACES], server.end, server.max_window, server.scale, server.flags)
    update = Update(entry.state, _NO_TIMER, False, False, entry.windows, kept, False)
    return passes("answers a SYN that passed", update)


def completes_candidate(entry: Entry, packet: Packet, direction: int) -> bool:
    """Whether a segment is the third of three that begin a living flow anew."""
    memory = entry.memory
    return (
        memory is not None
        and len(memory) == _CANDIDATE_PLACES
        and direction == Direction.ORIGINAL
        and packet.sequence == memory[0]
        and packet.acknowledgment == memory[4]
    )


def begin_anew(entry: Entry, profile: Profile) -> Judgement:
    """Both ends have agreed on other numbers: the tracker was the one that was wrong."""
    memory = entry.memory
    assert memory is not None
    end, window, scale, flags, server_end, server_window, server_scale, server_flags = memory
    client = make(end, end, window, server_end, scale, flags | ACKED, end, NO_FIN)
    server = make(
        server_end, server_end, server_window, end, server_scale, server_flags, server_end, NO_FIN
    )
    windows = answered(client, server, end)
    timeout_s = profile.timeouts.tcp[_ESTABLISHED]
    return passes("begins anew", Update(_ESTABLISHED, timeout_s, True, True, windows, None, False))


def acknowledges_syn(acknowledgment: int, client: Window) -> bool:
    """ISS < SEG.ACK =< SND.NXT (RFC 9293 section 3.10.7.3); data in the SYN may be refused."""
    return (acknowledgment - client.initial) & MODULUS_MASK <= (
        client.end - client.initial
    ) & MODULUS_MASK


def challenge(entry: Entry, packet: Packet) -> Judgement:
    """An ACK that answers a SYN: the server still has an older flow (RFC 9293 section 3.5.1)."""
    if packet.payload_bytes:
        return invalid("data before the handshake")
    kept = (packet.acknowledgment,)
    update = Update(entry.state, _NO_TIMER, False, False, entry.windows, kept, False)
    return passes("challenge ACK", update)


def handshake_fault(packet: Packet, direction: int, sender: Window, receiver: Window) -> str:
    """Why a segment cannot belong to a handshake that is not finished; empty if it can."""
    if not direction:
        if after(receiver.initial, packet.acknowledgment) or after(
            packet.acknowledgment, receiver.end
        ):
            return "does not acknowledge the SYN/ACK"
        if after(sender.initial, packet.sequence) and not packet.tcp_flags & _SYN:
            return "starts before the handshake"
    elif not acknowledges_syn(packet.acknowledgment, receiver):
        return "acknowledges what was not sent"
    return ""


def other_opening(packet: Packet, replaces: Entry | None) -> Window:
    """What the other side has said if both open at once (RFC 9293 figure 8)."""
    if replaces is None or replaces.state != _SYN_SENT or replaces.key == packet.key:
        return UNKNOWN
    return replaces.windows[0] if replaces.windows is not None else UNKNOWN
