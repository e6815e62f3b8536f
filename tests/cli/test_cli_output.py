"""What tables look like: aligned, wide enough, one physical line per item of a cell."""

from firewall.cli.output import table


def test_columns_are_at_least_five_wide_and_three_apart() -> None:
    """Cilium's tabwriter: minimum width 5, padding 3; no trailing blanks."""
    assert table(("ID", "LABELS"), [("1", "reserved:host")]) == (
        "ID      LABELS\n1       reserved:host"
    )


def test_a_cell_of_several_items_takes_a_line_each() -> None:
    """Labels stand one below the other, the other columns stay blank."""
    text = table(("ID", "LABELS", "STATE"), [("7", ["k8s:a=b", "k8s:c=d"], "ready")])
    assert text.splitlines() == [
        "ID      LABELS    STATE",
        "7       k8s:a=b   ready",
        "        k8s:c=d",
    ]


def test_an_empty_list_is_an_empty_cell() -> None:
    """An endpoint without IPv6 still has its row."""
    assert table(("A", "B", "C"), [("x", [], "y")]).splitlines()[1] == "x               y"
