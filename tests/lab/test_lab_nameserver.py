"""The labs' name server: what a zone file says, and what is answered."""

import dns.message
import pytest

from lab.nameserver import ZoneError, answer, read_zone

ZONE = """
# a comment
www.example 60 IN CNAME edge.example
edge.example 192.0.2.1
""".replace("edge.example 192", "edge.example A 192")


def asked(name, kind="A"):
    response = answer(read_zone(ZONE), dns.message.make_query(name, kind))
    return response.rcode(), [str(rrset) for rrset in response.answer]


def test_a_chain_is_answered_whole():
    assert asked("WWW.example") == (
        0,
        ["www.example. 60 IN CNAME edge.example.", "edge.example. 30 IN A 192.0.2.1"],
    )


def test_a_name_without_such_records_is_there_and_another_is_not():
    assert asked("edge.example", "AAAA") == (0, [])
    assert asked("nobody.example") == (3, [])


@pytest.mark.parametrize(
    "line", ["www.example A", "www.example A 1.2.3", "www.example", "a.b XYZ 1"]
)
def test_a_line_that_is_no_record_is_named(line):
    with pytest.raises(ZoneError, match=r"z:2: '.*' is no record"):
        read_zone(f"\n{line}\n", "z")
