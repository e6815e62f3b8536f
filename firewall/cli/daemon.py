"""`bartizan run`, `cleanup` and `config`: the daemon's own commands."""

import sys
from pathlib import Path

import click

_CONFIG = click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="BARTIZAN_CONFIG",
    help="The configuration file; without it every setting has its default.",
)
_SET = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting; repeatable."
)


@click.command()
@_CONFIG
@_SET
def run(path: Path | None, settings: tuple[str, ...]) -> None:
    """Run the daemon for the network namespace that this command is started in.

    SIGHUP reloads configuration and policies (what is invalid changes nothing), SIGTERM drains and
    removes the rules, a second SIGTERM ends at once.
    """
    from firewall.agent.main import run as run_agent

    sys.exit(run_agent(path, _overrides(settings)))


@click.command()
@_CONFIG
@_SET
def cleanup(path: Path | None, settings: tuple[str, ...]) -> None:
    """Remove rules, sets, routes, sockets and workers that a killed daemon left behind."""
    from firewall.agent.main import cleanup as clean

    sys.exit(clean(path, _overrides(settings)))


def _overrides(settings: tuple[str, ...]) -> dict[str, str]:
    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise click.UsageError(f"--set {setting}: expected KEY=VALUE")
        overrides[key] = value
    return overrides
