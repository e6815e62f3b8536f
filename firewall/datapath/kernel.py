"""Puts the ruleset into the kernel, takes it out again, and reads the queues' counters.

Theory of operation. `ruleset` says what; this module runs `iptables-restore`, `ipset`, `ip` in the
network namespace of the process, in the order in which nothing refers to what is not there yet:
sets, tables, routes, rules; and backwards on removal. Every step may be repeated: it reads what is
there first and changes the difference. All functions block for some ten milliseconds per command;
the agent calls them from a thread.

Generations. `set_generation` is how a permission that was taken away reaches the flows that the
kernel carries: one transaction per family, both at once. Numbers of generations repeat; therefore
every connmark with the new number is cleared before it comes into force. Between the two no such
mark can be made, since only that of the present generation is ever saved.
"""

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from firewall.datapath import guard, nftables, ruleset, sets, translated
from firewall.datapath.kernel_flows import clear_marks
from firewall.datapath.marks import Kind, MaskedMark
from firewall.datapath.ruleset import RulesetConfig
from firewall.datapath.sets import NO_SETS, EndpointLink, Family, SetState

_TIMEOUT_S = 30.0
_LOCK_WAIT_S = 5  # of the xtables lock, which the legacy backend takes
_ACCOUNTING = Path("/proc/sys/net/netfilter/nf_conntrack_acct")
_QUEUES = Path("/proc/self/net/netfilter/nfnetlink_queue")
_BRIDGES = tuple(
    Path("/proc/sys/net/bridge") / f"bridge-nf-call-{family}"
    for family in ("iptables", "ip6tables")
)
_SEARCH_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"

_NFT = ["nft", "-f", "-"]
_IPTABLES = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}


class KernelError(Exception):
    """A command failed.

    Attributes:
        command: what was run, as one would type it.
        reason: what it said, or why it could not be run.
        remedy: what would mend it, or "".
    """

    def __init__(self, command: str, reason: str, remedy: str = "") -> None:
        text = f"{command}: {reason}"
        super().__init__(f"{text} ({remedy})" if remedy else text)
        self.command = command
        self.reason = reason
        self.remedy = remedy


class QueueCounters(NamedTuple):
    """One line of /proc/net/netfilter/nfnetlink_queue (nfnetlink_queue.c, seq_show).

    Attributes:
        queue: its number.
        depth: packets that wait for a verdict now.
        kernel_dropped: packets dropped because the queue was full.
        user_dropped: packets dropped because the netlink socket's buffer was full.
        packet_count: packets queued since the queue was bound (the kernel counts modulo 2**32).
        reader: netlink port of the socket that reads it, mostly the number of its process.
    """

    queue: int
    depth: int
    kernel_dropped: int
    user_dropped: int
    packet_count: int
    reader: int


def install(config: RulesetConfig, *, keep_generation: bool = False) -> str:
    """Install the rules, or bring those of an earlier run up to date, in both families.

    Returns:
        Why L7 rules cannot hold where a destination is translated (`translated`); "" = they do.

    Args:
        config: what to install.
        keep_generation: the flows that the kernel carries go on being carried; only where rules of
            an earlier run are there.

    Raises:
        KernelError: a command failed; what came before it stays (call `remove` or repeat).
    """
    state = _read_sets()
    _ipset_restore(sets.create_sets_text(state))
    lacking = install_tables(config, state)
    for family in _families():
        _install_routing(config, family)
        text = ruleset.install_text(
            config,
            family,
            _save(family),
            keep_generation=keep_generation,
            settles=not lacking,
        )
        _restore(family, text)
        _restore(family, guard.install_text(family, _save(family, "raw")))
    return lacking


def set_generation(config: RulesetConfig, *, fresh: bool = False) -> None:
    """Have exactly the flows bypass userspace that are marked in `config.generation` from now on.

    None: no flow. `install` must have run.

    Args:
        config: the rules with their new generation.
        fresh: trust no connmark, whatever its generation: it is not known where it comes from.

    Raises:
        KernelError: a command failed; a family may have the old generation still.
    """
    marks = config.marks
    if fresh:
        # While they are cleared none may be saved: an earlier agent's generation may be in force.
        _restore_generation(replace(config, generation=None))
        _clear(config, marks.any_of(Kind.OFFLOAD))
    elif config.generation is not None:
        _clear(config, marks.of(Kind.OFFLOAD, config.generation))
    if config.generation is not None:
        _count_bytes()
    _restore_generation(config)


def update_endpoints(links: Iterable[EndpointLink]) -> None:
    """Make the sets name exactly these endpoints; `install` must have run.

    Raises:
        KernelError: ipset failed, or packets within a bridge cannot be seen.
        sets.RulesetError: an endpoint cannot be expressed.
    """
    listed = tuple(links)
    if any(link.bridge for link in listed):
        _see_bridged()
    _ipset_restore(sets.update_sets_text(_read_sets(), listed))
    families = [family for family in _families() if _has_table(family)]
    if families:
        texts = [translated.set_text(each, sets.managed(listed, each)) for each in families]
        _run(_NFT, "".join(texts))


def remove(config: RulesetConfig) -> None:
    """Take away chains, jumps, routing rules and sets. What is not there is no error.

    The tables of nftables stay, and do nothing without the rest: see `remove_tables`.
    `config` tells which routing table and priorities are ours.

    Raises:
        KernelError: a command failed.
    """
    for family in _families():
        for text in (
            guard.remove_text(_save(family, "raw")),
            ruleset.remove_text(_save(family)),
        ):
            if text:
                _restore(family, text)
        for arguments in _routing_differences(config, family, present=True):
            _ip(family, arguments)
        if _ip(family, ["route", "show", "table", str(config.route_table)], quiet=True):
            _ip(family, ["route", "flush", "table", str(config.route_table)])
    _ipset_restore(sets.remove_sets_text(_read_sets()))
    _clear(config, config.marks.any_of(Kind.OFFLOAD))


def remove_tables() -> None:
    """Take away our tables of nftables; packets that wait in any queue of the namespace are lost.

    Raises:
        KernelError: they cannot be removed.
    """
    with _netlink("delete tables"):
        nftables.remove(_families())


def first_queue() -> int | None:
    """Return the number of the first queue that our rules feed; None = none are installed.

    Raises:
        KernelError: the rules cannot be read.
    """
    return ruleset.first_queue(_save(Family.IPV4))


def is_installed() -> bool:
    """Say whether the jumps of both families stand at the front, and what they rely on is there.

    Raises:
        KernelError: the rules cannot be read.
    """
    return all(
        ruleset.jumps_installed(saved)
        and (not ruleset.settles(saved) or _has_table(family))
        and guard.is_installed(_save(family, "raw"))
        for family in _families()
        for saved in (_save(family),)
    )


def read_queues(path: Path = _QUEUES) -> tuple[QueueCounters, ...]:
    """Return the counters of every bound queue of this network namespace, by number.

    Raises:
        KernelError: the kernel was built without NFQUEUE, or does not let us read.
    """
    try:
        text = path.read_text("ascii")
    except OSError as error:
        raise KernelError(
            f"read {path}",
            error.strerror or str(error),
            "the kernel needs CONFIG_NETFILTER_NETLINK_QUEUE: modprobe nfnetlink_queue",
        ) from error
    rows = [[int(field) for field in line.split()] for line in text.splitlines()]
    # queue, port id, depth, copy mode, copy range, dropped, dropped by the socket, last id, 1
    order = (0, 2, 5, 6, 7, 1)
    return tuple(sorted(QueueCounters(*(row[index] for index in order)) for row in rows))


def _see_bridged() -> None:
    """Have bridges show iptables what they switch from port to port.

    Raises:
        KernelError: this kernel cannot, or does not let us.
    """
    for switch in _BRIDGES:
        if not switch.parent.is_dir():
            remedy = "the kernel needs CONFIG_BRIDGE_NETFILTER: modprobe br_netfilter"
            raise KernelError(f"write {switch}", "an endpoint is behind a bridge", remedy)
        try:
            if switch.read_text("ascii").strip() != "1":
                switch.write_text("1", "ascii")
        except OSError as error:
            raise KernelError(
                f"write {switch}",
                error.strerror or str(error),
                f"sysctl -w {switch.name}=1 as root",
            ) from error


def _restore_generation(config: RulesetConfig) -> None:
    """Replace the chains that know the generation, in both families at once."""
    families = _families()
    with ThreadPoolExecutor(len(families)) as pool:
        texts = [ruleset.generation_text(config, family) for family in families]
        for _ in pool.map(_restore, families, texts):
            pass  # the first error is raised here


def _clear(config: RulesetConfig, mark: MaskedMark) -> None:
    """Take a mark of ours out of every connmark."""
    try:
        clear_marks(mark, config.marks.mask)
    except OSError as error:
        raise KernelError(
            f"clear connmarks {mark}", error.strerror or str(error), "run as root"
        ) from error


def _count_bytes() -> None:
    """Have the kernel count packets and bytes of its flows; without it, those we see are shown."""
    with contextlib.suppress(OSError):
        _ACCOUNTING.write_text("1", "ascii")


# --- tables of nftables -----------------------------------------------------------------------


def install_tables(config: RulesetConfig, state: SetState = NO_SETS) -> str:
    """Make the tables behind nat what they shall be; return why that cannot be, "" = it is done.

    Args:
        config: the rules.
        state: the sets as they are; the addresses in them are managed.
    """
    families = _families()
    try:
        with _netlink("make tables"):
            nftables.make_asking(config, families)
        elements = [state.elements.get(sets.managed_set(family), set()) for family in families]
        texts = map(translated.table_text, itertools.repeat(config), families, elements)
        _run(_NFT, "".join(texts))
    except KernelError as error:
        with contextlib.suppress(KernelError):
            if not any(map(_has_table, families)):
                remove_tables()
        return str(error)
    return ""


def _has_table(family: Family) -> bool:
    """Say whether a family has its table behind nat.

    Raises:
        KernelError: that cannot be found out.
    """
    with _netlink("read tables"):
        return nftables.is_made(family)


@contextlib.contextmanager
def _netlink(what: str) -> Iterator[None]:
    """Have an error of netlink be one of ours."""
    try:
        yield
    except OSError as error:
        remedy = "the kernel needs CONFIG_NFT_COMPAT: modprobe nft_compat"
        raise KernelError(f"nftables: {what}", error.strerror or str(error), remedy) from error


# --- commands ---------------------------------------------------------------------------------


def _families() -> tuple[Family, ...]:
    """Return the families that the kernel has: IPv6 may be compiled out or disabled at boot."""
    if Path("/proc/sys/net/ipv6").is_dir():
        return (Family.IPV4, Family.IPV6)
    return (Family.IPV4,)


def _save(family: Family, table: str = "mangle") -> str:
    return _run([f"{_IPTABLES[family]}-save", "-t", table])


def _restore(family: Family, text: str) -> None:
    command = [f"{_IPTABLES[family]}-restore", "--noflush", "--wait", str(_LOCK_WAIT_S)]
    _run(command, text)


def _read_sets() -> sets.SetState:
    """Read our sets. Other people's are not read if there are any: they may be very large."""
    names = _run(["ipset", "list", "-name"]).split()
    ours = [name for name in names if name.startswith(sets.SET_PREFIX)]
    if len(ours) == len(names):
        return sets.read_sets(_run(["ipset", "save"]))
    return sets.read_sets("".join(_run(["ipset", "save", name]) for name in ours))


def _ipset_restore(text: str) -> None:
    if text:
        # -exist: two agents that add the same element must not fail over it.
        _run(["ipset", "-exist", "restore"], text)


def _install_routing(config: RulesetConfig, family: Family) -> None:
    _ip(family, ruleset.local_route(config))
    for arguments in _routing_differences(config, family, present=False):
        _ip(family, arguments)


def _routing_differences(
    config: RulesetConfig, family: Family, *, present: bool
) -> list[list[str]]:
    """Return `ip` arguments: to add the rules that are missing, or to delete those present."""
    listed = [_rule_words(line) for line in _ip(family, ["rule", "show"]).splitlines()]
    verb = "del" if present else "add"
    differences: list[list[str]] = []
    for rule in ruleset.routing_rules(config):
        copies = listed.count((rule.priority, rule.mark, str(rule.table)))
        if present:
            differences += [rule.arguments(verb)] * copies
        elif not copies:
            differences.append(rule.arguments(verb))
    return differences


def _rule_words(line: str) -> tuple[int, str, str]:
    """Read `17953: from all fwmark 0x2000000/0xff000000 lookup 17953` into its three parts."""
    priority, _, rest = line.partition(":")
    words = rest.split()
    pairs = dict(itertools.pairwise(words))
    return int(priority), pairs.get("fwmark", ""), pairs.get("lookup", "")


def _ip(family: Family, arguments: Sequence[str], *, quiet: bool = False) -> str:
    """Run `ip`; `quiet`: an error counts as no output (a table that was never used)."""
    try:
        return _run(["ip", f"-{family:d}", *arguments])
    except KernelError:
        if quiet:
            return ""
        raise


def _run(command: Sequence[str], text: str = "") -> str:
    """Run a command with `text` on its standard input and return its output.

    Raises:
        KernelError: it is missing, hangs, or exits with another status than 0.
    """
    shown = " ".join(command)
    environment = os.environ | {"LC_ALL": "C"}
    environment["PATH"] = f"{environment.get('PATH', '')}:{_SEARCH_PATH}"
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            env=environment,
        )
    except FileNotFoundError as error:
        raise KernelError(shown, "command not found", _install_hint(command[0])) from error
    except PermissionError as error:
        raise KernelError(shown, "permission denied", "run as root") from error
    except OSError as error:  # no descriptors, no memory, no program
        raise KernelError(shown, error.strerror or str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(shown, f"no answer within {_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        said = " / ".join((done.stderr or done.stdout).split("\n")).strip(" /")
        reason = said or f"exit status {done.returncode}"
        raise KernelError(shown, _with_line(reason, text), _remedy(command[0], reason))
    return done.stdout


def _install_hint(program: str) -> str:
    package = {"ip": "iproute2", "ipset": "ipset", "nft": "nftables"}.get(program, "iptables")
    return f"install the package {package}"


def _with_line(reason: str, text: str) -> str:
    """Add the line of the input that a restore command complains about."""
    _, found, tail = reason.partition("line ")
    number = tail.split(" ")[0].rstrip(":,.)") if found else ""
    lines = text.splitlines()
    if number.isdigit() and 0 < int(number) <= len(lines):
        return f"{reason} [line {number}: {lines[int(number) - 1]}]"
    return reason


_REMEDIES = (
    ("permitted", "run as root, or with CAP_NET_ADMIN and CAP_NET_RAW"),
    ("must be root", "run as root, or with CAP_NET_ADMIN and CAP_NET_RAW"),
    ("permission denied", "run as root, or with CAP_NET_ADMIN and CAP_NET_RAW"),
    ("nfqueue", "the kernel needs CONFIG_NETFILTER_XT_TARGET_NFQUEUE: modprobe xt_NFQUEUE"),
    ("tproxy", "the kernel needs CONFIG_NETFILTER_XT_TARGET_TPROXY: modprobe xt_TPROXY"),
    ("socket", "the kernel needs CONFIG_NETFILTER_XT_MATCH_SOCKET: modprobe xt_socket"),
    ("notrack", "the kernel needs CONFIG_NETFILTER_XT_TARGET_CT: modprobe xt_CT"),
    ("connmark", "the kernel needs CONFIG_NETFILTER_XT_CONNMARK: modprobe xt_connmark"),
    ("match-set", "the kernel needs CONFIG_NETFILTER_XT_SET: modprobe xt_set"),
    ("kernel error received: invalid argument", "the kernel needs the set type: modprobe ip_set"),
    ("extension", "the kernel lacks a match or target: see `bartizan doctor`"),
    ("no such file", "the kernel lacks a match or target: see `bartizan doctor`"),
)


def _remedy(program: str, reason: str) -> str:
    """Return what would mend a failure, as far as its text tells."""
    lowered = reason.lower()
    for needle, remedy in _REMEDIES:
        if needle in lowered:
            return remedy
    return "" if program != "ipset" else "the kernel needs CONFIG_IP_SET: modprobe ip_set"
