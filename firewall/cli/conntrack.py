"""`bartizan conntrack`: the flows that the workers track."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from firewall.cli.client import Client, Query
from firewall.cli.output import output_option, show, table

F = TypeVar("F", bound=Callable[..., Any])


def _ends_options(function: F) -> F:
    """Add `--from` and `--to`."""
    what = "Endpoint, address or address:port; repeatable."
    function = click.option("--to", "destinations", multiple=True, help=what)(function)
    return click.option("--from", "sources", multiple=True, help=what)(function)


def _query(sources: tuple[str, ...], destinations: tuple[str, ...]) -> Query:
    query: Query = {}
    if sources:
        query["from"] = list(sources)
    if destinations:
        query["to"] = list(destinations)
    return query


@click.group()
def conntrack() -> None:
    """Show and forget tracked flows."""


@conntrack.command("list")
@_ends_options
@output_option
@click.pass_obj
def list_flows(
    client: Client, sources: tuple[str, ...], destinations: tuple[str, ...], output: str
) -> None:
    """List the flows of every worker, as one table."""
    rows = client.get("conntrack", query=_query(sources, destinations))
    show(output, rows, lambda: _table(rows))


@conntrack.command("flush")
@_ends_options
@click.option("--all", "everything", is_flag=True, help="Every flow of every endpoint.")
@output_option
@click.pass_obj
def flush(
    client: Client,
    sources: tuple[str, ...],
    destinations: tuple[str, ...],
    everything: bool,
    output: str,
) -> None:
    """Forget flows, also those that the kernel carries.

    Their connections end, unless they are proxied: what follows belongs to no known flow, and TCP
    has to connect anew.
    """
    query = _query(sources, destinations)
    if bool(query) == everything:
        raise click.UsageError("say which flows: --from, --to, or --all")
    if everything:
        query["all"] = "1"
    answer = client.change("DELETE", "conntrack", query=query)
    text = f"{answer['flows']} flows forgotten, {answer['kernel']} of them by the kernel too"
    show(output, answer, lambda: text)


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
