"""Looks, now and then, at the flows that the kernel carries: which live, what they have carried.

A look is a dump of the kernel's table, read in pieces between packets; when one is due, and what it
means, `offload` knows.
"""

import logging
import select
from collections.abc import Iterator

from firewall.datapath.kernel_flows import Dump
from firewall.datapath.marks import MaskedMark
from firewall.datapath.offload import Offloaded
from firewall.datapath.troubles import Troubles

log = logging.getLogger(__name__)


class Lookout:
    """Has at most one look under way.

    Args:
        offloaded: who is told what was seen.
        mark: the connmark of flows that the kernel carries.
        poll: what the worker waits with.
        troubles: the worker's.
    """

    def __init__(
        self, offloaded: Offloaded, mark: MaskedMark, poll: select.epoll, troubles: Troubles
    ) -> None:
        self._offloaded = offloaded
        self._mark = mark
        self._poll = poll
        self._troubles = troubles
        self._dump: Dump | None = None
        self._ended_count = 0

    def turn(self, ready: list[int], now: float) -> None:
        """Go on with a look whose descriptor is ready, or begin one that is due."""
        if self._dump is not None:
            if self._dump.fileno() in ready:
                self._read(self._dump, now)
        elif self._offloaded and now >= self._offloaded.next_dump_at:
            self._begin(now)

    def fresh(self) -> Iterator[None]:
        """Begin a look at once; yield until it has ended, or nothing is carried any more."""
        if self._offloaded:
            awaited = self._ended_count + (1 if self._dump is None else 2)
            while self._ended_count < awaited and self._offloaded:
                self._offloaded.next_dump_at = 0.0  # again: the end of one that was under way
                yield

    def _begin(self, now: float) -> None:
        """Ask the kernel."""
        self._offloaded.dump_begins(now)
        try:
            self._dump = Dump(self._mark)
        except OSError as error:
            self._end(now, error)
        else:
            self._poll.register(self._dump.fileno(), select.EPOLLIN)

    def _read(self, dump: Dump, now: float) -> None:
        """Take one piece of the kernel's answer."""
        try:
            for flow in dump.flows():
                self._offloaded.found(flow, now)
        except OSError as error:
            self._end(now, error)
        except Exception as error:  # noqa: BLE001  a bug of ours must not end the worker
            self._troubles.failed("a look at the kernel's flows", error)
            self._end(now, OSError("internal error"))
        else:
            if dump.ended:
                self._end(now)

    def _end(self, now: float, error: OSError | None = None) -> None:
        """Believe an answer that is whole; after any other, nothing is known, and time passes."""
        if self._dump is not None:
            self._poll.unregister(self._dump.fileno())
            self._dump.close()
            self._dump = None
        self._ended_count += 1
        self._offloaded.dump_ends(now, whole=error is None)
        if error is not None:
            log.warning("the kernel's flows cannot be read: %s", error)
