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
from typing import Concatenate, ParamSpec, assert_never

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from l7proxy import commands, refusals
from l7proxy.frames import (
    ErrorCode,
    FrameFault,
    FrameReader,
    Kind,
    count_provoked_resets,
    goaway,
)
from l7proxy.judgement import Judge
from l7proxy.lanes import H1Lane, H2Lane, Lane
from l7proxy.limits import Limits
from l7proxy.link import LinkState
from l7proxy.ongoing import Ongoing, connection_record, malformed_record
from l7proxy.phase import Phase
from l7proxy.refusals import Refusal, RequestRefused
from l7proxy.request import has_underscore
from l7proxy.stream_head import (
    admit_stream,
    check_trailers,
    interim_fields,
    local_fields,
    response_fields,
)
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
from l7proxy.timer import Timer

_P = ParamSpec("_P")

_DEFAULT_WINDOW_BYTES = 65_535
"""RFC 9113 6.9.2; what a stream may have under way, and a connection until it is given more."""


def _event(
    step: "Callable[Concatenate[Multiplex, _P], None]",
) -> "Callable[Concatenate[Multiplex, _P], list[commands.Command]]":
    """Make an event method of a step: it returns the commands, and fails closed."""

    def event(self: "Multiplex", /, *args: _P.args, **kwargs: _P.kwargs) -> list[commands.Command]:
        asked: list[commands.Command] = []
        self._commands = asked
        try:
            step(self, *args, **kwargs)
            self._settle()
        except Exception as error:  # noqa: BLE001 - whatever went wrong, nothing more may pass
            self._fail_closed(error)
        return asked

    event.__doc__, event.__name__ = step.__doc__, step.__name__
    return event


class Multiplex:
    """The streams of one client connection; arguments and events as for `exchange.Exchange`.

    `link` in the events about servers is the number in the command that opened the connection.
    """

    __slots__ = (
        "_client_blocked", "_client_ended", "_client_paused", "_codec", "_commands", "_frames",
        "_judge", "_lane_of", "_lanes", "_last_number", "_leaving", "_limits", "_link_number",
        "_new_request_id", "_no_h2", "_now", "_phase", "_reset_count", "_resets_end_at", "_shared",
        "_streams", "_timer",
    )  # fmt: skip

    def __init__(
        self, judge: Judge, limits: Limits, new_request_id: Callable[[], str], now: float
    ) -> None:
        self._judge = judge
        self._limits = limits
        self._new_request_id = new_request_id
        self._now = now
        self._phase = Phase.IDLE
        self._frames = FrameReader(limits, preface=True)
        self._codec = _server_codec(limits)
        self._streams: dict[int, Stream] = {}
        self._lanes: dict[int, Lane] = {}
        self._lane_of: dict[int, Lane] = {}
        self._shared: H2Lane | None = None
        self._no_h2 = False
        self._link_number = 0
        self._last_number = 0
        self._reset_count = 0
        self._resets_end_at = now
        self._client_ended = False
        self._client_blocked = False
        self._client_paused = False
        self._leaving = False
        self._commands: list[commands.Command] = []
        self._timer = Timer(limits, now)

    @property
    def deadline(self) -> float:
        """Monotonic time at which `tick` must be called, infinity if never."""
        deadlines = [stream.timer.deadline for stream in self._streams.values()]
        if not deadlines:
            deadlines.append(self._timer.deadline)
        if self._frames.waits_since is not None:
            deadlines.append(self._frames.waits_since + self._limits.head_timeout_s)
        return min(deadlines)

    def _over(self) -> bool:
        return not self._phase.reads_requests

    def __repr__(self) -> str:
        return f"<Multiplex {self._phase.name} {len(self._streams)} streams>"

    # --- the client's side -----------------------------------------------------------------------

    @_event
    def client_data(self, data: bytes, now: float) -> None:
        """Take bytes of the client."""
        self._now = now
        if self._over():
            return
        try:
            for frame in self._frames.read(data, now):
                if frame.kind < 0:
                    self._timer.await_request(now)
                    self._commands.append(commands.Count("http_downstream_cx_http2"))
                if frame.kind == Kind.GOAWAY:  # it opens no more streams, and waits for the others
                    self._leaving = True
                    continue
                for event in self._codec.receive_data(frame.data):
                    self._take(event)
                if self._over():
                    return
        except FrameFault as fault:
            self._send_output()
            self._send(goaway(self._last_number, fault.code))
            self._break(fault.refusal)
        except h2.exceptions.ProtocolError:
            self._send_output()  # GOAWAY among it
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
                lane = self._lane_of[stream.number]
                lane.end_body(stream, self._commands)
                self._wait_for_answer(stream, lane)
        elif isinstance(event, h2.events.StreamReset):
            self._log_response(stream, refusals.CLIENT_GONE)
            self._drop(stream)
            self._count_resets(1)

    def _count_resets(self, count: int) -> None:
        if self._now >= self._resets_end_at:
            self._resets_end_at = self._now + self._limits.h2_window_s
            self._reset_count = 0
        self._reset_count += count
        if self._reset_count > self._limits.h2_reset_count:
            raise FrameFault(refusals.H2_RESET_FLOOD, ErrorCode.ENHANCE_YOUR_CALM)

    @_event
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

    @_event
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
            self._codec.reset_stream(number, h2.errors.ErrorCodes.REFUSED_STREAM)
            return
        self._last_number = number
        try:
            request = admit_stream(event.headers or [], ended=ended, limits=self._limits)
        except RequestRefused as refused:
            record = malformed_record(refused.refusal, None)
            self._log(record._replace(protocol="HTTP/2"))
            self._answer(number, refused.refusal, grpc=False, head_only=False, ended=ended)
            return
        judgement = self._judge.request(request)
        ongoing = Ongoing(request, judgement, self._limits, now)
        stream = Stream(number, ongoing, self._limits, now)
        stream.request_ended = ended
        if not judgement.connected:
            self._streams[number] = stream
            self._reset(refusals.DENIED_CONNECTION)
        elif not judgement.allowed:
            self._deny(stream, refusals.DENIED)
        elif judgement.uses_headers and has_underscore(request.fields):
            self._deny(stream, refusals.UNDERSCORE)
        else:
            self._forward(stream)

    def _deny(self, stream: Stream, refusal: Refusal) -> None:
        ongoing = stream.ongoing
        kind = commands.RecordKind.REQUEST
        self._log(ongoing.record(kind, self._limits, self._now, refusal))
        self._answer_stream(stream, refusal)

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
            self._codec.send_headers(stream.number, [(b":status", b"100")])
        lane = self._choose_lane(stream)
        if lane is None:
            self._fail(stream, refusals.UPSTREAM_NO_HTTP2)
            return
        self._start(stream, lane)

    def _choose_lane(self, stream: Stream) -> Lane | None:
        """Return a way to the server; None: gRPC, and the server speaks no HTTP/2."""
        mode, shared = self._limits.h2_upstream, self._shared
        known = shared is not None and shared.spoken
        if mode == "never" or self._no_h2:
            if stream.grpc:
                return None
        elif stream.grpc or known or mode == "prefer":
            if shared is None or shared.leaving:
                self._link_number += 1
                self._shared = shared = H2Lane(self._link_number, self._limits)
                self._lanes[self._link_number] = shared
            return shared
        for lane in self._lanes.values():
            if isinstance(lane, H1Lane) and lane.stream is None:
                return lane
        self._link_number += 1
        self._lanes[self._link_number] = lane = H1Lane(self._link_number, self._limits)
        return lane

    def _start(self, stream: Stream, lane: Lane) -> None:
        self._lane_of[stream.number] = lane
        lane.start(stream, self._commands)
        self._wait_for_answer(stream, lane)

    def _wait_for_answer(self, stream: Stream, lane: Lane) -> None:
        spoken = not isinstance(lane, H2Lane) or lane.spoken
        if lane.link.state is LinkState.OPENING or not spoken:
            stream.timer.await_connection(self._now)
        elif stream.request_ended or not lane.takes_body(stream):
            stream.timer.await_answer(self._now, begun=stream.head_sent)
        else:
            stream.timer.await_body(self._now)

    def _take_body(self, stream: Stream | None, event: h2.events.DataReceived) -> None:
        size = event.flow_controlled_length or 0
        if stream is None:
            self._codec.acknowledge_received_data(size, event.stream_id or 0)
            return
        stream.owed_bytes += size
        lane = self._lane_of[stream.number]
        if event.data:
            stream.ongoing.received_bytes += len(event.data)
            lane.send_body(stream, event.data, self._commands)
        self._give_back(stream, lane)
        self._wait_for_answer(stream, lane)

    def _give_back(self, stream: Stream, lane: Lane) -> None:
        """Let the client send as much more as the server has taken."""
        if stream.owed_bytes and lane.takes_body(stream):
            owed, stream.owed_bytes = stream.owed_bytes, 0
            self._codec.acknowledge_received_data(owed, stream.number)

    # --- answers ---------------------------------------------------------------------------------

    def _answer_stream(self, stream: Stream, refusal: Refusal) -> None:
        self._answer(
            stream.number,
            refusal,
            grpc=stream.grpc,
            head_only=stream.ongoing.request.method == b"HEAD",
            ended=stream.request_ended,
        )

    def _answer(
        self, number: int, refusal: Refusal, *, grpc: bool, head_only: bool, ended: bool
    ) -> None:
        """Answer for the server, and want nothing more of the request (RFC 9113 8.1)."""
        fields, body = local_fields(refusal, grpc=grpc, denied_body=self._limits.denied_body)
        if body and self._codec.local_flow_control_window(number) < len(body):
            fields, body = fields[:-1], b""  # rather than keep it until there is room
        if head_only:
            body = b""
        self._codec.send_headers(number, fields, end_stream=not body)
        if body:
            self._codec.send_data(number, body, end_stream=True)
        if not ended:
            self._codec.reset_stream(number, h2.errors.ErrorCodes.NO_ERROR)

    def _apply(self, parts: list[AnswerPart]) -> None:
        """Pass on what the server said."""
        for part in parts:
            stream = part.stream
            if self._streams.get(stream.number) is not stream:
                continue
            match part:
                case AnswerInterim(_, head):
                    self._codec.send_headers(stream.number, interim_fields(head))
                case AnswerHead(_, response, ended):
                    stream.head_sent = True
                    stream.ongoing.latency_s = self._now - stream.ongoing.head_at
                    fields = response_fields(response)
                    self._codec.send_headers(stream.number, fields, end_stream=ended)
                    if ended:
                        self._finish(stream)
                    else:
                        self._wait_for_answer(stream, self._lane_of[stream.number])
                case AnswerData(_, data):
                    stream.pending += data
                    self._send_answer(stream)
                case AnswerEnd(_, trailers):
                    stream.answer_ended = True
                    stream.trailers = trailers
                    self._send_answer(stream)
                case AnswerBroken(_, refusal):
                    self._fail(stream, refusal)
                case NotSpoken():
                    self._fall_back(stream)
                case _:
                    assert_never(part)

    def _fall_back(self, stream: Stream) -> None:
        """Send to a server that speaks no HTTP/2 what it has not seen, by HTTP/1.1."""
        self._no_h2 = True
        lane = self._choose_lane(stream)
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
        codec, number, pending = self._codec, stream.number, stream.pending
        if not stream.head_sent:
            return
        sent = False
        while pending and not self._client_blocked:
            room = min(codec.local_flow_control_window(number), codec.max_outbound_frame_size)
            if room <= 0:
                break
            last = stream.answer_ended and len(pending) <= room and not stream.trailers
            codec.send_data(number, bytes(pending[:room]), end_stream=last)
            self._frames.sent_data_count += 1
            del pending[:room]
            sent = True
            if last:
                self._finish(stream)
                return
        if stream.answer_ended and not pending:
            if stream.trailers:
                codec.send_headers(number, stream.trailers, end_stream=True)
            else:
                codec.end_stream(number)
            self._finish(stream)
            return
        lane = self._lane_of[number]
        held = len(pending) >= self._limits.buffer_bytes
        if not stream.answer_ended:
            lane.hold(stream, held=held, commands=self._commands)
        if sent or not pending or stream.timer.timeout is not refusals.FLUSH_TIMEOUT:
            stream.timer.await_answer(self._now, begun=True, flush=bool(pending))

    def _finish(self, stream: Stream) -> None:
        """Let go of a stream whose answer was sent completely."""
        self._log_response(stream, None)
        if not stream.request_ended:
            self._codec.reset_stream(stream.number, h2.errors.ErrorCodes.NO_ERROR)
        self._forget(stream)

    def _fail(self, stream: Stream, refusal: Refusal) -> None:
        """End a stream that was sent on: answer for the server, or cut what it has begun."""
        self._log_response(stream, refusal)
        if stream.head_sent or not refusal.status:
            self._codec.reset_stream(stream.number, h2.errors.ErrorCodes.INTERNAL_ERROR)
        else:
            self._answer_stream(stream, refusal)
        self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        lane = self._lane_of.get(stream.number)
        if isinstance(lane, H2Lane) or (lane is not None and lane.stream is stream):
            lane.cancel(stream, self._commands)
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        """Let go of a stream; its bytes must not stay taken from the connection's window."""
        del self._streams[stream.number]
        if stream.owed_bytes:
            self._codec.acknowledge_received_data(stream.owed_bytes, stream.number)
        lane = self._lane_of.pop(stream.number, None)
        if lane is not None:
            self._tidy(lane)
        if not self._streams:
            self._timer.await_request(self._now)

    def _tidy(self, lane: Lane) -> None:
        """Forget a way to the server that has ended."""
        if lane.link.state is LinkState.NONE and lane not in self._lane_of.values():
            self._lanes.pop(lane.link.number, None)
            if lane is self._shared:
                self._shared = None

    # --- the server's side -----------------------------------------------------------------------

    @_event
    def upstream_opened(self, now: float, link: int) -> None:
        """Take that the server accepted a connection."""
        self._now = now
        lane = self._lanes.get(link)
        if lane is None or lane.link.state is not LinkState.OPENING:
            return
        self._apply(lane.opened(now, self._commands))
        self._resume_uploads(lane)

    @_event
    def upstream_failed(self, failure: commands.ConnectFailure, now: float, link: int) -> None:
        """Take that there is no connection to the server."""
        self._now = now
        lane = self._lanes.get(link)
        if lane is None or lane.link.state is not LinkState.OPENING:
            return
        timed_out = failure is commands.ConnectFailure.TIMEOUT
        self._apply(lane.failed(refusals.CONNECT_TIMEOUT if timed_out else refusals.CONNECT_FAILED))
        self._tidy(lane)

    @_event
    def upstream_data(self, data: bytes, now: float, link: int) -> None:
        """Take bytes of a server."""
        self._now = now
        lane = self._lanes.get(link)
        if lane is None or lane.link.state is not LinkState.OPEN:
            return
        self._apply(lane.receive(data, now, self._commands))
        self._resume_uploads(lane)
        self._tidy(lane)

    @_event
    def upstream_ended(self, now: float, link: int) -> None:
        """Take a server's FIN."""
        self._end_upstream(now, link, lost=False)

    @_event
    def upstream_lost(self, now: float, link: int) -> None:
        """Take the loss of a server's connection."""
        self._end_upstream(now, link, lost=True)

    def _end_upstream(self, now: float, link: int, *, lost: bool) -> None:
        self._now = now
        lane = self._lanes.get(link)
        if lane is None or lane.link.state is LinkState.NONE:
            return
        self._apply(lane.ended(lost=lost, commands=self._commands))
        self._tidy(lane)

    @_event
    def upstream_blocked(self, blocked: bool, now: float, link: int) -> None:
        """Take that what was sent to a server piles up, or no longer does."""
        self._now = now
        lane = self._lanes.get(link)
        if lane is None:
            return
        lane.link.blocked = blocked
        if not blocked:
            if isinstance(lane, H2Lane):
                lane.unblocked(self._commands)
            self._resume_uploads(lane)

    def _resume_uploads(self, lane: Lane) -> None:
        """Take more of the bodies that this way to the server carries, if it has room again."""
        for number, stream in self._streams.items():
            if self._lane_of.get(number) is lane:
                self._give_back(stream, lane)
                if not stream.head_sent:
                    self._wait_for_answer(stream, lane)

    # --- the connection --------------------------------------------------------------------------

    @_event
    def tick(self, now: float) -> None:
        """Take that time has passed; does nothing before `deadline`."""
        self._now = now
        if now < self.deadline:
            return
        if self._phase is Phase.LINGER:
            self._close_client(reset=False)
            return
        waits_since = self._frames.waits_since
        if waits_since is not None and now >= waits_since + self._limits.head_timeout_s:
            self._send(goaway(self._last_number, ErrorCode.ENHANCE_YOUR_CALM))
            self._break(refusals.HEAD_TIMEOUT)
            return
        for stream in list(self._streams.values()):
            timeout = stream.timer.timeout
            if now >= stream.timer.deadline and timeout is not None:
                self._fail(stream, timeout)
        if not self._streams and now >= self._timer.deadline:
            self._commands.append(commands.Count("downstream_cx_idle_timeout"))
            self._leave()

    @_event
    def policy_changed(self, now: float) -> None:
        """Take that another snapshot is in force: a connection that lost its permission ends."""
        self._now = now
        if not self._phase.reads_requests:
            return
        judgement = self._judge.connection()
        if judgement.connected:
            return
        if not self._streams:
            self._log(connection_record(refusals.DENIED_CONNECTION, judgement))
        for stream in self._streams.values():
            stream.ongoing.judgement = judgement
        self._reset(refusals.DENIED_CONNECTION)

    @_event
    def drain(self, now: float) -> None:
        """Serve what has begun, then close."""
        self._now = now
        if self._phase.reads_requests:
            self._leave()

    @_event
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
            self._send_output()
            self._send(goaway(self._last_number, ErrorCode.NO_ERROR))

    def _settle(self) -> None:
        """After each event: send what the codec has to say, pause who is too quick, end if done."""
        if self._over():
            return
        try:
            self._count_resets(count_provoked_resets(self._send_output()))
        except FrameFault as fault:
            self._send(goaway(self._last_number, fault.code))
            self._break(fault.refusal)
            return
        if not self._streams and (self._leaving or self._client_ended):
            self._end_client()
        elif self._client_blocked is not self._client_paused:
            self._client_paused = self._client_blocked
            self._commands.append(
                commands.PauseClient() if self._client_paused else commands.ResumeClient()
            )

    def _send_output(self) -> bytes:
        """Send what the codec has to say, and return it."""
        data = self._codec.data_to_send()
        if data:
            self._send(data)
        return data

    def _send(self, data: bytes) -> None:
        self._commands.append(commands.SendClient(data))

    def _break(self, refusal: Refusal) -> None:
        """End a connection whose state cannot be trusted; GOAWAY was sent."""
        self._log(connection_record(refusal, None)._replace(protocol="HTTP/2"))
        self._drop_all(refusals.CLIENT_GONE)
        self._end_client()

    def _drop_all(self, refusal: Refusal) -> None:
        """Give up every stream and every way to the server."""
        for stream in self._streams.values():
            self._log_response(stream, refusal)
        busy = set(map(id, self._lane_of.values()))
        for lane in self._lanes.values():
            lane.link.drop(self._commands, reset=id(lane) in busy)
        self._streams.clear()
        self._lane_of.clear()
        self._lanes.clear()
        self._shared = None

    def _end_client(self) -> None:
        """Send FIN, and give the client time to read what was sent."""
        self._drop_all(refusals.CLIENT_GONE)
        if self._client_ended:
            self._close_client(reset=False)
            return
        self._phase = Phase.LINGER
        self._frames.waits_since = None
        self._timer.linger(self._now)
        self._commands.append(commands.ShutdownClient())

    def _close_client(self, *, reset: bool) -> None:
        self._phase = Phase.CLOSED
        self._frames.waits_since = None
        self._timer.stop()
        self._commands.append(commands.CloseClient(reset=reset))

    def _reset(self, refusal: Refusal) -> None:
        """End everything at once."""
        self._drop_all(refusal)
        self._close_client(reset=True)

    # --- records ---------------------------------------------------------------------------------

    def _fail_closed(self, error: Exception) -> None:
        """Reset both sides after an error of our own."""
        if self._phase is Phase.CLOSED:
            return
        detail = f"internal_error{{{type(error).__name__}: {error}}}"
        refusal = refusals.INTERNAL._replace(status=0, detail=detail)
        if not self._streams:
            self._log(connection_record(refusal, None))
        self._reset(refusal)

    def _log(self, record: commands.Record) -> None:
        self._commands.append(commands.Log(record))

    def _log_response(self, stream: Stream, refusal: Refusal | None) -> None:
        ongoing = stream.ongoing
        # A stream that the connection's own end took away before it was sent on.
        kind = commands.RecordKind.RESPONSE if ongoing.reply else commands.RecordKind.REQUEST
        self._log(ongoing.record(kind, self._limits, self._now, refusal))


def _server_codec(limits: Limits) -> h2.connection.H2Connection:
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
        },
    )
    codec.decoder.max_header_list_size = limits.head_bytes
    codec.initiate_connection()
    more = limits.h2_connection_bytes - _DEFAULT_WINDOW_BYTES
    if more > 0:
        codec.increment_flow_control_window(more)
    return codec
