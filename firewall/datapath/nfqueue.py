"""One netfilter queue: packets come, each leaves with exactly one verdict.

Theory of operation. The NetfilterQueue library (Cython over libnetfilter_queue) binds the queue.
From then on this module reads and writes the socket itself (`queued` knows the messages), since
the library lacks what a firewall needs:

- GSO: without NFQA_CFG_F_GSO the kernel splits and checksums every large segment before queueing
  it. The flag is set by one netlink message of our own; it must come from the same socket, since
  the kernel refuses configuration from any but the queue's owner (nfqnl_recv_config).
- Loss: NETLINK_NO_ENOBUFS and a forced buffer size; what is lost all the same is counted by the
  kernel (`kernel.read_queues`, user_dropped).
- Fairness: the library reads until nothing waits, which under load is never. `receive` ends after a
  number of messages.
- Batches: nearly every packet is accepted, and one NFQNL_MSG_VERDICT_BATCH accepts everything up
  to a packet's number. So accepts gather until the turn is over, nothing waits, or there are
  `ACCEPTS_PER_BATCH`; that saves a quarter of what the loop takes. Other verdicts go out at once
  and take their packet out of the queue, so no later batch can accept it; a drop that cannot be
  sent is therefore the end of the queue (VerdictLostError).
- Refused verdicts: the kernel answers a verdict for a packet that it no longer holds (its queue was
  flushed because somebody deleted an nft base chain) with an error message, which is counted.

The socket is read as a file (`io.FileIO`): where nothing waits it says None, while `recv` raises an
exception, at the cost of half a packet; and nothing waits at the end of nearly every turn.

A packet that never gets a verdict would occupy its place in the queue until the queue is unbound;
so `Queue` drops what the callback fails at.
"""

import io
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import netfilterqueue

from firewall.datapath.netlink import SOL_NETLINK, error_code
from firewall.datapath.queued import (
    FLAG_GSO,
    METADATA_BYTES,
    QueuedPacket,
    Verdicts,
    flags_message,
    is_error,
    read_packet,
)

DEFAULT_COPY_BYTES = 256
"""Head of each packet that is copied: IPv6, some extension headers and the longest TCP header."""

MAX_COPY_BYTES = 4016
"""Most that the library asks the kernel for."""

DEFAULT_LENGTH = 8192
"""Packets that may wait: a tenth of a second at 80,000 packets/s."""

DEFAULT_BUFFER_BYTES = 16 * 1024 * 1024
"""Socket buffer: DEFAULT_LENGTH messages at about 2 KiB of kernel memory each (skb truesize)."""

ACCEPTS_PER_BATCH = 32
"""Accepts that one message carries at most: the first waits less than half a millisecond for it."""

_NETLINK_NO_ENOBUFS = 5  # linux/netlink.h
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_ANSWER_BYTES = 65536
_ANSWER_TIMEOUT_S = 5.0
_QUEUES = Path("/proc/self/net/netfilter/nfnetlink_queue")


Callback = Callable[[int, int, int, int, int, bytes], None]
"""What decides a packet; its arguments are those of `QueuedPacket`."""


class QueueError(Exception):
    """The queue cannot be had; the text says why and what would mend it."""


class VerdictLostError(Exception):
    """A packet could not be dropped; the queue must be closed, which drops all that waits.

    Going on is no choice: the next batch of accepts would let the packet pass.
    """


class Queue:
    """A bound queue.

    Attributes:
        number: the queue's.
        copy_bytes: how much of each packet is copied; a longer packet is cut to this.
        gso: whether the kernel hands over large segments whole.
        buffer_bytes: receive buffer granted, as the kernel counts it.
        refused_count: how many verdicts came too late: the kernel did not hold the packet any more.
        batch_count: accepts that one message carries at most.

    Raises:
        QueueError: no permission, no NFQUEUE in the kernel, or another process has the queue.
    """

    def __init__(
        self,
        number: int,
        callback: Callback,
        *,
        copy_bytes: int = DEFAULT_COPY_BYTES,
        length: int = DEFAULT_LENGTH,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        gso: bool = True,
    ) -> None:
        """Bind the queue.

        Args:
            number: 0..65535.
            callback: called for each packet; gives it one verdict by `accept`, `accept_marked`,
                `drop` or `repeat` of this queue. What it raises over is dropped, unless it has its
                verdict, and the exception goes to the caller of `receive`.
            copy_bytes: cut to MAX_COPY_BYTES.
            length: packets that may wait for a verdict; the kernel drops beyond.
            buffer_bytes: receive buffer to ask for.
            gso: ask for large segments whole.
        """
        self.number = number
        self.copy_bytes = copy_bytes = min(copy_bytes, MAX_COPY_BYTES)
        self.batch_count = ACCEPTS_PER_BATCH
        self.refused_count = 0
        self._callback = callback
        self._message_bytes = METADATA_BYTES + copy_bytes
        self._verdicts = Verdicts(number)
        self._decided = -1
        self._accepted = 0
        self._accepted_count = 0
        self._early: list[QueuedPacket] = []
        self._library = _bind(number, self._keep, copy_bytes, length, buffer_bytes)
        # Another descriptor of the same socket: options and messages of our own.
        self._socket = socket.socket(fileno=os.dup(self._library.get_fd()))
        self._file = io.FileIO(self._socket.fileno(), closefd=False)
        self._read = self._file.read
        try:
            self.buffer_bytes = _widen(self._socket, buffer_bytes)
            self.gso = gso and self._set_flags(FLAG_GSO)
            self._socket.setblocking(False)
        except OSError as error:
            self.close()
            raise QueueError(f"queue {number}: {error.strerror}") from error

    def fileno(self) -> int:
        """Return the descriptor that is readable when packets wait."""
        return self._socket.fileno()

    def receive(self, limit_count: int) -> int:
        """Handle the packets that wait, at most so many; return how many messages were read.

        Raises:
            VerdictLostError: close the queue.
            Exception: whatever the callback raised; its packet has been dropped.
        """
        while self._early:  # few, and once
            self._decide(self._early.pop(0))
        read, size = self._read, self._message_bytes
        count = 0
        while count < limit_count:
            message = read(size)
            if message is None:
                break
            count += 1
            if is_error(message):
                self.refused_count += 1
            else:
                self._decide(read_packet(message))
        self._send_accepts()
        return count

    def accept(self, packet: int) -> None:
        """Let a packet go on; sent with others, at the end of the turn at the latest."""
        self._decided = self._accepted = packet
        self._accepted_count += 1
        if self._accepted_count >= self.batch_count:
            self._send_accepts()

    def accept_marked(self, packet: int, mark: int) -> None:
        """Let a packet go on with this mark, after those that were accepted before it.

        Raises:
            OSError: the verdict could not be sent.
        """
        self._send_accepts()
        self._socket.send(self._verdicts.accept(packet, mark))
        self._decided = packet

    def drop(self, packet: int) -> None:
        """Stop a packet.

        Raises:
            OSError: the verdict could not be sent.
        """
        self._socket.send(self._verdicts.drop(packet))
        self._decided = packet

    def repeat(self, packet: int, mark: int) -> None:
        """Send a packet with this mark through the rules of its hook once more.

        What was accepted before it leaves before it.

        Raises:
            OSError: the verdict could not be sent.
        """
        self._send_accepts()
        self._socket.send(self._verdicts.repeat(packet, mark))
        self._decided = packet

    def close(self) -> None:
        """Unbind; the kernel drops what still waits. May be called twice."""
        self._library.unbind()
        self._file.close()
        self._socket.close()

    def _decide(self, packet: QueuedPacket) -> None:
        """Have the callback decide; drop what it fails at."""
        try:
            self._callback(*packet)
        except BaseException as error:
            number = packet[0]
            if self._decided != number:
                try:
                    self.drop(number)
                except OSError:
                    raise VerdictLostError(f"queue {self.number}: no verdict") from error
            self._send_accepts()
            raise

    def _send_accepts(self) -> None:
        """Accept everything up to the last accepted packet: all else before it is decided."""
        if self._accepted_count:
            self._socket.send(self._verdicts.accept_up_to(self._accepted))
            self._accepted_count = 0

    def _keep(self, packet: netfilterqueue.Packet) -> None:
        """Keep a packet that came while the library was still binding the queue."""
        place = packet.indev, packet.physindev
        self._early.append((packet.id, packet.hook, *place, packet.mark, packet.get_payload()))

    def _set_flags(self, flags: int) -> bool:
        """Ask the kernel for queue flags; False if it does not know them (before Linux 3.10)."""
        self._socket.settimeout(_ANSWER_TIMEOUT_S)
        self._socket.send(flags_message(self.number, flags))
        while True:
            answer = self._socket.recv(_ANSWER_BYTES)
            if is_error(answer):
                return error_code(answer) == 0
            self._early.append(read_packet(answer))  # it came before the answer


def _bind(
    number: int,
    callback: Callable[[netfilterqueue.Packet], None],
    copy_bytes: int,
    length: int,
    buffer_bytes: int,
) -> netfilterqueue.NetfilterQueue:
    """Create the library's object and bind it.

    Raises:
        QueueError: the kernel refused.
    """
    try:
        library = netfilterqueue.NetfilterQueue()
        with warnings.catch_warnings():
            # It warns of a smaller buffer than asked for; `_widen` forces the size.
            warnings.simplefilter("ignore", RuntimeWarning)
            library.bind(
                number,
                callback,
                max_len=length,
                mode=netfilterqueue.COPY_PACKET,
                range=copy_bytes,
                sock_len=buffer_bytes,
            )
    except OSError as error:
        raise QueueError(f"queue {number}: {error} {_why_not(number)}") from error
    return library


def _why_not(number: int) -> str:
    """Say what most likely prevented the binding."""
    try:
        owners = {line.split()[0]: line.split()[1] for line in _QUEUES.read_text().splitlines()}
    except FileNotFoundError:
        return "(the kernel has no NFQUEUE: modprobe nfnetlink_queue)"
    except PermissionError:
        return "(run as root, or with CAP_NET_ADMIN)"
    if str(number) in owners:
        return f"(another socket reads it, netlink port {owners[str(number)]}, mostly a pid)"
    return "(run as root, or with CAP_NET_ADMIN)"


def _widen(connection: socket.socket, wanted_bytes: int) -> int:
    """Make the receive buffer large and losses silent; return what the kernel granted."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, wanted_bytes)
    except PermissionError:  # CAP_NET_ADMIN of a user namespace does not reach beyond rmem_max
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted_bytes)
    # Without it a full buffer makes recv fail with ENOBUFS once more per loss.
    connection.setsockopt(SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
