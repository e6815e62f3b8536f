"""`bartizan policy`: apply, show, check and delete policies."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from firewall.cli.client import Client, Query
from firewall.cli.exits import ExitCode
from firewall.cli.output import as_yaml, output_option, show, table
from firewall.cli.suggesting import suggest
from firewall.cli.tracing import trace
from firewall.cli.waiting import wait_option, waiting


class NoPolicyError(click.ClickException):
    """The files hold nothing that could be applied."""

    exit_code = ExitCode.INVALID

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__(f"no policy in {', '.join(paths)}: nothing was applied")


@click.group()
def policy() -> None:
    """Apply, show, check and delete policies."""


policy.add_command(trace)
policy.add_command(suggest)

_FILES = click.option(
    "-f",
    "--file",
    "paths",
    multiple=True,
    required=True,
    help="A file, a directory, or - for standard input; repeatable.",
)


@policy.command()
@_FILES
@wait_option
@output_option
@click.pass_obj
def apply(client: Client, paths: tuple[str, ...], wait_s: float, output: str) -> None:
    """Apply policy files; an object of the same kind, namespace and name is replaced.

    All files are one change: if anything in them is invalid, nothing is applied.
    """
    answer = client.change("PUT", "policy", "files", query=waiting(wait_s), document=_read(paths))
    for problem in answer["problems"]:
        click.echo(f"warning: {problem}", err=True)
    if not answer["applied"]:
        raise NoPolicyError(paths)
    show(output, answer, lambda: "\n".join(_changes(answer)))


@policy.command()
@click.argument("name", required=False)
@click.option("--kind", help="Only of this kind, as NetworkPolicy.")
@click.option("-n", "--namespace", help="Only of this namespace.")
@click.option("-l", "--label", "labels", multiple=True, help="Rules with this label; repeatable.")
@output_option
@click.pass_obj
def get(
    client: Client,
    name: str | None,
    kind: str | None,
    namespace: str | None,
    labels: tuple[str, ...],
    output: str,
) -> None:
    """Show the policies in force, then the revision."""
    document = client.get("policy", query=_selection(name, kind, namespace, labels))
    if name and not document["objects"]:
        raise click.ClickException("no policy matches")
    if output == "yaml":
        for number, item in enumerate(document["objects"]):
            click.echo("---\n" * bool(number) + as_yaml(item["document"]), nl=False)
        return
    show(output, document, lambda: _table(document))


@policy.command()
@click.argument("name", required=False)
@click.option("--kind", help="Only of this kind, as NetworkPolicy.")
@click.option("-n", "--namespace", help="Only of this namespace.")
@click.option("-l", "--label", "labels", multiple=True, help="Rules with this label; repeatable.")
@click.option("--all", "everything", is_flag=True, help="Every policy.")
@click.pass_obj
def delete(
    client: Client,
    name: str | None,
    kind: str | None,
    namespace: str | None,
    labels: tuple[str, ...],
    everything: bool,
) -> None:
    """Delete policies by name, kind, namespace or labels."""
    query = _selection(name, kind, namespace, labels)
    if bool(query) == everything:
        raise click.UsageError("say which policies: a NAME, a filter, or --all (not both)")
    answer = client.change("DELETE", "policy", query={**query, "all": "1"} if everything else query)
    for key in answer["deleted"]:
        click.echo(f"{_reference(key)} deleted")
        if key["file"]:
            text = (
                f"{key['file']} still has it; a change of that file, or a restart, brings it back"
            )
            click.echo(f"warning: {text}", err=True)
    if not answer["deleted"]:
        raise click.ClickException("no policy matches")
    click.echo(f"Revision: {answer['revision']}")


@policy.command()
@output_option
@click.pass_obj
def selectors(client: Client, output: str) -> None:
    """Show the peers that rules name, and which identities each means now."""
    rows = client.get("policy", "selectors")
    show(output, rows, lambda: _selector_table(rows))


@policy.command()
@_FILES
@click.option(
    "--endpoints",
    multiple=True,
    metavar="FILE",
    help="Endpoint declarations, to find rules that select none of them; repeatable.",
)
@click.option(
    "--secrets-dir",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Where the daemon finds secrets (proxy.secrets_dir), to find rules without one.",
)
@output_option
def validate(
    paths: tuple[str, ...], endpoints: tuple[str, ...], secrets_dir: Path | None, output: str
) -> None:
    """Check policy files without a daemon: every problem, each with file:line:column.

    All files are judged together: an object that two of them give differently is an error.
    """
    from firewall.agent.secrets import secret_problems
    from firewall.cli.offline import labels_of, read_endpoints
    from firewall.policy.files import read_paths
    from firewall.policy.lint import lint
    from firewall.policy.readers import SWITCHED, ReaderSettings, merge, read

    settings = ReaderSettings(assumed=frozenset(SWITCHED))
    results = [read_paths([path for path in paths if path != "-"], settings=settings)]
    if "-" in paths:
        results.append(read(sys.stdin.read(), "<stdin>", settings=settings))
    result = merge(results)
    known = None
    if endpoints:
        known = [labels_of(one, result.resources) for one in read_endpoints(endpoints)]
    problems = [*result.problems, *lint(result.objects, endpoints=known)]
    if secrets_dir is not None:
        problems += secret_problems(result.objects, secrets_dir)
    count = len(result.objects) + len(result.resources)
    errors = [problem for problem in problems if problem.severity == "error"]
    document = [
        {
            "severity": problem.severity,
            "file": problem.file,
            "line": problem.line,
            "column": problem.column,
            "path": problem.path,
            "message": problem.message,
        }
        for problem in problems
    ]
    summary = f"{count} objects valid, {len(errors)} errors, {len(problems) - len(errors)} warnings"
    show(
        output,
        document,
        lambda: "\n".join([*(f"{p.severity}: {p}" for p in problems), summary]),
    )
    if errors:
        sys.exit(ExitCode.INVALID)


def _selector_table(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["selector"],
            row["labels"] or "-",
            str(row["users"]),
            [str(number) for number in row["identities"]] or "-",
        )
        for row in rows
    ]
    return table(("SELECTOR", "LABELS", "USERS", "IDENTITIES"), cells)


def _read(paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (name, text) of every file; a directory gives what `validate` reads of it."""
    from firewall.policy.files import files_of

    found: dict[str, str] = {}
    for path in paths:
        if path == "-":
            found["<stdin>"] = sys.stdin.read()
            continue
        files = list(files_of(Path(path)))
        if not files:
            raise click.UsageError(f"{path}: no *.yaml, *.yml or *.json file inside")
        for file in files:
            try:
                found[str(file)] = file.read_text(encoding="utf-8-sig")
            except OSError as error:
                raise click.UsageError(f"{file}: {error.strerror or error}") from error
            except UnicodeDecodeError as error:
                raise click.UsageError(f"{file}: {error}") from error
    return list(found.items())


def _selection(
    name: str | None, kind: str | None, namespace: str | None, labels: tuple[str, ...]
) -> Query:
    query: Query = {}
    if name:
        query["name"] = name
    if kind:
        query["kind"] = kind
    if namespace:
        query["namespace"] = namespace
    if labels:
        query["labels"] = list(labels)
    return query


def _reference(key: dict[str, str]) -> str:
    namespace = f"{key['namespace']}/" if key["namespace"] else ""
    return f"{key['kind'].lower()} {namespace}{key['name']}"


def _changes(answer: dict[str, Any]) -> list[str]:
    lines = [f"{_reference(item['key'])} {item['change']}" for item in answer["applied"]]
    return [*lines, f"Revision: {answer['revision']}"]


def _table(document: dict[str, Any]) -> str:
    rows = [
        (
            item["key"]["kind"],
            item["key"]["namespace"] or "-",
            item["key"]["name"],
            item.get("file", "") or "-",
        )
        for item in document["objects"]
    ]
    return (
        table(("KIND", "NAMESPACE", "NAME", "FILE"), rows) + f"\nRevision: {document['revision']}"
    )
