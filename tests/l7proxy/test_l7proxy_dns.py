"""DNS messages: one meaning or none, and only what the asked name leads to is learnt."""

import struct

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.tsig
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy import dns as wire
from l7proxy.dns import (
    AnswerError,
    QueryError,
    blind_refusal,
    read_answer,
    read_query,
    refusal,
    with_id,
)

NUMBER = 4711


def query(name="www.example.com.", kind="A", **options) -> bytes:
    return dns.message.make_query(name, kind, id=NUMBER, **options).to_wire()


def response(*records: str, to: bytes | None = None, rcode=0) -> bytes:
    """A response with these records in its answer section; "+" before one: in the additional."""
    made = dns.message.make_response(dns.message.from_wire(to or query()))
    made.set_rcode(rcode)
    for record in records:
        name, ttl, kind, data = record.lstrip("+").split(maxsplit=3)
        section = made.additional if record[0] == "+" else made.answer
        section.append(dns.rrset.from_text(name, int(ttl), "IN", kind, data))
    return made.to_wire()


def learnt(*records: str, kind="A") -> tuple[list[str], int, tuple[str, ...]]:
    asked = query(kind=kind)
    answer = read_answer(response(*records, to=asked), read_query(asked), NUMBER)
    texts = [".".join(map(str, a)) if len(a) == 4 else a.hex() for a in answer.addresses]
    return texts, answer.ttl_s, answer.cnames


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("WWW.Example.COM.", "www.example.com."),
        (".", "."),
        (r"a\.b.example.", r"a\.b.example."),
        (r"nul\000.example.", r"nul\000.example."),
        (r"sp\032ace.example.", r"sp\032ace.example."),
        ("_srv._tcp.example.", "_srv._tcp.example."),
    ],
)
def test_a_name_is_read_in_lower_case_and_odd_bytes_are_escaped(asked, name):
    """So that no pattern of letters, digits, - and _ means `a\\.b`."""
    assert read_query(query(asked)).name == name


def test_the_type_and_the_id_are_read():
    found = read_query(query(kind="AAAA", use_edns=0, payload=1232))
    assert (found.kind_text, found.answer_class, found.id) == ("AAAA", 1, NUMBER)


def test_a_question_that_was_read_before_has_its_own_id():
    first, second = (read_query(with_id(query(), number)) for number in (1, 2))
    assert (first.id, second.id) == (1, 2)
    assert first[2:] == second[2:]
    assert with_id(first.wire, 2) == second.wire


LONGEST = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61, ""])  # 255 bytes with its lengths


def test_a_name_of_255_bytes_is_read_and_refused_as_it_came():
    made = query(LONGEST)
    found = read_query(made)
    assert (len(found.question), found.name) == (255 + 4, LONGEST)
    assert refusal(found, 5)[12:] == found.question


KEY = dns.tsig.Key("key.example.", b"secret")


def signed(name="www.example.com.") -> bytes:
    made = dns.message.make_query(name, "A", id=NUMBER)
    made.use_tsig(KEY)
    return made.to_wire()


def opt(data: bytes = b"", owner: bytes = b"\0") -> bytes:
    return owner + struct.pack("!2HIH", 41, 1232, 0, len(data)) + data


def _with(*records: bytes) -> bytes:
    """The question with these records in the additional section."""
    return _changed(additionals=len(records)) + b"".join(records)


@pytest.mark.parametrize(
    "made",
    [
        signed(),
        signed()[:-4] + b"\xff" * 4,
        query(options=[dns.edns.ECSOption("192.0.2.0", 24)]),
        query(options=[dns.edns.CookieOption(b"12345678", b"")]),
    ],
    ids=["signed", "signed with odd data", "client subnet", "cookie"],
)
def test_what_a_query_may_carry_is_passed_on(made):
    found = read_query(made)
    assert (found.name, found.wire) == ("www.example.com.", made)


def _changed(**fields: int) -> bytes:
    names = ("id", "flags", "questions", "answers", "authorities", "additionals")
    values = dict(zip(names, struct.unpack_from("!6H", query()), strict=True)) | fields
    return struct.pack("!6H", *values.values()) + query()[12:]


QUESTION = query()[12:]

NO_QUERY = {
    "shorter": (query()[:11], False),
    "is a response": (_changed(flags=0x8100), False),
    "opcode 5": (_changed(flags=0x2800), True),
    "0 questions": (_changed(questions=0), True),
    "2 questions": (_changed(questions=2) + QUESTION, True),
    "carries records": (_changed(answers=1), True),
    "compression": (struct.pack("!6H", 1, 256, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1", True),
    "pointer": (struct.pack("!6H", 1, 256, 1, 0, 0, 0) + b"\1a\xc0\4\0\1\0\1", True),
    "label type": (struct.pack("!6H", 1, 256, 1, 0, 0, 0) + b"\x41\1\0\0\1\0\1", True),
    "malformed": (query()[:-1], True),
    "behind the message": (query() + b"\0", True),
    "> 255": (struct.pack("!6H", 1, 256, 1, 0, 0, 0) + b"\x3f" * 256 + b"\0\0\1\0\1", True),
    "record of type 1": (_changed(additionals=1) + b"\0\0\1\0\1\0\0\0\0\0\4abcd", True),
    "second OPT": (_with(opt(), opt()), True),
    "one of a name": (_with(opt(owner=b"\1a\0")), True),
    "record of type 250": (_changed(additionals=2) + signed()[len(query()) :] + opt(), True),
}


@pytest.mark.parametrize(("said", "case"), NO_QUERY.items(), ids=NO_QUERY)
def test_what_may_be_read_in_two_ways_is_no_query(said, case):
    given_wire, answerable = case
    with pytest.raises(QueryError, match=said) as raised:
        read_query(given_wire)
    assert raised.value.answerable is answerable


def test_a_refusal_has_the_question_byte_for_byte():
    """A client that mixes cases against forgers compares them."""
    asked = read_query(query("wWw.eXample.COM.", "TYPE65280"))
    assert refusal(asked, 3)[12:] == asked.question
    assert refusal(read_query(query(".", "NS")), 5)[12:] == b"\0\0\2\0\1"


def test_a_refusal_repeats_the_question():
    made = dns.message.from_wire(refusal(read_query(query()), 5))
    assert (made.id, made.rcode(), str(made.question[0])) == (NUMBER, 5, "www.example.com. IN A")
    assert made.flags & 0x8180 == 0x8100
    blind = dns.message.from_wire(blind_refusal(_changed(questions=0), 3))
    assert (blind.id, blind.rcode(), blind.question) == (NUMBER, 3, [])


def test_a_refusal_says_why_to_who_asks_with_edns():
    """RFC 8914; the DO flag comes back (RFC 3225), and nobody else gets an OPT record."""
    asked = read_query(query(use_edns=0, want_dnssec=True, payload=4096))
    made = dns.message.from_wire(refusal(asked, 5, dns.edns.EDECode.BLOCKED, "because"))
    assert (made.edns, made.ednsflags, made.payload) == (0, dns.flags.DO, 1232)
    assert made.options == (dns.edns.EDEOption(15, "because"),)
    assert dns.message.from_wire(refusal(read_query(query(use_edns=0)), 2)).options == ()
    assert dns.message.from_wire(refusal(read_query(query()), 5)).edns == -1


def test_a_cname_chain_leads_to_the_addresses_and_the_least_ttl_counts():
    assert learnt(
        "www.example.com. 300 CNAME a.cdn.net.",
        "a.cdn.net. 20 CNAME b.cdn.net.",
        "b.cdn.net. 60 A 192.0.2.1",
        "b.cdn.net. 60 A 192.0.2.2",
    ) == (["192.0.2.1", "192.0.2.2"], 20, ("a.cdn.net.", "b.cdn.net."))


@pytest.mark.parametrize(
    "records",
    [
        ("other.example. 9 A 192.0.2.66",),
        ("+www.example.com. 9 A 192.0.2.66",),
        ("www.example.com. 9 CNAME a.net.", "b.net. 9 A 192.0.2.66"),
        ("a.net. 9 CNAME www.example.com.", "a.net. 9 A 192.0.2.66"),
        ("www.example.com. 9 CNAME a.net.", "a.net. 9 CNAME www.example.com."),
        ("www.example.com. 9 HTTPS 1 . ipv4hint=192.0.2.66",),
    ],
    ids=["other name", "additional section", "beside the chain", "backwards", "loop", "hint"],
)
def test_records_that_the_asked_name_does_not_lead_to_teach_nothing(records):
    assert learnt(*records)[0] == []


def test_a_ttl_with_its_highest_bit_set_is_zero():
    made = bytearray(response("www.example.com. 9 A 192.0.2.1"))
    made[-10:-6] = b"\xff\xff\xff\xff"
    assert read_answer(bytes(made), read_query(query()), NUMBER).ttl_s == 0


def _record(kind: int, data: bytes) -> bytes:
    return b"\xc0\x0c" + struct.pack("!2HIH", kind, 1, 9, len(data)) + data


OTHERS = ["authorities", "additionals"]


@pytest.mark.parametrize("section", ["answers", *OTHERS])
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("DS", b"\0\1\1\2short"),
        ("CAA", b"\0\3a-b"),
        ("TXT", b""),
        ("HTTPS", b"\0\1\0\0\1\0\x09"),
        ("SVCB", b"\0\1\0\0\4\0\4\xc0\0\2\1\0\1\0\0"),
        ("NSEC", b"\xff"),
        ("RRSIG", b""),
        ("OPT", b"\0\3\xff\xff"),
        ("TSIG", b"\0"),
        ("SOA", b"\xc0"),
        ("TYPE65280", b"\1\2"),
    ],
)
def test_the_data_of_other_records_is_between_client_and_server(section, kind, data):
    """Whatever is in it: the answer is passed on, and its addresses are learnt."""
    fields = {"flags": 0x8180, "answers": 1}
    fields[section] = fields.get(section, 0) + 1
    extra = _record(dns.rdatatype.from_text(kind), data)
    address = _record(1, b"\xc0\0\2\1")
    found = read_answer(_changed(**fields) + address + extra, read_query(query()), NUMBER)
    assert (found.rcode, found.addresses, found.ttl_s) == (0, (b"\xc0\0\2\1",), 9)


@pytest.mark.parametrize("section", OTHERS)
@pytest.mark.parametrize("kind", ["A", "AAAA", "CNAME"])
def test_addresses_of_other_sections_are_between_client_and_server_too(section, kind):
    extra = _record(dns.rdatatype.from_text(kind), b"\xff\0")
    made = _changed(flags=0x8180, **{section: 1}) + extra
    assert read_answer(made, read_query(query()), NUMBER) == (0, False, (), 0, (), ())


def test_the_upper_bits_of_the_response_code_count():
    made = dns.message.make_response(dns.message.from_wire(query(use_edns=0)))
    made.set_rcode(dns.rcode.BADVERS)
    made.answer.append(dns.rrset.from_text("www.example.com.", 9, "IN", "A", "192.0.2.1"))
    found = read_answer(made.to_wire(), read_query(query()), NUMBER)
    assert (found.rcode, found.addresses) == (16, ())


def test_a_renamed_tree_is_followed_by_its_cname():
    """RFC 6672 section 3.1: who answers with DNAME adds the CNAME record."""
    assert learnt(
        "example.com. 30 DNAME example.net.",
        "www.example.com. 20 CNAME www.example.net.",
        "www.example.net. 60 A 192.0.2.1",
    ) == (["192.0.2.1"], 20, ("www.example.net.",))


def test_thousands_of_addresses_are_read():
    count = 4000
    records = [_record(1, n.to_bytes(4, "big")) for n in range(count)]
    made = _changed(flags=0x8180, answers=count) + b"".join(records)
    assert len(made) < 65_536
    assert len(read_answer(made, read_query(query()), NUMBER).addresses) == count


def test_names_that_cost_too_much_are_no_answer():
    """Each record's name is a label in front of one that has 120 of them."""
    long = b"\1a" * 120 + b"\0"
    first = long + struct.pack("!2HIH", 16, 1, 9, 0)
    more = b"".join(
        b"\1"
        + bytes([n & 255])
        + b"\xc0"
        + bytes([len(query())])
        + struct.pack("!2HIH", 16, 1, 9, 0)
        for n in range(4000)
    )
    with pytest.raises(AnswerError, match="more than 32768 labels"):
        read_answer(
            _changed(flags=0x8180, answers=4001) + first + more, read_query(query()), NUMBER
        )


@pytest.mark.parametrize("rcode", [2, 3, 5])
def test_an_error_teaches_nothing(rcode):
    made = response("www.example.com. 9 A 192.0.2.1", rcode=rcode)
    found = read_answer(made, read_query(query()), NUMBER)
    assert (found.rcode, found.addresses) == (rcode, ())


@pytest.mark.parametrize("rcode", [1, 4], ids=["FORMERR", "NOTIMP"])
def test_a_server_that_could_not_read_the_question_need_not_repeat_it(rcode):
    """RFC 6891 section 7; a whole answer without a question is none."""
    bare = struct.pack("!6H", NUMBER, 0x8180 | rcode, 0, 0, 0, 0)
    assert read_answer(bare, read_query(query()), NUMBER) == (rcode, False, (), 0, (), ())
    for other in (bare[:3] + b"\x80" + bare[4:], bare + b"\0", with_id(bare, NUMBER + 1)):
        with pytest.raises(AnswerError):
            read_answer(other, read_query(query()), NUMBER)


def test_an_answer_cut_inside_a_record_says_only_that_there_is_more():
    """RFC 2181 section 9: the client asks again over TCP."""
    made = bytearray(response("www.example.com. 9 A 192.0.2.1")[:-2])
    made[2] |= 0x02
    assert read_answer(bytes(made), read_query(query()), NUMBER) == (0, True, (), 0, (), ())


GOOD = response("www.example.com. 9 A 192.0.2.1")

NO_ANSWER = {
    "another id": with_id(GOOD, NUMBER + 1),
    "no response": query(),
    "another question": response(to=query("www.example.org.")),
    "another type": response(to=query(kind="AAAA")),
    "cut": GOOD[:-1],
    "more": GOOD + b"\0",
    "nothing": b"",
    "forward pointer": GOOD[:33] + b"\xc0\x2d" + GOOD[35:],
    "pointer to itself": GOOD[:33] + b"\xc0\x21" + GOOD[35:],
    "chain of pointers": _changed(flags=0x8180, answers=2)
    + _record(16, b"\xc0\x0c" + b"".join(b"\xc0" + bytes([43 + 2 * n + 2]) for n in range(20)))
    + b"\xc0\x57"
    + _record(1, bytes(4))[2:],
    "address of five bytes": _changed(flags=0x8180, answers=1) + _record(1, bytes(5)),
    "address of IPv6 in four": _changed(flags=0x8180, answers=1) + _record(28, bytes(4)),
    "name with a byte behind": _changed(flags=0x8180, answers=1) + _record(5, b"\1a\0\0"),
    "compressed question": _changed(flags=0x8180)[:12] + b"\xc0\x04" + QUESTION[-4:],
    "two questions": _changed(flags=0x8180, questions=2) + QUESTION,
}


@pytest.mark.parametrize("made", NO_ANSWER.values(), ids=NO_ANSWER)
def test_what_does_not_answer_the_question_is_no_answer(made):
    with pytest.raises(AnswerError):
        read_answer(made, read_query(query()), NUMBER)


def test_the_case_of_the_question_may_be_the_servers():
    asked = query("wWw.eXample.com.")
    made = response("www.example.com. 9 A 192.0.2.1", to=query())
    assert read_answer(made, read_query(asked), NUMBER).addresses == (b"\xc0\0\2\1",)


@given(st.binary(max_size=600))
def test_any_bytes_are_a_query_or_an_error(data):
    try:
        found = read_query(data)
    except QueryError as error:
        assert not error.answerable or len(blind_refusal(data, 5)) >= 12
    else:
        assert found.name.endswith(".")
        again = dns.message.from_wire(data)
        assert len(again.question) == 1


DIRECT, ALIAS = "www.example.com. 9 A 192.0.2.1", "www.example.com. 5 CNAME a.net."
PIECES = st.lists(
    st.sampled_from(
        [DIRECT, ALIAS, "a.net. 7 A 192.0.2.2", "a.net. 7 AAAA 2001:db8::1", "x.org. 1 TXT hello",
         "+www.example.com. 9 A 192.0.2.9"]
    ),
    max_size=6,
)  # fmt: skip


@given(PIECES, st.data())
def test_mutated_answers_are_read_as_dnspython_reads_them_or_refused(records, data):
    """`dns.message` reads all data of all records, and follows the name itself."""
    made = bytearray(response(*records))
    count = data.draw(st.integers(0, 3))
    for _ in range(count):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_answer(bytes(made), read_query(query()), NUMBER)
    except AnswerError:
        assert count
        return
    texts = {".".join(map(str, a)) for a in found.addresses if len(a) == 4}
    try:
        reference = dns.message.from_wire(bytes(made))
    except (dns.exception.DNSException, ValueError):
        return
    known = {
        record.address
        for rrset in reference.answer
        if (rrset.rdclass, rrset.rdtype) == (1, dns.rdatatype.A)
        for record in rrset
    }
    assert texts <= known
    if not count and not {DIRECT, ALIAS} <= set(records):  # nothing may stand beside CNAME
        chained = reference.resolve_chaining()
        assert texts == {record.address for record in chained.answer or ()}
        assert list(found.cnames) == [str(rrset[0].target) for rrset in chained.cnames]


@pytest.mark.parametrize("records", [("www.example.com. 9 A 192.0.2.1",), ()])
def test_every_cut_of_an_answer_is_refused(records):
    made = response(*records)
    for end in range(len(made)):
        with pytest.raises(AnswerError):
            read_answer(made[:end], read_query(query()), NUMBER)


def test_a_record_type_has_its_name_or_its_number():
    assert [wire.kind_text(n) for n in (1, 28, 65, 65280)] == ["A", "AAAA", "HTTPS", "TYPE65280"]
