"""Sequence space of the two sides of a TCP flow: what was sent, what may be sent.

Of each sender the box remembers four numbers, after G. van Rooij, "Real Stateful TCP Packet
Filtering in IP Filter" (2001), section 4:

    end         highest sequence number + length it has sent
    max_end     highest acknowledgment + window the other side has granted it
    max_window  largest window it has advertised itself, scaled
    max_ack     highest acknowledgment it has sent

A segment from S to R can be genuine only if
    I    seq <= S.max_end                              it starts inside the granted window
    II   seq + length >= S.end - R.max_window          it is not older than a whole window
    III  ack <= R.end                                  it acknowledges only what was sent
    IV   ack >= R.end - max(66000, S.max_window)       its acknowledgment is not older either

Which answer a violation gets is the profile's choice (`tcp_strict`, `tcp_linux`).

A `Window` is a value: a segment makes new ones, and they become the flow's only when the segment is
confirmed. Sequence numbers are modulo 2**32 (RFC 9293 section 3.4); windows are bytes.
"""

from struct import Struct
from typing import Final, NamedTuple

MODULUS_MASK: Final = 0xFFFFFFFF  # sequence numbers have 32 bits
HALF: Final = 0x80000000  # a difference below this is "not before" (RFC 1982 section 3.2)

SCALING: Final = 1  # this side's SYN carried a window scale option
SACK: Final = 2  # this side's SYN permitted selective acknowledgments
LIBERAL: Final = 4  # met in the middle: nobody knows the scale, so the window is not checked
ACKED: Final = 8  # max_ack is known
UNACKNOWLEDGED: Final = 16  # this side has sent data that the other side has not acknowledged
CLOSED_FIRST: Final = 32  # this side sent the first FIN
OPENING: Final = 64  # this side has begun a handshake and not acknowledged the answer
LEARNT: Final = 128  # met in the middle, with a segment that may have been a repeated one

MAX_SCALE: Final = 14  # RFC 7323 section 2.3: larger shift counts are used as 14
ACK_SLACK_BYTES: Final = (
    66000  # the largest unscaled window plus one segment (van Rooij, section 4.3)
)
NO_FIN: Final = -1

_SACK_BLOCK_BYTES: Final = 8  # RFC 2018 section 3: two 32-bit edges
_KIND_END, _KIND_NOP, _KIND_SCALE, _KIND_SACK_OK, _KIND_SACK = 0, 1, 3, 4, 5
ONLY_TIMESTAMP: Final = b"\x01\x01\x08\x0a"  # RFC 7323 appendix A: the usual layout, 12 bytes

_USUAL_SYN_BYTES: Final = 20
_USUAL_SYN: Final = b"\x02\x04\x04\x02\x08\x0a\x01\x03\x03"
"""Kinds and lengths in the SYN of most systems (RFC 7323 appendix A): segment size, permission of
SACK, timestamp, one byte of padding, window scale."""


class Window(NamedTuple):
    """Sequence space of one sender; see the module header.

    Attributes:
        end: highest sequence number + length sent.
        max_end: highest sequence number the other side has granted.
        max_window: largest own window advertised, scaled; 0 = nothing is known of this side.
        max_ack: highest acknowledgment sent; only if `ACKED` is set.
        scale: shift count of this side's windows, 0-14.
        flags: bits `SCALING` to `LEARNT`.
        initial: first sequence number after this side's SYN; with `LEARNT` that of the segment
            which the window was learnt from.
        fin: sequence number after this side's FIN, or `NO_FIN`.
    """

    end: int
    max_end: int
    max_window: int
    max_ack: int
    scale: int
    flags: int
    initial: int
    fin: int


UNKNOWN: Final = Window(0, 0, 0, 0, 0, 0, 0, NO_FIN)


_SIDE: Final = Struct("!IIIIIIBB")
_FIN_KNOWN: Final = 0x80  # in the byte of the scale, which is at most 14
_LARGEST: Final = 0xFFFFFFFF


def pack(windows: tuple[Window, Window]) -> bytes:
    """Both windows (original, reply) in 26 bytes each; the second is left out while unknown.

    As tuples of numbers they take 240 to 500 bytes, which is most of what a flow takes.
    """
    original, reply = windows
    return _pack_side(original) + (b"" if reply == UNKNOWN else _pack_side(reply))


def _pack_side(window: Window) -> bytes:
    end, max_end, max_window, max_ack, scale, flags, initial, fin = window
    if fin >= 0:
        scale |= _FIN_KNOWN
    max_window = min(max_window, _LARGEST)
    return _SIDE.pack(end, max_end, max_window, max_ack, initial, fin & _LARGEST, scale, flags)


def unpack(data: bytes) -> tuple[Window, Window]:
    """The windows that `pack` made the bytes of."""
    reply = UNKNOWN if len(data) == _SIDE.size else _unpack_side(data, _SIDE.size)
    return _unpack_side(data, 0), reply


def _unpack_side(data: bytes, at: int) -> Window:
    end, max_end, max_window, max_ack, initial, fin, scale, flags = _SIDE.unpack_from(data, at)
    fin = fin if scale & _FIN_KNOWN else NO_FIN
    return make(end, max_end, max_window, max_ack, scale & ~_FIN_KNOWN, flags, initial, fin)


def make(  # noqa: PLR0917 -- twice per segment: keywords cost
    end: int,
    max_end: int,
    max_window: int,
    max_ack: int,
    scale: int,
    flags: int,
    initial: int,
    fin: int,
) -> Window:
    """A window; three times as fast as calling the class, which matters once per segment."""
    return tuple.__new__(Window, (end, max_end, max_window, max_ack, scale, flags, initial, fin))


def with_flags(window: Window, flags: int) -> Window:
    """The same window with other flags."""
    end, max_end, max_window, max_ack, scale, _, initial, fin = window
    return make(end, max_end, max_window, max_ack, scale, flags, initial, fin)


def after(first: int, second: int) -> bool:
    """Whether sequence number `first` is behind `second` (RFC 1982 serial arithmetic)."""
    return 0 < (first - second) & MODULUS_MASK < HALF


def may_have_sent(window: Window, number: int, granted_bytes: int) -> bool:
    """Whether a side whose window was learnt may have sent what precedes a sequence number before.

    A repeated segment begins with the oldest data that is not acknowledged, so what it had sent by
    then ends within one window of the other side from there (RFC 9293 section 3.8.1).

    Args:
        window: the side's.
        number: behind its `end`.
        granted_bytes: the largest window of the other side.
    """
    if not window.flags & LEARNT:
        return False
    return (number - window.initial) & MODULUS_MASK <= granted_bytes


def segment_end(sequence: int, payload_bytes: int, flags: int) -> int:
    """Sequence number after the segment; SYN and FIN count one each (RFC 9293 section 3.4)."""
    return (sequence + payload_bytes + (flags & 1) + (flags >> 1 & 1)) & MODULUS_MASK


def syn_options(options: bytes) -> tuple[int, int]:
    """Window scale and SACK permission of a SYN or SYN/ACK.

    Options that leave the header end the walk: hosts stop there too (RFC 9293 section 3.1 gives no
    meaning to what follows).

    Returns:
        (shift count 0-14, bits `SCALING` and `SACK`).
    """
    scale = flags = at = 0
    end = len(options)
    if end == _USUAL_SYN_BYTES and options[:2] + options[4:8] + options[16:19] == _USUAL_SYN:
        return min(options[19], MAX_SCALE), SCALING | SACK
    while at < end:
        kind = options[at]
        if kind == _KIND_END:
            break
        if kind == _KIND_NOP:
            at += 1
            continue
        if at + 1 >= end:
            break
        length = options[at + 1]
        if length < 2 or at + length > end:
            break
        if kind == _KIND_SCALE and length == 3:
            scale = min(options[at + 2], MAX_SCALE)
            flags |= SCALING
        elif kind == _KIND_SACK_OK and length == 2:
            flags |= SACK
        at += length
    return scale, flags


def highest_sack(options: bytes, acknowledgment: int) -> int:
    """Highest right edge of the SACK blocks, or the acknowledgment if that is higher.

    A segment that selectively acknowledges unsent data is as wrong as one that acknowledges it.
    """
    if len(options) == 12 and options[:4] == ONLY_TIMESTAMP:
        return acknowledgment
    highest = acknowledgment
    at = 0
    end = len(options)
    while at < end:
        kind = options[at]
        if kind == _KIND_END:
            break
        if kind == _KIND_NOP:
            at += 1
            continue
        if at + 1 >= end:
            break
        length = options[at + 1]
        if length < 2 or at + length > end:
            break
        if kind == _KIND_SACK and (length - 2) % _SACK_BLOCK_BYTES == 0:
            for edge in range(at + 6, at + length, _SACK_BLOCK_BYTES):
                right = int.from_bytes(options[edge : edge + 4], "big")
                if 0 < (right - highest) & MODULUS_MASK < HALF:
                    highest = right
        at += length
    return highest
