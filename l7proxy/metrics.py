"""What the proxy counts, under Envoy's names where Envoy counts the same thing.

Everything about requests follows from their records, so that a counter can never disagree with the
log. Names: envoy docs, configuration/http/http_conn_man/stats.rst; `policy_l7_total` is Cilium's
(Documentation/observability/metrics.rst). Names that end in `_total` are counters, the rest gauges.
"""

from bisect import bisect_left
from collections import Counter
from itertools import accumulate

from firewall.flows.event import DnsEvent
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict
from l7proxy import refusals
from l7proxy.commands import Record, RecordKind
from l7proxy.judgement import Judgement
from l7proxy.refusals import Refusal

Row = dict[str, object]

_BY_DETAIL: dict[str, str] = {
    refusals.HEAD_TOO_LARGE.detail: "http_downstream_rq_too_large_total",
    refusals.TOO_MANY_FIELDS.detail: "http_downstream_rq_too_large_total",
    refusals.HEAD_TIMEOUT.detail: "http_downstream_rq_header_timeout_total",
    refusals.BODY_TIMEOUT.detail: "http_downstream_rq_timeout_total",
    refusals.REQUEST_TIMEOUT.detail: "http_downstream_rq_timeout_total",
    refusals.STREAM_IDLE.detail: "http_downstream_rq_idle_timeout_total",
    refusals.FLUSH_TIMEOUT.detail: "http_downstream_rq_idle_timeout_total",
    refusals.PATH.detail: "http_downstream_rq_failed_path_normalization_total",
    refusals.DENIED.detail: "cilium_access_denied_total",
    refusals.CLIENT_GONE.detail: "http_downstream_rq_rx_reset_total",
    refusals.RESPONSE_TIMEOUT.detail: "upstream_rq_timeout_total",
    refusals.CONNECT_TIMEOUT.detail: "upstream_cx_connect_timeout_total",
    refusals.CONNECT_FAILED.detail: "upstream_cx_connect_fail_total",
    refusals.UPSTREAM_OVERFLOW.detail: "upstream_cx_overflow_total",
}
"""Refusal -> the counter that Envoy has for it."""


_REQUEST = RecordKind.REQUEST
_INGRESS = TrafficDirection.INGRESS
_DROP = int(Verdict.DROP)
_MALFORMED = int(DropReason.INVALID_PACKET_DROPPED)
_TCP = 6

_Told = tuple[bool, int, str, str, bool, str]
"""Of a record: whether it is a request, status, detail, flag, whether policy never saw it, its
protocol."""

BUCKETS_MS = (
    0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000,
    600_000, 1_800_000, 3_600_000,
)  # fmt: skip
"""Upper bounds of Envoy's histograms (operations/admin, histogram buckets), milliseconds."""


class Histogram:
    """How often a duration lay in which bucket."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS_MS) + 1)
        self._sum_ms = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        ms = seconds * 1000
        self._counts[bisect_left(BUCKETS_MS, ms)] += 1
        self._sum_ms += ms

    def row(self, name: str) -> Row:
        """Return `{"name", "buckets", "sum"}`: counts at most as long as each bound, then all."""
        return {"name": name, "buckets": list(accumulate(self._counts)), "sum": self._sum_ms}


_UNREAD = frozenset(("TLS", "TCP"))
"""What such records have for a protocol."""


class Metrics:
    """Counters of one worker since its start."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._told: Counter[_Told] = Counter()
        self._asked: Counter[str] = Counter()
        self.active_connection_count = 0
        self.active_upstream_count = 0
        self.secret_problems: list[str] = []
        self.lost_line_count = 0
        self.access_log_problem = ""
        self._request_times = Histogram()
        self._connection_times = Histogram()
        self._begun_before_reset = 0

    def add(self, name: str, count: int = 1) -> None:
        """Count something that no record implies; `name` without `_total`."""
        self._counts[name] += count

    def opened(self) -> None:
        """Count a client connection."""
        self.active_connection_count += 1
        self._counts["http_downstream_cx"] += 1

    def closed(self, lasted_s: float) -> None:
        """Count its end, so many seconds later."""
        self.active_connection_count -= 1
        self._counts["http_downstream_cx_destroy"] += 1
        self._connection_times.add(lasted_s)

    def reset(self) -> None:
        """Count from zero again; what is active stays so."""
        self._begun_before_reset = self._active_request_count(self._counted())
        self._counts.clear()
        self._told.clear()
        self._asked.clear()
        self._request_times = Histogram()
        self._connection_times = Histogram()

    def upstream_opened(self) -> None:
        """Count a connection to a server."""
        self.active_upstream_count += 1
        self._counts["upstream_cx"] += 1

    def upstream_closed(self) -> None:
        """Count its end."""
        self.active_upstream_count -= 1

    def observe(self, record: Record) -> None:
        """Count what a record tells."""
        # One addition for each record; what it adds to is said when somebody asks.
        detail = record.detail
        if detail.startswith("internal_error"):
            detail = "internal_error"  # the rest may say anything, and each would be kept
        asked = record.kind is _REQUEST  # a bool: the hash of an enum's member is Python code
        protocol = record.protocol
        told = asked, record.status, detail, record.flag, record.judgement is None, protocol
        self._told[told] += 1
        if (not asked or detail) and protocol not in _UNREAD:
            self._request_times.add(record.duration_s)

    def asked(self, event: DnsEvent) -> None:
        """Count what became of a DNS question."""
        if event.verdict != _DROP:
            self._asked["forwarded"] += 1
        else:
            broken = event.drop_reason == _MALFORMED
            self._asked["parse_errors" if broken else "denied"] += 1

    def _judged(self) -> Counter[tuple[str, str]]:
        """Return `policy_l7_total` by Cilium's words: whose requests, and what became of them."""
        counts: Counter[tuple[str, str]] = Counter()
        for (asked, _, detail, _, malformed, protocol), count in self._told.items():
            if asked and protocol not in _UNREAD:
                counts["envoy", "received"] += count
                counts["envoy", _rule(detail, malformed=malformed)] += count
        for word, count in self._asked.items():
            counts["fqdn", "received"] += count
            counts["fqdn", word] += count
        return counts

    def _counted(self) -> Counter[tuple[str, str, str]]:
        """Return all counters, by name, label and value."""
        counts: Counter[tuple[str, str, str]] = Counter()
        for name, count in self._counts.items():
            counts[f"{name}_total", "", ""] += count
        for (asked, status, detail, flag, malformed, protocol), count in self._told.items():
            if protocol in _UNREAD:
                if detail:
                    short = detail.partition("{")[0]
                    counts["tls_connection_details_total", "detail", short] += count
                continue
            if asked:
                counts["http_downstream_rq_total", "", ""] += count
                version = "http2" if protocol == "HTTP/2" else "http1"
                counts[f"http_downstream_rq_{version}_total", "", ""] += count
                if not detail:
                    counts["upstream_rq_total", "", ""] += count
            if not asked or detail:
                counts["http_downstream_rq_completed_total", "", ""] += count
            if (not asked or detail) and status:
                # RFC 9110 15: a status that belongs to no class is one of 5xx.
                in_class = f"{min(status // 100, 5)}xx"
                counts["http_downstream_rq_xx_total", "class", in_class] += count
                if detail == "via_upstream":
                    counts["upstream_rq_xx_total", "class", in_class] += count
            if detail and detail != "via_upstream":
                short = detail.partition("{")[0]
                counts["http_response_details_total", "detail", short] += count
                envoys = _BY_DETAIL.get(detail)
                if envoys is not None:
                    counts[envoys, "", ""] += count
                elif malformed and flag == "DPE":
                    counts["http_downstream_cx_protocol_error_total", "", ""] += count
        return counts

    def _active_request_count(self, counts: Counter[tuple[str, str, str]]) -> int:
        begun = counts["http_downstream_rq_total", "", ""]
        completed = counts["http_downstream_rq_completed_total", "", ""]
        return self._begun_before_reset + begun - completed

    def rows(self) -> list[Row]:
        """Return `{"name", "labels", "value"}` for each counter and gauge."""
        counts = self._counted()
        rows: list[Row] = [
            {"name": name, "labels": {label: value} if label else {}, "value": count}
            for (name, label, value), count in sorted(counts.items())
        ]
        rows += [
            {"name": "policy_l7_total", "labels": {"proxy_type": proxy, "rule": rule}, "value": n}
            for (proxy, rule), n in sorted(self._judged().items())
        ]
        gauges = {
            "http_downstream_cx_active": self.active_connection_count,
            "http_downstream_rq_active": self._active_request_count(counts),
            "upstream_cx_active": self.active_upstream_count,
        }
        rows += [{"name": name, "labels": {}, "value": value} for name, value in gauges.items()]
        if self.lost_line_count:
            rows.append(
                {
                    "name": "access_log_lost_lines_total",
                    "labels": {},
                    "value": self.lost_line_count,
                }
            )
        if self.access_log_problem:
            labels = {"error": self.access_log_problem}
            rows.append({"name": "access_log_error", "labels": labels, "value": 1})
        rows += [
            {"name": "tls_secret_error", "labels": {"error": problem}, "value": 1}
            for problem in self.secret_problems
        ]
        return rows

    def histograms(self) -> list[Row]:
        """Return the rows of the histograms (`Histogram.row`), in milliseconds."""
        return [
            self._request_times.row("http_downstream_rq_time"),
            self._connection_times.row("http_downstream_cx_length_ms"),
        ]


class Redirects:
    """What became of requests: by whose rules decided, direction, protocol and port."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, str, int, int, bool]] = Counter()

    def observe(self, record: Record, port: int) -> None:
        """Count a request that policy saw."""
        judgement = record.judgement
        if record.kind is not _REQUEST or judgement is None:
            return
        self._add(judgement, _TCP, port, bool(record.detail))

    def asked(self, event: DnsEvent) -> None:
        """Count a DNS question."""
        self._add(event, event.transport, event.destination_port, event.verdict == _DROP)

    def _add(self, sides: Judgement | DnsEvent, protocol: int, port: int, denied: bool) -> None:
        ingress = sides.direction == _INGRESS
        endpoint = sides.destination_endpoint if ingress else sides.source_endpoint
        word = "ingress" if ingress else "egress"
        self._counts[endpoint, word, protocol, port, denied] += 1

    def rows(self) -> list[Row]:
        """Return rows of what became of requests.

        `endpoint` (id), `direction`, `protocol` (IANA), `port`, `received`, `forwarded`, `denied`.
        """
        found: dict[tuple[int, str, int, int], list[int]] = {}
        for (endpoint, direction, protocol, port, denied), count in self._counts.items():
            found.setdefault((endpoint, direction, protocol, port), [0, 0])[denied] += count
        return [
            {
                "endpoint": endpoint,
                "direction": direction,
                "protocol": protocol,
                "port": port,
                "received": sum(counts),
                "forwarded": counts[0],
                "denied": counts[1],
            }
            for (endpoint, direction, protocol, port), counts in sorted(found.items())
        ]


def _rule(detail: str, *, malformed: bool) -> str:
    """Return Cilium's word for what became of a request."""
    if not detail:
        return "forwarded"
    return "parse_errors" if malformed else "denied"


def counted_details() -> set[str]:
    """Return every detail string that has a counter of its own (for tests and docs)."""
    return set(_BY_DETAIL)


def all_refusals() -> list[Refusal]:
    """Return every refusal there is, in the order of `refusals`."""
    return [value for value in vars(refusals).values() if isinstance(value, Refusal)]
