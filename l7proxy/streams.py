"""One HTTP/2 request of a client on its way, and what the server's side says about its answer."""

from typing import NamedTuple

from l7proxy.head import Field, ResponseHead
from l7proxy.limits import Limits
from l7proxy.ongoing import Ongoing
from l7proxy.refusals import Refusal
from l7proxy.responses import Response
from l7proxy.stream_head import FieldList, is_grpc
from l7proxy.timer import Timer


class Stream:
    """A stream of the client's connection, from its decision to its end.

    Attributes:
        number: the client's stream id.
        ongoing: request, judgement, what the records say.
        grpc: the client reads gRPC answers.
        timer: its deadline.
        fields: what the server gets, with `request_id` to add, once it is decided.
        request_ended: the client has sent all of the request.
        owed_bytes: of the client's flow control window, given back when the server has taken them.
        upload: request body that waits for the server; `upload_trailers` come after it.
        upstream_number: stream id at an HTTP/2 server, 0 = none.
        upstream_owed_bytes: as `owed_bytes`, for the server's window.
        pending: response body that waits for the client's window.
        head_sent: the client has the head of the answer.
        answer_ended: the server has sent all of the answer; `trailers` end it.
    """

    __slots__ = (
        "answer_ended", "fields", "grpc", "head_sent", "number", "ongoing", "owed_bytes", "pending",
        "request_ended", "request_id", "timer", "trailers", "upload", "upload_trailers",
        "upstream_number", "upstream_owed_bytes",
    )  # fmt: skip

    def __init__(self, number: int, ongoing: Ongoing, limits: Limits, now: float) -> None:
        self.number = number
        self.ongoing = ongoing
        self.grpc = is_grpc(ongoing.request)
        self.timer = Timer(limits, now)
        self.fields: list[Field] = []
        self.request_id = b""
        self.request_ended = False
        self.owed_bytes = 0
        self.upload = bytearray()
        self.upload_trailers: FieldList = []
        self.upstream_number = 0
        self.upstream_owed_bytes = 0
        self.pending = bytearray()
        self.head_sent = False
        self.answer_ended = False
        self.trailers: FieldList = []

    def __repr__(self) -> str:
        return f"<Stream {self.number}>"


class AnswerInterim(NamedTuple):
    """The server sent a 1xx head."""

    stream: Stream
    head: ResponseHead


class AnswerHead(NamedTuple):
    """The server sent the final head; `ended`: and nothing follows it."""

    stream: Stream
    response: Response
    ended: bool


class AnswerData(NamedTuple):
    """The server sent a part of the body."""

    stream: Stream
    data: bytes


class AnswerEnd(NamedTuple):
    """The answer is complete; its link has let go of the stream."""

    stream: Stream
    trailers: FieldList


class AnswerBroken(NamedTuple):
    """There will be no (complete) answer; its link has let go of the stream."""

    stream: Stream
    refusal: Refusal


class NotSpoken(NamedTuple):
    """The server speaks no HTTP/2; it has seen nothing of the request."""

    stream: Stream


AnswerPart = AnswerInterim | AnswerHead | AnswerData | AnswerEnd | AnswerBroken | NotSpoken
