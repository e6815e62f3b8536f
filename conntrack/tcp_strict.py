"""TCP as the RFCs ask it: a segment that the receiver would refuse does not pass as part of a flow.

What is checked beyond the windows (rules I-IV of `tcp_window`), in order
    1. Flags that no host sends, and events that `STRICT_TABLE` refuses.
    2. While the handshake lasts, numbers are exact (RFC 9293 section 3.10.7.3, RFC 7413).
    3. A reset ends the flow only with the exact number the receiver waits for (RFC 5961 section
       3.2), in every synchronised state.
    4. An acknowledgment older than a window is INVALID (RFC 5961 section 5.2).
    5. A FIN that is repeated is not the other side's FIN; TIME_WAIT needs both acknowledged.

Timers are renewed only by progress, except in ESTABLISHED: half-open and half-closed flows cannot
be kept alive by one side that repeats itself. Nothing that a server sends renews one before its
client has acknowledged the SYN/ACK, not even a FIN (which may come so early, RFC 7413).

`tcp_opening` has the handshake, `tcp_reset` the resets, `tcp_learning` the flows whose windows are
unknown.

Sources: RFC 9293, RFC 5961, RFC 7323, RFC 1337, RFC 6528.
"""

from typing import Final

from conntrack.entry import REOPENS, Entry, Finding, Judgement, Update, invalid, passes
from conntrack.flow import Direction
from conntrack.packet import Packet
from conntrack.profile import Profile
from conntrack.tcp_learning import blind, learn
from conntrack.tcp_opening import (
    begin_anew,
    challenge,
    completes_candidate,
    handshake_fault,
    opened,
    other_opening,
    syn,
    syn_ack,
    syn_ack_again,
)
from conntrack.tcp_reset import reset
from conntrack.tcp_states import EVENT_OF_FLAGS, IG, IV, NW, STRICT_TABLE, TcpEvent, TcpState
from conntrack.tcp_window import (
    ACK_SLACK_BYTES,
    ACKED,
    HALF,
    LEARNT,
    MODULUS_MASK,
    NO_FIN,
    ONLY_TIMESTAMP,
    OPENING,
    SACK,
    UNACKNOWLEDGED,
    Window,
    after,
    highest_sack,
    make,
    may_have_sent,
    segment_end,
    with_flags,
)

_FIN: Final = 0x01
_SYN: Final = 0x02
_RST: Final = 0x04
_ACK: Final = 0x10
_NO_TIMER: Final = -1.0

# Members of an enum as plain numbers: looking one up in its class takes 70 ns on CPython 3.11.
_SYN_SENT: Final = int(TcpState.SYN_SENT)
_SYN_RECV: Final = int(TcpState.SYN_RECV)
_ESTABLISHED: Final = int(TcpState.ESTABLISHED)
_TIME_WAIT: Final = int(TcpState.TIME_WAIT)
_EVENT_SYN: Final = int(TcpEvent.SYN)
_EVENT_SYN_ACK: Final = int(TcpEvent.SYN_ACK)
_EVENT_FIN: Final = int(TcpEvent.FIN)
_EVENT_ACK: Final = int(TcpEvent.ACK)
_EVENT_RST: Final = int(TcpEvent.RST)
_EVENT_DONE: Final = int(TcpEvent.DONE)
_OPENED: Final = int(STRICT_TABLE[0][TcpEvent.SYN][TcpState.NONE])
_new: Final = tuple.__new__  # builds a NamedTuple in a third of the time of calling its class

_FLAGS: Final = Window._fields.index("flags")
_SELECTIVE: Final = SACK | LEARNT
"""Flags of a side to which SACK options are sent, or may be (RFC 2018 section 2)."""
_ORDINARY: Final = 0x17  # SYN, FIN, RST and ACK: only ACK is set in an ordinary segment

_WAITING: Final = (_SYN_RECV, _TIME_WAIT)
"""States whose time a segment that does not end them never renews."""


def first(packet: Packet, profile: Profile, loose: bool, replaces: Entry | None) -> Judgement:
    """Judge a segment that belongs to no flow, or that `replaces` one by opening its own."""
    event = EVENT_OF_FLAGS[packet.tcp_flags]
    if event < 0:
        return invalid("no host sends these flags")
    if packet.source_port == 0 or packet.destination_port == 0:
        return invalid("port 0 is reserved")  # RFC 6335 section 6
    timeouts = profile.timeouts
    if event == _EVENT_SYN:
        windows = (opened(packet), other_opening(packet, replaces))
        timeout_s = timeouts.tcp[_OPENED]
        return _new(Update, (_OPENED, timeout_s, False, False, windows, None, False))
    if event != _EVENT_ACK or not loose:
        return invalid("a flow begins with SYN")
    windows = learn(packet, Direction.ORIGINAL)
    update = Update(_ESTABLISHED, timeouts.tcp_unacknowledged, False, False, windows, None, False)
    return passes("picked up in its middle", update)


def follow(entry: Entry, packet: Packet, direction: int, profile: Profile) -> Judgement:
    """Judge a segment of a known flow."""
    windows = entry.windows
    state = entry.state
    if (
        state == _ESTABLISHED
        and packet.tcp_flags & _ORDINARY == _ACK
        and windows is not None
        and entry.memory is None
        and not entry.offloaded
    ):
        return _data(entry, packet, direction, windows, profile)
    event = EVENT_OF_FLAGS[packet.tcp_flags]
    if event < 0:
        return invalid("no host sends these flags")
    if windows is None or entry.offloaded:
        if event not in (_EVENT_ACK, _EVENT_FIN):
            return blind(entry, direction, event, profile)
        windows = learn(packet, direction, windows)
    sender, receiver = windows[direction], windows[1 - direction]
    cell = STRICT_TABLE[direction][event][state]
    if cell == IV:
        return invalid("this kind of segment has no place in this state")
    if cell == NW:
        return REOPENS
    if event == _EVENT_RST:
        return reset(entry, packet, direction, profile, sender=sender, receiver=receiver, cell=cell)
    if event == _EVENT_SYN:
        return syn(entry, packet, windows, cell)
    if event == _EVENT_SYN_ACK and (direction or state == _SYN_SENT):
        if cell == IG:
            return syn_ack_again(entry, packet)
        return syn_ack(packet, direction, receiver, cell, profile)
    if state == _SYN_SENT:  # only an ACK of the reply side comes here
        return challenge(entry, packet)
    if event == _EVENT_ACK and completes_candidate(entry, packet, direction):
        return begin_anew(entry, profile)
    if cell == IG:
        return passes("says nothing new")
    if state == _SYN_RECV or windows[0].flags & OPENING:
        fault = handshake_fault(packet, direction, sender, receiver)
        if fault:
            return invalid(fault)
    if state == _ESTABLISHED and event == _EVENT_ACK:
        return _data(entry, packet, direction, windows, profile)
    return _move(entry, packet, direction, event, profile, windows)


# --- the ordinary case --------------------------------------------------------------------------


def _data(
    entry: Entry,
    packet: Packet,
    direction: int,
    windows: tuple[Window, Window],
    profile: Profile,
) -> Judgement:
    """An ACK in ESTABLISHED: nearly every segment there is.

    That it fits proves that the flow lives, so a SYN that passed before is forgotten.
    """
    end = (packet.sequence + packet.payload_bytes) & MODULUS_MASK
    outcome = check(entry, packet, direction, end, windows, profile)
    if isinstance(outcome, Finding):
        return outcome
    timeouts = profile.timeouts
    timeout_s = timeouts.tcp[_ESTABLISHED]
    assured = direction != 0 or entry.seen_reply
    if not assured:
        timeout_s = _NO_TIMER  # picked up, and nobody answers: an ACK scan
    elif (outcome[0][_FLAGS] | outcome[1][_FLAGS]) & UNACKNOWLEDGED:
        timeout_s = min(timeouts.tcp_unacknowledged, timeout_s)
    return _new(Update, (_ESTABLISHED, timeout_s, assured, True, outcome, None, False))


def check(  # noqa: PLR0917 -- once per segment: keywords cost
    entry: Entry,
    packet: Packet,
    direction: int,
    end: int,
    windows: tuple[Window, Window],
    profile: Profile,
) -> Finding | tuple[Window, Window]:
    """Apply rules I-IV to a segment and advance the windows.

    Args:
        entry: the flow.
        packet: the segment.
        direction: the segment's.
        end: sequence number after it.
        windows: (original, reply), before it.
        profile: `liberal` lets pass what is outside, without a change.

    Returns:
        The windows (original, reply) after the segment; or the finding that it is INVALID, or may
        pass without a change of state.
    """
    sender = windows[direction]
    receiver = windows[1 - direction]
    s_end, s_max_end, s_max_window, s_max_ack, s_scale, s_flags, s_initial, s_fin = sender
    r_end, r_max_end, r_max_window, r_max_ack, r_scale, r_flags, r_initial, r_fin = receiver
    acknowledgment = packet.acknowledgment
    # Differences are compared, not masked: `&` of a negative number costs as much as ten compares.
    # For numbers below 2**32, "a is after b" is 0 < a - b < HALF or a - b < -HALF.
    lag = r_end - acknowledgment
    if lag:
        lag &= MODULUS_MASK
        if lag >= HALF:
            if not may_have_sent(receiver, acknowledgment, s_max_window):
                return _outside("acknowledges data that was not sent", profile.liberal)
            receiver = receiver._replace(end=acknowledgment)
            r_end = acknowledgment
            lag = 0
        elif lag > ACK_SLACK_BYTES and lag > s_max_window and _is_before(acknowledgment, sender):
            return _outside("acknowledgment is older than a window", profile.liberal)
    options = packet.options
    if (
        options
        and r_flags & _SELECTIVE
        and not (len(options) == 12 and options.startswith(ONLY_TIMESTAMP))
    ):
        selective = highest_sack(options, acknowledgment)
        beyond = 0 < (selective - r_end) & MODULUS_MASK < HALF
        if beyond and not may_have_sent(receiver, selective, s_max_window):
            return _outside("acknowledges data that was not sent", profile.liberal)
    distance = packet.sequence - s_max_end
    if 0 < distance < HALF or distance < -HALF:
        return _overshoot(entry, direction, end, windows, profile)
    changed = False
    distance = end - s_end
    if distance:
        if 0 < distance < HALF or distance < -HALF:
            s_end = end
            s_flags |= UNACKNOWLEDGED
            changed = True
        elif r_max_window and -distance & MODULUS_MASK > r_max_window and _is_before(end, receiver):
            # Data from before the window: the receiver drops it and says where it is (RFC 9293
            # section 3.10.7.4), and the sender must see that answer.
            return passes("older than the window")
    window = packet.window
    if not packet.tcp_flags & _SYN:
        window <<= s_scale
    if window > s_max_window:
        s_max_window = window
        changed = True
    distance = acknowledgment - s_max_ack
    if 0 < distance < HALF or distance < -HALF or not s_flags & ACKED:
        s_max_ack = acknowledgment
        s_flags |= ACKED
        changed = True
    if changed:
        sender = _new(
            Window, (s_end, s_max_end, s_max_window, s_max_ack, s_scale, s_flags, s_initial, s_fin)
        )
    # A closed window is probed with one byte (RFC 9293 section 3.8.6.1).
    granted = (acknowledgment + (window or 1)) & MODULUS_MASK
    changed = False
    distance = granted - r_max_end
    if 0 < distance < HALF or distance < -HALF:
        r_max_end = granted
        changed = True
    if not lag and r_flags & UNACKNOWLEDGED:
        r_flags &= ~UNACKNOWLEDGED
        changed = True
    if changed:
        receiver = _new(
            Window, (r_end, r_max_end, r_max_window, r_max_ack, r_scale, r_flags, r_initial, r_fin)
        )
    return (receiver, sender) if direction else (sender, receiver)


def _is_before(number: int, side: Window) -> bool:
    """Whether a sequence number is older than what this side has acknowledged already.

    A segment that runs ahead, which may be forged, moves `Window.end` of its sender. What the ends
    say to each other then lies a whole window before it, and must be heard all the same.
    """
    _, _, _, max_ack, _, flags, _, _ = side
    return not flags & ACKED or after(max_ack, number)


def _outside(reason: str, liberal: bool) -> Finding:
    return passes(reason) if liberal else invalid(reason)


def _overshoot(
    entry: Entry, direction: int, end: int, windows: tuple[Window, Window], profile: Profile
) -> Finding:
    """A segment that starts behind the granted window, but less than one window behind it.

    Some senders run a little ahead of the window that we have seen granted, because the grant took
    another way. The receiver may take the data, so its acknowledgment must be expected; the flow
    itself does not move.
    """
    sender, receiver = windows[direction], windows[1 - direction]
    beyond = (end - sender.max_end) & MODULUS_MASK
    span = (end - sender.end + receiver.max_window) & MODULUS_MASK
    if beyond > receiver.max_window or span >= HALF:
        return _outside("starts behind the window", profile.liberal)
    sender = sender._replace(end=end, flags=sender.flags | UNACKNOWLEDGED)
    pair = (receiver, sender) if direction else (sender, receiver)
    update = Update(entry.state, _NO_TIMER, False, False, pair, entry.memory, False)
    return passes("runs ahead of the window", update)


# --- the end ------------------------------------------------------------------------------------


def _move(  # noqa: PLR0917 -- five times per connection: keywords cost
    entry: Entry,
    packet: Packet,
    direction: int,
    event: int,
    profile: Profile,
    windows: tuple[Window, Window],
) -> Judgement:
    """An ACK or FIN outside ESTABLISHED: windows first, then the table."""
    state = entry.state
    end = segment_end(packet.sequence, packet.payload_bytes, packet.tcp_flags)
    outcome = check(entry, packet, direction, end, windows, profile)
    if isinstance(outcome, Finding):
        return outcome
    sender, receiver = outcome[direction], outcome[1 - direction]
    if not direction and sender.flags & OPENING:
        sender = with_flags(sender, sender.flags & ~OPENING)
        outcome = (sender, receiver)
    if event == _EVENT_FIN:
        if sender.fin != NO_FIN:
            event = _EVENT_ACK  # repeated
        else:
            s_end, s_max_end, s_window, s_ack, s_scale, s_flags, s_initial, _ = sender
            sender = make(s_end, s_max_end, s_window, s_ack, s_scale, s_flags, s_initial, end)
            outcome = (receiver, sender) if direction else (sender, receiver)
    if event == _EVENT_ACK and _all_fins_acknowledged(sender, receiver):
        event = _EVENT_DONE
    cell = STRICT_TABLE[direction][event][state]
    if cell == IG:
        return passes("says nothing new")
    timeout_s = profile.timeouts.tcp[cell]
    assured = False
    if cell == _ESTABLISHED:
        assured = direction != 0 or entry.seen_reply
        if (sender.flags | receiver.flags) & UNACKNOWLEDGED:
            timeout_s = min(timeout_s, profile.timeouts.tcp_unacknowledged)
    if outcome[0][_FLAGS] & OPENING:
        timeout_s = _NO_TIMER  # only the server says that the flow is open
    elif cell == state and (
        cell in _WAITING or not _progress(windows, sender, receiver, direction)
    ):
        timeout_s = _NO_TIMER
    return _new(Update, (cell, timeout_s, assured, True, outcome, None, False))


def _progress(
    windows: tuple[Window, Window], sender: Window, receiver: Window, direction: int
) -> bool:
    """Whether a segment sent, acknowledged or granted anything new; `windows` are those before."""
    before, before_peer = windows[direction], windows[1 - direction]
    return (
        sender.end != before.end
        or sender.max_ack != before.max_ack
        or receiver.max_end != before_peer.max_end
    )


def _all_fins_acknowledged(sender: Window, receiver: Window) -> bool:
    """Whether no FIN waits for its acknowledgment, and there was one."""
    ours, theirs = sender.fin, receiver.fin
    if ours == theirs == NO_FIN:
        return False
    if ours != NO_FIN and (not receiver.flags & ACKED or after(ours, receiver.max_ack)):
        return False
    return theirs == NO_FIN or not after(theirs, sender.max_ack)
