"""The harness: every test gets namespaces of its own, inside an enclosure around all of them.

`make netns-test` shares the tests out to several processes (pytest-xdist), each in an enclosure of
its own; one process does as well: `python -m lab.enclosure -- pytest netns-tests`. What the kernel
or the machine lacks skips the tests that need it, by name; with NETNS_REQUIRED=1 it fails them.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from rules import peers, policy, ports

from lab import daemon, enclosure, topology
from lab.daemon import ApiRefused, Bartizan
from lab.laboratory import Lab, Machine
from lab.namespaces import Namespace
from lab.topology import Topology

_IPTABLES = {
    "nfqueue": ["-j", "NFQUEUE", "--queue-balance", "0:1", "--queue-bypass"],
    "tproxy": ["-p", "tcp", "-j", "TPROXY", "--on-port", "1", "--tproxy-mark", "1/1"],
    "socket": ["-p", "tcp", "-m", "socket", "--transparent", "-j", "MARK", "--set-mark", "1"],
    "connmark": ["-j", "CONNMARK", "--save-mark"],
    "conntrack": ["-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"],
    "set": ["-m", "set", "--match-set", "probe", "src", "-j", "DROP"],
}
"""Feature -> rule of mangle/PREROUTING that the kernel must take."""

_PROGRAMS = {
    "curl": "curl",
    "conntrack-tool": "conntrack",
    "nft": "nft",
    "iperf3": "iperf3",
    "nginx": "nginx",
}

FEATURES = (
    *_IPTABLES,
    *(f"{name}6" for name in _IPTABLES),
    *_PROGRAMS,
    "ipv6",
    "ipset",
    "veth",
    "bridge",
    "migration",
)


def _says(namespace: Namespace, *argv: str) -> str | None:
    """None if the command succeeds in the namespace, else what it said."""
    try:
        done = subprocess.run(
            ["nsenter", f"--net={namespace.path}", "--", *argv],
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit {done.returncode}")


@cache
def lacking(feature: str) -> str | None:
    """Why this machine cannot have `feature`; None if it can. Tried in a namespace of its own."""
    if feature in _PROGRAMS:
        program = _PROGRAMS[feature]
        return None if shutil.which(program) else f"{program} is not installed"
    if feature == "ipv6":
        return None if Path("/proc/sys/net/ipv6").exists() else "the kernel has no IPv6"
    if feature == "migration":
        there = Path("/proc/sys/net/ipv4/tcp_migrate_req").exists()
        return None if there else "the kernel is older than Linux 5.14 (tcp_migrate_req)"
    namespace = Namespace(f"probe-{feature}")
    try:
        if feature == "veth":
            return _says(namespace, "ip", "link", "add", "p0", "type", "veth", "peer", "p1")
        if feature == "bridge":
            seen = "test -e /proc/sys/net/bridge/bridge-nf-call-iptables"
            why = _says(namespace, "sh", "-c", f"ip link add b0 type bridge && {seen}")
            return why and f"{why}: bridges, or CONFIG_BRIDGE_NETFILTER"
        if feature == "ipset":
            return _says(namespace, "ipset", "create", "probe", "hash:net,iface")
        name = feature.removesuffix("6")
        six = feature != name
        if name == "set":
            family = "inet6" if six else "inet"
            why = _says(namespace, "ipset", "create", "probe", "hash:ip", "family", family)
            if why:
                return why
        program = "ip6tables" if six else "iptables"
        return _says(namespace, program, "-t", "mangle", "-A", "PREROUTING", *_IPTABLES[name])
    finally:
        namespace.close()


PROCESSES_PER_CORE = 2
"""Tests wait for packets and for processes to start, more than they compute."""

OPEN = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", "53/UDP")}])

_ENCLOSED = [sys.executable, "-m", "lab.enclosure", "--quiet", "--"]


def _shares_out(config: pytest.Config) -> bool:
    """Whether the tests run in other processes than this one."""
    return bool(config.getoption("tx", None))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return PROCESSES_PER_CORE * len(os.sched_getaffinity(0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    for spec in specs:
        spec.python = shlex.join([*_ENCLOSED, sys.executable])


def pytest_configure(config: pytest.Config) -> None:
    if enclosure.mode() is not None:
        # In the private tmpfs: in a user namespace we are called root, but /tmp/pytest-of-root is
        # not ours, nothing is to be left, and names of unix sockets must be short.
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(enclosure.LAB_RUN)
        config.option.basetemp = None
    config.addinivalue_line(
        "markers", f"needs(*features): what the machine must offer: {', '.join(FEATURES)}"
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    if _shares_out(session.config):
        tried = subprocess.run(
            [*_ENCLOSED, "true"], check=False, stderr=subprocess.PIPE, text=True, timeout=60
        )
        if tried.returncode != 0:
            pytest.exit(tried.stderr.strip(), returncode=enclosure.CANNOT)
    elif enclosure.mode() is None:
        pytest.exit(
            "netns-tests need private namespaces: run `make netns-test` or\n"
            "  python -m lab.enclosure -- python -m pytest netns-tests",
            returncode=enclosure.CANNOT,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, the fuzzers, each in a process of its own."""
    items.sort(key=lambda item: not item.path.stem.endswith("_fuzz"))


def pytest_report_header(config: pytest.Config) -> str:
    if not _shares_out(config):
        return f"enclosure: {enclosure.describe()}"
    how = "root" if os.geteuid() == 0 else "an ordinary user"
    return f"enclosures: one for each worker, made by {how}"


def require(*features: str) -> None:
    """Skip the test that asks, or fail it under NETNS_REQUIRED=1, if a feature is lacking."""
    for feature in features:
        why = lacking(feature)
        if why is None:
            continue
        message = f"this machine lacks {feature}: {why}"
        if os.environ.get("NETNS_REQUIRED") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


@pytest.fixture(autouse=True)
def _machine_offers_what_the_test_needs(request: pytest.FixtureRequest) -> None:
    for mark in request.node.iter_markers("needs"):
        unknown = set(mark.args) - set(FEATURES)
        assert not unknown, f"unknown features: {unknown}"
        require(*mark.args)


Evidence = Callable[[], list[tuple[str, str]]]
_evidence = pytest.StashKey[list[Evidence]]()


def attach(node: pytest.Item | pytest.Collector, source: Evidence) -> None:
    """Have `source` give (title, text) sections for the report if the test, or one of the module's,
    fails.
    """
    node.stash.setdefault(_evidence, []).append(source)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.when in ("setup", "call") and report.failed:
        report.sections.append(("the machine", _machine()))
        for node in item.listchain():
            for source in node.stash.get(_evidence, []):
                try:
                    report.sections += source()
                except Exception as error:  # noqa: BLE001 (must never hide the failure itself)
                    report.sections.append(("evidence lost", repr(error)))


def _machine() -> str:
    """How busy it is, and how many packets its processors had no room for (softnet_stat)."""
    load = Path("/proc/loadavg").read_text(encoding="ascii").split()
    rows = Path("/proc/net/softnet_stat").read_text(encoding="ascii").splitlines()
    lost_count = sum(int(row.split()[1], 16) for row in rows)
    cores = len(os.sched_getaffinity(0))
    return f"load {' '.join(load[:3])} on {cores} cores; {lost_count} packets lost on the way"


def _rules(lab: Lab) -> list[tuple[str, str]]:
    sections = [(f"log of {name}", machine.log()) for name, machine in lab.hosts.items()]
    sections.append(("log of node", lab.node.log()))
    questions = (["iptables-save", "-c"], ["ip6tables-save", "-c"], ["ip", "rule"], ["ip", "route"])
    sections += [(" ".join(argv), lab.node.run(argv).stdout) for argv in questions]
    queues = lab.node.run(["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout
    sections.append(("nfnetlink_queue", queues))
    return [(title, text) for title, text in sections if text.strip()]


MakeLab = Callable[..., Lab]


def _labs(node: pytest.Item | pytest.Collector) -> Iterator[MakeLab]:
    require("veth")
    made: list[Lab] = []

    def make(plan: Topology | None = None, **labels: str) -> Lab:
        fresh = Lab(plan or topology.hosts(**labels))
        made.append(fresh)
        attach(node, lambda: _rules(fresh))
        return fresh

    yield make
    for one in reversed(made):
        one.close()


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> Iterator[MakeLab]:
    """Make a lab: `lab(a="app=a", b="app=b")`, or `lab(topology)`; it ends with the test."""
    yield from _labs(request.node)


@pytest.fixture(scope="module")
def module_lab(request: pytest.FixtureRequest) -> Iterator[MakeLab]:
    """As `lab`; it ends with the module, whose tests share it."""
    yield from _labs(request.node)


def _said(running: Bartizan) -> list[tuple[str, str]]:
    sections = [("bartizan's log", running.log())]
    if running.process is None:
        return [*sections, ("bartizan", "no agent runs")]
    try:
        flows = (json.dumps(flow, separators=(",", ":")) for flow in running.flows(last=20))
        sections.append(("the latest flows", "\n".join(flows)))
    except (OSError, ApiRefused, HTTPException) as error:
        return [*sections, ("the agent does not answer", repr(error))]
    for argv in (["observe", "--last", "40"], ["endpoint", "list"], ["policy", "get"], ["status"]):
        done = running.cli(*argv)
        sections.append((f"bartizan {' '.join(argv)}", done.stdout + done.stderr))
    return sections


StartBartizan = Callable[..., Bartizan]


def _daemons(node: pytest.Item | pytest.Collector) -> StartBartizan:
    require("nfqueue", "nfqueue6", "tproxy", "socket", "connmark", "ipset", "set")

    def start(
        where: Lab,
        config: dict[str, Any] | None = None,
        *,
        endpoints: bool = True,
        machine: Machine | None = None,
    ) -> Bartizan:
        running = daemon.start(where, config, endpoints=endpoints, machine=machine)
        attach(node, lambda: _said(running))
        return running

    return start


@pytest.fixture
def bartizan(request: pytest.FixtureRequest) -> StartBartizan:
    """Start the firewall in a lab's node: `bartizan(lab, {"workers": 1})`, every host managed.

    `endpoints=False` leaves the hosts unmanaged; `machine` runs it elsewhere than in the node. It
    ends with the lab.
    """
    return _daemons(request.node)


@pytest.fixture
def two(lab: MakeLab, bartizan: StartBartizan) -> Any:
    """Two datapath workers; `a` may reach `b` on 80/TCP and 53/UDP. The daemon is `firewall`."""
    made: Any = lab(a="app=a", b="app=b")
    made.firewall = bartizan(made, {"workers": 2})
    made.firewall.apply(OPEN)
    return made


@pytest.fixture(scope="module")
def module_bartizan(request: pytest.FixtureRequest) -> StartBartizan:
    """As `bartizan`, in a lab of the module; a test that shares it begins with `clear()`."""
    return _daemons(request.node)
