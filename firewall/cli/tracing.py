"""`bartizan policy trace`: what policy would do with traffic that nobody sends.

The options that name the two ends are those of `cilium policy trace` as it was until 1.13, beside
shorter ones; what it never could (egress, requests, ICMP) is asked the same way.
"""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from firewall.cli.client import Client
from firewall.cli.exits import ExitCode
from firewall.cli.output import as_yaml

if TYPE_CHECKING:
    from firewall.policy.explanation import Explanation
    from firewall.policy.question import Question

F = TypeVar("F", bound=Callable[..., Any])

RULES_SHOWN = 10
"""Rules listed beside the deciding one and the closest one, unless all are asked for."""

ALL_RULES = 1_000_000
"""More rules than an endpoint can have."""

_WORDS = {"allowed": "ALLOWED", "denied": "DENIED", "redirected": "REDIRECTED"}


def text_output(function: F) -> F:
    """Add `-o text|json|yaml` to a command that explains."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["text", "json", "yaml"]),
        default="text",
        show_default=True,
        help="How to print the result.",
    )(function)


_OPTIONS = (
    click.option("--from", "source", metavar="END", help="NAMESPACE/NAME, address, host, world."),
    click.option("--src-k8s-pod", metavar="NAMESPACE:POD", help="As Cilium writes --from."),
    click.option(
        "-s", "--src", "--from-labels", "source_labels", multiple=True, metavar="LABELS",
        help="Labels of a source that need not exist: k8s:app=a[,...]; repeatable.",
    ),
    click.option("--src-identity", type=int, default=0, help="Identity of the source."),
    click.option("--to", "destination", metavar="END[:PORT]", help="x/b:80/TCP, [fd00::1]:53/UDP."),
    click.option("--dst-k8s-pod", metavar="NAMESPACE:POD", help="As Cilium writes --to."),
    click.option(
        "-d", "--dst", "--to-labels", "destination_labels", multiple=True, metavar="LABELS",
        help="Labels of a destination that need not exist; repeatable.",
    ),
    click.option("--dst-identity", type=int, default=0, help="Identity of the destination."),
    click.option("--dport", metavar="PORT[/PROTOCOL]", help="80/TCP, http, EchoRequest/ICMP."),
    click.option("--http", default="", metavar="REQUEST", help='"PUT /v1/x": ask about a request.'),
    click.option("-H", "--header", "headers", multiple=True, help='"Name: value" of the request.'),
    click.option(
        "--sni", metavar="NAME", help='The connection begins TLS with this name; "": with none.'
    ),
    click.option("-6/-4", "--ipv6/--ipv4", "ipv6", default=None, help="Which addresses of names."),
    click.option(
        "-f", "--file", "paths", multiple=True,
        help="Ask of these policy files or directories, without a daemon.",
    ),
    click.option(
        "--endpoints", multiple=True, metavar="FILE",
        help="With -f: files that declare endpoints; a configuration or a policy test will do.",
    ),
    click.option(
        "--dns", "names", multiple=True, metavar="NAME=ADDRESS,...",
        help="With -f: what DNS answered for a name; --to may be that name; repeatable.",
    ),
    click.option("--cluster-name", default="default", help="With -f: name of the own cluster."),
)  # fmt: skip


def question_options(function: F) -> F:
    """Add the options that name the two ends, the port and the request."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def question_of(options: dict[str, Any]) -> "Question":
    """Make the question of `question_options`.

    Raises:
        UsageError: the options contradict each other.
    """
    from firewall.policy.question import Question, QuestionError, split_destination

    if options["endpoints"] and not options["paths"]:
        raise click.UsageError("--endpoints belongs to -f: the daemon has its own")
    if options["names"] and not options["paths"]:
        raise click.UsageError("--dns belongs to -f: the daemon knows what DNS answered")
    source, destination = options["source"] or "", options["destination"] or ""
    port = options["dport"] or ""
    try:
        if destination and not port:
            destination, port = split_destination(destination)
    except QuestionError as error:
        hint = "" if options["endpoints"] else " (without --endpoints there are none)"
        raise click.UsageError(f"{error}{hint}") from error
    if options["src_k8s_pod"]:
        source = options["src_k8s_pod"].replace(":", "/", 1)
    if options["dst_k8s_pod"]:
        destination = options["dst_k8s_pod"].replace(":", "/", 1)
    return Question(
        source=source,
        source_labels=_labels(options["source_labels"]),
        source_identity=options["src_identity"],
        destination=destination,
        destination_labels=_labels(options["destination_labels"]),
        destination_identity=options["dst_identity"],
        port=port,
        http=_as_judged(options["http"]) if options["http"] else "",
        headers=options["headers"],
        sni=options["sni"],
        ipv6=options["ipv6"],
    )


def _as_judged(http: str) -> str:
    """Return a request with the path that rules see, and say so where it is not what was typed."""
    from firewall.policy.question import QuestionError, parse_request
    from l7proxy.limits import Limits
    from l7proxy.refusals import RequestRefused
    from l7proxy.target import normalise

    try:
        method, target, *_ = parse_request(http, ())
    except QuestionError:
        return http  # who is asked says what is wrong
    written = target.decode()
    try:
        judged = normalise(method, target, b"", Limits()).wire.decode()
    except RequestRefused as refused:
        status, detail, _ = refused.refusal
        click.echo(
            f"note: unless proxy.limits say otherwise, the proxy answers this path with {status}"
            f" {detail}, whatever policy says",
            err=True,
        )
        return http
    text = http.strip()
    if judged == written or not text.endswith(written):
        return http
    click.echo(f"note: the proxy makes {judged} of {written}", err=True)
    return text.removesuffix(written) + judged


def _labels(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for text in texts for part in text.split(",") if part)


def print_explanation(
    explanation: "Explanation", *, verbose: bool, heading: tuple[str, ...] = ()
) -> None:
    """Print an explanation for people."""
    from firewall.policy.explanation import render

    for text in heading:
        click.echo(text)
    click.echo(render(explanation, rules_count=ALL_RULES if verbose else RULES_SHOWN))


@click.command()
@question_options
@click.option("-v", "--verbose", is_flag=True, help="List every rule that was considered.")
@text_output
@click.pass_obj
def trace(client: Client, /, verbose: bool, output: str, **options: Any) -> None:
    """Say what policy does with traffic, and why.

    Exit code 0: allowed, or redirected to the proxy; 1: denied.

    \b
      bartizan policy trace --from x/a --to x/b:80/TCP --http 'PUT /v1/x'
      bartizan policy trace -s app=a -d app=b --dport 80/TCP -f policies/
    """
    import msgspec

    from firewall.policy.explanation import Explanation

    question = question_of(options)
    if options["paths"]:
        explanation = _offline(question, options)
        document: dict[str, Any] = {"explanation": msgspec.to_builtins(explanation)}
    else:
        document = client.change("POST", "policy", "trace", document=msgspec.to_builtins(question))
        explanation = msgspec.convert(document["explanation"], Explanation)
    document = {"verdict": final_verdict(explanation), **document}
    if output == "json":
        click.echo(json.dumps(document, indent=2))
    elif output == "yaml":
        click.echo(as_yaml(document), nl=False)
    else:
        print_explanation(explanation, verbose=verbose)
        click.echo(f"\nFinal verdict: {document['verdict']}")
    if explanation.verdict == "denied":
        sys.exit(ExitCode.FAILED)


def final_verdict(explanation: "Explanation") -> str:
    """Return the word of the last line; what audit mode lets pass is allowed."""
    return _WORDS.get(explanation.verdict, "ALLOWED")


def _offline(question: "Question", options: dict[str, Any]) -> "Explanation":
    from firewall.cli.offline import offline_realm
    from firewall.policy.question import QuestionError
    from firewall.policy.realm import ask

    realm = offline_realm(
        options["paths"], options["endpoints"], options["cluster_name"], options["names"]
    )
    try:
        return ask(realm, question).answer()
    except QuestionError as error:
        raise click.UsageError(str(error)) from error
