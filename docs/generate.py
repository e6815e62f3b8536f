"""Write the pages that come from the source: `make docs`. A test says when one is stale."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from firewall.cli import main
from firewall.cli.exits import ExitCode

FOLDER = Path(__file__).parent

_EXITS = {
    ExitCode.OK: "done, or everything is well",
    ExitCode.FAILED: "what was asked about is not well, or the agent refused",
    ExitCode.USAGE: "the command line or the configuration is wrong",
    ExitCode.UNABLE: "the machine cannot: no agent, no NFQUEUE, no permission",
    ExitCode.INVALID: "a policy, endpoint, test or capture file is invalid",
    ExitCode.NOTHING_SELECTED: "`bartizan test`: no check is selected",
    ExitCode.DISAGREEMENT: "`bartizan test`: the model and real packets disagree",
}


def command_line() -> str:
    """Render docs/cli.md: every command with its help, and the exit codes."""
    parts = [
        "# The `bartizan` command",
        "Written by `make docs` from the source; change the command, not this page.",
        "## Exit codes",
        "| code | meaning |\n|---|---|\n"
        + "\n".join(f"| {code.value} | {text} |" for code, text in _EXITS.items()),
        "## Environment",
        (
            "Every option can be given as `BARTIZAN_<COMMAND>_<OPTION>`; most people set\n"
            "`BARTIZAN_API_SOCKET` and `BARTIZAN_CONFIG`."
        ),
        *_commands(main, "bartizan"),
    ]
    return "\n\n".join(parts) + "\n"


def _commands(command: click.Command, path: str) -> Iterator[str]:
    context = click.Context(
        command,
        info_name=path,
        terminal_width=92,
        max_content_width=92,
        # As if called through `bartizan`, which also takes -h.
        help_option_names=main.context_settings["help_option_names"],
    )
    yield f"## {path}"
    yield f"```\n{command.get_help(context)}\n```"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _commands(child, f"{path} {name}")


PAGES: dict[str, Callable[[], str]] = {"cli.md": command_line}
"""Page name -> what it must contain."""


def stale() -> list[str]:
    """Return the names of the pages that differ from what the source says."""
    return [
        name
        for name, render in PAGES.items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text() != render()
    ]


if __name__ == "__main__":
    for name, render in PAGES.items():
        (FOLDER / name).write_text(render())
        sys.stdout.write(f"docs/{name}\n")
