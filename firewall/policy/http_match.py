"""Which http rule allows a request.

Every rule of a direction is compiled once (`pattern`); always the whole value must match. One pass
over the path tells which rules its pattern leaves, however many there are; only their other fields
are looked at. A rule allows a request when all of its fields do; the first such rule of the list is
the answer.

Repeated headers are where Envoy was bypassed (CVE-2020-25017, CVE-2026-26308): a rule that wants
`x-role: user` must not be satisfied by one of several values. All values joined by "," must be the
wanted one, as in Cilium's proxy, so a header that is sent twice never equals a single value.

`headerMatches` may change the request (ADD, DELETE, REPLACE) or only record (LOG). As in Cilium's
proxy, once one rule of the list has headerMatches every rule whose other fields match is evaluated,
and the edits of all of them are applied, not only those of the rule that allows. What comes later,
items and rules, sees the headers as edited, because that is what the server will get.
"""

import hmac
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

from firewall.policy.pattern import Pattern, PatternSet
from firewall.policy.snapshot import HeaderMatchRow, HttpRuleRow

Header = tuple[bytes, bytes]
"""Name and value of one header line, as received."""

SecretReader = Callable[[str, str], bytes | None]
"""(namespace, name) -> value of the secret, None when there is no such secret."""


OWN_FIELDS = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Fields that a proxy writes itself, because they say where a request goes or where it ends, or
concern one connection (RFC 9110 7.2, 7.6.1; RFC 9112 6). No rule may change them."""

UNSEEN_FIELDS = OWN_FIELDS - {"host", "upgrade"}
"""Those that rules never see."""


class EditKind(IntEnum):
    """What a headerMatches item does to a request whose header does not match."""

    LOG = 1
    ADD = 2
    DELETE = 3
    REPLACE = 4


class HeaderEdit(NamedTuple):
    """One change of the request head, to be applied in order before it is forwarded."""

    kind: EditKind
    name: bytes
    value: bytes


_ONCE = frozenset((EditKind.LOG, EditKind.ADD))
"""Edits that, given again, would only repeat themselves."""


def edited(headers: Sequence[Header], edits: Sequence[HeaderEdit]) -> Sequence[Header]:
    """Return what rules see after some edits, in their order."""
    for kind, name, value in edits:
        if kind in (EditKind.DELETE, EditKind.REPLACE):
            headers = [header for header in headers if header[0].lower() != name]
        if kind in (EditKind.ADD, EditKind.REPLACE):
            headers = [*headers, (name, value)]
    return headers


class HttpMatch(NamedTuple):
    """The rule that allows the request (None = refused) and what to change in it."""

    rule: HttpRuleRow | None
    edits: tuple[HeaderEdit, ...]


class HttpCondition(NamedTuple):
    """One field of one rule held against one request; `expected` is the text of the policy."""

    field: str
    expected: str
    actual: str
    held: bool


def _values(headers: Sequence[Header], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key.lower() == name]


def _is(values: list[bytes], wanted: bytes) -> bool:
    """All values together are the wanted one (module docstring)."""
    return bool(values) and hmac.compare_digest(b",".join(values), wanted)


def split_header_rule(rule: str) -> tuple[str, str | None]:
    """Read Cilium's "Name: value" or "Name": (name, None) demands presence.

    The split is at the first space, as in Cilium (pkg/envoy/policy): "X-Key:v" is therefore a
    presence test for a header that cannot exist.
    """
    name, space, value = rule.partition(" ")
    return (name.rstrip(":"), value) if space else (rule, None)


class _HeaderTest:
    """One item of `headers`: presence, or an exact value."""

    __slots__ = ("name", "text", "value")

    def __init__(self, text: str) -> None:
        name, value = split_header_rule(text)
        self.text = text
        self.name = name.lower().encode()
        self.value = None if value is None else value.encode()

    def accepts(self, headers: Sequence[Header]) -> bool:
        values = _values(headers, self.name)
        return bool(values) if self.value is None else _is(values, self.value)


class _HeaderMatchTest:
    """One item of `headerMatches`: a value, a secret's value, or presence, and what else to do."""

    __slots__ = ("edit", "name", "row")

    def __init__(self, row: HeaderMatchRow) -> None:
        self.row = row
        self.name = row.name.lower().encode()
        self.edit = EditKind[row.mismatch] if row.mismatch else None

    def evaluate(
        self, headers: Sequence[Header], secrets: SecretReader | None
    ) -> tuple[bool, HeaderEdit | None]:
        """Say whether the rule still matches, and the change to make."""
        known, wanted = self._wanted(secrets)
        if not known:
            return False, None
        values = _values(headers, self.name)
        if _is(values, wanted) if wanted else bool(values):
            return True, None
        if self.edit is None:
            return False, None
        return True, HeaderEdit(self.edit, self.name, wanted)

    def _wanted(self, secrets: SecretReader | None) -> tuple[bool, bytes]:
        """(known, value); the empty value demands presence only."""
        inline = None if self.row.value is None else self.row.value.encode()
        if self.row.secret_name is None:
            return True, inline or b""
        found = secrets(self.row.secret_namespace or "", self.row.secret_name) if secrets else None
        value = found if found is not None else inline
        return value is not None, value or b""


class _Rule:
    """One http item, compiled."""

    __slots__ = ("broken", "header_matches", "headers", "host", "method", "path", "row")

    def __init__(self, row: HttpRuleRow) -> None:
        self.row = row
        self.method = Pattern(row.method)
        self.path = Pattern(row.path)
        self.host = Pattern(row.host)
        self.headers = tuple(_HeaderTest(text) for text in row.headers)
        self.header_matches = tuple(_HeaderMatchTest(match) for match in row.header_matches)
        self.broken = self.method.broken or self.path.broken or self.host.broken

    def accepts_rest(self, method: bytes, host: bytes, headers: Sequence[Header]) -> bool:
        """Test everything but the path and headerMatches."""
        return (
            not self.broken
            and self.method.accepts(method)
            and self.host.accepts(host)
            and all(test.accepts(headers) for test in self.headers)
        )


class HttpMatcher:
    """The http rules of one or more entries, compiled; safe to share and to keep.

    No rows match nothing: an empty `rules.http` reaches the snapshot as one row without fields.
    `errors` tells which patterns RE2 refused; rules with such a pattern allow nothing.
    """

    def __init__(
        self, rows: tuple[HttpRuleRow, ...], *, secrets: SecretReader | None = None
    ) -> None:
        self._rules = tuple(_Rule(row) for row in rows)
        self._paths = PatternSet(rule.path for rule in self._rules)
        self._secrets = secrets
        self._edits = any(rule.header_matches for rule in self._rules)
        self.errors: tuple[str, ...] = tuple(rule.broken for rule in self._rules if rule.broken)

    def match(
        self, method: bytes, path: bytes, host: bytes, headers: Sequence[Header]
    ) -> HttpRuleRow | None:
        """Return the first rule that allows the request, None when none does.

        Args:
            method: the method as sent; methods are case-sensitive (RFC 9110 section 9.1).
            path: the request target with its query string, after normalisation.
            host: the authority, with the port if one was sent.
            headers: names in any case and values, in the order received.
        """
        return self.evaluate(method, path, host, headers).rule

    def evaluate(
        self, method: bytes, path: bytes, host: bytes, headers: Sequence[Header]
    ) -> HttpMatch:
        """Return the allowing rule together with the edits of headerMatches (module docstring)."""
        allowed: HttpRuleRow | None = None
        edits: list[HeaderEdit] = []
        for number in self._paths.matches(path):
            rule = self._rules[number]
            if not rule.accepts_rest(method, host, headers):
                continue
            if not self._edits:
                return HttpMatch(rule.row, ())
            held = True
            for test in rule.header_matches:
                holds, edit = test.evaluate(headers, self._secrets)
                held = held and holds
                if edit is not None and not (edit.kind in _ONCE and edit in edits):
                    edits.append(edit)
                    headers = edited(headers, (edit,))
            if allowed is None and held:
                allowed = rule.row
        return HttpMatch(allowed, tuple(edits))

    def conditions(
        self, method: bytes, path: bytes, host: bytes, headers: Sequence[Header]
    ) -> tuple[tuple[HttpCondition, ...], ...]:
        """Hold every given field of every rule against the request, in the order of the rows."""
        return tuple(self._conditions(rule, method, path, host, headers) for rule in self._rules)

    def _conditions(
        self, rule: _Rule, method: bytes, path: bytes, host: bytes, headers: Sequence[Header]
    ) -> tuple[HttpCondition, ...]:
        fields = (
            ("method", rule.row.method, rule.method, method),
            ("path", rule.row.path, rule.path, path),
            ("host", rule.row.host, rule.host, host),
        )
        found = [
            HttpCondition(name, text or "", value.decode("latin-1"), test.accepts(value))
            for name, text, test, value in fields
            if not test.any
        ]
        for header in rule.headers:
            actual = b",".join(_values(headers, header.name)).decode("latin-1")
            held = header.accepts(headers)
            found.append(HttpCondition("header", header.text, actual, held))
        for match in rule.header_matches:
            held, _ = match.evaluate(headers, self._secrets)
            # A secret's value must not appear in an explanation.
            found.append(HttpCondition("headerMatch", match.row.name, "", held))
        return tuple(found)
