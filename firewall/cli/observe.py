"""`bartizan observe`: decisions as they are made, with Hubble's flags, layouts and JSON."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import click

from firewall.cli.client import Client, Query
from firewall.cli.interrupt import Interrupt
from firewall.flows.compact import (
    DICT_SEPARATOR,
    TIME_FORMATS,
    Style,
    dict_lines,
    line,
    lost_line,
    table_lines,
)
from firewall.flows.filters import Filter, FilterError, Term, flags
from firewall.flows.record import FlowError, Response, from_json

F = TypeVar("F", bound=Callable[..., Any])

_SHORT = {"namespace": "-n", "label": "-l", "type": "-t"}
_HELP = {
    "drop-reason-desc": "A drop reason by its name, as POLICY_DENIED.",
    "fqdn": "A name that DNS answered; * stands for anything.",
    "http-header": "NAME:VALUE of a request.",
    "http-method": "GET, POST, ...",
    "http-path": "A regular expression on the path.",
    "http-status": 'A status, or a prefix such as "4+".',
    "http-url": "A regular expression on the whole URL.",
    "identity": "A number, or the name of a reserved one, as world.",
    "ip": "An address or prefix.",
    "ip-version": "v4, v6 or none; -4 and -6 are short for it.",
    "label": "A label selector.",
    "namespace": "The namespace of an endpoint.",
    "node-name": "The node that decided.",
    "pod": "[NAMESPACE/]NAME of an endpoint, or how NAME begins.",
    "policy": "NAMESPACE/NAME or NAME of the policy that decided.",
    "port": "A TCP, UDP or SCTP port.",
    "protocol": "tcp, udp, sctp, icmp, icmpv4, icmpv6, http, dns or tls.",
    "reply": "true: answers only; false: what was begun.",
    "tcp-flags": "All of these, perhaps with others: SYN,ACK.",
    "traffic-direction": "ingress or egress: the side that decided.",
    "type": "drop[:REASON], policy-verdict, l7, trace[:POINT]. What policy drops is both of the"
    " first.",
    "uuid": "One decision.",
    "verdict": "FORWARDED, DROPPED, AUDIT, REDIRECTED, ...",
}


_WHOLE = {"-4": ("--ip-version", "v4"), "-6": ("--ip-version", "v6")}
"""Short options that stand for a filter with its value, as Hubble has them."""


class Ordered(click.Command):
    """A command in which `--not` negates the filter that follows it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Fold every `--not` into the flag after it, before click loses their order."""
        short = {option: f"--{flag}" for flag, option in _SHORT.items()}
        folded: list[str] = []
        negate = False
        for argument in (part for given in args for part in _WHOLE.get(given, (given,))):
            if argument == "--not":
                if negate:
                    raise click.UsageError("--not twice", ctx)
                negate = True
            elif negate and argument.startswith("-"):
                name = short.get(argument, argument)
                if name.partition("=")[0].removeprefix("--") not in flags():
                    raise click.UsageError(f"--not must stand before a filter, not {argument}", ctx)
                folded.append(f"--not-{name.removeprefix('--')}")
                negate = False
            else:
                folded.append(argument)
        if negate:
            raise click.UsageError("--not at the end: it negates the filter after it", ctx)
        return super().parse_args(ctx, folded)


def filter_options(function: F) -> F:
    """Add the filters of `hubble observe`, each with its negation."""
    for flag in reversed(flags()):
        base = flag.removeprefix("from-").removeprefix("to-")
        names = [f"--{flag}", *([_SHORT[flag]] if flag in _SHORT else [])]
        option = click.option(*names, multiple=True, help=_HELP.get(base, ""))
        hidden = click.option(f"--not-{flag}", multiple=True, hidden=True)
        function = option(hidden(function))
    return function


@click.command(cls=Ordered)
@click.option("-f", "--follow", is_flag=True, help="Go on showing flows as they come.")
@click.option("--last", type=click.IntRange(min=0), help="The newest N flows. [default: 20]")
@click.option("--first", type=click.IntRange(min=0), help="The oldest N flows.")
@click.option("--all", "everything", is_flag=True, help="Every flow that is kept.")
@click.option("--since", help="From then on: 3s, 4m, 1h43, or RFC 3339.")
@click.option("--until", help="Up to then; as --since.")
@filter_options
@click.option("--not", "negation", is_flag=True, help="Negate the next filter.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["compact", "dict", "json", "jsonpb", "table", "tab"]),
    default="compact",
    show_default=True,
    help="Lines for people, or Hubble's JSON, one flow a line.",
)
@click.option("--print-policy-names", is_flag=True, help="Add which policies decided.")
@click.option("--why", is_flag=True, help="Add the whole explanation of each decision.")
@click.option("--print-node-name", is_flag=True, help="Add which node decided.")
@click.option("--numeric", is_flag=True, help="Addresses instead of names.")
@click.option(
    "--time-format",
    type=click.Choice(sorted(TIME_FORMATS)),
    default="StampMilli",
    show_default=True,
    help="How times are written; the names are Go's.",
)
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="auto: on a terminal, unless NO_COLOR is set.",
)
@click.option("--input-file", help="Read flows from a JSON lines file, or - for standard input.")
@click.pass_obj
def observe(client: Client, /, **options: Any) -> None:
    """Show the decisions that were made.

    The same filter given again widens (OR), different filters narrow (AND); a flow that a negated
    filter matches is left out.
    """
    ranges = {name: options[name] for name in ("first", "last", "since", "until")}
    follow, everything, output = options["follow"], options["everything"], options["output"]
    output = "table" if output == "tab" else output
    if options["first"] is not None and (options["last"] is not None or follow or everything):
        raise click.UsageError("--first excludes --last, --all and --follow")
    if options["last"] is not None and everything:
        raise click.UsageError("--last excludes --all")
    if output == "table" and follow:
        raise click.UsageError("-o table needs every row before the first: it excludes --follow")
    query: Query = {name: str(value) for name, value in ranges.items() if value is not None}
    if follow:
        query["follow"] = "1"
    if everything:
        query["all"] = "1"
    if options["why"]:
        query["why"] = "1"
    terms = list(terms_of(options))
    try:
        chosen = Filter(terms)
    except FilterError as error:
        raise click.UsageError(str(error)) from error
    query |= query_of(terms)
    style = Style(
        colour=_colour(options["color"]),
        numeric=options["numeric"],
        policy_names=options["print_policy_names"],
        node_name=options["print_node_name"],
        time_format=options["time_format"],
    )
    with Interrupt() if follow and not options["input_file"] else nullcontext() as until:
        if options["input_file"]:
            lines = _recorded(options["input_file"], chosen, options)
        else:
            lines = client.lines("flows", query=query, until=until)
        try:
            _print(lines, output, style, why=options["why"])
        except BrokenPipeError:  # `| head` has seen enough
            sys.stderr.close()


def terms_of(options: dict[str, Any]) -> Iterator[Term]:
    """Yield the filters that were given."""
    for flag in flags():
        name = flag.replace("-", "_")
        yield from (Term(flag, value) for value in options[name])
        yield from (Term(flag, value, negated=True) for value in options[f"not_{name}"])


def query_of(terms: list[Term]) -> Query:
    """Return the filters as parameters of a request."""
    query: dict[str, list[str]] = {}
    for term in terms:
        query.setdefault(f"not-{term.flag}" if term.negated else term.flag, []).append(term.value)
    return dict(query)


def _colour(choice: str) -> bool:
    import os

    if choice == "auto":
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return choice == "always"


def _recorded(name: str, chosen: Filter, options: dict[str, Any]) -> Iterable[bytes]:
    """Yield the lines of a file that the filters choose, then its range of them."""
    if options["since"] or options["until"]:
        raise click.UsageError("--input-file shows what the file holds: no --since, no --until")
    try:
        lines = sys.stdin.buffer if name == "-" else Path(name).open("rb")  # noqa: SIM115
    except OSError as error:
        raise click.UsageError(f"{name}: {error.strerror}") from error
    kept: list[bytes] = []
    with lines:
        for number, text in enumerate(lines, start=1):
            try:
                flow = from_json(text).flow
            except FlowError as error:
                raise click.ClickException(f"{name}:{number}: {error}") from error
            if flow is None or chosen(flow):
                kept.append(text)
    if options["first"] is not None:
        return kept[: options["first"]]
    return kept if options["last"] is None else kept[len(kept) - min(options["last"], len(kept)) :]


def _print(lines: Iterable[bytes], output: str, style: Style, *, why: bool) -> None:
    if output in ("json", "jsonpb"):
        for text in lines:
            sys.stdout.write(text.decode())
            sys.stdout.flush()
        return
    responses = (from_json(text) for text in lines)
    if output == "table":
        flows = [response.flow for response in responses if response.flow is not None]
        click.echo("\n".join(table_lines(flows, style)))
        return
    begun = False
    for response in responses:
        for row in _rendered(response, output, style, begun):
            click.echo(row)
        if why:
            _print_why(response)
        begun = True


def _print_why(response: Response) -> None:
    """Print an explanation below its flow, indented; a flow that has none gets none."""
    extensions = response.flow.extensions if response.flow is not None else None
    if extensions is None or extensions.value.explanation is None:
        return
    import msgspec

    from firewall.policy.explanation import Explanation, render

    explanation = msgspec.convert(extensions.value.explanation, Explanation)
    for row in render(explanation).splitlines()[1:]:
        click.echo(f"  {row}")


def _rendered(response: Response, output: str, style: Style, begun: bool) -> Iterator[str]:
    if response.flow is None:
        if response.lost_events is not None:
            yield lost_line(response, time_format=style.time_format, zone=style.zone)
    elif output == "dict":
        if begun:
            yield DICT_SEPARATOR
        yield from dict_lines(response.flow, style)
    else:
        yield line(response.flow, **style._asdict())
