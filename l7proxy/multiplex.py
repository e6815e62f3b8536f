"""One HTTP/2 client connection: its streams side by side, each judged, sent on and answered.

The counterpart of `l7proxy.exchange` for HTTP/2 with prior knowledge: the same events and commands,
the same judge, target and records; nothing here waits, reads a clock or knows a socket. The h2
library keeps the protocol's state for the client's side, `frames` counts what could exhaust us,
`lanes` are the ways to the server.

    frame ── counted ── decoded ──┬─ HEADERS: admit_stream, judge ──┬─ a lane ── answer parts ─┐
             frames     h2        ├─ DATA: to the lane, window back │                          │
                                  └─ RST_STREAM: counted, cancelled └─ 403 on that stream      │
             client ◄── as far as its windows reach ◄──────────────────────────────────────────┘

Rules.
  * A stream is decided when its HEADERS are complete, by the snapshot of that moment.
  * A request that has no single reading is answered 400 on its stream; what breaks the connection's
    state, or floods it, ends the connection with GOAWAY.
  * A window is given back only for what the server has taken; an answer that the client's window
    does not let through is not read from the server beyond `buffer_bytes`.
  * An answer that cannot be completed ends with RST_STREAM.
  * Any exception resets everything (fail closed).
Source: RFC 9113; CVE-2023-44487, CVE-2025-8671, CVE-2019-9511 to 9518.
"""

from collections.abc import Callable
from typing import assert_never

import h2.events
import h2.exceptions
from msgspec.structs import replace

from l7proxy import commands, refusals, streams
from l7proxy.core import Core, event
from l7proxy.downstream import Downstream, Progress
from l7proxy.frames import LAST_STREAM, ErrorCode, FrameFault, Kind, goaway
from l7proxy.framing import LengthReader
from l7proxy.judgement import Judge
from l7proxy.lanes import H2Lane, Lane
from l7proxy.limits import Limits
from l7proxy.link import LinkState, connect_refusal
from l7proxy.ongoing import Ongoing, connection_record, malformed_record
from l7proxy.phase import LINGER, Phase
from l7proxy.refusals import Refusal, RequestRefused
from l7proxy.request import has_mistakable_name
from l7proxy.stream_head import (
    admit_stream,
    check_trailers,
    interim_fields,
    response_fields,
)
from l7proxy.streams import Stream
from l7proxy.ways import Ways


class Multiplex(Core):
    """The streams of one client connection; arguments and events as for `exchange.Exchange`.

    `link` in the events about servers is the number in the command that opened the connection.
    """

    __slots__ = (
        "_client_blocked", "_client_ended", "_client_paused", "_down", "_judge", "_leaving",
        "_limits", "_new_request_id", "_now", "_streams", "_ways",
    )  # fmt: skip

    def __init__(
        self,
        judge: Judge,
        limits: Limits,
        new_request_id: Callable[[], str],
        now: float,
        scheme: bytes = b"http",
    ) -> None:
        super().__init__(Phase.IDLE, limits, now)
        self._judge = judge
        self._limits = limits
        self._new_request_id = new_request_id
        self._now = now
        self._down = Downstream(limits, now)
        self._streams: dict[int, Stream] = {}
        self._ways = Ways(limits, scheme)
        self._client_ended = False
        self._client_blocked = False
        self._client_paused = False
        self._leaving = False

    @property
    def deadline(self) -> float:
        """Monotonic time at which `tick` must be called, infinity if never."""
        deadlines = [stream.timer.deadline for stream in self._streams.values()]
        if not deadlines:
            deadlines.append(self._timer.deadline)
        return min(self._down.waits_until(busy=bool(self._streams)), *deadlines)

    def _over(self) -> bool:
        return self._phase >= LINGER

    def __repr__(self) -> str:
        return f"<Multiplex {self._phase.name} {len(self._streams)} streams>"

    # --- the client's side -----------------------------------------------------------------------

    @event
    def client_data(self, data: bytes, now: float) -> None:
        """Take bytes of the client."""
        self._now = now
        if self._over():
            return
        try:
            for frame in self._down.frames.read(data, now):
                if frame.kind < 0:
                    self._timer.await_request(now)
                    self._commands.append(commands.Count("http_downstream_cx_http2"))
                if frame.kind == Kind.GOAWAY:  # it opens no more streams, and waits for the others
                    self._leaving = True
                    continue
                for event in self._down.codec.receive_data(frame.data):
                    self._take(event)
                if self._over():
                    return
        except FrameFault as fault:
            self._flush_codec()
            self._send(goaway(self._down.last_number, fault.code))
            self._break(fault.refusal)
        except h2.exceptions.ProtocolError:
            self._flush_codec()  # GOAWAY among it
            self._break(refusals.H2_PROTOCOL)

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self._begin(event)
            return
        if isinstance(event, h2.events.RemoteSettingsChanged):
            self._send_all()
            return
        stream = self._streams.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, h2.events.DataReceived):
            self._take_body(stream, event)
        elif isinstance(event, h2.events.WindowUpdated):
            if stream is not None:
                self._send_answer(stream)
            elif not event.stream_id:
                self._send_all()
        elif stream is not None:
            self._take_end(stream, event)

    def _take_end(self, stream: Stream, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.TrailersReceived):
            try:
                stream.upload_trailers = check_trailers(event.headers or [], self._limits)
            except RequestRefused as refused:
                self._fail(stream, refused.refusal)
        elif isinstance(event, h2.events.StreamEnded):
            if not stream.request_ended:
                stream.request_ended = True
                stream.ongoing.request_s = self._now - stream.ongoing.head_at
                lane = self._ways.of(stream)
                lane.end_body(stream, self._commands)
                self._wait_for_answer(stream, lane)
        elif isinstance(event, h2.events.StreamReset):
            self._log_response(stream, refusals.CLIENT_GONE)
            self._drop(stream)
            self._down.count_resets(1, self._now)

    @event
    def client_ended(self, now: float) -> None:
        """Take the client's FIN: requests that are complete are still answered."""
        self._now = now
        self._client_ended = True
        if self._phase is Phase.LINGER:
            self._close_client(reset=False)
            return
        for stream in list(self._streams.values()):
            if not stream.request_ended:
                self._fail(stream, refusals.CLIENT_GONE)

    @event
    def client_lost(self, now: float) -> None:
        """Take the loss of the client's connection."""
        self._now = now
        if self._phase is Phase.CLOSED:
            return
        self._drop_all(refusals.CLIENT_GONE)
        self._phase = Phase.CLOSED
        self._timer.stop()

    # --- one stream ------------------------------------------------------------------------------

    def _begin(self, event: h2.events.RequestReceived) -> None:
        """Judge a request and answer it or send it on."""
        number, now = event.stream_id or 0, self._now
        ended = event.stream_ended is not None
        if self._leaving:
            self._down.reset(number, ErrorCode.REFUSED_STREAM)
            return
        self._down.last_number = number
        try:
            request = admit_stream(event.headers or [], ended=ended, limits=self._limits)
        except RequestRefused as refused:
            record = malformed_record(refused.refusal, None)
            self._log(replace(record, protocol="HTTP/2"))
            self._down.answer(number, refused.refusal, grpc=False, head_only=False, ended=ended)
            return
        judgement = self._judge.request(request)
        ongoing = Ongoing(request, judgement, now, LengthReader(0))  # h2 reads the body
        stream = Stream(number, ongoing, self._limits, now)
        stream.request_ended = ended
        if not judgement.connected:
            self._streams[number] = stream
            self._reset(refusals.DENIED_CONNECTION)
        elif not judgement.allowed:
            self._deny(stream, judgement.refusal)
        elif judgement.uses_headers and has_mistakable_name(request.fields):
            self._deny(stream, refusals.UNDERSCORE)
        else:
            self._forward(stream)

    def _deny(self, stream: Stream, refusal: Refusal) -> None:
        ongoing = stream.ongoing
        kind = commands.RecordKind.REQUEST
        self._log(ongoing.record(kind, self._limits, self._now, refusal))
        self._down.answer_stream(stream, refusal)

    def _forward(self, stream: Stream) -> None:
        ongoing = stream.ongoing
        try:
            sent = ongoing.fields_to_send(self._limits, self._new_request_id)
        except RequestRefused as refused:
            self._deny(stream, refused.refusal)
            return
        stream.fields, stream.request_id = sent
        self._log(ongoing.record(commands.RecordKind.REQUEST, self._limits, self._now))
        self._streams[stream.number] = stream
        if ongoing.request.expects_continue:
            self._down.head(stream.number, [(b":status", b"100")])
        lane = self._ways.choose(stream)
        if lane is None:
            self._fail(stream, refusals.UPSTREAM_NO_HTTP2)
            return
        self._start(stream, lane)

    def _start(self, stream: Stream, lane: Lane) -> None:
        lane.start(stream, self._commands)
        self._wait_for_answer(stream, lane)

    def _wait_for_answer(self, stream: Stream, lane: Lane, size_bytes: int = 0) -> None:
        """Set the stream's deadline; so many bytes of the request have just come."""
        spoken = not isinstance(lane, H2Lane) or lane.spoken
        if stream.pending and stream.head_sent:
            return  # the client must read, whatever else it does
        if lane.link.state is LinkState.OPENING or not spoken:
            stream.timer.await_connection(self._now)
        elif stream.request_ended or not lane.takes_body(stream):
            stream.timer.await_answer(self._now, begun=stream.head_sent)
        elif stream.grpc or stream.head_sent:  # both speak when they have something to say
            stream.timer.await_message(self._now, stream.ongoing.head_at, begun=stream.head_sent)
        else:
            stream.timer.await_body(self._now, stream.ongoing.head_at, size_bytes)

    def _take_body(self, stream: Stream | None, event: h2.events.DataReceived) -> None:
        size = event.flow_controlled_length or 0
        if stream is None:
            self._down.give_back(event.stream_id or 0, size)
            return
        stream.owed_bytes += size
        lane = self._ways.of(stream)
        if event.data:
            stream.ongoing.received_bytes += len(event.data)
            lane.send_body(stream, event.data, self._commands)
        self._give_back(stream, lane)
        self._wait_for_answer(stream, lane, len(event.data or b""))

    def _give_back(self, stream: Stream, lane: Lane) -> None:
        """Let the client send as much more as the server has taken."""
        if stream.owed_bytes and lane.takes_body(stream):
            owed, stream.owed_bytes = stream.owed_bytes, 0
            self._down.give_back(stream.number, owed)

    # --- answers ---------------------------------------------------------------------------------

    def _apply(self, parts: list[streams.AnswerPart]) -> None:
        """Pass on what the server said."""
        for part in parts:
            stream = part.stream
            if self._streams.get(stream.number) is not stream:
                continue
            match part:
                case streams.AnswerInterim(_, head):
                    self._down.head(stream.number, interim_fields(head))
                case streams.AnswerHead(_, response, ended):
                    stream.head_sent = True
                    stream.ongoing.latency_s = self._now - stream.ongoing.head_at
                    fields = response_fields(response)
                    self._down.head(stream.number, fields, ended=ended)
                    if ended:
                        self._finish(stream)
                    else:
                        self._wait_for_answer(stream, self._ways.of(stream))
                case streams.AnswerData(_, data):
                    stream.pending += data
                    self._send_answer(stream)
                case streams.AnswerEnd(_, trailers):
                    stream.answer_ended = True
                    stream.trailers = trailers
                    self._send_answer(stream)
                case streams.AnswerBroken(_, refusal):
                    self._fail(stream, refusal)
                case streams.NotSpoken():
                    self._fall_back(stream)
                case _:
                    assert_never(part)

    def _fall_back(self, stream: Stream) -> None:
        """Send to a server that speaks no HTTP/2 what it has not seen, by HTTP/1.1."""
        self._ways.no_h2 = True
        lane = self._ways.choose(stream)
        if lane is None:
            self._fail(stream, refusals.UPSTREAM_NO_HTTP2)
            return
        self._start(stream, lane)
        payload = bytes(stream.upload)
        stream.upload.clear()
        if payload:
            lane.send_body(stream, payload, self._commands)
        if stream.request_ended:
            lane.end_body(stream, self._commands)

    def _send_all(self) -> None:
        for stream in list(self._streams.values()):
            self._send_answer(stream)

    def _send_answer(self, stream: Stream) -> None:
        """Send as much of an answer as the client's windows and its socket take."""
        if not stream.head_sent:
            return
        progress = self._down.write(stream, blocked=self._client_blocked)
        if progress is Progress.ENDED:
            self._finish(stream)
            return
        pending = bool(stream.pending)
        if not stream.answer_ended:
            held = len(stream.pending) >= self._limits.buffer_bytes
            self._ways.of(stream).hold(stream, held=held, commands=self._commands)
        waits_already = stream.timer.timeout is refusals.FLUSH_TIMEOUT
        if progress is Progress.SOME or not pending or not waits_already:
            stream.timer.await_answer(self._now, begun=True, flush=pending)

    def _finish(self, stream: Stream) -> None:
        """Let go of a stream whose answer was sent completely."""
        self._log_response(stream, None)
        if not stream.request_ended:
            self._down.reset(stream.number, ErrorCode.NO_ERROR)
        self._forget(stream)

    def _fail(self, stream: Stream, refusal: Refusal) -> None:
        """End a stream that was sent on: answer for the server, or cut what it has begun."""
        self._log_response(stream, refusal)
        if stream.head_sent or not refusal.status:
            self._down.reset(stream.number, ErrorCode.INTERNAL_ERROR)
        else:
            self._down.answer_stream(stream, refusal)
        self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        self._ways.cancel(stream, self._commands)
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        """Let go of a stream; its bytes must not stay taken from the connection's window."""
        del self._streams[stream.number]
        if stream.owed_bytes:
            self._down.give_back(stream.number, stream.owed_bytes)
        self._ways.forget(stream)
        if not self._streams:
            self._timer.await_request(self._now)

    # --- the server's side -----------------------------------------------------------------------

    @event
    def upstream_opened(self, now: float, link: int) -> None:
        """Take that the server accepted a connection."""
        self._now = now
        lane = self._ways.lane(link)
        if lane is None or lane.link.state is not LinkState.OPENING:
            return
        self._apply(lane.opened(now, self._commands))
        self._resume_uploads(lane)

    @event
    def upstream_failed(self, failure: commands.ConnectFailure, now: float, link: int) -> None:
        """Take that there is no connection to the server."""
        self._now = now
        lane = self._ways.lane(link)
        if lane is None or lane.link.state is not LinkState.OPENING:
            return
        self._apply(lane.failed(connect_refusal(failure)))
        self._ways.tidy(lane)

    @event
    def upstream_data(self, data: bytes, now: float, link: int) -> None:
        """Take bytes of a server."""
        self._now = now
        lane = self._ways.lane(link)
        if lane is None or lane.link.state is not LinkState.OPEN:
            return
        self._apply(lane.receive(data, now, self._commands))
        self._resume_uploads(lane)
        self._ways.tidy(lane)

    @event
    def upstream_ended(self, now: float, link: int) -> None:
        """Take a server's FIN."""
        self._end_upstream(now, link, lost=False)

    @event
    def upstream_lost(self, now: float, link: int) -> None:
        """Take the loss of a server's connection."""
        self._end_upstream(now, link, lost=True)

    def _end_upstream(self, now: float, link: int, *, lost: bool) -> None:
        self._now = now
        lane = self._ways.lane(link)
        if lane is None or lane.link.state is LinkState.NONE:
            return
        self._apply(lane.ended(lost=lost, commands=self._commands))
        for number in self._ways.carried(lane):  # a request that is sent once more
            self._judge_waiting(self._streams[number])
        self._ways.tidy(lane)

    @event
    def upstream_blocked(self, blocked: bool, now: float, link: int) -> None:
        """Take that what was sent to a server piles up, or no longer does."""
        self._now = now
        lane = self._ways.lane(link)
        if lane is None:
            return
        lane.link.blocked = blocked
        if not blocked:
            if isinstance(lane, H2Lane):
                lane.unblocked(self._commands)
            self._resume_uploads(lane)

    def _resume_uploads(self, lane: Lane) -> None:
        """Take more of the bodies that this way to the server carries, if it has room again."""
        for number in self._ways.carried(lane):
            stream = self._streams[number]
            self._give_back(stream, lane)
            if not stream.head_sent:
                self._wait_for_answer(stream, lane)

    # --- the connection --------------------------------------------------------------------------

    @event
    def tick(self, now: float) -> None:
        """Take that time has passed; does nothing before `deadline`."""
        self._now = now
        if now < self.deadline:
            return
        if self._phase is Phase.LINGER:
            self._close_client(reset=False)
            return
        if now >= self._down.waits_until(busy=bool(self._streams)):
            self._send(goaway(self._down.last_number, ErrorCode.ENHANCE_YOUR_CALM))
            self._break(refusals.HEAD_TIMEOUT)
            return
        for stream in list(self._streams.values()):
            timeout = stream.timer.timeout
            if now >= stream.timer.deadline and timeout is not None:
                self._fail(stream, timeout)
        if not self._streams and now >= self._timer.deadline:
            self._commands.append(commands.Count("http_downstream_cx_idle_timeout"))
            self._leave()

    @event
    def policy_changed(self, now: float) -> None:
        """Take that another snapshot is in force: a connection that lost its permission ends."""
        self._now = now
        if self._phase >= LINGER:
            return
        judgement = self._judge.connection()
        if judgement.connected:
            for stream in list(self._streams.values()):
                self._judge_waiting(stream)
            return
        if not self._streams:
            self._log(connection_record(refusals.DENIED_CONNECTION, judgement))
        for stream in self._streams.values():
            stream.ongoing.judgement = judgement
        self._reset(refusals.DENIED_CONNECTION)

    def _judge_waiting(self, stream: Stream) -> None:
        """Judge a request again that waits for its server, and so has reached nobody."""
        lane = self._ways.of(stream)
        sent = (
            stream.upstream_number
            if isinstance(lane, H2Lane)
            else lane.link.state is not LinkState.OPENING
        )
        if sent:
            return
        judgement = self._judge.request(stream.ongoing.request)
        if not judgement.allowed:
            stream.ongoing.judgement = judgement
            self._fail(stream, judgement.refusal)

    @event
    def drain(self, now: float) -> None:
        """Announce the end; streams that are on their way will be served (RFC 9113 6.8)."""
        self._now = now
        if self._phase < LINGER and not self._leaving:
            self._flush_codec()
            self._send(goaway(LAST_STREAM, ErrorCode.NO_ERROR))

    @event
    def finish(self, now: float) -> None:
        """Take no further stream; close when those that have begun have ended."""
        self._now = now
        if self._phase < LINGER:
            self._leave()

    @event
    def client_blocked(self, blocked: bool, now: float) -> None:
        """Take that what was sent to the client piles up, or no longer does."""
        self._now = now
        self._client_blocked = blocked
        if not blocked:
            self._send_all()

    def _leave(self) -> None:
        """Announce that no further stream will be served."""
        if not self._leaving:
            self._leaving = True
            self._flush_codec()
            self._send(goaway(self._down.last_number, ErrorCode.NO_ERROR))

    def _settle(self) -> None:
        """After each event: send what the codec has to say, pause who is too quick, end if done."""
        if self._over():
            return
        try:
            for data in self._down.output(self._now):
                self._send(data)
        except FrameFault as fault:
            self._send(goaway(self._down.last_number, fault.code))
            self._break(fault.refusal)
            return
        if not self._streams and (self._leaving or self._client_ended):
            self._end_client()
        elif self._client_blocked is not self._client_paused:
            self._client_paused = self._client_blocked
            self._commands.append(
                commands.PauseClient() if self._client_paused else commands.ResumeClient()
            )

    def _flush_codec(self) -> None:
        """Send what the codec has to say, before something that it knows nothing of."""
        if data := self._down.codec.data_to_send():
            self._send(data)

    def _send(self, data: bytes) -> None:
        self._commands.append(commands.SendClient(data))

    def _break(self, refusal: Refusal) -> None:
        """End a connection whose state cannot be trusted; GOAWAY was sent."""
        self._log(replace(connection_record(refusal, None), protocol="HTTP/2"))
        self._drop_all(refusals.CLIENT_GONE)
        self._end_client()

    def _drop_all(self, refusal: Refusal) -> None:
        """Give up every stream and every way to the server."""
        for stream in self._streams.values():
            self._log_response(stream, refusal)
        self._ways.drop_all(self._commands)
        self._streams.clear()

    def _end_client(self) -> None:
        """Send FIN, and give the client time to read what was sent."""
        self._drop_all(refusals.CLIENT_GONE)
        if self._client_ended:
            self._close_client(reset=False)
            return
        self._phase = Phase.LINGER
        self._down.frames.waits_since = None
        self._timer.linger(self._now)
        self._commands.append(commands.ShutdownClient())

    def _close_client(self, *, reset: bool = False) -> None:
        self._down.frames.waits_since = None
        super()._close_client(reset=reset)

    def _reset(self, refusal: Refusal) -> None:
        """End everything at once."""
        self._drop_all(refusal)
        self._close_client(reset=True)

    # --- records ---------------------------------------------------------------------------------

    def _break_off(self, refusal: Refusal) -> None:
        if self._phase is Phase.CLOSED:
            return
        if not self._streams:
            self._log(connection_record(refusal, None))
        self._reset(refusal)

    def _log_response(self, stream: Stream, refusal: Refusal | None) -> None:
        ongoing = stream.ongoing
        # A stream that the connection's own end took away before it was sent on.
        kind = commands.RecordKind.RESPONSE if ongoing.reply else commands.RecordKind.REQUEST
        self._log(ongoing.record(kind, self._limits, self._now, refusal))
