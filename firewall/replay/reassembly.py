"""Fragments to datagrams, as the kernel does it before a packet reaches a queue. Pure.

The tracker never sees fragments: conntrack brings the kernel's defragmentation with it, at priority
-400, before everything. A capture was taken on a link and holds the pieces, so they are put
together here by the same rules:

    - a piece that lies within what is there already is a repetition, ignored whatever its bytes
    - overlap, an IPv4 piece without a byte, one that contradicts the last one: what is there is
      given up (RFC 5722; Linux does the same for IPv4), and a later piece begins anew. IPv6 pieces
      without a byte, and those that contradict the last one, are lost alone
    - silence: a datagram whose rest has not come 30 s (IPv4) or 60 s (IPv6) after its first piece
      is forgotten (net.ipv4.ipfrag_time, net.netfilter.nf_conntrack_frag6_timeout)
    - IPv6 pieces that can never fit (a length that is not a multiple of 8 before the end, a first
      piece that ends inside the transport's header, RFC 8200 section 4.5) are handed on as they
      are: the parser refuses them. IPv4 pieces of such a length lose their odd bytes, so the
      datagram is never complete.

`now` is seconds on any monotonic clock.
"""

from typing import Final, NamedTuple

_MORE: Final = 0x2000  # IPv4 "more fragments"; the offset is the 13 bits below (RFC 791 3.1)
_OFFSET: Final = 0x1FFF
_FRAGMENT: Final = 44  # next-header value of the IPv6 fragment header (RFC 8200 section 4.5)
_CHAIN: Final = frozenset({0, 43, 60})  # hop-by-hop, routing, destination options
_AUTHENTICATION: Final = 51
_FIRST_BYTES: Final = {6: 20, 17: 8, 58: 8}
"""Of TCP, UDP and ICMPv6: how much of the transport a first IPv6 piece must have; others 1 byte."""
_IPV4_WAIT_S: Final = 30.0
_IPV6_WAIT_S: Final = 60.0
_MAX_DATAGRAM_BYTES: Final = 65535
_MAX_WAITING_COUNT: Final = 4096  # datagrams in pieces at a time; the oldest is forgotten


class Waits(NamedTuple):
    """The piece is kept until the others come, or is lost; `why` is for people."""

    why: str
    lost: bool


class _Piece(NamedTuple):
    """One fragment: `head` is what stands before it, up to and without a fragment header."""

    key: tuple[bytes, ...]
    offset: int
    more: bool
    head: bytes
    protocol: int
    body: bytes


class _Waiting:
    """A datagram in pieces.

    Attributes:
        expires_at: seconds; then it is forgotten.
        first: the piece with the header; None until it has come.
        pieces: bytes by offset.
        runs: [start, end) of pieces that came one after another at the end of what was there, in
            order. A piece within one is a repetition, one that leaves it an overlap.
        end: behind the last byte that is known of.
        total: bytes of the datagram's payload, known with the last piece.
    """

    __slots__ = ("end", "expires_at", "first", "pieces", "runs", "total")

    def __init__(self, expires_at: float) -> None:
        self.expires_at = expires_at
        self.pieces: dict[int, bytes] = {}
        self.runs: list[tuple[int, int]] = []
        self.first: _Piece | None = None
        self.end = 0
        self.total: int | None = None


class Reassembly:
    """All datagrams of a capture that wait for their rest."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[bytes, ...], _Waiting] = {}

    def add(self, packet: bytes, now: float) -> bytes | Waits:
        """Take one packet.

        Args:
            packet: from the IP header on; bytes that were not captured are filled with zeros by
                the caller, so that lengths hold.
            now: seconds.

        Returns:
            The packet itself if it is whole (or nothing that can be read), the datagram that it
            completes, or why there is none yet.
        """
        piece = _read_ipv4(packet) if packet[:1] and packet[0] >> 4 == 4 else _read_ipv6(packet)
        if piece is None:
            return packet
        is_ipv6 = len(piece.key[0]) == 16
        if is_ipv6 and (
            (piece.more and len(piece.body) % 8)
            or (piece.offset == 0 and _is_cut(piece.protocol, piece.body))
        ):
            if piece.offset:
                self._waiting.pop(piece.key, None)
            return packet
        datagram = self._waiting.get(piece.key)
        if datagram is None or now >= datagram.expires_at:
            self._waiting.pop(piece.key, None)
            if len(self._waiting) >= _MAX_WAITING_COUNT:
                del self._waiting[next(iter(self._waiting))]
            wait_s = _IPV6_WAIT_S if is_ipv6 else _IPV4_WAIT_S
            datagram = self._waiting[piece.key] = _Waiting(now + wait_s)
        refused = _contradiction(datagram, piece)
        if refused:
            if not is_ipv6:
                del self._waiting[piece.key]
            return Waits(refused, lost=True)
        fits = _put(datagram, piece)
        if fits is None:
            del self._waiting[piece.key]
            return Waits("overlapping fragment", lost=True)
        if not fits:
            return Waits("fragment: repeated", lost=False)
        whole = _join(datagram)
        if whole is None:
            return Waits("fragment: waits for the others", lost=False)
        del self._waiting[piece.key]
        return whole


def _contradiction(datagram: _Waiting, piece: _Piece) -> str:
    """Note what a piece says of the datagram's length; why it is lost, "" if it is not."""
    start, end = piece.offset, _end(piece)
    if end > _MAX_DATAGRAM_BYTES:
        return "fragments of more than a datagram can hold"
    if not piece.more:
        if datagram.total not in (None, end):
            return "two last fragments that disagree"
        if end < datagram.end:
            return "fragment behind the last one"
        datagram.total = end
    elif datagram.total is not None and end > datagram.total:
        return "fragment behind the last one"
    datagram.end = max(datagram.end, end)
    return "empty fragment" if end == start else ""


def _put(datagram: _Waiting, piece: _Piece) -> bool | None:
    """Add a piece. False: it repeats what is there; None: it overlaps it."""
    start, end = piece.offset, _end(piece)
    runs = datagram.runs
    for run_start, run_end in runs:
        if start < run_end and run_start < end:
            return False if run_start <= start and end <= run_end else None
    if runs and start == runs[-1][1]:
        runs[-1] = (runs[-1][0], end)
    else:
        runs.append((start, end))
        runs.sort()
    datagram.pieces[start] = piece.body[: end - start]
    if start == 0:
        datagram.first = piece
    return True


def _end(piece: _Piece) -> int:
    size = len(piece.body)
    return piece.offset + (size & ~7 if piece.more else size)


def _join(datagram: _Waiting) -> bytes | None:
    """The datagram, if all of it is there."""
    first, total = datagram.first, datagram.total
    if first is None or total is None or sum(map(len, datagram.pieces.values())) != total:
        return None
    payload = b"".join(datagram.pieces[at] for at in sorted(datagram.pieces))
    head = bytearray(first.head)
    if head[0] >> 4 == 4:
        if len(head) + total > _MAX_DATAGRAM_BYTES:
            return None
        head[2:4] = (len(head) + total).to_bytes(2, "big")
        head[6:8] = (0).to_bytes(2, "big")
        head[10:12] = (0).to_bytes(2, "big")
        # Ones' complement of the ones' complement sum (RFC 1071), as one remainder.
        head[10:12] = (0xFFFF - int.from_bytes(head, "big") % 0xFFFF).to_bytes(2, "big")
        return bytes(head) + payload
    # The header that announced the fragment header announces what that one did.
    at, place = 40, 6
    while head[place] != _FRAGMENT:
        place, at = at, at + (head[at + 1] + 1) * 8
    head[place] = first.protocol
    length = len(head) - 40 + total
    if length > _MAX_DATAGRAM_BYTES:
        return None
    head[4:6] = length.to_bytes(2, "big")
    return bytes(head) + payload


def _read_ipv4(packet: bytes) -> _Piece | None:
    if len(packet) < 20:
        return None
    start = (packet[0] & 15) * 4
    total = int.from_bytes(packet[2:4], "big")
    field = int.from_bytes(packet[6:8], "big")
    if start < 20 or total < start or total > len(packet) or not field & (_MORE | _OFFSET):
        return None
    key = (packet[12:16], packet[16:20], packet[4:6], packet[9:10])
    more = bool(field & _MORE)
    return _Piece(key, (field & _OFFSET) * 8, more, packet[:start], packet[9], packet[start:total])


def _read_ipv6(packet: bytes) -> _Piece | None:
    if len(packet) < 40 or packet[0] >> 4 != 6:
        return None
    total = 40 + int.from_bytes(packet[4:6], "big")
    following, at = packet[6], 40
    while following in _CHAIN and at + 8 <= len(packet):
        following, at = packet[at], at + (packet[at + 1] + 1) * 8
    if following != _FRAGMENT or at + 8 > total or total > len(packet):
        return None
    field = int.from_bytes(packet[at + 2 : at + 4], "big")
    if not field & 0xFFF9:
        return None  # atomic (RFC 6946): the whole packet is here
    key = (packet[8:24], packet[24:40], packet[at + 4 : at + 8])
    return _Piece(
        key, field & 0xFFF8, bool(field & 1), packet[:at], packet[at], packet[at + 8 : total]
    )


def _is_cut(following: int, body: bytes) -> bool:
    """Whether a first piece ends inside the transport's header (RFC 8200 section 4.5).

    One that ends inside the chain before it is one that Linux does not refuse.
    """
    at = 0
    while following in _CHAIN or following == _AUTHENTICATION:
        if at + 2 > len(body):
            return False
        words = body[at + 1]
        size = (words + 2) * 4 if following == _AUTHENTICATION else (words + 1) * 8
        following, at = body[at], at + size
    return at + _FIRST_BYTES.get(following, 1) > len(body)
