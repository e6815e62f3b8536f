"""One client connection: its requests one after another, each judged, sent on and answered.

Events come as method calls and return commands; nothing here waits, reads a clock or knows a
socket. The result depends on bytes, order of events, policy and `now` only, not on how the client's
bytes were cut into packets.

The client's side is in one `Phase`:

    IDLE ──first byte──► HEAD ──head──┬─allowed─► BODY ──end──► ANSWER ──answer sent──► IDLE
      ▲                               ├─denied──► DISCARD ──end of body──► IDLE
      └───────────────────────────────┘ malformed, or no further request: LINGER ──► CLOSED

The server's side is a `Link` and, while a request is outstanding, its `Reply`. One connection to
the server belongs to one client connection, opened by the first allowed request, and kept while
both sides keep it.

Rules.
  * One request at a time: the next head is looked at when the answer before it was sent completely.
  * After a refusal for form (400, 431, ...) nothing that came after it is ever looked at.
  * A denied request is answered 403 and its body thrown away, up to a limit; then the next request
    is judged. With `Expect: 100-continue` the connection closes, because the client alone knows
    whether it will send the body.
  * `100 Continue` is sent by the proxy, when the request was allowed, and never before.
  * An answer that can no longer be completed ends with a reset, so that it cannot look complete.
  * Any exception resets both sides (fail closed).
Source: RFC 9112 9; RFC 9110 10.1.1.
"""

from collections.abc import Callable

from l7proxy import commands, refusals, responses
from l7proxy.commands import RecordKind
from l7proxy.core import Core, event
from l7proxy.framing import LAST_CHUNK, Delimiter, FramingFault, chunk
from l7proxy.head import RequestHead
from l7proxy.heads import Heads, KnownRequest
from l7proxy.inbox import Inbox
from l7proxy.judgement import Judge
from l7proxy.limits import Limits
from l7proxy.link import NONE, OPEN, OPENING, Link, connect_refusal
from l7proxy.ongoing import Ongoing, connection_record, malformed_record
from l7proxy.phase import ANSWER, BODY, CLOSED, DISCARD, HEAD, IDLE, LINGER, Phase
from l7proxy.refusals import Refusal, RequestRefused, ResponseRefused
from l7proxy.reply import Reply
from l7proxy.request import has_mistakable_name
from l7proxy.tunnel import is_websocket

_REQUEST, _RESPONSE = RecordKind
_CHUNKED, _UNTIL_CLOSE = Delimiter.CHUNKED, Delimiter.CLOSE


class Exchange(Core):
    """The requests of one client connection.

    The methods marked as events return the commands to perform, in order.

    Args:
        judge: policy for this connection.
        limits: what a connection may use.
        new_request_id: gives a value for X-Request-Id.
        now: monotonic seconds. Events about the server name their link; here it is always 0.
        heads: those that were read before on other connections; None: they are not shared.
        secure: TLS is spoken with the client.
    """

    __slots__ = (
        "_client_blocked", "_client_ended", "_client_paused", "_closing", "_current", "_draining",
        "_heads", "_inbox", "_judge", "_limits", "_link", "_new_request_id", "_secure",
    )  # fmt: skip

    def __init__(
        self,
        judge: Judge,
        limits: Limits,
        new_request_id: Callable[[], str],
        now: float,
        heads: Heads | None = None,
        *,
        secure: bool = False,
    ) -> None:
        super().__init__(IDLE, limits, now)
        self._secure = secure
        self._heads = heads or Heads(limits)
        self._judge = judge
        self._limits = limits
        self._new_request_id = new_request_id
        self._link = Link()
        self._current: Ongoing | None = None
        self._inbox = Inbox(limits)
        self._client_ended = False
        self._client_blocked = False
        self._client_paused = False
        self._draining = False
        self._closing = False

    def __repr__(self) -> str:
        return f"<Exchange {self._phase.name} {self._link.state.name}>"

    # --- the client's side -----------------------------------------------------------------------

    @event
    def client_data(self, data: bytes, now: float) -> None:
        """Take bytes of the client."""
        if self._phase >= LINGER:
            return
        inbox = self._inbox
        inbox.data = inbox.data + data if inbox.data else data
        self._advance(now)

    @event
    def client_ended(self, now: float) -> None:
        """Take the client's FIN: it sends nothing more, and may still read."""
        self._client_ended = True
        if self._phase is LINGER:
            self._close_client()
        elif self._phase < LINGER:
            self._advance(now)

    @event
    def client_lost(self, now: float) -> None:
        """Take the loss of the client's connection."""
        if self._phase is CLOSED:
            return
        self._log_end(refusals.CLIENT_GONE, now)
        self._drop_upstream(reset=True)
        self._phase = CLOSED
        self._timer.stop()

    def _advance(self, now: float) -> None:
        """Go on with what the client has sent, as far as it goes."""
        again = True
        while again:
            phase = self._phase
            if phase is ANSWER:
                break
            if phase <= HEAD:
                again = not self._client_blocked and self._read_head(now)
            elif phase is BODY:
                again = self._read_body(now)
            elif phase is DISCARD:
                again = self._discard_body(now)
            else:
                again = False

    def _read_head(self, now: float) -> bool:
        """Take one head from the inbox; False if it is not complete."""
        try:
            raw = self._inbox.head()
            if raw is None:
                return self._incomplete_head(now)
            known = self._heads.request(raw, b"https" if self._secure else b"http")
        except RequestRefused as refused:
            self._refuse(refused.refusal, refused.head, now)
            return False
        self._decide(known, now)
        return True

    def _incomplete_head(self, now: float) -> bool:
        if self._client_ended:
            if self._inbox.data:
                self._refuse(refusals.TRUNCATED, None, now)
            else:
                self._finish_client(now)
        elif self._phase is IDLE and self._inbox.begun:
            self._phase = HEAD
            self._timer.await_head(now)
        return False

    def _decide(self, known: KnownRequest, now: float) -> None:
        """Judge one request and answer it or send it on."""
        request = known.request
        judgement = self._judge.request(request)
        self._current = current = Ongoing.begin(known, judgement, self._limits, now)
        # What follows an upgrade may already be in the other protocol.
        self._closing = self._draining or not request.keep_alive or bool(request.upgrade)
        if not judgement.connected:
            self._reset(refusals.DENIED_CONNECTION, now)
        elif not judgement.allowed:
            self._deny(judgement.refusal, now)
        elif request.upgrade and (self._client_ended or not is_websocket(request)):
            self._deny(refusals.UPGRADE, now)
        elif judgement.uses_headers and has_mistakable_name(request.fields):
            self._closing = True
            self._deny(refusals.UNDERSCORE, now)
        else:
            self._forward(current, known.has_body, now)

    def _forward(self, current: Ongoing, has_body: bool, now: float) -> None:
        request, link = current.request, self._link
        try:
            data = current.prepare(
                self._limits, self._heads, self._new_request_id, replayable=link.used
            )
        except RequestRefused as refused:
            self._closing = True
            self._deny(refused.refusal, now)
            return
        self._log(current.record(_REQUEST, self._limits, now))
        if request.upgrade:  # a tunnel has the connection from now on, and what came early
            self._drop_upstream(reset=False)
            if self._client_paused:
                self._commands.append(commands.ResumeClient())
            self._commands.append(commands.HandOver(current, data, self._inbox.data))
            self._phase = CLOSED
            self._timer.stop()
            return
        if request.expects_continue:
            self._commands.append(commands.SendClient(responses.CONTINUE))
        if link.state is NONE:
            self._open(now)
        link.send(data, self._commands)
        if has_body:
            self._phase = BODY
            self._set_body_deadline(now)
        else:
            self._end_request(now)

    def _read_body(self, now: float) -> bool:
        """Send on what there is of a request body; True if the request is complete."""
        current = self._current
        assert current is not None
        inbox = self._inbox
        if not inbox.data:
            if self._client_ended:
                self._reset(refusals.CLIENT_GONE, now)
            return False
        try:
            payload, inbox.data = current.reader.read(inbox.data)
        except FramingFault as fault:
            self._fail_request(fault.refusal, now)
            return False
        if payload:
            current.received_bytes += len(payload)
            chunked = current.request.framing.delimiter is _CHUNKED
            self._link.send(chunk(payload) if chunked else payload, self._commands)
        if not current.reader.done:
            self._set_body_deadline(now, len(payload))
            return not inbox.data and self._client_ended
        if current.request.framing.delimiter is _CHUNKED:
            self._link.send(LAST_CHUNK, self._commands)
        self._end_request(now)
        return False

    def _set_body_deadline(self, now: float, size_bytes: int = 0) -> None:
        current = self._current
        if current is not None and self._link.state is not OPENING and not self._link.blocked:
            self._timer.await_body(now, current.head_at, size_bytes)

    def _end_request(self, now: float) -> None:
        if self._current is not None:
            self._current.request_s = now - self._current.head_at
        self._phase = ANSWER
        if self._link.state is not OPENING:
            self._set_response_deadline(now)

    def _set_response_deadline(self, now: float) -> None:
        current = self._current
        self._timer.await_answer(now, begun=current is not None and current.answer_begun)

    def _discard_body(self, now: float) -> bool:
        """Throw away the body of a refused request; True if the next request may be read."""
        current = self._current
        assert current is not None
        try:
            payload, self._inbox.data = current.reader.read(self._inbox.data)
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
        self._log(current.record(_REQUEST, self._limits, now, refusal))
        self._turn_away(current, refusal, now)

    def _turn_away(self, current: Ongoing, refusal: Refusal, now: float) -> None:
        request = current.request
        body_too_long = request.framing.length > self._limits.discard_bytes
        if request.has_body and (body_too_long or request.expects_continue):
            self._closing = True
        self._answer(refusal, head_only=request.method == b"HEAD", close=self._closing)
        if self._closing:
            self._finish_client(now)
        elif request.has_body:
            self._phase = DISCARD
            self._timer.await_body(now, current.head_at)
        else:
            self._next_request(now)

    def _answer(self, refusal: Refusal, *, head_only: bool, close: bool) -> None:
        data = responses.local_response(
            refusal, head_only=head_only, close=close, denied_body=self._limits.denied_body
        )
        self._commands.append(commands.SendClient(data))

    def _fail_request(self, refusal: Refusal, now: float) -> None:
        """End a request that was sent on: answer for the server, or cut what it has begun."""
        current = self._current
        assert current is not None
        self._log_end(refusal, now)
        self._drop_upstream(reset=True)
        if current.answer_begun or not refusal.status:
            self._close_client(reset=True)
            return
        self._closing = self._closing or self._phase is not ANSWER
        self._answer(refusal, head_only=current.request.method == b"HEAD", close=self._closing)
        if self._closing:
            self._finish_client(now)
        else:
            self._next_request(now)
            self._advance(now)

    # --- the server's side -----------------------------------------------------------------------

    def _open(self, now: float) -> None:
        self._commands.append(self._link.open())
        self._timer.await_connection(now)

    @event
    def upstream_opened(self, now: float, _link: int = 0) -> None:
        """Take that the server accepted the connection."""
        if self._link.state is not OPENING:
            return
        self._commands.append(self._link.opened())
        if self._phase is BODY:
            self._set_body_deadline(now)
        else:
            self._set_response_deadline(now)

    @event
    def upstream_failed(self, failure: commands.ConnectFailure, now: float, _link: int = 0) -> None:
        """Take that there is no connection to the server."""
        if self._link.state is not OPENING:
            return
        self._link.failed()
        self._fail_request(connect_refusal(failure), now)

    @event
    def upstream_data(self, data: bytes, now: float, _link: int = 0) -> None:
        """Take bytes of the server."""
        if self._link.state is not OPEN:
            return
        current = self._current
        reply = None if current is None else current.reply
        if current is None or reply is None:
            # Bytes that answer no request would answer the next one: the queue is poisoned.
            self._commands.append(commands.Count("upstream_unsolicited_bytes"))
            self._drop_upstream(reset=True)
            return
        headless = reply.response is None
        # Whoever answers before the request has ended will not read the rest, nor do we.
        early = self._phase is BODY
        try:
            written = reply.read(data, close=self._closing or early)
        except ResponseRefused as refused:
            self._fail_request(refused.refusal, now)
            return
        current.replay = b""
        if written:
            self._commands.append(commands.SendClient(written))
        if headless and reply.response is not None:
            current.latency_s = now - current.head_at
            self._closing = self._closing or early
        if reply.done:
            self._end_response(current, reply, now)
        elif self._phase is ANSWER and reply.response is not None:
            self._timer.await_answer(now, begun=True)

    def _end_response(self, current: Ongoing, reply: Reply, now: float) -> None:
        """Go on after a complete answer."""
        response = reply.response
        assert response is not None
        self._log(current.record(_RESPONSE, self._limits, now))
        self._link.used = True
        request_complete = self._phase is ANSWER
        if reply.excess or not response.reusable or not request_complete:
            self._drop_upstream(reset=not request_complete)
        current.reply = None
        if self._closing or not request_complete or response.sent.delimiter is _UNTIL_CLOSE:
            self._finish_client(now)
        else:
            self._next_request(now)
            if self._inbox.data or self._client_ended:
                self._advance(now)

    @event
    def upstream_ended(self, now: float, _link: int = 0) -> None:
        """Take the server's FIN."""
        self._end_upstream(now, lost=False)

    @event
    def upstream_lost(self, now: float, _link: int = 0) -> None:
        """Take the loss of the server's connection, by RST or an error."""
        self._end_upstream(now, lost=True)

    def _end_upstream(self, now: float, *, lost: bool) -> None:
        if self._link.state is NONE:
            return
        current = self._current
        reply = None if current is None else current.reply
        if current is None or reply is None:
            self._drop_upstream(reset=False)
        elif not reply.begun and current.replay:
            self._retry(current, now)
        elif reply.response is None:
            begun = reply.begun
            self._fail_request(
                refusals.UPSTREAM_PROTOCOL if begun else refusals.UPSTREAM_CLOSED, now
            )
        elif lost or (written := reply.end()) is None:
            self._fail_request(refusals.UPSTREAM_TRUNCATED, now)
        else:
            if written:
                self._commands.append(commands.SendClient(written))
            self._end_response(current, reply, now)

    def _retry(self, current: Ongoing, now: float) -> None:
        """RFC 9112 9.3.1: the server closed a kept connection before it saw the request."""
        data, current.replay = current.replay, b""
        self._drop_upstream(reset=False)
        self._commands.append(commands.Count("upstream_rq_retry"))
        self._open(now)
        self._link.send(data, self._commands)
        self._judge_waiting(now)

    def _drop_upstream(self, *, reset: bool) -> None:
        self._link.drop(self._commands, reset=reset)

    # --- both ------------------------------------------------------------------------------------

    def _next_request(self, now: float) -> None:
        self._current = None
        self._phase = IDLE
        self._timer.await_request(now)

    def _finish_client(self, now: float) -> None:
        """Read no further request: send FIN, and give the client time to read what was sent.

        Bytes that meet a closed socket are answered with RST, which takes from the client what it
        has not read yet. So it is closed at once only if nothing is to come.
        """
        current = self._current
        silent = self._client_ended or (current is not None and self._has_said_all(current))
        self._drop_upstream(reset=current is not None and current.reply is not None)
        if silent:
            self._close_client()
            return
        self._inbox.clear()
        self._current = None
        self._phase = LINGER
        self._timer.linger(now)
        self._commands.append(commands.ShutdownClient())

    def _has_said_all(self, current: Ongoing) -> bool:
        """Whether this was the client's last request, by word or version (RFC 9112 9.3, 9.6).

        With TLS its close_notify is still to come.
        """
        request = current.request
        if request.keep_alive or self._secure or self._inbox.data:
            return False
        return self._phase is ANSWER or not request.has_body

    def _close_client(self, *, reset: bool = False) -> None:
        self._inbox.clear()
        self._current = None
        super()._close_client(reset=reset)

    def _reset(self, refusal: Refusal, now: float) -> None:
        """End everything at once."""
        self._log_end(refusal, now)
        self._drop_upstream(reset=True)
        self._close_client(reset=True)

    @event
    def tick(self, now: float) -> None:
        """Take that time has passed; does nothing before `deadline`."""
        if now < self.deadline:
            return
        timeout = self._timer.timeout
        match self._phase:
            case Phase.IDLE:
                self._commands.append(commands.Count("http_downstream_cx_idle_timeout"))
                self._finish_client(now)
            case Phase.HEAD:
                self._refuse(refusals.HEAD_TIMEOUT, None, now)
            case Phase.BODY | Phase.ANSWER:
                assert timeout is not None
                self._fail_request(timeout, now)
            case Phase.DISCARD:
                self._finish_client(now)
            case Phase.LINGER:
                self._close_client()
            case Phase.CLOSED:
                self._timer.stop()

    @event
    def policy_changed(self, now: float) -> None:
        """Take that another snapshot is in force: a connection that lost its permission ends."""
        if self._phase >= LINGER:
            return
        judgement = self._judge.connection()
        if judgement.connected:
            self._judge_waiting(now)
            return
        if self._current is None or self._phase is DISCARD:
            self._log(connection_record(refusals.DENIED_CONNECTION, judgement))
        else:
            self._current.judgement = judgement
        self._reset(refusals.DENIED_CONNECTION, now)

    def _judge_waiting(self, now: float) -> None:
        """Judge a request again that waits for its server, and so has reached nobody."""
        current = self._current
        if current is None or current.reply is None or self._link.state is not OPENING:
            return
        judgement = self._judge.request(current.request)
        if not judgement.allowed:
            current.judgement = judgement
            self._log_end(judgement.refusal, now)
            current.reply = None
            self._drop_upstream(reset=True)
            self._turn_away(current, judgement.refusal, now)
            self._advance(now)

    @event
    def drain(self, now: float) -> None:  # noqa: ARG002 - an event
        """Say goodbye with the next answer; a client that has just connected shall get one."""
        self._draining = self._closing = True

    @event
    def finish(self, now: float) -> None:
        """Close if nothing is being served, and after what is."""
        self._draining = self._closing = True
        if self._phase is IDLE:
            self._finish_client(now)

    # --- back-pressure ---------------------------------------------------------------------------

    @event
    def client_blocked(self, blocked: bool, now: float) -> None:
        """Take that what was sent to the client piles up, or no longer does."""
        self._client_blocked = blocked
        if self._phase is ANSWER and self._current is not None and self._current.answer_begun:
            self._timer.await_answer(now, begun=True, flush=blocked)
        if not blocked:
            self._advance(now)

    @event
    def upstream_blocked(self, blocked: bool, now: float, _link: int = 0) -> None:
        """Take that what was sent to the server piles up, or no longer does."""
        self._link.blocked = blocked
        if self._phase is BODY:
            if blocked:  # the client cannot be blamed for not sending while we do not read
                self._timer.await_answer(now, begun=False)
            else:
                self._set_body_deadline(now)

    def _must_pause_client(self, phase: Phase, link: Link) -> bool:
        limit_bytes = self._limits.buffer_bytes
        if phase is BODY:
            return link.blocked or link.held_bytes > limit_bytes
        if phase >= LINGER:
            return False
        full = phase is not HEAD and len(self._inbox.data) > limit_bytes
        return full or self._client_blocked or link.held_bytes > limit_bytes

    def _settle(self) -> None:
        """Pause whoever fills a buffer that the other side does not empty."""
        phase, link = self._phase, self._link
        if phase is CLOSED:
            return
        if len(self._inbox.data) + link.held_bytes <= self._limits.buffer_bytes and not (
            self._client_blocked or self._client_paused or link.blocked or link.paused
        ):
            return
        pause = self._must_pause_client(phase, link)
        if pause is not self._client_paused:
            self._client_paused = pause
            self._commands.append(commands.PauseClient() if pause else commands.ResumeClient())
        link.follow(self._commands, client_blocked=self._client_blocked)

    # --- records ---------------------------------------------------------------------------------

    def _break_off(self, refusal: Refusal) -> None:
        if self._phase is CLOSED:
            return
        if self._current is None:
            self._log(connection_record(refusal, None))
        self._log_end(refusal, self._current.head_at if self._current else 0.0)
        self._drop_upstream(reset=True)
        self._close_client(reset=True)

    def _log_end(self, refusal: Refusal, now: float) -> None:
        """commands.Log how a request ended, if one is being served, without a complete answer."""
        current = self._current
        if current is None or self._phase is DISCARD:
            return  # nothing is being served, or it was denied and has its record already
        kind = _REQUEST if current.reply is None else _RESPONSE
        self._log(current.record(kind, self._limits, now, refusal))
