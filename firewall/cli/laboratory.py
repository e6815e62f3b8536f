"""`bartizan lab` and `bartizan demo`: throw-away hosts."""

import sys
from pathlib import Path

import click


@click.group()
def lab() -> None:
    """Throw-away hosts in private namespaces."""


@lab.command()
@click.option(
    "-f",
    "--file",
    "path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The lab file.",
)
@click.option("--firewall", is_flag=True, help="Run bartizan in the node, every host an endpoint.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def up(path: Path, firewall: bool, command: tuple[str, ...]) -> None:
    """Build the lab of a file and open a shell, or run COMMAND, in its node.

    Leaving the shell ends the lab, and nothing of it is left.
    """
    from lab.commands import up as build

    sys.exit(build(path, command, firewall=firewall))


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@click.option("--lab", "name", help="Which lab, if several are up.")
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(name: str | None, host: str, command: tuple[str, ...]) -> None:
    """Run a command on a host of the lab that is up: `bartizan lab exec HOST -- cmd`.

    The node is a host too.
    """
    from lab.commands import exec_

    sys.exit(exec_(host, command, lab=name))


@lab.command("list")
def list_labs() -> None:
    """List the labs that are up."""
    from lab.commands import list_

    sys.exit(list_())


@click.command()
@click.argument("chapters", nargs=-1, metavar="[CHAPTER|all]...")
@click.option("--step", type=click.IntRange(min=1), help="Stop each chapter after this step.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bartizan-demo"),
    show_default=True,
    help="Where the policy files are written, for you to edit.",
)
def demo(chapters: tuple[str, ...], step: int | None, folder: Path) -> None:
    """Play chapters of the demo: real packets, throw-away namespaces, under a minute.

    "starwars" is played if none is named, "all" plays every one.
    """
    from lab.demo import play

    for name in chapters:
        if name not in (*play.CHAPTERS, play.ALL):
            known = ", ".join((*play.CHAPTERS, play.ALL))
            raise click.BadParameter(f"no chapter {name!r}; there are {known}")
    sys.exit(play.main(chapters, step, folder))
