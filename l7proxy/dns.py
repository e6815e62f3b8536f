r"""DNS messages: the one question of a query, and what an answer says about it. Pure.

A query is passed on as it came, with another id, so it must have one meaning only. Whatever two
parsers could read differently is refused: several questions, none, records before the additional
section, a compressed name in the question, bytes behind the message. Names become text in lower
case with a trailing dot; what is no letter, digit, "-", "_" in a label is escaped (`a\.b`, `\000`),
and no escaped name matches a pattern.

An answer counts only if it bears the id and the question that were sent (RFC 5452 section 9); a
bare header may say that the question could not be read. Its addresses are those that the asked name
leads to by CNAME records of the answer section; records of other names, and other sections, teach
nothing. Addresses in HTTPS and SVCB hints are not learnt,
as in Cilium: a client that uses them asks for A and AAAA as well (RFC 9460 section 3).

dnspython reads the same from every answer that both take (a property test). It is not used here,
because it takes ten times as long, and every answer waits for it.

Sources: RFC 1035 section 4, RFC 6891 (EDNS), RFC 2181.
"""

import struct
from functools import lru_cache
from typing import NamedTuple

import dns.rdatatype

HEADER = struct.Struct("!6H")
"""Id, flags, and the number of questions, answers, authority and additional records."""

MAX_NAME_BYTES = 255
"""RFC 1035 section 2.3.4."""

PLAIN_BYTES = 512
"""What a client without EDNS takes over UDP (RFC 1035 section 4.2.1)."""

CHAIN_COUNT = 16
"""CNAME records that are followed; resolvers give up earlier (BIND max-recursion: 11 to 16)."""

MAX_TTL_S = 604_800
"""A week: longer lives are cut (RFC 8767 section 4 advises the same)."""

_QR, _OPCODE, _RD, _TC, _RCODE = 0x8000, 0x7800, 0x0100, 0x0200, 0x000F
_WITHOUT_QUESTION = frozenset((1, 4))
"""FORMERR and NOTIMP: a server that could not read the question cannot repeat it. Clients ask again
without EDNS then (RFC 6891 section 7). It teaches nothing; who forges it must know id and port."""
_IN, _CNAME = 1, 5
_ADDRESS_BYTES = {1: 4, 28: 16}
"""Length of the data of A and AAAA (RFC 1035, RFC 3596)."""
_RECORD = struct.Struct("!2HIH")
_OPT, _TSIG, _SIG0 = 41, 250, 24
_TAILS = frozenset({_OPT, _TSIG, _SIG0})  # all that a query may carry behind its question
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


class QueryError(ValueError):
    """The bytes are no query that can be judged.

    Attributes:
        answerable: it is a question in some form, so its sender may be told.
    """

    def __init__(self, detail: str, *, answerable: bool) -> None:
        super().__init__(detail)
        self.answerable = answerable


class AnswerError(ValueError):
    """The bytes do not answer the question; the text says why."""


class Query(NamedTuple):
    """One question as it came.

    Attributes:
        id: the client's.
        wire: the whole message.
        question: its question section's bytes.
        name: what is asked for, in lower case with a trailing dot, odd bytes escaped.
        kind: the record type's number.
        answer_class: the class, 1 = IN.
        payload_bytes: longest answer that the client takes over UDP.
    """

    id: int
    wire: bytes
    question: bytes
    name: str
    kind: int
    answer_class: int
    payload_bytes: int

    @property
    def kind_text(self) -> str:
        """The record type as Hubble writes it: "A", "AAAA", "TYPE65280"."""
        return kind_text(self.kind)


class Answer(NamedTuple):
    """What a message says about the question.

    Attributes:
        rcode: the response code's number.
        truncated: the server had more to say; the client will ask over TCP.
        addresses: packed, in order, without doubles.
        ttl_s: least of the chain's and the addresses', 0 if nothing was found.
        cnames: what the name is called on the way, in order.
        kinds: the record types of the answer section, in order.
    """

    rcode: int
    truncated: bool
    addresses: tuple[bytes, ...]
    ttl_s: int
    cnames: tuple[str, ...]
    kinds: tuple[str, ...]


@lru_cache(maxsize=256)
def kind_text(kind: int) -> str:
    """Return a record type's name; "TYPE65280" if it has none (RFC 3597)."""
    return dns.rdatatype.to_text(dns.rdatatype.RdataType(kind))


def read_query(wire: bytes) -> Query:
    """Read a query.

    Raises:
        QueryError: it is none, or not one that has one meaning only.
    """
    if len(wire) < HEADER.size:
        raise QueryError("shorter than a header", answerable=False)
    number, flags, questions, answers, authorities, additionals = HEADER.unpack_from(wire)
    if flags & _QR:
        raise QueryError("is a response", answerable=False)
    if flags & _OPCODE:
        raise QueryError(f"opcode {(flags & _OPCODE) >> 11}, not QUERY", answerable=True)
    if questions != 1:
        raise QueryError(f"{questions} questions instead of one", answerable=True)
    if answers or authorities:
        raise QueryError("carries records", answerable=True)
    name, at = _plain_name(wire, HEADER.size)
    if at + 4 > len(wire):
        raise QueryError("the question is cut short", answerable=True)
    kind, answer_class = struct.unpack_from("!2H", wire, at)
    at += 4
    question = wire[HEADER.size : at]
    payload_bytes = PLAIN_BYTES
    for _ in range(additionals):
        found, size, at = _tail(wire, at)
        if found == _OPT:
            payload_bytes = max(PLAIN_BYTES, size)
    if at != len(wire):
        raise QueryError(f"{len(wire) - at} bytes behind the message", answerable=True)
    return Query(number, wire, question, name, kind, answer_class, payload_bytes)


def _plain_name(wire: bytes, at: int) -> tuple[str, int]:
    """Read an uncompressed name; return its text and where it ends."""
    labels: list[str] = []
    begun = at
    while True:
        if at >= len(wire):
            raise QueryError("the name is cut short", answerable=True)
        length = wire[at]
        at += 1
        if length > 63:
            raise QueryError("the name is compressed", answerable=True)
        if at + length - begun > MAX_NAME_BYTES:
            raise QueryError(f"the name is longer than {MAX_NAME_BYTES} bytes", answerable=True)
        if not length:
            break
        label = wire[at : at + length]
        if len(label) < length:
            raise QueryError("the name is cut short", answerable=True)
        labels.append(_label_text(label))
        at += length
    return ".".join([*labels, ""]) if labels else ".", at


def _label_text(label: bytes) -> str:
    if _PLAIN.issuperset(label):
        return label.decode("ascii").lower()
    return "".join(
        chr(byte).lower()
        if byte in _PLAIN
        else f"\\{chr(byte)}"
        if 0x20 < byte < 0x7F
        else f"\\{byte:03d}"
        for byte in label
    )


def _tail(wire: bytes, at: int) -> tuple[int, int, int]:
    """Pass over a record of the additional section; return its type, its class and its end."""
    _, at = _plain_name(wire, at)
    if at + 10 > len(wire):
        raise QueryError("a record is cut short", answerable=True)
    kind, size, _, length = _RECORD.unpack_from(wire, at)
    if kind not in _TAILS:
        raise QueryError(f"carries a record of type {kind}", answerable=True)
    return kind, size, at + 10 + length


def refusal(wire: bytes, rcode: int) -> bytes:
    """Return the answer that refuses a query, with its question if that can be told.

    Args:
        wire: what came, at least a header.
        rcode: REFUSED (5), NXDOMAIN (3), SERVFAIL (2), ...
    """
    number, flags, *_ = HEADER.unpack_from(wire)
    try:
        question = read_query(wire).question
    except QueryError:
        question = b""
    said = _QR | flags & (_OPCODE | _RD) | rcode
    return HEADER.pack(number, said, bool(question), 0, 0, 0) + question


def with_id(wire: bytes, number: int) -> bytes:
    """Return a message under another id, 0..65535."""
    return number.to_bytes(2, "big") + wire[2:]


def read_answer(wire: bytes, query: Query, number: int) -> Answer:
    """Read what answers `query`, which was sent under the id `number`.

    Raises:
        AnswerError: it answers something else, or is no DNS message.
    """
    if len(wire) < HEADER.size:
        raise AnswerError("shorter than a header")
    found, flags, questions, *_ = HEADER.unpack_from(wire)
    if found != number:
        raise AnswerError("another id")
    if not flags & _QR or flags & _OPCODE:
        raise AnswerError("is no response to a query")
    if not questions and len(wire) == HEADER.size and flags & _RCODE in _WITHOUT_QUESTION:
        return Answer(flags & _RCODE, False, (), 0, (), ())
    if len(wire) < HEADER.size + len(query.question):
        raise AnswerError("shorter than the question")
    asked = wire[HEADER.size : HEADER.size + len(query.question)]
    # Case may differ: some servers answer in the case of their zone (RFC 1035 section 2.3.3). The
    # lengths of labels are below 64 and the type's bytes differ from letters by more than case.
    if questions != 1 or not _same_question(asked, query.question):
        raise AnswerError("another question")
    try:
        return _follow(wire, query, flags)
    except AnswerError:
        if not flags & _TC:
            raise
        # Cut inside a record, as some servers do: only that there is more counts (RFC 2181 9).
        return Answer(flags & _RCODE, True, (), 0, (), ())


def _same_question(one: bytes, two: bytes) -> bool:
    return one[-4:] == two[-4:] and one[:-4].lower() == two[:-4].lower()


class _Record(NamedTuple):
    """A resource record: owner, numbers, and where its data lies."""

    owner: str
    kind: int
    answer_class: int
    ttl_s: int
    begin: int
    end: int


def _follow(wire: bytes, query: Query, flags: int) -> Answer:
    """Follow the asked name through the answer section."""
    _, _, _, answers, authorities, additionals = HEADER.unpack_from(wire)
    at = HEADER.size + len(query.question)
    aliases: dict[str, tuple[str, int]] = {}
    found: dict[str, list[tuple[bytes, int]]] = {}
    kinds: list[str] = []
    for _ in range(answers):
        record = _record(wire, at)
        at = record.end
        kinds.append(kind_text(record.kind))
        if record.answer_class != _IN:
            continue
        if record.kind == _CNAME:
            target, end = _name(wire, record.begin)
            if end != record.end:
                raise AnswerError("a CNAME record of another length")
            aliases.setdefault(record.owner, (target, record.ttl_s))
        elif record.kind in _ADDRESS_BYTES:
            address = wire[record.begin : record.end]
            if len(address) != _ADDRESS_BYTES[record.kind]:
                raise AnswerError("an address record of another length")
            found.setdefault(record.owner, []).append((address, record.ttl_s))
    rcode = flags & _RCODE
    for _ in range(authorities + additionals):
        record = _record(wire, at)
        at = record.end
        if record.kind == _OPT:
            rcode |= record.ttl_s >> 24 << 4  # RFC 6891 section 6.1.3
    if at != len(wire):
        raise AnswerError(f"{len(wire) - at} bytes behind the message")
    cut = bool(flags & _TC)
    if query.answer_class != _IN or rcode:
        return Answer(rcode, cut, (), 0, (), tuple(kinds))
    name, ttls = query.name, [MAX_TTL_S]
    cnames: list[str] = []
    while name in aliases and len(cnames) < CHAIN_COUNT:
        name, ttl_s = aliases[name]
        ttls.append(ttl_s)
        cnames.append(name)
    ttls += [ttl_s for _, ttl_s in found.get(name, ())]
    addresses = tuple(dict.fromkeys(address for address, _ in found.get(name, ())))
    said = bool(addresses or cnames)
    return Answer(rcode, cut, addresses, min(ttls) if said else 0, tuple(cnames), tuple(kinds))


def _record(wire: bytes, at: int) -> _Record:
    owner, at = _name(wire, at)
    if at + 10 > len(wire):
        raise AnswerError("a record is cut short")
    kind, answer_class, ttl_s, length = _RECORD.unpack_from(wire, at)
    begin = at + 10
    if begin + length > len(wire):
        raise AnswerError("a record is cut short")
    # A TTL with its highest bit set is zero (RFC 2181 section 8), but for OPT, which has none.
    if kind != _OPT and ttl_s >> 31:
        ttl_s = 0
    return _Record(owner, kind, answer_class, ttl_s, begin, begin + length)


def _name(wire: bytes, at: int) -> tuple[str, int]:
    """Read a name that may be compressed; return its text and where it ends.

    Pointers lead strictly backwards (RFC 1035 section 4.1.4: to a prior occurrence), so that there
    is no loop.
    """
    labels: list[str] = []
    size, end, limit = 1, 0, at
    while True:
        if at >= len(wire):
            raise AnswerError("a name is cut short")
        length = wire[at]
        at += 1
        if length >= 0xC0:
            if at >= len(wire):
                raise AnswerError("a name is cut short")
            end = end or at + 1
            at = (length & 0x3F) << 8 | wire[at]
            if at >= limit:
                raise AnswerError("a name points forwards")
            limit = at
            continue
        if length > 63:
            raise AnswerError("a label of unknown type")
        size += length + 1
        if size > MAX_NAME_BYTES + 1:
            raise AnswerError(f"a name is longer than {MAX_NAME_BYTES} bytes")
        if not length:
            return (".".join([*labels, ""]) if labels else "."), end or at
        label = wire[at : at + length]
        if len(label) < length:
            raise AnswerError("a name is cut short")
        labels.append(_label_text(label))
        at += length
