"""The DNS proxy of one worker, put together: policy, desk, UDP sockets, and answers that wait.

An answer with addresses is held until the agent says that every worker enforces them: the client's
first packet must find its way open. The agent is asked once for addresses of a name; what it has
confirmed is remembered until a new snapshot is in force, so that a name asked for again costs no
message. Without an agent answers go out at once, and what they taught is told to the next one.
"""

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from firewall.control.messages import FromWorker, Learnt, Settled
from firewall.flows.event import DnsEvent
from firewall.policy.view import View
from l7proxy.dns_confirmed import Confirmed
from l7proxy.dns_datagram import DatagramServer
from l7proxy.dns_desk import Desk, Lesson
from l7proxy.dns_policy import NamePolicy
from l7proxy.limits import Limits
from l7proxy.poller import Poller

UNTOLD_COUNT = 10_000
"""Lessons kept for an agent that is not there, about 2 MB; older ones are forgotten."""


class _Held(NamedTuple):
    lesson: Lesson
    expires_at: float
    send: Callable[[], None]
    timer: asyncio.TimerHandle


class DnsService:
    """See the module.

    Args:
        limits: the bounds.
        listeners: the UDP sockets that TPROXY leads to.
        mark: packet mark of everything that is sent.
        count: called with the name of every counter that rises.
        report: takes flow events.
        send: sends to the agent; False if there is none.

    Raises:
        OSError: a socket cannot be made.
    """

    def __init__(
        self,
        limits: Limits,
        listeners: Iterable[socket.socket],
        mark: int,
        *,
        count: Callable[[str], None],
        report: Callable[[DnsEvent], None],
        send: Callable[[FromWorker], bool],
    ) -> None:
        self.mark = mark
        self.count = count
        self._limits = limits
        self._send = send
        self._policy = NamePolicy()
        self.desk = Desk(self._policy, limits, count, report)
        self._datagrams = DatagramServer(self, self.desk, listeners, limits.dns_timeout_s)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._held: dict[int, _Held] = {}
        self._token = 0
        self._untold: deque[Learnt] = deque(maxlen=UNTOLD_COUNT)
        self._confirmed = Confirmed()

    def start(self, poller: Poller) -> None:
        """Begin to serve."""
        self._loop = asyncio.get_running_loop()
        self._datagrams.start(poller, time.monotonic)

    def stop(self) -> None:
        """Take no more datagrams."""
        self._datagrams.stop()

    def close(self) -> None:
        """Close every socket."""
        self._datagrams.close()

    @property
    def idle(self) -> bool:
        """Whether nothing is open."""
        return not self._held and self._datagrams.idle

    def follow(self, view: View | None) -> None:
        """Decide by this view from now on."""
        self._policy.follow(view)
        self._confirmed.clear()

    def tick(self, now: float) -> None:
        """Let time pass; called a few times a second."""
        self._datagrams.tick(now)
        while self._untold and self._send(self._untold[0]):
            self._untold.popleft()

    # --- answers that wait ------------------------------------------------------------------------

    def hold(self, lesson: Lesson | None, send: Callable[[], None]) -> None:
        """Call `send` when every worker enforces the lesson, or when waiting is over."""
        if lesson is None:
            send()
            return
        expires_at = time.monotonic() + lesson.ttl_s
        if self._confirmed.has(lesson, expires_at):
            send()
            return
        self._token += 1
        token = self._token
        message = Learnt(token, lesson.endpoint, lesson.name, lesson.addresses, lesson.ttl_s)
        crowded = len(self._held) >= self._limits.dns_pending_count
        if crowded or not self._send(message):
            self.count("dns_unheld_answers")
            if not crowded:
                self._untold.append(Learnt(0, *lesson))
            send()
            return
        assert self._loop is not None
        timer = self._loop.call_later(self._limits.dns_hold_s, self._late, token)
        self._held[token] = _Held(lesson, expires_at, send, timer)

    def settled(self, message: Settled) -> None:
        """Release an answer: the agent says that its addresses are enforced, or gives up."""
        held = self._held.pop(message.token, None)
        if held is None:
            return
        held.timer.cancel()
        if message.enforced:
            self._confirmed.add(held.lesson, held.expires_at)
        else:
            self.count("dns_hold_timeouts")
        held.send()

    def _late(self, token: int) -> None:
        """Release an answer that has waited long enough."""
        held = self._held.pop(token, None)
        if held is not None:
            self.count("dns_hold_timeouts")
            held.send()
