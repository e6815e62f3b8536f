"""`bartizan identity`: the numbers that label sets have."""

from typing import Any

import click

from firewall.cli.client import Client
from firewall.cli.output import output_option, show, table


@click.group()
def identity() -> None:
    """Show identities."""


@identity.command("list")
@click.option("--endpoints", is_flag=True, help="Add how many endpoints use each.")
@output_option
@click.pass_obj
def list_identities(client: Client, endpoints: bool, output: str) -> None:
    """List every identity known here, reserved ones first."""
    rows = client.get("identity")
    show(output, rows, lambda: _table(rows, endpoints=endpoints))


@identity.command()
@click.argument("number", type=int)
@output_option
@click.pass_obj
def get(client: Client, number: int, output: str) -> None:
    """Show one identity."""
    row = client.get("identity", str(number))
    show(output, row, lambda: _table([row], endpoints=True))


def _table(rows: list[dict[str, Any]], *, endpoints: bool) -> str:
    header = ["ID", "LABELS", *(["REFCOUNT"] if endpoints else [])]
    return table(
        header,
        [
            [str(row["id"]), row["labels"], *([str(row.get("refcount", 0))] if endpoints else [])]
            for row in rows
        ],
    )
