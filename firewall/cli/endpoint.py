"""`bartizan endpoint`: the hosts that policy is enforced for."""

from typing import Any

import click

from firewall.cli.client import Client
from firewall.cli.output import output_option, show, table
from firewall.cli.waiting import wait_option, waiting

_NAME = click.argument("name", metavar="[NAMESPACE/]NAME|ID")


@click.group()
def endpoint() -> None:
    """Manage endpoints."""


@endpoint.command()
@click.argument("name")
@click.option("--ip", "addresses", multiple=True, required=True, help="An address; repeatable.")
@click.option("--label", "labels", multiple=True, help="[source:]key[=value]; repeatable.")
@click.option(
    "-n", "--namespace", default="default", show_default=True, help="Its Kubernetes namespace."
)
@click.option("--netns", help="Its network namespace: a name, a path, or a pid.")
@click.option("--interface", help="The node's side of its link.")
@click.option("--port", "ports", multiple=True, help="A named port, name:number[/protocol].")
@click.option("--audit", is_flag=True, help="Report what policy would drop, and let it pass.")
@click.option("--replace", is_flag=True, help="Change an endpoint of this name that is there.")
@wait_option
@output_option
@click.pass_obj
def add(
    client: Client,
    name: str,
    addresses: tuple[str, ...],
    labels: tuple[str, ...],
    namespace: str,
    netns: str | None,
    interface: str | None,
    ports: tuple[str, ...],
    audit: bool,
    replace: bool,
    wait_s: float,
    output: str,
) -> None:
    """Put an address under policy.

    An endpoint that is there already with other settings is left alone, unless --replace is given.

    With --netns or --interface packets that come from the endpoint's link with another source
    address are dropped as well.
    """
    if netns and interface:
        raise click.UsageError("--netns and --interface are two ways to say the same: give one")
    document: dict[str, Any] = {
        "addresses": list(addresses),
        "labels": list(labels),
        "namespace": namespace,
        "ports": list(ports),
        "audit": audit,
    }
    if netns:
        document["netns"] = netns
    if interface:
        document["interface"] = interface
    query = waiting(wait_s) if replace else {**waiting(wait_s), "new": "1"}
    row = client.change("PUT", "endpoint", name, query=query, document=document)
    show(output, row, lambda: _table([row]))


@endpoint.command("list")
@output_option
@click.pass_obj
def list_endpoints(client: Client, output: str) -> None:
    """List endpoints with their enforcement, identity, labels, addresses and state."""
    rows = client.get("endpoint")
    show(output, rows, lambda: _table(rows))


@endpoint.command()
@_NAME
@output_option
@click.pass_obj
def get(client: Client, name: str, output: str) -> None:
    """Show one endpoint; -o json shows all of it, the log of its states included."""
    row = client.get("endpoint", name)
    show(output, row, lambda: _table([row]))


@endpoint.command()
@_NAME
@click.argument("changes", nargs=-1, required=True, metavar="KEY=VALUE|KEY-...")
@wait_option
@output_option
@click.pass_obj
def label(client: Client, name: str, changes: tuple[str, ...], wait_s: float, output: str) -> None:
    """Set labels (key=value) and remove them (key-), as kubectl does.

    Another set of security-relevant labels is another identity.
    """
    document = {
        "set": [change for change in changes if not _removes(change)],
        "remove": [change[:-1] for change in changes if _removes(change)],
    }
    row = client.change(
        "PATCH", "endpoint", name, "labels", query=waiting(wait_s), document=document
    )
    show(output, row, lambda: _table([row]))


@endpoint.command()
@_NAME
@wait_option
@click.pass_obj
def delete(client: Client, name: str, wait_s: float) -> None:
    """Stop managing an endpoint."""
    client.change("DELETE", "endpoint", name, query=waiting(wait_s))
    click.echo(f"endpoint {name} deleted")


def _removes(change: str) -> bool:
    return change.endswith("-") and "=" not in change


def _table(rows: list[dict[str, Any]]) -> str:
    header = (
        "ENDPOINT",
        "NAME",
        ("POLICY (ingress)", "ENFORCEMENT"),
        ("POLICY (egress)", "ENFORCEMENT"),
        "IDENTITY",
        "LABELS (source:key[=value])",
        "IPv6",
        "IPv4",
        "STATUS",
    )
    return table(
        header,
        [
            (
                str(row["id"]),
                f"{row['namespace']}/{row['name']}",
                _enforcement(row["policy"]["ingress"]),
                _enforcement(row["policy"]["egress"]),
                str(row["identity"]["id"]),
                row["identity"]["labels"],
                row["addresses"]["ipv6"],
                row["addresses"]["ipv4"],
                row["state"],
            )
            for row in rows
        ],
    )


def _enforcement(direction: dict[str, bool]) -> str:
    if direction.get("audit"):
        return "Disabled (Audit)"
    return "Enabled" if direction["enforced"] else "Disabled"
