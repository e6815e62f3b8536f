"""Which workers a configuration wants, as command lines, and the rules that feed them."""

import socket
from collections.abc import Mapping
from functools import partial

from firewall.agent.config import Config
from firewall.agent.worker import WorkerSpec
from firewall.control.worker_channel import socket_name
from firewall.datapath.marks import Kind, Marks
from firewall.datapath.ruleset import RulesetConfig
from l7proxy.listener import ListenError, listen

BANK_SIZE = 64
"""Queues of a bank: as many as there may be datapath workers. While one set of workers follows
another, each has a bank of queues."""


def ruleset_config(config: Config, bank: int = 0) -> RulesetConfig:
    """Return what the kernel's rules depend on, if they feed the queues of this bank."""
    return RulesetConfig(
        marks=Marks(config.mark_mask),
        first_queue=config.queue_base + bank * BANK_SIZE,
        queue_count=config.worker_count,
        http_proxy_port=config.proxy.port if config.proxy.workers else 0,
    )


def specs(config: Config, bank: int = 0) -> list[WorkerSpec]:
    """Return the workers of a configuration, by their whole command lines.

    `bank`: which of the two ranges of queues the datapath workers have.
    """
    first_queue = config.queue_base + bank * BANK_SIZE
    shared = ("--run-dir", str(config.run_dir), "--snapshot", str(config.snapshot_path))
    found: list[WorkerSpec] = []
    for number in range(config.worker_count):
        arguments = [
            "-P", "-m", "firewall.datapath",
            "--number", str(number),
            "--bank", str(bank),
            "--queue", str(first_queue + number),
            *shared,
            "--workers", str(config.worker_count),
            "--mark-mask", f"{config.mark_mask:#x}",
            "--copy-range", str(config.copy_range),
            "--queue-length", str(config.queue_length),
            "--flow-limit", str(config.conntrack.limit),
            "--source-limit", str(config.conntrack.share),
            "--profile", config.conntrack.profile,
            "--resets", config.policy.reset_connections,
            "--log-level", config.log.level,
            "--log-format", config.log.format,
        ]  # fmt: skip
        if not config.gso:
            arguments.append("--no-gso")
        if config.bypass:
            arguments.append("--bypass")
        path = config.run_dir / socket_name(number, bank)
        found.append(WorkerSpec("datapath", number, tuple(arguments), path))
    from_proxy = Marks(config.mark_mask).of(Kind.FROM_PROXY).value
    for number in range(config.proxy.workers):
        arguments = [
            "-P", "-m", "l7proxy.worker",
            "--number", str(number),
            "--port", str(config.proxy.port),
            *shared,
            "--mark-from-proxy", f"{from_proxy:#x}",
            "--log-level", config.log.level,
            "--log-format", config.log.format,
        ]  # fmt: skip
        fqdn = config.fqdn
        arguments += ["--set", f"dns_reject={fqdn.reject_response_code}"]
        arguments += ["--set", f"dns_hold_s={fqdn.proxy_response_max_delay_s:g}"]
        for limit in config.proxy.limits:
            arguments += ["--set", limit]
        if config.proxy.access_log is not None:
            arguments += ["--access-log", str(config.proxy.access_log)]
            arguments += ["--access-log-encoding", config.proxy.access_log_encoding]
            arguments += ["--access-log-format", config.proxy.access_log_format]
        if config.proxy.secrets_dir is not None:
            arguments += ["--secrets-dir", str(config.proxy.secrets_dir)]
        path = config.run_dir / f"l7proxy-{number}.sock"
        listeners = partial(_listen, config.proxy.port, from_proxy)
        found.append(WorkerSpec("l7proxy", number, tuple(arguments), path, listeners))
    return found


def _listen(port: int, mark: int, had: Mapping[str, socket.socket]) -> dict[str, socket.socket]:
    """Return the sockets of one l7proxy worker.

    Raises:
        OSError: they cannot be made.
    """
    try:
        return listen(port, mark, had)
    except ListenError as error:
        raise OSError(str(error)) from error
