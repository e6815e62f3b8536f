"""`bartizan policy suggest`: the smallest change that lets refused traffic pass, as a patch."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from firewall.cli.client import Client
from firewall.cli.exits import ExitCode
from firewall.cli.output import as_yaml
from firewall.cli.tracing import question_of, question_options

if TYPE_CHECKING:
    from firewall.policy.learn import Seen
    from firewall.policy.plan import ObjectPlan, Plan
    from firewall.policy.question import Question


_ALL = 1_048_575
"""More than the agent can remember (`flows.ring`)."""


@click.command()
@click.argument("uuid", required=False, metavar="FLOW-UUID")
@click.option("--last-drop", is_flag=True, help="Of the newest dropped flow.")
@question_options
@click.option(
    "-o",
    "--output",
    type=click.Choice(["patch", "yaml", "json"]),
    default="patch",
    show_default=True,
    help="A patch of the files, whole objects, or everything.",
)
@click.option("--l7", is_flag=True, help="Write http rules from requests that were seen.")
@click.option("--from-flows", metavar="FILE", help='With --l7: flows as JSON lines, or "live".')
@click.option("--exact", is_flag=True, help="With --l7: numbers and identifiers stay as they are.")
@click.pass_obj
def suggest(client: Client, /, uuid: str | None, last_drop: bool, output: str, l7: bool, from_flows: str | None, exact: bool, **options: Any) -> None:  # noqa: E501  # fmt: skip
    """Print the smallest change of policy that lets refused traffic pass.

    It has been tried: with the change, the same question is answered by "allowed". A policy whose
    file is here and unchanged since it was applied is patched, any other is printed whole:

    \b
      bartizan policy suggest --last-drop | patch -p1
      bartizan policy suggest --last-drop -o yaml | bartizan policy apply -f -

    With --l7 it prints policies whose http rules allow the requests of recorded flows, and no
    others: "live" takes those that the agent remembers, FILE what `observe -o json` wrote. In
    paths, numbers, UUIDs and hexadecimal strings become classes of characters.

    \b
      bartizan policy suggest --l7 --from-flows live > rules.yaml
    """
    import msgspec

    if l7 or from_flows or exact:
        if not (l7 and from_flows):
            raise click.UsageError("http rules are written with --l7 --from-flows FILE, or live")
        click.echo(_learnt(client, from_flows, exact=exact), nl=False)
        return

    from firewall.policy.plan import Plan

    named = any(options[name] for name in ("source", "source_labels", "destination"))
    if sum(map(bool, (uuid, last_drop, named))) > 1:
        raise click.UsageError("say which traffic once: FLOW-UUID, --last-drop, or --from and --to")
    if uuid or last_drop:
        document = client.get("flows", uuid or "last-drop", "suggest")
        plan = msgspec.convert(document, Plan)
    else:
        question = question_of(options)
        if options["paths"]:
            plan = _offline(question, options)
        else:
            asked = msgspec.to_builtins(question)
            document = client.change("POST", "policy", "suggest", document=asked)
            plan = msgspec.convert(document, Plan)
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(plan), indent=2).decode())
        return
    if not plan.objects:
        click.echo(f"# nothing to change: the traffic is {plan.before.verdict}")
        return
    click.echo("".join(_texts(plan, patches=output == "patch")), nl=False)


def _learnt(client: Client, source: str, *, exact: bool) -> str:
    """Return policies as YAML for the requests of flows in a file, or those remembered."""
    from firewall.policy.learn import policies

    if source == "live":
        lines = client.lines("flows", query={"last": str(_ALL), "type": "l7"})
    else:
        try:
            lines = iter(Path(source).read_bytes().splitlines())
        except OSError as error:
            raise click.UsageError(f"{source}: {error.strerror}") from error
    found = policies(_requests(lines, source), exact=exact)
    if not found:
        raise click.ClickException(f"{source}: no http request that was allowed")
    return "".join(f"---\n{as_yaml(document)}" for document in found)


def _requests(lines: Iterable[bytes], source: str) -> "Iterator[Seen]":
    """Yield the http requests among flows that were not refused."""
    from firewall.policy.learn import Party, Seen

    def party(end: dict[str, Any]) -> Party:
        return Party(tuple(end.get("labels", ())), end.get("namespace", ""))

    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            flow = json.loads(line).get("flow", {})
        except (ValueError, AttributeError):
            raise click.UsageError(f"{source}:{number}: not a flow as JSON") from None
        http = flow.get("l7", {}).get("http")
        asked = flow.get("l7", {}).get("type") == "REQUEST" and flow.get("verdict") != "DROPPED"
        if not http or not asked:
            continue
        target = http.get("url", "").partition("://")[2] or http.get("url", "")
        yield Seen(
            party(flow.get("source", {})),
            party(flow.get("destination", {})),
            flow["l4"]["TCP"]["destination_port"],
            http["method"],
            f"/{target.partition('/')[2]}",
        )


def _texts(plan: "Plan", *, patches: bool) -> list[str]:
    """Return patches of the files that are as they were applied, and the other objects whole."""
    from firewall.policy.patch import unified

    texts = []
    usable = set()
    for change in plan.files if patches else ():
        if _is_on_disk(change.file, change.before):
            usable.add(change.file)
    for one in plan.objects:
        texts += [f"# {said}\n" for said in one.says]
        if one.file and patches and one.file not in usable:
            texts.append(f"# {one.file} is not here, or not as it was applied: the whole object\n")
        if one.file not in usable:
            texts.append(_whole(one))
    for change in plan.files:
        if change.file in usable:
            texts.append(unified(change.before, change.after, _shown(change.file)))
    return texts


def _whole(one: "ObjectPlan") -> str:
    if one.document is not None:
        return f"---\n{as_yaml(one.document)}"
    namespace = f" -n {one.namespace}" if one.namespace else ""
    return f"# bartizan policy delete {one.name} --kind {one.kind}{namespace}\n"


def _is_on_disk(file: str, text: str) -> bool:
    try:
        return Path(file).read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def _shown(file: str) -> str:
    """Return a file's name from here, if it is below."""
    path = Path(file).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _offline(question: "Question", options: dict[str, Any]) -> "Plan":
    from firewall.cli.offline import offline_realm
    from firewall.policy.model import ObjectKey
    from firewall.policy.plan import Source, make_plan
    from firewall.policy.question import QuestionError
    from firewall.policy.readers import SWITCHED, ReaderSettings
    from firewall.policy.realm import ask
    from firewall.policy.remedy import NoRemedyError
    from firewall.policy.remedy import suggest as find

    cluster = options["cluster_name"]
    realm = offline_realm(options["paths"], options["endpoints"], cluster)
    files = {one.key: one.file for one in realm.objects}
    settings = ReaderSettings(cluster_name=cluster, assumed=frozenset(SWITCHED))

    def source_of(key: ObjectKey) -> Source | None:
        file = files.get(key)
        return None if not file else Source(file, Path(file).read_text(encoding="utf-8-sig"))

    try:
        return make_plan(find(ask(realm, question), settings), source_of, settings)
    except QuestionError as error:
        raise click.UsageError(str(error)) from error
    except NoRemedyError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(ExitCode.FAILED)
