"""`bartizan policy suggest --l7`: http rules from requests that were seen."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from firewall.cli.client import Client
from firewall.cli.output import as_yaml

if TYPE_CHECKING:
    from firewall.policy.learn import Seen

_ALL = 1_048_575
"""More than the agent can remember (`flows.ring`)."""


def learnt(client: Client, source: str, *, exact: bool) -> str:
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
