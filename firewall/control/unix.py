"""Unix sockets as the channel needs them: bound in place of a stale one, with the peer's pid.

The socket file gets its mode by `fchmod` before `bind`, since Linux gives the file the mode of the
socket's inode (unix(7) says only that bind creates it; net/unix/af_unix.c unix_bind_bsd), and so
there is no moment at which others could connect, nor a change of the process's umask.
"""

import array
import os
import socket
import stat
import struct
from pathlib import Path

from firewall.control.inheritance import close_all
from firewall.control.messages import MAX_MESSAGE_BYTES

BUFFER_BYTES = 4 * 1024 * 1024
"""Asked of the kernel for each direction: about 10,000 events, or a second of an idle reader."""

_BACKLOG = 128  # the API's; a worker has one agent
_RIGHTS_BYTES = socket.CMSG_SPACE(32 * 4)  # descriptors of one datagram; workers have fewer sockets
_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)
_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; the socket module does not name it


class ChannelError(Exception):
    """The channel cannot be made or used; the text says why and names the socket."""


class ChannelBusyError(ChannelError):
    """Somebody alive listens at this path already. `pid` is theirs."""

    def __init__(self, path: Path, pid: int) -> None:
        super().__init__(f"{path}: process {pid} listens there already")
        self.pid = pid


class ChannelClosedError(ChannelError):
    """The other side went away."""


def listen(
    path: Path, kind: socket.SocketKind = socket.SOCK_SEQPACKET, mode: int = 0o600
) -> socket.socket:
    """Bind a non-blocking, listening unix socket in place of a stale one.

    Args:
        path: the socket file; its directory exists.
        kind: SOCK_SEQPACKET or SOCK_STREAM.
        mode: permissions of the file, independent of the umask's more generous bits.

    Raises:
        ChannelBusyError: a living process listens there.
        ChannelError: something else stands there, or it cannot be bound.
    """
    _remove_stale(path, kind)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        listener.setblocking(False)
        os.fchmod(listener.fileno(), mode)
        listener.bind(str(path))
        path.chmod(mode)  # a umask may have taken bits away; it never adds any
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ChannelError(f"{path}: {error.strerror or error}") from error
    return listener


def listener_pid(path: Path | str, kind: socket.SocketKind = socket.SOCK_SEQPACKET) -> int:
    """Return the pid of the process that listens at a socket file, 0 if nobody does.

    Raises:
        ChannelError: the path cannot be asked (no permission, a socket of another kind).
    """
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return 0
        except BlockingIOError:
            raise ChannelError(f"{path}: somebody listens but does not accept") from None
        except OSError as error:
            raise ChannelError(f"{path}: {error.strerror}") from error
        return peer_pid(probe)


def _remove_stale(path: Path, kind: socket.SocketKind) -> None:
    """Remove a socket file that nobody listens at; refuse to touch anything else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ChannelError(f"{path}: exists and is not a socket; it was not removed")
    pid = listener_pid(path, kind)
    if pid:
        raise ChannelBusyError(path, pid)
    path.unlink(missing_ok=True)


def receive(connection: socket.socket) -> tuple[bytes, list[socket.socket]]:
    """Read one datagram and the sockets that come with it. Never blocks.

    Raises:
        BlockingIOError: nothing is there.
        ChannelClosedError: the end, or a datagram above the limit (not of this protocol).
        OSError: the connection is broken.
    """
    payload, ancillary, flags, _ = connection.recvmsg(
        MAX_MESSAGE_BYTES,
        _RIGHTS_BYTES,
        socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
    )
    sockets: list[socket.socket] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            rights = array.array("i")
            rights.frombytes(data[: len(data) - len(data) % rights.itemsize])
            sockets += [socket.socket(fileno=descriptor) for descriptor in rights]
    if not payload or flags & socket.MSG_TRUNC:
        close_all(sockets)
        if not payload:
            raise ChannelClosedError("the other side closed")
        raise ChannelClosedError(f"datagram of more than {MAX_MESSAGE_BYTES} bytes")
    return payload, sockets


def widen(connection: socket.socket) -> None:
    """Ask for a large send buffer: beyond wmem_max with CAP_NET_ADMIN, up to it without."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, BUFFER_BYTES)
    except PermissionError:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)


def peer_pid(connection: socket.socket) -> int:
    """Return the pid that listened (or connected) at the other end."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid: int = _PEERCRED.unpack(data)[0]
    return pid
