"""The client's end of an HTTP/2 connection: the h2 codec, what may come in, what goes out.

Thin over the h2 library: it adds the frame counts of `frames`, counts resets, writes the proxy's
own answers, and moves what streams have pending into the client's windows.
"""

from collections.abc import Iterator
from enum import IntEnum

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings

from l7proxy import refusals
from l7proxy.frames import ErrorCode, FrameFault, FrameReader, count_provoked_resets
from l7proxy.limits import Limits
from l7proxy.refusals import Refusal
from l7proxy.stream_head import FieldList, local_fields
from l7proxy.streams import Stream

_DEFAULT_WINDOW_BYTES = 65_535
"""RFC 9113 6.9.2; what a stream may have under way, and a connection until it is given more."""


class Progress(IntEnum):
    """How far the pending part of an answer got."""

    NONE = 0
    SOME = 1
    ENDED = 2


class Downstream:
    """One client's HTTP/2 connection.

    Attributes:
        codec: the library's state; what it wants to say is taken by `output`.
        frames: counts and cuts what comes.
        last_number: highest stream that was looked at, for GOAWAY.
    """

    __slots__ = ("_limits", "_reset_count", "_resets_end_at", "codec", "frames", "last_number")

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self.frames = FrameReader(limits, preface=True)
        self.codec = _codec(limits)
        self.last_number = 0
        self._reset_count = 0
        self._resets_end_at = now

    def waits_until(self, *, busy: bool) -> float:
        """Return until when the rest of a frame or header block may come, infinity if none began.

        `busy`: there are streams, so that it may be a part of a slow body.
        """
        since, limits = self.frames.waits_since, self._limits
        if since is None:
            return float("inf")
        slow = busy and not self.frames.in_block
        return since + (limits.body_timeout_s if slow else limits.head_timeout_s)

    def count_resets(self, count: int, now: float) -> None:
        """Count streams that were reset before they were answered.

        Raises:
            FrameFault: there are too many.
        """
        if now >= self._resets_end_at:
            self._resets_end_at = now + self._limits.h2_window_s
            self._reset_count = 0
        self._reset_count += count
        if self._reset_count > self._limits.h2_reset_count:
            raise FrameFault(refusals.H2_RESET_FLOOD, ErrorCode.ENHANCE_YOUR_CALM)

    def output(self, now: float) -> Iterator[bytes]:
        """Yield what there is to send, then count what it resets.

        Raises:
            FrameFault: as `count_resets`.
        """
        data = self.codec.data_to_send()
        if data:
            yield data
            self.count_resets(count_provoked_resets(data), now)

    def answer(
        self, number: int, refusal: Refusal, *, grpc: bool, head_only: bool, ended: bool
    ) -> None:
        """Answer for the server, and want nothing more of the request (RFC 9113 8.1)."""
        fields, body = local_fields(refusal, grpc=grpc, denied_body=self._limits.denied_body)
        if body and self.codec.local_flow_control_window(number) < len(body):
            fields, body = fields[:-1], b""  # rather than keep it until there is room
        if head_only:
            body = b""
        self.codec.send_headers(number, fields, end_stream=not body)
        if body:
            self.codec.send_data(number, body, end_stream=True)
        if not ended:
            self.reset(number, ErrorCode.NO_ERROR)

    def answer_stream(self, stream: Stream, refusal: Refusal) -> None:
        """Answer a request that was read."""
        head_only = stream.ongoing.request.method == b"HEAD"
        self.answer(
            stream.number,
            refusal,
            grpc=stream.grpc,
            head_only=head_only,
            ended=stream.request_ended,
        )

    def head(self, number: int, fields: FieldList, *, ended: bool = False) -> None:
        """Send a head, final or interim; `ended`: nothing follows it."""
        self.codec.send_headers(number, fields, end_stream=ended)

    def reset(self, number: int, code: ErrorCode) -> None:
        """End a stream."""
        self.codec.reset_stream(number, h2.errors.ErrorCodes(code))

    def give_back(self, number: int, size_bytes: int) -> None:
        """Let the client send as many bytes more; on an ended stream, to other streams."""
        self.codec.acknowledge_received_data(size_bytes, number)

    def write(self, stream: Stream, *, blocked: bool) -> Progress:
        """Send as much of what is pending as the windows and (unless `blocked`) the socket take."""
        codec, number, pending = self.codec, stream.number, stream.pending
        progress = Progress.NONE
        while pending and not blocked:
            room = min(codec.local_flow_control_window(number), codec.max_outbound_frame_size)
            if room <= 0:
                return progress
            last = stream.answer_ended and len(pending) <= room and not stream.trailers
            codec.send_data(number, bytes(pending[:room]), end_stream=last)
            self.frames.sent_data_count += 1
            del pending[:room]
            if last:
                return Progress.ENDED
            progress = Progress.SOME
        if pending or not stream.answer_ended:
            return progress
        if stream.trailers:
            codec.send_headers(number, stream.trailers, end_stream=True)
        else:
            codec.end_stream(number)
        return Progress.ENDED


def _codec(limits: Limits) -> h2.connection.H2Connection:
    """Return the codec of the client's side, with its SETTINGS to be sent."""
    config = h2.config.H2Configuration(
        client_side=False,
        header_encoding=None,
        normalize_inbound_headers=False,
        normalize_outbound_headers=False,
    )
    codec = h2.connection.H2Connection(config)
    codes = h2.settings.SettingCodes
    codec.local_settings = h2.settings.Settings(
        client=False,
        initial_values={
            codes.MAX_CONCURRENT_STREAMS: limits.h2_stream_count,
            codes.MAX_HEADER_LIST_SIZE: limits.head_bytes,
            codes.INITIAL_WINDOW_SIZE: limits.h2_stream_bytes,
        },
    )
    codec.decoder.max_header_list_size = limits.head_bytes
    codec.initiate_connection()
    more = limits.h2_connection_bytes - _DEFAULT_WINDOW_BYTES
    if more > 0:
        codec.increment_flow_control_window(more)
    return codec
