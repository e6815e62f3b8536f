"""Which flows a user means by `--from` and `--to`. Pure."""

from collections.abc import Container
from typing import NamedTuple

from conntrack.flow import FlowTuple

Ends = tuple[tuple[bytes, int], ...]
"""Packed addresses, each with a port, 0 = any."""


class Choice(NamedTuple):
    """The flows that one of `sources` opened to one of `destinations`; None = anybody."""

    sources: Container[tuple[bytes, int]] | None = None
    destinations: Container[tuple[bytes, int]] | None = None

    def includes(self, flow: FlowTuple) -> bool:
        """Say whether a flow is one of them."""
        return _is_one(flow.source, flow.source_port, self.sources) and _is_one(
            flow.destination, flow.destination_port, self.destinations
        )


def choose(sources: Ends | None, destinations: Ends | None) -> Choice:
    """Return the choice of flows between these ends."""
    return Choice(*(None if ends is None else frozenset(ends) for ends in (sources, destinations)))


def _is_one(address: bytes, port: int, ends: Container[tuple[bytes, int]] | None) -> bool:
    return ends is None or (address, 0) in ends or (address, port) in ends
