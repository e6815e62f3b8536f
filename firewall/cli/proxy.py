"""`bartizan proxy`: what the L7 proxy has to do, and who does it."""

from typing import Any

import click

from firewall.cli.client import Client
from firewall.cli.output import output_option, show, table


@click.group()
def proxy() -> None:
    """Show the L7 proxy."""


@proxy.command("list")
@output_option
@click.pass_obj
def list_redirects(client: Client, output: str) -> None:
    """List redirects (endpoint and port with L7 rules) with their requests, then the workers."""
    document = client.get("proxy")
    show(output, document, lambda: _tables(document))


def _tables(document: dict[str, Any]) -> str:
    redirects = table(
        [
            "ENDPOINT", "NAME", "DIRECTION", "PORT", "PARSER", "PROXY PORT", "RECEIVED",
            "FORWARDED", "DENIED",
        ],
        [
            [
                str(row["endpoint"]), row["name"], row["direction"], _port(row), row["parser"],
                *(str(row[key]) for key in ("proxy_port", "received", "forwarded", "denied")),
            ]
            for row in document["redirects"]
        ],
    )  # fmt: skip
    workers = table(
        ["WORKER", "PID", "STATE", "SNAPSHOT", "CONNECTIONS", "UPSTREAM", "MEMORY"],
        [
            [
                f"l7proxy-{row['number']}", str(row["pid"]), row["state"], str(row["revision"]),
                str(row["connection_count"]), str(row["upstream_count"]),
                f"{row['memory_bytes'] / 2**20:.0f} MiB",
            ]
            for row in document["workers"]
        ],
    )  # fmt: skip
    return f"{redirects}\n\n{workers}"


def _port(row: dict[str, Any]) -> str:
    ports = (
        str(row["port"]) if row["port"] == row["end_port"] else f"{row['port']}-{row['end_port']}"
    )
    return f"{ports}/{row['protocol']}"
