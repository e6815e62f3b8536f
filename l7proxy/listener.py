"""The sockets on which redirected connections arrive.

TPROXY hands a packet to a socket without changing it, so the accepted socket's local address is the
address that the client meant: the original destination. IP_TRANSPARENT lets a socket own foreign
addresses (needs CAP_NET_ADMIN); SO_REUSEPORT lets every worker listen on the same port, the kernel
spreads connections by tuple, and, where we may tell it so, gives those that wait at a socket that
is closed to another worker's; SO_MARK is inherited by accepted sockets, so that what they send is
not redirected again. DNS datagrams come to UDP sockets of the same port, which tell by a control
message where each was sent to. Source: ip(7), socket(7), Documentation/networking/tproxy.rst and
ip-sysctl.rst.
"""

import contextlib
import errno
import logging
import socket
from collections.abc import Mapping
from pathlib import Path

from firewall.control.inheritance import close_all

log = logging.getLogger(__name__)

IPV6_TRANSPARENT = 75
"""linux/in6.h; the socket module does not name it."""
IP_TRANSPARENT = 19
"""linux/in.h; named by the socket module only since Python 3.14."""

BACKLOG = 1024
"""Connections that wait to be accepted; the kernel caps it at net.core.somaxconn, 4096."""

IP_RECVORIGDSTADDR = 20
IPV6_RECVORIGDSTADDR = 74
"""linux/in.h, linux/in6.h; a control message has the number of its option."""

RECEIVE_BYTES = 4 * 1024 * 1024
"""Asked of the kernel for the queue of datagrams, about 5,000 questions (SO_RCVBUFFORCE)."""

_SETTINGS = Path("/proc/sys/net/ipv4")
"""Of TCP in both families, in this network namespace."""

_SWITCHED_ON = ("tcp_migrate_req", "tcp_tw_reuse")
"""Who waits at a socket that is closed goes to another worker's (Linux 5.14). And a port that we
have closed towards a server is used again after a second instead of a minute: all of one client's
connections to one server share 28,000, which 470 new ones in a second would use up (RFC 6191)."""

_SO_RCVBUFFORCE = 33  # asm-generic/socket.h: beyond net.core.rmem_max, needs CAP_NET_ADMIN

_STREAM, _DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
_WILDCARDS = {
    "tcp4": (socket.AF_INET, _STREAM, "0.0.0.0"),  # noqa: S104
    "tcp6": (socket.AF_INET6, _STREAM, "::"),
    "udp4": (socket.AF_INET, _DATAGRAM, "0.0.0.0"),  # noqa: S104
    "udp6": (socket.AF_INET6, _DATAGRAM, "::"),
}
_ABSENT = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)


class ListenError(Exception):
    """The proxy cannot listen; the text says why and what it needs."""


def make_transparent(sock: socket.socket, family: int) -> None:
    """Let a socket of a family have addresses that are not the machine's.

    Raises:
        PermissionError: CAP_NET_ADMIN is missing.
    """
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)


def listen(
    port: int, mark: int, had: Mapping[str, socket.socket] | None = None
) -> dict[str, socket.socket]:
    """Return non-blocking transparent sockets on `port`: "tcp4", "udp4" and, with IPv6, "...6".

    Args:
        port: the same for all.
        mark: packet mark of everything that these and accepted sockets send; 0 = none.
        had: sockets of an earlier process by name. Those of this port go on, with what waits in
            them; the others are closed.

    Raises:
        ListenError: no permission, or the port is taken.
    """
    _prepare_kernel()
    left = dict(had or {})
    sockets: dict[str, socket.socket] = {}
    for name, (family, kind, wildcard) in _WILDCARDS.items():
        try:
            old = left.get(name)
            if old is not None and old.getsockname()[1] == port:
                sockets[name] = _continued(left.pop(name), mark)
            else:
                sockets[name] = _listen(family, kind, wildcard, port, mark)
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in _ABSENT:
                log.warning("no IPv6 here: listening on IPv4 only")
                continue
            close_all(sockets.values())
            hint = " (CAP_NET_ADMIN is needed)" if isinstance(error, PermissionError) else ""
            raise ListenError(f"cannot listen on {wildcard} port {port}: {error}{hint}") from error
    close_all(left.values())
    return sockets


def _prepare_kernel() -> None:
    """Set what else would end or refuse connections; without the right to, the kernel will."""
    for name in _SWITCHED_ON:
        with contextlib.suppress(OSError):
            (_SETTINGS / name).write_text("1", "ascii")


def _continued(sock: socket.socket, mark: int) -> socket.socket:
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    if sock.type == _STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _listen(family: int, kind: int, wildcard: str, port: int, mark: int) -> socket.socket:
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        make_transparent(sock, family)
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if kind == _DATAGRAM:
            _prepare(sock)
        sock.bind((wildcard, port))
        if kind == _STREAM:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted ones inherit it
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _prepare(sock: socket.socket) -> None:
    """Let a socket tell of each datagram where it was sent to, and hold many."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVORIGDSTADDR, 1)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)


def is_local(address: str) -> bool:
    """Whether an address is this machine's own, by the kernel's word.

    A connection to the proxy's own address and port was not redirected; to serve it would mean to
    connect to ourselves. Where ip_nonlocal_bind is set every address looks local: more is refused.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True
