"""The agent's end of the socket between it and a worker.

It is asyncio. Reading stops whenever nobody iterates, which pushes the pressure back to the worker,
where it turns into counted losses rather than into memory (`worker_channel`).
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from firewall.control.framing import FramingError, datagrams, decode_from_worker
from firewall.control.inheritance import close_all
from firewall.control.messages import (
    Announce,
    Answer,
    Ask,
    Drain,
    Forget,
    FromWorker,
    Hello,
    Lend,
    Lent,
    Pause,
    ToWorker,
)
from firewall.control.unix import ChannelClosedError, ChannelError, receive, widen

CONNECT_INTERVAL_S = 0.01
"""Pause between attempts to reach a worker that does not listen yet: what it decides before we are
there leaves no flow."""

_NOT_YET = (FileNotFoundError, ConnectionRefusedError, BlockingIOError)


class AgentChannel:
    """The agent's end of the channel to one worker.

    `connect`, then iterate: the iterator yields acknowledgements and events, routes answers to
    whoever asked, and ends when the worker goes away. `ask` needs somebody who iterates.

    Attributes:
        hello: what the worker said of itself when the connection was made.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.hello: Hello | None = None
        self._socket: socket.socket | None = None
        self._asked: dict[int, tuple[list[dict[str, object]], asyncio.Future[None]]] = {}
        self._borrowing: asyncio.Future[dict[str, socket.socket]] | None = None
        self._next_request = 0
        self._sending = asyncio.Lock()
        self._waiting: set[asyncio.Event] = set()

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
            widen(connection)
            self._socket = connection
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
            waiter.set()
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
                payload, lent = receive(connection)
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
            close_all(lent.values())

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
            loop.add_reader(connection.fileno(), ready.set)
            try:
                await ready.wait()
            finally:
                if connection.fileno() >= 0:
                    loop.remove_reader(connection.fileno())

    async def _writable(self, connection: socket.socket) -> None:
        """Wait until the connection can be written, or was closed."""
        loop = asyncio.get_running_loop()
        with self._waiter() as ready:
            loop.add_writer(connection.fileno(), ready.set)
            try:
                await ready.wait()
            finally:
                if connection.fileno() >= 0:
                    loop.remove_writer(connection.fileno())

    @contextlib.contextmanager
    def _waiter(self) -> Iterator[asyncio.Event]:
        """Lend an event that `close` sets too."""
        ready = asyncio.Event()
        self._waiting.add(ready)
        try:
            yield ready
        finally:
            self._waiting.discard(ready)
