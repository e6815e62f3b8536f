"""HTTP rules that are valid and still never match: what people expect of a regex and get wrong.

Paths, methods and hosts are RE2 over the whole string. RE2 itself tells the range of strings that a
regex can match, which decides "can this match any path at all" without guessing.
"""

import re
from collections.abc import Iterator

import re2

from firewall.policy.http_match import UNSEEN_FIELDS
from firewall.policy.model import HttpRule

COMMON_METHODS = (
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "DELETE",
    "CONNECT",
    "OPTIONS",
    "TRACE",
    "PATCH",
)
"""RFC 9110 section 9, RFC 5789."""

_RANGE_BYTES = 10
_LITERAL = re.compile(r"[-A-Za-z0-9_/~%.]+")
_UNESCAPED_QUERY = re.compile(r"[A-Za-z0-9_/-]\?[A-Za-z0-9_.-]+=")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_EMPTY_SEGMENT = re.compile(r"//(?![?*{])")
_HEADER_WITHOUT_SPACE = re.compile(r"[-A-Za-z0-9_]+:\S+")


def lint_http(rule: HttpRule) -> Iterator[tuple[str, str]]:
    """Yield (field, message) for everything about a rule that will not do what it seems to."""
    if rule.path is not None:
        yield from (("path", message) for message in _path(rule.path))
    if rule.method is not None:
        yield from (("method", message) for message in _method(rule.method))
    for at, header in enumerate(rule.headers):
        if _HEADER_WITHOUT_SPACE.fullmatch(header):
            name, _, value = header.partition(":")
            message = (
                f'"{header}" asks whether a header of this whole name is present, which none can '
                f'be; write "{name}: {value}"'
            )
            yield f"headers[{at}]", message
        elif header.partition(" ")[0].rstrip(":").lower() in UNSEEN_FIELDS:
            yield f"headers[{at}]", _unseen(header.partition(" ")[0].rstrip(":"))
    for at, match in enumerate(rule.header_matches):
        if match.name.lower() in UNSEEN_FIELDS:
            yield f"headerMatches[{at}].name", _unseen(match.name)


def _unseen(name: str) -> str:
    return f"{name} ends at the proxy: rules never see it"


def _path(path: str) -> Iterator[str]:
    if not _may_begin_with_slash(path):
        yield f'"{path}" matches no request: the path begins with "/"'
    elif path in ("/", "^/$"):
        yield f'"{path}" matches the root only; write "/.*" for every path'
    elif path.endswith("/") and _LITERAL.fullmatch(path):
        yield f'"{path}" is matched whole and allows nothing below it; write "{path}.*"'
    if _UNESCAPED_QUERY.search(path):
        yield (
            f'"{path}" has "?" as the regex operator "optional"; the path is matched with its '
            r'query string: write "\?"'
        )
    if "#" in path:
        yield f'"{path}" holds "#": fragments are never sent to a server'
    if "(?i" not in path:
        yield from _unnormalised(path)


def _unnormalised(path: str) -> Iterator[str]:
    """Say what no path has that rules see: RFC 3986 6.2.2, docs/l7.md."""
    for digits in _ESCAPE.findall(path):
        character = chr(int(digits, 16))
        if _UNRESERVED.fullmatch(character):
            yield f'"{path}" holds "%{digits}": rules see "{character}"'
        elif digits != digits.upper():
            yield f'"{path}" holds "%{digits}": rules see "%{digits.upper()}"'
    if _EMPTY_SEGMENT.search(path):
        yield f'"{path}" holds "//": unless proxy.limits keep them, slashes are merged before'


def _may_begin_with_slash(path: str) -> bool:
    try:
        low, high = re2.compile(path).possiblematchrange(_RANGE_BYTES)
    except re2.error:
        return True
    return bool(low <= b"/\xff" and high >= b"/")


def _method(method: str) -> Iterator[str]:
    try:
        exact, folded = re2.compile(method), re2.compile(f"(?i)(?:{method})")
    except re2.error:
        return
    if any(exact.fullmatch(word) for word in COMMON_METHODS):
        return
    meant = next((word for word in COMMON_METHODS if folded.fullmatch(word)), None)
    if meant:
        yield f'"{method}" never matches {meant}: methods are case-sensitive'
    else:
        yield f'"{method}" matches none of the common methods ({", ".join(COMMON_METHODS)})'
