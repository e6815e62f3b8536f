"""The kernel's conntrack as a tracker that can be asked: the class of each packet, every flow.

Packets go through the node of a lab: the client's nets are behind host a, the server's behind host
b, and neither host owns an address of them, so nobody answers and only what a test sends is
tracked. Each packet of a batch gets a number of its own (IPv4 identification, IPv6 flow label); a
rule notes class and direction under it in a set, which is read once per batch.

The two directions enter through different links in the order in which they are sent.
"""

import json
import re
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from scapy.utils import checksum
from traffic import eventually

from lab.laboratory import Lab

CLIENT, SERVER = "10.201.1.2", "10.201.2.2"
CLIENT6, SERVER6 = "fd00:201:1::2", "fd00:201:2::2"
CLIENT_NET, SERVER_NET = "10.201.0.0/16", "10.201.2.0/24"
CLIENT_NET6, SERVER_NET6 = "fd00:201:1::/48", "fd00:201:2::/48"
_NOTED = "ct state . ct direction"
_RULES = f"""
table inet watch {{
  set seen4 {{ typeof ip id . {_NOTED}; flags dynamic; size 65536; }}
  set seen6 {{ typeof ip6 flowlabel . {_NOTED}; flags dynamic; size 65536; }}
  set refused4 {{ typeof ip id; flags dynamic; size 65536; }}
  set refused6 {{ typeof ip6 flowlabel; flags dynamic; size 65536; }}
  chain look {{
    type filter hook prerouting priority -100;
    ct state {{ invalid, untracked }} update @refused4 {{ ip id }}
    ct state {{ invalid, untracked }} update @refused6 {{ ip6 flowlabel }}
    ct state {{ new, established, related }} update @seen4 {{ ip id . {_NOTED} }}
    ct state {{ new, established, related }} update @seen6 {{ ip6 flowlabel . {_NOTED} }}
  }}
}}
"""
_SETS = ("seen4", "seen6", "refused4", "refused6")
_FLUSH = "".join(f"flush set inet watch {name}\n" for name in _SETS)
_CLASSES = {
    ("new", "original"): "NEW",
    ("established", "original"): "ESTABLISHED",
    ("established", "reply"): "REPLY",
    ("related", "original"): "RELATED",
    ("related", "reply"): "RELATED_REPLY",
}
_FLOW = re.compile(
    r"^\w+\s+(?P<protocol>\d+) (?P<timeout>\d+) (?:(?P<state>[A-Z_0-9]+) )?"
    r"(?:timeout=\d+, stream_timeout=\d+ )?src=(?P<source>\S+) dst=(?P<destination>\S+) "
    r"(?:sport=(?P<sport>\d+) dport=(?P<dport>\d+) |type=\d+ code=\d+ id=(?P<id>\d+) )?"
)


class FlowName(NamedTuple):
    """What a flow is asked for by, whoever began it: addresses as text, the client's number.

    `number` is the client's port, an ICMP identifier, or 0 for protocols without.
    """

    protocol: int
    client: str
    number: int


class KernelFlow(NamedTuple):
    """One line of `conntrack -L`; `state` "" for protocols without."""

    state: str
    timeout_s: int
    replied: bool
    assured: bool


class Shot(NamedTuple):
    """One packet and the side that sends it."""

    packet: bytes
    reply: bool


class KernelTracker:
    """Conntrack of a lab's node; the lab has the hosts a and b."""

    def __init__(self, lab: Lab) -> None:
        self._node = lab.node
        self._hosts = a, b = (lab.host("a"), lab.host("b"))
        for net, via, host in (
            (CLIENT_NET, a.address4, a),
            (SERVER_NET, b.address4, b),
            (CLIENT_NET6, a.address6, a),
            (SERVER_NET6, b.address6, b),
        ):
            route = ["route", "add", net, "via", via, "dev", host.interface, "onlink"]
            family = ["-6"] if ":" in net else []
            self._node.run(["ip", *family, *route], check=True)
        self._node.run(["nft", "-f", "-"], stdin=_RULES, check=True)

    def set(self, **values: int) -> None:
        """Set net.netfilter.nf_conntrack_NAME."""
        for name, value in values.items():
            self._node.netns.set(**{f"netfilter__nf_conntrack_{name}": str(value)})

    def forget(self) -> None:
        """Drop every flow."""
        self._node.run(["conntrack", "-F"], check=True)

    def send(self, shots: list[Shot]) -> list[str]:
        """Send a batch; the class of each packet, as `CtState` names it (UNTRACKED: INVALID)."""
        self._node.run(["nft", "-f", "-"], stdin=_FLUSH, check=True)
        for number, shot in enumerate(shots, 1):
            self._hosts[shot.reply].send(numbered(shot.packet, number))
        found: dict[int, str] = {}

        def all_seen() -> bool:
            found.update(self._seen())
            return all(number in found for number in range(1, len(shots) + 1))

        eventually(all_seen, f"{len(shots)} packets pass the hook")
        return [found[number] for number in range(1, len(shots) + 1)]

    def pass_on(self, pieces: list[bytes], last: bytes) -> list[str]:
        """Send the client's packets, which may not all get to the tracker; the classes of those
        that did before `last` did.
        """
        self._node.run(["nft", "-f", "-"], stdin=_FLUSH, check=True)
        self._hosts[0].send(*(numbered(piece, 1) for piece in pieces), numbered(last, 2))
        found = eventually(self._seen_last, "the last one passes")
        return [found[1]] if 1 in found else []

    def _seen_last(self) -> dict[int, str] | None:
        found = self._seen()
        return found if 2 in found else None

    def _seen(self) -> dict[int, str]:
        listed = self._node.run(["nft", "-j", "list", "table", "inet", "watch"], check=True).stdout
        sets = {
            item["set"]["name"]: item["set"].get("elem", [])
            for item in json.loads(listed)["nftables"]
            if "set" in item
        }
        classes = dict.fromkeys((*sets["refused4"], *sets["refused6"]), "INVALID")
        for element in (*sets["seen4"], *sets["seen6"]):
            number, state, direction = element["concat"]
            classes[number] = _CLASSES[state, direction]
        return classes

    def flows(self) -> dict[FlowName, KernelFlow]:
        """Every flow between a client and a server."""
        return dict(self._flows())

    def _flows(self) -> Iterator[tuple[FlowName, KernelFlow]]:
        for line in self._node.run(["conntrack", "-L"], check=True).stdout.splitlines():
            match = _FLOW.match(line)
            if match is None:
                continue
            forward = match["destination"] in (SERVER, SERVER6)
            client = match["source"] if forward else match["destination"]
            port = match["sport"] if forward else match["dport"]
            name = FlowName(int(match["protocol"]), client, int(port or match["id"] or 0))
            flow = KernelFlow(
                match["state"] or "",
                int(match["timeout"]),
                "[UNREPLIED]" not in line,
                "[ASSURED]" in line,
            )
            yield name, flow


def numbered(packet: bytes, number: int) -> bytes:
    """The packet with another identification or flow label, and the right header checksum."""
    if packet[0] >> 4 == 6:
        return struct.pack("!I", 6 << 28 | number) + packet[4:]
    size = (packet[0] & 15) * 4
    head = packet[:4] + struct.pack("!H", number) + packet[6:10] + b"\0\0" + packet[12:size]
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + packet[size:]


def now() -> float:
    """The clock that our tracker is given beside the kernel's own."""
    return time.monotonic()
