"""Write the pages that come from the source: `make docs`. A test says when one is stale."""

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from firewall.agent import api
from firewall.agent.api import Api
from firewall.agent.config import Config
from firewall.agent.setting import SettingRow, settings
from firewall.cli import main
from firewall.cli.exits import ExitCode
from firewall.endpoints.lifecycle import MEANINGS, MOVES, NOT_READY, Mover

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


def configuration() -> str:
    """Render docs/config.md: every setting, with default, values and meaning."""
    head = """# The configuration

Written by `make docs` from the source; change the setting, not this page.
[examples/bartizan.yaml](../examples/bartizan.yaml) is the same as a file. Each setting can also be
given as a flag (`--set policy.audit=on`) or a variable (`BARTIZAN_POLICY_AUDIT=on`); flag beats
variable beats file beats default, and `bartizan config view --sources` says which it was. `SIGHUP`
applies the settings marked *live*; the others need a restart.
"""
    rows = [
        f"| `{row.path}` | {_default(row)} | {_values(row)} | {_cell(row.meaning.text)} |"
        for row in settings(Config)
    ]
    return "\n".join(
        [head, "| setting | default | values | meaning |", "|---|---|---|---|", *rows, ""]
    )


def _default(row: SettingRow) -> str:
    words = row.meaning.words
    named = {number: word for word, number in words.items()} if isinstance(words, dict) else {}
    if row.default in named:
        return f"`{named[row.default]}`"
    if isinstance(row.default, bool):
        return "`on`" if row.default else "`off`"
    if row.default is None or row.default in ("", ()):
        return ""
    return f"`{row.default:#x}`" if row.path == "mark_mask" else f"`{row.default}`"


def _values(row: SettingRow) -> str:
    """Say what may be written: words, a range with its unit; and whether a reload applies it."""
    meaning = row.meaning
    parts = [", ".join(f"`{word}`" for word in meaning.words)] if meaning.words else []
    if meaning.maximum is not None:
        parts.append(
            f"{meaning.minimum or 0:,.15g} to {meaning.maximum:,.15g} {meaning.unit}".strip()
        )
    elif meaning.minimum is not None:
        parts.append(f"{meaning.minimum:,.15g} {meaning.unit} or more")
    if row.kind is bool:
        parts.append("`on`, `off`")
    return "; ".join(["*live*"] * meaning.live + parts)


def _cell(text: str) -> str:
    """Keep a text as it is in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def endpoints() -> str:
    """Render docs/endpoints.md: the states of an endpoint, and who moves it from which to which."""
    head = """# The states of an endpoint

Written by `make docs` from the source (`firewall/endpoints/lifecycle.py`); change the table there.
`bartizan endpoint list` shows the state, `bartizan endpoint get NAME -o json` every move with its
reason. Names and moves are Cilium's; what differs says so.
"""
    states = [f"| {state.word} | {meaning} |" for state, meaning in MEANINGS.items()]
    failed = f"| {NOT_READY} | the last publication failed; what was enforced before still is |"
    moves = [
        f"| {before.word} | {after.word} | {_cell(move.reason)} |"
        for before, row in MOVES.items()
        for after, move in row.items()
        if move.mover is not Mover.NOBODY
    ]
    parts = ["| state | meaning |", "|---|---|", *states, failed, ""]
    parts += ["These are its moves; every other one is refused.", ""]
    return "\n".join([head, *parts, "| from | to | when |", "|---|---|---|", *moves, ""])


def routes() -> str:
    """Render docs/api.md: every route of the REST API with what it does."""
    head = """# The REST API

Written by `make docs` from the source (`firewall/agent/api.py`); change the docstrings there. It is
JSON over the unix socket `<run_dir>/api.sock`; who may open it (mode 0660, `api.group`) may do
everything:

```
# curl --unix-socket /run/bartizan/api.sock http://agent/v1/status
```
"""
    errors = (inspect.getdoc(api) or "").partition("check. ")[2].partition("\n\n")
    application = Api.__new__(Api)._application()  # its routes need no engine
    rows = [
        f"| {route.method} | `{route.resource.canonical}` | {_cell(_summary(route.handler))} |"
        for route in application.router.routes()
        if route.resource is not None and route.method != "HEAD"  # aiohttp adds one to each GET
    ]
    table = ["| | path | what it does |", "|---|---|---|", *rows]
    return "\n".join([head, errors[0], "", errors[2], "", *table, ""])


def _summary(handler: object) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join((inspect.getdoc(handler) or "").partition("\n\n")[0].split())


PAGES: dict[str, Callable[[], str]] = {
    "api.md": routes,
    "cli.md": command_line,
    "config.md": configuration,
    "endpoints.md": endpoints,
}
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
