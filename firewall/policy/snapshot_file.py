r"""The bytes of the snapshot file: one whole snapshot, then the differences that followed it.

The writer puts a whole snapshot into place and appends a difference per later revision; a reader
that holds the file's state up to some record reads on from there, one that holds nothing reads from
the start. Both end with the same snapshot. When the differences have become many the writer folds
them: a whole snapshot of the same state takes the file's place, and says so.

Each record is a header line and a payload (MessagePack):

    bartizan-snapshot <format> whole|difference <previous seal> <payload length> <seal>\n

The seal of a whole record is the SHA-256 of its payload, that of a difference the SHA-256 of the
previous record's seal and its payload: a seal stands for the state, not only for the record. The
previous seal of a whole record is that of the last record it was folded from ("-": none), so that a
reader that holds that state need not read it again.

A record that is cut short at the end of the file was never announced (the writer died over it), so
what is before it counts. Everything else that is not as it should be is refused, never half-read.
"""

import hashlib
from typing import Literal, NamedTuple

import msgspec

from firewall.policy.difference import Difference, patch
from firewall.policy.snapshot import Snapshot, SnapshotError

FORMAT = 3
"""Raised whenever the meaning or order of a field changes; other numbers are refused."""

HEADER_BYTES = 256
"""More than any header line has."""

_MAGIC = b"bartizan-snapshot"
_NOTHING = b"-"

_encoder = msgspec.msgpack.Encoder()
_snapshots = msgspec.msgpack.Decoder(Snapshot)
_differences = msgspec.msgpack.Decoder(Difference)


class Header(NamedTuple):
    """The first line of a record; `line` with its end, seals as hexadecimal text."""

    line: bytes
    kind: Literal[b"whole", b"difference"]
    previous: bytes
    length_bytes: int
    seal: bytes


class Held(NamedTuple):
    """What a reader has of a file.

    Attributes:
        snapshot: the state.
        head: header line of the whole record at the file's start; it seals that record's content.
        seal: of the last record that was read.
        end: offset behind it, in bytes.
    """

    snapshot: Snapshot
    head: bytes
    seal: bytes
    end: int


class Record(NamedTuple):
    """A record ready to be written, and its seal."""

    data: bytes
    seal: bytes


def encode(snapshot: Snapshot) -> bytes:
    """Return a snapshot file that holds one whole snapshot."""
    return whole(snapshot).data


def decode(data: bytes) -> Snapshot:
    """Read the bytes of a snapshot file, differences included.

    Raises:
        SnapshotError: not a snapshot, another format, cut short, or altered.
    """
    return read(data).snapshot


def whole(snapshot: Snapshot, folded: bytes = _NOTHING) -> Record:
    """Return the record of a whole snapshot.

    Args:
        snapshot: the state.
        folded: seal of the record that holds the same state already.
    """
    payload = _encoder.encode(snapshot)
    return _record(b"whole", folded, hashlib.sha256(payload), payload)


def step(previous: bytes, change: Difference) -> Record:
    """Return the record of a difference from the state that `previous` seals."""
    payload = _encoder.encode(change)
    digest = hashlib.sha256(previous)
    digest.update(payload)
    return _record(b"difference", previous, digest, payload)


def _record(kind: bytes, previous: bytes, digest: "hashlib._Hash", payload: bytes) -> Record:
    seal = digest.hexdigest().encode()
    line = b"%s %d %s %s %d %s\n" % (_MAGIC, FORMAT, kind, previous, len(payload), seal)
    return Record(line + payload, seal)


def read(data: bytes) -> Held:
    """Read a file from its start.

    Raises:
        SnapshotError: not a snapshot, another format, cut short, or altered.
    """
    header = parse_header(data)
    if header.kind != b"whole":
        raise SnapshotError("not a Bartizan snapshot: it begins with a difference")
    end = len(header.line) + header.length_bytes
    payload = data[len(header.line) : end]
    if len(payload) != header.length_bytes:
        raise SnapshotError(f"snapshot cut short: {len(payload)} bytes of {header.length_bytes}")
    if hashlib.sha256(payload).hexdigest().encode() != header.seal:
        raise SnapshotError("snapshot altered: its SHA-256 does not match")
    try:
        snapshot = _snapshots.decode(payload)
    except msgspec.MsgspecError as error:
        raise SnapshotError(f"snapshot does not decode: {error}") from error
    return read_on(Held(snapshot, header.line, header.seal, end), data[end:])


def read_on(held: Held, data: bytes) -> Held:
    """Apply the differences in `data`, which follow what is held.

    Raises:
        SnapshotError: one of them is altered, or follows something else.
    """
    at = 0
    while at < len(data):
        if b"\n" not in data[at : at + HEADER_BYTES]:
            break  # cut short, or no record, which only a longer file could tell
        header = parse_header(data[at : at + HEADER_BYTES])
        begin = at + len(header.line)
        payload = data[begin : begin + header.length_bytes]
        if header.kind != b"difference" or header.previous != held.seal:
            raise SnapshotError("snapshot altered: a difference follows another state")
        if len(payload) != header.length_bytes:
            break
        digest = hashlib.sha256(held.seal)
        digest.update(payload)
        if digest.hexdigest().encode() != header.seal:
            raise SnapshotError("snapshot altered: the SHA-256 of a difference does not match")
        try:
            snapshot = patch(held.snapshot, _differences.decode(payload))
        except msgspec.MsgspecError as error:
            raise SnapshotError(f"a difference does not decode: {error}") from error
        size = len(header.line) + header.length_bytes
        held = Held(snapshot, held.head, header.seal, held.end + size)
        at += size
    return held


def folded_from(head: bytes, held: Held) -> Held | None:
    """Return what is held as the whole record of another file, None if that is another state.

    Raises:
        SnapshotError: `head` is no header line.
    """
    header = parse_header(head)
    if header.kind != b"whole" or header.previous != held.seal:
        return None
    end = len(header.line) + header.length_bytes
    return Held(held.snapshot, header.line, header.seal, end)


def parse_header(data: bytes) -> Header:
    """Read the header line that `data` begins with.

    Raises:
        SnapshotError: it is none, or of another format.
    """
    line, newline, _ = data[:HEADER_BYTES].partition(b"\n")
    fields = line.split(b" ")
    if not newline or fields[0] != _MAGIC or len(fields) < 2:
        raise SnapshotError("not a Bartizan snapshot: the header line is missing")
    if fields[1] != str(FORMAT).encode():
        raise SnapshotError(
            f"snapshot format {fields[1].decode(errors='replace')}, this version reads {FORMAT}"
        )
    if len(fields) != 6 or not fields[4].isdigit():
        raise SnapshotError("not a Bartizan snapshot: the header line is damaged")
    _, _, kind, previous, length, seal = fields
    if kind == b"whole":
        return Header(line + newline, b"whole", previous, int(length), seal)
    if kind == b"difference":
        return Header(line + newline, b"difference", previous, int(length), seal)
    raise SnapshotError(f"a record of unknown kind {kind.decode(errors='replace')}")
