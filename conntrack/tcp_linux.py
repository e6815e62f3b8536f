"""TCP as Linux 6.18 tracks it: the same answers, from observation.

For those who migrate, who compare, or who run beside the kernel's own tracker and must not disagree
with it. Every rule here was confirmed packet by packet on Linux 6.18.44 (docs/conntrack.md lists
the few where the kernel is wrong and we do not follow: above all, an INVALID segment changes
nothing).

Order of decisions for one segment
    1. flags → event; `LINUX_TABLE` → cell.
    2. IG: remember the segment and let it pass; a SYN/ACK that acknowledges exactly a remembered
       SYN re-synchronises the flow, because the ends know each other and only we were wrong.
    3. Resets: compared with the highest acknowledgment of the receiver.
    4. Windows (rules I-IV of `tcp_window`). Out of the window above is INVALID; below is let pass.
    5. Timeout, assurance, and what must be remembered.
"""

from typing import Final

from conntrack.entry import REOPENS, Entry, Finding, Judgement, Update, invalid, passes
from conntrack.flow import Direction
from conntrack.packet import Packet
from conntrack.profile import Profile
from conntrack.tcp_states import EVENT_OF_FLAGS, IG, IV, LINUX_TABLE, NW, TcpEvent, TcpState
from conntrack.tcp_window import (
    ACK_SLACK_BYTES,
    ACKED,
    CLOSED_FIRST,
    HALF,
    LIBERAL,
    MODULUS_MASK,
    NO_FIN,
    SACK,
    SCALING,
    UNACKNOWLEDGED,
    UNKNOWN,
    Window,
    highest_sack,
    make,
    segment_end,
    syn_options,
)

# Places in the memory tuple: the last segment that was let pass.
_EVENT, _DIRECTION, _SEQUENCE, _END, _ACKNOWLEDGMENT, _WINDOW, _REPEATS, _SCALE, _FLAGS = range(9)
_NOTHING: Final = (-1, 0, 0, 0, 0, 1, 0, 0, 0)

_CHALLENGED: Final = 64  # memory flag: a SYN passed in LAST_ACK; the next ACK may answer it
_BOTH_OPENED: Final = 128  # memory flag: simultaneous open

_CLOSING: Final = frozenset(
    (
        TcpState.FIN_WAIT,
        TcpState.CLOSE_WAIT,
        TcpState.LAST_ACK,
        TcpState.TIME_WAIT,
        TcpState.CLOSE,
    )
)

_ENDING: Final = frozenset((TcpEvent.FIN, TcpEvent.RST))
_OPENING: Final = frozenset((TcpState.SYN_SENT, TcpState.SYN_RECV))

# What the window rules say.
_INSIDE: Final = 0
_LET_PASS: Final = 1


def _after(first: int, second: int) -> bool:
    """Whether a sequence number is behind another; in Linux, one exactly half the space away is."""
    return (second - first) & MODULUS_MASK >= HALF


def first(packet: Packet, profile: Profile, loose: bool) -> Judgement:
    """Judge a segment that belongs to no flow."""
    event = EVENT_OF_FLAGS[packet.tcp_flags]
    if event < 0:
        return invalid("no host sends these flags")
    cell = LINUX_TABLE[0][event][TcpState.NONE]
    if cell == IV or (event != TcpEvent.SYN and not loose):
        return invalid("a flow begins with SYN")
    end = segment_end(packet.sequence, packet.payload_bytes, packet.tcp_flags)
    if event == TcpEvent.SYN:
        memory = (event, 0, 0, 0, 0, packet.window, 0, 0, 0)
        windows = _begin(packet, Direction.ORIGINAL, end, UNKNOWN, UNKNOWN)
    else:
        memory = (event, 0, packet.sequence, end, packet.acknowledgment, packet.window, 0, 0, 0)
        windows = _met_in_its_middle(packet)
    timeouts = profile.timeouts
    timeout_s = timeouts.tcp[cell]
    if cell == TcpState.ESTABLISHED:
        timeout_s = min(timeout_s, timeouts.tcp_unacknowledged)
    return Update(cell, timeout_s, False, False, windows, memory, False)


def _met_in_its_middle(packet: Packet) -> tuple[Window, Window]:
    """Windows of (sender, receiver): nobody knows the scale, so they are learnt, not enforced.

    Nothing is assumed of the receiver, its numbers begin at 0; so the segment is out of the window
    already and its acknowledgment not remembered, unless it happens to be near 0.
    """
    end = segment_end(packet.sequence, packet.payload_bytes, packet.tcp_flags)
    window = max(packet.window, 1)
    flags = LIBERAL | SACK
    sender = make(end, (end + window) & MODULUS_MASK, window, 0, 0, flags, end, NO_FIN)
    receiver = UNKNOWN._replace(flags=flags)
    outcome, *advanced = _windows(
        packet, Direction.ORIGINAL, end, state=TcpState.NONE, sender=sender, receiver=receiver
    )
    return (advanced[0], advanced[1]) if outcome == _INSIDE else (sender, receiver)


def follow(entry: Entry, packet: Packet, direction: int, profile: Profile) -> Judgement:
    """Judge a segment of a known flow."""
    event = EVENT_OF_FLAGS[packet.tcp_flags]
    if event < 0:
        return invalid("no host sends these flags")
    state = entry.state
    memory = entry.memory or _NOTHING
    windows = entry.windows
    if windows is None or entry.offloaded:
        return _relearn(entry, packet, direction, event, profile)
    sender, receiver = windows[direction], windows[1 - direction]
    cell = LINUX_TABLE[direction][event][state]
    if cell == IV:
        return invalid("this kind of segment has no place in this state")
    if cell == NW:
        fin_seen = (sender.flags | receiver.flags) & CLOSED_FIRST
        own_reset = memory[_EVENT] == TcpEvent.RST and memory[_DIRECTION] == direction
        if fin_seen or own_reset:
            return REOPENS
        cell = IG
    if cell == IG:
        if (
            event == TcpEvent.SYN_ACK
            and memory[_EVENT] == TcpEvent.SYN
            and memory[_DIRECTION] == Direction.ORIGINAL
            and packet.acknowledgment == memory[_END]
        ):
            # The client's SYN that we let pass was answered: both ends have begun anew.
            begun = make(
                memory[_END], memory[_END], max(memory[_WINDOW], 1), 0,
                memory[_SCALE], memory[_FLAGS] & (SCALING | SACK), memory[_END], NO_FIN,
            )  # fmt: skip
            receiver, sender = begun, UNKNOWN._replace(flags=sender.flags & LIBERAL)
            memory = (*memory[:_FLAGS], memory[_FLAGS] & ~_CHALLENGED)
            cell, state = TcpState.SYN_RECV, TcpState.SYN_SENT
        else:
            return _remember(entry, packet, direction, event, memory)
    elif (
        state == TcpState.LAST_ACK
        and cell == TcpState.TIME_WAIT
        and event == TcpEvent.ACK
        and memory[_FLAGS] & _CHALLENGED
        and memory[_DIRECTION] != direction
        and memory[_EVENT] == TcpEvent.SYN
    ):
        # RFC 5961 4.2: this answers the SYN, it does not acknowledge the FIN.
        kept = (*memory[:_FLAGS], memory[_FLAGS] & ~_CHALLENGED)
        return passes("challenge ACK", Update(state, -1, False, False, windows, kept, False))
    elif (
        direction == Direction.REPLY
        and cell == TcpState.SYN_RECV
        and event == TcpEvent.ACK
        and memory[_FLAGS] & _BOTH_OPENED
    ):
        cell = TcpState.ESTABLISHED
    check_window = True
    if event == TcpEvent.RST:
        finding, cell, check_window = _reset(
            entry, packet, direction, receiver=receiver, memory=memory, cell=cell
        )
        if finding is not None:
            return finding
    return _settle(
        entry,
        packet,
        direction,
        event,
        profile,
        state=state,
        cell=cell,
        sender=sender,
        receiver=receiver,
        memory=memory,
        check_window=check_window,
    )


def _remember(
    entry: Entry, packet: Packet, direction: int, event: int, memory: tuple[int, ...]
) -> Judgement:
    """Let a segment pass without a change of state, and keep what it said."""
    scale, flags = memory[_SCALE], memory[_FLAGS] & _BOTH_OPENED
    end = segment_end(packet.sequence, packet.payload_bytes, packet.tcp_flags)
    if event == TcpEvent.SYN and direction == Direction.ORIGINAL:
        scale, options = syn_options(packet.options)
        flags |= options
        if entry.state == TcpState.LAST_ACK:
            flags |= _CHALLENGED
    kept = (
        event, direction, packet.sequence, end, packet.acknowledgment, packet.window,
        memory[_REPEATS], scale, flags,
    )  # fmt: skip
    update = Update(entry.state, -1, False, True, entry.windows, kept, False)
    return passes("passes: an end knows better what it means", update)


def _reset(
    entry: Entry,
    packet: Packet,
    direction: int,
    *,
    receiver: Window,
    memory: tuple[int, ...],
    cell: int,
) -> tuple[Judgement | None, int, bool]:
    """Compare a reset with what its receiver has acknowledged.

    Returns:
        (the finding if it is final, the state to move to, whether windows are still checked).
    """
    state = entry.state
    if state in _CLOSING:
        return None, cell, False
    if receiver.flags & ACKED and memory[_EVENT] != TcpEvent.SYN:
        established = state == TcpState.ESTABLISHED and entry.assured
        sequence = packet.sequence
        if sequence == 0 and not established:
            return None, cell, True  # most likely answers a SYN that was let pass
        if _after(receiver.max_ack, sequence):
            return invalid("reset below what was acknowledged"), cell, True
        train = (
            memory[_EVENT] == TcpEvent.ACK
            and memory[_DIRECTION] == direction
            and memory[_END] == sequence
        )
        if not established or sequence == receiver.max_ack or train:
            return None, cell, True
        cell = state
    challenged = memory[_EVENT] == TcpEvent.ACK and memory[_DIRECTION] == Direction.REPLY
    if state == TcpState.SYN_SENT and challenged and packet.sequence == memory[_ACKNOWLEDGMENT]:
        return None, cell, False  # RFC 9293 3.5.1: it ends the server's older flow
    other = memory[_DIRECTION] != direction
    answers_syn = entry.seen_reply and memory[_EVENT] == TcpEvent.SYN and other
    answers_ack = not entry.assured and memory[_EVENT] == TcpEvent.ACK
    if (answers_syn or answers_ack) and packet.acknowledgment == memory[_END]:
        return None, cell, False
    return None, cell, True


def _settle(
    entry: Entry,
    packet: Packet,
    direction: int,
    event: int,
    profile: Profile,
    *,
    state: int,
    cell: int,
    sender: Window,
    receiver: Window,
    memory: tuple[int, ...],
    check_window: bool,
) -> Judgement:
    """Check the windows, then say what the segment changes."""
    flags = memory[_FLAGS] & _BOTH_OPENED
    if TcpState.SYN_SENT2 in (state, cell):
        flags |= _BOTH_OPENED
    kept = memory
    if check_window:
        end = segment_end(packet.sequence, packet.payload_bytes, packet.tcp_flags)
        outcome, sender, receiver = _windows(
            packet, direction, end, state=state, sender=sender, receiver=receiver
        )
        lenient = (profile.liberal and event != TcpEvent.RST) or sender.flags & LIBERAL
        if isinstance(outcome, str):
            if not lenient:
                pair = _pair(direction, sender, receiver)
                left = (*memory[:_FLAGS], memory[_FLAGS] | flags)
                return _refuse(entry, direction, event, profile, outcome, pair=pair, memory=left)
        elif outcome == _LET_PASS and not lenient:
            pair = _pair(direction, sender, receiver)
            return passes("passes: old", Update(entry.state, -1, False, True, pair, memory, False))
        elif outcome == _INSIDE and event == TcpEvent.ACK:
            kept = _count_repeats(packet, direction, end, memory)
    if event == TcpEvent.FIN and cell == TcpState.FIN_WAIT and state != TcpState.FIN_WAIT:
        sender = sender._replace(flags=sender.flags | CLOSED_FIRST)
    kept = (event, direction, *kept[_SEQUENCE:_FLAGS], flags)
    pair = _pair(direction, sender, receiver)
    if not entry.seen_reply:
        if event == TcpEvent.RST:
            return passes("refused", Update(cell, 0, False, True, pair, kept, True))
        if event == TcpEvent.SYN and state == TcpState.SYN_SENT and cell == TcpState.SYN_SENT:
            # A repeated SYN must not keep a half-open flow alive.
            return Update(cell, -1, False, True, pair, kept, False)
    timeout_s = _timeout(entry, event, cell, profile, pair=pair, memory=kept)
    assured = (
        entry.seen_reply
        and state in (TcpState.SYN_RECV, TcpState.ESTABLISHED)
        and cell == TcpState.ESTABLISHED
    )
    return Update(cell, timeout_s, assured, True, pair, kept, False)


def _refuse(
    entry: Entry,
    direction: int,
    event: int,
    profile: Profile,
    reason: str,
    *,
    pair: tuple[Window, Window],
    memory: tuple[int, ...],
) -> Judgement:
    """INVALID; where the profile asks for it, with what such a segment leaves behind in Linux.

    That is the sequence space of a side that was unknown, and the kind of a FIN or reset. Of two
    that contradict each other the second shortens the timer (nf_tcp_handle_invalid).
    """
    if not profile.invalid_writes:
        return invalid(reason)
    timeout_s = -1.0
    if entry.assured and event in _ENDING:
        if memory[_EVENT] in _ENDING and memory[_DIRECTION] != direction:
            timeout_s = profile.timeouts.tcp_unacknowledged
        else:
            memory = (event, direction, *memory[_SEQUENCE:])
    left = Update(entry.state, timeout_s, False, False, pair, memory, False)
    return Finding(False, reason, left, False)


def _pair(direction: int, sender: Window, receiver: Window) -> tuple[Window, Window]:
    return (receiver, sender) if direction else (sender, receiver)


def _count_repeats(
    packet: Packet, direction: int, end: int, memory: tuple[int, ...]
) -> tuple[int, ...]:
    """Remember an ACK, and how often it has come without a change."""
    now = (direction, packet.sequence, end, packet.acknowledgment, packet.window)
    repeats = memory[_REPEATS] + 1 if memory[_DIRECTION:_REPEATS] == now else 0
    return (TcpEvent.ACK, *now, repeats, memory[_SCALE], memory[_FLAGS])


def _timeout(
    entry: Entry,
    event: int,
    cell: int,
    profile: Profile,
    *,
    pair: tuple[Window, Window],
    memory: tuple[int, ...],
) -> float:
    """Idle seconds after this segment: short while something is outstanding."""
    timeouts = profile.timeouts
    timeout_s = timeouts.tcp[cell]
    if memory[_REPEATS] >= profile.retransmissions and timeout_s > timeouts.tcp_retransmitted:
        timeout_s = timeouts.tcp_retransmitted
    elif event == TcpEvent.RST:
        timeout_s = timeouts.tcp[TcpState.CLOSE]
    elif (pair[0].flags | pair[1].flags) & UNACKNOWLEDGED:
        timeout_s = min(timeout_s, timeouts.tcp_unacknowledged)
    elif memory[_WINDOW] == 0:
        timeout_s = min(timeout_s, timeouts.tcp_retransmitted)
    if not entry.seen_reply and cell == TcpState.ESTABLISHED:
        timeout_s = min(timeout_s, timeouts.tcp_unacknowledged)
    return timeout_s


def _relearn(
    entry: Entry, packet: Packet, direction: int, event: int, profile: Profile
) -> Judgement:
    """Continue a flow whose windows are unknown (restored, or carried by the kernel)."""
    cell = LINUX_TABLE[direction][event][entry.state]
    if cell == IV:
        return invalid("this kind of segment has no place in this state")
    if cell == NW:
        return REOPENS
    if cell == IG:
        cell = entry.state
    windows = None
    if event in (TcpEvent.ACK, TcpEvent.FIN):
        learnt = _met_in_its_middle(packet)
        windows = (learnt[1], learnt[0]) if direction else learnt
    timeout_s = profile.timeouts.tcp[cell]
    assured = cell == TcpState.ESTABLISHED
    return passes(
        "windows are learnt", Update(cell, timeout_s, assured, True, windows, None, False)
    )


def _begin(
    packet: Packet, direction: int, end: int, sender: Window, receiver: Window
) -> tuple[Window, Window]:
    """Sequence space of a side that sends its SYN or SYN/ACK.

    Without any option, what an earlier one of this side has announced still holds.
    """
    scale, flags = sender.scale, sender.flags
    if packet.options:
        scale, announced = syn_options(packet.options)
        flags = flags & LIBERAL | announced
    if direction == Direction.REPLY and not flags & receiver.flags & SCALING:
        # RFC 7323 section 2.2: scaling needs the option in both SYNs.
        scale = 0
        receiver = receiver._replace(scale=0)
    max_ack = sender.max_ack if flags & ACKED else 0
    return make(end, end, max(packet.window, 1), max_ack, scale, flags, end, NO_FIN), receiver


def _windows(
    packet: Packet,
    direction: int,
    end: int,
    *,
    state: int,
    sender: Window,
    receiver: Window,
) -> tuple[int | str, Window, Window]:
    """Apply rules I-IV.

    Returns:
        (`_INSIDE`, `_LET_PASS` or the reason for INVALID, the sender's and receiver's new windows).
    """
    sequence = packet.sequence
    flags = packet.tcp_flags
    has_ack = flags & 0x10
    acknowledgment = packet.acknowledgment
    selective = acknowledgment
    window = packet.window
    if receiver.flags & SACK and has_ack and packet.options:
        selective = highest_sack(packet.options, acknowledgment)
    if sender.max_window == 0:
        if flags & 2:
            sender, receiver = _begin(packet, direction, end, sender, receiver)
            if not has_ack:
                return _INSIDE, sender, receiver
        else:
            granted = max(window << sender.scale, 1)
            sender = sender._replace(
                end=end, max_end=(end + granted) & MODULUS_MASK, max_window=granted
            )
            if receiver.max_window == 0:
                receiver = receiver._replace(end=selective, max_end=selective)
            elif selective == (receiver.end + 1) & MODULUS_MASK:
                receiver = receiver._replace(end=selective)
    elif flags & 2 and state in _OPENING and _after(end, sender.end):
        # RFC 9293 3.4.2: a host that has restarted begins with another number.
        sender, receiver = _begin(packet, direction, end, sender, receiver)
        if direction == Direction.REPLY and not has_ack:
            return _INSIDE, sender, receiver
    if not has_ack or (flags & 0x14 == 0x14 and acknowledgment == 0):
        # Without ACK (or with the empty one that some stacks put into resets) nothing is claimed.
        acknowledgment = selective = receiver.end
    if flags & 4 and sequence == 0 and state == TcpState.SYN_SENT:
        sequence = end = sender.end
    lowest_ack = receiver.end - max(ACK_SLACK_BYTES, sender.max_window)
    fresh = _after(end, sender.end - receiver.max_window - 1)
    current = _after(selective, lowest_ack - 1)
    if _after(sequence, sender.max_end):
        overshoot = (end - sender.max_end + 1) & MODULUS_MASK
        sane = current and not _after(selective, receiver.end)
        if receiver.max_window and fresh and sane and overshoot <= receiver.max_window:
            # The receiver may take it all the same; then it will acknowledge it.
            sender = sender._replace(end=end, flags=sender.flags | UNACKNOWLEDGED)
            return _LET_PASS, sender, receiver
        return "starts behind the window", sender, receiver
    if _after(selective, receiver.end):
        return "acknowledges data that was not sent", sender, receiver
    if (receiver.max_window and not fresh) or not current:
        return _LET_PASS, sender, receiver
    return (
        _INSIDE,
        *_advance(
            packet,
            sender,
            receiver,
            end=end,
            acknowledgment=acknowledgment,
            selective=selective,
        ),
    )


def _advance(
    packet: Packet,
    sender: Window,
    receiver: Window,
    *,
    end: int,
    acknowledgment: int,
    selective: int,
) -> tuple[Window, Window]:
    """Sequence space after a segment inside the windows."""
    flags, window = packet.tcp_flags, packet.window
    s_end, s_max_end, s_max_window, s_max_ack, scale, s_flags, s_initial, s_fin = sender
    r_end, r_max_end, r_max_window, r_max_ack, r_scale, r_flags, r_initial, r_fin = receiver
    if not flags & 2:
        window <<= scale  # RFC 7323 section 2.2: the window of a SYN is never scaled
    s_max_window = max(s_max_window, window + ((selective - acknowledgment) & MODULUS_MASK))
    if _after(end, s_end):
        s_end = end
        s_flags |= UNACKNOWLEDGED
    if flags & 0x10:
        if not s_flags & ACKED or _after(acknowledgment, s_max_ack):
            s_max_ack = acknowledgment
        s_flags |= ACKED
    if r_max_window and _after(end, s_max_end):
        r_max_window += (end - s_max_end) & MODULUS_MASK
    granted = (selective + window) & MODULUS_MASK
    if _after(granted, r_max_end - 1):
        r_max_end = granted + 1 & MODULUS_MASK if window == 0 else granted
    if acknowledgment == r_end:
        r_flags &= ~UNACKNOWLEDGED
    return (
        make(s_end, s_max_end, s_max_window, s_max_ack, scale, s_flags, s_initial, s_fin),
        make(r_end, r_max_end, r_max_window, r_max_ack, r_scale, r_flags, r_initial, r_fin),
    )
