"""`bartizan doctor`: what this machine can do, what is missing, what that costs, how to mend it.

Every probe does the real thing once, in a network namespace made for it: a rule that loads is worth
more than a kernel option that is said to be set. Nothing outside that namespace is touched.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from firewall.cli.exits import ExitCode
from firewall.cli.output import output_option, show, table

PROBE_TIMEOUT_S = 10.0
"""Loading a rule takes milliseconds; a module load on a busy machine may take seconds."""

_MODULES = "sudo modprobe"
_APT = "sudo apt-get install -y"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One thing to try. `script` runs with `sh -e` in a fresh network namespace."""

    name: str
    script: str
    needed: bool
    cost: str
    mend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What came of a probe: `state` is "ok", "missing" (needed) or "absent" (optional)."""

    name: str
    state: str
    detail: str = ""
    cost: str = ""
    mend: str = ""


_BEHIND_NAT = "L7 rules drop flows whose destination is translated on this node (DNAT, REDIRECT)"

_TOOLS: tuple[tuple[str, str, bool, str], ...] = (
    ("iptables-restore", "iptables", True, "no packet can be steered into the queue"),
    ("ipset", "ipset", True, "managed addresses cannot be told from others in the kernel"),
    ("ip", "iproute2", True, "no routes for redirected packets, no lab"),
    ("unshare", "util-linux", False, "no lab, no demo, no tests"),
    ("curl", "curl", False, "the demo has no ships"),
    ("nft", "nftables", False, _BEHIND_NAT),
    ("conntrack", "conntrack", False, "`conntrack -L` is not there to compare with"),
)

_PROBES: tuple[Probe, ...] = (
    Probe(
        name="NFQUEUE via iptables",
        script="iptables -t mangle -A PREROUTING -j NFQUEUE --queue-balance 0:1\n"
        "ip6tables -t mangle -A PREROUTING -j NFQUEUE --queue-balance 0:1",
        needed=True,
        cost="Bartizan cannot see a packet",
        mend=f"{_MODULES} nfnetlink_queue xt_NFQUEUE",
    ),
    Probe(
        name="TPROXY and NFQUEUE behind NAT",
        script=f"{shlex.quote(sys.executable)} -c 'from firewall.datapath import kernel, ruleset\n"
        "config = ruleset.RulesetConfig(http_proxy_port=1)\n"
        "raise SystemExit(kernel.install_tables(config) or None)'",
        needed=False,
        cost=_BEHIND_NAT,
        mend=f"{_MODULES} nft_compat nft_tproxy nft_socket nft_ct xt_NFQUEUE",
    ),
    Probe(
        name="TPROXY",
        script="iptables -t mangle -A PREROUTING -p tcp -j TPROXY --on-port 1 --tproxy-mark 1\n"
        "ip6tables -t mangle -A PREROUTING -p tcp -j TPROXY --on-port 1 --tproxy-mark 1",
        needed=True,
        cost="no HTTP rules: policies with L7 rules drop what they cover",
        mend=f"{_MODULES} xt_TPROXY nf_tproxy_ipv4 nf_tproxy_ipv6",
    ),
    Probe(
        name="socket match",
        script="iptables -t mangle -A PREROUTING -p tcp -m socket --transparent -j ACCEPT\n"
        "ip6tables -t mangle -A PREROUTING -p tcp -m socket --transparent -j ACCEPT",
        needed=True,
        cost="no HTTP rules: packets of proxied flows do not reach the proxy",
        mend=f"{_MODULES} xt_socket",
    ),
    Probe(
        name="ipset",
        script="ipset create probe4 hash:ip family inet\n"
        "ipset create probe6 hash:ip family inet6\n"
        "ipset create probei hash:net,iface family inet\n"
        "iptables -t mangle -A PREROUTING -m set --match-set probe4 src -j ACCEPT",
        needed=True,
        cost="managed addresses cannot be told from others in the kernel",
        mend=f"{_MODULES} ip_set_hash_ip ip_set_hash_netiface xt_set",
    ),
    Probe(
        name="CONNMARK",
        script="iptables -t mangle -A PREROUTING -m connmark --mark 1 -j CONNMARK --save-mark",
        needed=False,
        cost="no bypass: every packet of every flow goes through userspace",
        mend=f"{_MODULES} xt_connmark",
    ),
    Probe(
        name="conntrack",
        script="iptables -t mangle -A PREROUTING -m conntrack --ctstate INVALID -j DROP\n"
        "test -e /proc/sys/net/netfilter/nf_conntrack_count",
        needed=True,
        cost="fragments arrive unassembled and are dropped",
        mend=f"{_MODULES} nf_conntrack xt_conntrack",
    ),
    Probe(
        name="CT target",
        script="iptables -t raw -A PREROUTING -j CT --notrack\n"
        "ip6tables -t raw -A PREROUTING -j CT --notrack",
        needed=True,
        cost="forged packets confuse the kernel's conntrack about carried flows",
        mend=f"{_MODULES} xt_CT iptable_raw ip6table_raw",
    ),
    Probe(
        name="IPv6",
        script="ip link set lo up\nip -6 addr add 2001:db8::1/128 dev lo",
        needed=False,
        cost="IPv6 is not enforced because it does not exist here",
        mend="sudo sysctl net.ipv6.conf.all.disable_ipv6=0",
    ),
    Probe(
        name="veth",
        script="ip link add probe-a type veth peer name probe-b",
        needed=False,
        cost="no lab, no demo, no tests",
        mend=f"{_MODULES} veth",
    ),
)

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21}
"""Bit numbers from linux/capability.h."""


@click.command()
@output_option
def doctor(output: str) -> None:
    """Probe the kernel and the machine.

    Exits with 3 if something is missing that Bartizan cannot do without.
    """
    findings = examine()
    document = [
        {"name": f.name, "state": f.state, "detail": f.detail, "cost": f.cost, "mend": f.mend}
        for f in findings
    ]
    show(output, document, lambda: _report(findings))
    if any(finding.state == "missing" for finding in findings):
        sys.exit(ExitCode.UNABLE)


def examine() -> list[Finding]:
    """Try everything; the order is that of the report."""
    findings = [_tool(*tool) for tool in _TOOLS]
    enclosure, privilege = _enclosure()
    findings += privilege
    if enclosure is None:
        return findings
    return findings + [_try(probe, enclosure) for probe in _PROBES]


def _tool(command: str, package: str, needed: bool, cost: str) -> Finding:
    path = shutil.which(command)
    if path:
        return Finding(name=command, state="ok", detail=path)
    state = "missing" if needed else "absent"
    return Finding(name=command, state=state, cost=cost, mend=f"{_APT} {package}")


def _enclosure() -> tuple[Sequence[str] | None, list[Finding]]:
    """Find a way to a private network namespace, and say what this user may do."""
    effective = _effective_capabilities()
    missing = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    findings = [
        Finding(
            name="capabilities",
            state="absent" if missing else "ok",
            detail="not held: " + ", ".join(missing) if missing else ", ".join(_CAPABILITIES),
            cost="`bartizan run` works only inside a namespace of your own" if missing else "",
            mend="sudo bartizan run ..." if missing else "",
        )
    ]
    by_user = ("unshare", "-Urn")
    works = _succeeds((*by_user, "true"))
    findings.append(
        Finding(name="user namespaces", state="ok", detail="lab, demo and tests need no root")
        if works
        else Finding(
            name="user namespaces",
            state="absent",
            cost="lab, demo and tests need root",
            mend=_user_namespace_remedy(),
        )
    )
    if not missing and _succeeds(("unshare", "-n", "true")):
        return ("unshare", "-n"), findings
    if works:
        return by_user, findings
    findings.append(
        Finding(
            name="private network namespace",
            state="missing",
            cost="the kernel cannot be probed",
            mend="run as root, or allow user namespaces",
        )
    )
    return None, findings


def _user_namespace_remedy() -> str:
    if shutil.which("unshare") is None:
        return f"{_APT} util-linux"
    restricted = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    if restricted.exists() and restricted.read_text().strip() == "1":
        return "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    if Path("/proc/sys/kernel/unprivileged_userns_clone").exists():
        return "sudo sysctl kernel.unprivileged_userns_clone=1"
    return "sudo sysctl user.max_user_namespaces=15000"


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _try(probe: Probe, enclosure: Sequence[str]) -> Finding:
    # In a user namespace /run belongs to somebody else, and iptables locks a file there.
    environment = {**os.environ, "XTABLES_LOCKFILE": "/dev/null"}
    try:
        done = subprocess.run(
            [*enclosure, "sh", "-ec", probe.script],
            check=False,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            env=environment,
        )
        said = done.stderr.strip().splitlines()
        if done.returncode == 0:
            return Finding(name=probe.name, state="ok")
    except subprocess.TimeoutExpired:
        said = [f"no answer in {PROBE_TIMEOUT_S:g} s"]
    return Finding(
        name=probe.name,
        state="missing" if probe.needed else "absent",
        detail=said[0] if said else "",
        cost=probe.cost,
        mend=probe.mend,
    )


def _succeeds(command: Sequence[str]) -> bool:
    try:
        return (
            subprocess.run(
                command, check=False, capture_output=True, timeout=PROBE_TIMEOUT_S
            ).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def _report(findings: Sequence[Finding]) -> str:
    lines = [table(("PROBE", "STATE", "DETAIL"), [(f.name, f.state, f.detail) for f in findings])]
    lines += [
        f"\n{finding.name}: {finding.cost}\n  mend: {finding.mend}"
        for finding in findings
        if finding.state != "ok"
    ]
    worst = {finding.state for finding in findings}
    if "missing" in worst:
        lines.append("\nBartizan cannot run here until what is missing is mended.")
    elif "absent" in worst:
        lines.append("\nBartizan runs here; what is absent costs what is said above.")
    else:
        lines.append("\nEverything is here.")
    return "\n".join(lines)
