"""A lab for Python programs: send any packet or request, get back what the firewall decided.

What is returned is read from the flow of that very packet. A packet that leaves no flow (it belongs
to a flow that is known already, or no endpoint is part of it) is seen where it arrives.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from conntrack.address import format_address, parse_address
from conntrack.packet import Packet, PacketError, parse, policy_port
from firewall.flows.compact import line
from firewall.flows.flow import Flow
from lab.closing import Closing
from lab.wire import Capture, NothingArrivedError
from policytest.answer import Answer
from policytest.case import ICMP, ICMPV6, Case, HttpRequest, Step
from policytest.field import Field
from policytest.flowstream import KEYED, FlowStream, Key
from policytest.packets import PacketJudge, fresh_port
from policytest.reader import read_case
from policytest.requests import Courier
from policytest.verdicts import of_packet
from policytest.world import Probe

FLOW_S = 15.0
"""How long the verdict of a packet may take on a busy machine."""

_FENCE_S = 0.25
"""How long a packet that has arrived may leave its flow afterwards: five flushes of a worker."""

_QUERIES = (ICMP, ICMPV6)
_PORTED = ("TCP", "UDP", "SCTP", "ICMP")
"""Names of scapy's layers whose source port, or query id, tells flows apart."""


class NoVerdictError(Exception):
    """Nobody says what became of a packet: no flow came, and it did not arrive."""


class InvalidTestFileError(Exception):
    """The file is no policy test; the text has every problem."""


class Sendable(Protocol):
    """A packet of scapy, or anything else that has bytes."""

    def __bytes__(self) -> bytes:
        """Return the layer-3 packet."""


class PacketVerdict(NamedTuple):
    """What the firewall decided about one packet.

    Attributes:
        verdict: "accept", "drop" or "redirect".
        reason: name of the `DropReason`, "" if it was not dropped.
        rule: where the deciding rule was written, `file:line`, "" = no rule decided.
        by: names of the policies that decided, or "default-deny", "no-policy", "audit".
        ct_state: "new", "established", "reply", "invalid", ... as the tracker saw it, "" = it did
            not look.
        direction: the side that decided, "ingress" or "egress".
        why: one sentence.
        flow: the whole record, None = the packet left none.
    """

    verdict: str
    reason: str
    rule: str
    by: tuple[str, ...]
    ct_state: str
    direction: str
    why: str
    flow: Flow | None

    @property
    def allowed(self) -> bool:
        """Whether it may pass."""
        return self.verdict != "drop"

    def __str__(self) -> str:
        """Render the flow as `bartizan observe` does."""
        return line(self.flow, policy_names=True) if self.flow is not None else self.why


class HttpVerdict(NamedTuple):
    """What became of a request: HTTP status (0 = the connection was refused), verdict, deciders."""

    status: int
    allowed: bool
    by: tuple[str, ...]
    reason: str
    why: str
    flows: tuple[Flow, ...]

    @property
    def verdict(self) -> str:
        """`allow` or `deny`."""
        return "allow" if self.allowed else "deny"


class PacketLab(Closing):
    """The lab of a test file; a context manager.

    Attributes:
        case: what the file says.
        field: lab and daemon: `field.lab.hosts`, `field.daemon`.

    Raises:
        InvalidTestFileError: the file has problems.
        FieldError: this machine cannot have a lab.
    """

    def __init__(self, path: Path) -> None:
        read = read_case(path)
        if read.case is None:
            raise InvalidTestFileError("\n".join(map(str, read.errors)))
        self.case: Case = read.case
        self.field = Field([self.case])
        try:
            self._judge = PacketJudge(self.field, self.case)
        except BaseException:
            self.field.close()
            raise
        self._courier = Courier(self.field, fresh_port)
        self._next = 0

    def close(self) -> None:
        """End daemon and hosts."""
        self.field.close()

    def addresses(self, title: str) -> tuple[str, ...]:
        """Return the addresses of `ns/name`, `host:NAME` or `node`."""
        return tuple(map(format_address, self._judge.world.addresses(title)))

    def step(self) -> Step:
        """Perform the next step of the file; raises IndexError if there is none."""
        step = self.case.steps[self._next]
        self._next += 1
        self._judge.perform(step)
        return step

    # --- packets ------------------------------------------------------------------------------

    def send(self, packet: Sendable, from_: str) -> PacketVerdict:
        """Send one packet from a host's link and return what was decided about it.

        A packet of scapy without a source address gets the sender's; one that says another is sent
        as it is, so that spoofing can be tried.

        Args:
            packet: layer 3, scapy's or bytes.
            from_: `ns/name`, `host:NAME`, an address, or `node`.

        Raises:
            NoVerdictError: nobody says what became of it.
        """
        home = self._judge.world.addresses(from_)
        data = _addressed(packet, home)
        sender = next((a for a in home if len(a) == (4 if data[0] >> 4 == 4 else 16)), home[0])
        key = _key(data)
        self._stream.forget()
        capture = self._capture(data)
        try:
            self.field.send(sender, data)
            return self._verdict(key, capture, data)
        finally:
            if capture is not None:
                capture.close()

    @property
    def _stream(self) -> FlowStream:
        assert self.field.stream is not None, "the judge began"
        return self.field.stream

    def _capture(self, data: bytes) -> Capture | None:
        """See what arrives at the destination, if it is a host of the lab."""
        destination = data[16:20] if data[0] >> 4 == 4 else data[24:40]
        host = self.field.host_at(destination)
        return None if host is None else host.capture()

    def _verdict(self, key: Key | None, capture: Capture | None, data: bytes) -> PacketVerdict:
        arrived = False
        if capture is not None:
            body = data[20:] if data[0] >> 4 == 4 else data[40:]
            arrived = self._flow_or_arrival(key, capture, body)
        if arrived:
            self.field.daemon.flows(last=1)  # it asks the workers for what they have yet to tell
        flow = self._flow(key, _FENCE_S if arrived else FLOW_S)
        if flow is not None:
            return _from_flow(flow)
        if arrived:
            state = self._tracked(key)
            why = f"it arrived, its flow being {state}" if state else "no endpoint is part of it"
            return PacketVerdict("accept", "", "", (), state, "", why, None)
        raise NoVerdictError(
            "no flow came and it did not arrive (what belongs to a connection that the proxy has "
            f"does neither): {data[:60].hex()}"
        )

    def _tracked(self, key: Key | None) -> str:
        """Return what the packet of a known flow is to it: "established", "reply", or ""."""
        if key is None:
            return ""
        source, destination = format_address(key.source), format_address(key.destination)
        for row in self.field.daemon.get("/v1/conntrack"):
            ends = row["source_address"], row["destination_address"]
            ports = row["source_port"], row["destination_port"]
            ported = key.protocol not in _QUERIES
            if ends == (source, destination) and (
                not ported or ports == (key.source_port, key.port)
            ):
                return "established"
            if ends == (destination, source) and (
                not ported or ports == (key.port, key.source_port)
            ):
                return "reply"
        return ""

    def _flow(self, key: Key | None, within_s: float) -> Flow | None:
        if key is None:
            return self._stream.strange(within_s)
        self._stream.wait((key,), within_s)
        return self._stream.packet(key)

    def _flow_or_arrival(self, key: Key | None, capture: Capture, body: bytes) -> bool:
        """Wait for whichever comes first; say whether the packet has arrived."""
        for _ in range(int(5 * FLOW_S / _FENCE_S)):
            try:
                capture.expect(lambda seen: body in seen, _FENCE_S / 5)
            except NothingArrivedError:
                if self._flow(key, 0.0) is not None:
                    return False
            else:
                return True
        return False

    # --- requests -----------------------------------------------------------------------------

    def http(
        self, from_: str, request: str, headers: Sequence[tuple[str, str]] = ()
    ) -> HttpVerdict:
        """Make a request and return what became of it.

        Args:
            from_: who asks.
            request: `METHOD http://name.namespace[:port]/path`; the name of an endpoint, a host or
                an address. The server is there, on any port.
            headers: name and value of each further header.
        """
        method, _, url = request.partition(" ")
        parts = urlsplit(url)
        port = parts.port or 80
        destination = self._resolve(parts.hostname or "")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        for source in self._judge.world.addresses(from_):
            if len(source) == len(destination):
                probe = Probe(source, destination, 6, port)
                asked = HttpRequest(method, path, parts.netloc, tuple(headers))
                [outcome] = self._courier.deliver([(probe, asked)])
                answer = outcome.answer
                return HttpVerdict(
                    outcome.status, answer.allowed, answer.by, answer.reason, answer.why,
                    outcome.flows,
                )  # fmt: skip
        raise ValueError(f"{from_} has no address of the family of {parts.hostname}")

    def _resolve(self, name: str) -> bytes:
        """Return the address that a URL means: `b.x` is the endpoint x/b."""
        world = self._judge.world
        pod, _, namespace = name.partition(".")
        titles = (f"{namespace.partition('.')[0]}/{pod}", f"host:{name}", f"default/{name}", name)
        for title in titles:
            if title in world.endpoints or title.startswith("host:") or title == "node":
                try:
                    return world.addresses(title)[0]
                except ValueError:
                    continue
        return parse_address(name)


def _addressed(packet: Sendable, home: Sequence[bytes]) -> bytes:
    """Return the bytes of a packet, with what its author left open filled in.

    scapy would take the source address from our own routes, and the same port every time.
    """
    if not hasattr(packet, "fields"):
        return bytes(packet)
    filled: Any = packet.copy()  # type: ignore[attr-defined]
    if "src" not in filled.fields:
        size = 4 if filled.version == 4 else 16
        filled.src = next((format_address(a) for a in home if len(a) == size), filled.src)
    layer = filled.payload
    while layer and getattr(layer, "fields", None) is not None:
        wanted = "sport" if "sport" in layer.default_fields else "id"
        own = wanted in layer.default_fields and type(layer).__name__.startswith(_PORTED)
        if own and wanted not in layer.fields:
            setattr(layer, wanted, fresh_port())
        layer = layer.payload
    return bytes(filled)


def _key(data: bytes) -> Key | None:
    """Return the key of a packet's flow, None for what cannot be parsed."""
    try:
        parsed: Packet = parse(data)
    except PacketError:
        return None
    if parsed.protocol not in KEYED:
        return None
    own = 0 if parsed.protocol in _QUERIES else parsed.source_port
    return Key(parsed.source, parsed.destination, parsed.protocol, own, policy_port(parsed))


def _from_flow(flow: Flow) -> PacketVerdict:
    answer: Answer = of_packet(flow)
    extension = flow.extensions.value if flow.extensions is not None else None
    rule = answer.rules[0] if answer.rules else None
    verdict = "redirect" if flow.verdict == "REDIRECTED" else "accept"
    return PacketVerdict(
        verdict=verdict if answer.allowed else "drop",
        reason=answer.reason,
        rule=f"{rule.file}:{rule.line}" if rule is not None and rule.file else "",
        by=answer.by,
        ct_state=extension.ct_state if extension is not None else "",
        direction=answer.direction,
        why=answer.why,
        flow=flow,
    )
