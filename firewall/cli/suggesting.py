"""`bartizan policy suggest`: the smallest change that lets refused traffic pass, as a patch."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from firewall.cli.client import Client
from firewall.cli.exits import ExitCode
from firewall.cli.learning import learnt
from firewall.cli.output import as_yaml
from firewall.cli.tracing import question_of, question_options

if TYPE_CHECKING:
    from firewall.policy.plan import ObjectPlan, Plan
    from firewall.policy.question import Question


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
def suggest(client: Client, /, **options: Any) -> None:
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
    if options["l7"] or options["from_flows"] or options["exact"]:
        if not (options["l7"] and options["from_flows"]):
            raise click.UsageError("http rules are written with --l7 --from-flows FILE, or live")
        click.echo(learnt(client, options["from_flows"], exact=options["exact"]), nl=False)
    else:
        _print(_plan(client, options), options["output"])


def _plan(client: Client, options: dict[str, Any]) -> "Plan":
    """Return what would let the traffic pass that the options name."""
    import msgspec

    from firewall.policy.plan import Plan

    uuid, last_drop = options["uuid"], options["last_drop"]
    named = any(options[name] for name in ("source", "source_labels", "destination"))
    if sum(map(bool, (uuid, last_drop, named))) > 1:
        raise click.UsageError("say which traffic once: FLOW-UUID, --last-drop, or --from and --to")
    if uuid or last_drop:
        document = client.get("flows", uuid or "last-drop", "suggest")
        return msgspec.convert(document, Plan)
    question = question_of(options)
    if options["paths"]:
        return _offline(question, options)
    asked = msgspec.to_builtins(question)
    document = client.change("POST", "policy", "suggest", document=asked)
    return msgspec.convert(document, Plan)


def _print(plan: "Plan", output: str) -> None:
    """Print a plan as patch, yaml or json."""
    import msgspec

    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(plan), indent=2).decode())
    elif not plan.objects:
        click.echo(f"# nothing to change: the traffic is {plan.before.verdict}")
    else:
        click.echo("".join(_texts(plan, patches=output == "patch")), nl=False)


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
    realm = offline_realm(options["paths"], options["endpoints"], cluster, options["names"])
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
