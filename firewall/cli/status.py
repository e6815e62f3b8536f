"""`bartizan status` and `bartizan metrics`: is everything well?"""

import sys
from collections.abc import Iterator
from typing import Any

import click

from firewall.cli.client import Client
from firewall.cli.exits import ExitCode
from firewall.cli.output import output_option, show


@click.command()
@click.option("--brief", is_flag=True, help='One line: "OK", or what is wrong.')
@output_option
@click.pass_obj
def status(client: Client, brief: bool, output: str) -> None:
    """Show the state of the agent, its workers and its queues; errors last.

    Exits with 1 if anything is not well.
    """
    document = client.get("status")
    errors = [str(error) for error in document.get("errors", [])]
    if brief:
        click.echo(f"error in {errors[0]}" if errors else "OK")
    else:
        show(output, document, lambda: _lines(document, errors))
    if errors:
        sys.exit(ExitCode.FAILED)


@click.command()
@click.pass_obj
def metrics(client: Client) -> None:
    """Print the metrics in Prometheus form."""
    click.echo(client.text("metrics"), nl=False)


def _lines(document: dict[str, Any], errors: list[str]) -> str:
    agent, flows = document["agent"], document["flows"]
    endpoints, identities = document["endpoints"], document["identities"]
    fill = 100 * flows["current"] / flows["max"] if flows["max"] else 0
    rows = [
        (
            "Agent",
            (
                f"Ok   pid {agent['pid']}, version {agent['version']}, node {agent['node_name']}, "
                f"up {agent['uptime_s']:.0f}s"
            ),
        ),
        ("Fail mode", str(agent["fail_mode"])),
        (
            "Policy",
            (
                f"revision {document['policy_revision']}, snapshot {document['revision']}, "
                f"enforcement {document.get('enforcement', 'default')}"
            ),
        ),
        ("Bypass", _bypass(document.get("bypass", {}))),
        *(row for worker in document["workers"] for row in _worker(worker, document["revision"])),
        *(
            (
                f"Queue {queue['queue']}",
                (
                    f"{queue['depth']} waiting, {queue['kernel_dropped']} dropped by the kernel, "
                    f"{queue['user_dropped']} lost before userspace"
                ),
            )
            for queue in document["queues"]
        ),
        ("Proxy Status", _proxy(document["proxy"])),
        ("KVStore", _ok(document["kvstore"])),
        (
            "Endpoints",
            f"{endpoints['ready']}/{endpoints['total']} ready"
            + "".join(
                f", {count} {state}"
                for state, count in endpoints.get("by_state", {}).items()
                if state != "ready"
            ),
        ),
        (
            "Identities",
            (
                f"{identities.get('total', 0)} known, "
                f"global range min {identities.get('min', 256)}, max {identities.get('max', 65535)}"
            ),
        ),
        (
            "Hubble",
            f"Ok   Current/Max Flows: {flows['current']:,}/{flows['max']:,} ({fill:.2f}%), "
            f"Flows/s: {flows['per_second']:.2f}"
            + (f", LOST: {flows['lost']:,}" if flows.get("lost") else ""),
        ),
    ]
    text = [f"{f'{name}:':<24}{value}" for name, value in rows]
    text += [f"{'Error:':<24}{error}" for error in errors]
    return "\n".join(text)


def _worker(worker: dict[str, Any], revision: int) -> Iterator[tuple[str, str]]:
    lag = "" if worker["revision"] == revision else f" (snapshot {worker['revision']})"
    name = f"Worker {worker['kind']}-{worker['number']}"
    yield name, f"{worker['state']}   pid {worker['pid']}{lag}"
    traffic = worker.get("traffic")
    if traffic is None:
        return
    dropped, flows = traffic["dropped"], traffic["flows"]
    packets = [
        f"{traffic['accepted']:,} accepted",
        f"{traffic['redirected']:,} to the proxy",
        f"{sum(dropped.values()):,} dropped{_each(dropped)}",
    ]
    if traffic["verdicts_refused"]:
        # The kernel had dropped them: somebody deleted a base chain of nft (docs/datapath.md).
        packets.append(f"{traffic['verdicts_refused']:,} lost by changes of others' rules")
    yield "  packets", ", ".join(packets)
    entries = [
        f"{sum(flows.values()):,} tracked{_each(flows)}",
        f"{traffic['flows_offloaded']:,} carried by the kernel",
        f"{traffic['flows_evicted']:,} evicted early",
        f"{traffic['flows_refused']:,} found no room",
        f"expiry lags by {traffic['expiry_lag_s']:.1f} s",
    ]
    yield "  flows", ", ".join(entries)


def _each(counts: dict[str, int]) -> str:
    """Return counts by name in brackets, the largest first; nothing if there are none."""
    listed = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f" ({', '.join(f'{name} {count:,}' for name, count in listed)})" if listed else ""


def _bypass(bypass: dict[str, Any]) -> str:
    """Say whether the kernel carries established flows."""
    if not bypass.get("enabled"):
        return "off: every packet is decided in userspace"
    if bypass.get("generation") is None:
        return "on, but no flow is carried now: every packet is decided in userspace"
    return f"on   established flows pass in the kernel, generation {bypass['generation']}"


def _proxy(proxy: dict[str, Any]) -> str:
    if not proxy["port"]:
        return "off: connections with L7 rules are refused"
    requests = proxy["requests"]
    refused = requests["denied"] + requests["parse_errors"]
    return (
        f"OK   {proxy['redirects']} redirects active on port {proxy['port']}, "
        f"{requests['received']:,} requests received, {refused:,} refused"
    )


def _ok(store: dict[str, Any]) -> str:
    if not store["ok"]:
        return f"error: {store['error']}"
    text = f"Ok   {store['kind']} {store['path']}"
    if not store["shared"]:
        return text
    nodes, addresses = store["nodes"], store["addresses"]
    return f"{text}, shared: {nodes} other nodes with endpoints, {addresses} addresses"
