"""A packet beside the flow that tells what became of it: what `bartizan monitor` is sent."""

import msgspec

from firewall.flows.compact import Style, cells_of, escape
from firewall.flows.flow import Flow


class Captured(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the stream; in JSON, `packet` is base64.

    Attributes:
        time_ns: nanoseconds since the epoch, 0 = there is no packet, only a loss.
        packet: its head, from the IP header on.
        length: bytes on the wire, as its IP header says.
        flow: what was decided.
        lost_count: packets that were lost before this one.
    """

    time_ns: int = 0
    packet: bytes = b""
    length: int = 0
    flow: Flow | None = None
    lost_count: int = 0


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Captured)


def to_line(captured: Captured) -> bytes:
    """Return the line of the stream, with its newline."""
    return _encoder.encode(captured) + b"\n"


def from_line(line: bytes) -> Captured:
    """Read one line of the stream.

    Raises:
        ValueError: it is none.
    """
    return _decoder.decode(line)


def comment(flow: Flow) -> str:
    """Say in one line what was decided about a packet, why, and between whom."""
    cells = cells_of(flow, Style())
    said = flow.extensions.value if flow.extensions is not None else None
    reasons = [flow.drop_reason_desc]
    if said is not None:
        reasons += [said.why, said.detail]
    ends = [
        " ".join(filter(None, pair))
        for pair in (
            (cells.source, cells.source_identity),
            (cells.destination, cells.destination_identity),
        )
    ]
    head = ": ".join(filter(None, (cells.verdict, *reasons)))
    return escape(f"{head}; {ends[0]} {cells.arrow} {ends[1]} {flow.traffic_direction}".rstrip())
