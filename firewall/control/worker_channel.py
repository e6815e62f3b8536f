"""The worker's end of the socket between it and the agent.

Theory of operation. The worker listens; the agent connects and connects again, whichever of the two
was restarted, so neither needs the other to live. SOCK_SEQPACKET keeps message borders: one
datagram is one message (`framing`).

This end never blocks and never raises for a slow or dead agent, because a verdict must not wait for
a reader: events that do not fit into the socket buffer are dropped and counted, and the next batch
that gets through carries the count. Acknowledgements and answers are few and must arrive: they wait
in a bounded outbox. A listener and a connection are two descriptors; both hang in one epoll
instance, itself pollable, so that a poll loop or asyncio watches exactly one number.
"""

import array
import contextlib
import errno
import os
import select
import socket
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from firewall.control.framing import FramingError, datagrams, decode_to_worker
from firewall.control.inheritance import close_all
from firewall.control.messages import Acknowledged, Events, FromWorker, Hello, Lent, ToWorker
from firewall.control.unix import ChannelClosedError, listen, receive, widen

OUTBOX_BYTES = 64 * 1024 * 1024
"""What answers may wait in the worker: a dump of 250,000 conntrack entries of 256 bytes."""

_READS_PER_CALL = 64


def socket_name(number: int, bank: int) -> str:
    """Return the name of a datapath worker's socket.

    While one set of workers follows another, there are two with each number, in two banks.
    """
    return f"datapath-{number}b.sock" if bank else f"datapath-{number}.sock"


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
            widen(agent)
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
                payload, sockets = receive(self._agent)
                close_all(sockets)  # an agent sends none
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
