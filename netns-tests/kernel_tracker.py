"""The kernel's conntrack as a tracker that can be asked: the class of each packet, every flow.

Packets go through the node of a lab: the client's net is behind host a, the server's behind host b,
and neither host owns an address of them, so nobody answers and only what a test sends is tracked.
Each packet of a batch gets an IP identification of its own; a rule notes class and direction under
it in a set, which is read once per batch.

The two directions enter through different links in the order in which they are sent.
"""

import json
import re
import struct
import time
from typing import NamedTuple

from scapy.utils import checksum
from traffic import eventually

from lab.laboratory import Lab

CLIENT, SERVER = "10.201.1.2", "10.201.2.2"
_RULES = """
table ip watch {
  set seen { typeof ip id . ct state . ct direction; flags dynamic; size 65536; }
  set refused { typeof ip id; flags dynamic; size 65536; }
  chain look {
    type filter hook prerouting priority -100;
    ct state { invalid, untracked } update @refused { ip id }
    ct state { new, established, related } update @seen { ip id . ct state . ct direction }
  }
}
"""
_CLASSES = {
    ("new", "original"): "NEW",
    ("established", "original"): "ESTABLISHED",
    ("established", "reply"): "REPLY",
    ("related", "original"): "RELATED",
    ("related", "reply"): "RELATED_REPLY",
}
_FLOW = re.compile(
    r"^(?P<protocol>\w+)\s+\d+ (?P<timeout>\d+) (?:(?P<state>[A-Z_0-9]+) )?"
    r"src=(?P<source>\S+) dst=(?P<destination>\S+) "
    r"(?:sport=(?P<sport>\d+) dport=(?P<dport>\d+)|type=\d+ code=\d+ id=(?P<id>\d+))?"
)


class KernelFlow(NamedTuple):
    """One line of `conntrack -L`; `state` "" for protocols without."""

    state: str
    timeout_s: int
    replied: bool
    assured: bool


class Shot(NamedTuple):
    """One IPv4 packet and the side that sends it."""

    packet: bytes
    reply: bool


class KernelTracker:
    """Conntrack of a lab's node; the lab has the hosts a and b."""

    def __init__(self, lab: Lab) -> None:
        self._node = lab.node
        self._hosts = (lab.host("a"), lab.host("b"))
        for net, host in zip(("10.201.1.0/24", "10.201.2.0/24"), self._hosts, strict=True):
            route = ["ip", "route", "add", net, "via", host.address4, "dev", host.interface]
            self._node.run([*route, "onlink"], check=True)
        self._node.run(["nft", "-f", "-"], stdin=_RULES, check=True)

    def set(self, **values: int) -> None:
        """Set net.netfilter.nf_conntrack_NAME."""
        for name, value in values.items():
            self._node.netns.set(**{f"netfilter__nf_conntrack_{name}": str(value)})

    def forget(self) -> None:
        """Drop every flow."""
        self._node.run(["conntrack", "-F"], check=True)

    def send(self, shots: list[Shot]) -> list[str]:
        """Send a batch; the class of each packet, as `CtState` names it."""
        self._node.run(
            ["nft", "-f", "-"],
            stdin="flush set ip watch seen\nflush set ip watch refused\n",
            check=True,
        )
        for number, shot in enumerate(shots, 1):
            self._hosts[shot.reply].send(with_identification(shot.packet, number))
        found: dict[int, str] = {}

        def all_seen() -> bool:
            found.update(self._seen())
            return len(found) == len(shots)

        eventually(all_seen, f"{len(shots)} packets pass the hook")
        return [found[number] for number in range(1, len(shots) + 1)]

    def _seen(self) -> dict[int, str]:
        listed = self._node.run(["nft", "-j", "list", "table", "ip", "watch"], check=True).stdout
        sets = {
            item["set"]["name"]: item["set"].get("elem", [])
            for item in json.loads(listed)["nftables"]
            if "set" in item
        }
        classes = dict.fromkeys(sets["refused"], "INVALID")
        for element in sets["seen"]:
            number, state, direction = element["concat"]
            classes[number] = _CLASSES[state, direction]
        return classes

    def flows(self) -> dict[tuple[str, int], KernelFlow]:
        """Every flow by (protocol, port or ICMP identifier of the client, whoever began)."""
        flows = {}
        for line in self._node.run(["conntrack", "-L"], check=True).stdout.splitlines():
            match = _FLOW.match(line)
            if match is None:
                continue
            port = match["sport"] if match["source"] == CLIENT else match["dport"]
            flows[match["protocol"], int(port or match["id"] or 0)] = KernelFlow(
                match["state"] or "",
                int(match["timeout"]),
                "[UNREPLIED]" not in line,
                "[ASSURED]" in line,
            )
        return flows


def with_identification(packet: bytes, number: int) -> bytes:
    """The IPv4 packet with another identification, and the right header checksum."""
    head = packet[:4] + struct.pack("!H", number) + packet[6:10] + b"\0\0" + packet[12:20]
    head += packet[20 : (packet[0] & 15) * 4]
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + packet[len(head) :]


def now() -> float:
    """The clock that our tracker is given beside the kernel's own."""
    return time.monotonic()
