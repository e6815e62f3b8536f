"""The judge that computes: readers, repository, resolver, view, the proxy's reading of HTTP.

The same code decides in the datapath and the proxy; what differs there is everything around it:
the kernel, the tracker, the agent, the workers.
"""

from collections.abc import Iterable, Sequence

from conntrack.address import Prefix, format_address
from firewall.agent.nodes import HOSTNAME, host_labels, host_row
from firewall.agent.nodes import NODE as NODE_SOURCE
from firewall.fqdn.reach import Reach
from firewall.identities.labels import Label, LabelFilter, LabelSet, parse_label
from firewall.identities.local import LocalNumbers, fqdn_labels, prefix_labels
from firewall.identities.reserved import (
    CLUSTER_MIN,
    RESERVED_LABELS,
    Reserved,
    reserved_number,
)
from firewall.policy.course import CLEAR
from firewall.policy.explain import explain
from firewall.policy.explanation import Request as AskedRequest
from firewall.policy.explanation import render
from firewall.policy.name_match import NameMatcher
from firewall.policy.objects import Resource, resource_key
from firewall.policy.repository import Repository
from firewall.policy.resolve import Resolver
from firewall.policy.snapshot import EndpointRow, Snapshot
from firewall.policy.snapshot import Settings as SnapshotSettings
from firewall.policy.verdict import DropReason, Verdict
from firewall.policy.view import Decision, View
from l7proxy.dns_policy import NamePolicy, Traffic
from l7proxy.head import parse_request
from l7proxy.judgement import Judgement
from l7proxy.limits import Limits
from l7proxy.plan import Policy
from l7proxy.policy import ConnectionJudge
from l7proxy.refusals import MISDIRECTED, RequestRefused
from l7proxy.request import Request, admit
from policytest.answer import Answer, of_decision, passed, refused_hello, refused_request
from policytest.case import NODE, Case, Check, HttpRequest, OutsideHost, Source, Step, TlsHello
from policytest.world import Probe, World

DNS_PORT, UDP = 53, 17

_LIMITS = Limits()


class ContradictionError(Exception):
    """Rules of the case contradict each other; the lines name both places."""


class Model:
    """One case; `perform` takes it through its steps, `answers` asks it.

    Attributes:
        world: who is there now.
        snapshot: what follows from it.
    """

    def __init__(self, case: Case) -> None:
        self.world = World(case)
        self._repository = Repository()
        self._resources: dict[tuple[str, str, str], Resource] = {}
        self._resolver = Resolver(cluster=case.settings.cluster_name)
        self._filter = LabelFilter()
        self._numbers: dict[LabelSet, int] = {}
        self._local = LocalNumbers()
        self._prefixes: dict[Prefix, int] = {}
        self._ids: dict[str, int] = {}
        self._policy = Policy()
        self._names = NamePolicy()
        self._told: set[tuple[str, str]] = set()
        self._heads: dict[HttpRequest, Request | RequestRefused] = {}
        labels = host_labels(NODE, map("=".join, case.node_labels))
        own = RESERVED_LABELS[Reserved.HOST].with_labels(labels)
        self._resolver.upsert_identity(int(Reserved.HOST), own)
        self._apply(case.sources)
        self._resolve()

    def perform(self, step: Step) -> None:
        """Make the step's changes.

        Raises:
            ContradictionError: rules contradict each other now.
        """
        self.world.perform(step)
        if step.delete:
            self._resolver.apply(self._repository.delete(step.delete))
            for key in step.delete:
                self._resources.pop((key.kind, key.namespace, key.name), None)
            self._resolver.set_resources(self._resources.values())
        self._apply(step.apply)
        self._resolve()

    def _apply(self, sources: Iterable[Source]) -> None:
        for source in sources:
            for resource in source.resources:
                self._resources[resource_key(resource)] = resource
            self._resolver.apply(self._repository.apply(source.objects))
        self._resolver.set_resources(self._resources.values())

    # --- resolution ---------------------------------------------------------------------------

    def _resolve(self) -> None:
        settings = self.world.case.settings
        cache: dict[Prefix, int] = {}
        rows = [self._row(title, cache) for title in self.world.endpoints]
        for host in self.world.case.hosts:
            if host.node_labels is not None:
                number = self._number(_remote_labels(host))
                cache |= dict.fromkeys(map(_host_prefix, host.addresses), number)
        cache |= dict.fromkeys(map(_host_prefix, self.world.case.node), int(Reserved.HOST))
        if settings.host_firewall:
            rows.append(host_row(NODE, self.world.case.node, audit=False))
        self._resolver.set_endpoints(rows)
        for prefix in self._resolver.prefixes():
            if prefix not in self._prefixes:
                labels_of_prefix = prefix_labels(prefix)
                number = self._local.allocate(labels_of_prefix)
                self._prefixes[prefix] = number
                self._resolver.upsert_identity(number, labels_of_prefix)
        known = {prefix: self._prefixes[prefix] for prefix in self._resolver.prefixes()}
        self._publish(known | cache)
        self._ask()
        if named := self._named():
            self._publish(known | named | cache)

    def _ask(self) -> None:
        """Have every endpoint ask for every name; what it was told it knows until it goes."""
        self._told = {one for one in self._told if one[0] in self.world.endpoints}
        self._names.follow(self._view)
        for title, source, server, name in self.world.questions():
            judgement = self._names.judge(Traffic(source, server, UDP, DNS_PORT), name)
            if judgement.connected and judgement.allowed:
                self._told.add((title, name))

    def _named(self) -> dict[Prefix, int]:
        """Return the identities of the addresses that names lead to."""
        told = {name for _, name in self._told}
        texts = sorted(self._resolver.fqdns())
        inside = {address for one in self.world.endpoints.values() for address in one.addresses}
        reach = Reach(inside.union(self.world.case.node, *self._node_addresses()))
        found: dict[bytes, set[str]] = {}
        for name, address in self.world.named():
            if name in told and not reach.refusal(address):
                meant = (text for text in texts if NameMatcher((text,)).matches(name))
                found.setdefault(address, set()).update(meant)
        numbers: dict[Prefix, int] = {}
        for address, meaning in found.items():
            if meaning:
                labels = fqdn_labels(tuple(sorted(meaning)))
                number = self._local.allocate(labels)
                self._resolver.upsert_identity(number, labels)
                numbers[_host_prefix(address)] = number
        return numbers

    def _node_addresses(self) -> list[tuple[bytes, ...]]:
        return [h.addresses for h in self.world.case.hosts if h.node_labels is not None]

    def _publish(self, known: dict[Prefix, int]) -> None:
        settings = self.world.case.settings
        self.snapshot: Snapshot = self._resolver.snapshot(
            settings=SnapshotSettings(
                enforcement=settings.enforcement,
                allow_localhost=settings.allow_localhost,
                policy_audit_mode=settings.audit,
                local_addresses=self.world.case.node,
            ),
            ipcache=known.items(),
        )
        if self._resolver.errors:
            raise ContradictionError("\n".join(map(str, self._resolver.errors)))
        self._view = View(self.snapshot)
        self._policy.view = self._view

    def _row(self, title: str, cache: dict[Prefix, int]) -> EndpointRow:
        endpoint = self.world.endpoints[title]
        relevant, _ = self._filter.split(self.world.labels_of(endpoint))
        number = self._number(relevant or RESERVED_LABELS[Reserved.INIT])
        cache |= dict.fromkeys(map(_host_prefix, endpoint.addresses), number)
        return EndpointRow(
            id=self._ids.setdefault(title, len(self._ids) + 1),
            name=endpoint.name,
            namespace=endpoint.namespace,
            identity=number,
            addresses=endpoint.addresses,
            named_ports=endpoint.ports,
            audit=endpoint.audit,
        )

    def _number(self, labels: LabelSet) -> int:
        reserved = reserved_number(labels)
        if reserved is not None:
            return int(reserved)
        number = self._numbers.get(labels)
        if number is None:
            number = self._numbers[labels] = CLUSTER_MIN + len(self._numbers)
            self._resolver.upsert_identity(number, labels)
        return number

    # --- questions ----------------------------------------------------------------------------

    def answers(self, checks: Sequence[Check]) -> list[Answer]:
        """Answer checks of the present step."""
        return [self.answer(check) for check in checks]

    def answer(self, check: Check) -> Answer:
        """Answer one check; of several address pairs the first that is not as expected counts."""
        probes = list(self.world.probes(check))
        return chosen(
            check, [(probe, self._probe(probe, check.traffic.request)) for probe in probes]
        )

    def _probe(self, probe: Probe, request: HttpRequest | TlsHello | None) -> Answer:
        decision = self._view.decide(*probe)
        if request is None or decision.verdict is not Verdict.REDIRECT:
            return of_decision(decision)
        judge = ConnectionJudge(self._policy, probe.source, probe.destination, probe.port)
        if isinstance(request, TlsHello):
            return self._greeted(decision, request, judge)
        if request.hello is None:
            judge.take(CLEAR)
        else:
            opened = self._greeted(decision, request.hello, judge)
            course = judge.take(request.hello.form)
            if not opened.allowed or course is None or not course.http:
                return opened
        admitted = self._admitted(request)
        if isinstance(admitted, RequestRefused):
            return refused_by_proxy(admitted.refusal.detail)
        judgement = judge.request(admitted)
        if judgement.misdirected:
            return refused_by_proxy(MISDIRECTED.detail)
        direction = judgement.direction.name.lower()
        if judgement.allowed:
            return _through(decision, judgement)
        return refused_request(
            direction, judgement.denied_by, DropReason(judgement.drop_reason).name
        )

    def _greeted(self, decision: Decision, hello: TlsHello, judge: ConnectionJudge) -> Answer:
        """Answer how the proxy takes the beginning of TLS."""
        if not judge.looks:
            return refused_by_proxy("http1.invalid_characters")
        course = judge.take(hello.form)
        judgement = judge.opening()
        if course is not None:
            return _through(decision, judgement)
        reason = DropReason(judgement.drop_reason).name
        return refused_hello(judgement.direction.name.lower(), judgement.denied_by, reason)

    def _admitted(self, request: HttpRequest) -> Request | RequestRefused:
        found = self._heads.get(request)
        if found is None:
            try:
                found = admit(parse_request(request.head(), _LIMITS), _LIMITS)
            except RequestRefused as refusal:
                found = refusal
            self._heads[request] = found
        return found

    def explain(self, check: Check) -> str:
        """Explain what is answered to a check, rule by rule."""
        asked, form = None, None
        request = check.traffic.request
        if isinstance(request, TlsHello):
            form = request.form
        elif request is not None:
            form = None if request.hello is None else request.hello.form
            admitted = self._admitted(request)
            if isinstance(admitted, RequestRefused):
                return f"the proxy refuses the request itself: {admitted.refusal.detail}"
            target = admitted.target
            asked = AskedRequest(admitted.method, target.wire, target.authority, admitted.headers)
        texts = [
            render(explain(self._view, self._resolver.selectors, probe, asked, form))
            for probe in self.world.probes(check)
        ]
        return "\n".join(dict.fromkeys(texts))


def _remote_labels(host: OutsideHost) -> LabelSet:
    """Return the labels of another node, its name's included."""
    labels = [Label(NODE_SOURCE, HOSTNAME, host.name)]
    labels += [parse_label(f"{key}={value}", NODE_SOURCE) for key, value in host.node_labels or ()]
    return RESERVED_LABELS[Reserved.REMOTE_NODE].with_labels(labels)


def _through(decision: Decision, judgement: Judgement) -> Answer:
    """Make the answer for what the proxy lets pass: who let the connection in, and this."""
    connection = of_decision(decision)
    rules = dict.fromkeys((*connection.rules, *judgement.allowed_by))
    return passed(judgement.direction.name.lower(), tuple(rules))


def refused_by_proxy(detail: str) -> Answer:
    """Make the answer for a request that the proxy refuses for what it is, whatever policy says."""
    reason = DropReason.INVALID_PACKET_DROPPED.name
    return Answer(False, ("proxy",), reason, "", f"the proxy refuses the request: {detail}")


def chosen(check: Check, answers: Sequence[tuple[Probe, Answer]]) -> Answer:
    """Return the answer to a check: of several address pairs the first that is not as expected."""
    assert answers, "the reader refuses checks without a common address family"
    if len(answers) > 1:
        for probe, answer in answers:
            if answer.allowed is not check.expected.allowed:
                return answer._replace(address=pair_text(probe))
    return answers[0][1]


def pair_text(probe: Probe) -> str:
    """Write the addresses of a probe."""
    return f"{format_address(probe.source)} -> {format_address(probe.destination)}"


def _host_prefix(address: bytes) -> Prefix:
    return Prefix(address, 8 * len(address))
