"""Capture files to frames: pcap and pcapng, both byte orders, any resolution of time. Pure.

Input → output: `read_frames(stream, file)` yields a `Frame` per captured packet, numbered from 1 as
Wireshark numbers them. A file that is damaged or cut gives all frames before the damage, then
raises `CaptureError` with the offset and the number of the packet that could not be read.

Rules
    - Nothing is believed before it is compared: a length that leaves its block, contradicts its
      own repetition, or is larger than any link's frame is damage, and reading ends there, because
      everything behind a wrong length is noise.
    - pcapng blocks that hold no packet are stepped over (names, statistics, decryption secrets).
      A section may change the byte order, and interfaces are numbered anew in each.
    - Times become nanoseconds since the epoch. A simple packet block has none: it takes the time of
      the packet before it.

Sources: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng (block types, options, if_tsresol).
Not handled: the pre-2000 pcap variants with longer record headers (magic a1b2cd34), compression.
"""

from collections.abc import Iterator
from struct import Struct
from typing import BinaryIO, Final, NamedTuple

MAX_FRAME_BYTES: Final = 16 * 1024 * 1024
"""No link carries more; tcpdump refuses captures above 256 KiB, USB captures may be larger."""

_PCAP_MAGICS: Final[dict[bytes, tuple[str, int]]] = {
    # First four bytes → byte order, nanoseconds per unit of the fraction.
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
_SECTION: Final = 0x0A0D0D0A  # reads the same in both byte orders
_SECTION_BYTES: Final = b"\x0a\x0d\x0d\x0a"
_ORDER_MAGICS: Final = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
_INTERFACE, _OLD_PACKET, _SIMPLE_PACKET, _ENHANCED_PACKET = 1, 2, 3, 6
_OPTION_END, _OPTION_NAME, _OPTION_RESOLUTION, _OPTION_OFFSET = 0, 2, 9, 14
_SECOND_NS: Final = 1_000_000_000
_KNOWN_AS: Final = {
    b"\x1f\x8b": "gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it first",
}


class Frame(NamedTuple):
    """One captured packet, link-layer header included.

    Attributes:
        number: from 1, as the capture counts.
        offset: where its record begins in the file, bytes.
        time_ns: nanoseconds since the epoch.
        link_type: LINKTYPE number (tcpdump.org/linktypes.html).
        data: what was captured.
        length: bytes on the wire; more than `data` if the capture was limited.
        interface: name of the interface, "" = the file does not say.
    """

    number: int
    offset: int
    time_ns: int
    link_type: int
    data: bytes
    length: int
    interface: str = ""


class CaptureError(Exception):
    """The file is no capture, is damaged, or ends too early.

    Attributes:
        file: its name.
        offset: of the header, record or block that cannot be read, bytes.
        number: of the packet that would have come next.
    """

    def __init__(self, file: str, offset: int, number: int, what: str) -> None:
        super().__init__(f"{file}: offset {offset}: packet {number}: {what}")
        self.file = file
        self.offset = offset
        self.number = number


class _Source:
    """A stream that knows where it is, and which packet comes next."""

    def __init__(self, stream: BinaryIO, file: str) -> None:
        self._stream = stream
        self._file = file
        self.offset = 0
        self.start = 0
        self.number = 1

    def begin(self) -> None:
        """Remember that a record begins here: errors name its offset."""
        self.start = self.offset

    def take(self, count: int, what: str) -> bytes:
        """Read exactly so many bytes.

        Raises:
            CaptureError: the file ends before.
        """
        data = self.take_or_end(count, what)
        if data is None:
            raise self.error(f"the file ends where {what} should begin")
        return data

    def take_or_end(self, count: int, what: str) -> bytes | None:
        """Read exactly so many bytes; None if the file ends right here.

        Raises:
            CaptureError: it ends in between.
        """
        data = self._stream.read(count)
        while 0 < len(data) < count and (more := self._stream.read(count - len(data))):
            data += more
        self.offset += len(data)
        if not data and count:
            return None
        if len(data) < count:
            raise self.error(f"cut: {what} has {len(data)} of {count} bytes")
        return data

    def error(self, what: str) -> CaptureError:
        return CaptureError(self._file, self.start, self.number, what)


def read_frames(stream: BinaryIO, file: str) -> Iterator[Frame]:
    """Yield the frames of a capture in the order of the file.

    Args:
        stream: the file, opened for reading bytes; pipes will do.
        file: its name, for errors.

    Raises:
        CaptureError: no capture, damaged or cut; the frames before have been yielded.
    """
    source = _Source(stream, file)
    magic = source.take(4, "the header")
    if magic == _SECTION_BYTES:
        yield from _pcapng(source)
        return
    if magic not in _PCAP_MAGICS:
        known = next((text for start, text in _KNOWN_AS.items() if magic.startswith(start)), "")
        raise source.error(f"neither pcap nor pcapng: begins with {magic.hex()} {known}".rstrip())
    yield from _pcap(source, *_PCAP_MAGICS[magic])


# --- pcap ---------------------------------------------------------------------------------------


def _pcap(source: _Source, order: str, unit_ns: int) -> Iterator[Frame]:
    header = Struct(f"{order}HHiIII")
    record = Struct(f"{order}IIII")
    major, minor, _, _, _, network = header.unpack(source.take(header.size, "the file header"))
    if major != 2:
        raise source.error(f"pcap version {major}.{minor}; 2.4 is known")
    link_type = network & 0xFFFF  # above it: the length of a frame check sequence, and reserved
    while True:
        source.begin()
        head = source.take_or_end(record.size, "a record header")
        if head is None:
            return
        seconds, fraction, captured, length = record.unpack(head)
        _check_length(source, captured)
        data = source.take(captured, "the packet") if captured else b""
        time_ns = seconds * _SECOND_NS + fraction * unit_ns
        yield Frame(source.number, source.start, time_ns, link_type, data, max(length, captured))
        source.number += 1


def _check_length(source: _Source, captured: int) -> None:
    if captured > MAX_FRAME_BYTES:
        raise source.error(f"damaged: a packet of {captured} bytes")


# --- pcapng -------------------------------------------------------------------------------------


class _Interface(NamedTuple):
    """What an interface description says: `units` per second, `base_ns` is added to all times."""

    link_type: int
    snapshot_bytes: int
    units: int
    base_ns: int
    name: str


class _Section:
    """One section: its byte order and its interfaces."""

    def __init__(self, order: str) -> None:
        self.interfaces: list[_Interface] = []
        self.word = Struct(f"{order}I")
        self.pair = Struct(f"{order}HH")
        self.signed = Struct(f"{order}q")
        self.enhanced = Struct(f"{order}IIIII")
        self.old = Struct(f"{order}HHIIII")


def _pcapng(source: _Source) -> Iterator[Frame]:
    section = _read_section(source)
    time_ns = 0
    while True:
        source.begin()
        head = source.take_or_end(4, "a block")
        if head is None:
            return
        if head == _SECTION_BYTES:
            section = _read_section(source)
            continue
        (kind,) = section.word.unpack(head)
        body = _read_block(source, section, source.take(4, "the block's length"))
        if kind == _INTERFACE:
            section.interfaces.append(_read_interface(source, section, body))
        elif kind in (_ENHANCED_PACKET, _OLD_PACKET, _SIMPLE_PACKET):
            frame = _read_packet(source, section, kind, body, time_ns)
            time_ns = frame.time_ns
            yield frame
            source.number += 1


def _read_section(source: _Source) -> _Section:
    """Read what follows the type of a section header block."""
    length = source.take(4, "the section's length")
    magic = source.take(4, "the byte-order magic")
    if magic not in _ORDER_MAGICS:
        raise source.error(f"damaged: the byte-order magic is {magic.hex()}")
    section = _Section(_ORDER_MAGICS[magic])
    body = _read_block(source, section, length, already=4)
    if len(body) < 12:
        raise source.error("damaged: a section header too short for its version")
    major, minor = section.pair.unpack_from(body)
    if major != 1:
        raise source.error(f"pcapng version {major}.{minor}; 1.0 is known")
    return section


def _read_block(source: _Source, section: _Section, length: bytes, already: int = 0) -> bytes:
    """Read the rest of a block: body and the repetition of its length; return the body."""
    (total,) = section.word.unpack(length)
    if total < 12 + already or total % 4 or total > MAX_FRAME_BYTES + 4096:
        raise source.error(f"damaged: a block of {total} bytes")
    rest = source.take(total - 8 - already, "the block")
    (repeated,) = section.word.unpack(rest[-4:])
    if repeated != total:
        raise source.error(f"damaged: a block of {total} bytes says {repeated} at its end")
    return rest[:-4]


def _read_interface(source: _Source, section: _Section, body: bytes) -> _Interface:
    if len(body) < 8:
        raise source.error("damaged: an interface description of less than 8 bytes")
    link_type, _ = section.pair.unpack_from(body)
    (snapshot_bytes,) = section.word.unpack_from(body, 4)
    units, base_ns, name = 1_000_000, 0, ""
    for code, value in _options(source, section, body, 8):
        if code == _OPTION_RESOLUTION and len(value) >= 1:
            # The top bit says whether the rest is a power of 2 or of 10.
            units = 1 << (value[0] & 0x7F) if value[0] & 0x80 else 10 ** value[0]
        elif code == _OPTION_OFFSET and len(value) == 8:
            base_ns = section.signed.unpack(value)[0] * _SECOND_NS
        elif code == _OPTION_NAME:
            name = value.rstrip(b"\0").decode("utf-8", "replace")
    return _Interface(link_type, snapshot_bytes, units, base_ns, name)


def _options(
    source: _Source, section: _Section, body: bytes, at: int
) -> Iterator[tuple[int, bytes]]:
    while at + 4 <= len(body):
        code, length = section.pair.unpack_from(body, at)
        if code == _OPTION_END:
            return
        if at + 4 + length > len(body):
            raise source.error(f"damaged: an option of {length} bytes leaves its block")
        yield code, body[at + 4 : at + 4 + length]
        at += 4 + (length + 3 & ~3)


def _read_packet(
    source: _Source, section: _Section, kind: int, body: bytes, before_ns: int
) -> Frame:
    """Read a packet block of any of the three kinds."""
    fixed = {_ENHANCED_PACKET: 20, _OLD_PACKET: 20, _SIMPLE_PACKET: 4}[kind]
    if len(body) < fixed:
        raise source.error(f"damaged: a packet block of {len(body)} bytes")
    ticks: int | None = None
    if kind == _ENHANCED_PACKET:
        number, high, low, captured, length = section.enhanced.unpack_from(body)
        ticks = high << 32 | low
    elif kind == _OLD_PACKET:
        number, _, high, low, captured, length = section.old.unpack_from(body)
        ticks = high << 32 | low
    else:
        number, (length,) = 0, section.word.unpack_from(body)
        captured = length
    if number >= len(section.interfaces):
        raise source.error(f"damaged: interface {number} has not been described")
    interface = section.interfaces[number]
    if kind == _SIMPLE_PACKET and interface.snapshot_bytes:
        captured = min(captured, interface.snapshot_bytes)
    if captured > len(body) - fixed:
        raise source.error(f"damaged: a packet of {captured} bytes in a block of {len(body)}")
    time_ns = before_ns
    if ticks is not None:
        time_ns = interface.base_ns + ticks * _SECOND_NS // interface.units
    return Frame(
        source.number,
        source.start,
        time_ns,
        interface.link_type,
        body[fixed : fixed + captured],
        max(length, captured),
        interface.name,
    )
