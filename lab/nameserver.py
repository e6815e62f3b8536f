"""A small authoritative name server for labs: `python -m lab.nameserver ZONE [--port P]`.

ZONE is a file of resource records, one a line, as dnspython reads them
(`www.example. 30 IN A 192.0.2.1`); `#` begins a comment. It is read anew when it has changed, so a
test may change what a name means. Of a name that is an alias, the whole chain is answered. A name
that nobody has is answered with NXDOMAIN. Answers that do not fit a client's datagram are cut, with
TC set. Each question is one line on standard output: `UDP 10.0.1.2 www.example. A`.
"""

import argparse
import contextlib
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

TTL_S = 30
"""Of records that give none."""

_CHAIN_COUNT = 16


class ZoneError(ValueError):
    """The file is no list of records; the text names file and line."""


Records = dict[tuple[dns.name.Name, dns.rdatatype.RdataType], dns.rrset.RRset]


def read_zone(text: str, file: str = "zone") -> Records:
    """Read records.

    Raises:
        ZoneError: a line is none.
    """
    found: Records = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        ttl = int(words.pop(1)) if len(words) > 1 and words[1].isdecimal() else TTL_S
        if len(words) > 1 and words[1].upper() == "IN":
            words.pop(1)
        try:
            owner, kind, *rest = words
            fresh = dns.rrset.from_text_list(
                dns.name.from_text(owner),
                ttl,
                "IN",
                kind,
                [" ".join(rest)],
                origin=dns.name.root,
                relativize=False,
            )
        except (ValueError, dns.exception.DNSException) as error:
            raise ZoneError(f"{file}:{number}: {line.strip()!r} is no record: {error}") from error
        key = fresh.name, fresh.rdtype
        if key in found:
            for record in fresh:
                found[key].add(record)
        else:
            found[key] = fresh
    return found


def answer(records: Records, query: dns.message.Message) -> dns.message.Message:
    """Return the response to a query with one question."""
    response = dns.message.make_response(query)
    response.flags |= dns.flags.AA
    question = query.question[0]
    name = question.name
    known = {owner for owner, _ in records}
    for _ in range(_CHAIN_COUNT):
        found = records.get((name, question.rdtype))
        alias = records.get((name, dns.rdatatype.CNAME))
        if found is not None:
            response.answer.append(found)
            return response
        if alias is None:
            break
        response.answer.append(alias)
        name = alias[0].target
    if name not in known:
        response.set_rcode(dns.rcode.NXDOMAIN)
    return response


class Zone:
    """The records of a file, as it is now.

    Raises:
        ZoneError, OSError: it cannot be read at first; later the last good text stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = (-1, -1)
        self._records: Records = {}
        self._lock = threading.Lock()
        self.load()

    def load(self) -> None:
        """Read the file if it has changed."""
        found = self._path.stat()
        # The clock of files stands still for some milliseconds: within them the size may tell.
        stamp = (found.st_mtime_ns, found.st_size)
        if stamp != self._stamp:
            self._records = read_zone(self._path.read_text(encoding="utf-8"), str(self._path))
            self._stamp = stamp

    def respond(self, wire: bytes, client: str, protocol: str) -> bytes:
        """Return what answers a message, b"" = nothing."""
        try:
            query = dns.message.from_wire(wire)
        except dns.exception.DNSException:
            return b""
        if len(query.question) != 1:
            return b""
        question = query.question[0]
        kind = dns.rdatatype.to_text(question.rdtype)
        with self._lock:
            sys.stdout.write(f"{protocol} {client} {question.name.to_text()} {kind}\n")
            sys.stdout.flush()
            with contextlib.suppress(ZoneError, OSError):
                self.load()
            response = answer(self._records, query)
        size = 65_535 if protocol == "TCP" else max(512, query.payload or 512)
        try:
            return response.to_wire(max_size=size)
        except dns.exception.TooBig:
            cut = dns.message.make_response(query)
            cut.flags |= dns.flags.TC
            return cut.to_wire()


class _OneFamily(socketserver.BaseServer):
    """IPv6 only where it is IPv6: the other family has a server of its own."""

    socket: socket.socket

    def server_bind(self) -> None:
        if self.socket.family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()  # type: ignore[misc]  # the next class has it


class _Datagrams(_OneFamily, socketserver.UDPServer):
    allow_reuse_address = True
    max_packet_size = 65_535
    zone: Zone


class _Streams(_OneFamily, socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    zone: Zone


class _OneDatagram(socketserver.BaseRequestHandler):
    server: _Datagrams

    def handle(self) -> None:
        wire, sock = self.request
        said = self.server.zone.respond(wire, self.client_address[0], "UDP")
        if said:
            sock.sendto(said, self.client_address)


class _OneStream(socketserver.StreamRequestHandler):
    server: _Streams

    def handle(self) -> None:
        while len(head := self.rfile.read(2)) == 2:
            wire = self.rfile.read(struct.unpack("!H", head)[0])
            said = self.server.zone.respond(wire, self.client_address[0], "TCP")
            self.wfile.write(struct.pack("!H", len(said)) + said)


def serve(zone: Zone, address: str, port: int) -> list[socketserver.BaseServer]:
    """Serve a zone at an address over UDP and TCP, in threads; return the servers."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    servers: list[Any] = []
    for kind, handler in ((_Datagrams, _OneDatagram), (_Streams, _OneStream)):
        named = type(kind.__name__, (kind,), {"address_family": family})
        server = named((address, port), handler)
        server.zone = zone
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    return servers


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve on every address until killed."""
    parser = argparse.ArgumentParser(prog="lab.nameserver", description="Answer from a zone file.")
    parser.add_argument("zone", type=Path, help="records, one a line")
    parser.add_argument("--port", type=int, default=53, help="UDP and TCP port")
    parser.add_argument(
        "--address", action="append", default=[], help="where to listen, repeatable; all if none"
    )
    options = parser.parse_args(arguments)
    try:
        zone = Zone(options.zone)
        for address in options.address or ["0.0.0.0", "::"]:  # noqa: S104 - a lab's own namespace
            serve(zone, address, options.port)
    except (ZoneError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("serving\n")
    sys.stdout.flush()
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
