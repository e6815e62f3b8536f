"""Addresses and prefixes as text and as bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conntrack import address
from conntrack.address import Prefix

ADDRESSES = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))


@given(ADDRESSES)
def test_text_and_bytes_are_inverse(packed: bytes) -> None:
    """parse(format(a)) == a, for every address there is."""
    assert address.parse_address(address.format_address(packed)) == packed


@given(ADDRESSES, st.integers(0, 128))
def test_a_prefix_contains_what_it_was_made_from(packed: bytes, length: int) -> None:
    """Masking keeps membership; the text keeps the prefix."""
    length = min(length, len(packed) * 8)
    prefix = Prefix(address.mask(packed, length), length)
    assert address.address_in(packed, prefix)
    assert address.parse_prefix(address.format_prefix(prefix), strict=True) == prefix
    assert address.prefix_contains(Prefix(prefix.network[:0] + bytes(len(packed)), 0), prefix)


@pytest.mark.parametrize(
    "text",
    ["", "10.0.0", "10.0.0.256", "010.0.0.1", "fe80::1%eth0", "10.0.0.1/32", "::g", "1.2.3.4.5"],
)
def test_what_is_not_one_address_is_refused(text: str) -> None:
    """Leading zeros and zones mean different things to different readers (RFC 6943 3.1.1)."""
    with pytest.raises(ValueError, match=r"."):
        address.parse_address(text)


@pytest.mark.parametrize(
    "text",
    ["10.0.0.0/33", "::/129", "10.0.0.0/-1", "10.0.0.0/", "10.0.0.0/08", "10.0.0.0/255.0.0.0"],
)
def test_what_is_not_a_prefix_is_refused(text: str) -> None:
    """RFC 4632 3.1: a decimal length, nothing else."""
    with pytest.raises(ValueError, match="prefix length"):
        address.parse_prefix(text)


def test_host_bits_are_masked_unless_strict() -> None:
    """People write 10.1.2.3/8; a strict reader wants to know."""
    assert str(address.parse_prefix("10.1.2.3/8")) == "10.0.0.0/8"
    with pytest.raises(ValueError, match=r"10\.0\.0\.0"):
        address.parse_prefix("10.1.2.3/8", strict=True)


def test_a_bare_address_is_its_own_prefix() -> None:
    """/32 and /128."""
    assert address.parse_prefix("10.1.2.3").length == 32
    assert address.parse_prefix("fd00::1").length == 128


def test_families_do_not_mix() -> None:
    """0.0.0.0/0 holds no IPv6 address, ::/0 no IPv4 address."""
    assert not address.address_in(bytes(16), address.parse_prefix("0.0.0.0/0"))
    assert not address.prefix_contains(address.parse_prefix("::/0"), Prefix(bytes(4), 32))


@pytest.mark.parametrize(
    ("text", "multicast", "link_local", "loopback"),
    [
        ("224.0.0.1", True, False, False),
        ("239.255.255.255", True, False, False),
        ("240.0.0.1", False, False, False),
        ("ff02::1", True, False, False),
        ("169.254.1.1", False, True, False),
        ("fe80::1", False, True, False),
        ("febf::1", False, True, False),
        ("fec0::1", False, False, False),
        ("127.3.2.1", False, False, True),
        ("::1", False, False, True),
        ("::2", False, False, False),
    ],
)
def test_special_addresses(text: str, multicast: bool, link_local: bool, loopback: bool) -> None:
    """RFC 5771, 3927, 4291, 1122."""
    packed = address.parse_address(text)
    assert address.is_multicast(packed) is multicast
    assert address.is_link_local(packed) is link_local
    assert address.is_loopback(packed) is loopback


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("::", "unspecified"),
        ("127.3.2.1", "loopback"),
        ("::1", "loopback"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("::ffff:10.0.0.1", "write 10.0.0.1"),
        ("10.0.0.0", ""),
        ("169.254.1.1", ""),
        ("240.0.0.1", ""),
        ("fe80::1", ""),
        ("64:ff9b::a00:1", ""),
    ],
)
def test_addresses_that_no_host_can_have(text: str, reason: str) -> None:
    """RFC 1122 3.2.1.3, RFC 4291 2.5. A subnet's first address is one in a routed world."""
    said = address.why_unusable(address.parse_address(text))
    assert (reason in said) if reason else not said
