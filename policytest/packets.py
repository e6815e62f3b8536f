"""The judge that sends packets and reads, of each, what the firewall decided about that very one.

Packets go out in batches; each has a source port that no other packet between the same two has had,
so its flow is known when it comes. A verdict that does not come is not a denial: the packet is sent
again, and if that does not help either, the run ends with an error. Traffic that no endpoint is
part of concerns no policy and leaves no flow; it is seen where it arrives.
"""

import itertools
import socket
from collections.abc import Iterator, Sequence

from firewall.flows.compact import line
from firewall.flows.flow import Flow
from lab.wire import Capture, NothingArrivedError
from policytest.answer import NO_POLICY, Answer
from policytest.asking import Asker
from policytest.case import ICMP, ICMPV6, Case, Check, HttpRequest, Step, TlsHello
from policytest.field import Field, FieldError
from policytest.flowstream import FlowStream, Key, key_of
from policytest.frames import packet
from policytest.model import chosen, pair_text
from policytest.requests import Courier
from policytest.verdicts import of_packet
from policytest.world import Probe, World

BATCH_COUNT = 400
"""Packets in the air at once: fewer than the events that a worker reports per flush (1024)."""

VISIT_COUNT = 64
"""Requests at once; each is two connections and a socket opened in a namespace."""

ATTEMPTS = 3
"""Times that a packet is sent before a missing verdict is an error."""

ANSWER_S = 10.0
"""How long a verdict may take on a busy machine."""

_FIRST_PORT, _PORT_COUNT = 10_000, 22_000
"""Source ports: below the ephemeral range of Linux (32768), so that nobody else uses them."""

_numbers = itertools.count()
"""Counts over all cases: a tracker remembers the flows of the case before."""


def fresh_port() -> int:
    """Return the source port that was not used for longest."""
    return _FIRST_PORT + next(_numbers) % _PORT_COUNT


class PacketJudge:
    """One case, played on a field.

    Raises:
        FieldError: the daemon does not follow. RefusedError: it refuses a policy.
    """

    def __init__(self, field: Field, case: Case) -> None:
        self.world = World(case)
        self._field = field
        self._flows: dict[Check, tuple[Flow, ...]] = {}
        field.begin(self.world)
        self._asker = Asker(field, fresh_port)
        self._asker.ask(self.world)
        self._courier = Courier(field, fresh_port)

    @property
    def _stream(self) -> FlowStream:
        assert self._field.stream is not None, "the field has begun"
        return self._field.stream

    def perform(self, step: Step) -> None:
        """Make the step's changes; raises as the constructor."""
        self.world.perform(step)
        if _changes(step):
            self._field.perform(self.world, step)
            self._asker.ask(self.world)

    # --- questions ----------------------------------------------------------------------------

    def answers(self, checks: Sequence[Check]) -> list[Answer]:
        """Send what the checks say and return what became of it.

        Raises:
            FieldError: of some packet nobody says what became of it.
        """
        self._flows.clear()
        managed = {a for one in self.world.endpoints.values() for a in one.addresses}
        if self.world.case.settings.host_firewall:
            managed.update(self.world.case.node)
        found: list[list[tuple[Probe, Answer]]] = [[] for _ in checks]
        packets: list[tuple[int, Probe]] = []
        visits: list[tuple[int, Probe, HttpRequest | TlsHello]] = []
        for at, check in enumerate(checks):
            for probe in self.world.probes(check):
                if probe.source not in managed and probe.destination not in managed:
                    found[at].append((probe, self._delivered(probe)))
                elif check.traffic.request is not None:
                    visits.append((at, probe, check.traffic.request))
                else:
                    packets.append((at, probe))
        for batch in _batches(packets):
            for at, probe, flow in self._verdicts(batch):
                found[at].append((probe, of_packet(flow)))
                self._remember(checks[at], flow)
        for start in range(0, len(visits), VISIT_COUNT):
            some = visits[start : start + VISIT_COUNT]
            outcomes = self._courier.deliver([(probe, request) for _, probe, request in some])
            for (at, probe, _), outcome in zip(some, outcomes, strict=True):
                found[at].append((probe, outcome.answer))
                self._remember(checks[at], *outcome.flows)
        return [chosen(check, mine) for check, mine in zip(checks, found, strict=True)]

    def _remember(self, check: Check, *flows: Flow) -> None:
        self._flows[check] = (*self._flows.get(check, ()), *flows)

    def evidence(self, check: Check) -> tuple[str, ...]:
        """Return the flow lines of a check that was just answered."""
        return tuple(line(flow, policy_names=True) for flow in self._flows.get(check, ()))

    def _verdicts(self, batch: Sequence[tuple[int, Probe]]) -> list[tuple[int, Probe, Flow]]:
        """Send a batch; return the flow of each packet."""
        stream = self._stream
        stream.forget()
        missing = list(batch)
        found = []
        for _ in range(ATTEMPTS):
            keys = [self._send(probe) for _, probe in missing]
            stream.wait(keys, ANSWER_S)
            still = []
            for (at, probe), key in zip(missing, keys, strict=True):
                flow = stream.packet(key)
                if flow is None:
                    still.append((at, probe))
                else:
                    found.append((at, probe, flow))
            if not still:
                return found
            missing = still
        probe = missing[0][1]
        raise FieldError(
            f"no verdict came for {pair_text(probe)} protocol {probe.protocol} port {probe.port} "
            f"(and {len(missing) - 1} others) in {ATTEMPTS} attempts\n{self._field.log()}"
        )

    def _send(self, probe: Probe) -> Key:
        port = fresh_port()
        self._field.send(probe.source, packet(probe, port))
        return key_of(probe, port)

    def _delivered(self, probe: Probe) -> Answer:
        """Send a packet that concerns no endpoint and see it arrive."""
        data = packet(probe, fresh_port())
        body = data[20:] if len(probe.source) == 4 else data[40:]
        with self._capture(probe) as capture:
            self._field.send(probe.source, data)
            try:
                capture.expect(lambda seen: body in seen, ANSWER_S)
            except NothingArrivedError:
                why = "it did not arrive, although no endpoint is part of it"
                return Answer(False, ("nobody",), why=why)
        return Answer(True, (NO_POLICY,), why="no policy restricts it")

    def _capture(self, probe: Probe) -> Capture:
        """See what arrives at a probe's destination; at the node, on its link from the sender."""
        host = self._field.host_at(probe.destination)
        if host is not None:
            return host.capture()
        sender = self._field.host_at(probe.source)
        tap = self._field.lab.node.open_socket(socket.AF_PACKET, socket.SOCK_RAW)
        return Capture(tap, sender.interface if sender is not None else "lo")


def _changes(step: Step) -> bool:
    return bool(
        step.remove or step.add or step.namespaces or step.labels or step.delete or step.apply
    )


def _batches(items: Sequence[tuple[int, Probe]]) -> Iterator[list[tuple[int, Probe]]]:
    """Divide packets so that no two of a batch have flows that cannot be told apart.

    The record of an ICMP message has no id, so only one of a kind between two may be on its way.
    """
    waiting = list(items)
    while waiting:
        batch: list[tuple[int, Probe]] = []
        later = []
        queries: set[Probe] = set()
        for item in waiting:
            probe = item[1]
            if len(batch) >= BATCH_COUNT or probe in queries:
                later.append(item)
                continue
            if probe.protocol in (ICMP, ICMPV6):
                queries.add(probe)
            batch.append(item)
        yield batch
        waiting = later
