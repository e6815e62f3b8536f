"""The chunks of an SCTP packet, as far as they were copied (RFC 9260 section 3.2).

The chunks that move an association come first in a packet (section 6.10), so what a short copy cuts
off is data.
"""

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from conntrack.packet import Packet
from conntrack.sctp_states import CHUNK_OF_TYPE, SctpChunk

REFLECTED: Final = 1  # T bit: the tag is the receiver's own (section 3.3.7)
_HEADER_BYTES: Final = 4  # type, flags, length
_INIT_BYTES: Final = 20  # section 3.3.2: header and fixed parameters
_DATA: Final = frozenset((0, 64))  # DATA and I-DATA (RFC 8260)

# A packet may hold hundreds of chunks: what each of them costs is looked up once.
_KINDS: Final = tuple(CHUNK_OF_TYPE.get(number, SctpChunk.OTHER) for number in range(256))
_ANNOUNCING: Final = frozenset((SctpChunk.INIT, SctpChunk.INIT_ACK))
_head: Final = Struct("!BBH").unpack_from
_new: Final = tuple.__new__  # builds a NamedTuple in a third of the time of calling its class


class Chunk(NamedTuple):
    """One chunk.

    Attributes:
        kind: its meaning for the state.
        flags: its flags byte.
        length: as stated, bytes with its header.
        tag: the tag that an INIT or INIT ACK announces; -1 if it was cut off; 0 otherwise.
        is_data: whether it carries user data.
    """

    kind: SctpChunk
    flags: int
    length: int
    tag: int
    is_data: bool


class ChunkError(ValueError):
    """A chunk that contradicts itself; the text is the reason for INVALID."""


def read_chunks(packet: Packet) -> Iterator[Chunk]:
    """Every chunk whose header was copied; its length is not compared with anything.

    Raises:
        ChunkError: a length of 0, behind which nothing can be found.
    """
    data = packet.options
    at = 0
    while at + _HEADER_BYTES <= len(data):
        number, flags, length = _head(data, at)
        if length == 0:
            raise ChunkError("chunk without length")
        kind = _KINDS[number]
        tag = 0
        if kind in _ANNOUNCING:
            whole = at + _INIT_BYTES <= len(data)
            tag = int.from_bytes(data[at + 4 : at + 8], "big") if whole else -1
        yield _new(Chunk, (kind, flags, length, tag, number in _DATA))
        at += (length + 3) & ~3  # chunks are padded to 4 bytes


_ALONE: Final = frozenset((SctpChunk.INIT, SctpChunk.INIT_ACK, SctpChunk.SHUTDOWN_COMPLETE))


def sound_chunks(packet: Packet) -> list[Chunk]:
    """All chunks of a packet that holds to RFC 9260 sections 3.2, 3.3.2 and 6.10.

    Raises:
        ChunkError: a length contradicts header or packet, an INIT announces no tag, chunks are
            bundled that must not be, or there is none.
    """
    found = []
    left_bytes = packet.payload_bytes
    for chunk in read_chunks(packet):
        kind, _, length, tag, _ = chunk
        if length < _HEADER_BYTES:
            raise ChunkError("chunk shorter than its header")
        if length > left_bytes:
            raise ChunkError("chunk longer than its packet")
        left_bytes -= (length + 3) & ~3
        if kind in _ANNOUNCING and (length < _INIT_BYTES or tag <= 0):
            raise ChunkError("INIT announces no tag")
        found.append(chunk)
    if not found:
        raise ChunkError("packet without chunks")
    if len(found) > 1 and any(chunk.kind in _ALONE for chunk in found):
        raise ChunkError("chunk that must be alone is bundled")
    return found
