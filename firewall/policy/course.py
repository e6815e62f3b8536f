"""What rules make of a connection whose first bytes are known: pass, read, or end it.

A rule sees a connection in one form: clear text, or TLS that asks for a name (or for none). Which
rules of one side apply depends on that form, and what they do to it gives the form that the next
side sees; egress comes first, as if each side had a proxy of its own. Two proxies in one process
need no TLS between them, so of what the sides would do in turn only the first termination and the
last origination are done.

    form            rules that apply                               what they do
    clear           http without a terminating context             requests are judged
                    a context to originate, none to terminate      TLS towards the server
    TLS, a name     server names that match, without a context     bytes pass unread
                    names that match or none, with a context       terminated; http is judged
    TLS, no name    a terminating context without server names     the same

Where a side terminates, http rules without a context apply to the requests inside as well. A side
that lets everything pass (a matching entry without rules) does so for bytes that it cannot read. A
form to which nothing applies is refused.
Source: cilium/proxy, cilium/network_policy.cc; docs/l7.md.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from firewall.policy.name_match import NameMatcher
from firewall.policy.snapshot import HttpRuleRow, L7Row, TlsContextRow

_MATCHER_COUNT = 1024
"""Lists of server names that are kept compiled, about 1 kB each."""


class Form(NamedTuple):
    """How a connection looks; `server_name` "" = clear text, or a hello that names nobody."""

    tls: bool
    server_name: str = ""

    def __str__(self) -> str:
        if not self.tls:
            return "clear text"
        return f"TLS to {self.server_name}" if self.server_name else "TLS that names no server"


CLEAR = Form(tls=False)


class Restriction(NamedTuple):
    """The L7 rules of one side about one peer and port.

    `rows` None: it asks for no proxy. `unrestricted`: some entry lets everything pass. `audit`:
    what it refuses passes all the same, and is told.
    """

    rows: tuple[L7Row, ...] | None
    unrestricted: bool
    audit: bool = False


class Leg(NamedTuple):
    """What one side says to a form.

    Attributes:
        allowed: the connection may go on.
        audited: only because of audit mode.
        applied: the rows that apply.
        unread: any bytes may pass; else only requests that `http` allows.
        http: the http rules that apply.
        terminate, originate: TLS contexts towards the client and towards the server.
    """

    allowed: bool
    audited: bool
    applied: tuple[L7Row, ...]
    unread: bool
    http: tuple[HttpRuleRow, ...]
    terminate: TlsContextRow | None
    originate: TlsContextRow | None


class Course(NamedTuple):
    """How a connection is served: `http` False: bytes pass unread."""

    http: bool
    terminate: TlsContextRow | None = None
    originate: TlsContextRow | None = None


HTTP = Course(http=True)
"""What a port has that knows nothing of TLS."""

_NO_PROXY = Leg(True, False, (), True, (), None, None)


def looks(sides: Sequence[Restriction]) -> bool:
    """Whether it must be known how a connection begins before it can be served."""
    return any(
        row.server_names or row.terminating_tls is not None or row.originating_tls is not None
        for side in sides
        for row in side.rows or ()
    )


def passes_unread(sides: Sequence[Restriction]) -> bool:
    """Whether every form passes unread, so that the server may be the first to speak."""
    return all(
        side.rows is None
        or (
            side.unrestricted
            and not any(row.http or row.terminating_tls or row.originating_tls for row in side.rows)
        )
        for side in sides
    )


def plan(sides: Sequence[Restriction], form: Form) -> tuple[Course | None, tuple[Leg, ...]]:
    """Return the course of a connection and what each side says; None: the last of them refuses.

    Args:
        sides: egress, then ingress; of those that exist.
        form: of the client's first bytes.
    """
    terminate: TlsContextRow | None = None
    originate: TlsContextRow | None = None
    http, readable = False, not form.tls
    legs: list[Leg] = []
    for side in sides:
        leg = _leg(side, form)
        legs.append(leg)
        if not leg.allowed:
            return None, tuple(legs)
        http = http or bool(leg.http)
        if leg.terminate is not None and not readable:
            terminate, readable = leg.terminate, True
        if leg.terminate is not None or not form.tls:
            if leg.applied:
                originate = leg.originate
            form = form._replace(tls=originate is not None)
    return Course(http, terminate, originate), tuple(legs)


def _leg(side: Restriction, form: Form) -> Leg:
    if side.rows is None:
        return _NO_PROXY
    applied = [row for row in side.rows if _applies(row, form)]
    terminate = next((row.terminating_tls for row in applied if row.terminating_tls), None)
    if terminate is not None:
        applied += [row for row in side.rows if row.kind == "http" and _applies(row, CLEAR)]
    rules = tuple(rule for row in applied if row.kind == "http" for rule in row.http)
    allowed = side.unrestricted or bool(applied)
    allowed_all = side.unrestricted or (side.audit and not allowed)
    return Leg(
        allowed=allowed or side.audit,
        audited=side.audit and not allowed,
        applied=tuple(applied),
        unread=allowed_all or any(row.kind == "tls" for row in applied),
        http=rules,
        terminate=terminate,
        originate=next((row.originating_tls for row in applied if row.originating_tls), None),
    )


def _applies(row: L7Row, form: Form) -> bool:
    if row.kind not in ("http", "tls"):
        return False
    if not form.tls:
        if row.terminating_tls is not None or row.server_names:
            return False
        return row.kind == "http" or row.originating_tls is not None
    if row.server_names and not named(row.server_names, form.server_name):
        return False
    if row.terminating_tls is None:
        return row.kind == "tls" and bool(row.server_names) and row.originating_tls is None
    return True


def host_name(authority: bytes) -> str:
    """Return the host of an authority as a hello would name it, an address without brackets."""
    text = authority.decode("latin-1").lower()
    host = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    return host.removesuffix(".")


def named(server_names: tuple[str, ...], name: str) -> bool:
    """Whether a rule's `serverNames` mean a name; nobody's name ("") is meant by none."""
    return bool(name) and _matcher(server_names).matches(name)


@lru_cache(maxsize=_MATCHER_COUNT)
def _matcher(server_names: tuple[str, ...]) -> NameMatcher:
    return NameMatcher(server_names)
