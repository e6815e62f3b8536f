"""The request that a client connection is being served, and the records about it."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple, Self

import msgspec

from l7proxy.commands import Record, RecordKind
from l7proxy.framing import BodyReader, LengthReader
from l7proxy.head import Field, RequestHead
from l7proxy.judgement import Judgement
from l7proxy.limits import Limits
from l7proxy.reference import AgreedReader, body_reader
from l7proxy.refusals import Refusal
from l7proxy.reply import Reply
from l7proxy.request import Request, edited, serialise

if TYPE_CHECKING:
    from l7proxy.heads import Heads, KnownRequest

_PROTOCOLS = ("HTTP/1.0", "HTTP/1.1", "HTTP/2")
"""As Envoy's %PROTOCOL% has them, by `Request.minor`."""

REDACTED = "[redacted]"
"""What stands for the value of a header that a rule compares with a secret; Cilium's word."""

IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))
"""RFC 9110 9.2.2."""

_REQUEST, _RESPONSE = RecordKind
_NOTHING: BodyReader | AgreedReader = LengthReader(0)
"""Reads the body of every request that has none; it has no state to share."""


class Ongoing(msgspec.Struct, gc=False):
    """A judged request with its answer, from its head to its end; no part of a cycle.

    Attributes:
        head_at: monotonic seconds of its head, `latency_s` from there to the answer's head.
        reader: where its body ends.
        known: what the head became, if it was HTTP/1.
        texts: what records say of it, made when the first one is.
        reply: the server's answer; None: it was not sent on.
        replay: its bytes, if it may be sent once more to another connection, else empty.
        received_bytes: bytes of its body so far.
        request_s: from its head to its last byte.
        request_id: as the server gets it, or empty.
    """

    request: Request
    judgement: Judgement
    head_at: float
    reader: BodyReader | AgreedReader
    known: "KnownRequest | None" = None
    texts: "Texts | None" = None
    reply: Reply | None = None
    replay: bytes = b""
    latency_s: float = 0.0
    received_bytes: int = 0
    request_s: float = 0.0
    request_id: str = ""

    @classmethod
    def begin(cls, known: "KnownRequest", judgement: Judgement, limits: Limits, now: float) -> Self:
        """Return the request of an HTTP/1 head."""
        request = known.request
        reader = _NOTHING
        if known.has_body:
            reader = body_reader(request.framing, limits, request.reference)
        # What is known was read before policy said what may be shown.
        texts = None if judgement.redacted else known.texts
        return cls(request, judgement, now, reader, known, texts)

    def prepare(
        self, limits: Limits, heads: "Heads", new_request_id: Callable[[], str], *, replayable: bool
    ) -> bytes:
        """Return the head to send to the server, and expect its answer.

        `replayable`: the server may close the connection before it sees the request.

        Raises:
            RequestRefused: the policy's header actions would break the request.
        """
        request, known = self.request, self.known
        if known is None or self.judgement.edits:
            fields, added_id = self.fields_to_send(limits, new_request_id)
            data = serialise(request, fields, added_id)
        elif known.request_id or not limits.request_id:
            self.request_id = known.request_id
            data = known.wire + b"\r\n"
        else:
            self.request_id = new_request_id()
            data = b"%bX-Request-Id: %b\r\n\r\n" % (known.wire, self.request_id.encode())
        self.reply = Reply(request, limits, heads)
        if replayable and limits.retry_idle_close and not request.has_body:
            self.replay = data if request.method in IDEMPOTENT else b""
        return data

    def fields_to_send(
        self, limits: Limits, new_request_id: Callable[[], str]
    ) -> tuple[list[Field], bytes]:
        """Return the fields after the policy's header actions, and the request id to add or b"".

        Raises:
            RequestRefused: the actions would break the request.
        """
        fields = edited(self.request.fields, self.judgement.edits)
        for name, _, value in fields:
            if name == b"x-request-id":
                self.request_id = value.decode("latin-1")
                return fields, b""
        if limits.request_id:
            self.request_id = new_request_id()
        return fields, self.request_id.encode()

    @property
    def answer_begun(self) -> bool:
        """Whether the client has got the head of the server's answer."""
        return self.reply is not None and self.reply.response is not None

    def record(
        self, kind: RecordKind, limits: Limits, now: float, refusal: Refusal | None = None
    ) -> Record:
        """Describe it as it stands; `refusal` says how it ended, if not by the server's answer."""
        texts = self.texts
        if texts is None:
            wanted = [name.encode() for name in limits.log_headers]
            self.texts = texts = texts_of(self.request, wanted, self.judgement.redacted)
        reply = self.reply
        response = None if reply is None else reply.response
        status = 0 if response is None else response.head.status
        flag, detail = "", "" if response is None else "via_upstream"
        if refusal is not None:
            status, flag, detail = status or refusal.status, refusal.flag, refusal.detail
        return Record(
            kind,
            self.judgement,
            texts.method,
            texts.authority,
            texts.path,
            texts.protocol,
            status,
            flag,
            detail,
            self.request_id,
            self.latency_s,
            now - self.head_at,
            self.received_bytes,
            0 if reply is None else reply.sent_bytes,
            texts.headers,
            request_s=self.request_s,
            request_fields=self.request.fields,
            response_fields=() if response is None else response.fields,
        )


class Texts(NamedTuple):
    """The parts of a request that every record of it has."""

    method: str
    authority: str
    path: str
    protocol: str
    headers: tuple[tuple[str, str], ...]


def texts_of(
    request: Request, wanted: Collection[bytes], redacted: Collection[bytes] = ()
) -> Texts:
    """Return them.

    Args:
        request: the request.
        wanted: names of the fields that records show, in lower case.
        redacted: names of those whose value is nobody's business.
    """
    return Texts(
        request.method.decode("ascii"),
        request.target.authority.decode("ascii"),
        request.target.wire.decode("ascii"),
        protocol(request.minor),
        tuple(
            (
                field[0].decode("ascii"),
                REDACTED if field[0] in redacted else field[2].decode("latin-1"),
            )
            for field in request.fields
            if field[0] in wanted
        ),
    )


def protocol(minor: int) -> str:
    """Return the name of an HTTP version as logs have it."""
    return _PROTOCOLS[minor]


def connection_record(refusal: Refusal, judgement: Judgement | None) -> Record:
    """Describe a connection that ended by our will while no request was being served."""
    return Record(RecordKind.REQUEST, judgement, "", "", "", "", 0, refusal.flag, refusal.detail)


def malformed_record(refusal: Refusal, head: RequestHead | None) -> Record:
    """Describe a request that policy never saw; nothing of an invalid head is copied."""
    record = Record(
        RecordKind.REQUEST, None, "", "", "", "", refusal.status, refusal.flag, refusal.detail
    )
    if head is None:
        return record
    return msgspec.structs.replace(
        record,
        method=head.method.decode("ascii"),
        path=head.target.decode("ascii"),
        protocol=protocol(head.minor),
    )
