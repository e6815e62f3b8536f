"""One connected socket, as its protocol has it: what asyncio calls a transport.

It does what `asyncio.Transport` says of the methods that it has, with three differences. Bytes are
sent within `write`, and wait only if the kernel does not take them. A connection that can no longer
be written to can still be read: a server that answers early and leaves has its answer in our queue
when our next write fails, and is heard before it counts as lost. A FIN after that is a loss, or a
cut answer would look complete.
"""

import asyncio
import logging
import socket
from functools import partial
from typing import Any, cast

from l7proxy.poller import READ, WRITE, Poller

_HIGH_BYTES = 64 * 1024  # asyncio's own default

_NOBODY = asyncio.Protocol()

log = logging.getLogger(__name__)


class Wire(asyncio.Transport):
    """A connection.

    Args:
        poller: tells when the socket is ready.
        sock: connected, not blocking; closed with the wire.
        protocol: is told `connection_made` at once, within this call.
    """

    __slots__ = (
        "_blocked", "_broken", "_closing", "_descriptor", "_ended", "_finishing", "_high",
        "_low", "_mask", "_paused", "_pending", "_poller", "_protocol", "_sock",
    )  # fmt: skip

    def __init__(self, poller: Poller, sock: socket.socket, protocol: asyncio.Protocol) -> None:
        self._poller = poller
        self._sock = sock
        self._descriptor = sock.fileno()
        self._protocol = protocol
        self._pending = bytearray()
        self._high = _HIGH_BYTES
        self._low = _HIGH_BYTES // 4
        self._mask = 0
        self._paused = False
        self._blocked = False
        self._finishing = False
        self._ended = False
        self._broken: OSError | None = None
        self._closing = False
        protocol.connection_made(self)
        self._watch()

    # --- events ----------------------------------------------------------------------------------

    def ready(self, events: int) -> None:
        """Write what waits and read what has come."""
        if events & WRITE and self._pending:
            self._drain()
        if events & ~WRITE:
            self.read()

    def read(self) -> None:
        """Read once and pass it on, if reading is wanted."""
        if self._paused or self._ended or self._closing:
            return
        buffer = self._poller.buffer
        try:
            size_bytes = self._sock.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if size_bytes:
            self._protocol.data_received(bytes(buffer[:size_bytes]))
        elif self._broken is not None:
            self._lose(self._broken)
        else:
            self._ended = True
            self._watch()
            if not self._protocol.eof_received():
                self.close()

    def fail(self, error: Exception) -> None:  # noqa: ARG002 - the poller has told it
        """End after an error of our own."""
        self.abort()

    def _watch(self) -> None:
        """Ask to be told of what matters now, and of nothing else."""
        mask = 0
        if not self._closing and not self._paused and not self._ended:
            mask = READ
        if self._pending:
            mask |= WRITE
        if mask == self._mask or self._descriptor < 0:
            return
        self._mask = mask
        if mask:
            self._poller.watch(self._descriptor, mask, self)
        else:  # epoll would still tell of a connection that is gone, again and again
            self._poller.forget(self._descriptor)

    # --- writing ---------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, or keep until it can be sent."""
        if self._closing or self._broken is not None:
            return
        pending = self._pending
        if not pending:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._break(error)
                return
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        pending += data
        self._watch()
        if len(pending) > self._high and not self._blocked:
            self._blocked = True
            self._protocol.pause_writing()

    def _drain(self) -> None:
        """Send what waits, as much as the kernel takes."""
        pending = self._pending
        try:
            sent = self._sock.send(pending)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(error)
            return
        del pending[:sent]
        if not pending:
            self._watch()
            if self._closing:
                self._lose(None)
                return
            if self._finishing:
                self._shutdown()
        if self._blocked and len(pending) <= self._low:
            self._blocked = False
            self._protocol.resume_writing()

    def _break(self, error: OSError) -> None:
        """Take that nothing more can be sent; what was received is still worth reading."""
        self._broken = error
        self._pending.clear()
        if self._closing or self._paused or self._ended:
            self._lose(error)
        else:
            self._watch()

    def write_eof(self) -> None:
        """Send FIN after what was written."""
        self._finishing = True
        if not self._pending and not self._closing:
            self._shutdown()

    def _shutdown(self) -> None:
        try:  # not `suppress`, which takes longer than the rest
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            log.debug("gone already, which reading tells")

    def can_write_eof(self) -> bool:
        """Whether `write_eof` works: yes."""
        return True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Choose at how many waiting bytes the protocol is told to pause, and to go on."""
        self._high = _HIGH_BYTES if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        """Return how many bytes wait."""
        return len(self._pending)

    # --- reading ---------------------------------------------------------------------------------

    def pause_reading(self) -> None:
        """Read nothing more for now."""
        self._paused = True
        self._watch()

    def resume_reading(self) -> None:
        """Read again."""
        self._paused = False
        self._watch()

    def is_reading(self) -> bool:
        """Whether what comes is read."""
        return not (self._paused or self._closing)

    # --- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Read nothing more, and close once everything was sent."""
        if self._closing:
            return
        self._closing = True
        if self._pending:
            self._watch()
        else:
            self._lose(None)

    def abort(self) -> None:
        """Close at once."""
        self._lose(None)

    def _lose(self, error: Exception | None) -> None:
        """Close the socket and tell the protocol, though not from within its own doing."""
        if self._descriptor < 0:
            return
        self._closing = True
        self._pending.clear()
        self._sock.close()
        if self._mask:
            self._poller.closed(self._descriptor)
        self._descriptor = -1
        self._poller.later(partial(self._tell_lost, error))

    def _tell_lost(self, error: Exception | None) -> None:
        # Without the way back there is no cycle, and so nothing for the garbage collector.
        protocol, self._protocol = self._protocol, _NOBODY
        protocol.connection_lost(error)

    def is_closing(self) -> bool:
        """Whether it was closed, or is as soon as everything was sent."""
        return self._closing

    # --- the rest --------------------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Tell another protocol from now on."""
        self._protocol = cast("asyncio.Protocol", protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return who is told."""
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return the socket, "sockname" or "peername"; `default` if the connection is gone."""
        if self._descriptor < 0:
            return default
        if name == "socket":
            return self._sock
        try:
            if name == "sockname":
                return self._sock.getsockname()
            if name == "peername":
                return self._sock.getpeername()
        except OSError:
            pass
        return default
