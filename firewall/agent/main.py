"""Entry points of the agent, called by the command line.

Exit codes: 0 ended as asked, 2 the configuration is wrong, 3 this machine cannot (permissions,
kernel, another daemon, unusable state), 4 a policy is invalid.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from firewall.agent import standing
from firewall.agent.daemon import SIGNALS, Daemon, configure_log, start_errors
from firewall.agent.document import DocumentError
from firewall.agent.lineup import ruleset_config
from firewall.agent.loading import Loaded, load
from firewall.agent.orphans import end_orphans
from firewall.agent.policies import InvalidPolicyError
from firewall.agent.proxyadmin import admin_path
from firewall.control.journal import fields
from firewall.control.unix import ChannelError, listener_pid
from firewall.datapath import kernel
from firewall.datapath.kernel import KernelError

OK = 0
FAILED = 1
USAGE = 2
UNABLE = 3
INVALID = 4

RENEW = "--renew"
"""The flag of `bartizan run` that an upgrade adds."""

log = logging.getLogger(__name__)


def run(config_path: Path | None, overrides: Mapping[str, str], *, renew: bool = False) -> int:
    """Run the daemon in the foreground until SIGTERM; return the exit code.

    `renew`: the workers that run are replaced, even those that could go on.
    """
    loaded = _loaded(config_path, overrides)
    if loaded is None:
        return USAGE
    configure_log(loaded.config)
    try:
        daemon = Daemon(loaded, config_path, overrides, renew=renew)
        asyncio.run(daemon.run())
        if daemon.renews:
            _begin_anew()
    except start_errors() as error:
        log.error("cannot run", extra=fields(error=error))  # noqa: TRY400  the text says it all
        return UNABLE
    except InvalidPolicyError as error:
        _tell(map(str, error.problems))
        log.error("cannot run", extra=fields(error=error))  # noqa: TRY400 - the text says it all
        return INVALID
    return OK


def _begin_anew() -> NoReturn:
    """Become the program that is on disk now, called as we were."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    arguments = [*(word for word in sys.orig_argv if word != RENEW), RENEW]
    log.info("begins anew", extra=fields(command=" ".join(arguments)))
    logging.shutdown()
    os.execv(sys.executable, arguments)  # noqa: S606  no shell: the very arguments we have


def cleanup(config_path: Path | None, overrides: Mapping[str, str]) -> int:
    """Remove what a killed daemon left: rules, sets, routes, sockets, workers.

    Refused while a daemon runs: that one cleans up when it is stopped.
    """
    loaded = _loaded(config_path, overrides)
    if loaded is None:
        return USAGE
    configure_log(loaded.config)
    pid = standing.occupant()
    if pid:
        _tell([f"process {pid} is the daemon of this network namespace: stop it with kill {pid}"])
        return UNABLE
    try:
        kernel.remove(ruleset_config(loaded.config))
        kernel.remove_tables()
    except KernelError as error:
        _tell([str(error)])
        return UNABLE
    ended = asyncio.run(end_orphans(loaded.config.run_dir))
    log.info("rules, sets and routes removed", extra=fields(workers_ended=len(ended)))
    config = loaded.config
    removed = [_remove_socket(path) for path in (config.api_path, admin_path(config.run_dir))]
    return OK if all(removed) else FAILED


def _loaded(path: Path | None, overrides: Mapping[str, str]) -> Loaded | None:
    """Return the configuration, or None after printing what is wrong."""
    try:
        return load(path, overrides, os.environ)
    except DocumentError as error:
        _tell(map(str, error.problems))
        return None


def _remove_socket(path: Path) -> bool:
    """Remove a stale socket of the agent; say whether none is left."""
    if not path.is_socket():
        return True
    try:
        pid = listener_pid(path, socket.SOCK_STREAM)
    except ChannelError as error:
        _tell([str(error)])
        return False
    if pid:
        _tell([f"{path}: process {pid} listens there; it was left alone"])
        return False
    path.unlink(missing_ok=True)
    return True


def _tell(lines: Iterable[str]) -> None:
    """Print for people."""
    for line in lines:
        sys.stderr.write(f"{line}\n")
