"""DNS messages: one meaning or none, and only what the asked name leads to is learnt."""

import struct

import dns.exception
import dns.message
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy import dns as wire
from l7proxy.dns import AnswerError, QueryError, read_answer, read_query, refusal, with_id

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


def test_the_type_and_the_datagram_size_are_read():
    found = read_query(query(kind="AAAA", use_edns=0, payload=1232))
    assert (found.kind_text, found.payload_bytes, found.id) == ("AAAA", 1232, NUMBER)
    assert read_query(query()).payload_bytes == 512


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
    "compressed": (struct.pack("!6H", 1, 256, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1", True),
    "cut short": (query()[:-1], True),
    "behind the message": (query() + b"\0", True),
    "longer than 255": (
        struct.pack("!6H", 1, 256, 1, 0, 0, 0) + b"\x3f" * 256 + b"\0\0\1\0\1",
        True,
    ),
    "record of type 1": (_changed(additionals=1) + b"\0\0\1\0\1\0\0\0\0\0\4abcd", True),
}


@pytest.mark.parametrize(("said", "case"), NO_QUERY.items(), ids=NO_QUERY)
def test_what_may_be_read_in_two_ways_is_no_query(said, case):
    given_wire, answerable = case
    with pytest.raises(QueryError, match=said) as raised:
        read_query(given_wire)
    assert raised.value.answerable is answerable


def test_a_refusal_repeats_the_question():
    made = dns.message.from_wire(refusal(query(), 5))
    assert (made.id, made.rcode(), str(made.question[0])) == (NUMBER, 5, "www.example.com. IN A")
    assert made.flags & 0x8180 == 0x8100
    blind = dns.message.from_wire(refusal(_changed(questions=0), 3))
    assert (blind.id, blind.rcode(), blind.question) == (NUMBER, 3, [])


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
        assert not error.answerable or len(refusal(data, 5)) >= 12
    else:
        assert found.name.endswith(".")
        again = dns.message.from_wire(data)
        assert len(again.question) == 1


PIECES = st.lists(
    st.sampled_from(
        ["www.example.com. 9 A 192.0.2.1", "www.example.com. 5 CNAME a.net.",
         "a.net. 7 A 192.0.2.2", "a.net. 7 AAAA 2001:db8::1", "x.org. 1 TXT hello",
         "+www.example.com. 9 A 192.0.2.9"]
    ),
    max_size=6,
)  # fmt: skip


@given(PIECES, st.data())
def test_mutated_answers_are_read_as_dnspython_reads_them_or_refused(records, data):
    """Whatever both take has the same addresses of the same name for both."""
    made = bytearray(response(*records))
    for _ in range(data.draw(st.integers(0, 3))):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    asked = read_query(query())
    try:
        found = read_answer(bytes(made), asked, NUMBER)
    except AnswerError:
        return
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
    texts = {".".join(map(str, a)) for a in found.addresses if len(a) == 4}
    assert texts <= known


@pytest.mark.parametrize("records", [("www.example.com. 9 A 192.0.2.1",), ()])
def test_every_cut_of_an_answer_is_refused(records):
    made = response(*records)
    for end in range(len(made)):
        with pytest.raises(AnswerError):
            read_answer(made[:end], read_query(query()), NUMBER)


def test_a_record_type_has_its_name_or_its_number():
    assert [wire.kind_text(n) for n in (1, 28, 65, 65280)] == ["A", "AAAA", "HTTPS", "TYPE65280"]
