"""`bartizan conntrack`: the flows that the workers track."""

from typing import Any

import click

from firewall.cli.client import Client, Query
from firewall.cli.output import output_option, show, table


@click.group()
def conntrack() -> None:
    """Show tracked flows."""


@conntrack.command("list")
@click.option("--from", "sources", multiple=True, help="Endpoint or address; repeatable.")
@click.option("--to", "destinations", multiple=True, help="Endpoint or address; repeatable.")
@output_option
@click.pass_obj
def list_flows(
    client: Client, sources: tuple[str, ...], destinations: tuple[str, ...], output: str
) -> None:
    """List the flows of every worker, as one table."""
    query: Query = {}
    if sources:
        query["from"] = list(sources)
    if destinations:
        query["to"] = list(destinations)
    rows = client.get("conntrack", query=query)
    show(output, rows, lambda: _table(rows))


def _table(rows: list[dict[str, Any]]) -> str:
    header = ("PROTO", "SOURCE", "DESTINATION", "STATE", "FLAGS", "EXPIRES", "PACKETS", "BYTES")
    return table(
        header,
        [
            (
                str(row["protocol"]),
                str(row["source"]),
                str(row["destination"]),
                str(row["state"]),
                ",".join(row.get("flags", [])),
                f"{row['expires_s']:.0f}s",
                f"{row['packets'][0]}/{row['packets'][1]}",
                f"{row['bytes'][0]}/{row['bytes'][1]}",
            )
            for row in rows
        ],
    )
