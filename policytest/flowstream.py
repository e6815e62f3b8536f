"""The agent's flow stream, as a place where the verdict of one packet can be waited for.

A thread reads the lines as they come. Who sent a packet knows its addresses and ports, and no other
packet of the run has the same, so its verdict is the flow with that key: nothing is inferred from
silence.
"""

import http.client
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from conntrack.address import parse_address
from firewall.flows.flow import EVENT_L7, Flow, FlowError, Layer4, from_json
from lab.daemon import UnixConnection
from policytest.case import ICMP, ICMPV6, PROTOCOLS
from policytest.world import Probe

_CONNECT_TIMEOUT_S = 5.0


class Key(NamedTuple):
    """What tells one packet from all others; an ICMP record has no id: `source_port` is 0."""

    source: bytes
    destination: bytes
    protocol: int
    source_port: int
    port: int


KEYED = frozenset({*PROTOCOLS.values(), ICMP, ICMPV6})
"""Protocols whose flows have a key; the record of any other protocol says nothing about ports."""


def key_of(probe: Probe, source_port: int) -> Key:
    """Return the key by which the flow of a probe is found."""
    own = 0 if probe.protocol in (ICMP, ICMPV6) else source_port
    return Key(probe.source, probe.destination, probe.protocol, own, probe.port)


def _flow_key(flow: Flow) -> Key | None:
    if flow.ip is None or flow.l4 is None:
        return None
    ports = _ports(flow.l4)
    return Key(parse_address(flow.ip.source), parse_address(flow.ip.destination), *ports)


def _ports(layer: Layer4) -> tuple[int, int, int]:
    """Return protocol, source port, destination port or ICMP type."""
    if layer.tcp is not None:
        return PROTOCOLS["TCP"], layer.tcp.source_port, layer.tcp.destination_port
    if layer.udp is not None:
        return PROTOCOLS["UDP"], layer.udp.source_port, layer.udp.destination_port
    if layer.sctp is not None:
        return PROTOCOLS["SCTP"], layer.sctp.source_port, layer.sctp.destination_port
    if layer.icmpv4 is not None:
        return ICMP, 0, layer.icmpv4.type
    return ICMPV6, 0, layer.icmpv6.type if layer.icmpv6 is not None else 0


class FlowStream:
    """Flows from now on, by key; a context manager.

    Attributes:
        lost_count: flows that the agent or a worker could not deliver.
    """

    def __init__(self, api_socket: Path) -> None:
        self._connection = UnixConnection(api_socket, _CONNECT_TIMEOUT_S)
        self._connection.connect()
        self._connection.sock.settimeout(None)  # between two flows there may be any time
        self._connection.request("GET", "/v1/flows?follow=1&last=0")
        self._answer = self._connection.getresponse()
        self._arrived = threading.Condition()
        self._packets: dict[Key, list[Flow]] = {}
        self._requests: dict[Key, list[Flow]] = {}
        self._strange: list[Flow] = []
        self._ended = False
        self.lost_count = 0
        self._thread = threading.Thread(target=self._read, name="flows", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in self._answer:
                self._take(line)
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            pass  # the stream was closed, here or there
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()

    def _take(self, line: bytes) -> None:
        try:
            response = from_json(line)
        except FlowError:
            return
        flow = response.flow
        if flow is None:
            self.lost_count += 1
            return
        key = _flow_key(flow)
        if key is None:
            with self._arrived:
                self._strange.append(flow)
                self._arrived.notify_all()
            return
        is_request = flow.event_type is not None and flow.event_type.type == EVENT_L7
        with self._arrived:
            found = self._requests if is_request else self._packets
            found.setdefault(key, []).append(flow)
            self._arrived.notify_all()

    def packet(self, key: Key) -> Flow | None:
        """Return the first flow of a packet, None = not seen yet."""
        flows = self._packets.get(key)
        return flows[0] if flows else None

    def request(self, key: Key) -> Flow | None:
        """Return the first flow of a request on a connection, None = not seen yet."""
        flows = self._requests.get(key)
        return flows[0] if flows else None

    def forget(self) -> None:
        """Drop what was seen; keys may be used again."""
        with self._arrived:
            self._packets.clear()
            self._requests.clear()
            self._strange.clear()

    def strange(self, within_s: float) -> Flow | None:
        """Wait for a flow without a key: of a malformed packet, or of another protocol."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._strange or self._ended, within_s)
            return self._strange[0] if self._strange else None

    def wait(self, keys: Iterable[Key], within_s: float, *, requests: bool = False) -> set[Key]:
        """Wait until every key has its flow; return those that have none in time.

        The time begins anew whenever a flow comes.
        """
        missing = set(keys)
        found = self._requests if requests else self._packets
        deadline = time.monotonic() + within_s
        with self._arrived:
            while True:
                before = len(missing)
                missing = {key for key in missing if key not in found}
                if not missing or self._ended:
                    return missing
                if len(missing) < before:
                    deadline = time.monotonic() + within_s
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return missing
                self._arrived.wait(left_s)

    def close(self) -> None:
        """Stop reading."""
        if self._connection.sock is not None:
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(_CONNECT_TIMEOUT_S)
        self._answer.close()
        self._connection.close()
