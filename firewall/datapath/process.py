"""A verdict worker as a process: its command line, its signals, its collector of garbage."""

import argparse
import gc
import logging
import signal
import socket
import sys
from collections.abc import Sequence

from firewall.control import journal
from firewall.control.unix import ChannelError
from firewall.datapath import nfqueue
from firewall.datapath.marks import DEFAULT_MASK
from firewall.datapath.nfqueue import QueueError, VerdictLostError
from firewall.datapath.worker import Worker

COLLECTOR_THRESHOLDS = (250, 2, 10_000_000)
"""Of the garbage collector's generations, in objects and rounds; see `serve`."""

log = logging.getLogger(__name__)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; exits with usage on a mistake."""
    parser = argparse.ArgumentParser(
        prog="firewall.datapath", description="Decide the packets of one netfilter queue."
    )
    add = parser.add_argument
    add("--number", type=int, required=True, help="number of this worker, from 0")
    add("--bank", type=int, choices=(0, 1), default=0, help="of two workers with its number, which")
    add("--queue", type=int, required=True, help="number of its queue")
    add("--run-dir", required=True, help="where the control socket is made")
    add("--snapshot", required=True, help="path of the snapshot file")
    add("--workers", type=int, default=1, help="how many workers share the traffic")
    add("--mark-mask", type=lambda text: int(text, 0), default=DEFAULT_MASK)
    add("--copy-range", type=int, default=nfqueue.DEFAULT_COPY_BYTES, help="bytes of a packet")
    add("--queue-length", type=int, default=nfqueue.DEFAULT_LENGTH, help="packets that may wait")
    add("--flow-limit", type=int, default=262_144, help="flows that are tracked at most")
    add("--source-limit", type=int, default=0, help="of them, one source's; 0 = no such limit")
    add("--profile", choices=("strict", "linux"), default="strict", help="of the tracker")
    add("--bypass", action="store_true", help="let the kernel carry flows that need no look")
    add("--resets", choices=("none", "l7", "all"), default="l7", help="connections that end by RST")
    add("--no-gso", action="store_true", help="have the kernel split large segments first")
    add("--log-level", default="info", help="debug, info, warning or error")
    add("--log-format", choices=("logfmt", "json"), default="logfmt", help="of each line")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker; return the exit status."""
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    journal.configure(options.log_format, options.log_level, f"datapath-{options.number}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C is the agent's to handle
    try:
        worker = Worker(options)
    except (QueueError, ChannelError) as error:
        log.error("cannot start: %s", error)  # noqa: TRY400  the text says it all
        return 1
    return serve(worker)


def serve(worker: Worker) -> int:
    """Run a worker until SIGTERM, or until it is told to stop; return the exit status."""
    awake, wakeup = socket.socketpair()
    for end in (awake, wakeup):
        end.setblocking(False)
    signal.set_wakeup_fd(awake.fileno(), warn_on_full_buffer=False)

    def stop(_number: int, _frame: object) -> None:
        worker.stop()

    signal.signal(signal.SIGTERM, stop)
    # What is loaded now lives as long as the process; a full collection would stop the packets for
    # longer than the oldest generation can win back, since the hot path makes no cycles.
    # The two younger ones are kept small: looking at 2,000 objects takes 1 ms, and was seen to take
    # 6 where other processes have the caches; 750 take a third of that, and not more in all.
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    try:
        worker.run(wakeup)
    except VerdictLostError as error:
        log.critical("%s; the queue is closed, which drops what waits", error)
        return 1
    finally:
        worker.close()
        signal.set_wakeup_fd(-1)
        for end in (awake, wakeup):
            end.close()
    return 0
