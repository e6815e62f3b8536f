"""`bartizan why`: the whole reason for one recorded decision."""

import json

import click

from firewall.cli.client import Client
from firewall.cli.output import as_yaml
from firewall.cli.tracing import print_explanation, text_output


@click.command()
@click.argument("uuid", required=False, metavar="FLOW-UUID")
@click.option("--last-drop", is_flag=True, help="The newest dropped flow.")
@click.option("-v", "--verbose", is_flag=True, help="List every rule that was considered.")
@text_output
@click.pass_obj
def why(client: Client, uuid: str | None, last_drop: bool, verbose: bool, output: str) -> None:
    """Explain a recorded flow: which rule decided, or came closest, and what would change it.

    FLOW-UUID is the `uuid` of `bartizan observe -o json`, or the beginning of it.
    """
    if bool(uuid) == last_drop:
        raise click.UsageError("say which flow: a FLOW-UUID, or --last-drop")
    document = client.get("flows", uuid or "last-drop", "why")
    if output == "json":
        click.echo(json.dumps(document, indent=2))
        return
    if output == "yaml":
        click.echo(as_yaml(document), nl=False)
        return
    import msgspec

    from firewall.flows.compact import line
    from firewall.flows.flow import Flow
    from firewall.policy.explanation import Explanation

    flow = msgspec.convert(document["flow"], Flow)
    heading = [line(flow), *(f"note: {note}" for note in document.get("notes", ()))]
    if "explanation" not in document:
        click.echo("\n".join(heading))
        return
    explanation = msgspec.convert(document["explanation"], Explanation)
    print_explanation(explanation, verbose=verbose, heading=tuple(heading))
