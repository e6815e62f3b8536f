"""The `bartizan` command.

One module per noun; each is imported only when its command is asked for, so that `bartizan
identity list` never pays for the agent's or the lab's imports.
"""

import importlib
import os
from collections.abc import Mapping

import click

from firewall.cli.client import Client

DEFAULT_API_SOCKET = "/run/bartizan/api.sock"

_COMMANDS: Mapping[str, tuple[str, str]] = {
    "cleanup": ("daemon", "Remove every trace of a daemon that died in this namespace."),
    "completion": ("completion", "Print the completion script for a shell."),
    "config": ("daemon", "Show the configuration and where each value came from."),
    "conntrack": ("conntrack", "Show and forget tracked flows."),
    "demo": ("laboratory", "Play the demo, or chapters of it, in throw-away namespaces."),
    "doctor": ("doctor", "Probe this machine: what is missing, what it costs, how to mend it."),
    "endpoint": ("endpoint", "Manage endpoints."),
    "fqdn": ("fqdn", "Show and forget what DNS answered."),
    "identity": ("identity", "Show identities."),
    "lab": ("laboratory", "Throw-away hosts in private namespaces."),
    "metrics": ("status", "Print the metrics in Prometheus form."),
    "monitor": ("monitor", "Show packets as they are decided, or write them to a capture."),
    "observe": ("observe", "Show decisions as they are made."),
    "policy": ("policy", "Apply, show, check and delete policies."),
    "proxy": ("proxy", "Show the L7 proxy: redirects, requests, workers."),
    "replay": ("replay", "Run a capture through tracker and policy, packet by packet."),
    "run": ("daemon", "Run the daemon for this network namespace, in the foreground."),
    "status": ("status", "Show whether everything is well."),
    "why": ("why", "Explain a recorded flow: which rule decided, and what would change it."),
    "test": ("policytest", "Run policy tests, in the model and with real packets."),
}


class _LazyGroup(click.Group):
    """A group that imports the module of a command when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"firewall.cli.{_COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; one that does not exist is answered with the nearest that does."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from firewall.policy.problem import did_you_mean

            hint = did_you_mean(args[0], _COMMANDS)
            if args[0] in _COMMANDS or not hint:
                raise
            raise click.UsageError(f"{error.message.rstrip('.')}{hint}", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in sorted(_COMMANDS.items())])


@click.group(
    cls=_LazyGroup,
    context_settings={"auto_envvar_prefix": "BARTIZAN", "help_option_names": ["-h", "--help"]},
)
@click.option(
    "--api-socket",
    default=DEFAULT_API_SOCKET,
    show_default=True,
    envvar="BARTIZAN_API_SOCKET",
    help="The agent's unix socket.",
)
@click.version_option(package_name="bartizan", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context, api_socket: str) -> None:
    """Enforce Cilium's security model on plain Linux network namespaces."""
    # Debian keeps iptables and friends out of an ordinary user's PATH; user namespaces need them.
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    ctx.obj = Client(api_socket)
