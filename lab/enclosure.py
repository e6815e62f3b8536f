"""A private world for one command: its own network, mounts, processes and IPC; nothing survives.

    python -m lab.enclosure [--user] -- COMMAND [ARGUMENT...]

Root makes the namespaces directly; an ordinary user makes a user namespace first and is root only
in there. Inside, /run is an empty tmpfs (so the names of `ip netns` and /run/xtables.lock are
private), /proc and /sys show the private world, and labs may rewrite /etc/hosts and
/etc/resolv.conf.

Three processes, so that an end is always an end:

    starter -> outer -> init (pid 1 inside) -> COMMAND

The kernel kills `outer` when its starter dies, `init` when `outer` dies, and every process
inside when `init` ends, also after kill -9 of any of them. The namespaces go with their last
process.
The exit code is the command's; 128 + signal number if a signal ended it; 3 if no enclosure can
be made here, with the command that would allow it.

Sources: namespaces(7), user_namespaces(7), pid_namespaces(7), prctl(2).
"""

import argparse
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from lab import namespaces
from lab.namespaces import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC

CANNOT = 3
"""Exit code: the environment does not allow an enclosure."""

LAB_RUN = Path("/run/bartizan-lab")
"""Inside an enclosure: the folder of everything that labs write."""

HOSTS = LAB_RUN / "hosts"
"""What /etc/hosts shows inside."""

RESOLV = LAB_RUN / "resolv.conf"
"""What /etc/resolv.conf shows inside."""

_MARKER = LAB_RUN / "enclosure.json"


class EnclosureError(Exception):
    """This machine or user cannot have an enclosure; the text says why and what would help."""


def mode() -> str | None:
    """How the enclosure that we are in was made: "root", "user", or None outside of any."""
    try:
        marker: dict[str, str] = json.loads(_MARKER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return marker["mode"]


def describe() -> str:
    """One sentence for people about the enclosure that we are in."""
    match mode():
        case None:
            return "outside of any enclosure"
        case "root":
            return "in private namespaces made by root"
        case _:
            return "in private namespaces made by an ordinary user (user namespace, no privilege)"


def search_path() -> str:
    """PATH as it is inside: Debian keeps ip(8) and iptables(8) out of an ordinary user's."""
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None


def why_not(error: OSError) -> str:
    """Explain a refused namespace or mount, with the command that would allow it."""
    reason = f"cannot make private namespaces: {error}"
    if _read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            f"{reason}\nAppArmor restricts user namespaces here (default since Ubuntu 23.10). "
            "Run as root, or allow them:\n"
            "  sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        )
    if _read("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        return (
            f"{reason}\nThis kernel keeps user namespaces for root. Run as root, or allow them:\n"
            "  sudo sysctl -w kernel.unprivileged_userns_clone=1"
        )
    if _read("/proc/sys/user/max_user_namespaces") == "0":
        return (
            f"{reason}\nUser namespaces are switched off. Run as root, or allow some:\n"
            "  sudo sysctl -w user.max_user_namespaces=1000"
        )
    return (
        f"{reason}\nA container needs more rights for this, e.g. `docker run --privileged`; "
        "a plain machine needs root or user namespaces (`unshare -Urnm true` must work)."
    )


def _become_root_of_user_namespace() -> None:
    user, group = os.geteuid(), os.getegid()
    namespaces.unshare(namespaces.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")


def _furnish(how: str) -> None:
    """Mount what the private world needs; called by its pid 1."""
    hardened = MS_NOSUID | MS_NODEV | MS_NOEXEC
    namespaces.mount("proc", Path("/proc"), "proc", hardened)
    # A container may refuse a new sysfs; only /sys/class/net would then show the wrong world.
    with suppress(OSError):
        namespaces.mount("sysfs", Path("/sys"), "sysfs", hardened)
    namespaces.mount("tmpfs", Path("/run"), "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for folder in (namespaces.NAMED, LAB_RUN, Path("/run/lock")):
        folder.mkdir(parents=True, exist_ok=True)
    hosts = _read("/etc/hosts") or "127.0.0.1 localhost\n::1 localhost"
    HOSTS.write_text(hosts + "\n", encoding="utf-8")
    RESOLV.write_text((_read("/etc/resolv.conf") or "") + "\n", encoding="utf-8")
    # A machine without these files has no name resolution to cover.
    for ours, path in ((HOSTS, "/etc/hosts"), (RESOLV, "/etc/resolv.conf")):
        with suppress(OSError):
            namespaces.mount(str(ours), Path(path), "", MS_BIND)
    _MARKER.write_text(json.dumps({"mode": how}), encoding="utf-8")


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _wait_for(child: int) -> int:
    """Reap whatever ends, as pid 1 must, until `child` does; its exit code."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return _exit_code(status)


def _forward_signals(child: int) -> None:
    """Pass on what is meant for the command; a terminal's ^C reaches the command by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: os.kill(child, received))


def _execute(command: list[str]) -> NoReturn:
    # Python ignores SIGPIPE, and an ignored signal stays ignored across exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 (an argument list, no shell)
    except OSError as error:
        print(f"enclosure: {command[0]}: {error.strerror}", file=sys.stderr)
    os._exit(127 if not os.path.lexists(command[0]) else 126)


def _init(command: list[str], how: str, gate: int) -> NoReturn:
    """Be pid 1 of the private world: furnish it, start the command, reap, end with it."""
    namespaces.die_with_parent()
    # The byte says that our parent lived after we had asked to die with it.
    if os.read(gate, 1) == b"":
        os._exit(CANNOT)
    os.close(gate)
    try:
        _furnish(how)
        namespaces.raise_loopback()
    except OSError as error:
        print(f"enclosure: {why_not(error)}", file=sys.stderr)
        os._exit(CANNOT)
    child = os.fork()
    if child == 0:
        _execute(command)
    _forward_signals(child)
    os._exit(_wait_for(child))


def enter(command: list[str], *, user: bool) -> int:
    """Run `command` in an enclosure and wait for it; `user`: by a user namespace.

    Must be called by a process with one thread. Afterwards the caller itself is in the private
    world, so all that is left to do is to exit.

    Returns:
        The command's exit code.

    Raises:
        EnclosureError: namespaces are not allowed here.
    """
    starter = os.getppid()
    os.environ["PATH"] = search_path()
    try:
        if user:
            _become_root_of_user_namespace()
        namespaces.unshare(
            namespaces.CLONE_NEWNS
            | namespaces.CLONE_NEWNET
            | namespaces.CLONE_NEWPID
            | namespaces.CLONE_NEWIPC
        )
        namespaces.mount("none", Path("/"), "", MS_REC | MS_PRIVATE)
    except OSError as error:
        raise EnclosureError(why_not(error)) from error
    namespaces.die_with_parent()
    if os.getppid() != starter:
        return CANNOT
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        _init(command, "user" if user else "root", reader)
    _forward_signals(child)
    os.close(reader)
    os.write(writer, b"!")
    os.close(writer)
    return _wait_for(child)


def main(arguments: list[str] | None = None) -> int:
    """Command line: see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m lab.enclosure", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--user", action="store_true", help="use a user namespace even as root")
    parser.add_argument("--quiet", action="store_true", help="do not say how it was made")
    parser.add_argument("command", nargs="+", help="what to run inside, after --")
    chosen = parser.parse_args(arguments)
    user = chosen.user or os.geteuid() != 0
    if not chosen.quiet:
        how = "a user namespace" if user else "root"
        print(f"enclosure: private namespaces through {how}", file=sys.stderr)
    try:
        return enter(chosen.command, user=user)
    except EnclosureError as error:
        print(f"enclosure: {error}", file=sys.stderr)
        return CANNOT


if __name__ == "__main__":
    sys.exit(main())
