"""Heads that were read before: what their bytes became, so that the same bytes are not read again.

A client sends much the same head each time, and a server answers with much the same one within a
second. What a lean head becomes depends on its bytes and on the settings alone, so it can be kept:
the request as admitted, the bytes that the server gets, the texts of its records. Policy is not
part of it and is asked each time. A head that h11 had to read as well is never kept, because h11's
state goes on with its body.

Bounded: `_COUNT` heads each way of at most `_BYTES` bytes, 25 MB for a worker in the worst case
(a hundred short fields in each); when there is no more room all are forgotten.
"""

from typing import NamedTuple

from l7proxy.framing import Delimiter
from l7proxy.head import parse_request
from l7proxy.limits import Limits
from l7proxy.ongoing import Texts, texts_of
from l7proxy.refusals import RequestRefused
from l7proxy.request import Request, admit, serialise_fields
from l7proxy.responses import Response, serialise_response

_COUNT = 512
_BYTES = 2048
_REQUEST_ID = b"x-request-id"


class KnownRequest(NamedTuple):
    """An admitted request and what is written from it.

    `wire` is its head for the server, all but the empty line; `request_id` is the client's own, or
    empty. `has_body`: bytes follow the head.
    """

    request: Request
    wire: bytes
    request_id: str
    texts: Texts
    has_body: bool


class KnownResponse(NamedTuple):
    """An admitted final response and its head for the client, which stays connected or not."""

    response: Response
    kept: bytes
    closing: bytes


class Heads:
    """The heads of one worker's connections; without it, nothing would read differently."""

    __slots__ = ("_limits", "_log_headers", "_requests", "_responses")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._log_headers = frozenset(name.encode() for name in limits.log_headers)
        self._requests: dict[bytes, KnownRequest] = {}
        self._responses: dict[tuple[bytes, bool, int], KnownResponse] = {}

    def request(self, raw: bytes, scheme: bytes = b"http") -> KnownRequest:
        """Return what one whole request head says; `scheme` is that of the client's connection.

        A lean head, which is all that is kept, means the same with either.

        Raises:
            RequestRefused: it has no single reading; `head` is set if its lines at least have.
        """
        known = self._requests.get(raw)
        if known is None:
            known = self._admit(raw, scheme)
            if known.request.reference is None and len(raw) <= _BYTES:
                if len(self._requests) >= _COUNT:
                    self._requests.clear()
                self._requests[raw] = known
        return known

    def _admit(self, raw: bytes, scheme: bytes) -> KnownRequest:
        head = parse_request(raw, self._limits)
        try:
            request = admit(head, self._limits, scheme)
        except RequestRefused as refused:
            refused.head = head
            raise
        request_id = next((value for name, _, value in request.fields if name == _REQUEST_ID), b"")
        return KnownRequest(
            request,
            serialise_fields(request, request.fields),
            request_id.decode("latin-1"),
            texts_of(request, self._log_headers),
            request.has_body,
        )

    def response(self, raw: bytes, method: bytes, minor: int) -> KnownResponse | None:
        """Return what a whole head says that was read before, as an answer to such a request."""
        return self._responses.get((raw, method == b"HEAD", minor))

    def remember(self, raw: bytes, method: bytes, minor: int, response: Response) -> None:
        """Keep what a lean head became, unless it ends the client's connection in any case."""
        if len(raw) > _BYTES or response.sent.delimiter is Delimiter.CLOSE:
            return
        if len(self._responses) >= _COUNT:
            self._responses.clear()
        self._responses[raw, method == b"HEAD", minor] = KnownResponse(
            response,
            serialise_response(response, close=False),
            serialise_response(response, close=True),
        )
