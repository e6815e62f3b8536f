"""Endpoints that ask a real name server for the names of a case, as programs would.

What policy lets an endpoint ask for is learnt by the firewall on the way back; what it forbids is
refused by the proxy or dropped. The flow of each question says whether an answer is to be waited
for, so nothing is inferred from silence.
"""

import socket
import sys
from collections.abc import Callable

import dns.message

from conntrack.address import format_address
from lab.laboratory import Machine
from policytest.field import Field, FieldError
from policytest.flowstream import Key
from policytest.model import DNS_PORT, UDP
from policytest.world import World

ANSWER_S = 30.0
"""How long an answer may take on a busy machine; the proxy gives up a server after 10 s."""

_STARTED_S = 60.0


class Asker:
    """Name server and questions of one case.

    Args:
        field: the lab.
        fresh_port: returns a source port that nobody uses.
    """

    def __init__(self, field: Field, fresh_port: Callable[[], int]) -> None:
        self._field = field
        self._fresh_port = fresh_port

    def ask(self, world: World) -> None:
        """Have every endpoint ask for every name, and wait until it has been told.

        Raises:
            FieldError: nobody says what became of a question.
        """
        questions = list(world.questions())
        if not questions:
            return
        self._serve(world)
        stream = self._field.stream
        assert stream is not None, "the field has begun"
        stream.forget()
        opened: dict[Key, socket.socket] = {}
        try:
            for _, source, server, name in questions:
                for kind in ("A", "AAAA"):
                    port = self._fresh_port()
                    key = Key(source, server, UDP, port, DNS_PORT)
                    opened[key] = self._send(key, dns.message.make_query(name, kind).to_wire())
            if stream.wait(opened, ANSWER_S):
                raise FieldError("of a DNS question nobody says what became of it")
            for key, sock in opened.items():
                flow = stream.packet(key)
                if flow is not None and flow.verdict != "DROPPED":
                    sock.recv(65_535)
        except TimeoutError as error:
            raise FieldError(f"the resolver {world.case.resolver} does not answer") from error
        finally:
            for sock in opened.values():
                sock.close()

    def _send(self, key: Key, wire: bytes) -> socket.socket:
        machine = self._field.machine(key.source)
        family = socket.AF_INET if len(key.source) == 4 else socket.AF_INET6
        sock = machine.datagram(key.source_port, family=family, address=format_address(key.source))
        sock.settimeout(ANSWER_S)
        sock.sendto(wire, (format_address(key.destination), DNS_PORT))
        return sock

    def _serve(self, world: World) -> None:
        """Serve the names of this case at the resolver's addresses."""
        lines = [
            f"{name} 300 {'A' if len(address) == 4 else 'AAAA'} {format_address(address)}"
            for name, address in world.named()
        ]
        addresses = world.addresses(world.case.resolver)
        machine = self._field.machine(addresses[0])
        zone = self._field.lab.folder / f"{machine.name}.zone"
        known = zone.exists()
        zone.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if not known:
            where = [word for a in addresses for word in ("--address", format_address(a))]
            self._start(machine, [sys.executable, "-m", "lab.nameserver", str(zone), *where])

    def _start(self, machine: Machine, argv: list[str]) -> None:
        machine.start(argv)
        try:
            self._field.daemon.wait_until(
                lambda: "serving" in machine.log(), "the name server serves", _STARTED_S
            )
        except TimeoutError as error:
            raise FieldError(f"{error}\n{machine.log()}") from error
