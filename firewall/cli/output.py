"""Tables as Cilium prints them, or the same rows as JSON or YAML.

Columns are at least 5 wide and 3 apart, as in Cilium's tabwriter; a cell may have several lines.
No colour, no wrapping: what is printed survives grep and awk.
"""

import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import click

MIN_WIDTH = 5
PADDING = 3

Row = Sequence[str | Sequence[str]]
F = TypeVar("F", bound=Callable[..., Any])


def output_option(function: F) -> F:
    """Add `-o table|json|yaml` to a command."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "yaml"]),
        default="table",
        show_default=True,
        help="How to print the result.",
    )(function)


def show(output: str, document: Any, table: Callable[[], str]) -> None:
    """Print `document` as JSON or YAML, or what `table` renders."""
    if output == "json":
        click.echo(json.dumps(document, indent=2))
    elif output == "yaml":
        click.echo(as_yaml(document), nl=False)
    else:
        click.echo(table())


def as_yaml(document: Any) -> str:
    """Render with keys in their own order, block style."""
    from firewall.policy.dump import dump

    return dump(document)


def table(header: Row, rows: Sequence[Row]) -> str:
    """Align `rows` under `header`; a cell that is a sequence takes one line per item."""
    lines = [line for row in (header, *rows) for line in _physical(row)]
    widths = [max(MIN_WIDTH, *map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        (" " * PADDING)
        .join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        .rstrip()
        for line in lines
    )


def _physical(row: Row) -> list[tuple[str, ...]]:
    cells = [[cell] if isinstance(cell, str) else list(cell) or [""] for cell in row]
    return list(zip_longest(*cells, fillvalue=""))
