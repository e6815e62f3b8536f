"""A world for tests of the policy language: one lab and one daemon for all cases of a module.

The node is an endpoint here (`host_firewall: on`); `near` and `far` are other nodes by label, `w`
is the world. Every answer is read from the flow record of the very packet that was sent.
"""

import os
import signal

import pytest
import yaml
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Raw
from traffic import V4, V6, eventually, ip, udp

from lab.topology import HostPlan, NamedPort, Topology, assigned

NAMED = (
    NamedPort(name="web", port=80),
    NamedPort(name="mgmt", port=7000, protocol="SCTP"),
)
HOSTS = (
    HostPlan(name="a", labels={"app": "a"}, ports=(NamedPort(name="web", port=8080),)),
    HostPlan(name="b", labels={"app": "b"}, ports=NAMED),
    HostPlan(name="c", labels={"app": "c"}),
    HostPlan(name="near", managed=False),
    HostPlan(name="far", managed=False),
    HostPlan(name="w", managed=False),
)
NODE4 = "10.0.0.1"
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132, "icmpv4": 1, "icmpv6": 58}


class World:
    """The lab with its daemon, and words for what the tests do."""

    def __init__(self, make_lab, start_bartizan):
        self.lab = make_lab(assigned(Topology(name="language", hosts=HOSTS)))
        self.config = {
            "workers": 2,
            "host_firewall": True,
            "node_labels": ["role=edge"],
            "nodes": [self.node("near", "zone=b"), self.node("far", "zone=c")],
            "policy": {"extended_protocols": True},
        }
        self.firewall = start_bartizan(self.lab, self.config)

    def node(self, name, *labels):
        return {
            "name": name,
            "addresses": list(self.host(name).addresses),
            "labels": list(labels),
        }

    def host(self, name):
        return self.lab.node if name == "node" else self.lab.host(name)

    def clear(self):
        """No policies, defaults."""
        self.configure()
        self.firewall.request("DELETE", "/v1/policy", None, {"all": "1", "wait": 10})

    def configure(self, *, host_audit=False, **policy):
        """Set live settings (of `policy`, and `host_audit`) as an operator does: file, SIGHUP."""
        document = yaml.safe_load(self.firewall.config_path.read_text())
        wanted = {"policy": {"extended_protocols": True, **policy}, "host_audit": host_audit}
        if {name: document.get(name, False) for name in wanted} == wanted:
            return
        document |= wanted
        before = self.firewall.get("/v1/status")["revision"]
        self.firewall.config_path.write_text(yaml.safe_dump(document))
        os.kill(self.firewall.process.pid, signal.SIGHUP)

        def enforced():
            status = self.firewall.get("/v1/status")
            revisions = {worker["revision"] for worker in status["workers"]}
            return status["revision"] > before and revisions == {status["revision"]}

        eventually(enforced, "the settings are enforced")

    def config_without_host_firewall(self):
        """The configuration as it is, but for the node."""
        document = yaml.safe_load(self.firewall.config_path.read_text())
        return {**document, "host_firewall": False}

    def apply(self, *specs, kind="CiliumNetworkPolicy"):
        """Apply a policy of `specs` (YAML text of one rule each)."""
        document = {
            "apiVersion": "cilium.io/v2",
            "kind": kind,
            "metadata": {"name": "rule"},
            "specs": [yaml.safe_load(spec) for spec in specs],
        }
        if kind == "CiliumNetworkPolicy":
            document["metadata"]["namespace"] = "default"
        return self.firewall.apply(yaml.safe_dump(document))

    def host_policy(self, *specs):
        """Apply rules to the node itself."""
        return self.apply(*specs, kind="CiliumClusterwideNetworkPolicy")

    def verdict(self, sender, packet):
        """Send a packet; return the flow record of it alone."""
        known = {flow["uuid"] for flow in self.firewall.flows()}
        if sender == "node":
            self.emit(packet)
        else:
            self.host(sender).send(bytes(packet))
        return self.record(packet, known)

    def emit(self, packet):
        """Send a packet as the node's own: routed by its kernel, through OUTPUT."""
        family = V4 if IP in packet else V6
        with self.lab.node.open_socket(family, 3, 255) as raw:  # SOCK_RAW, IPPROTO_RAW
            raw.sendto(bytes(packet), (packet.dst, 0))

    def record(self, packet, known=frozenset()):
        """Wait for the record of a packet that is not among those known before."""
        return eventually(
            lambda: next(
                (
                    flow
                    for flow in self.firewall.flows()
                    if flow["uuid"] not in known and is_about(flow, packet)
                ),
                None,
            ),
            f"a record of {packet.summary()}",
        )

    def says(self, sender, packet):
        """`FORWARDED`, `DROPPED`, `AUDIT`, `REDIRECTED`."""
        return self.verdict(sender, packet)["verdict"]


def is_about(flow, packet):
    """Whether a record has a packet's addresses and ports, or ICMP type."""
    addresses = flow.get("IP", {})
    if (addresses.get("source"), addresses.get("destination")) != (packet.src, packet.dst):
        return False
    layer4 = {name.lower(): found for name, found in flow.get("l4", {}).items()}
    if ICMP in packet and isinstance(packet.payload, ICMP):
        return "icmpv4" in layer4 and layer4["icmpv4"].get("type", 0) == packet[ICMP].type
    for layer, name in ((TCP, "tcp"), (UDP, "udp"), (SCTP, "sctp")):
        if layer in packet:
            found = layer4.get(name, {})
            ends = found.get("source_port"), found.get("destination_port")
            return ends == (packet[layer].sport, packet[layer].dport)
    if IPv6 in packet and packet.nh == PROTOCOLS["icmpv6"]:
        return "icmpv6" in layer4 and layer4["icmpv6"].get("type", 0) == packet.payload.type
    return not layer4


def sctp(source, destination, port, family=V4):
    """The first packet of an SCTP association."""
    base = udp(source, destination, port, b"x", family=family)
    chunk = SCTPChunkInit(init_tag=7, a_rwnd=65_536, n_out_streams=1, n_in_streams=1)
    return ip(source, destination, family) / SCTP(sport=base.sport, dport=port, tag=0) / chunk


def bare(source, destination, protocol, payload=b"\0" * 20):
    """An IPv4 packet of a protocol without ports."""
    return ip(source, destination, proto=protocol) / Raw(payload)


def listens(host, address, port):
    try:
        host.connect(address, port, timeout_s=0.2).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def running(module_lab, module_bartizan):
    return World(module_lab, module_bartizan)


@pytest.fixture
def world(running):
    running.clear()
    return running
