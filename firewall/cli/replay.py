"""`bartizan replay`: what the firewall would have said to every packet of a capture."""

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from firewall.cli.exits import ExitCode
from firewall.cli.output import table

if TYPE_CHECKING:
    from firewall.policy.view import View
    from firewall.replay.play import Row

_HEADER = (
    "NUMBER", "TIME", "SOURCE", "DESTINATION", "PROTOCOL", "CONNTRACK", "STATE", "VERDICT",
    "REASON", "RULE",
)  # fmt: skip
_ROWS_PER_PIECE = 200  # of a table: columns are as wide as these need, and long captures print soon


@click.command()
@click.argument("capture", type=click.Path(allow_dash=True, dir_okay=False, path_type=Path))
@click.option("--endpoints", multiple=True, type=click.Path(exists=True), metavar="PATH",
              help="Files that declare endpoints; repeatable.")  # fmt: skip
@click.option("-f", "--file", "--policies", "policies", multiple=True, metavar="PATH",
              type=click.Path(exists=True),
              help="A policy file or directory; repeatable.")  # fmt: skip
@click.option("--profile", type=click.Choice(["strict", "linux"]), default="strict",
              show_default=True, help="Rules of the tracker.")  # fmt: skip
@click.option("--loose/--no-loose", default=False,
              help="TCP flows may be met in their middle: the capture began late.")  # fmt: skip
@click.option("--node-address", "node_addresses", multiple=True, metavar="ADDRESS",
              help="An address of the node itself (identity host); repeatable.")  # fmt: skip
@click.option(
    "--cluster-name", default="default", show_default=True, help="As the daemon's cluster_name."
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table",
              show_default=True, help="json: one object per packet and line.")  # fmt: skip
def replay(
    capture: Path,
    endpoints: tuple[str, ...],
    policies: tuple[str, ...],
    profile: str,
    node_addresses: tuple[str, ...],
    cluster_name: str,
    output: str,
    *,
    loose: bool,
) -> None:
    """Run a capture through parser, tracker and policy; print what became of each packet.

    CAPTURE is pcap or pcapng, - for standard input; its own time is the clock. Link types:
    Ethernet (VLAN too), raw IP, Linux cooked, loopback. Checksums are not verified. A damaged or
    cut capture is an error (exit code 4) after the packets before the damage.
    """
    from conntrack.tracker import LINUX, STRICT
    from firewall.replay.capture import CaptureError, read_frames
    from firewall.replay.play import Replay, Witness

    view = _view(policies, endpoints, node_addresses, cluster_name)
    witness = Witness(STRICT if profile == "strict" else LINUX)
    witness.loose = loose
    name = "<stdin>" if str(capture) == "-" else str(capture)
    rows = Replay(view, witness)
    with _open(capture) as stream:
        shown = _print_json if output == "json" else _print_table
        failure = _Failure()
        # Frames are read while rows are taken, so an OSError of the file comes from here, too.
        shown(failure.until(rows.rows(read_frames(stream, name)), (CaptureError, OSError)))
    if failure.error is not None:
        click.echo(f"Error: {failure.error}", err=True)
        sys.exit(ExitCode.INVALID)


class _Failure:
    """Lets what came before an error be printed first."""

    error: Exception | None = None

    def until(self, rows: Iterator["Row"], kinds: tuple[type[Exception], ...]) -> Iterator["Row"]:
        try:
            yield from rows
        except kinds as error:
            self.error = error


def _open(path: Path) -> BinaryIO:
    if str(path) == "-":
        return sys.stdin.buffer
    try:
        return path.open("rb")
    except OSError as error:
        raise click.UsageError(f"{path}: {error.strerror or error}") from error


def _view(
    policies: tuple[str, ...],
    endpoints: tuple[str, ...],
    node_addresses: tuple[str, ...],
    cluster_name: str,
) -> "View":
    """Resolve the files as an agent would that has a proxy."""
    import msgspec

    from conntrack.address import parse_address
    from firewall.agent.config import Config
    from firewall.cli.offline import offline_realm
    from firewall.policy.view import View

    try:
        addresses = tuple(map(parse_address, node_addresses))
    except ValueError as error:
        raise click.UsageError(f"--node-address: {error}") from error
    snapshot = offline_realm(policies, endpoints, cluster_name).view.snapshot
    settings = msgspec.structs.replace(
        snapshot.settings,
        local_addresses=addresses or snapshot.settings.local_addresses,
        http_proxy_port=Config().proxy.port,
    )
    return View(msgspec.structs.replace(snapshot, settings=settings))


def _print_json(rows: Iterable["Row"]) -> None:
    for row in rows:
        click.echo(json.dumps(_document(row), separators=(",", ":")))


def _document(row: "Row") -> dict[str, Any]:
    seconds, nanoseconds = divmod(row.time_ns, 1_000_000_000)
    return {
        "number": row.number,
        "time": f"{seconds}.{nanoseconds:09d}",
        "source": row.source,
        "destination": row.destination,
        "protocol": row.protocol,
        "conntrack": row.conntrack,
        "tcp_state": row.state,
        "verdict": row.verdict,
        "reason": row.reason,
        "detail": row.detail,
        "direction": row.direction,
        "rule": row.rules[0] if row.rules else "",
        "rules": row.rules,
    }


def _print_table(rows: Iterable["Row"]) -> None:
    """Print tables of many rows each; the first names the columns."""
    began_ns: int | None = None
    rest = iter(rows)
    while piece := list(islice(rest, _ROWS_PER_PIECE)):
        cells: list[tuple[str, ...]] = []
        if began_ns is None:
            began_ns = piece[0].time_ns
            cells.append(_HEADER)
        cells += [_cells(row, began_ns) for row in piece]
        click.echo(table(cells[0], cells[1:]))


def _cells(row: "Row", began_ns: int) -> tuple[str, ...]:
    reason = f"{row.reason}: {row.detail}" if row.reason and row.detail else row.reason + row.detail
    if row.direction and row.conntrack == "NEW":
        reason = f"{row.direction}: {reason}"
    more = f" and {len(row.rules) - 1} more" if len(row.rules) > 1 else ""
    rule = row.rules[0] + more if row.rules else "-"
    words = (row.source, row.destination, row.protocol, row.conntrack, row.state, row.verdict)
    time = f"{(row.time_ns - began_ns) / 1e9:.6f}"
    return (str(row.number), time, *(word or "-" for word in words), reason or "-", rule)
