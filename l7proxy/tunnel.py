"""A WebSocket: an upgrade that a rule allows, and the bytes that pass once the server agreed.

`Exchange` hands a client connection over when it has allowed the request; the connection never
becomes HTTP again. The server gets the request on a connection of its own. Bytes that the client
sends early are held, not sent: a server that does not switch would take them for requests. Only a
101 that names WebSocket and proves with `Sec-WebSocket-Accept` that the server has read this very
key opens the tunnel; any other answer is passed on as an answer, and then both sides close.

Inside the tunnel bytes are not looked at. It ends when the snapshot no longer allows the request
that opened it. Source: RFC 6455 1.3, 4.1, 4.2.2; RFC 9110 7.8; CVE-2024-23326 (tunnels after 200).
"""

import base64
import hashlib
import re

from l7proxy import commands, refusals, responses
from l7proxy.core import event
from l7proxy.framing import NO_BODY
from l7proxy.head import ResponseHead, check_response_start, parse_response
from l7proxy.judgement import Judge
from l7proxy.limits import Limits
from l7proxy.link import LinkState, connect_refusal
from l7proxy.ongoing import Ongoing
from l7proxy.phase import Phase
from l7proxy.pipe import Pipe
from l7proxy.reference import check_response
from l7proxy.refusals import Refusal, ResponseRefused
from l7proxy.reply import Reply
from l7proxy.request import Request
from l7proxy.responses import Response

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""RFC 6455 1.3."""

_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")
"""RFC 6455 4.1: 16 bytes in base64."""

_HEAD_END = b"\r\n\r\n"

WEBSOCKET = b"websocket"


def is_websocket(request: Request) -> bool:
    """Whether a request is a complete WebSocket handshake (RFC 6455 4.1)."""
    keys = [value for name, _, value in request.fields if name == b"sec-websocket-key"]
    versions = [value for name, _, value in request.fields if name == b"sec-websocket-version"]
    return (
        request.upgrade == WEBSOCKET
        and request.method == b"GET"
        and request.minor == 1
        and not request.has_body
        and len(keys) == 1
        and _KEY.fullmatch(keys[0]) is not None
        and versions == [b"13"]
    )


def _accept(request: Request) -> bytes:
    """Return the only `Sec-WebSocket-Accept` that answers this request."""
    key = next(value for name, _, value in request.fields if name == b"sec-websocket-key")
    # RFC 6455 4.2.2: a proof of having read the key, no secret.
    digest = hashlib.sha1(key + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest)


class Tunnel(Pipe):
    """What a client connection becomes with an allowed WebSocket request.

    The events are those of `exchange.Exchange`; `start` comes first.

    Args:
        ongoing: the request, allowed and not yet sent.
        early: what the client has sent after it.
    """

    __slots__ = ("_early", "_inbox", "_ongoing", "_reply", "_tunnelled")

    def __init__(
        self, judge: Judge, limits: Limits, ongoing: Ongoing, early: bytes, now: float
    ) -> None:
        super().__init__(judge, limits, now)
        self._ongoing = ongoing
        self._early = early
        self._inbox = b""
        self._reply = Reply(ongoing.request, limits)
        ongoing.reply = self._reply
        self._tunnelled = False

    @event
    def start(self, head: bytes, now: float) -> None:
        """Connect to the server and send it the request: `head`, and the fields of the upgrade."""
        self._commands.append(self._link.open())
        self._timer.await_connection(now)
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        self._link.send(head.removesuffix(b"\r\n") + upgrade, self._commands)

    # --- the client's side -----------------------------------------------------------------------

    @event
    def client_data(self, data: bytes, now: float) -> None:
        """Take bytes of the client."""
        if self._phase is Phase.LINGER:
            return
        if not self._tunnelled:
            self._early += data
            return
        self._ongoing.received_bytes += len(data)
        self._link.send(data, self._commands)
        self._timer.await_answer(now, begun=True)

    @event
    def client_ended(self, now: float) -> None:
        """Take the client's FIN: WebSocket has no half-closed state (RFC 6455 7.1.1)."""
        self._end(None if self._tunnelled else refusals.CLIENT_GONE, now)

    @event
    def client_lost(self, now: float) -> None:
        """Take the loss of the client's connection."""
        self._log_end(refusals.CLIENT_GONE, now)
        self._link.drop(self._commands, reset=True)
        self._phase = Phase.CLOSED
        self._timer.stop()

    # --- the server's side -----------------------------------------------------------------------

    @event
    def upstream_opened(self, now: float, _link: int = 0) -> None:
        """Take that the server accepted the connection."""
        self._commands.append(self._link.opened())
        self._timer.await_answer(now, begun=False)

    @event
    def upstream_failed(self, failure: commands.ConnectFailure, now: float, _link: int = 0) -> None:
        """Take that there is no connection to the server."""
        self._link.failed()
        self._end(connect_refusal(failure), now)

    @event
    def upstream_data(self, data: bytes, now: float, _link: int = 0) -> None:
        """Take bytes of the server."""
        if self._link.state is not LinkState.OPEN:
            return
        if self._tunnelled:
            self._reply.sent_bytes += len(data)
            self._commands.append(commands.SendClient(data))
            self._timer.await_answer(now, begun=True)
            return
        try:
            self._read_answer(data, now)
        except ResponseRefused as refused:
            self._end(refused.refusal, now)

    def _read_answer(self, data: bytes, now: float) -> None:
        if not self._reply.begun:
            self._inbox += data
            end = self._inbox.find(_HEAD_END) + len(_HEAD_END)
            if end < len(_HEAD_END):
                check_response_start(self._inbox, self._limits)
                return
            if self._inbox[8:13] == b" 101 ":
                head = parse_response(self._inbox[:end], self._limits)
                self._switch(head, self._inbox[end:], now)
                return
            data, self._inbox = self._inbox, b""
        written = self._reply.read(data, close=True)
        if written:
            self._commands.append(commands.SendClient(written))
            self._timer.await_answer(now, begun=self._reply.response is not None)
        if self._reply.done:
            self._end(None, now)

    def _switch(self, head: ResponseHead, rest: bytes, now: float) -> None:
        """Open the tunnel, if this 101 answers this request."""
        if head.minor == 0:  # RFC 6455 4.1; HTTP/1.0 has no interim responses (RFC 9110 15.2)
            raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
        fields = [(name, value) for name, _, value in head.fields]
        upgrade = [value.lower() for name, value in fields if name == b"upgrade"]
        connection = b",".join(value for name, value in fields if name == b"connection").lower()
        options = {option.strip(b" \t") for option in connection.split(b",")}
        if upgrade != [WEBSOCKET] or not {b"upgrade"} <= options <= {b"upgrade", b"keep-alive"}:
            raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
        proofs = [value for name, value in fields if name == b"sec-websocket-accept"]
        if proofs != [_accept(self._ongoing.request)]:
            raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
        if {b"content-length", b"transfer-encoding"} & dict(fields).keys():
            raise ResponseRefused(refusals.UPSTREAM_PROTOCOL)
        check_response(head, b"GET", None, upgrade=True)
        self._ongoing.latency_s = now - self._ongoing.head_at
        self._reply.begun = True
        self._reply.response = Response(head, head.fields, NO_BODY, NO_BODY, None, reusable=False)
        self._tunnelled = True
        self._timer.await_answer(now, begun=True)
        switch = responses.serialise_switch(head)
        self._reply.sent_bytes += len(rest)
        self._commands.append(commands.SendClient(switch + rest))
        if self._early:
            self._ongoing.received_bytes += len(self._early)
            self._link.send(self._early, self._commands)
            self._early = b""

    @event
    def upstream_ended(self, now: float, _link: int = 0) -> None:
        """Take the server's FIN."""
        self._end_upstream(now, lost=False)

    @event
    def upstream_lost(self, now: float, _link: int = 0) -> None:
        """Take the loss of the server's connection."""
        self._end_upstream(now, lost=True)

    def _end_upstream(self, now: float, *, lost: bool) -> None:
        if self._link.state is LinkState.NONE:
            return
        if self._tunnelled:
            self._end(refusals.UPSTREAM_TRUNCATED if lost else None, now)
        elif self._reply.response is None:
            begun = self._reply.begun or bool(self._inbox)
            self._end(refusals.UPSTREAM_PROTOCOL if begun else refusals.UPSTREAM_CLOSED, now)
        elif lost or (written := self._reply.end()) is None:
            self._end(refusals.UPSTREAM_TRUNCATED, now)
        else:
            self._commands.append(commands.SendClient(written))
            self._end(None, now)

    # --- both ------------------------------------------------------------------------------------

    @event
    def tick(self, now: float) -> None:
        """Take that time has passed; does nothing before `deadline`."""
        if now < self.deadline:
            return
        if self._phase is Phase.LINGER:
            self._close_client(reset=False)
        else:
            self._end(self._timer.timeout or refusals.STREAM_IDLE, now)

    @event
    def policy_changed(self, now: float) -> None:
        """Take that another snapshot is in force: what no longer may be said ends."""
        if self._phase is Phase.LINGER:
            return
        judgement = self._judge.request(self._ongoing.request)
        if not judgement.allowed:
            self._ongoing.judgement = judgement
            self._end(refusals.DENIED_CONNECTION, now)

    def _held_bytes(self) -> int:
        return len(self._early)

    def _break_off(self, refusal: Refusal) -> None:
        self._end(refusal, self._ongoing.head_at)

    def _end(self, refusal: Refusal | None, now: float) -> None:
        """End both sides; `refusal` None: all that was to be said was said."""
        if self._phase is not Phase.ANSWER:
            if self._phase is Phase.LINGER:
                self._close_client(reset=False)
            return
        self._log_end(refusal, now)
        self._link.drop(self._commands, reset=refusal is not None)
        if refusal is not None and (self._reply.response is not None or not refusal.status):
            self._close_client(reset=True)
            return
        if refusal is not None:
            denied_body = self._limits.denied_body
            answer = responses.local_response(
                refusal, head_only=False, close=True, denied_body=denied_body
            )
            self._commands.append(commands.SendClient(answer))
        self._phase = Phase.LINGER
        self._timer.linger(now)
        self._commands.append(commands.ShutdownClient())

    def _log_end(self, refusal: Refusal | None, now: float) -> None:
        if self._phase is Phase.ANSWER:
            kind = commands.RecordKind.RESPONSE
            record = self._ongoing.record(kind, self._limits, now, refusal)
            self._commands.append(commands.Log(record))
