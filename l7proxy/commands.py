"""What an exchange asks of the world. The shell (`l7proxy.connection`) performs them in order.

The other half of the vocabulary, what the world tells an exchange, are the methods of
`exchange.Exchange`; each returns a list of these. They are msgspec structs because a request makes
eight of them: a named tuple takes ten times as long to make (CPython 3.11). Those of every request
are kept from the garbage collector's eyes; none of them can be a part of a cycle.
"""

from enum import IntEnum
from typing import TYPE_CHECKING

import msgspec

from firewall.policy.course import Course
from l7proxy.client_hello import ClientHello
from l7proxy.judgement import Judgement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from l7proxy.head import Field
    from l7proxy.ongoing import Ongoing


class RecordKind(IntEnum):
    """Which half of an exchange a record describes."""

    REQUEST = 1
    RESPONSE = 2


class Record(msgspec.Struct, frozen=True):
    """One line of the access log.

    A request that is forwarded has two records that share `request_id`, REQUEST when it was
    decided, RESPONSE when its answer ended; every other request has one. `judgement` None: it was
    refused before policy saw it. `status` is that of the answer, 0 if there was none (yet).
    `flag` and `detail` are Envoy's response flag and response code detail, or "".
    `latency_s`: request head to response head; `duration_s`: request head to the end. Byte counts
    are of bodies. Text is printable ASCII except `user_agent` and `headers` (Latin-1). A connection
    whose bytes pass unread has a REQUEST and a RESPONSE too, with the protocol "TLS" or "TCP", the
    server name as authority, and counts of all bytes. `tls`: the client speaks TLS, and
    names `server_name`. `transport_failure`: why there is no TLS with the server, or "".
    `request_s`: request head to the request's last byte. `request_fields`, `response_fields`: of
    the heads as the proxy read them.
    """

    kind: RecordKind
    judgement: Judgement | None
    method: str
    authority: str
    path: str
    protocol: str
    status: int = 0
    flag: str = ""
    detail: str = ""
    request_id: str = ""
    latency_s: float = 0.0
    duration_s: float = 0.0
    received_bytes: int = 0
    sent_bytes: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    tls: bool = False
    server_name: str = ""
    transport_failure: str = ""
    request_s: float = 0.0
    request_fields: "Sequence[Field]" = ()
    response_fields: "Sequence[Field]" = ()


class OpenUpstream(msgspec.Struct, frozen=True):
    """Connect to the original destination; answer with `upstream_opened` or `upstream_failed`.

    `link` is the number that the connection has in all commands and events about it. `http2`: what
    will be spoken on it, for TLS to negotiate.
    """

    link: int = 0
    http2: bool = False


class SendUpstream(msgspec.Struct, frozen=True, gc=False):
    """Send to the server."""

    data: bytes
    link: int = 0


class CloseUpstream(msgspec.Struct, frozen=True):
    """Close the server's connection, or stop opening it; no event follows.

    `reset`: by RST, so that a truncated request cannot look complete.
    """

    reset: bool
    link: int = 0


class ShutdownUpstream(msgspec.Struct, frozen=True):
    """Send FIN to the server after what was sent; go on reading."""

    link: int = 0


class SendClient(msgspec.Struct, frozen=True, gc=False):
    """Send to the client."""

    data: bytes


class ShutdownClient(msgspec.Struct, frozen=True):
    """Send FIN after what was sent; go on reading."""


class CloseClient(msgspec.Struct, frozen=True):
    """Close the client's connection; no event follows. `reset`: by RST, at once."""

    reset: bool


class PauseClient(msgspec.Struct, frozen=True):
    """Read nothing more from the client for now."""


class ResumeClient(msgspec.Struct, frozen=True):
    """Read from the client again."""


class PauseUpstream(msgspec.Struct, frozen=True):
    """Read nothing more from the server for now."""

    link: int = 0


class ResumeUpstream(msgspec.Struct, frozen=True):
    """Read from the server again."""

    link: int = 0


class HandOver(msgspec.Struct, frozen=True):
    """Go on with a `tunnel.Tunnel` for this request, which is allowed and has not been sent.

    `head` is what to send, `early` what the client has sent after it. No event comes here again.
    """

    ongoing: "Ongoing"
    head: bytes
    early: bytes


class Enter(msgspec.Struct, frozen=True):
    """Go on as the course says, from the client's first bytes on. No event comes here again.

    `hello` None: they are no TLS, or TLS that nobody needs to read. If the course terminates TLS,
    do so, and come back with `failed` if it fails; the events stay here until it is done.
    """

    course: Course
    hello: ClientHello | None
    data: bytes


class Log(msgspec.Struct, frozen=True, gc=False):
    """Report this."""

    record: Record


class Count(msgspec.Struct, frozen=True):
    """Add one to a counter that no record implies, by Envoy's name."""

    name: str


Command = (
    OpenUpstream
    | SendUpstream
    | CloseUpstream
    | SendClient
    | ShutdownClient
    | CloseClient
    | PauseClient
    | ResumeClient
    | PauseUpstream
    | ResumeUpstream
    | HandOver
    | Enter
    | ShutdownUpstream
    | Log
    | Count
)


class ConnectFailure(IntEnum):
    """Why there is no connection to the server."""

    REFUSED = 1
    TIMEOUT = 2
    TLS = 3
    """The server's certificate is not to be trusted, or there is no TLS with it at all."""
    NO_HTTP2 = 4
    """TLS is there, and the server does not want HTTP/2 in it."""
    OVERFLOW = 5
    """There are as many already as there may be."""
