"""An event with the names of its moment. Its flow record is made when somebody reads it.

Most records are never read: they leave the ring unseen. So the agent writes down, per event, only
what will not be there any more later, the names; the record, forty times as expensive, is made at
the first question after it. The record is the same whenever it is made (`record.build` is pure).
"""

from typing import NamedTuple

from firewall.flows.event import Event
from firewall.flows.flow import Flow, FlowEndpoint
from firewall.flows.record import EndpointName, Ends, Names, endpoint, event_id, record

_SIDES_MAX_COUNT = 4096  # remembered sides, about 0.5 kB each; a full table is forgotten whole


class Note:
    """One event, noted.

    Attributes:
        event: as the worker reported it.
        ends: who was at its two ends.
    """

    __slots__ = ("_flow", "ends", "event")

    def __init__(self, event: Event, ends: Ends) -> None:
        self.event = event
        self.ends = ends
        self._flow: Flow | None = None

    @property
    def flow(self) -> Flow:
        """The record, made once."""
        if self._flow is None:
            self._flow = record(self.event, self.ends)
        return self._flow

    @property
    def written(self) -> bool:
        """Whether the record has been made."""
        return self._flow is not None

    @property
    def uuid(self) -> str:
        """The record's id, without making the record."""
        return self._flow.uuid if self._flow is not None else event_id(self.event)


class _Side(NamedTuple):
    """What a side of the traffic is called, and the answers that this was made of."""

    labels: tuple[str, ...]
    name: EndpointName | None
    endpoint: FlowEndpoint


class Noter:
    """Writes notes.

    Args:
        names: whose answers are the same objects as long as they say the same.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._sides: dict[tuple[int | bytes, int], _Side] = {}

    def note(self, event: Event) -> Note:
        """Note an event."""
        names = self._names
        ends = Ends(
            names.node_name,
            self._side(event.source_endpoint, event.source_identity, event.source),
            self._side(event.destination_endpoint, event.destination_identity, event.destination),
            names.dns_names(event.source),
            names.dns_names(event.destination),
        )
        return Note(event, ends)

    def _side(self, number: int, identity: int, address: bytes) -> FlowEndpoint:
        """Return how a side is shown, the same object while its names stay."""
        labels = self._names.labels(identity)
        name = self._names.endpoint(number, address)
        key = address if name is not None and not number else number
        side = self._sides.get((key, identity))
        if side is None or side.labels is not labels or side.name is not name:
            if len(self._sides) >= _SIDES_MAX_COUNT:
                self._sides.clear()
            side = _Side(labels, name, endpoint(number, identity, labels, name))
            self._sides[key, identity] = side
        return side.endpoint
