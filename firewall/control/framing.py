"""Messages as datagrams: encode, split what is too large, decode strictly.

Pure. Every datagram is one MessagePack map with a `type` tag (see `messages`) of at most
`MAX_MESSAGE_BYTES`. Only `Events` and `Answer` can grow, so only they are split: in halves until
each part fits, in order, so that a reader that appends the parts has the whole. A part that cannot
be halved any more (one single event or row above the limit) is left out and reported to the caller.
"""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from firewall.control.messages import MAX_MESSAGE_BYTES, Answer, Events, FromWorker, ToWorker

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class FramingError(ValueError):
    """The datagram is not a message of this protocol; the text says why."""


class Datagram(NamedTuple):
    """One encoded message.

    `items` counts the events or rows that it carries; 0 for every other kind of message.
    `oversize` says that `payload` is empty because a single item exceeds the limit.
    """

    payload: bytes
    items: int
    oversize: bool = False


def datagrams(
    message: ToWorker | FromWorker, limit_bytes: int = MAX_MESSAGE_BYTES
) -> Iterator[Datagram]:
    """Yield the datagrams that carry `message`, each of at most `limit_bytes`.

    The `lost_count` of an `Events` travels with its first part, the `last` of an `Answer` with its
    last one.
    """
    payload = _encoder.encode(message)
    items = _items(message)
    if len(payload) <= limit_bytes:
        yield Datagram(payload, items)
    elif isinstance(message, Events) and items > 1:
        half = items // 2
        yield from datagrams(Events(message.events[:half], message.lost_count), limit_bytes)
        yield from datagrams(Events(message.events[half:]), limit_bytes)
    elif isinstance(message, Answer) and items > 1:
        half = items // 2
        first = Answer(message.request, message.rows[:half], last=False)
        yield from datagrams(first, limit_bytes)
        rest = Answer(message.request, message.rows[half:], message.last)
        yield from datagrams(rest, limit_bytes)
    elif isinstance(message, Answer):
        # The end marker must arrive even if the row that carried it cannot.
        yield Datagram(b"", items, oversize=True)
        yield from datagrams(Answer(message.request, (), message.last), limit_bytes)
    else:
        yield Datagram(b"", items, oversize=True)


def decode_to_worker(payload: bytes) -> ToWorker:
    """Read what an agent sent.

    Raises:
        FramingError: not a message, or one that only workers send.
    """
    try:
        return _to_worker.decode(payload)
    except msgspec.MsgspecError as error:
        raise FramingError(f"not a message to a worker: {error}") from error


def decode_from_worker(payload: bytes) -> FromWorker:
    """Read what a worker sent.

    Raises:
        FramingError: not a message, or one that only the agent sends.
    """
    try:
        return _from_worker.decode(payload)
    except msgspec.MsgspecError as error:
        raise FramingError(f"not a message from a worker: {error}") from error


def _items(message: ToWorker | FromWorker) -> int:
    """Count what a message carries a list of."""
    match message:
        case Events():
            return len(message.events)
        case Answer():
            return len(message.rows)
        case _:
            return 0
