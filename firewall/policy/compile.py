"""From a rule entry to the rows of a policy map.

One entry becomes one row per peer and port. Rows name peers, L7 rules and origins by number; the
numbers come from tables that live as long as the resolver, so that rows of untouched rules are
reused from one snapshot to the next. A number stays with its value while any row uses it.

Cilium merges what several rules say about one peer and port into one map entry, and refuses to
merge L7 rules of different kinds, TLS contexts, authentication modes or listeners that contradict
each other. We keep the rows apart and gather them at lookup, but refuse the same contradictions
(pkg/policy/l4.go, rule.go: "cannot merge conflicting L7 parsers" and its kin).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from firewall.policy.model import (
    ANY_PROTOCOL,
    Action,
    L7Rules,
    Listener,
    Origin,
    Peer,
    PolicyEntry,
    PortRange,
    TlsContext,
)
from firewall.policy.snapshot import (
    ANY_SELECTOR,
    DnsRuleRow,
    EntryRow,
    HeaderMatchRow,
    HttpRuleRow,
    L7Row,
    ListenerRow,
    OriginRow,
    TlsContextRow,
)

T = TypeVar("T")

_EVERYTHING = (PortRange(ANY_PROTOCOL),)


class Table(Generic[T]):
    """Values by number; the number of a value that is no longer used is given to another one."""

    def __init__(self, blank: T) -> None:
        self._blank = blank
        self._values: list[T] = []
        self._numbers: dict[T, int] = {}
        self._free: list[int] = []

    def number(self, value: T) -> int:
        """Return the number of a value, giving it one if it is new."""
        number = self._numbers.get(value)
        if number is not None:
            return number
        if self._free:
            number = heappop(self._free)
            self._values[number] = value
        else:
            number = len(self._values)
            self._values.append(value)
        self._numbers[value] = number
        return number

    def release(self, numbers: Iterable[int]) -> None:
        """Free these numbers."""
        for number in numbers:
            del self._numbers[self._values[number]]
            self._values[number] = self._blank
            heappush(self._free, number)

    def values(self) -> tuple[T, ...]:
        """Return the table; freed places hold the blank value."""
        return tuple(self._values)


class Tables(NamedTuple):
    """The L7 and origin tables of a snapshot in the making."""

    l7: Table[L7Row]
    origins: Table[OriginRow]


def new_tables() -> Tables:
    """Return empty tables."""
    return Tables(Table(L7Row(kind="")), Table(OriginRow("", "", "", "")))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompiledEntry:
    """A rule entry with its rows, the number of its origin and that of its subject.

    `order` is its place among all entries: object, then index in the object. Each is equal to
    itself alone.
    """

    entry: PolicyEntry
    origin: int
    rows: tuple[EntryRow, ...]
    subject: int
    order: tuple[str, str, str, int]


def compile_entry(
    entry: PolicyEntry,
    number_of: Callable[[Peer], int],
    tables: Tables,
    *,
    subject: int,
    order: tuple[str, str, str, int],
) -> CompiledEntry:
    """Make the rows of one entry.

    Args:
        entry: the rule entry.
        number_of: the selector number of a peer.
        tables: where its L7 rules and origin get their numbers.
        subject: the number of its subject's selector.
        order: its place among all entries.
    """
    origin = tables.origins.number(origin_row(entry.origin))
    l7_row = make_l7_row(entry)
    l7 = -1 if l7_row is None else tables.l7.number(l7_row)
    selectors: Iterable[int] = (ANY_SELECTOR,)
    if entry.peers is not None:
        selectors = dict.fromkeys(number_of(peer) for peer in entry.peers)
    ports = _EVERYTHING if entry.ports is None else entry.ports
    rows = tuple(
        EntryRow(
            action=int(entry.action),
            tier=int(entry.tier),
            priority=float(entry.priority),
            selector=selector,
            protocol=port.protocol,
            port_low=port.low,
            port_high=port.high,
            port_name=port.name or "",
            l7=l7,
            origin=origin,
            authentication=entry.authentication,
            log=entry.log,
            observe=l7 >= 0 and not entry.default_deny,
        )
        for selector in selectors
        for port in ports
    )
    return CompiledEntry(entry=entry, origin=origin, rows=rows, subject=subject, order=order)


def origin_row(origin: Origin) -> OriginRow:
    """Return the wire form of an origin."""
    return OriginRow(
        kind=origin.kind,
        namespace=origin.namespace,
        name=origin.name,
        path=origin.path,
        file=origin.file,
        line=origin.line,
        column=origin.column,
        labels=origin.labels,
    )


def make_l7_row(entry: PolicyEntry) -> L7Row | None:
    """Return the L7 part of an entry, None if it asks for no proxy."""
    rules = entry.l7
    tls = bool(entry.server_names or entry.terminating_tls or entry.originating_tls)
    if rules is None and not tls and entry.listener is None:
        return None
    kind = rules.kind if rules is not None else ("tls" if tls else "listener")
    return L7Row(
        kind=kind,
        http=_http_rows(rules) if kind == "http" and rules else (),
        dns=_dns_rows(rules) if kind == "dns" and rules else (),
        server_names=entry.server_names,
        terminating_tls=_tls_row(entry.terminating_tls),
        originating_tls=_tls_row(entry.originating_tls),
        listener=_listener_row(entry.listener),
    )


def _http_rows(rules: L7Rules) -> tuple[HttpRuleRow, ...]:
    if not rules.http:
        return (HttpRuleRow(),)
    return tuple(
        HttpRuleRow(
            method=rule.method,
            path=rule.path,
            host=rule.host,
            headers=rule.headers,
            header_matches=tuple(
                HeaderMatchRow(
                    name=match.name,
                    mismatch=match.mismatch,
                    value=match.value,
                    secret_namespace=match.secret_namespace,
                    secret_name=match.secret_name,
                )
                for match in rule.header_matches
            ),
        )
        for rule in rules.http
    )


def _dns_rows(rules: L7Rules) -> tuple[DnsRuleRow, ...]:
    if not rules.dns:
        return (DnsRuleRow(match_pattern="*"),)
    return tuple(DnsRuleRow(rule.match_name, rule.match_pattern) for rule in rules.dns)


def _tls_row(context: TlsContext | None) -> TlsContextRow | None:
    if context is None:
        return None
    return TlsContextRow(
        secret_namespace=context.secret_namespace,
        secret_name=context.secret_name,
        trusted_ca=context.trusted_ca,
        certificate=context.certificate,
        private_key=context.private_key,
    )


def _listener_row(listener: Listener | None) -> ListenerRow | None:
    if listener is None:
        return None
    return ListenerRow(listener.config_kind, listener.config_name, listener.name, listener.priority)


class Conflict(NamedTuple):
    """Two entries that contradict each other about one peer and port."""

    message: str
    first: Origin
    second: Origin


_Place = tuple[int, float, int, int, int, int, str]
_Demands = tuple[str, TlsContext | None, TlsContext | None, str, Listener | None]


def find_conflict(entries: Iterable[CompiledEntry]) -> Conflict | None:
    """Return the first contradiction among the allows of one direction, None if there is none."""
    seen: dict[_Place, dict[_Demands, PolicyEntry]] = {}
    for compiled in entries:
        entry = compiled.entry
        if entry.action is not Action.ALLOW or not _is_special(entry):
            continue
        for row in compiled.rows:
            place = (
                row.tier,
                row.priority,
                row.selector,
                row.protocol,
                row.port_low,
                row.port_high,
                row.port_name,
            )
            others = seen.setdefault(place, {})
            for other in others.values():
                message = _contradiction(other, entry)
                if message:
                    return Conflict(message, other.origin, entry.origin)
            others.setdefault(_demands(entry), entry)
    return None


def _is_special(entry: PolicyEntry) -> bool:
    return bool(
        entry.l7
        or entry.authentication
        or entry.listener
        or entry.terminating_tls
        or entry.originating_tls
    )


def _contradiction(one: PolicyEntry, other: PolicyEntry) -> str:
    if one.l7 and other.l7 and one.l7.kind != other.l7.kind:
        return f"cannot merge conflicting L7 parsers ({one.l7.kind}/{other.l7.kind})"
    if _differ(one.terminating_tls, other.terminating_tls):
        return "cannot merge conflicting terminating TLS contexts"
    if _differ(one.originating_tls, other.originating_tls):
        return "cannot merge conflicting originating TLS contexts"
    if _differ(one.authentication or None, other.authentication or None):
        modes = f"({one.authentication}/{other.authentication})"
        return f"cannot merge conflicting authentication types {modes}"
    mine, theirs = one.listener, other.listener
    if mine and theirs and mine != theirs and mine.priority == theirs.priority:
        return "cannot merge conflicting listeners of the same priority"
    return ""


def _demands(entry: PolicyEntry) -> _Demands:
    kind = entry.l7.kind if entry.l7 else ""
    tls = entry.terminating_tls, entry.originating_tls
    return kind, *tls, entry.authentication, entry.listener


def _differ(one: object | None, other: object | None) -> bool:
    return one is not None and other is not None and one != other
