r"""From the request target to the one path that is matched, logged and sent.

Input: the target of the request line (visible ASCII by then) and the Host value. Output: a `Target`
whose `path` is the only form of the path that exists afterwards. There is no second parse: rules
see it, and the server gets it.

Rules, in order (RFC 3986 6.2.2 unless noted):
  1. absolute-form loses scheme and authority; the authority must equal Host (RFC 9112 3.2.2); with
     OPTIONS nothing behind the authority means the server as a whole, `*` (3.2.4);
  2. `#` is refused; the query is everything after the first `?` and is never changed;
  3. refused in a path, because servers disagree about them: `\`, `%5C` and `%2F` (a setting), a
     `%` without two hex digits, an escaped control byte, escaped bytes that UTF-8 never has or that
     begin a longer form than needed, `%25` before two hex digits (a setting), dot segments with
     parameters or followed by an escape;
  4. escaped unreserved characters are unescaped, the other escapes get upper case digits;
  5. runs of `/` become one (as nginx merge_slashes and Envoy merge_slashes; a setting);
  6. dot segments are removed, never above the root, or refused (a setting).
The result is a fixed point: normalising it again changes nothing. Where a setting keeps bytes that
servers treat in two ways, dot segments beside them are refused.

Not done: decoding of other escapes, case folding, Unicode normalisation. Source: RFC 3986, RFC 9112
3.2, Envoy path_utility, CVE-2026-73551, CVE-2021-32779.
"""

import re
from typing import NamedTuple

from conntrack.address import parse_address
from l7proxy import grammar, refusals
from l7proxy.limits import Limits
from l7proxy.refusals import RequestRefused

_PLAIN = re.compile(rb"(?>(?:/(?!\.)[0-9A-Za-z_~!$&'()*+,=:@.-]++)+)/?+")
"""Paths that need no work: without escape, empty segment, segment that begins with a dot, `;`."""

_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})?")
_ESCAPED_TWICE = re.compile(rb"%25[0-9A-Fa-f]{2}")
_OVERLONG = re.compile(rb"%E0%[89]|%F0%8")
"""RFC 3629 3: the first two bytes of a character that has a shorter form. Decoders that take them
make `/` of `%E0%80%AF` and `.` of `%F0%80%80%AE`."""
_SLASHES = re.compile(rb"//+")
_DOT_PARAMETERS = re.compile(rb"/\.\.?(?:;|%(?:20|23|3B|3F))|/\.\.%")
"""Dot segments for servers that cut at `;`, `?` or `#`, before or after unescaping, trim spaces, or
take other characters for `/`."""
_DOT_SEGMENT = re.compile(rb"/\.\.?(?:/|\Z)")
_ESCAPED_SLASH = re.compile(rb"%(?:2F|5C)")
_ABSOLUTE = re.compile(rb"([A-Za-z][0-9A-Za-z+.-]*+)://([^/?#]*+)([^#]*+)")

_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# RFC 3629 1: these bytes do not occur in UTF-8; decoders that accept them make `/` and `.` of them.
_NEVER_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
_CONTROL = frozenset((*range(0x20), 0x7F))


class Target(NamedTuple):
    """The request target after normalisation.

    `path` without query; `wire` is what is matched and sent: path, and `?` and query if there were
    any. `authority` is the host to match and send, as the client wrote it.
    """

    path: bytes
    wire: bytes
    authority: bytes


def normalise(
    method: bytes, raw: bytes, host: bytes, limits: Limits, scheme: bytes = b"http"
) -> Target:
    """Return the one reading of a request target; `scheme` is that of the client's connection.

    Raises:
        RequestRefused: another program could read the target differently.
    """
    if len(raw) > limits.target_bytes:
        raise RequestRefused(refusals.TARGET_TOO_LONG)
    if b"#" in raw:
        raise RequestRefused(refusals.FRAGMENT)
    if raw[:1] != b"/":
        if raw == b"*" and method == b"OPTIONS":  # RFC 9112 3.2.4
            return Target(raw, raw, host)
        raw = _without_authority(raw, host, scheme)
        if not raw and method == b"OPTIONS":
            return Target(b"*", b"*", host)
        if raw[:1] != b"/":
            raw = b"/" + raw
    path, mark, query = raw.partition(b"?")
    if not _PLAIN.fullmatch(path) and path != b"/":
        path = _normalise_path(path, limits)
    return Target(path, path + mark + query, host)


def check_host(value: bytes) -> None:
    """Refuse a Host value that is not host[:port].

    Raises:
        RequestRefused: userinfo, path, space, port above 65535, empty, ...
    """
    match = grammar.host.fullmatch(value)
    if match is None or (match[2] is not None and int(match[2]) > 65535):
        raise RequestRefused(refusals.HOST)
    if match[1] is not None:
        try:
            parse_address(match[1].decode())
        except ValueError:
            raise RequestRefused(refusals.HOST) from None


def _without_authority(raw: bytes, host: bytes, scheme: bytes) -> bytes:
    absolute = _ABSOLUTE.fullmatch(raw)
    # Another scheme would be a lie about the connection, and the server does not get to see it.
    if absolute is None or absolute[1].lower() != scheme:
        raise RequestRefused(refusals.URL)
    check_host(absolute[2])
    if absolute[2].lower() != host.lower():
        raise RequestRefused(refusals.HOST_DIFFERS)
    return absolute[3]


def _normalise_path(path: bytes, limits: Limits) -> bytes:
    if b"\\" in path:
        raise RequestRefused(refusals.ESCAPED_SLASH)
    if b"%" in path:
        path = _normalise_escapes(path, limits)
    if limits.merge_slashes:
        path = _SLASHES.sub(b"/", path)
    elif path[:2] == b"//":  # some take what follows for a host (RFC 3986 4.2)
        path = b"/" + path.lstrip(b"/")
    if b";" in path and limits.path_parameters == "reject":
        raise RequestRefused(refusals.PATH)
    if b"/." in path:
        # Who merges slashes first removes other segments.
        strict = limits.dot_segments == "reject" or b"//" in path
        if _DOT_PARAMETERS.search(path) or (strict and _DOT_SEGMENT.search(path)):
            raise RequestRefused(refusals.PATH)
        path = _remove_dot_segments(path)
    return path


def _normalise_escapes(path: bytes, limits: Limits) -> bytes:
    path = _ESCAPE.sub(_unescape, path)
    # Afterwards, because unescaping can complete the pair: `%25%32e`.
    if limits.escaped_twice == "reject" and _ESCAPED_TWICE.search(path):
        raise RequestRefused(refusals.DOUBLE_ESCAPE)
    if _OVERLONG.search(path):
        raise RequestRefused(refusals.PATH)
    unescaped = _ESCAPED_SLASH.sub(b"/", path)
    if unescaped == path or limits.escaped_slashes == "unescape":
        return unescaped
    if (
        limits.escaped_slashes == "reject"
        or _DOT_SEGMENT.search(unescaped)
        or _DOT_PARAMETERS.search(unescaped)
    ):
        raise RequestRefused(refusals.ESCAPED_SLASH)
    return path


def _unescape(escape: re.Match[bytes]) -> bytes:
    digits = escape[1]
    if digits is None:
        raise RequestRefused(refusals.PATH)
    byte = int(digits, 16)
    if byte in _UNRESERVED:
        return bytes((byte,))
    if byte in _CONTROL or byte in _NEVER_UTF8:
        raise RequestRefused(refusals.PATH)
    return b"%" + digits.upper()


def _remove_dot_segments(path: bytes) -> bytes:
    """RFC 3986 5.2.4 for a path that begins with `/` and has no empty segments."""
    segments = path.split(b"/")[1:]
    kept: list[bytes] = []
    for segment in segments:
        if segment == b"..":
            if kept:
                kept.pop()
        elif segment != b".":
            kept.append(segment)
    if segments[-1] in {b".", b".."}:
        kept.append(b"")
    return b"/" + b"/".join(kept)
