"""Messages as datagrams: nothing is lost by splitting, nothing foreign is read."""

import msgspec
import pytest

from firewall.control.framing import (
    FramingError,
    datagrams,
    decode_from_worker,
    decode_to_worker,
)
from firewall.control.messages import (
    MAX_MESSAGE_BYTES,
    Acknowledged,
    Announce,
    Answer,
    Ask,
    Drain,
    Events,
    Forget,
    Hello,
    Watch,
)
from firewall.flows.event import PacketEvent


def packet_event(source_port: int, detail: str = "") -> PacketEvent:
    """Build an event that can be told from others by its port."""
    return PacketEvent(
        time_ns=1, verdict=1, drop_reason=0, direction=1, source=bytes(4), destination=bytes(4),
        protocol=6, source_port=source_port, destination_port=80, tcp_flags=2, icmp_type=-1,
        icmp_code=-1, length=60, source_identity=2, destination_identity=256, source_endpoint=0,
        destination_endpoint=1, match=1, audited=False, reply=False, ct_state="new",
        interface_index=3, proxy_port=0, policy_revision=1, detail=detail,
    )  # fmt: skip


FORGET = Forget(3, ((bytes(4), 0), (bytes(16), 80)), None)


@pytest.mark.parametrize(
    "message", [Announce(7, "/run/s"), Ask(1, "status"), FORGET, Watch(4.0), Drain(2.5)]
)
def test_what_the_agent_sends_survives_the_wire(message):
    """One datagram is one message."""
    (part,) = datagrams(message)
    assert decode_to_worker(part.payload) == message


@pytest.mark.parametrize(
    "message",
    [
        Hello("datapath", 1, 77, "0.1.0", 5),
        Acknowledged(5),
        Acknowledged(6, "cut short"),
        Events((packet_event(1),), 3),
        Answer(1, ({"a": 1},), last=True),
    ],
)
def test_what_a_worker_sends_survives_the_wire(message):
    """One datagram is one message."""
    (part,) = datagrams(message)
    assert decode_from_worker(part.payload) == message


def test_events_are_split_in_order_and_the_loss_is_told_once():
    """MAX_MESSAGE_BYTES bounds each datagram."""
    events = tuple(packet_event(port) for port in range(5000))
    parts = list(datagrams(Events(events, lost_count=9)))
    assert len(parts) > 1
    assert all(len(part.payload) <= MAX_MESSAGE_BYTES for part in parts)
    read = [decode_from_worker(part.payload) for part in parts]
    assert tuple(event for message in read for event in message.events) == events
    assert [message.lost_count for message in read] == [9] + [0] * (len(read) - 1)
    assert sum(part.items for part in parts) == len(events)


def test_only_the_last_part_of_an_answer_ends_it():
    """`Answer.last` ends the answer."""
    rows = tuple({"row": number, "text": "x" * 100} for number in range(4000))
    read = [decode_from_worker(part.payload) for part in datagrams(Answer(4, rows, last=True))]
    assert tuple(row for message in read for row in message.rows) == rows
    assert [message.last for message in read] == [False] * (len(read) - 1) + [True]
    assert {message.request for message in read} == {4}


def test_an_event_above_the_limit_is_reported_and_its_neighbours_pass():
    """A part that cannot be halved is left out."""
    events = (packet_event(1), packet_event(2, "x" * MAX_MESSAGE_BYTES), packet_event(3))
    parts = list(datagrams(Events(events)))
    assert sum(part.items for part in parts if part.oversize) == 1
    read = [decode_from_worker(part.payload) for part in parts if not part.oversize]
    assert [event.source_port for message in read for event in message.events] == [1, 3]


def test_an_answer_ends_even_if_its_last_row_is_above_the_limit():
    """The end marker must arrive, or whoever asked would wait for nothing."""
    parts = list(datagrams(Answer(1, ({"a": 1}, {"b": "x" * MAX_MESSAGE_BYTES}), last=True)))
    read = [decode_from_worker(part.payload) for part in parts if not part.oversize]
    assert [message.last for message in read] == [False, True]
    assert any(part.oversize for part in parts)


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"hello", b"\x80", msgspec.msgpack.encode([1])])
def test_other_bytes_are_refused(payload):
    """Any bytes give a message or a FramingError."""
    with pytest.raises(FramingError):
        decode_to_worker(payload)
    with pytest.raises(FramingError):
        decode_from_worker(payload)


def test_directions_are_not_confused():
    """A worker does not read what only workers send, nor the agent what only agents send."""
    (ask,) = datagrams(Ask(1, "status"))
    (hello,) = datagrams(Hello("datapath", 0, 1, "0.1.0", 0))
    with pytest.raises(FramingError, match="not a message from a worker"):
        decode_from_worker(ask.payload)
    with pytest.raises(FramingError, match="not a message to a worker"):
        decode_to_worker(hello.payload)
