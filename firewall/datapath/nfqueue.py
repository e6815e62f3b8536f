"""One netfilter queue: packets come, each leaves with exactly one verdict.

Theory of operation. The NetfilterQueue library (Cython over libnetfilter_queue) binds the queue and
decodes the messages. It lacks five things that this module adds on its socket:

- GSO: without NFQA_CFG_F_GSO the kernel splits and checksums every large segment before queueing
  it. The flag is set by one netlink message of our own; it must come from the same socket, since
  the kernel refuses configuration from any but the queue's owner (nfqnl_recv_config).
- Loss: NETLINK_NO_ENOBUFS and a forced buffer size; what is lost all the same is counted by the
  kernel (`kernel.read_queues`, user_dropped).
- Fairness: the library reads until nothing waits, which under load is never. `receive` gives it a
  stand-in for the socket that reports "nothing more" after a number of messages.
- Batches: nearly every packet is accepted, and one NFQNL_MSG_VERDICT_BATCH accepts everything up
  to a packet's number. So accepts gather until the turn is over, nothing waits, or there are
  `ACCEPTS_PER_BATCH`; that saves a third of the processor time. Other verdicts go out at once and
  take their packet out of the queue, so no later batch can accept it; a drop that cannot be sent
  is therefore the end of the queue (VerdictLostError).
- Refused verdicts: the kernel answers a verdict for a packet that it no longer holds (its queue was
  flushed because somebody deleted an nft base chain) with an error message. The stand-in sees and
  counts it.

A packet that never gets a verdict would occupy its place in the queue until the queue is unbound;
so `Queue` drops what the callback fails at.
"""

import errno
import os
import socket
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

import netfilterqueue

DEFAULT_COPY_BYTES = 256
"""Head of each packet that is copied: IPv6, some extension headers and the longest TCP header."""

MAX_COPY_BYTES = 4016
"""Most that the library takes from a packet (its 4096-byte buffer less 80 bytes of metadata)."""

DEFAULT_LENGTH = 8192
"""Packets that may wait: a tenth of a second at 80,000 packets/s."""

DEFAULT_BUFFER_BYTES = 16 * 1024 * 1024
"""Socket buffer: DEFAULT_LENGTH messages at about 2 KiB of kernel memory each (skb truesize)."""

ACCEPTS_PER_BATCH = 32
"""Accepts that one message carries at most: the first waits less than half a millisecond for it."""

_SOL_NETLINK = 270  # linux/socket.h
_NETLINK_NO_ENOBUFS = 5  # linux/netlink.h
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_CONFIG = 3 << 8 | 2  # NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG
_VERDICT = 3 << 8 | 1  # NFQNL_MSG_VERDICT
_VERDICT_BATCH = 3 << 8 | 3  # NFQNL_MSG_VERDICT_BATCH
_REQUEST = 1  # NLM_F_REQUEST
_REQUEST_ACK = 1 | 4  # NLM_F_REQUEST | NLM_F_ACK
_ERROR_TYPE = struct.pack("=H", 2)  # NLMSG_ERROR
_CFG_MASK = 4  # NFQA_CFG_MASK
_CFG_FLAGS = 5  # NFQA_CFG_FLAGS
_FLAG_GSO = 1 << 2  # NFQA_CFG_F_GSO
_HEADER_BYTES = 16  # struct nlmsghdr
_QUEUE_HEADER = struct.Struct("!BBH")  # struct nfgenmsg: family, version, queue
_VERDICT_HDR = 2  # NFQA_VERDICT_HDR
_VERDICT_BODY = struct.Struct("!II")  # struct nfqnl_msg_verdict_hdr: verdict, packet number
_VERDICT_BYTES = 4 + _VERDICT_BODY.size  # with the attribute's header
_BE32 = struct.Struct("!I")
_MARK_HEAD = struct.pack("=HH", 8, 3)  # NFQA_MARK
_MARK_BYTES = len(_MARK_HEAD) + _BE32.size
_DROP, _ACCEPT, _REPEAT = 0, 1, 4  # NF_DROP, NF_ACCEPT, NF_REPEAT, linux/netfilter.h
_ANSWER_BYTES = 65536
_ANSWER_TIMEOUT_S = 5.0
_QUEUES = Path("/proc/self/net/netfilter/nfnetlink_queue")


class QueuedPacket(Protocol):
    """What the library hands to the callback; valid until the callback returns.

    Attributes:
        id: the packet's number in its queue; rises with every packet.
        hook: NF_INET_PRE_ROUTING (0) or NF_INET_LOCAL_OUT (3), linux/netfilter.h.
        indev: index of the interface where it arrived, 0 = sent by this node.
        physindev: index of the port of the bridge where it arrived, 0 = through no bridge.
        mark: the packet's mark.
    """

    id: int
    hook: int
    indev: int
    physindev: int
    mark: int

    def get_payload(self) -> bytes:
        """Return the copied head of the packet, from the IP header on."""


class QueueError(Exception):
    """The queue cannot be had; the text says why and what would mend it."""


class VerdictLostError(Exception):
    """A packet could not be dropped; the queue must be closed, which drops all that waits.

    Going on is no choice: the next batch of accepts would let the packet pass.
    """


class _Turn:
    """Stands in for the socket during one `receive`: at most `left` messages."""

    __slots__ = ("early", "left", "read", "refused_count")

    def __init__(self, connection: socket.socket) -> None:
        self.read = connection.recv
        self.left = 0
        self.refused_count = 0
        self.early: list[bytes] = []

    def recv(self, size: int) -> bytes:
        """Return the next message about a packet.

        Raises:
            BlockingIOError: nothing waits, or this turn is over.
        """
        while self.left > 0:
            message = self.early.pop(0) if self.early else self.read(size)
            self.left -= 1
            if message[4:6] != _ERROR_TYPE:  # struct nlmsghdr: u32 length, u16 type
                return message
            self.refused_count += 1
        raise BlockingIOError(errno.EAGAIN, "this turn is over")


class Queue:
    """A bound queue.

    Attributes:
        number: the queue's.
        copy_bytes: how much of each packet is copied; a longer packet is cut to this.
        gso: whether the kernel hands over large segments whole.
        buffer_bytes: receive buffer granted, as the kernel counts it.
        batch_count: accepts that one message carries at most.

    Raises:
        QueueError: no permission, no NFQUEUE in the kernel, or another process has the queue.
    """

    def __init__(
        self,
        number: int,
        callback: Callable[[QueuedPacket], None],
        *,
        copy_bytes: int = DEFAULT_COPY_BYTES,
        length: int = DEFAULT_LENGTH,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        gso: bool = True,
    ) -> None:
        """Bind the queue.

        Args:
            number: 0..65535.
            callback: called for each packet; gives it one verdict by `accept`, `drop` or `repeat`
                of this queue. What it raises over is dropped, unless it has its verdict, and the
                exception goes to the caller of `receive`.
            copy_bytes: cut to MAX_COPY_BYTES.
            length: packets that may wait for a verdict; the kernel drops beyond.
            buffer_bytes: receive buffer to ask for.
            gso: ask for large segments whole.
        """
        self.number = number
        self.copy_bytes = copy_bytes = min(copy_bytes, MAX_COPY_BYTES)
        self.batch_count = ACCEPTS_PER_BATCH
        self._callback = callback
        self._decided_id = -1
        self._accepted_id = 0
        self._accepted_count = 0
        self._batch_head = _verdict_head(_VERDICT_BATCH, number, _VERDICT_BYTES)
        self._head = _verdict_head(_VERDICT, number, _VERDICT_BYTES)
        self._head_with_mark = _verdict_head(_VERDICT, number, _VERDICT_BYTES + _MARK_BYTES)
        self._library = _bind(number, self._decide, copy_bytes, length, buffer_bytes)
        # Another descriptor of the same socket: options and messages of our own.
        self._socket = socket.socket(fileno=os.dup(self._library.get_fd()))
        self._turn = _Turn(self._socket)
        self._stand_in = cast("socket.socket", self._turn)
        try:
            self.buffer_bytes = _widen(self._socket, buffer_bytes)
            self.gso = gso and self._set_flags(_FLAG_GSO)
            self._socket.setblocking(False)
        except OSError as error:
            self.close()
            raise QueueError(f"queue {number}: {error.strerror}") from error

    def fileno(self) -> int:
        """Return the descriptor that is readable when packets wait."""
        return self._socket.fileno()

    @property
    def refused_count(self) -> int:
        """How many verdicts came too late: the kernel did not hold the packet any more."""
        return self._turn.refused_count

    def receive(self, limit_count: int) -> int:
        """Handle the packets that wait, at most so many; return how many messages were read.

        Raises:
            VerdictLostError: close the queue.
            Exception: whatever the callback raised; its packet has been dropped.
        """
        turn = self._turn
        turn.left = limit_count
        self._library.run_socket(self._stand_in)
        self._send_accepts()
        return limit_count - turn.left

    def accept(self, packet: QueuedPacket) -> None:
        """Let a packet go on; sent with others, at the end of the turn at the latest."""
        self._decided_id = self._accepted_id = packet.id
        self._accepted_count += 1
        if self._accepted_count >= self.batch_count:
            self._send_accepts()

    def drop(self, packet: QueuedPacket) -> None:
        """Stop a packet.

        Raises:
            OSError: the verdict could not be sent.
        """
        self._socket.send(self._head + _VERDICT_BODY.pack(_DROP, packet.id))
        self._decided_id = packet.id

    def repeat(self, packet: QueuedPacket, mark: int) -> None:
        """Send a packet with this mark through the rules of its hook once more.

        What was accepted before it leaves before it.

        Raises:
            OSError: the verdict could not be sent.
        """
        self._send_accepts()
        body = _VERDICT_BODY.pack(_REPEAT, packet.id) + _MARK_HEAD + _BE32.pack(mark)
        self._socket.send(self._head_with_mark + body)
        self._decided_id = packet.id

    def close(self) -> None:
        """Unbind; the kernel drops what still waits. May be called twice."""
        self._library.unbind()
        self._socket.close()

    def _decide(self, packet: QueuedPacket) -> None:
        """Have the callback decide; drop what it fails at."""
        try:
            self._callback(packet)
        except BaseException as error:
            if self._decided_id != packet.id:
                try:
                    self.drop(packet)
                except OSError:
                    raise VerdictLostError(f"queue {self.number}: no verdict") from error
            self._send_accepts()
            raise

    def _send_accepts(self) -> None:
        """Accept everything up to the last accepted packet: all else before it is decided."""
        if self._accepted_count:
            self._socket.send(self._batch_head + _VERDICT_BODY.pack(_ACCEPT, self._accepted_id))
            self._accepted_count = 0

    def _set_flags(self, flags: int) -> bool:
        """Ask the kernel for queue flags; False if it does not know them (before Linux 3.10)."""
        self._socket.settimeout(_ANSWER_TIMEOUT_S)
        self._socket.send(_flags_message(self.number, flags))
        while True:
            answer = self._socket.recv(_ANSWER_BYTES)
            if answer[4:6] != _ERROR_TYPE:
                self._turn.early.append(answer)  # a packet that came before the answer
                continue
            return struct.unpack_from("=i", answer, _HEADER_BYTES) == (0,)


def _bind(
    number: int,
    callback: Callable[[QueuedPacket], None],
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
    connection.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def _verdict_head(kind: int, number: int, body_bytes: int) -> bytes:
    """Return what precedes verdict and packet number in a verdict message of this queue."""
    length = _HEADER_BYTES + _QUEUE_HEADER.size + body_bytes
    header = struct.pack("=IHHII", length, kind, _REQUEST, 0, 0)
    attribute = struct.pack("=HH", _VERDICT_BYTES, _VERDICT_HDR)
    return header + _QUEUE_HEADER.pack(socket.AF_UNSPEC, 0, number) + attribute


def _flags_message(number: int, flags: int) -> bytes:
    """Return NFQNL_MSG_CONFIG that sets these flags and no others (nfnetlink_queue.h)."""
    body = _QUEUE_HEADER.pack(socket.AF_UNSPEC, 0, number)
    for kind in (_CFG_FLAGS, _CFG_MASK):
        body += struct.pack("=HH", 8, kind) + struct.pack("!I", flags)
    header = struct.pack("=IHHII", _HEADER_BYTES + len(body), _CONFIG, _REQUEST_ACK, 0, 0)
    return header + body
