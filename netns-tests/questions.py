"""DNS for tests: questions from inside hosts, and a server that tells lies first."""

import socket
import sys
from pathlib import Path
from typing import Any

import dns.message
import dns.rdatatype
from traffic import DEADLINE_S

from lab.laboratory import Host

LIAR = """
import socket, sys
import dns.message, dns.rrset
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((sys.argv[4], int(sys.argv[1])))
print("serving", flush=True)
while True:
    wire, client = sock.recvfrom(65535)
    query = dns.message.from_wire(wire)
    name = query.question[0].name
    def answer(address, of=name):
        made = dns.message.make_response(query)
        made.answer = [dns.rrset.from_text(of, 60, "IN", "A", address)]
        return made.to_wire()
    forged = answer(sys.argv[2])
    other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    other.bind((sys.argv[4], int(sys.argv[1]) + 1))
    other.sendto(forged, client)                                        # another port
    sock.sendto(bytes([forged[0] ^ 1]) + forged[1:], client)            # another id
    sock.sendto(forged.replace(b"liar", b"lair"), client)               # another question
    sock.sendto(forged[:-3], client)                                    # cut short
    sock.sendto(answer(sys.argv[3]), client)
    other.close()
    print("answered", flush=True)
"""
"""A server that sends four forged answers before the right one."""


ODD = """
import socket, sys
import dns.message, dns.rcode, dns.rrset
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((sys.argv[2], int(sys.argv[1])))
print("odd server listens", flush=True)
while True:
    wire, client = sock.recvfrom(65535)
    query = dns.message.from_wire(wire)
    name = query.question[0].name
    word = name.labels[0].decode()
    print("asked for", name, flush=True)
    if word == "silent":
        continue
    made = dns.message.make_response(query)
    made.answer = [dns.rrset.from_text(name, 60, "IN", "A", *sys.argv[3:])]
    if word in ("nxdomain", "servfail", "refused"):
        made.set_rcode(dns.rcode.from_text(word))
    sock.sendto(made.to_wire(), client)
"""
"""A server that answers what the first label says: an error, with addresses all the same; nothing;
or the addresses."""


def query(name: str, kind: str = "A", **options: Any) -> dns.message.Message:
    """A question."""
    return dns.message.make_query(name, kind, **options)


def udp(
    host: Host,
    server: str,
    asked: dns.message.Message,
    port: int = 53,
    within_s: float = DEADLINE_S,
) -> dns.message.Message:
    """Ask once over UDP from a host; the answer must come from the very server."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with host.datagram(family=family) as sock:
        sock.settimeout(within_s)
        sock.connect((server, port))
        sock.send(asked.to_wire())
        answer = dns.message.from_wire(sock.recv(65_535))
    assert answer.id == asked.id
    return answer


def tcp(host: Host, server: str, *asked: dns.message.Message) -> list[dns.message.Message]:
    """Ask over one connection, all questions in one segment; answers in the order they came."""
    wires = [one.to_wire() for one in asked]
    with host.connect(server, 53) as sock:
        sock.settimeout(DEADLINE_S)
        sock.sendall(b"".join(len(wire).to_bytes(2, "big") + wire for wire in wires))
        stream = sock.makefile("rb")
        found = []
        for _ in asked:
            size = int.from_bytes(stream.read(2), "big")
            found.append(dns.message.from_wire(stream.read(size)))
    return found


def addresses(answer: dns.message.Message) -> set[str]:
    """The addresses of an answer."""
    kinds = (dns.rdatatype.A, dns.rdatatype.AAAA)
    return {r.address for rrset in answer.answer if rrset.rdtype in kinds for r in rrset}


def serve(host: Host, zone: Path, *at: str) -> None:
    """Serve a zone file at some addresses of a host."""
    where = [word for address in at for word in ("--address", address)]
    host.start([sys.executable, "-m", "lab.nameserver", str(zone), *where])
