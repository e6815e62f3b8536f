"""A datapath worker that notes, for each packet, how long it had it: read to verdict sent.

`python -m bench.timed_worker RESULT baseline|worker OPTIONS...`: with `worker` it is the real
worker, with `baseline` every packet is accepted without a look. RESULT receives the times in
nanoseconds as JSON when SIGTERM comes.
"""

import json
import sys
from pathlib import Path
from time import perf_counter_ns

from firewall.datapath import worker
from firewall.datapath.nfqueue import QueuedPacket


class TimedWorker(worker.Worker):
    """The real worker; a turn's verdicts have all been sent when its `receive` returns."""

    looks = True

    def __init__(self, options) -> None:
        super().__init__(options)
        self.times_ns: list[int] = []
        self._begun_ns: list[int] = []

    def _on_packet(self, packet: QueuedPacket) -> None:
        self._begun_ns.append(perf_counter_ns())
        if self.looks:
            super()._on_packet(packet)
        else:
            self._queue.accept(packet)

    def _take_packets(self) -> None:
        super()._take_packets()
        now_ns = perf_counter_ns()
        self.times_ns += [now_ns - begun for begun in self._begun_ns]
        self._begun_ns.clear()


class BaselineWorker(TimedWorker):
    """Accepts everything: what the queue itself costs."""

    looks = False


def main() -> int:
    """Run until SIGTERM, then write the times."""
    result, kind, *arguments = sys.argv[1:]
    chosen = TimedWorker if kind == "worker" else BaselineWorker
    made: list[TimedWorker] = []

    def make(options) -> TimedWorker:
        made.append(chosen(options))
        return made[0]

    worker.Worker = make
    status = worker.main(arguments)
    Path(result).write_text(json.dumps(made[0].times_ns), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
