"""Longest prefix match, and whose word counts for a prefix."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conntrack.address import Prefix, address_in, mask, parse_address, parse_prefix
from firewall.identities.ipcache import LongestPrefixMap


def prefixes(pairs):
    found = LongestPrefixMap()
    for text, value in pairs.items():
        found.insert(parse_prefix(text), value)
    return found


def test_the_longest_prefix_wins():
    found = prefixes({"0.0.0.0/0": 1, "10.0.0.0/8": 2, "10.1.0.0/16": 3, "10.1.2.3/32": 4})
    assert [
        found.lookup(parse_address(a)) for a in ("10.1.2.3", "10.1.2.4", "10.9.9.9", "11.0.0.1")
    ] == [4, 3, 2, 1]


def test_the_families_do_not_meet():
    """::/0 holds no IPv4 address, and an IPv4-mapped IPv6 address is IPv6."""
    found = prefixes({"::/0": 6, "::ffff:10.0.0.0/104": 66})
    assert found.lookup(parse_address("10.0.0.1")) is None
    assert found.lookup(parse_address("::ffff:10.0.0.1")) == 66
    assert prefixes({"0.0.0.0/0": 4}).lookup(parse_address("::1")) is None


def test_host_bits_of_a_prefix_do_not_matter():
    found = LongestPrefixMap()
    found.insert(Prefix(parse_address("10.1.2.3"), 8), "ten")
    assert found.lookup(parse_address("10.200.0.1")) == "ten"
    assert [p for p, _ in found] == [parse_prefix("10.0.0.0/8")]


def test_a_removed_prefix_uncovers_the_shorter_one():
    found = prefixes({"10.0.0.0/8": 2, "10.1.0.0/16": 3})
    assert found.remove(parse_prefix("10.1.0.0/16")) == 3
    assert found.remove(parse_prefix("10.1.0.0/16")) is None
    assert found.lookup(parse_address("10.1.2.3")) == 2
    assert len(found) == 1


def test_the_prefixes_around_a_prefix_come_longest_first():
    found = prefixes({"10.0.0.0/8": 2, "10.1.0.0/16": 3, "10.1.2.0/24": 4, "10.2.0.0/16": 5})
    around = list(found.covering(parse_prefix("10.1.0.0/16")))
    assert around == [(parse_prefix("10.1.0.0/16"), 3), (parse_prefix("10.0.0.0/8"), 2)]


@pytest.mark.parametrize("prefix", [Prefix(bytes(4), 33), Prefix(bytes(5), 8), Prefix(b"", 0)])
def test_what_is_no_prefix_is_refused(prefix):
    with pytest.raises(ValueError, match=r"prefix length|bytes"):
        LongestPrefixMap().insert(prefix, 1)


def one_prefix(size):
    return st.builds(
        lambda address, length: Prefix(mask(address, length), length),
        st.binary(min_size=size, max_size=size),
        st.integers(0, size * 8),
    )


@given(
    st.dictionaries(one_prefix(4) | one_prefix(16), st.integers(1), max_size=12),
    st.data(),
)
def test_a_lookup_finds_what_a_search_of_all_prefixes_finds(entries, data):
    """Property: the map equals its definition, for addresses near the prefixes too."""
    found = LongestPrefixMap()
    for prefix, value in entries.items():
        found.insert(prefix, value)
    near = [prefix.network for prefix in entries] or [bytes(4)]
    address = data.draw(st.sampled_from(near) | st.binary(min_size=4, max_size=4))
    holding = [p for p in entries if len(p.network) == len(address) and address_in(address, p)]
    expected = entries[max(holding, key=lambda p: p.length)] if holding else None
    assert found.lookup(address) == expected
    assert dict(found) == entries
