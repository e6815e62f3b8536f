"""`bartizan run`, `cleanup` and `config`: the daemon's own commands."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from firewall.cli.exits import ExitCode
from firewall.cli.output import output_option, show, table

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
@click.option("--renew", is_flag=True, help="Replace workers that run, even those that fit.")
def run(path: Path | None, settings: tuple[str, ...], renew: bool) -> None:
    """Run the daemon for the network namespace that this command is started in.

    SIGHUP reloads configuration and policies (what is invalid changes nothing), SIGTERM drains and
    removes the rules, a second SIGTERM ends at once. SIGQUIT ends the agent alone: rules and
    workers stay, and the next start takes them over. SIGUSR2 upgrades in place: the program as it
    is now takes the place of agent and workers, while packets wait in their queues.
    """
    # Until the daemon listens to them they wait; before, one would end it during its imports.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR2})
    from firewall.agent.main import run as run_agent

    sys.exit(run_agent(path, _overrides(settings), renew=renew))


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


@click.group()
def config() -> None:
    """Show the configuration and where each value came from."""


@config.command()
@_CONFIG
@_SET
@click.option("--sources", is_flag=True, help="Add where each value came from.")
@output_option
def view(path: Path | None, settings: tuple[str, ...], sources: bool, output: str) -> None:
    """Show every setting as `bartizan run` with the same flags would have it."""
    from firewall.agent.document import DocumentError
    from firewall.agent.loading import load
    from firewall.agent.setting import value

    try:
        loaded = load(path, _overrides(settings), os.environ)
    except DocumentError as error:
        click.echo(str(error), err=True)
        sys.exit(ExitCode.USAGE)
    values = {name: value(loaded.config, name) for name in loaded.sources}
    document = [
        {"setting": name, "value": _plain(values[name]), "source": source}
        for name, source in loaded.sources.items()
    ]
    header = ("SETTING", "VALUE", "SOURCE") if sources else ("SETTING", "VALUE")
    rows = [
        (name, _text(values[name]), source)[: len(header)]
        for name, source in loaded.sources.items()
    ]
    show(output, document, lambda: table(header, rows))


def _text(value: Any) -> str:
    plain = _plain(value)
    return ", ".join(plain) if isinstance(plain, list) else "-" if plain is None else str(plain)


def _plain(value: Any) -> str | int | float | bool | list[str] | None:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, tuple):
        return [getattr(item, "name", str(item)) for item in value]
    return str(value)
