"""What the kernel says of its table of flows."""

from pathlib import Path

import pytest

from firewall.datapath.kernel_table import TableCounters, read_table

STATISTICS = (
    "entries  clashres found new insert insert_failed drop early_drop icmp_error\n"
    "0000000f  00000000 00000001 00000000 00000000 00000002 0000000a 00000100 00000000\n"
    "0000000f  00000000 00000001 00000000 00000000 00000001 00000001 00000001 00000000\n"
)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "stat").write_text(STATISTICS)
    (tmp_path / "nf_conntrack_count").write_text("15\n")
    (tmp_path / "nf_conntrack_max").write_text("16\n")
    return tmp_path


def test_rows_of_all_processors_are_summed(proc: Path) -> None:
    assert read_table(proc / "stat", proc) == TableCounters(15, 16, 11, 257, 3)


def test_a_table_counts_as_full_when_the_kernel_gives_up_flows(proc: Path) -> None:
    table = read_table(proc / "stat", proc)
    assert table is not None
    assert not table.is_full
    assert table._replace(entries=16).is_full


@pytest.mark.parametrize("text", ["", "entries drop\n", "drop early_drop insert_failed\nx y z\n"])
def test_what_cannot_be_read_is_not_shown(proc: Path, text: str) -> None:
    (proc / "stat").write_text(text)
    assert read_table(proc / "stat", proc) is None
    assert read_table(proc / "nothing", proc) is None
