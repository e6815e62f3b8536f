r"""DNS messages: the one question of a query, and what an answer says about it. Pure.

A query is passed on as it came, with another id, so it must have one meaning only. Whatever two
parsers could read differently is refused: several questions, none, records before the additional
section, a compressed name in the question, two OPT records, bytes behind the message. Names become
text in lower case with a trailing dot; dnspython escapes what is special or not printable in a
label (`a\.b`, `\000`), and no pattern means a label with another character than letters, digits,
"-" and "_".

An answer counts only if it bears the id and the question that were sent (RFC 5452 section 9); a
bare header may say that the question could not be read. Its addresses are those that the asked name
leads to by CNAME records of the answer section; records of other names, and other sections, teach
nothing. Addresses in HTTPS and SVCB hints are not learnt,
as in Cilium: a client that uses them asks for A and AAAA as well (RFC 9460 section 3).

dnspython reads and writes. Of what comes it reads numbers and names (`dns.wire.Parser`), not whole
messages: `dns.message.from_wire` looks into the data of every record and fails where a digest, a
tag or an option is not as it expects, TSIG without a key, and all of that is between the client and
its server. What nobody here needs is passed over by its length.

Sources: RFC 1035 section 4, RFC 6891 (EDNS), RFC 8945 (TSIG), RFC 2181.
"""

from functools import lru_cache
from typing import NamedTuple

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.wire
from dns.edns import EDECode

HEADER_BYTES = 12
"""RFC 1035 section 4.1.1."""

CHAIN_COUNT = 16
"""CNAME records that are followed; resolvers give up earlier (BIND max-recursion: 11 to 16)."""

REMEMBERED_BYTES = 512
"""Longest query that is remembered: 1024 of them and their names are 2 MB at most."""

LABEL_COUNT = 32_768
"""Labels that are read of one answer: eight for each of the 4,000 records that 64 KiB hold.
Compressed names could make it half a million, a second of this worker's time."""

PAYLOAD_BYTES = 1232
"""What refusals say that a server takes: 1280 of IPv6 less its headers (dnsflagday.net/2020)."""

MAX_TTL_S = 604_800
"""A week: longer lives are cut (RFC 8767 section 4 advises the same)."""

_WITHOUT_QUESTION = frozenset((dns.rcode.FORMERR, dns.rcode.NOTIMP))
"""A server that could not read the question cannot repeat it. Clients ask again without EDNS then
(RFC 6891 section 7). It teaches nothing; who forges it must know id and port."""

# Numbers, not members: a look into an enum costs as much as reading one.
_QR, _TC, _RD = int(dns.flags.QR), int(dns.flags.TC), int(dns.flags.RD)
_DO = int(dns.flags.DO)  # copied into answers (RFC 3225 section 3)
_IN = int(dns.rdataclass.IN)
_CNAME, _OPT = int(dns.rdatatype.CNAME), int(dns.rdatatype.OPT)
_SIGNATURES = frozenset((int(dns.rdatatype.TSIG), int(dns.rdatatype.SIG)))
_ADDRESS_BYTES = {int(dns.rdatatype.A): 4, int(dns.rdatatype.AAAA): 16}
"""Length of the data (RFC 1035, RFC 3596)."""
_RECORD = "!2HIH"  # type, class, TTL, length of the data
_POINTER = 0xC000  # to an offset from the beginning of the message (RFC 1035 section 4.1.4)


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


class BrokenAnswerError(AnswerError):
    """The bytes have the id and the question of an answer, and are none."""


class Query(NamedTuple):
    """One question as it came.

    Attributes:
        id: the client's.
        wire: the whole message.
        question: its question section's bytes.
        name: what is asked for, in lower case with a trailing dot, odd bytes escaped.
        kind: the record type's number.
        answer_class: the class, 1 = IN.
        asked: the name as it came.
        edns_flags: of its OPT record, None if it has none (RFC 6891).
    """

    id: int
    wire: bytes
    question: bytes
    name: str
    kind: int
    answer_class: int
    asked: dns.name.Name
    edns_flags: int | None

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
    if len(wire) < HEADER_BYTES:
        raise QueryError("shorter than a header", answerable=False)
    read = _read if len(wire) <= REMEMBERED_BYTES else _read.__wrapped__
    return Query(int.from_bytes(wire[:2], "big"), wire, *read(wire[2:]))


@lru_cache(maxsize=1024)
def _read(wire: bytes) -> tuple[bytes, str, int, int, dns.name.Name, int | None]:
    """Read what stands behind the id: programs ask the same again and again."""
    parser = dns.wire.Parser(wire)
    flags, questions, answers, authorities, additionals = parser.get_struct("!5H")
    if flags & _QR:
        raise QueryError("is a response", answerable=False)
    opcode = dns.opcode.from_flags(flags)
    if opcode != dns.opcode.QUERY:
        raise QueryError(f"opcode {int(opcode)}, not QUERY", answerable=True)
    if questions != 1:
        raise QueryError(f"{questions} questions instead of one", answerable=True)
    if answers or authorities:
        raise QueryError("carries records", answerable=True)
    try:
        begun = parser.current
        name = parser.get_name()
        kind, answer_class = parser.get_struct("!2H")
        question = wire[begun : parser.current]
        edns_flags = _read_tail(parser, additionals)
    except dns.exception.DNSException as error:
        raise QueryError(f"is broken: {error}", answerable=True) from error
    if parser.remaining():
        raise QueryError(f"{parser.remaining()} bytes behind the message", answerable=True)
    return question, _text(name.labels), kind, answer_class, name, edns_flags


@lru_cache(maxsize=4096)
def _text(labels: tuple[bytes, ...]) -> str:
    return dns.name.Name(labels).to_text().lower()


def _read_tail(parser: dns.wire.Parser, count: int) -> int | None:
    """Read what a query may carry: one OPT record (RFC 6891 section 6.1.1), one signature.

    The signature is the last record (RFC 8945 section 5.1, RFC 2931 section 3.1). Returns the flags
    of the OPT record.
    """
    edns_flags = None
    for at in range(count):
        owner = parser.get_name()
        kind, _, ttl, size = parser.get_struct(_RECORD)
        parser.get_bytes(size)
        if kind == _OPT:
            if owner != dns.name.root or edns_flags is not None:
                raise QueryError("a second OPT record, or one of a name", answerable=True)
            edns_flags = ttl & 0xFFFF
        elif kind not in _SIGNATURES or at + 1 < count:
            raise QueryError(f"carries a record of type {kind}", answerable=True)
    return edns_flags


def refusal(query: Query, rcode: int, why: EDECode | None = None, text: str = "") -> bytes:
    """Return the answer that refuses a query, with its question as it came.

    Args:
        query: what was read.
        rcode: REFUSED (5), NXDOMAIN (3), SERVFAIL (2), ...
        why: told to who asked with EDNS (RFC 8914).
        text: the same for people.
    """
    made = _refusal(query.wire, rcode)
    kind = dns.rdatatype.RdataType(query.kind)
    question_class = dns.rdataclass.RdataClass(query.answer_class)
    made.question.append(dns.rrset.RRset(query.asked, question_class, kind))
    if query.edns_flags is not None:  # who is answered without EDNS may think that it is not known
        options: list[dns.edns.Option] = [] if why is None else [dns.edns.EDEOption(why, text)]
        made.use_edns(0, query.edns_flags & _DO, PAYLOAD_BYTES, options=options)
    return made.to_wire()


def blind_refusal(wire: bytes, rcode: int) -> bytes:
    """Return the answer that refuses what could not be read; it repeats no question.

    Args:
        wire: what came, at least a header.
        rcode: as for `refusal`.
    """
    return _refusal(wire, rcode).to_wire()


def _refusal(wire: bytes, rcode: int) -> dns.message.Message:
    number, flags = dns.wire.Parser(wire).get_struct("!2H")
    made = dns.message.Message(number)
    made.flags = dns.flags.Flag(_QR | flags & _RD)
    made.set_opcode(dns.opcode.from_flags(flags))
    made.set_rcode(dns.rcode.Rcode(rcode))
    return made


def with_id(wire: bytes, number: int) -> bytes:
    """Return a message under another id, 0..65535."""
    return number.to_bytes(2, "big") + wire[2:]


def read_answer(wire: bytes, query: Query, number: int) -> Answer:
    """Read what answers `query`, which was sent under the id `number`.

    Raises:
        BrokenAnswerError: it answers the question, but cannot be read.
        AnswerError: it answers something else, or is no DNS message.
    """
    if len(wire) < HEADER_BYTES:
        raise AnswerError("shorter than a header")
    parser = dns.wire.Parser(wire)
    found, flags, questions, answers, authorities, additionals = parser.get_struct("!6H")
    if found != number:
        raise AnswerError("another id")
    if not flags & _QR or dns.opcode.from_flags(flags) != dns.opcode.QUERY:
        raise AnswerError("is no response to a query")
    rcode = int(dns.rcode.from_flags(flags, 0))
    if not questions and not parser.remaining() and rcode in _WITHOUT_QUESTION:
        return Answer(rcode, False, (), 0, (), ())
    end = HEADER_BYTES + len(query.question)
    # Case may differ: some servers answer in the case of their zone (RFC 1035 section 2.3.3).
    if questions != 1 or not _same_question(wire[HEADER_BYTES:end], query.question):
        raise AnswerError("another question")
    truncated = bool(flags & _TC)
    try:
        parser.seek(end)
        records = _Records(parser, query.asked)
        answer = [records.read() for _ in range(answers)]
        others = [records.pass_over() for _ in range(authorities + additionals)]
        records.end()
    except (dns.exception.DNSException, AnswerError) as error:
        if truncated:
            # Cut inside a record, as some servers do: only that there is more counts (RFC 2181 9).
            return Answer(rcode, True, (), 0, (), ())
        raise BrokenAnswerError(f"is broken: {error}") from error
    kinds = tuple(kind_text(record.kind) for record in answer)
    for kind, ttl in others:
        if kind == _OPT:
            rcode = int(dns.rcode.from_flags(flags, ttl))
    if query.answer_class != _IN or rcode:
        return Answer(rcode, truncated, (), 0, (), kinds)
    addresses, ttl_s, cnames = _follow(query.name, answer)
    return Answer(rcode, truncated, addresses, ttl_s, cnames, kinds)


def _same_question(one: bytes, two: bytes) -> bool:
    """Compare names without case, type and class with.

    Uncompressed names: the lengths of labels are below 64, no letters.
    """
    return one[-4:] == two[-4:] and one[:-4].lower() == two[:-4].lower()


class _Record(NamedTuple):
    """A record of an answer section.

    Attributes:
        kind: the type's number.
        owner: whose it is; "" where nobody needs to know.
        ttl_s: its life.
        address: packed, of A and AAAA in the class IN, else b"".
        target: of CNAME in the class IN, else "".
    """

    kind: int
    owner: str = ""
    ttl_s: int = 0
    address: bytes = b""
    target: str = ""


class _Records:
    """Reads the records of one message, one behind the other.

    Args:
        parser: stands behind the question.
        asked: the name in the question.
    """

    def __init__(self, parser: dns.wire.Parser, asked: dns.name.Name) -> None:
        self._parser = parser
        self._left = LABEL_COUNT
        self._names = {HEADER_BYTES: asked}

    def read(self) -> _Record:
        """Read a record of the answer section.

        Raises:
            AnswerError: it is not as long as its type, or there are too many labels.
            dns.exception.DNSException: there is none.
        """
        owner = self._name()
        parser = self._parser
        kind, answer_class, ttl_s, size = parser.get_struct(_RECORD)
        if ttl_s >> 31:
            ttl_s = 0  # RFC 2181 section 8
        if answer_class == _IN and kind == _CNAME:
            with parser.restrict_to(size):
                target = _text(self._name().labels)
            return _Record(kind, _text(owner.labels), ttl_s, target=target)
        data = parser.get_bytes(size)
        if answer_class != _IN or kind not in _ADDRESS_BYTES:
            return _Record(kind)
        if size != _ADDRESS_BYTES[kind]:
            raise AnswerError("an address of another length")
        return _Record(kind, _text(owner.labels), ttl_s, address=data)

    def pass_over(self) -> tuple[int, int]:
        """Pass over a record of another section; return its type and its TTL field.

        Raises:
            AnswerError: there are too many labels.
            dns.exception.DNSException: there is none.
        """
        self._name()
        kind, _, ttl, size = self._parser.get_struct(_RECORD)
        self._parser.get_bytes(size)
        return kind, ttl

    def end(self) -> None:
        """Say that there must be no more.

        Raises:
            AnswerError: there is.
        """
        if self._parser.remaining():
            raise AnswerError(f"{self._parser.remaining()} bytes behind the message")

    def _name(self) -> dns.name.Name:
        """Read a name; most of them are a pointer to one that was read before.

        That one is the same from wherever it is pointed to: pointers lead back only.
        """
        parser = self._parser
        at = parser.current
        known = self._names.get(int.from_bytes(parser.wire[at : at + 2], "big") - _POINTER)
        if known is not None:
            parser.seek(at + 2)
            return known
        name = self._names[at] = parser.get_name(decompress=True)
        self._left -= len(name.labels)
        if self._left < 0:
            raise AnswerError(f"names with more than {LABEL_COUNT} labels")
        return name


def _follow(name: str, records: list[_Record]) -> tuple[tuple[bytes, ...], int, tuple[str, ...]]:
    """Follow a name through an answer section; return addresses, least TTL and other names."""
    aliases: dict[str, _Record] = {}
    found: dict[str, list[_Record]] = {}
    for record in records:
        if record.target:
            aliases.setdefault(record.owner, record)
        elif record.address:
            found.setdefault(record.owner, []).append(record)
    ttls = [MAX_TTL_S]
    cnames: list[str] = []
    while name in aliases and len(cnames) < CHAIN_COUNT:
        alias = aliases[name]
        name = alias.target
        ttls.append(alias.ttl_s)
        cnames.append(name)
    ttls += [record.ttl_s for record in found.get(name, ())]
    addresses = tuple(dict.fromkeys(record.address for record in found.get(name, ())))
    return addresses, min(ttls) if len(ttls) > 1 else 0, tuple(cnames)
