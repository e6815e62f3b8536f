"""The ways of HTTP/2 streams to their server: one HTTP/1 connection each, or one HTTP/2 for all.

A lane takes the requests of streams and turns the server's bytes into `AnswerPart`s; what becomes
of those at the client is not its business. An `H1Lane` serves one stream at a time and may be used
again; it says of a server exactly what `reply.Reply` says for HTTP/1 clients. An `H2Lane` sends the
preface and SETTINGS alone and waits for the server's SETTINGS before any request, so that a server
that turns out to speak HTTP/1 has seen no request, only a preface that it must refuse.

Both belong to one client connection and are never shared. Source: RFC 9113 3.3, 5, 6.
"""

from collections import deque

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from l7proxy import refusals
from l7proxy.commands import Command, Count, PauseUpstream, ResumeUpstream
from l7proxy.frames import FrameFault, FrameReader, Kind
from l7proxy.framing import LAST_CHUNK, Delimiter, chunk
from l7proxy.limits import Limits
from l7proxy.link import Link, LinkState
from l7proxy.ongoing import IDEMPOTENT
from l7proxy.refusals import Refusal, RequestRefused, ResponseRefused
from l7proxy.reply import StreamReply
from l7proxy.request import serialise
from l7proxy.responses import admit_response
from l7proxy.stream_head import check_trailers, read_response, request_fields
from l7proxy.streams import (
    AnswerBroken,
    AnswerData,
    AnswerEnd,
    AnswerHead,
    AnswerInterim,
    AnswerPart,
    NotSpoken,
    Stream,
)


class H1Lane:
    """One HTTP/1 connection to the server.

    Attributes:
        link: its state.
        stream: whose request it carries, None: it is free.
    """

    __slots__ = ("_limits", "link", "stream")

    def __init__(self, number: int, limits: Limits) -> None:
        self._limits = limits
        self.link = Link(number)
        self.stream: Stream | None = None

    def start(self, stream: Stream, commands: list[Command]) -> None:
        """Send the head of a request."""
        self.stream = stream
        ongoing = stream.ongoing
        request = ongoing.request
        data = serialise(request, stream.fields, stream.request_id)
        ongoing.reply = StreamReply(request, self._limits)
        if self.link.used and self._limits.retry_idle_close and not request.has_body:
            ongoing.replay = data if request.method in IDEMPOTENT else b""
        if self.link.state is LinkState.NONE:
            commands.append(self.link.open())
        self.link.send(data, commands)

    def send_body(self, stream: Stream, payload: bytes, commands: list[Command]) -> None:
        """Send a part of the request's body."""
        chunked = stream.ongoing.request.framing.delimiter is Delimiter.CHUNKED
        self.link.send(chunk(payload) if chunked else payload, commands)

    def end_body(self, stream: Stream, commands: list[Command]) -> None:
        """End the request's body; its trailers end here."""
        if stream.ongoing.request.framing.delimiter is Delimiter.CHUNKED:
            self.link.send(LAST_CHUNK, commands)

    def takes_body(self, stream: Stream) -> bool:  # noqa: ARG002 - it has only one
        """Whether more of the body may come."""
        return self.link.state is LinkState.OPEN and not self.link.blocked

    def hold(self, stream: Stream, *, held: bool, commands: list[Command]) -> None:  # noqa: ARG002
        """Read nothing more of the answer for now, or read again."""
        link = self.link
        if link.state is LinkState.OPEN and held is not link.paused:
            link.paused = held
            commands.append(PauseUpstream(link.number) if held else ResumeUpstream(link.number))

    def cancel(self, stream: Stream, commands: list[Command]) -> None:  # noqa: ARG002
        """Give up the request; what the server has of it must not look complete."""
        self.link.drop(commands, reset=True)
        self.stream = None

    def opened(self, now: float, commands: list[Command]) -> list[AnswerPart]:  # noqa: ARG002
        """Take that the server accepted the connection."""
        commands.append(self.link.opened())
        return []

    def failed(self, refusal: Refusal) -> list[AnswerPart]:
        """Take that there is no connection."""
        self.link.failed()
        stream, self.stream = self.stream, None
        return [AnswerBroken(stream, refusal)] if stream is not None else []

    def receive(self, data: bytes, now: float, commands: list[Command]) -> list[AnswerPart]:  # noqa: ARG002
        """Take bytes of the server."""
        stream = self.stream
        reply = None if stream is None else stream.ongoing.reply
        if stream is None or not isinstance(reply, StreamReply):
            # Bytes that answer no request would answer the next one: the queue is poisoned.
            commands.append(Count("upstream_unsolicited_bytes"))
            self.link.drop(commands, reset=True)
            return []
        headless = reply.response is None
        try:
            payload = reply.read(data, close=False)
        except ResponseRefused as refused:
            self.cancel(stream, commands)
            return [AnswerBroken(stream, refused.refusal)]
        stream.ongoing.replay = b""
        parts: list[AnswerPart] = [AnswerInterim(stream, head) for head in reply.interim]
        reply.interim.clear()
        if headless and reply.response is not None:
            ended = reply.done and not payload
            parts.append(AnswerHead(stream, reply.response, ended))
        if payload:
            parts.append(AnswerData(stream, payload))
        if reply.done:
            parts.append(self._end(stream, reply, commands))
        return parts

    def ended(self, *, lost: bool, commands: list[Command]) -> list[AnswerPart]:
        """Take the server's FIN, or the loss of the connection."""
        stream = self.stream
        reply = None if stream is None else stream.ongoing.reply
        if stream is None or not isinstance(reply, StreamReply):
            self.link.drop(commands, reset=False)
            return []
        if not reply.begun and stream.ongoing.replay:
            data, stream.ongoing.replay = stream.ongoing.replay, b""
            self.link.drop(commands, reset=False)
            commands.append(Count("upstream_rq_retry"))
            commands.append(self.link.open())
            self.link.send(data, commands)
            return []
        if reply.response is not None and not lost and reply.end() is not None:
            return [self._end(stream, reply, commands)]
        self.cancel(stream, commands)
        if reply.response is not None:
            return [AnswerBroken(stream, refusals.UPSTREAM_TRUNCATED)]
        begun = refusals.UPSTREAM_PROTOCOL if reply.begun else refusals.UPSTREAM_CLOSED
        return [AnswerBroken(stream, begun)]

    def _end(self, stream: Stream, reply: StreamReply, commands: list[Command]) -> AnswerPart:
        response = reply.response
        assert response is not None
        self.link.used = True
        self.stream = None
        if reply.excess or not response.reusable or not stream.request_ended:
            self.link.drop(commands, reset=not stream.request_ended)
        return AnswerEnd(stream, [])


class H2Lane:
    """One HTTP/2 connection to the server.

    Attributes:
        link: its state.
        spoken: the server has sent its SETTINGS.
        leaving: it takes no new streams.
    """

    __slots__ = (
        "_codec", "_frames", "_limits", "_scheme", "_streams", "_waiting", "leaving", "link",
        "spoken",
    )  # fmt: skip

    def __init__(self, number: int, limits: Limits, scheme: bytes) -> None:
        self._limits = limits
        self._scheme = scheme
        self.link = Link(number)
        self.spoken = False
        self.leaving = False
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding=None,
            normalize_inbound_headers=False,
            normalize_outbound_headers=False,
        )
        self._codec = codec = h2.connection.H2Connection(config)
        codes = h2.settings.SettingCodes
        codec.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                codes.ENABLE_PUSH: 0,
                codes.MAX_HEADER_LIST_SIZE: limits.response_head_bytes,
                codes.INITIAL_WINDOW_SIZE: limits.h2_stream_bytes,
            },
        )
        codec.decoder.max_header_list_size = limits.response_head_bytes
        self._frames = FrameReader(limits, preface=False)
        self._streams: dict[int, Stream] = {}
        self._waiting: deque[Stream] = deque()

    # --- requests --------------------------------------------------------------------------------

    def start(self, stream: Stream, commands: list[Command]) -> None:
        """Send the head of a request, now or when the server is ready for it."""
        self._waiting.append(stream)
        stream.ongoing.reply = StreamReply(stream.ongoing.request, self._limits)
        if self.link.state is LinkState.NONE:
            commands.append(self.link.open(http2=True))
            self._codec.initiate_connection()
            self._codec.increment_flow_control_window(self._limits.h2_connection_bytes)
        self._start_waiting()
        self._flush(commands)

    def _start_waiting(self) -> None:
        codec = self._codec
        allowed = codec.remote_settings.max_concurrent_streams
        while self.spoken and self._waiting and codec.open_outbound_streams < allowed:
            stream = self._waiting.popleft()
            request = stream.ongoing.request
            number = stream.upstream_number = codec.get_next_available_stream_id()
            self._streams[number] = stream
            fields = request_fields(request, stream.fields, stream.request_id, self._scheme)
            ended = stream.request_ended and not stream.upload and not stream.upload_trailers
            codec.send_headers(number, fields, end_stream=ended)
            if not ended:
                self._upload(stream)

    def send_body(self, stream: Stream, payload: bytes, commands: list[Command]) -> None:
        """Send a part of the request's body as far as the server's window lets it."""
        stream.upload += payload
        if stream.upstream_number:
            self._upload(stream)
            self._flush(commands)

    def end_body(self, stream: Stream, commands: list[Command]) -> None:
        """End the request; `stream.request_ended` is set."""
        if stream.upstream_number:
            self._upload(stream)
            self._flush(commands)

    def _upload(self, stream: Stream) -> None:
        codec, number = self._codec, stream.upstream_number
        while stream.upload and not self.link.blocked:
            room = min(codec.local_flow_control_window(number), codec.max_outbound_frame_size)
            if room <= 0:
                return
            ended = stream.request_ended and len(stream.upload) <= room
            ended = ended and not stream.upload_trailers
            codec.send_data(number, bytes(stream.upload[:room]), end_stream=ended)
            self._frames.sent_data_count += 1
            del stream.upload[:room]
            if ended:
                return
        if stream.request_ended and not stream.upload:
            if stream.upload_trailers:
                codec.send_headers(number, stream.upload_trailers, end_stream=True)
            else:
                codec.end_stream(number)

    def takes_body(self, stream: Stream) -> bool:
        """Whether more of the body may come."""
        return bool(stream.upstream_number) and not stream.upload and not self.link.blocked

    def hold(self, stream: Stream, *, held: bool, commands: list[Command]) -> None:
        """Give the server's window back unless its answer is `held`."""
        if not held and stream.upstream_owed_bytes and stream.upstream_number:
            owed, stream.upstream_owed_bytes = stream.upstream_owed_bytes, 0
            self._codec.acknowledge_received_data(owed, stream.upstream_number)
            self._flush(commands)

    def cancel(self, stream: Stream, commands: list[Command]) -> None:
        """Give up the request."""
        if stream in self._waiting:
            self._waiting.remove(stream)
            if not self.spoken and not self._waiting:  # it never answered; another one may
                self.leaving = True
                self.link.drop(commands, reset=True)
            return
        if self._streams.get(stream.upstream_number) is stream and self.link.state is not (
            LinkState.NONE
        ):
            self._release(stream)
            self._codec.reset_stream(stream.upstream_number, h2.errors.ErrorCodes.CANCEL)
            self._start_waiting()
            self._flush(commands)

    def _release(self, stream: Stream) -> None:
        """Let go of a stream, whose unread bytes must not stay taken from the common window."""
        del self._streams[stream.upstream_number]
        if stream.upstream_owed_bytes:
            self._codec.acknowledge_received_data(
                stream.upstream_owed_bytes, stream.upstream_number
            )
            stream.upstream_owed_bytes = 0

    # --- the server's side -----------------------------------------------------------------------

    def opened(self, now: float, commands: list[Command]) -> list[AnswerPart]:  # noqa: ARG002
        """Take that the server accepted the connection."""
        commands.append(self.link.opened())
        return []

    def unblocked(self, commands: list[Command]) -> None:
        """Go on sending."""
        self._upload_all()
        self._flush(commands)

    def _upload_all(self) -> None:
        for stream in self._streams.values():
            if stream.upload:
                self._upload(stream)

    def failed(self, refusal: Refusal) -> list[AnswerPart]:
        """Take that there is no connection."""
        self.link.failed()
        if refusal is refusals.UPSTREAM_NO_HTTP2:
            return self._not_spoken()
        return self._break_all(refusal)

    def _break_all(self, refusal: Refusal, late: Refusal | None = None) -> list[AnswerPart]:
        self.leaving = True
        streams = [*self._streams.values(), *self._waiting]
        self._streams.clear()
        self._waiting.clear()
        return [
            AnswerBroken(stream, late if late and stream.head_sent else refusal)
            for stream in streams
        ]

    def ended(self, *, lost: bool, commands: list[Command]) -> list[AnswerPart]:
        """Take the end of the server's connection."""
        self.link.drop(commands, reset=lost)
        if not self.spoken:
            return self._not_spoken()
        return self._break_all(refusals.UPSTREAM_CLOSED, refusals.UPSTREAM_TRUNCATED)

    def _not_spoken(self) -> list[AnswerPart]:
        self.leaving = True
        streams = list(self._waiting)
        self._waiting.clear()
        return [NotSpoken(stream) for stream in streams]

    def receive(self, data: bytes, now: float, commands: list[Command]) -> list[AnswerPart]:
        """Take bytes of the server."""
        if not self.spoken and data[:5] == b"HTTP/":
            self.link.drop(commands, reset=True)
            return self._not_spoken()
        parts: list[AnswerPart] = []
        try:
            for frame in self._frames.read(data, now):
                if frame.kind == Kind.GOAWAY:
                    parts += self._going_away(frame.payload)
                    continue
                for event in self._codec.receive_data(frame.data):
                    parts += self._take(event)
        except (h2.exceptions.ProtocolError, FrameFault, ResponseRefused, RequestRefused):
            self._flush(commands)  # GOAWAY
            self.link.drop(commands, reset=False)
            return parts + self._break_all(
                refusals.UPSTREAM_PROTOCOL, refusals.UPSTREAM_LATE_PROTOCOL
            )
        self._start_waiting()
        self._flush(commands)
        return parts

    def _going_away(self, payload: bytes) -> list[AnswerPart]:
        """RFC 9113 6.8: streams above the last one were not processed."""
        self.leaving = True
        last = int.from_bytes(payload[:4], "big") & 0x7FFF_FFFF
        refused = [stream for number, stream in self._streams.items() if number > last]
        for stream in refused:
            del self._streams[stream.upstream_number]
        refused += self._waiting
        self._waiting.clear()
        return [AnswerBroken(stream, refusals.UPSTREAM_CLOSED) for stream in refused]

    def _take(self, event: h2.events.Event) -> list[AnswerPart]:
        stream = self._streams.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, h2.events.RemoteSettingsChanged):
            self.spoken = True
            self._upload_all()
        elif isinstance(event, h2.events.WindowUpdated):
            self._upload_all()
        elif isinstance(event, h2.events.DataReceived):
            return self._take_data(stream, event)
        elif stream is not None:
            return self._take_other(stream, event)
        return []

    def _take_data(self, stream: Stream | None, event: h2.events.DataReceived) -> list[AnswerPart]:
        size = event.flow_controlled_length or 0
        reply = None if stream is None else stream.ongoing.reply
        if stream is None or reply is None:  # of a stream that we gave up
            self._codec.acknowledge_received_data(size, event.stream_id or 0)
            return []
        stream.upstream_owed_bytes += size
        reply.sent_bytes += len(event.data or b"")
        return [AnswerData(stream, event.data)] if event.data else []

    def _take_other(self, stream: Stream, event: h2.events.Event) -> list[AnswerPart]:
        if isinstance(event, h2.events.ResponseReceived):
            return self._take_head(stream, event)
        if isinstance(event, h2.events.InformationalResponseReceived):
            method = stream.ongoing.request.method
            head = read_response(event.headers or [], method, self._limits)
            # The proxy says 100 itself.
            return [AnswerInterim(stream, head)] if head.status != 100 else []
        if isinstance(event, h2.events.TrailersReceived):
            stream.trailers = check_trailers(event.headers or [], self._limits)
        elif isinstance(event, h2.events.StreamEnded):
            self._release(stream)
            if not stream.request_ended or stream.upload:
                self._codec.reset_stream(stream.upstream_number, h2.errors.ErrorCodes.CANCEL)
            return [AnswerEnd(stream, stream.trailers)]
        elif isinstance(event, h2.events.StreamReset):
            self._release(stream)
            refusal = refusals.UPSTREAM_RESET
            if stream.head_sent:
                refusal = refusals.UPSTREAM_LATE_RESET
            return [AnswerBroken(stream, refusal)]
        return []

    def _take_head(self, stream: Stream, event: h2.events.ResponseReceived) -> list[AnswerPart]:
        method = stream.ongoing.request.method
        head = read_response(event.headers or [], method, self._limits)
        reply = stream.ongoing.reply
        assert reply is not None
        reply.begun = True
        reply.response = response = admit_response(head, method, 1)
        return [AnswerHead(stream, response, event.stream_ended is not None)]

    def _flush(self, commands: list[Command]) -> None:
        data = self._codec.data_to_send()
        if data and self.link.state is not LinkState.NONE:
            self.link.send(data, commands)


Lane = H1Lane | H2Lane
