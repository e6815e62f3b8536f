"""HTTP/2 bytes cut into frames, and the floods that are seen before anything is decoded.

The h2 library decides what a frame means; this module decides how many there may be. It looks at
nine bytes of each frame: what costs the sender little and the receiver much is counted (empty
frames, CONTINUATION, SETTINGS and PING, PRIORITY, WINDOW_UPDATE), and a frame that is longer than
announced is refused before its bytes are gathered. Feeding the library frame by frame also means
that a faulty frame does not take the effects of those before it with it.

GOAWAY is kept from the library, which would not let the streams that have begun end after it; it is
handed to the caller instead. Source: RFC 9113 4.1, 6; Envoy http2_protocol_options (limits), CVE
numbers at each limit in `l7proxy.limits`.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from l7proxy import refusals
from l7proxy.limits import Limits
from l7proxy.refusals import Refusal

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""RFC 9113 3.4."""

PREFACE_LINE = PREFACE[:16]
"""As much of it as no HTTP/1 request begins with: `PRI` and 2.0 exist for nothing else."""

_HEADER_BYTES = 9
_FRAME_BYTES = 16_384
"""RFC 9113 4.2: what a peer may send unless told that it may send more, which we do not."""

_END_STREAM = 0x1
_END_HEADERS = 0x4
_PADDED = 0x8


class Kind(IntEnum):
    """RFC 9113 6."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class ErrorCode(IntEnum):
    """RFC 9113 7, those that this proxy sends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    ENHANCE_YOUR_CALM = 11


class FrameFault(Exception):  # noqa: N818 - ends the connection at once
    """The connection must end; `refusal` is for the log, `code` for GOAWAY."""

    def __init__(self, refusal: Refusal, code: ErrorCode) -> None:
        super().__init__(refusal.detail)
        self.refusal = refusal
        self.code = code


class Frame(NamedTuple):
    """One complete frame; `data` is all of it, `kind` may be a number that RFC 9113 lacks."""

    kind: int
    flags: int
    stream: int
    data: bytes

    @property
    def payload(self) -> bytes:
        """What follows the frame's header."""
        return self.data[_HEADER_BYTES:]


LAST_STREAM = (1 << 31) - 1
"""The highest number of a stream: in a GOAWAY, that the end is near (RFC 9113 6.8)."""


def goaway(last_stream: int, code: ErrorCode) -> bytes:
    """Return a GOAWAY frame: streams up to `last_stream` may still be answered (RFC 9113 6.8)."""
    return b"\x00\x00\x08\x07\x00\x00\x00\x00\x00%b%b" % (
        last_stream.to_bytes(4, "big"),
        int(code).to_bytes(4, "big"),
    )


_PROVOKED = frozenset((1, 3, 5))
"""PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED: resets that the peer's own frames caused."""


def count_provoked_resets(data: bytes) -> int:
    """Return how many streams whole frames of ours reset because of what the peer sent."""
    offset = count = 0
    while offset < len(data):
        size = _HEADER_BYTES + int.from_bytes(data[offset : offset + 3], "big")
        if data[offset + 3] == Kind.RST_STREAM and data[offset + size - 1] in _PROVOKED:
            count += 1
        offset += size
    return count


class FrameReader:
    """Frames of one peer.

    Attributes:
        sent_data_count: DATA frames sent to this peer; it may answer each with WINDOW_UPDATEs.
        waits_since: monotonic seconds at which an incomplete frame or header block began, or None.
    """

    __slots__ = (
        "_block_bytes", "_block_frames", "_buffer", "_control_count", "_empty_count", "_limits",
        "_need_preface", "_priority_count", "_stream_count", "_window_count", "_window_ends_at",
        "sent_data_count", "waits_since",
    )  # fmt: skip

    def __init__(self, limits: Limits, *, preface: bool) -> None:
        self._limits = limits
        self._buffer = b""
        self._need_preface = preface
        self._block_frames = 0
        self._block_bytes = 0
        self._control_count = 0
        self._empty_count = 0
        self._priority_count = 0
        self._stream_count = 0
        self._window_count = 0
        self._window_ends_at = 0.0
        self.sent_data_count = 0
        self.waits_since: float | None = None

    @property
    def in_block(self) -> bool:
        """Whether a header block has begun and not ended."""
        return self._block_frames > 0

    def read(self, data: bytes, now: float) -> Iterator[Frame]:
        """Yield the complete frames that there are now, the preface as one with kind -1.

        Raises:
            FrameFault: no preface, a frame too long, or too many of a kind.
        """
        self._buffer += data
        offset = 0
        if now >= self._window_ends_at:
            self._window_ends_at = now + self._limits.h2_window_s
            self._control_count = 0
        if self._need_preface:
            if not PREFACE.startswith(self._buffer[: len(PREFACE)]):
                raise FrameFault(refusals.H2_PROTOCOL, ErrorCode.PROTOCOL_ERROR)
            if len(self._buffer) < len(PREFACE):
                self._wait(now)
                return
            self._need_preface = False
            offset = len(PREFACE)
            yield Frame(-1, 0, 0, PREFACE)
        while (frame := self._frame(offset)) is not None:
            offset += len(frame.data)
            self._count(frame)
            if not self.in_block:
                self.waits_since = None
            yield frame
        self._buffer = self._buffer[offset:]
        if self._buffer or self.in_block:
            self._wait(now)

    def _wait(self, now: float) -> None:
        if self.waits_since is None:
            self.waits_since = now

    def _frame(self, offset: int) -> Frame | None:
        buffer = self._buffer
        if len(buffer) < offset + _HEADER_BYTES:
            return None
        length = int.from_bytes(buffer[offset : offset + 3], "big")
        if length > _FRAME_BYTES:
            raise FrameFault(refusals.H2_PROTOCOL, ErrorCode.FRAME_SIZE_ERROR)
        end = offset + _HEADER_BYTES + length
        if len(buffer) < end:
            return None
        stream = int.from_bytes(buffer[offset + 5 : offset + 9], "big") & 0x7FFF_FFFF
        return Frame(buffer[offset + 3], buffer[offset + 4], stream, buffer[offset:end])

    def _count(self, frame: Frame) -> None:
        limits = self._limits
        match frame.kind:
            case Kind.DATA:
                self._count_empty(frame, ends=bool(frame.flags & _END_STREAM))
            case Kind.HEADERS | Kind.CONTINUATION | Kind.PUSH_PROMISE:
                self._count_block(frame)
            case Kind.PRIORITY:
                self._priority_count += 1
                if self._priority_count > limits.h2_priority_count * (1 + self._stream_count):
                    raise _flood(refusals.H2_PRIORITY_FLOOD)
            case Kind.WINDOW_UPDATE:
                self._window_count += 1
                allowed = 1 + self._stream_count + self.sent_data_count
                if self._window_count > limits.h2_window_update_count * allowed:
                    raise _flood(refusals.H2_WINDOW_FLOOD)
            case Kind.RST_STREAM:
                pass  # counted with those that we send, by who knows what they ended
            case _:
                self._control_count += 1
                if self._control_count > limits.h2_control_count:
                    raise _flood(refusals.H2_CONTROL_FLOOD)

    def _count_block(self, frame: Frame) -> None:
        if frame.kind != Kind.CONTINUATION:
            self._stream_count += 1
            self._block_frames = self._block_bytes = 0
        ends = bool(frame.flags & _END_HEADERS)
        self._count_empty(frame, ends=ends)
        self._block_frames += 1
        self._block_bytes += len(frame.data)
        if (
            self._block_frames > self._limits.h2_continuation_count + 1
            or self._block_bytes > self._limits.head_bytes
        ):
            raise _flood(refusals.H2_CONTINUATION_FLOOD)
        if ends:
            self._block_frames = 0

    def _count_empty(self, frame: Frame, *, ends: bool) -> None:
        """CVE-2019-9518: frames that carry nothing and end nothing."""
        payload = len(frame.data) - _HEADER_BYTES
        if payload and frame.kind == Kind.DATA and frame.flags & _PADDED:
            payload -= 1 + frame.data[_HEADER_BYTES]
        self._empty_count = 0 if ends or payload > 0 else self._empty_count + 1
        if self._empty_count > self._limits.h2_empty_count:
            raise _flood(refusals.H2_EMPTY_FLOOD)


def _flood(refusal: Refusal) -> FrameFault:
    return FrameFault(refusal, ErrorCode.ENHANCE_YOUR_CALM)
