"""One client connection: its requests one after another, each judged, sent on and answered.

Events come as method calls and return commands; nothing here waits, reads a clock or knows a
socket. The result depends on bytes, order of events, policy and `now` only, not on how the client's bytes
were cut into packets.

The client's side is in one `Phase`:

    IDLE ──first byte──► HEAD ──head──┬─allowed─► BODY ──end──► ANSWER ──answer sent──► IDLE
      ▲                               ├─denied──► DISCARD ──end of body──► IDLE
      └───────────────────────────────┘ malformed, or no further request: LINGER ──► CLOSED

The server's side is `_link` (NONE, OPENING, OPEN) and, while a request is outstanding, its `Reply`. One connection to the server belongs to one client connection, opened by
the first allowed request, and kept while both sides keep it.

Rules.
  * One request at a time: the next head is looked at when the answer before it was sent completely.
  * After a refusal for form (400, 431, ...) nothing that came after it is ever looked at.
  * A denied request is answered 403 and its body thrown away, up to a limit; then the next request
    is judged. With `Expect: 100-continue` the connection closes, because the client alone knows
    whether it will send the body.
  * `100 Continue` is sent by the proxy, when the request was allowed, and never before.
  * An answer that can no longer be completed ends with a reset, so that it cannot look complete.
  * Any exception resets both sides (fail closed).
Source: RFC 9112 9; RFC 9110 10.1.1; research notes l7, sections 0 and 3.1.
"""

from collections.abc import Callable
from enum import IntEnum

from l7proxy import refusals, responses
from l7proxy.commands import (
    CloseClient,
    CloseUpstream,
    Command,
    ConnectFailure,
    Count,
    Log,
    OpenUpstream,
    PauseClient,
    PauseUpstream,
    Record,
    RecordKind,
    ResumeClient,
    ResumeUpstream,
    SendClient,
    SendUpstream,
    ShutdownClient,
)
from l7proxy.framing import LAST_CHUNK, Delimiter, FramingFault, chunk
from l7proxy.head import Progress, RequestHead, parse_request, walk_lines
from l7proxy.judgement import Judge
from l7proxy.limits import Limits
from l7proxy.ongoing import Ongoing, connection_record, malformed_record
from l7proxy.refusals import Refusal, RequestRefused, ResponseRefused
from l7proxy.reply import Reply
from l7proxy.request import admit, edited, has_underscore, serialise

FOREVER = float("inf")
_HEAD_END = b"\r\n\r\n"
_IDEMPOTENT = frozenset(
    (b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE")
)  # RFC 9110 9.2.2


class Phase(IntEnum):
    """What the client's side continues with."""

    IDLE = 0
    HEAD = 1
    BODY = 2
    ANSWER = 3
    DISCARD = 4
    LINGER = 5
    CLOSED = 6


class Link(IntEnum):
    """The connection to the server."""

    NONE = 0
    OPENING = 1
    OPEN = 2


class Exchange:
    """The requests of one client connection.

    Every event method returns the commands to perform, in order. `deadline` is the monotonic time
    at which `tick` must be called, infinity if never.

    Args:
        judge: policy for this connection.
        limits: what a connection may use.
        new_request_id: gives a value for X-Request-Id.
        now: monotonic seconds.
    """

    __slots__ = (
        "_client_blocked",
        "_client_ended",
        "_client_paused",
        "_closing",
        "_commands",
        "_current",
        "_draining",
        "_held",
        "_held_bytes",
        "_inbox",
        "_judge",
        "_limits",
        "_link",
        "_new_request_id",
        "_phase",
        "_progress",
        "_skipped_line",
        "_timeout",
        "_upstream_blocked",
        "_upstream_paused",
        "_upstream_used",
        "deadline",
    )

    def __init__(
        self, judge: Judge, limits: Limits, new_request_id: Callable[[], str], now: float
    ) -> None:
        self._judge = judge
        self._limits = limits
        self._new_request_id = new_request_id
        self._phase = Phase.IDLE
        self._link = Link.NONE
        self._current: Ongoing | None = None
        self._inbox = b""
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._progress = Progress()
        self._skipped_line = False
        self._client_ended = False
        self._client_blocked = False
        self._client_paused = False
        self._upstream_blocked = False
        self._upstream_paused = False
        self._upstream_used = False
        self._draining = False
        self._closing = False
        self._commands: list[Command] = []
        self._timeout: Refusal | None = None
        self.deadline = now + limits.first_byte_timeout_s

    def __repr__(self) -> str:
        return f"<Exchange {self._phase.name} {self._link.name}>"

    @property
    def phase(self) -> Phase:
        """Where the client's side is."""
        return self._phase

    # --- events ----------------------------------------------------------------------------------

    def client_data(self, data: bytes, now: float) -> list[Command]:
        """Take bytes of the client."""
        return self._run(self._take_client_data, data, now)

    def client_ended(self, now: float) -> list[Command]:
        """Take the client's FIN: it sends nothing more, and may still read."""
        return self._run(self._take_client_end, now)

    def client_lost(self, now: float) -> list[Command]:
        """Take the loss of the client's connection."""
        return self._run(self._take_client_loss, now)

    def client_blocked(self, blocked: bool, now: float) -> list[Command]:
        """Take that what was sent to the client piles up, or no longer does."""
        return self._run(self._take_client_blocked, blocked, now)

    def upstream_opened(self, now: float) -> list[Command]:
        """Take that the server accepted the connection."""
        return self._run(self._take_opened, now)

    def upstream_failed(self, failure: ConnectFailure, now: float) -> list[Command]:
        """Take that there is no connection to the server."""
        return self._run(self._take_failure, failure, now)

    def upstream_data(self, data: bytes, now: float) -> list[Command]:
        """Take bytes of the server."""
        return self._run(self._take_upstream_data, data, now)

    def upstream_ended(self, now: float) -> list[Command]:
        """Take the server's FIN."""
        return self._run(self._take_upstream_end, False, now)

    def upstream_lost(self, now: float) -> list[Command]:
        """Take the loss of the server's connection, by RST or an error."""
        return self._run(self._take_upstream_end, True, now)

    def upstream_blocked(self, blocked: bool, now: float) -> list[Command]:
        """Take that what was sent to the server piles up, or no longer does."""
        return self._run(self._take_upstream_blocked, blocked, now)

    def tick(self, now: float) -> list[Command]:
        """Take that time has passed; does nothing before `deadline`."""
        return self._run(self._take_time, now) if now >= self.deadline else []

    def policy_changed(self, now: float) -> list[Command]:
        """Take that another snapshot is in force: a connection that lost its permission ends."""
        return self._run(self._take_policy, now)

    def drain(self, now: float) -> list[Command]:
        """Serve what has begun, then close."""
        return self._run(self._take_drain, now)

    def abort(self, now: float) -> list[Command]:
        """Reset both sides."""
        return self._run(self._reset, None, now)

    def _run(self, step: Callable[..., None], *arguments: object) -> list[Command]:
        commands: list[Command] = []
        self._commands = commands
        try:
            step(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever went wrong, nothing more may pass
            self._fail(error)
        return commands

    def _fail(self, error: Exception) -> None:
        self._closing = True
        refusal = refusals.INTERNAL._replace(
            status=0, detail=f"internal_error{{{type(error).__name__}: {error}}}"
        )
        if self._phase is not Phase.CLOSED:
            if self._current is None:
                self._log(connection_record(refusal, None))
            self._log_end(refusal, 0.0)
            self._drop_upstream(reset=True)
            self._phase = Phase.CLOSED
            self.deadline = FOREVER
            self._commands.append(CloseClient(reset=True))

    # --- the client's side -----------------------------------------------------------------------

    def _take_client_data(self, data: bytes, now: float) -> None:
        if self._phase >= Phase.LINGER:
            return
        self._inbox = self._inbox + data if self._inbox else data
        self._advance(now)

    def _take_client_end(self, now: float) -> None:
        self._client_ended = True
        if self._phase is Phase.LINGER:
            self._close_client()
        elif self._phase < Phase.LINGER:
            self._advance(now)

    def _take_client_loss(self, now: float) -> None:
        if self._phase is Phase.CLOSED:
            return
        self._log_end(refusals.CLIENT_GONE, now)
        self._drop_upstream(reset=True)
        self._phase = Phase.CLOSED
        self.deadline = FOREVER

    def _advance(self, now: float) -> None:
        """Go on with what the client has sent, as far as it goes."""
        again = True
        while again:
            match self._phase:
                case Phase.IDLE | Phase.HEAD:
                    again = not self._client_blocked and self._read_head(now)
                case Phase.BODY:
                    again = self._read_body(now)
                case Phase.DISCARD:
                    again = self._discard_body(now)
                case Phase.ANSWER | Phase.LINGER | Phase.CLOSED:
                    again = False
        self._regulate()

    def _read_head(self, now: float) -> bool:
        """Take one head from the inbox; False if it is not complete."""
        if not self._skip_empty_line():
            return self._incomplete_head(now)
        inbox = self._inbox
        end = inbox.find(_HEAD_END, max(0, self._progress.offset - 2)) + len(_HEAD_END)
        try:
            if end < len(_HEAD_END):
                self._progress = walk_lines(inbox, self._progress, self._limits)
                return self._incomplete_head(now)
            head = parse_request(inbox[:end], self._limits)
        except RequestRefused as refused:
            self._refuse(refused.refusal, None, now)
            return False
        self._inbox = inbox[end:]
        self._progress = Progress()
        self._skipped_line = False
        self._decide(head, now)
        return True

    def _skip_empty_line(self) -> bool:
        """Drop one CRLF before a request line (RFC 9112 2.2); False: there is no more to look at."""
        if not self._skipped_line and self._inbox[:1] == b"\r":
            if len(self._inbox) == 1:
                return False
            if self._inbox[1:2] == b"\n":
                self._inbox = self._inbox[2:]
                self._skipped_line = True
        return bool(self._inbox)

    def _incomplete_head(self, now: float) -> bool:
        if self._client_ended:
            if self._inbox:
                self._refuse(refusals.TRUNCATED, None, now)
            else:
                self._finish_client(now)
        elif self._phase is Phase.IDLE and (self._inbox or self._skipped_line):
            self._phase = Phase.HEAD
            self._set_deadline(now + self._limits.head_timeout_s, refusals.HEAD_TIMEOUT)
        return False

    def _decide(self, head: RequestHead, now: float) -> None:
        """Judge one request and answer it or send it on."""
        try:
            request = admit(head, self._limits)
        except RequestRefused as refused:
            self._refuse(refused.refusal, head, now)
            return
        judgement = self._judge.request(request)
        self._current = current = Ongoing(request, judgement, self._limits, now)
        self._closing = self._draining or not request.keep_alive
        if not judgement.connected:
            self._reset(refusals.DENIED_CONNECTION, now)
        elif not judgement.allowed:
            self._deny(refusals.DENIED, now)
        elif request.upgrade:
            self._closing = True  # what follows may already be in the other protocol
            self._deny(refusals.UPGRADE, now)
        elif judgement.uses_headers and has_underscore(request.fields):
            self._closing = True
            self._deny(refusals.UNDERSCORE, now)
        else:
            self._forward(current, now)

    def _forward(self, current: Ongoing, now: float) -> None:
        request = current.request
        try:
            fields = edited(request.fields, current.judgement.edits)
        except RequestRefused as refused:
            self._closing = True
            self._deny(refused.refusal, now)
            return
        added_id = self._choose_request_id(current)
        data = serialise(request, fields, added_id)
        self._log(current.record(RecordKind.REQUEST, self._limits, now))
        if request.expects_continue:
            self._commands.append(SendClient(responses.CONTINUE))
        current.reply = Reply(request, self._limits)
        if self._limits.retry_idle_close and self._upstream_used and not request.has_body:
            current.replay = data if request.method in _IDEMPOTENT else b""
        if self._link is Link.NONE:
            self._open(now)
        self._to_upstream(data)
        if request.has_body:
            self._phase = Phase.BODY
            self._set_body_deadline(now)
        else:
            self._end_request(now)

    def _choose_request_id(self, current: Ongoing) -> bytes:
        """Note the request's id; return it if it has to be added."""
        for name, _, value in current.request.fields:
            if name == b"x-request-id":
                current.request_id = value
                return b""
        if not self._limits.request_id:
            return b""
        current.request_id = self._new_request_id().encode()
        return current.request_id

    def _read_body(self, now: float) -> bool:
        """Send on what there is of a request body; True if the request is complete."""
        current = self._current
        assert current is not None
        if not self._inbox:
            if self._client_ended:
                self._reset(refusals.CLIENT_GONE, now)
            return False
        try:
            payload, self._inbox = current.reader.read(self._inbox)
        except FramingFault as fault:
            self._break_request(fault.refusal, now)
            return False
        if payload:
            current.received_bytes += len(payload)
            chunked = current.request.framing.delimiter is Delimiter.CHUNKED
            self._to_upstream(chunk(payload) if chunked else payload)
        if not current.reader.done:
            self._set_body_deadline(now)
            return not self._inbox and self._client_ended
        if current.request.framing.delimiter is Delimiter.CHUNKED:
            self._to_upstream(LAST_CHUNK)
        self._end_request(now)
        return False

    def _set_body_deadline(self, now: float) -> None:
        if self._link is not Link.OPENING and not self._upstream_blocked:
            self._set_deadline(now + self._limits.body_timeout_s, refusals.BODY_TIMEOUT)

    def _end_request(self, now: float) -> None:
        self._phase = Phase.ANSWER
        if self._link is not Link.OPENING:
            self._set_response_deadline(now)

    def _set_response_deadline(self, now: float) -> None:
        reply = None if self._current is None else self._current.reply
        if reply is not None and reply.response is not None:
            self._set_deadline(now + self._limits.stream_idle_timeout_s, refusals.STREAM_IDLE)
        else:
            self._set_deadline(now + self._limits.response_timeout_s, refusals.RESPONSE_TIMEOUT)

    def _discard_body(self, now: float) -> bool:
        """Throw away the body of a refused request; True if the next request may be read."""
        current = self._current
        assert current is not None
        try:
            payload, self._inbox = current.reader.read(self._inbox)
        except FramingFault:
            self._finish_client(now)
            return False
        current.received_bytes += len(payload)
        if current.received_bytes > self._limits.discard_bytes:
            self._finish_client(now)
            return False
        if current.reader.done:
            self._next_request(now)
            return True
        if self._client_ended:
            self._finish_client(now)
        return False

    # --- answers of our own ----------------------------------------------------------------------

    def _refuse(self, refusal: Refusal, head: RequestHead | None, now: float) -> None:
        """Answer a request that has no single reading, and read nothing more."""
        self._log(malformed_record(refusal, head))
        head_only = head is not None and head.method == b"HEAD"
        self._answer(refusal, head_only=head_only, close=True)
        self._finish_client(now)

    def _deny(self, refusal: Refusal, now: float) -> None:
        """Answer a well-formed request that is not sent on."""
        current = self._current
        assert current is not None
        request = current.request
        body_too_long = request.framing.length > self._limits.discard_bytes
        if request.has_body and (body_too_long or request.expects_continue):
            self._closing = True
        self._log(current.record(RecordKind.REQUEST, self._limits, now, refusal))
        self._answer(refusal, head_only=request.method == b"HEAD", close=self._closing)
        if self._closing:
            self._finish_client(now)
        elif request.has_body:
            self._phase = Phase.DISCARD
            self._set_deadline(now + self._limits.body_timeout_s, refusals.BODY_TIMEOUT)
        else:
            self._next_request(now)

    def _answer(self, refusal: Refusal, *, head_only: bool, close: bool) -> None:
        data = responses.local_response(
            refusal, head_only=head_only, close=close, limits=self._limits
        )
        self._commands.append(SendClient(data))

    def _break_request(self, refusal: Refusal, now: float) -> None:
        """End a request whose body went wrong on the way: the server must not take it for whole."""
        current = self._current
        assert current is not None
        self._log_end(refusal, now)
        self._drop_upstream(reset=True)
        if not current.answer_begun and refusal.status:
            head_only = current.request.method == b"HEAD"
            self._answer(refusal, head_only=head_only, close=True)
            self._finish_client(now)
        else:
            self._close_client(reset=True)

    def _fail_upstream(self, refusal: Refusal, now: float) -> None:
        """Answer for a server that did not, or end an answer that it did not complete."""
        current = self._current
        assert current is not None
        self._log_end(refusal, now)
        self._drop_upstream(reset=True)
        if current.answer_begun or not refusal.status:
            self._close_client(reset=True)
            return
        self._closing = self._closing or self._phase is not Phase.ANSWER
        self._answer(refusal, head_only=current.request.method == b"HEAD", close=self._closing)
        if self._closing:
            self._finish_client(now)
        else:
            self._next_request(now)
            self._advance(now)

    # --- the server's side -----------------------------------------------------------------------

    def _open(self, now: float) -> None:
        self._link = Link.OPENING
        self._upstream_used = False
        self._set_deadline(now + self._limits.connect_timeout_s, refusals.CONNECT_TIMEOUT)
        self._commands.append(OpenUpstream())

    def _to_upstream(self, data: bytes) -> None:
        if self._link is Link.OPEN:
            self._commands.append(SendUpstream(data))
        else:
            self._held.append(data)
            self._held_bytes += len(data)

    def _take_opened(self, now: float) -> None:
        if self._link is not Link.OPENING:
            return
        self._link = Link.OPEN
        self._commands.append(SendUpstream(b"".join(self._held)))
        self._held.clear()
        self._held_bytes = 0
        if self._phase is Phase.BODY:
            self._set_body_deadline(now)
        else:
            self._set_response_deadline(now)
        self._regulate()

    def _take_failure(self, failure: ConnectFailure, now: float) -> None:
        if self._link is not Link.OPENING:
            return
        timed_out = failure is ConnectFailure.TIMEOUT
        self._link = Link.NONE
        self._fail_upstream(refusals.CONNECT_TIMEOUT if timed_out else refusals.CONNECT_FAILED, now)

    def _take_upstream_data(self, data: bytes, now: float) -> None:
        if self._link is not Link.OPEN:
            return
        current = self._current
        reply = None if current is None else current.reply
        if current is None or reply is None:
            # Bytes that answer no request would answer the next one: the queue is poisoned.
            self._commands.append(Count("upstream_unsolicited_bytes"))
            self._drop_upstream(reset=True)
            return
        headless = reply.response is None
        try:
            written = reply.read(data, close=self._closing)
        except ResponseRefused as refused:
            self._fail_upstream(refused.refusal, now)
            return
        current.replay = b""
        if written:
            self._commands.append(SendClient(written))
        if headless and reply.response is not None:
            current.latency_s = now - current.head_at
        if reply.done:
            self._end_response(current, reply, now)
        elif self._phase is Phase.ANSWER and reply.response is not None:
            self._set_deadline(now + self._limits.stream_idle_timeout_s, refusals.STREAM_IDLE)

    def _end_response(self, current: Ongoing, reply: Reply, now: float) -> None:
        """Go on after a complete answer."""
        response = reply.response
        assert response is not None
        self._log(current.record(RecordKind.RESPONSE, self._limits, now))
        self._upstream_used = True
        request_complete = self._phase is Phase.ANSWER
        if reply.excess or not response.reusable or not request_complete:
            self._drop_upstream(reset=not request_complete)
        current.reply = None
        if self._closing or not request_complete or response.sent.delimiter is Delimiter.CLOSE:
            self._finish_client(now)
        else:
            self._next_request(now)
            self._advance(now)

    def _take_upstream_end(self, lost: bool, now: float) -> None:
        if self._link is Link.NONE:
            return
        current = self._current
        reply = None if current is None else current.reply
        if current is None or reply is None:
            self._drop_upstream(reset=False)
        elif not reply.begun and current.replay:
            self._retry(current, now)
        elif reply.response is None:
            begun = reply.begun
            self._fail_upstream(
                refusals.UPSTREAM_PROTOCOL if begun else refusals.UPSTREAM_CLOSED, now
            )
        elif lost or (written := reply.end()) is None:
            self._fail_upstream(refusals.UPSTREAM_TRUNCATED, now)
        else:
            if written:
                self._commands.append(SendClient(written))
            self._end_response(current, reply, now)

    def _retry(self, current: Ongoing, now: float) -> None:
        """RFC 9112 9.3.1: the server closed a kept connection before it saw the request."""
        data, current.replay = current.replay, b""
        self._drop_upstream(reset=False)
        self._commands.append(Count("upstream_rq_retry"))
        self._open(now)
        self._to_upstream(data)

    def _drop_upstream(self, *, reset: bool) -> None:
        if self._link is not Link.NONE:
            self._commands.append(CloseUpstream(reset=reset))
        self._link = Link.NONE
        self._upstream_blocked = False
        self._upstream_paused = False
        self._held.clear()
        self._held_bytes = 0

    # --- both ------------------------------------------------------------------------------------

    def _next_request(self, now: float) -> None:
        self._current = None
        self._phase = Phase.IDLE
        self._set_deadline(now + self._limits.idle_timeout_s, None)

    def _finish_client(self, now: float) -> None:
        """Read no further request: send FIN, and give the client time to read what was sent."""
        self._drop_upstream(reset=self._current is not None and self._current.reply is not None)
        self._inbox = b""
        self._current = None
        if self._client_ended:
            self._close_client()
            return
        self._phase = Phase.LINGER
        self._set_deadline(now + self._limits.linger_s, None)
        self._commands.append(ShutdownClient())

    def _close_client(self, *, reset: bool = False) -> None:
        self._phase = Phase.CLOSED
        self._inbox = b""
        self._current = None
        self.deadline = FOREVER
        self._commands.append(CloseClient(reset=reset))

    def _reset(self, refusal: Refusal | None, now: float) -> None:
        """End everything at once."""
        if self._phase is Phase.CLOSED:
            return
        self._log_end(refusal or refusals.INTERNAL._replace(detail="aborted"), now)
        self._drop_upstream(reset=True)
        self._close_client(reset=True)

    def _set_deadline(self, at: float, timeout: Refusal | None) -> None:
        self.deadline = at
        self._timeout = timeout

    def _take_time(self, now: float) -> None:
        timeout = self._timeout
        match self._phase:
            case Phase.IDLE:
                self._commands.append(Count("downstream_cx_idle_timeout"))
                self._finish_client(now)
            case Phase.HEAD:
                self._refuse(refusals.HEAD_TIMEOUT, None, now)
            case Phase.BODY | Phase.ANSWER:
                assert timeout is not None
                if timeout is refusals.BODY_TIMEOUT:
                    self._break_request(timeout, now)
                else:
                    self._fail_upstream(timeout, now)
            case Phase.DISCARD:
                self._finish_client(now)
            case Phase.LINGER:
                self._close_client()
            case Phase.CLOSED:
                self.deadline = FOREVER

    def _take_policy(self, now: float) -> None:
        if self._phase >= Phase.LINGER:
            return
        judgement = self._judge.connection()
        if judgement.connected:
            return
        if self._current is None or self._phase is Phase.DISCARD:
            self._log(connection_record(refusals.DENIED_CONNECTION, judgement))
        else:
            self._current.judgement = judgement
        self._reset(refusals.DENIED_CONNECTION, now)

    def _take_drain(self, now: float) -> None:
        self._draining = self._closing = True
        if self._phase is Phase.IDLE:
            self._finish_client(now)

    # --- back-pressure ---------------------------------------------------------------------------

    def _take_client_blocked(self, blocked: bool, now: float) -> None:
        self._client_blocked = blocked
        if self._phase is Phase.ANSWER and self._current is not None and self._current.answer_begun:
            self._set_deadline(
                now + self._limits.stream_idle_timeout_s,
                refusals.FLUSH_TIMEOUT if blocked else refusals.STREAM_IDLE,
            )
        if blocked:
            self._regulate()
        else:
            self._advance(now)

    def _take_upstream_blocked(self, blocked: bool, now: float) -> None:
        self._upstream_blocked = blocked
        if self._phase is Phase.BODY:
            if blocked:  # the client cannot be blamed for not sending while we do not read
                self._set_deadline(now + self._limits.response_timeout_s, refusals.RESPONSE_TIMEOUT)
            else:
                self._set_body_deadline(now)
        self._regulate()

    def _regulate(self) -> None:
        """Pause whoever fills a buffer that the other side does not empty."""
        if self._phase is Phase.CLOSED:
            return
        full = len(self._inbox) > self._limits.buffer_bytes and self._phase is not Phase.HEAD
        held = self._held_bytes > self._limits.buffer_bytes
        pause = self._phase < Phase.LINGER and (
            full or held or (self._upstream_blocked and self._phase is Phase.BODY)
        )
        pause = pause or (
            self._client_blocked and self._phase < Phase.LINGER and self._phase is not Phase.BODY
        )
        if pause is not self._client_paused:
            self._client_paused = pause
            self._commands.append(PauseClient() if pause else ResumeClient())
        if self._link is Link.OPEN and self._client_blocked is not self._upstream_paused:
            self._upstream_paused = self._client_blocked
            self._commands.append(PauseUpstream() if self._client_blocked else ResumeUpstream())

    # --- records ---------------------------------------------------------------------------------

    def _log(self, record: Record) -> None:
        self._commands.append(Log(record))

    def _log_end(self, refusal: Refusal, now: float) -> None:
        """Log how a request ended, if one is being served, without a complete answer."""
        current = self._current
        if current is None or self._phase is Phase.DISCARD:
            return  # nothing is being served, or it was denied and has its record already
        kind = RecordKind.REQUEST if current.reply is None else RecordKind.RESPONSE
        self._log(current.record(kind, self._limits, now, refusal))
