"""The connection to the server: to the original destination only, with the client's address.

The socket is transparent and bound to the client's address, so the server and every policy on the
way see the client. Its port must differ from the client's own: with the same one, both legs would
be the same flow to the kernel's connection tracking. IP_BIND_ADDRESS_NO_PORT leaves the choice to
connect(), which only needs a free 4-tuple; IP_LOCAL_PORT_RANGE (Linux 6.3) keeps it from the
client's port. On older kernels the port is chosen at bind() and looked at.
Source: ip(7); linux/in.h.
"""

import contextlib
import errno
import os
import socket
import struct

from l7proxy.accesslog import SocketAddress
from l7proxy.listener import make_transparent

IP_BIND_ADDRESS_NO_PORT = 24
IP_LOCAL_PORT_RANGE = 51
"""linux/in.h; the socket module does not name them."""

_RANGE = struct.Struct("=I")  # upper << 16 | lower in host order, 0 = the default bound (ip(7))

_EPHEMERAL_MIDDLE = 46_884
"""Middle of the default net.ipv4.ip_local_port_range, 32768 to 60999: the longer side is used."""


def open_socket(client: SocketAddress, mark: int) -> socket.socket:
    """Return a non-blocking socket bound to the client's address and to another port than its own.

    Raises:
        OSError: no permission, or no free port.
    """
    family = socket.AF_INET6 if ":" in client[0] else socket.AF_INET
    sock = _make_socket(family, mark)
    try:
        try:
            _avoid_port(sock, client[1])
        except OSError:
            return _bind_elsewhere(sock, client, mark)
        sock.bind(_any_port(client))
    except OSError:
        sock.close()
        raise
    return sock


def _any_port(client: SocketAddress) -> SocketAddress:
    return (client[0], 0) if len(client) == 2 else (client[0], 0, client[2], client[3])


def _make_socket(family: int, mark: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        make_transparent(sock, family)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    except OSError:
        sock.close()
        raise
    return sock


def _avoid_port(sock: socket.socket, port: int) -> None:
    low, high = (port + 1, 0) if port < _EPHEMERAL_MIDDLE else (0, port - 1)
    if 1024 <= port < 65535:
        sock.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, _RANGE.pack(high << 16 | low))
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)


def _bind_elsewhere(sock: socket.socket, client: SocketAddress, mark: int) -> socket.socket:
    sock.bind(_any_port(client))
    if sock.getsockname()[1] != client[1]:
        return sock
    with contextlib.closing(sock):  # keeps the port taken while another is chosen
        other = _make_socket(sock.family, mark)
        other.bind(_any_port(client))
    return other


def connected(sock: socket.socket, server: SocketAddress) -> bool:
    """Connect, or go on with it once the socket can be written to; True when it is done.

    A server on this machine is connected at once: its part runs within our call.

    Raises:
        OSError: refused, unreachable, timed out by the kernel, or no local port.
    """
    error = sock.connect_ex(server)
    if error == errno.EINPROGRESS:
        error = sock.connect_ex(server)  # what came of it (connect(2), EALREADY)
    if error in (0, errno.EISCONN):
        return True
    if error == errno.EALREADY:
        return False
    raise OSError(error, os.strerror(error))
