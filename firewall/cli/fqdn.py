"""`bartizan fqdn`: the names that DNS answered, and what policies mean by names."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from firewall.cli.client import Client, Query
from firewall.cli.output import output_option, show, table

F = TypeVar("F", bound=Callable[..., Any])


def _choice(function: F) -> F:
    """Add the options that choose entries of the cache."""
    function = click.option(
        "-p",
        "--matchpattern",
        default="",
        help='Names by pattern, as in policies: "*.example.com".',
    )(function)
    return click.option(
        "-e", "--endpoint", default="", help="Only what this endpoint learnt: its name or id."
    )(function)


def _query(endpoint: str, matchpattern: str) -> Query:
    query: Query = {}
    if endpoint:
        query["endpoint"] = endpoint
    if matchpattern:
        query["matchpattern"] = matchpattern
    return query


@click.group()
def fqdn() -> None:
    """Show and forget what DNS answered."""


@fqdn.group()
def cache() -> None:
    """The names that endpoints asked for, with their addresses."""


@cache.command("list")
@_choice
@click.option(
    "-s",
    "--source",
    type=click.Choice(["lookup", "connection"]),
    default=None,
    help="Only what counts for this reason.",
)
@output_option
@click.pass_obj
def list_cache(
    client: Client, endpoint: str, matchpattern: str, source: str | None, output: str
) -> None:
    """List what counts now.

    Source `lookup`: a DNS answer that has not expired (or was not looked at since). `connection`:
    it has expired, and stays because the endpoint has a connection to the address, or may be about
    to make one.
    """
    query = _query(endpoint, matchpattern)
    if source:
        query["source"] = source
    rows = client.get("fqdn", "cache", query=query)
    show(output, rows, lambda: _cache_table(rows))


@cache.command()
@_choice
@click.option(
    "-f",
    "--force",
    "--yes",
    "yes",
    is_flag=True,
    help="Do not ask, if everything would be forgotten.",
)
@click.pass_obj
def clean(client: Client, endpoint: str, matchpattern: str, yes: bool) -> None:
    """Forget names: their addresses close until they are asked for again.

    Connections to them end, where no other rule allows them.
    """
    if not (endpoint or matchpattern or yes):
        click.confirm("Forget every name that DNS answered?", abort=True)
    answer = client.change("DELETE", "fqdn", "cache", query=_query(endpoint, matchpattern))
    click.echo(f"{answer['count']} addresses forgotten")


@fqdn.command()
@output_option
@click.pass_obj
def names(client: Client, output: str) -> None:
    """List the selectors of toFQDNs, and which names and addresses each means now."""
    rows = client.get("fqdn", "names")
    show(output, rows, lambda: _names_table(rows))


def _cache_table(rows: list[dict[str, Any]]) -> str:
    header = ("Endpoint", "Source", "FQDN", "TTL", "ExpirationTime", "IPs")
    return table(
        header,
        [
            (
                str(row["endpoint"]),
                row["source"],
                row["fqdn"],
                str(row["ttl"]),
                row["expiration_time"],
                ",".join(row["ips"]),
            )
            for row in rows
        ],
    )


def _names_table(rows: list[dict[str, Any]]) -> str:
    return table(
        ("SELECTOR", "FQDN", "IPs"),
        [(row["selector"], row["fqdns"], row["ips"]) for row in rows],
    )
