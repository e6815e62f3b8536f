"""DNS over UDP: redirected datagrams in, questions out in the client's name, answers back.

TPROXY hands a datagram to the one transparent socket; IP_RECVORIGDSTADDR says which server was
meant. Each question goes out by a socket of its own, bound to the client's address and a port that
the kernel draws, connected to the server: only that server's datagrams arrive, and who forges one
must guess port and id (RFC 5452). The answer must seem to come from the server's address and port.
A raw socket sends it, with the source address of IP_PKTINFO: a socket bound to the server's address
would take away datagrams that the kernel means for somebody else, a resolver on this node first of
all. Its own receive queue is closed by a filter that lets nothing in.

Sources: ip(7), ipv6(7), raw(7), socket(7) SO_ATTACH_FILTER; RFC 768, RFC 8200 section 8.1.
"""

import asyncio
import ctypes
import errno
import logging
import random
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from conntrack.address import format_address, parse_address
from l7proxy import dns
from l7proxy.accesslog import Ends, SocketAddress
from l7proxy.dns_desk import Desk, Lesson, Pending
from l7proxy.listener import (
    IP_RECVORIGDSTADDR,
    IPV6_RECVORIGDSTADDR,
    is_local,
    make_transparent,
)
from l7proxy.poller import READ, Poller

UDP = 17

IP_PKTINFO = 8
"""linux/in.h; the socket module does not name it."""

MAX_DATAGRAM_BYTES = 65_535
READS_PER_WAKE = 64
"""Datagrams taken before everybody else gets a turn."""

_NOTE_BYTES = 128
"""Room for the original address beside a datagram: 48 for IPv6, header included (cmsg(3))."""

Notes = list[tuple[int, int, bytes]]
"""Ancillary data: level, type, bytes."""

_SOCKADDR = struct.Struct("!2xH4s")  # sockaddr_in: family, port, address
_SOCKADDR6 = struct.Struct("!2xH4x16s")  # sockaddr_in6: family, port, flow, address
_PKTINFO = struct.Struct("=i4s4s")  # in_pktinfo: interface, ipi_spec_dst, ipi_addr
_PKTINFO6 = struct.Struct("=16si")  # in6_pktinfo: address, interface
_UDP_HEADER = struct.Struct("!4H")
_CHECKSUM_AT = 6  # IPV6_CHECKSUM: the kernel fills the sum in at this offset
_TRIES = 4  # ports drawn until one differs from the client's own
_RET_NOTHING = struct.pack("=HBBI", 6, 0, 0, 0)  # one BPF instruction: BPF_RET | BPF_K, 0 bytes

log = logging.getLogger(__name__)

_draw = random.SystemRandom().getrandbits


class Host(Protocol):
    """What the server asks of its worker."""

    mark: int

    def hold(self, lesson: Lesson | None, send: Callable[[], None]) -> None:
        """Call `send` when every worker enforces the lesson, or when waiting is over."""
        ...

    def count(self, name: str) -> None:
        """Count something."""
        ...


class DatagramServer:
    """The UDP side of the DNS proxy.

    Args:
        host: the worker.
        desk: judges questions.
        listeners: the sockets that datagrams come to (`listener.listen`).
        timeout_s: how long a question waits for its answer.

    Raises:
        OSError: CAP_NET_ADMIN or CAP_NET_RAW is missing.
    """

    def __init__(
        self, host: Host, desk: Desk, listeners: Iterable[socket.socket], timeout_s: float
    ) -> None:
        self._host = host
        self._desk = desk
        self._timeout_s = timeout_s
        self._poller: Poller | None = None
        self._open: dict[Pending, _Question] = {}
        self._order: deque[tuple[float, Pending]] = deque()
        self._listeners = list(listeners)
        self._ears: list[_Ear] = []
        self._port: int = self._listeners[0].getsockname()[1]
        self._voices: dict[int, socket.socket] = {}
        try:
            for sock in self._listeners:
                self._voices[sock.family] = _voice(sock.family, host.mark)
        except OSError:
            self.close()
            raise

    def start(self, poller: Poller, clock: Callable[[], float]) -> None:
        """Begin to serve."""
        self._poller = poller
        self._clock = clock
        self._ears = [_Ear(poller, sock, self._came) for sock in self._listeners]

    def stop(self) -> None:
        """Take no more questions; those that are open are answered yet.

        What waits in the sockets is a successor's, if there is one that has them.
        """
        for ear in self._ears:
            ear.close()
        for sock in self._listeners:
            sock.close()
        self._ears.clear()
        self._listeners.clear()

    def close(self) -> None:
        """Close every socket."""
        self.stop()
        for sock in self._voices.values():
            sock.close()
        for pending in tuple(self._open):
            self._end(pending)
        self._voices.clear()

    @property
    def idle(self) -> bool:
        """Whether no question is open."""
        return not self._open

    def tick(self, now: float) -> None:
        """Give up the questions that waited too long."""
        while self._order and self._order[0][0] <= now:
            _, pending = self._order.popleft()
            if pending in self._open:
                self._end(pending)
                self._desk.expire(pending, now)

    # --- from the client --------------------------------------------------------------------------

    def _came(self, data: bytes, notes: Notes, flags: int, client: SocketAddress) -> None:
        server = _original(notes)
        if server is None or flags & socket.MSG_CTRUNC:
            self._host.count("dns_not_redirected")
            return
        address, port = server
        if port == self._port and is_local(format_address(address)):
            self._host.count("dns_not_redirected")
            return
        ends = Ends(parse_address(client[0].partition("%")[0]), client[1], address, port)
        now = self._clock()
        begun = self._desk.begin(data, ends, UDP, now)
        if begun.reply:
            self._say(begun.reply, ends, client)
        if begun.pending is not None:
            self._ask(begun.pending, client, now)

    def _ask(self, pending: Pending, client: SocketAddress, now: float) -> None:
        ends = pending.ends
        try:
            sock = _question_socket(client, self._host.mark)
        except OSError as error:
            self._say(self._desk.fail(pending, f"no socket: {error.strerror}", now), ends, client)
            return
        pending.number = _draw(16)
        try:
            sock.connect(_with_scope(client, ends))
            sock.send(dns.with_id(pending.query.wire, pending.number))
        except OSError as error:
            sock.close()
            self._say(self._desk.fail(pending, error.strerror or "send", now), ends, client)
            return
        assert self._poller is not None
        self._open[pending] = question = _Question(self, pending, client, sock)
        self._order.append((now + self._timeout_s, pending))
        self._poller.watch(sock.fileno(), READ, question)

    # --- from the server --------------------------------------------------------------------------

    def answered(self, question: "_Question", data: bytes) -> bool:
        """Take what a server sent; False: the question stays open."""
        pending, client = question.pending, question.client
        finished = self._desk.finish(pending, data, self._clock())
        if finished is None:
            return False
        self._end(pending)
        reply = finished.reply
        self._host.hold(finished.lesson, lambda: self._say(reply, pending.ends, client))
        return True

    def failed(self, question: "_Question", reason: str) -> None:
        """Answer that nobody can be asked."""
        pending = question.pending
        if pending in self._open:
            self._end(pending)
            reply = self._desk.fail(pending, reason, self._clock())
            self._say(reply, pending.ends, question.client)

    def _end(self, pending: Pending) -> None:
        question = self._open.pop(pending)
        assert self._poller is not None
        self._poller.forget(question.sock.fileno())
        question.sock.close()

    def _say(self, reply: bytes, ends: Ends, client: SocketAddress) -> None:
        """Send a datagram to the client as the server."""
        family = socket.AF_INET if len(ends.source) == 4 else socket.AF_INET6
        voice = self._voices.get(family)
        if voice is None:
            return  # closed meanwhile
        datagram = _datagram(reply, ends)
        try:
            if family == socket.AF_INET:
                note = (socket.IPPROTO_IP, IP_PKTINFO, _PKTINFO.pack(0, ends.destination, b""))
                voice.sendmsg([datagram], [note], 0, (client[0], 0))
            else:
                index = client[3] if len(client) == 4 else 0
                packed = _PKTINFO6.pack(ends.destination, index)
                note = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, packed)
                voice.sendmsg([datagram], [note], 0, (client[0], 0, 0, index))
        except OSError as error:
            self._host.count("dns_reply_failures")
            log.debug("DNS answer not sent to %s: %s", client[0], error)


class _Ear:
    """A socket that questions come to; `take` gets each datagram as recvmsg(2) gives it."""

    def __init__(
        self,
        poller: Poller,
        sock: socket.socket,
        take: Callable[[bytes, Notes, int, SocketAddress], None],
    ) -> None:
        self._poller = poller
        self._sock = sock
        self._take = take
        self._pause: asyncio.TimerHandle | None = None
        poller.watch(sock.fileno(), READ, self)

    def ready(self, events: int) -> None:  # noqa: ARG002 - as any that is watched
        """Take what waits, up to a limit."""
        for _ in range(READS_PER_WAKE):
            try:
                data, notes, flags, client = self._sock.recvmsg(MAX_DATAGRAM_BYTES, _NOTE_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                log.warning("DNS listener: %s", error)
                self._pause = self._poller.pause(self._sock.fileno(), READ, self)
                return
            self._take(data, notes, flags, client)

    def fail(self, error: Exception) -> None:
        """Go on: the datagram that it was about is taken already."""

    def close(self) -> None:
        """Take nothing more."""
        if self._pause is not None:
            self._pause.cancel()
        # Closing alone would not end the watch: it ends with the last copy of the descriptor.
        self._poller.forget(self._sock.fileno())


class _Question:
    """The socket that one server was asked by."""

    __slots__ = ("_owner", "client", "pending", "sock")

    def __init__(
        self, owner: DatagramServer, pending: Pending, client: SocketAddress, sock: socket.socket
    ) -> None:
        self._owner = owner
        self.pending = pending
        self.client = client
        self.sock = sock

    def ready(self, events: int) -> None:  # noqa: ARG002 - as any that is watched
        """Take what came, until it is the answer."""
        for _ in range(READS_PER_WAKE):
            try:
                data = self.sock.recv(MAX_DATAGRAM_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:  # an ICMP error: nobody serves there
                self._owner.failed(self, error.strerror or "refused")
                return
            if self._owner.answered(self, data):
                return

    def fail(self, error: Exception) -> None:
        """Give up after an error of our own."""
        self._owner.failed(self, f"internal error: {error}")


def _voice(family: int, mark: int) -> socket.socket:
    """Return the raw socket that sends answers in any server's name."""
    sock = socket.socket(
        family, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.IPPROTO_UDP
    )
    try:
        _deafen(sock)
        make_transparent(sock, family)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_CHECKSUM, _CHECKSUM_AT)
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    except OSError:
        sock.close()
        raise
    return sock


def _deafen(sock: socket.socket) -> None:
    """Let no packet into the receive queue."""
    code = ctypes.create_string_buffer(_RET_NOTHING)
    program = struct.pack("@HP", 1, ctypes.addressof(code))  # struct sock_fprog
    attach = 26  # SO_ATTACH_FILTER, asm-generic/socket.h
    sock.setsockopt(socket.SOL_SOCKET, attach, program)


def _question_socket(client: SocketAddress, mark: int) -> socket.socket:
    """Return a socket with the client's address and another port than its own."""
    family = socket.AF_INET6 if ":" in client[0] else socket.AF_INET
    where = (client[0], 0) if len(client) == 2 else (client[0], 0, client[2], client[3])
    refused: list[socket.socket] = []  # kept open, so that their port is not drawn again
    try:
        for _ in range(_TRIES):
            sock = socket.socket(
                family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            )
            try:
                make_transparent(sock, family)
                if mark:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
                sock.bind(where)
            except OSError:
                sock.close()
                raise
            if sock.getsockname()[1] != client[1]:
                return sock
            refused.append(sock)
    finally:
        for sock in refused:
            sock.close()
    raise OSError(errno.EADDRINUSE, "no port but the client's own")


def _with_scope(client: SocketAddress, ends: Ends) -> SocketAddress:
    """Return the server's address, a link-local one on the client's link."""
    text = format_address(ends.destination)
    if len(client) == 4 and ends.destination[:2] == b"\xfe\x80":
        return text, ends.destination_port, 0, client[3]
    return text, ends.destination_port


def _original(notes: Notes) -> tuple[bytes, int] | None:
    """Return address and port that a datagram was sent to."""
    for level, kind, data in notes:
        if (level, kind) == (socket.IPPROTO_IP, IP_RECVORIGDSTADDR) and len(data) >= 8:
            port, address = _SOCKADDR.unpack_from(data)
            return address, port
        if (level, kind) == (socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR) and len(data) >= 24:
            port, address = _SOCKADDR6.unpack_from(data)
            return address, port
    return None


def _datagram(payload: bytes, ends: Ends) -> bytes:
    """Return UDP header and payload from the server to the client; IPv6's sum is the kernel's."""
    length = _UDP_HEADER.size + len(payload)
    header = _UDP_HEADER.pack(ends.destination_port, ends.source_port, length, 0)
    if len(ends.source) != 4:
        return header + payload
    covered = ends.destination + ends.source + struct.pack("!2H", UDP, length) + header + payload
    if len(covered) % 2:
        covered += b"\0"
    # The sum of 16-bit words with carries added back is the number modulo 2^16 - 1 (RFC 1071).
    total = int.from_bytes(covered, "big") % 0xFFFF
    checksum = 0xFFFF - total or 0xFFFF
    return header[:_CHECKSUM_AT] + checksum.to_bytes(2, "big") + payload
