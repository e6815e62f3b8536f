"""From a question to what is sent back, whatever it came by. Pure: `now` is an argument.

`Desk.begin` takes the client's bytes and says what to do: answer at once (refused), nothing, or ask
the server under another id. `Desk.finish` takes what the server sent: bytes that do not answer the
question change nothing, the right answer is judged once more by the snapshot in force, and comes
back with what is to be learnt from it. The shells (`dns_datagram`, `dns_stream`) own the sockets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dns.edns import EDECode

from firewall.flows.event import DnsEvent
from firewall.policy.verdict import DropReason, TrafficDirection, Verdict
from l7proxy import dns
from l7proxy.accesslog import Ends
from l7proxy.dns_policy import NamePolicy, Traffic
from l7proxy.judgement import Judgement
from l7proxy.limits import Limits
from l7proxy.shares import Shares

SERVFAIL, NXDOMAIN, REFUSED = 2, 3, 5
"""Response codes (RFC 1035 section 4.1.1)."""

BROKEN_COUNT = 4
"""Answers with the right id and question that cannot be read until a question is given up: each may
cost what 64 KiB of records cost, and who forges them (RFC 5452) does not know that much."""

_BUCKETS = 16_384  # sources whose rate is remembered


class Pending:
    """A question that the server was asked."""

    __slots__ = ("asked_at", "broken_count", "ends", "judgement", "number", "protocol", "query")

    def __init__(
        self, ends: Ends, protocol: int, query: dns.Query, judgement: Judgement, asked_at: float
    ) -> None:
        self.ends = ends
        self.protocol = protocol
        self.query = query
        self.judgement = judgement
        self.asked_at = asked_at
        self.broken_count = 0
        self.number = query.id


class Begun(NamedTuple):
    """What to do with a question: send `reply` back, ask (`pending`), or neither."""

    reply: bytes = b""
    pending: Pending | None = None
    close: bool = False


class Lesson(NamedTuple):
    """Addresses that an endpoint was given for a name."""

    endpoint: int
    name: str
    addresses: tuple[bytes, ...]
    ttl_s: int


class Finished(NamedTuple):
    """What to send back, and what must be enforced before."""

    reply: bytes
    lesson: Lesson | None


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class Desk:
    """The DNS side of one proxy worker.

    Args:
        policy: which names may be asked for.
        limits: the bounds.
        count: called with the name of every counter that rises.
        report: called with every flow event; its `time_ns` is filled in by the callee.
    """

    def __init__(
        self,
        policy: NamePolicy,
        limits: Limits,
        count: Callable[[str], None],
        report: Callable[[DnsEvent], None],
    ) -> None:
        self._policy = policy
        self._limits = limits
        self._count = count
        self._report = report
        self._asking = Shares(limits.dns_pending_count, limits.dns_pending_count_per_source)
        self._buckets: dict[bytes, _Bucket] = {}
        self._reject = NXDOMAIN if limits.dns_reject == "nameError" else REFUSED

    @property
    def pending_count(self) -> int:
        """Questions that wait for their answer."""
        return self._asking.count

    def serves(self, ends: Ends, protocol: int) -> bool:
        """Say whether traffic between these ends is redirected for its dns rules."""
        traffic = Traffic(ends.source, ends.destination, protocol, ends.destination_port)
        return self._policy.is_dns(traffic)

    def begin(self, wire: bytes, ends: Ends, protocol: int, now: float) -> Begun:
        """Judge a question.

        Args:
            wire: the message, without a length before it.
            ends: client and server.
            protocol: 6 or 17.
            now: monotonic seconds.
        """
        traffic = Traffic(ends.source, ends.destination, protocol, ends.destination_port)
        if not self._policy.is_dns(traffic):
            self._count("dns_not_redirected")
            return Begun(close=True)
        self._count("dns_queries")
        try:
            query = dns.read_query(wire)
        except dns.QueryError as error:
            return self._malformed(wire, ends, traffic, error)
        judgement = self._policy.judge(traffic, query.name)
        pending = Pending(ends, protocol, query, judgement, now)
        if not judgement.allowed:
            self._count("dns_denied")
            self._say_request(pending, self._reject)
            return Begun(self._denial(query))
        over = self._over_limit(ends.source, now)
        if over:
            self._count(over)
            reason = int(DropReason.DROP_RATE_LIMITED)
            refused = judgement._replace(allowed=False, drop_reason=reason, detail=over)
            pending.judgement = refused
            self._say_request(pending, REFUSED)
            return Begun(dns.refusal(query, REFUSED))
        self._asking.add(ends.source)
        self._count("dns_forwarded")
        self._say_request(pending, 0)
        return Begun(pending=pending)

    def finish(self, pending: Pending, wire: bytes, now: float) -> Finished | None:
        """Take what a server sent; None: it is not the answer, the question stays open.

        Otherwise the question is done: `release` is called here.
        """
        try:
            answer = dns.read_answer(wire, pending.query, pending.number)
        except dns.BrokenAnswerError as error:
            self._count("dns_mismatched_answers")
            pending.broken_count += 1
            if pending.broken_count < BROKEN_COUNT:
                return None
            return Finished(self.fail(pending, f"the answer {error}", now), None)
        except dns.AnswerError:
            self._count("dns_mismatched_answers")
            return None
        self._asking.give_back(pending.ends.source)
        ends, query = pending.ends, pending.query
        traffic = Traffic(ends.source, ends.destination, pending.protocol, ends.destination_port)
        pending.judgement = self._policy.judge(traffic, query.name)
        if not pending.judgement.allowed:
            self._count("dns_denied")
            self._say_response(pending, dns.Answer(self._reject, False, (), 0, (), ()), now)
            return Finished(self._denial(query), None)
        self._count("dns_answers")
        self._say_response(pending, answer, now)
        lesson = None
        endpoint = pending.judgement.source_endpoint
        if answer.addresses and endpoint:
            lesson = Lesson(endpoint, query.name, answer.addresses, answer.ttl_s)
        reply = dns.with_id(wire, query.id)
        return Finished(reply, lesson)

    def abandon(self, pending: Pending) -> None:
        """Forget a question whose client is gone."""
        self._asking.give_back(pending.ends.source)

    def expire(self, pending: Pending, now: float) -> None:
        """Forget a question that nobody answered; its client is not answered either, as in Cilium.

        Silence lets a resolver ask again, at another server.
        """
        self._asking.give_back(pending.ends.source)
        self._count("dns_timeouts")
        self._fail(pending, "timeout", now)

    def fail(self, pending: Pending, detail: str, now: float) -> bytes:
        """Return the answer to a question that no server can be asked: SERVFAIL."""
        self._asking.give_back(pending.ends.source)
        self._count("dns_upstream_failures")
        self._fail(pending, detail, now)
        return dns.refusal(pending.query, SERVFAIL, EDECode.NETWORK_ERROR)

    def _fail(self, pending: Pending, detail: str, now: float) -> None:
        pending.judgement = pending.judgement._replace(detail=detail)
        answer = dns.Answer(SERVFAIL, False, (), 0, (), ())
        self._say_response(pending, answer, now)

    def _over_limit(self, source: bytes, now: float) -> str:
        """Return the counter of the limit that one more question would exceed, "" = none."""
        if not self._asking.has_room(source):
            return "dns_overflow"
        rate = self._limits.dns_rate_per_source
        bucket = self._buckets.get(source)
        if bucket is None:
            if len(self._buckets) >= _BUCKETS:
                self._buckets.clear()
            bucket = self._buckets[source] = _Bucket(float(rate), now)
        bucket.left = min(float(rate), bucket.left + (now - bucket.at) * rate)
        bucket.at = now
        if bucket.left < 1.0:
            return "dns_rate_limited"
        bucket.left -= 1.0
        return ""

    def _denial(self, query: dns.Query) -> bytes:
        return dns.refusal(query, self._reject, EDECode.BLOCKED, "no policy allows this name")

    # --- what is said about it --------------------------------------------------------------------

    def _malformed(self, wire: bytes, ends: Ends, traffic: Traffic, error: dns.QueryError) -> Begun:
        self._count("dns_malformed")
        judgement = self._policy.judge(traffic, "")._replace(
            allowed=False,
            drop_reason=int(DropReason.INVALID_PACKET_DROPPED),
            allowed_by=(),
            denied_by=(),
            isolated_by=(),
            detail=str(error),
        )
        rcode = self._reject if error.answerable else 0
        self._report(_event("request", ends, traffic.protocol, judgement, rcode=rcode))
        if not error.answerable:
            return Begun(close=True)
        return Begun(dns.blind_refusal(wire, self._reject))

    def _say_request(self, pending: Pending, rcode: int) -> None:
        self._report(
            _event(
                "request",
                pending.ends,
                pending.protocol,
                pending.judgement,
                query=pending.query,
                rcode=rcode,
            )
        )

    def _say_response(self, pending: Pending, answer: dns.Answer, now: float) -> None:
        self._report(
            _event(
                "response",
                pending.ends,
                pending.protocol,
                pending.judgement,
                query=pending.query,
                rcode=answer.rcode,
                answer=answer,
                latency_ns=int((now - pending.asked_at) * 1e9),
            )
        )


def _event(
    kind: str,
    ends: Ends,
    protocol: int,
    judgement: Judgement,
    *,
    query: dns.Query | None = None,
    rcode: int = 0,
    answer: dns.Answer | None = None,
    latency_ns: int = 0,
) -> DnsEvent:
    refused = not judgement.allowed
    reason = judgement.drop_reason if refused else 0
    return DnsEvent(
        time_ns=0,
        kind=kind,
        verdict=Verdict.DROP if refused else Verdict.ACCEPT,
        drop_reason=reason,
        direction=int(judgement.direction or TrafficDirection.EGRESS),
        source=ends.source,
        destination=ends.destination,
        source_port=ends.source_port,
        destination_port=ends.destination_port,
        source_identity=judgement.source_identity,
        destination_identity=judgement.destination_identity,
        source_endpoint=judgement.source_endpoint,
        destination_endpoint=judgement.destination_endpoint,
        transport=protocol,
        query=query.name if query is not None else "",
        query_types=(query.kind_text,) if query is not None else (),
        rcode=rcode,
        addresses=answer.addresses if answer is not None else (),
        ttl_s=answer.ttl_s if answer is not None else 0,
        cnames=answer.cnames if answer is not None else (),
        answer_types=answer.kinds if answer is not None else (),
        latency_ns=latency_ns,
        policy_revision=judgement.revision,
        allowed_by=judgement.allowed_by,
        denied_by=judgement.denied_by,
        isolated_by=judgement.isolated_by,
        detail=judgement.detail,
    )
