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
            layer7 = flow.get("l7", {})
            http = layer7.get("http")
            if not http or layer7.get("type") != "REQUEST" or flow.get("verdict") == "DROPPED":
                continue
            url, method = http.get("url", ""), http["method"]
            port = flow["l4"]["TCP"]["destination_port"]
            ends = party(flow.get("source", {})), party(flow.get("destination", {}))
        except (ValueError, AttributeError, KeyError, TypeError):
            raise click.UsageError(f"{source}:{number}: not a flow as JSON") from None
        target = url.partition("://")[2] or url
        yield Seen(*ends, port, method, f"/{target.partition('/')[2]}")
