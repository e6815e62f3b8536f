"""Real requests to real servers: every http check is a TCP connection of its own.

Nothing here blocks: many connections are open at once, and one that the firewall refuses is known
by the flow of its first packet, not by a timeout.
"""

import errno
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from conntrack.address import format_address
from firewall.flows.flow import Flow
from policytest.answer import Answer
from policytest.case import HttpRequest, TlsHello
from policytest.field import Field, FieldError
from policytest.flowstream import FlowStream, Key, key_of
from policytest.layer import Layer
from policytest.model import pair_text, refused_by_proxy
from policytest.verdicts import of_hello, of_packet, of_request
from policytest.world import Probe

DEADLINE_S = 30.0
"""How long a batch of requests may take on a busy machine."""

FLOW_S = 15.0
"""How long the flow of a request may come after its answer."""

_POLL_S = 0.02
_HEAD_BYTES = 65_536
_FORBIDDEN = 403
_CLEAR_DENIED = "clear_text_denied"
_NAME_DENIED = "server_name_denied"


class Outcome(NamedTuple):
    """What became of a request: the answer, the HTTP status (0 = none came) and the flows."""

    answer: Answer
    status: int
    flows: tuple[Flow, ...]


class _Visit:
    """One connection on its way."""

    def __init__(
        self, probe: Probe, request: HttpRequest | TlsHello, key: Key, layer: Layer | None
    ) -> None:
        self.probe = probe
        self.request = request
        self.key = key
        self.client: socket.socket | None = None
        self.received = b""
        self.done = False
        self._layer = layer
        self._asked = False

    @property
    def status(self) -> int:
        """The status of the answer, 0 = none yet."""
        line, ended, _ = self.received.partition(b"\r\n")
        words = line.split(b" ")
        return int(words[1]) if ended and len(words) > 1 and words[1].isdigit() else 0

    @property
    def answered(self) -> bool:
        """Whether the server, or the proxy in its place, has said enough."""
        return b"\r\n\r\n" in self.received

    def take(self, data: bytes) -> None:
        """Go on with what came, b"" to begin; raises OSError when it cannot go on."""
        client, layer = self.client, self._layer
        assert client is not None
        if layer is not None:
            data = layer.feed(data)
        self.received += data
        if not self._asked and (layer is None or layer.done):
            self._asked = True
            if layer is None:
                client.send(self.request.head())
            else:
                layer.say(self.request.head())
        if layer is not None:
            client.send(layer.take())

    def close(self) -> None:
        self.done = True
        if self.client is not None:
            self.client.close()


class Courier:
    """Makes requests from the hosts of a field.

    Args:
        field: where the hosts are.
        fresh_port: returns a source port that was not used before.
    """

    def __init__(self, field: Field, fresh_port: Callable[[], int]) -> None:
        self._field = field
        self._fresh_port = fresh_port

    @property
    def _stream(self) -> FlowStream:
        assert self._field.stream is not None, "the field has begun"
        return self._field.stream

    def deliver(self, requests: Sequence[tuple[Probe, HttpRequest | TlsHello]]) -> list[Outcome]:
        """Make all requests at once and return what became of each.

        Raises:
            FieldError: of some request nobody says what became of it.
        """
        if not requests:
            return []
        self._stream.forget()
        for probe, _ in requests:
            machine = self._field.machine(probe.destination)
            self._field.servers.listen(machine, _family(probe.destination), probe.port)
        selector = selectors.DefaultSelector()
        visits = []
        try:
            for probe, request in requests:
                visit = self._depart(probe, request)
                visits.append(visit)
                assert visit.client is not None
                selector.register(visit.client, selectors.EVENT_WRITE, visit)
            self._accompany(visits, selector)
        finally:
            selector.close()
            for visit in visits:
                visit.close()
        self._stream.wait([visit.key for visit in visits], FLOW_S)
        through = [visit.key for visit in visits if self._redirected(visit)]
        self._stream.wait(through, FLOW_S, requests=True)
        return [self._outcome(visit) for visit in visits]

    def _redirected(self, visit: _Visit) -> bool:
        flow = self._stream.packet(visit.key)
        return flow is not None and flow.verdict == "REDIRECTED"

    def _depart(self, probe: Probe, request: HttpRequest | TlsHello) -> _Visit:
        """Begin a connection from a port of our own, by which its flows are known."""
        machine = self._field.machine(probe.source)
        client = machine.open_socket(_family(probe.source), socket.SOCK_STREAM)
        client.setblocking(False)
        while True:
            port = self._fresh_port()
            try:
                client.bind((format_address(probe.source), port))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    client.close()
                    raise
        hello = request if isinstance(request, TlsHello) else request.hello
        layer = None
        if hello is not None:
            layer = Layer(self._field.keys.client_context, hello.server_name)
        visit = _Visit(probe, request, key_of(probe, port), layer)
        visit.client = client
        with suppress(BlockingIOError):
            client.connect((format_address(probe.destination), probe.port))
        return visit

    def _accompany(self, visits: list[_Visit], selector: selectors.BaseSelector) -> None:
        """Carry every visit to its answer, or to the flow that says that it was refused."""
        deadline = time.monotonic() + DEADLINE_S
        while any(not visit.done for visit in visits):
            if time.monotonic() > deadline:
                return
            for key, mask in selector.select(_POLL_S):
                self._progress(key.data, mask, selector)
            for visit in visits:
                flow = None if visit.done else self._stream.packet(visit.key)
                if flow is not None and flow.verdict in ("DROPPED", "ERROR"):
                    self._end(visit, selector)

    def _progress(self, visit: _Visit, mask: int, selector: selectors.BaseSelector) -> None:
        client = visit.client
        assert client is not None
        try:
            if mask & selectors.EVENT_WRITE:
                visit.take(b"")
                selector.modify(client, selectors.EVENT_READ, visit)
                return
            data = client.recv(_HEAD_BYTES)
            if data:
                visit.take(data)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or visit.answered:
            self._end(visit, selector)

    @staticmethod
    def _end(visit: _Visit, selector: selectors.BaseSelector) -> None:
        assert visit.client is not None
        selector.unregister(visit.client)
        visit.close()

    def _outcome(self, visit: _Visit) -> Outcome:
        packet = self._stream.packet(visit.key)
        request = self._stream.request(visit.key)
        flows = tuple(flow for flow in (packet, request) if flow is not None)
        status = visit.status
        inside = isinstance(visit.request, HttpRequest) and visit.request.hello is not None
        if packet is not None and packet.verdict in ("DROPPED", "ERROR"):
            return Outcome(of_packet(packet), 0, flows)
        if isinstance(visit.request, TlsHello) and packet is not None:
            if packet.verdict != "REDIRECTED" and visit.answered:
                return Outcome(of_packet(packet), 0, flows)
            if request is not None and status:  # TLS stands, whatever became of what was said
                return Outcome(of_request(packet, request, allowed=True), 0, flows)
            if request is not None:
                return Outcome(_of_hello(packet, request), 0, flows)
        if inside and packet is not None and request is not None and not status:
            return Outcome(_of_hello(packet, request), 0, flows)
        if packet is not None and request is not None and _detail(request) == _CLEAR_DENIED:
            return Outcome(of_request(packet, request, allowed=False), 0, flows)
        if packet is not None and packet.verdict != "REDIRECTED" and status:
            return Outcome(of_packet(packet), status, flows)
        if packet is not None and request is not None and status:
            if status == _FORBIDDEN or request.verdict != "DROPPED":
                answer = of_request(packet, request, allowed=status < 400)
                return Outcome(answer, status, flows)
            return Outcome(refused_by_proxy(_detail(request)), status, flows)
        said = f"HTTP {status}" if status else "no answer"
        lines = "; ".join(flow.summary for flow in flows) or "no flow"
        raise FieldError(
            f"{pair_text(visit.probe)} port {visit.probe.port} {visit.request}: {said}, {lines}\n"
            f"{self._field.log()}"
        )


def _of_hello(packet: Flow, request: Flow) -> Answer:
    """Return what became of the beginning of TLS."""
    detail = _detail(request)
    if request.verdict != "DROPPED":
        return of_request(packet, request, allowed=True)
    if detail == _NAME_DENIED:
        return of_hello(request)
    return refused_by_proxy(detail.partition("{")[0])


def _family(address: bytes) -> int:
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


def _detail(request: Flow) -> str:
    detail = request.extensions.value.detail if request.extensions is not None else ""
    return detail or request.drop_reason_desc
