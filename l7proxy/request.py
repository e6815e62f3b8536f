"""From a head that parses to a request that may be judged, and from there to the bytes to send.

`admit` applies the rules that concern several fields at once: one Host, one framing, what
`Connection` names, upgrades, expectations. What it returns has exactly one reading; `serialise`
writes that reading, never the bytes that came. Hop-by-hop fields are removed before rules see the
request, so that a rule cannot be satisfied by a field that the server will not get.

Not supported, and answered so: CONNECT, upgrades other than WebSocket, trailers (dropped),
expectations other than 100-continue. `Upgrade: h2c` is dropped and the request goes on in HTTP/1.1,
as RFC 9110 7.8 lets any server do.
Source: RFC 9110 7, 10.1.1; RFC 9112 3.2, 6, 9.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import h11

from firewall.policy.http_match import OWN_FIELDS, EditKind, HeaderEdit
from l7proxy import grammar, refusals
from l7proxy.framing import Delimiter, Framing, request_framing
from l7proxy.head import Field, RequestHead
from l7proxy.limits import Limits
from l7proxy.reference import check_request
from l7proxy.refusals import RequestRefused
from l7proxy.target import Target, check_host, normalise

_CHUNKED, _LENGTH = Delimiter.CHUNKED, Delimiter.LENGTH

_CONNECTION = b"connection"
_CONTENT_LENGTH = b"content-length"
_EXPECT = b"expect"
_HOST = b"host"
_REQUEST_ID = b"x-request-id"
_TRANSFER_ENCODING = b"transfer-encoding"
_UPGRADE = b"upgrade"

# TE and Trailer, which are for this hop only, announce trailers, which end here.
_SPECIAL = frozenset(name.encode() for name in OWN_FIELDS)

_NEVER_NOMINATED = frozenset((_CONTENT_LENGTH, _HOST, _TRANSFER_ENCODING, _EXPECT))
"""Fields that `Connection` must not name: removing them changes where the request goes or ends."""

_READ_AS_FRAMING = frozenset(
    name % bytes((byte,))
    for name in (b"content%blength", b"transfer%bencoding")
    for byte in b"!#$%&'*+.^_`|~"
)
"""Names that CGI's meta-variables do not tell from framing: `_` is what `-` becomes there (RFC 3875
4.1.18), and some servers, lighttpd among them, write every other character so."""

_MISTAKEN = re.compile(rb"[^0-9a-z-]")

_NOT_EDITABLE = _SPECIAL
"""Fields that a policy's header action must not touch, for the same reason."""


class Request(NamedTuple):
    """A request with one reading.

    `fields` are those that rules see and the server gets, without Host and framing. `upgrade`: the
    protocols for which the client wants to leave HTTP/1.1, or empty. `keep_alive`: the client's
    connection may serve more requests. `minor` of HTTP/1.`minor`, or 2 for HTTP/2. `reference`: h11
    after it has read the head, to go on with the body; None if it was not asked.
    """

    method: bytes
    target: Target
    minor: int
    fields: list[Field]
    framing: Framing
    keep_alive: bool
    expects_continue: bool
    upgrade: bytes
    reference: h11.Connection | None = None

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What header rules see: lower-case names, Host first, one value for each name.

        Upgrade is among them if the client wants to leave HTTP, because the server gets it then.
        Repeated fields are combined with a comma (RFC 9110 5.3), as Envoy does for Cilium. A rule
        that wants `user` is then not satisfied by `user` beside `admin`, in whatever order
        (CVE-2020-25017, CVE-2026-26308).
        """
        seen = {_HOST: self.target.authority}
        for name, _, value in self.fields:
            seen[name] = seen[name] + b"," + value if name in seen else value
        if self.upgrade:
            seen[_UPGRADE] = self.upgrade
        return list(seen.items())

    @property
    def has_body(self) -> bool:
        """Whether bytes follow the head."""
        delimiter, length = self.framing
        return length > 0 or delimiter is _CHUNKED


def admit(head: RequestHead, limits: Limits, scheme: bytes = b"http") -> Request:
    """Return the one reading of a request head; `scheme` is that of the client's connection.

    Raises:
        RequestRefused: it has several readings, h11 has another one, or it asks for what is not
            served.
    """
    if head.method == b"CONNECT":
        raise RequestRefused(refusals.CONNECT)
    if head.minor == 0 and not limits.accept_http_10:
        raise RequestRefused(refusals.LOW_VERSION)
    kept: list[Field] = []
    special: dict[bytes, list[bytes]] = {}
    for field in head.fields:
        if field[0] in _SPECIAL:
            special.setdefault(field[0], []).append(field[2])
        elif field[0] in _READ_AS_FRAMING:
            raise RequestRefused(refusals.UNDERSCORE)
        elif field[2] or field[0] != _REQUEST_ID:  # an empty one names nothing, and gets company
            kept.append(field)
    host = _single_host(special.get(_HOST))
    framing = request_framing(
        special.get(_CONTENT_LENGTH, []), special.get(_TRANSFER_ENCODING, []), head.minor
    )
    target = normalise(head.method, head.target, host, limits, scheme)
    options: Sequence[bytes] = ()
    if _CONNECTION in special:
        options = _connection_options(special[_CONNECTION], limits)
        kept = [field for field in kept if field[0] not in options]
    if limits.strip_headers or limits.underscore_names != "allow":
        kept = _filter_names(kept, limits)
    return Request(
        head.method,
        target,
        head.minor,
        kept,
        framing,
        # RFC 9112 9.3; an HTTP/1.0 connection is never kept, keep-alive there was no standard.
        head.minor == 1 and b"close" not in options,
        _EXPECT in special and _expects_continue(special[_EXPECT], head.minor),
        _wanted_protocol(special[_UPGRADE])
        if _UPGRADE in special and b"upgrade" in options
        else b"",
        check_request(head, framing) if head.raw else None,
    )


def _single_host(values: list[bytes] | None) -> bytes:
    """RFC 9112 3.2: 400 for none (HTTP/1.0 too: there is no other name to judge by) and several."""
    if values is None:
        raise RequestRefused(refusals.NO_HOST)
    if len(values) > 1:
        raise RequestRefused(refusals.SEVERAL_HOSTS)
    check_host(values[0])
    return values[0]


def _connection_options(values: list[bytes], limits: Limits) -> list[bytes]:
    options = [
        option
        for value in values
        for part in value.split(b",")
        if (option := part.strip(b" \t").lower())
    ]
    if len(options) > limits.connection_token_count:
        raise RequestRefused(refusals.CONNECTION_HEADER)
    for option in options:
        if option in _NEVER_NOMINATED or grammar.token.fullmatch(option) is None:
            raise RequestRefused(refusals.CONNECTION_HEADER)
    return options


def _filter_names(fields: list[Field], limits: Limits) -> list[Field]:
    if limits.underscore_names != "allow" and has_mistakable_name(fields):
        if limits.underscore_names == "reject":
            raise RequestRefused(refusals.UNDERSCORE)
        fields = [field for field in fields if _MISTAKEN.search(field[0]) is None]
    stripped = [name.encode() for name in limits.strip_headers]
    return [field for field in fields if field[0] not in stripped]


def has_mistakable_name(fields: list[Field]) -> bool:
    """Whether some server takes a field name for another one: `X_A` or `X.A` for `X-A`."""
    return any(_MISTAKEN.search(field[0]) for field in fields)


def _expects_continue(values: list[bytes], minor: int) -> bool:
    """RFC 9110 10.1.1: ignored from HTTP/1.0, 417 for anything but 100-continue."""
    if minor == 0:
        return False
    if len(values) > 1 or values[0].lower() != b"100-continue":
        raise RequestRefused(refusals.EXPECTATION)
    return True


def _wanted_protocol(values: list[bytes]) -> bytes:
    """Return what an Upgrade asks for, or nothing for h2c, which a server may simply ignore."""
    protocols = {
        part.strip(b" \t").lower() for value in values for part in value.split(b",") if part
    }
    return b"" if protocols == {b"h2c"} else b",".join(sorted(protocols)) or b","


def edited(fields: list[Field], edits: tuple[HeaderEdit, ...]) -> list[Field]:
    """Return the fields after the header actions of the policy, in order.

    Raises:
        RequestRefused: an edit would change framing or host, or its value (perhaps from a secret
            file) is no header value. The operator's fault, so 500.
    """
    for kind, name, value in edits:
        if (
            name in _NOT_EDITABLE
            or grammar.field_line.fullmatch(b"%b:%b\r\n" % (name, value)) is None
        ):
            raise RequestRefused(refusals.INTERNAL)
        if kind in {EditKind.DELETE, EditKind.REPLACE}:
            fields = [field for field in fields if field[0] != name]
        if kind in {EditKind.ADD, EditKind.REPLACE}:
            fields = [*fields, (name, name, value)]
    return fields


def serialise(request: Request, fields: list[Field], request_id: bytes) -> bytes:
    """Write the head to send to the server: canonical HTTP/1.1, whatever the client spoke.

    `request_id` empty: none is added.
    """
    wire = serialise_fields(request, fields)
    return b"%bX-Request-Id: %b\r\n\r\n" % (wire, request_id) if request_id else wire + b"\r\n"


def serialise_fields(request: Request, fields: list[Field]) -> bytes:
    """Write the same without request id and without the empty line at the end."""
    parts = [
        b"%b %b HTTP/1.1\r\nHost: %b\r\n"
        % (request.method, request.target.wire, request.target.authority)
    ]
    parts += [b"%b: %b\r\n" % (name, value) for _, name, value in fields]
    delimiter, length = request.framing
    if delimiter is _LENGTH:
        parts.append(b"Content-Length: %d\r\n" % length)
    elif delimiter is _CHUNKED:
        parts.append(b"Transfer-Encoding: chunked\r\n")
    return b"".join(parts)
