"""The two ends of the socket between the agent and one worker.

Theory of operation. The worker listens; the agent connects and connects again, whichever of the two
was restarted, so neither needs the other to live. SOCK_SEQPACKET keeps message borders: one
datagram is one message (`framing`).

The worker's end never blocks and never raises for a slow or dead agent, because a verdict must not
wait for a reader: events that do not fit into the socket buffer are dropped and counted, and the
next batch that gets through carries the count. Acknowledgements and answers are few and must
arrive: they wait in a bounded outbox. A listener and a connection are two descriptors; both hang in
one epoll instance, itself pollable, so that a poll loop or asyncio watches exactly one number.

The agent's end is asyncio. Reading stops whenever nobody iterates, which pushes the pressure back
to the worker, where it turns into counted losses rather than into memory.

The socket file has mode 0600: `fchmod` before `bind`, since Linux gives the file the mode of the
socket's inode (unix(7) says only that bind creates it; net/unix/af_unix.c unix_bind_bsd), and so
there is no moment at which others could connect, nor a change of the process's umask.
"""

import array
import asyncio
import contextlib
import errno
import os
import select
import socket
import stat
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

from firewall.control.framing import (
    FramingError,
    datagrams,
    decode_from_worker,
    decode_to_worker,
)
from firewall.control.inheritance import close_all
from firewall.control.messages import (
    MAX_MESSAGE_BYTES,
    Acknowledged,
    Announce,
    Answer,
    Ask,
    Drain,
    Events,
    Forget,
    FromWorker,
    Hello,
    Lend,
    Lent,
    Pause,
    ToWorker,
)

BUFFER_BYTES = 4 * 1024 * 1024
"""Asked of the kernel for each direction: about 10,000 events, or a second of an idle reader."""

OUTBOX_BYTES = 64 * 1024 * 1024
"""What answers may wait in the worker: a dump of 250,000 conntrack entries of 256 bytes."""

CONNECT_INTERVAL_S = 0.01
"""Pause between attempts to reach a worker that does not listen yet: what it decides before we are
there leaves no flow."""

_BACKLOG = 128  # the API's; a worker has one agent
_NOT_YET = (FileNotFoundError, ConnectionRefusedError, BlockingIOError)
_READS_PER_CALL = 64
_RIGHTS_BYTES = socket.CMSG_SPACE(32 * 4)  # descriptors of one datagram; workers have fewer sockets
_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)


def socket_name(number: int, bank: int) -> str:
    """Return the name of a datapath worker's socket.

    While one set of workers follows another, there are two with each number, in two banks.
    """
    return f"datapath-{number}b.sock" if bank else f"datapath-{number}.sock"


class ChannelError(Exception):
    """The channel cannot be made or used; the text says why and names the socket."""


class ChannelBusyError(ChannelError):
    """Somebody alive listens at this path already. `pid` is theirs."""

    def __init__(self, path: Path, pid: int) -> None:
        super().__init__(f"{path}: process {pid} listens there already")
        self.pid = pid


class ChannelClosedError(ChannelError):
    """The other side went away."""


class WorkerChannel:
    """A worker's end: listens, keeps the newest agent, never blocks.

    Watch `fileno()` for reading and call `receive()` whenever it is ready. `revision` is what the
    `Hello` of the next connection tells; sending an `Acknowledged` without error updates it.

    Attributes:
        revision: revision of the snapshot that is enforced, 0 = none.
        lost_count: events lost and not yet reported to an agent.
        lost_total_count: events lost since the start.

    Raises:
        ChannelBusyError: a living process listens at `path`.
        ChannelError: `path` is something else than a socket, or cannot be bound.
    """

    def __init__(
        self, path: Path | str, kind: str, number: int, version: str, revision: int = 0
    ) -> None:
        self.path = Path(path)
        self.kind = kind
        self.number = number
        self.version = version
        self.revision = revision
        self.lost_count = 0
        self.lost_total_count = 0
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._waits_for_room = False
        self._agent: socket.socket | None = None
        self._listener = listen(self.path)
        self._inode = self.path.stat().st_ino
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)

    def fileno(self) -> int:
        """Return the one descriptor to watch: readable when `receive` has something to do."""
        return self._epoll.fileno()

    @property
    def connected(self) -> bool:
        """Whether an agent is there."""
        return self._agent is not None

    def accept_ready(self) -> bool:
        """Take the newest agent that waits, if any; say whether one was taken.

        The older connection is closed: after a crash of the agent its successor must not wait for
        the kernel to notice. `receive` calls this itself.
        """
        taken = False
        while self._listener.fileno() >= 0:
            try:
                agent, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return taken
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    return taken  # stays readable; the next call tries again
                raise
            self._forget_agent()
            agent.setblocking(False)
            _widen(agent)
            self._agent = agent
            self._epoll.register(agent, select.EPOLLIN)
            hello = Hello(self.kind, self.number, os.getpid(), self.version, self.revision)
            self.send(hello)
            taken = True
        return taken

    def receive(self) -> list[ToWorker]:
        """Return what the agent sent since the last call; empty if nothing did. Never blocks.

        A datagram that is no message closes the connection: the agent is of another version or
        not an agent, and connects again if it can do better.
        """
        self.accept_ready()
        self._flush()
        messages: list[ToWorker] = []
        for _ in range(_READS_PER_CALL):
            if self._agent is None:
                break
            try:
                payload = _read(self._agent)
                messages.append(decode_to_worker(payload))
            except BlockingIOError:
                break
            except (ChannelClosedError, FramingError, OSError):
                self._forget_agent()
        return messages

    def send(self, message: FromWorker) -> bool:
        """Send to the agent, or, for anything but events, keep until the agent reads again.

        Returns:
            True if the whole message was sent or will be; False if there is no agent or some of it
            is lost. Lost events are counted here: the caller need not.
        """
        if isinstance(message, Acknowledged) and not message.error:
            self.revision = message.revision
        if isinstance(message, Events):
            return self._send_events(message)
        if self._agent is None:
            return False
        whole = True
        for part in datagrams(message):
            whole &= not part.oversize and self._post(part.payload)
        self._flush()
        return whole and self._agent is not None

    def lend(self, sockets: Mapping[str, socket.socket]) -> bool:
        """Send the agent copies of these sockets; False if it is gone or its buffer is full."""
        if self._agent is None:
            return False
        (part,) = datagrams(Lent(tuple(sockets)))
        rights = array.array("i", (sock.fileno() for sock in sockets.values()))
        carried = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if sockets else []
        try:
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            self._agent.sendmsg([part.payload], carried, flags)
        except OSError:  # the agent asks again, or has gone, which the next message tells
            return False
        return True

    def close(self) -> None:
        """Stop listening and remove the socket file, if it is still ours. May be called twice."""
        if self._epoll.closed:
            return
        self.retire()
        self._forget_agent()
        self._epoll.close()

    def retire(self) -> None:
        """Leave the path to a successor; the agent that is connected stays."""
        if self._listener.fileno() < 0:
            return
        self._epoll.unregister(self._listener)
        self._listener.close()
        with contextlib.suppress(OSError):
            # A successor may have bound the same path meanwhile; its file is another inode.
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _send_events(self, message: Events) -> bool:
        """Send what fits now, count the rest as lost."""
        self._lose(message.lost_count)
        if self._agent is None:
            self._lose(len(message.events))
            return False
        carried = self.lost_count
        whole = True
        for index, part in enumerate(datagrams(Events(message.events, carried))):
            if part.oversize or not self._transmit(part.payload):
                self._lose(part.items)
                whole = False
            elif index == 0:  # the part that carries the count
                self.lost_count -= carried
        return whole

    def _lose(self, count: int) -> None:
        """Count events that no agent will see."""
        self.lost_count += count
        self.lost_total_count += count

    def _post(self, payload: bytes) -> bool:
        """Queue a datagram; False if the outbox is full."""
        if self._outbox_bytes + len(payload) > OUTBOX_BYTES:
            return False
        self._outbox.append(payload)
        self._outbox_bytes += len(payload)
        return True

    def _flush(self) -> None:
        """Send from the outbox as much as the socket takes, and ask to be woken for the rest."""
        while self._outbox and self._transmit(self._outbox[0]):
            self._outbox_bytes -= len(self._outbox.popleft())
        if self._agent is not None and self._waits_for_room != bool(self._outbox):
            self._waits_for_room = bool(self._outbox)
            interest = select.EPOLLIN | (select.EPOLLOUT if self._outbox else 0)
            self._epoll.modify(self._agent, interest)

    def _transmit(self, payload: bytes) -> bool:
        """Try to send one datagram; an agent that is gone is forgotten."""
        if self._agent is None:
            return False
        try:
            self._agent.send(payload, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.ENOMEM):
                self._forget_agent()
            return False
        return True

    def _forget_agent(self) -> None:
        """Close the connection; what waited for this agent means nothing to another one."""
        if self._agent is None:
            return
        self._epoll.unregister(self._agent)
        self._agent.close()
        self._agent = None
        self._outbox.clear()
        self._outbox_bytes = 0
        self._waits_for_room = False


class AgentChannel:
    """The agent's end of the channel to one worker.

    `connect`, then iterate: the iterator yields acknowledgements and events, routes answers to
    whoever asked, and ends when the worker goes away. `ask` needs somebody who iterates.

    Attributes:
        hello: what the worker said of itself when the connection was made.
        peer_pid: the worker's process by the kernel's word (SO_PEERCRED), not by its own.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.hello: Hello | None = None
        self.peer_pid = 0
        self._socket: socket.socket | None = None
        self._asked: dict[int, tuple[list[dict[str, object]], asyncio.Future[None]]] = {}
        self._borrowing: asyncio.Future[dict[str, socket.socket]] | None = None
        self._next_request = 0
        self._sending = asyncio.Lock()
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def connected(self) -> bool:
        """Whether the worker is there."""
        return self._socket is not None

    async def connect(self, timeout_s: float) -> Hello:
        """Connect, trying again until the worker listens, and return its greeting.

        Raises:
            TimeoutError: nobody listened, or said hello, within `timeout_s`.
            ChannelError: who listens does not speak this protocol.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    return await self._connect_once()
                except (*_NOT_YET, ChannelClosedError):
                    await asyncio.sleep(CONNECT_INTERVAL_S)
                except (OSError, FramingError) as error:
                    raise ChannelError(f"{self.path}: {error}") from error

    async def _connect_once(self) -> Hello:
        """Make one attempt."""
        self.close()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connection.setblocking(False)
            connection.connect(str(self.path))
            _widen(connection)
            self._socket = connection
            self.peer_pid = _peer_pid(connection)
            greeting = await self._receive()
        except BaseException:
            self._socket = None
            connection.close()
            raise
        if not isinstance(greeting, Hello):
            self.close()
            raise ChannelError(f"{self.path}: first message is not a greeting")
        self.hello = greeting
        return greeting

    async def announce(self, revision: int, path: Path | str) -> None:
        """Tell the worker that a snapshot is there.

        Raises:
            ChannelClosedError: the worker is gone.
        """
        await self.send(Announce(revision, str(path)))

    async def pause(self, for_s: float, timeout_s: float = 5.0) -> None:
        """Have the worker leave packets in its queue (see `messages.Pause`); returns when it does.

        Raises:
            ChannelClosedError: the worker is gone.
            TimeoutError: it did not answer within `timeout_s`.
        """
        await self.send(Pause(for_s))
        await self.ask("status", timeout_s)  # it answers in order

    async def drain(self, deadline_s: float) -> None:
        """Ask the worker to finish and exit within `deadline_s` seconds.

        Raises:
            ChannelClosedError: the worker is gone.
        """
        await self.send(Drain(deadline_s))

    async def ask(self, what: str, timeout_s: float = 5.0) -> list[dict[str, object]]:
        """Return the worker's rows about `what` (see `messages.Ask`).

        Raises:
            ChannelClosedError: the worker is gone, or went while answering.
            TimeoutError: it did not answer within `timeout_s`.
        """
        return await self._answer_to(Ask(self._number(), what), timeout_s)

    async def forget(
        self,
        sources: tuple[tuple[bytes, int], ...] | None,
        destinations: tuple[tuple[bytes, int], ...] | None,
        timeout_s: float = 5.0,
    ) -> list[dict[str, object]]:
        """Have the worker forget flows (see `messages.Forget`); return one row for each.

        Raises:
            ChannelClosedError: the worker is gone, or went while answering.
            TimeoutError: it did not answer within `timeout_s`; it may have forgotten them.
        """
        return await self._answer_to(Forget(self._number(), sources, destinations), timeout_s)

    def _number(self) -> int:
        """Return a number that no request of ours has."""
        self._next_request += 1
        return self._next_request

    async def _answer_to(self, question: Ask | Forget, timeout_s: float) -> list[dict[str, object]]:
        """Send a question and gather its answer."""
        rows: list[dict[str, object]] = []
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked[question.request] = (rows, done)
        try:
            async with asyncio.timeout(timeout_s):
                await self.send(question)
                await done
        finally:
            self._asked.pop(question.request, None)
        return rows

    async def borrow(self, timeout_s: float = 5.0) -> dict[str, socket.socket]:
        """Return copies of the worker's listening sockets, by name; needs somebody who iterates.

        Raises:
            ChannelClosedError: the worker is gone.
            TimeoutError: it did not answer within `timeout_s`.
        """
        lent: asyncio.Future[dict[str, socket.socket]] = asyncio.get_running_loop().create_future()
        self._borrowing = lent
        try:
            async with asyncio.timeout(timeout_s):
                await self.send(Lend())
                return await lent
        finally:
            self._borrowing = None

    async def send(self, message: ToWorker) -> None:
        """Send one message, waiting for room.

        Raises:
            ChannelClosedError: the worker is gone.
        """
        async with self._sending:
            for part in datagrams(message):
                await self._transmit(part.payload)

    async def __aiter__(self) -> AsyncIterator[FromWorker]:
        """Yield what the worker sends, except answers; end when it is gone."""
        while True:
            try:
                message = await self._receive()
            except (ChannelClosedError, FramingError):
                self.close()
                return
            if isinstance(message, Answer):
                self._answered(message)
            else:
                yield message

    def close(self) -> None:
        """Close the connection; whoever waits for an answer gets ChannelClosedError."""
        if self._socket is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket.fileno())
            loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._socket = None
        for waiter in self._waiting:
            _settle(waiter)
        for _, done in self._asked.values():
            if not done.done():
                done.set_exception(ChannelClosedError(f"{self.path}: the worker is gone"))
        self._asked.clear()
        if self._borrowing is not None and not self._borrowing.done():
            self._borrowing.set_exception(ChannelClosedError(f"{self.path}: the worker is gone"))

    def _answered(self, part: Answer) -> None:
        """Give a part of an answer to whoever asked; late ones find nobody."""
        asked = self._asked.get(part.request)
        if asked is None:
            return
        rows, done = asked
        rows.extend(part.rows)
        if part.last and not done.done():
            done.set_result(None)

    async def _receive(self) -> FromWorker:
        """Wait for one message."""
        while True:
            connection = self._connection()
            try:
                payload, lent = _read_with_sockets(connection)
            except BlockingIOError:
                await self._readable(connection)
            except OSError as error:
                raise ChannelClosedError(f"{self.path}: {error.strerror}") from error
            else:
                message = decode_from_worker(payload)
                if not isinstance(message, Lent):
                    return message
                self._take(dict(zip(message.names, lent, strict=False)))

    def _take(self, lent: dict[str, socket.socket]) -> None:
        """Give sockets to whoever borrows; late ones find nobody."""
        if self._borrowing is not None and not self._borrowing.done():
            self._borrowing.set_result(lent)
        else:
            close_all(lent)

    async def _transmit(self, payload: bytes) -> None:
        """Send one datagram, waiting for room."""
        while True:
            connection = self._connection()
            try:
                connection.send(payload, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await self._writable(connection)
            except OSError as error:
                raise ChannelClosedError(f"{self.path}: {error.strerror}") from error
            else:
                return

    def _connection(self) -> socket.socket:
        if self._socket is None:
            raise ChannelClosedError(f"{self.path}: not connected")
        return self._socket

    async def _readable(self, connection: socket.socket) -> None:
        """Wait until the connection can be read, or was closed."""
        loop = asyncio.get_running_loop()
        with self._waiter() as ready:
            loop.add_reader(connection.fileno(), _settle, ready)
            try:
                await ready
            finally:
                if connection.fileno() >= 0:
                    loop.remove_reader(connection.fileno())

    async def _writable(self, connection: socket.socket) -> None:
        """Wait until the connection can be written, or was closed."""
        loop = asyncio.get_running_loop()
        with self._waiter() as ready:
            loop.add_writer(connection.fileno(), _settle, ready)
            try:
                await ready
            finally:
                if connection.fileno() >= 0:
                    loop.remove_writer(connection.fileno())

    @contextlib.contextmanager
    def _waiter(self) -> Iterator[asyncio.Future[None]]:
        """Lend a future that `close` settles too."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(ready)
        try:
            yield ready
        finally:
            self._waiting.discard(ready)


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
        return _peer_pid(probe)


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


def _read(connection: socket.socket) -> bytes:
    """Read one datagram; sockets that come with it are closed.

    Raises:
        BlockingIOError: nothing is there.
        ChannelClosedError: the end, or a datagram above the limit (not of this protocol).
    """
    payload, sockets = _read_with_sockets(connection)
    for sock in sockets:
        sock.close()
    return payload


def _read_with_sockets(connection: socket.socket) -> tuple[bytes, list[socket.socket]]:
    """Read one datagram and the sockets that come with it; raises as `_read`."""
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
        for sock in sockets:
            sock.close()
        if not payload:
            raise ChannelClosedError("the other side closed")
        raise ChannelClosedError(f"datagram of more than {MAX_MESSAGE_BYTES} bytes")
    return payload, sockets


def _widen(connection: socket.socket) -> None:
    """Ask for a large send buffer: beyond wmem_max with CAP_NET_ADMIN, up to it without."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, BUFFER_BYTES)
    except PermissionError:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)


_SO_SNDBUFFORCE = 32  # asm-generic/socket.h; the socket module does not name it


def _peer_pid(connection: socket.socket) -> int:
    """Return the pid that listened (or connected) at the other end."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid: int = _PEERCRED.unpack(data)[0]
    return pid


def _settle(ready: asyncio.Future[None]) -> None:
    """Wake whoever waits, once."""
    if not ready.done():
        ready.set_result(None)
