"""`bartizan monitor`: the packets themselves, with what was decided about them."""

import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import click

from firewall.cli.client import Client
from firewall.cli.interrupt import Interrupt
from firewall.cli.observe import Ordered, filter_options, query_of, terms_of
from firewall.flows.captured import Captured, comment, from_line
from firewall.flows.compact import line
from firewall.flows.filters import Filter, FilterError
from firewall.replay import recording

SNAPSHOT_BYTES = 4016
"""Most that a queue copies of a packet (`copy_range`); usually it is 256."""


@click.command(cls=Ordered)
@click.option("--drops", is_flag=True, help="Dropped packets only.")
@click.option("--pcap", "target", metavar="FILE", help="Write a pcapng capture; - = stdout.")
@click.option("-c", "--count", type=click.IntRange(min=1), help="End after so many packets.")
@filter_options
@click.option("--not", "negation", is_flag=True, help="Negate the next filter.")
@click.pass_obj
def monitor(
    client: Client, /, drops: bool, target: str | None, count: int | None, **options: Any
) -> None:
    """Show packets that are dropped, open a flow or end one: each with its verdict and reason.

    With --pcap they become a capture, as far as they are copied to userspace (copy_range), with the
    reason as comment. Filters are those of `bartizan observe`. Packets that are lost, because the
    reader or the daemon is too slow, are counted, and the count is written too. Ends with ^C.
    """
    terms = list(terms_of(options))
    try:
        Filter(terms)
    except FilterError as error:
        raise click.UsageError(str(error)) from error
    query = query_of(terms)
    if drops:
        query["drops"] = "1"
    with Interrupt() as until:
        lines = client.lines("packets", query=query, until=until)
        seen = _Seen(map(from_line, lines), count)
        try:
            if target is None:
                _print(seen)
            elif target == "-":
                _write(seen, sys.stdout.buffer)
            else:
                with _create(target) as file:
                    _write(seen, file)
        except BrokenPipeError:  # `| head` has seen enough
            sys.stderr.close()
        else:
            click.echo(f"{seen.count} packets, {seen.lost_count} lost", err=True)


class _Seen:
    """The packets of a stream, counted; they end when there are enough."""

    def __init__(self, stream: Iterable[Captured], limit_count: int | None) -> None:
        self._stream = stream
        self._limit_count = limit_count
        self.count = 0
        self.lost_count = 0

    def __iter__(self) -> Iterator[Captured]:
        for captured in self._stream:
            self.lost_count += captured.lost_count
            if captured.flow is None:
                yield captured
                continue
            self.count += 1
            yield captured
            if self.count == self._limit_count:
                return


def _create(name: str) -> IO[bytes]:
    """Open the capture; what it will hold is for its owner's eyes."""
    try:
        path = Path(name)
        path.touch(0o600)
        return path.open("wb")
    except OSError as error:
        raise click.UsageError(f"--pcap {name}: {error.strerror}") from error


def _write(seen: _Seen, file: IO[bytes]) -> None:
    """Write the capture; after each packet it is complete."""
    file.write(recording.head(f"bartizan {version('bartizan')}", "bartizan", SNAPSHOT_BYTES))
    missing_count = 0
    for captured in seen:
        missing_count += captured.lost_count
        if captured.flow is not None:
            block = recording.packet(
                captured.time_ns,
                captured.packet,
                captured.length,
                comment(captured.flow),
                missing_count,
            )
            file.write(block)
            missing_count = 0
        file.flush()
    file.write(recording.tail(time.time_ns(), seen.count, seen.lost_count))
    file.flush()


def _print(seen: _Seen) -> None:
    for captured in seen:
        if captured.lost_count:
            click.echo(f"{captured.lost_count} packets lost")
        if captured.flow is not None:
            click.echo(f"{line(captured.flow)}: {captured.packet.hex()}")
        sys.stdout.flush()
