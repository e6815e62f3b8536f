"""Which way to the server each stream takes (docs/l7.md, `h2_upstream`).

There is no negotiation in clear text: whether a server speaks HTTP/2 is known when it has. gRPC has
no other wire, so it always tries; other requests try if the setting says so, or once it is known.
"""

from collections.abc import Iterator

from l7proxy.commands import Command
from l7proxy.lanes import H1Lane, H2Lane, Lane
from l7proxy.limits import Limits
from l7proxy.link import LinkState
from l7proxy.streams import Stream


class Ways:
    """The lanes of one client connection, by link number, and who uses which.

    Attributes:
        no_h2: the server was found to speak no HTTP/2.
    """

    __slots__ = ("_lanes", "_limits", "_link_number", "_of", "_scheme", "_shared", "no_h2")

    def __init__(self, limits: Limits, scheme: bytes) -> None:
        self._limits = limits
        self._scheme = scheme
        self._lanes: dict[int, Lane] = {}
        self._of: dict[int, Lane] = {}
        self._shared: H2Lane | None = None
        self._link_number = 0
        self.no_h2 = False

    def lane(self, link: int) -> Lane | None:
        """Return the lane with this link, None if it is gone."""
        return self._lanes.get(link)

    def of(self, stream: Stream) -> Lane:
        """Return the lane that carries a stream."""
        return self._of[stream.number]

    def carried(self, lane: Lane) -> Iterator[int]:
        """Yield the numbers of the streams that a lane carries."""
        return (number for number, other in tuple(self._of.items()) if other is lane)

    def choose(self, stream: Stream) -> Lane | None:
        """Return a lane for a stream; None: gRPC, and the server speaks no HTTP/2."""
        mode, shared = self._limits.h2_upstream, self._shared
        known = shared is not None and shared.spoken
        if mode == "never" or self.no_h2:
            if stream.grpc:
                return None
        elif stream.grpc or known or mode == "prefer":
            if shared is None or shared.leaving:
                number = self._next_number()
                self._shared = shared = H2Lane(number, self._limits, self._scheme)
                self._lanes[number] = shared
            self._of[stream.number] = shared
            return shared
        self._of[stream.number] = lane = self._free_lane()
        return lane

    def _free_lane(self) -> H1Lane:
        for lane in self._lanes.values():
            if isinstance(lane, H1Lane) and lane.stream is None:
                return lane
        number = self._next_number()
        self._lanes[number] = fresh = H1Lane(number, self._limits)
        return fresh

    def _next_number(self) -> int:
        self._link_number += 1
        return self._link_number

    def cancel(self, stream: Stream, commands: list[Command]) -> None:
        """Give up the request of a stream, if a lane still has it."""
        lane = self._of.get(stream.number)
        if isinstance(lane, H2Lane) or (lane is not None and lane.stream is stream):
            lane.cancel(stream, commands)

    def forget(self, stream: Stream) -> None:
        """Let go of a stream that has ended."""
        lane = self._of.pop(stream.number, None)
        if lane is not None:
            self.tidy(lane)

    def tidy(self, lane: Lane) -> None:
        """Forget a lane that has ended and carries nothing."""
        if lane.link.state is LinkState.NONE and lane not in self._of.values():
            self._lanes.pop(lane.link.number, None)
            if lane is self._shared:
                self._shared = None

    def drop_all(self, commands: list[Command]) -> None:
        """Close every connection; those under way by RST."""
        busy = set(map(id, self._of.values()))
        for lane in self._lanes.values():
            lane.link.drop(commands, reset=id(lane) in busy)
        self._lanes.clear()
        self._of.clear()
        self._shared = None
