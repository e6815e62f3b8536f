"""Packet marks: one mask, one meaning per value, nobody else's bits touched."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firewall.datapath.marks import DEFAULT_MASK, KIND_BITS, MIN_BITS, Kind, Marks, MaskError


@st.composite
def masks(draw):
    width = draw(st.integers(MIN_BITS, 32))
    return ((1 << width) - 1) << draw(st.integers(0, 32 - width))


@given(masks(), st.sampled_from(Kind), st.integers(0, 1 << 40), st.integers(0, 0xFFFFFFFF))
def test_what_is_put_is_read_and_other_bits_stay(mask, kind, number, before):
    marks = Marks(mask)
    after = marks.put(before, kind, number)
    assert marks.kind(after) is kind
    assert marks.number(after) == number % marks.number_count
    assert after & ~mask == before & ~mask
    assert 0 <= after <= 0xFFFFFFFF


@given(masks())
def test_every_mark_has_its_own_value(mask):
    marks = Marks(mask)
    values = {marks.of(kind).value for kind in Kind}
    assert len(values) == len(Kind)
    assert marks.of(Kind.NONE).value == 0


@given(masks(), st.sampled_from(Kind), st.integers(0, 100))
def test_any_of_matches_a_kind_whatever_its_number(mask, kind, number):
    marks = Marks(mask)
    value, bits = marks.any_of(kind)
    assert marks.of(kind, number).value & bits == value
    others = [other for other in Kind if other is not kind]
    assert all(marks.of(other, number).value & bits != value for other in others)


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        (0, "32 bits"),
        (1 << 32, "32 bits"),
        (-1, "32 bits"),
        (0xF0F00000, "gap"),
        (0x0F000000, "narrow"),
    ],
)
def test_a_mask_that_cannot_hold_the_marks_is_refused(mask, complaint):
    with pytest.raises(MaskError, match=complaint):
        Marks(mask)


def test_a_mark_is_written_as_iptables_reads_it():
    assert str(Marks().of(Kind.TO_PROXY)) == "0x1000000/0xff000000"
    assert str(Marks(0x3F0).of(Kind.OFFLOAD, 3)) == "0x1c0/0x3f0"


def test_there_is_room_for_every_kind():
    assert len(Kind) <= 1 << KIND_BITS
    assert Marks().number_count == 32
    assert Marks().mask == DEFAULT_MASK
