"""Which of nftables' messages mean that rules are gone."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firewall.agent.rules import deletes


def message(kind: int, body: bytes = bytes(4)) -> bytes:
    """An event of nftables (NFNL_SUBSYS_NFTABLES is 10), as nfnetlink sends it."""
    data = struct.pack("=IHHII", 16 + len(body), 10 << 8 | kind, 0, 0, 0) + body
    return data + bytes(-len(data) % 4)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([2], True),  # a table
        ([5], True),  # a chain
        ([8], True),  # a rule
        ([0, 3, 6, 12, 14], False),  # what is new, an element of a set that is gone
        ([6, 6, 8], True),
        ([], False),
    ],
)
def test_deletions_of_tables_chains_and_rules_count(kinds, expected):
    assert deletes(b"".join(message(kind, bytes(5)) for kind in kinds)) is expected


@given(st.binary(max_size=200))
def test_any_bytes_are_read_to_their_end(data):
    assert deletes(data) in (True, False)
