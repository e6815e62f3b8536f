"""How long a command waits until its change is enforced."""

import click

from firewall.cli.client import Query

wait_option = click.option(
    "--wait",
    "wait_s",
    type=float,
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Return when every worker enforces the change; 0 returns at once.",
)
"""The option of every command that changes something; the parameter is `wait_s`."""


def waiting(wait_s: float) -> Query:
    """Return what tells the agent how long to wait."""
    return {"wait": f"{wait_s:g}"}
