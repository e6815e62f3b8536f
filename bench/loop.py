"""One queue's loop, in the variants that are compared: `python -m bench.loop KIND OPTIONS...`.

    callback  NetfilterQueue as its documentation shows it: a callback that accepts, `run()`
    accept    the worker, but where it would ask tracker and policy, it accepts
    worker    the worker

Before OPTIONS, which are the worker's, `--single` has a verdict sent for each packet instead of
batches, and `--times FILE` notes how long each packet stayed, from read to verdict, in nanoseconds,
and writes a JSON list of that when SIGTERM comes. `Variant` starts such a process in a lab, once
`displace` has ended the daemon's own worker.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Self

import netfilterqueue

from bench.build import PURE, using
from firewall.control.messages import MAX_MESSAGE_BYTES
from firewall.datapath import nfqueue, process, worker
from firewall.datapath.verdict import QUIETLY, PacketDecision
from lab import daemon
from lab.laboratory import Lab

BIND_S = 20.0
"""How long a process may take to bind its queue on a busy machine."""

CALLBACK, ACCEPT, WORKER = "callback", "accept", "worker"


class _Stopwatch:
    """Stands in for the queue's socket, and notes when verdicts are sent.

    Attributes:
        times_ns: from the begin of each packet's decision until its verdict had been sent.
        begun_ns: of the packets that wait for their verdict.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.times_ns: list[int] = []
        self.begun_ns: list[int] = []

    def send(self, message: bytes) -> int:
        """Send a verdict; it is that of all packets that were decided until now."""
        size = self._connection.send(message)
        now_ns = perf_counter_ns()
        self.times_ns += [now_ns - begun for begun in self.begun_ns]
        self.begun_ns.clear()
        return size

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._connection.close()


def _accept(*_: object) -> PacketDecision:
    """Decide without tracker and policy."""
    return QUIETLY


def _timed(one: Any) -> _Stopwatch:
    """Have a worker note times; `Any`, because parts of it are taken away."""
    stopwatch = one._queue._socket = _Stopwatch(one._queue._socket)
    decide, begun_ns = one._decide, stopwatch.begun_ns

    def timed(*arguments: object) -> PacketDecision:
        begun_ns.append(perf_counter_ns())
        decided: PacketDecision = decide(*arguments)
        return decided

    one._decide = timed
    return stopwatch


def _run_callback(options: argparse.Namespace) -> int:
    """Accept everything, a verdict per packet, as any program does that uses the library."""
    queue = netfilterqueue.NetfilterQueue()
    queue.bind(
        options.queue,
        lambda packet: packet.accept(),
        max_len=options.queue_length,
        range=options.copy_range,
        sock_len=nfqueue.DEFAULT_BUFFER_BYTES,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    queue.run()
    return 0


def main() -> int:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(prog="bench.loop")
    parser.add_argument("kind", choices=(CALLBACK, ACCEPT, WORKER))
    parser.add_argument("--single", action="store_true")
    parser.add_argument("--times", type=Path)
    ours, theirs = parser.parse_known_args()
    if ours.kind == CALLBACK:
        return _run_callback(process.parse_options(theirs))
    one: Any = worker.Worker(process.parse_options(theirs))
    if ours.kind == ACCEPT:
        one._decide = _accept
    if ours.single:
        one._queue.batch_count = 1
    stopwatch = _timed(one) if ours.times else None
    status = process.serve(one)
    if stopwatch is not None:
        ours.times.write_text(json.dumps(stopwatch.times_ns), encoding="utf-8")
    return status


class Variant:
    """A loop that runs in a lab's node, on one processor if `pinned`; a context manager.

    Attributes:
        pid: the process.
    """

    def __init__(
        self,
        lab: Lab,
        firewall: daemon.Bartizan,
        kind: str,
        *flags: str | Path,
        build: str = PURE,
        pinned: bool = True,
    ) -> None:
        argv = [
            *(("taskset", "-c", str(min(os.sched_getaffinity(0)))) if pinned else ()),
            *(sys.executable, "-m", "bench.loop", kind, *flags),
            *("--number", "0", "--queue", "0", "--run-dir", firewall.run_dir),
            *("--snapshot", firewall.state_dir / "snapshot"),
        ]
        with using(build):
            self._process = lab.node.start(argv)
        self.pid = self._process.pid
        deadline = time.monotonic() + BIND_S
        while not self._queues():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{kind} does not bind its queue\n{lab.node.log()}")
            time.sleep(0.01)
        if kind != CALLBACK:
            path = firewall.run_dir / "datapath-0.sock"
            threading.Thread(target=_read_events, args=(path, deadline), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def cpu_s(self) -> float:
        """Processor time that the process has used."""
        return cpu_s(self.pid)

    def waiting_count(self) -> int:
        """Packets that wait in the queue (nfnetlink_queue: the third number of a line)."""
        return sum(int(line.split()[2]) for line in self._queues())

    def pause(self) -> None:
        """Stop the process; packets gather."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """Have it write what it noted, and end."""
        self._process.terminate()
        self._process.wait(30)

    def _queues(self) -> list[str]:
        # /proc/net is that of the process that reads: this one's namespace, by its own entry there.
        path = Path(f"/proc/{self.pid}/net/netfilter/nfnetlink_queue")
        return path.read_text(encoding="ascii").splitlines()


def _read_events(path: Path, deadline: float) -> None:
    """Take what a worker tells, as an agent does: without a reader it would make no events."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        while True:
            try:
                connection.connect(os.fspath(path))
            except OSError:  # it listens as soon as its queue is bound
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                break
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(MAX_MESSAGE_BYTES):
                pass


def displace(lab: Lab, firewall: daemon.Bartizan) -> None:
    """End the agent and its workers, so that a `Variant` may have their queue; the rules stay."""
    workers = firewall.get("/v1/status")["workers"]
    firewall.kill()
    for one in workers:
        os.kill(one["pid"], signal.SIGKILL)
    while lab.node.run(["cat", "/proc/net/netfilter/nfnetlink_queue"], check=True).stdout:
        time.sleep(0.01)  # the dead worker's queue would be taken for the new one's


def cpu_s(pid: int) -> float:
    """Processor time of a process so far (/proc/PID/schedstat: nanoseconds on a processor)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9


if __name__ == "__main__":
    sys.exit(main())
