"""TCP as the RFCs ask it: a segment that the receiver would refuse does not pass as part of a flow.

What is checked beyond the windows (rules I-IV of `tcp_window`), in order
    1. Flags that no host sends, and events that `STRICT_TABLE` refuses.
    2. While the handshake lasts, numbers are exact: a SYN/ACK acknowledges the SYN or its data
       (RFC 9293 section 3.10.7.3, RFC 7413), the last ACK acknowledges the SYN/ACK.
    3. A reset ends the flow only with the exact number the receiver waits for (RFC 5961 section
       3.2), in every synchronised state. Inside the window but inexact it passes without a change,
       so that the receiver may answer with a challenge ACK; outside it is INVALID. A reset that the
       next router will discard (hop limit 1) changes nothing.
    4. An acknowledgment older than a window is INVALID (RFC 5961 section 5.2).
    5. A FIN that is repeated is not the other side's FIN; TIME_WAIT needs both acknowledged.

Timers are renewed only by progress, except in ESTABLISHED: half-open and half-closed flows cannot
be kept alive by one side that repeats itself.

Resynchronisation: a SYN inside a living flow passes, because its receiver will challenge it. If the
other end has forgotten the flow it answers that SYN instead. Three segments with fitting numbers,
and none of the old flow between them, begin the flow anew. The tuple, and so the verdict, is the
same.

Flows whose windows are unknown (picked up, restored, carried by the kernel meanwhile) learn them
from the next segment; the scale is then taken as 14, the largest, so that no genuine segment is
refused.

Sources: RFC 9293, RFC 5961, RFC 7323, RFC 7413, RFC 1337, RFC 6528.
"""

from typing import Final

from conntrack.entry import REOPENS, Entry, Finding, Judgement, Update, invalid, passes
from conntrack.flow import Direction
from conntrack.packet import Packet
from conntrack.profile import Profile
from conntrack.tcp_states import EVENT_OF_FLAGS, IG, IV, NW, STRICT_TABLE, TcpEvent, TcpState
from conntrack.tcp_window import (
    ACK_SLACK_BYTES,
    ACKED,
    HALF,
    MAX_SCALE,
    MODULUS_MASK,
    NO_FIN,
    ONLY_TIMESTAMP,
    SCALING,
    UNACKNOWLEDGED,
    UNKNOWN,
    Window,
    after,
    highest_sack,
    make,
    segment_end,
    syn_options,
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
_new = tuple.__new__  # builds a NamedTuple in a third of the time of calling its class

_FLAGS: Final = Window._fields.index("flags")
_ORDINARY: Final = 0x17  # SYN, FIN, RST and ACK: only ACK is set in an ordinary segment

# What a flow remembers besides its windows: the acknowledgment of a challenge ACK that passed in
# SYN_SENT; or a SYN that passed in a living flow (end, window, scale, flags); or that SYN and the
# SYN/ACK that answers it (the same four of the server).
_CHALLENGE_PLACES: Final = 1
_SYN_PLACES: Final = 4
_CANDIDATE_PLACES: Final = 8

_WAITING: Final = (_SYN_RECV, _TIME_WAIT)
"""States whose time a segment that does not end them never renews."""

_LARGEST_WINDOW: Final = 0xFFFF << MAX_SCALE  # bytes; RFC 7323 section 2.3


def first(packet: Packet, profile: Profile, loose: bool, replaces: Entry | None) -> Judgement:
    """Judge a segment that belongs to no flow, or that `replaces` one by opening its own."""
    event = EVENT_OF_FLAGS[packet.tcp_flags]
    if event < 0:
        return invalid("no host sends these flags")
    if packet.source_port == 0 or packet.destination_port == 0:
        return invalid("port 0 is reserved")  # RFC 6335 section 6
    timeouts = profile.timeouts
    if event == _EVENT_SYN:
        windows = (_opened(packet), _other_opening(packet, replaces))
        timeout_s = timeouts.tcp[_OPENED]
        return _new(Update, (_OPENED, timeout_s, False, False, windows, None, False))
    if event != _EVENT_ACK or not loose:
        return invalid("a flow begins with SYN")
    windows = _learn(packet, Direction.ORIGINAL)
    update = Update(_ESTABLISHED, timeouts.tcp_unacknowledged, False, False, windows, None, False)
    return passes("picked up in its middle", update)


def _other_opening(packet: Packet, replaces: Entry | None) -> Window:
    """What the other side has said if both open at once (RFC 9293 figure 8)."""
    if replaces is None or replaces.state != _SYN_SENT or replaces.key == packet.key:
        return UNKNOWN
    return replaces.windows[0] if replaces.windows is not None else UNKNOWN


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
            return _blind(entry, direction, event, profile)
        windows = _learn(packet, direction, windows)
    sender, receiver = windows[direction], windows[1 - direction]
    cell = STRICT_TABLE[direction][event][state]
    if cell == IV:
        return invalid("this kind of segment has no place in this state")
    if cell == NW:
        return REOPENS
    if event == _EVENT_RST:
        return _reset(
            entry, packet, direction, profile, sender=sender, receiver=receiver, cell=cell
        )
    if event == _EVENT_SYN:
        return _syn(entry, packet, windows, cell)
    if event == _EVENT_SYN_ACK and (direction or state == _SYN_SENT):
        if cell == IG:
            return _syn_ack_again(entry, packet)
        return _syn_ack(packet, direction, receiver, cell, profile)
    if state == _SYN_SENT:  # only an ACK of the reply side comes here
        return _challenge(entry, packet)
    if event == _EVENT_ACK and _completes_candidate(entry, packet, direction):
        return _begin_anew(entry, profile)
    if cell == IG:
        return passes("says nothing new")
    if state == _SYN_RECV:
        fault = _handshake_fault(packet, direction, sender, receiver)
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
            return _outside("acknowledges data that was not sent", profile.liberal)
        if lag > ACK_SLACK_BYTES and lag > s_max_window:
            return _outside("acknowledgment is older than a window", profile.liberal)
    options = packet.options
    if options and not (len(options) == 12 and options.startswith(ONLY_TIMESTAMP)):
        selective = highest_sack(options, acknowledgment)
        if 0 < (selective - r_end) & MODULUS_MASK < HALF:
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
        elif r_max_window and -distance & MODULUS_MASK > r_max_window:
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


# --- the handshake ------------------------------------------------------------------------------


def _opened(packet: Packet) -> Window:
    """Sequence space of a side that has sent its SYN or SYN/ACK."""
    end = segment_end(packet.sequence, packet.payload_bytes, packet.tcp_flags)
    scale, flags = syn_options(packet.options)
    initial = (packet.sequence + 1) & MODULUS_MASK
    return make(end, end, packet.window or 1, 0, scale, flags, initial, NO_FIN)


def _syn(entry: Entry, packet: Packet, windows: tuple[Window, Window], cell: int) -> Judgement:
    """A SYN of the side that opened the flow, again."""
    opened = _opened(packet)
    if cell == _SYN_SENT:
        # The latest SYN is the one that will be answered, whether its number is higher or lower
        # (RFC 9293 section 3.4.2); repeating it does not prolong the flow.
        return Update(cell, _NO_TIMER, False, False, (opened, windows[1]), None, False)
    kept = (opened.end, opened.max_window, opened.scale, opened.flags)
    update = Update(entry.state, _NO_TIMER, False, False, windows, kept, False)
    return passes("SYN in a living flow: its receiver will challenge it", update)


def _syn_ack(
    packet: Packet, direction: int, receiver: Window, cell: int, profile: Profile
) -> Judgement:
    """The answer to the SYN that opened the flow, or to the other one if both sides opened."""
    if not receiver.max_window:
        return invalid("answers a SYN that nobody has seen")
    if not _acknowledges_syn(packet.acknowledgment, receiver):
        return invalid("SYN/ACK does not acknowledge the SYN")
    windows = _answered(receiver, _opened(packet), packet.acknowledgment)
    if not direction:
        windows = (windows[1], windows[0])
    return _new(Update, (cell, profile.timeouts.tcp[cell], False, True, windows, None, False))


def _answered(client: Window, server: Window, acknowledgment: int) -> tuple[Window, Window]:
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


def _syn_ack_again(entry: Entry, packet: Packet) -> Judgement:
    """A SYN/ACK in a flow that is open: repeated, or the answer to a SYN that passed.

    It only makes a candidate. The flow begins anew when the client acknowledges it; a segment of
    the old flow shows before that the flow lives and the two were forged.
    """
    memory = entry.memory
    if memory is None or len(memory) < _SYN_PLACES or packet.acknowledgment != memory[0]:
        # When both sides have opened, this one's SYN/ACK may be the first reply.
        update = Update(entry.state, _NO_TIMER, False, True, entry.windows, memory, False)
        return passes("says nothing new", None if entry.seen_reply else update)
    server = _opened(packet)
    kept = (*memory[:_SYN_PLACES], server.end, server.max_window, server.scale, server.flags)
    update = Update(entry.state, _NO_TIMER, False, False, entry.windows, kept, False)
    return passes("answers a SYN that passed", update)


def _completes_candidate(entry: Entry, packet: Packet, direction: int) -> bool:
    memory = entry.memory
    return (
        memory is not None
        and len(memory) == _CANDIDATE_PLACES
        and direction == Direction.ORIGINAL
        and packet.sequence == memory[0]
        and packet.acknowledgment == memory[4]
    )


def _begin_anew(entry: Entry, profile: Profile) -> Judgement:
    """Both ends have agreed on other numbers: the tracker was the one that was wrong."""
    memory = entry.memory
    assert memory is not None
    end, window, scale, flags, server_end, server_window, server_scale, server_flags = memory
    client = make(end, end, window, server_end, scale, flags | ACKED, end, NO_FIN)
    server = make(
        server_end, server_end, server_window, end, server_scale, server_flags, server_end, NO_FIN
    )
    windows = _answered(client, server, end)
    timeout_s = profile.timeouts.tcp[_ESTABLISHED]
    return passes("begins anew", Update(_ESTABLISHED, timeout_s, True, True, windows, None, False))


def _acknowledges_syn(acknowledgment: int, client: Window) -> bool:
    """ISS < SEG.ACK =< SND.NXT (RFC 9293 section 3.10.7.3); data in the SYN may be refused."""
    return (acknowledgment - client.initial) & MODULUS_MASK <= (
        client.end - client.initial
    ) & MODULUS_MASK


def _challenge(entry: Entry, packet: Packet) -> Judgement:
    """An ACK that answers a SYN: the server still has an older flow (RFC 9293 section 3.5.1)."""
    if packet.payload_bytes:
        return invalid("data before the handshake")
    kept = (packet.acknowledgment,)
    update = Update(entry.state, _NO_TIMER, False, False, entry.windows, kept, False)
    return passes("challenge ACK", update)


def _handshake_fault(packet: Packet, direction: int, sender: Window, receiver: Window) -> str:
    """Why a segment cannot belong to a handshake that is not finished; empty if it can."""
    if not direction:
        if after(receiver.initial, packet.acknowledgment) or after(
            packet.acknowledgment, receiver.end
        ):
            return "does not acknowledge the SYN/ACK"
        if after(sender.initial, packet.sequence) and not packet.tcp_flags & _SYN:
            return "starts before the handshake"
    elif not _acknowledges_syn(packet.acknowledgment, receiver):
        return "acknowledges what was not sent"
    return ""


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
    if cell == state and (cell in _WAITING or not _progress(windows, sender, receiver, direction)):
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


def _reset(
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
    return _closed(entry, profile)


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
        if not packet.tcp_flags & _ACK or not _acknowledges_syn(packet.acknowledgment, receiver):
            return invalid("reset does not acknowledge the SYN")
        return _closed(entry, profile)
    memory = entry.memory
    if memory is not None and len(memory) == _CHALLENGE_PLACES and memory[0] == packet.sequence:
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


# --- flows whose windows nobody knows -----------------------------------------------------------


def _learn(
    packet: Packet, direction: int, known: tuple[Window, Window] | None = None
) -> tuple[Window, Window]:
    """Windows of a flow that is met in its middle.

    Generous where nothing is known: the scale may be 14, and each side may have sent a whole window
    that was not seen. What the handshake has told (scales, largest windows, FINs) still holds.
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
        flags=(own.flags | ACKED) & ~UNACKNOWLEDGED,
        initial=packet.sequence,
    )
    receiver = other._replace(
        end=granted,
        max_end=granted,
        flags=other.flags & ~(ACKED | UNACKNOWLEDGED),
        initial=acknowledgment,
    )
    return (receiver, sender) if direction else (sender, receiver)


def _blind(entry: Entry, direction: int, event: int, profile: Profile) -> Judgement:
    """A SYN, SYN/ACK or reset in a flow whose windows are unknown.

    The kernel has compared it with its own windows before it came here (its INVALID segments are
    dropped by our first rule), so the table alone decides.
    """
    cell = STRICT_TABLE[direction][event][entry.state]
    if cell == IV:
        return invalid("this kind of segment has no place in this state")
    if cell == NW:
        return REOPENS
    if cell == IG:
        return passes("says nothing new")
    timeout_s = profile.timeouts.tcp[cell]
    return Update(cell, timeout_s, entry.assured, True, None, None, False)
