"""The tables are total, every state is reachable, every cell has a reason beside it."""

import re
from pathlib import Path
from typing import Any

import pytest

from conntrack import sctp_states, tcp_states
from conntrack.profile import LINUX, STRICT
from conntrack.sctp_states import LINUX_SCTP_TABLE, STRICT_SCTP_TABLE, SctpChunk, SctpState
from conntrack.tcp_states import (
    EVENT_OF_FLAGS,
    IG,
    IV,
    LINUX_TABLE,
    MALFORMED,
    NW,
    STRICT_TABLE,
    TcpEvent,
    TcpState,
)

TCP_TABLES = {"strict": STRICT_TABLE, "linux": LINUX_TABLE}


@pytest.mark.parametrize("name", TCP_TABLES)
def test_the_tcp_table_is_total(name: str) -> None:
    """Every direction, event and state has a cell that is a state or a mark."""
    table = TCP_TABLES[name]
    assert len(table) == 2
    for direction in table:
        assert len(direction) == len(TcpEvent)
        for row in direction:
            assert len(row) == len(TcpState)
            assert all(cell in (IV, IG, NW) or TcpState(cell) for cell in row)


def reachable(table: tuple[tuple[tuple[int, ...], ...], ...], count: int) -> set[int]:
    seen, waiting = {0}, [0]
    while waiting:
        state = waiting.pop()
        for direction in table:
            for row in direction:
                if row[state] >= 0 and row[state] not in seen:
                    seen.add(row[state])
                    waiting.append(row[state])
    assert seen <= set(range(count))
    return seen


def test_every_state_of_linux_is_reachable() -> None:
    """A state that nothing leads to would be dead text."""
    assert reachable(LINUX_TABLE, len(TcpState)) == set(TcpState)


def test_strict_reaches_all_but_the_state_it_replaces() -> None:
    """STRICT has no SYN_SENT2: a SYN from the other side opens a flow of its own."""
    assert reachable(STRICT_TABLE, len(TcpState)) == set(TcpState) - {TcpState.SYN_SENT2}


@pytest.mark.parametrize("table", [STRICT_SCTP_TABLE, LINUX_SCTP_TABLE])
def test_every_association_state_is_reachable(table: Any) -> None:
    """As for TCP."""
    assert reachable(table, len(SctpState)) == set(SctpState)


@pytest.mark.parametrize("table", [STRICT_SCTP_TABLE, LINUX_SCTP_TABLE])
def test_the_sctp_table_is_total(table: Any) -> None:
    """Every direction, chunk and state has a cell."""
    for direction in table:
        assert len(direction) == len(SctpChunk)
        for row in direction:
            assert len(row) == len(SctpState)
            assert all(cell == sctp_states.IV or SctpState(cell) for cell in row)


def test_a_closed_flow_is_left_only_by_a_new_one() -> None:
    """CLOSE is absorbing in STRICT: IG, IV or NW."""
    for direction in STRICT_TABLE:
        assert {row[TcpState.CLOSE] for row in direction} <= {IG, IV, NW}


def test_nothing_but_syn_opens_in_strict() -> None:
    """Column NONE has one entrance."""
    entrances = [row[TcpState.NONE] for direction in STRICT_TABLE for row in direction]
    assert [cell for cell in entrances if cell != IV] == [TcpState.SYN_SENT]


def test_nine_flag_sets_are_events() -> None:
    """PSH, ECE and CWR say nothing; every other set is malformed."""
    valid = {flags & 0x37 for flags in range(256) if EVENT_OF_FLAGS[flags] != MALFORMED}
    assert valid == {0x02, 0x22, 0x12, 0x04, 0x14, 0x11, 0x31, 0x10, 0x30}
    for flags in range(256):
        assert EVENT_OF_FLAGS[flags] == EVENT_OF_FLAGS[flags & 0x37]


@pytest.mark.parametrize("profile", [STRICT, LINUX], ids=lambda profile: profile.name)
def test_every_state_has_a_timeout(profile: object) -> None:
    """One per state, positive."""
    assert profile in (STRICT, LINUX)
    timeouts = STRICT.timeouts if profile is STRICT else LINUX.timeouts
    assert len(timeouts.tcp) == len(TcpState)
    assert len(timeouts.sctp) == len(SctpState)
    assert min(timeouts.tcp + timeouts.sctp) > 0


@pytest.mark.parametrize("module", [tcp_states, sctp_states], ids=lambda module: module.__name__)
def test_every_row_has_reasons_below_it(module: object) -> None:
    """A row of cells is followed by a comment that says why."""
    source = Path(str(module.__file__)).read_text().splitlines()  # type: ignore[attr-defined]
    rows = [n for n, line in enumerate(source) if re.match(r"^ {8}\((\w\w, ){8,}\w\w\),", line)]
    assert len(rows) == (24 if module is tcp_states else 48)
    for number in rows:
        assert source[number + 1].strip().startswith("#")
