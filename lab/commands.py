"""`bartizan lab up | exec | list`: labs as people use them, from several terminals.

A lab that is up leaves a note with its process id in a folder of its user, outside of the
enclosure; `exec` finds it there and joins the lab's namespaces with nsenter(1). A note whose
process has gone is taken away by whoever finds it.
"""

import argparse
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import daemon, enclosure, topology
from lab.laboratory import Lab, LabError
from lab.namespaces import NAMED

FAILED, USAGE, INVALID = 1, 2, 4
"""Exit codes, as everywhere in bartizan; `enclosure.CANNOT` is 3."""

_STAT_PARENT, _STAT_START = 1, 19
"""Fields of /proc/PID/stat after the command's name: ppid, start time in ticks (proc(5))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What one terminal must know about another's lab.

    `pid` is the enclosure's outer process, in the pid namespace with the inode `world`; `started`
    (ticks since boot) tells it from a later process of the same number.
    """

    name: str
    file: str
    pid: int
    started: int
    world: int
    hosts: list[str]


def up(file: Path, command: Sequence[str] = (), *, firewall: bool = False) -> int:
    """Make the lab of a file and run a shell, or `command`, in its node; its exit code.

    `firewall`: also run bartizan there, with every managed host as an endpoint.
    """
    try:
        plan = topology.read(file)
    except topology.TopologyError as error:
        print(error, file=sys.stderr)
        return INVALID
    except OSError as error:
        print(f"{file}: {error.strerror}", file=sys.stderr)
        return USAGE
    running = {note.name for note in _notes()}
    if plan.name in running:
        print(f"a lab named {plan.name} is up already", file=sys.stderr)
        return FAILED
    # A descriptor, not the path: what is below /run here is not there inside.
    content = os.memfd_create("lab")
    os.write(content, file.read_bytes())
    inside = [sys.executable, "-m", "lab.commands", str(file), "--descriptor", str(content)]
    inside += ["--firewall"] * firewall + ["--", *command]
    child = subprocess.Popen(
        [sys.executable, "-m", "lab.enclosure", "--", *inside],
        env=python_environment(),
        pass_fds=(content,),
    )
    os.close(content)
    # A handler, not SIG_IGN, which the shell would inherit: ^C is for what runs inside.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    path = _folder() / f"{plan.name}.json"
    note = Note(
        name=plan.name,
        file=str(file),
        pid=child.pid,
        started=_stat(child.pid)[_STAT_START],
        world=_pid_namespace(),
        hosts=[host.name for host in plan.hosts],
    )
    path.write_text(json.dumps(asdict(note)), encoding="utf-8")
    try:
        code = child.wait()
    finally:
        path.unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


def exec_(host: str, argv: Sequence[str], *, lab: str | None = None) -> int:
    """Run a command on a host of a lab that is up (`node` is a host too); its exit code.

    `lab` None = the only one that is up, or the one that we are in.
    """
    join = ["nsenter", f"--net={NAMED / host}", "--", *argv]
    notes = [note for note in _notes() if lab in (None, note.name)]
    if not notes and enclosure.mode() is not None:
        if not (NAMED / host).exists():
            known = sorted(path.name for path in NAMED.iterdir())
            return _say(f"no host {host!r} here: {', '.join(known)}")
        return subprocess.run(join, check=False, env=_environment()).returncode
    if not notes:
        return _say("no lab is up" if lab is None else f"no lab {lab!r} is up")
    if len(notes) > 1:
        names = ", ".join(note.name for note in notes)
        return _say(f"several labs are up, say which: {names}", USAGE)
    note = notes[0]
    if host not in (*note.hosts, "node"):
        return _say(f"no host {host!r} in lab {note.name}: node, {', '.join(note.hosts)}")
    inside = _init_of(note.pid)
    if inside is None:
        return _say(f"lab {note.name} is just starting or ending")
    user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
    enter = ["nsenter", "--target", str(inside), *user, "--mount", "--net", "--pid", "--ipc"]
    # --wd puts us where we were; the mount namespace alone would put us at the root.
    argv = [*enter, f"--wd={Path.cwd()}", "--", *join]
    return subprocess.run(argv, check=False, env=_environment()).returncode


def list_() -> int:
    """Print the labs that are up, one a line: name, process, hosts, file."""
    rows = [("LAB", "PID", "HOSTS", "FILE")]
    rows += [(note.name, str(note.pid), ",".join(note.hosts), note.file) for note in _notes()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("   ".join([*cells, row[3]]))
    return 0


def _say(message: str, code: int = FAILED) -> int:
    print(message, file=sys.stderr)
    return code


# --- notes ------------------------------------------------------------------------------------


def _folder() -> Path:
    """The user's own folder for notes; raises PermissionError if it is somebody else's."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        folder = Path(base, "bartizan-labs")
    elif os.geteuid() == 0:
        folder = Path("/run/bartizan-labs")
    else:
        folder = Path(tempfile.gettempdir(), f"bartizan-labs-{os.geteuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{folder} is not ours")
    return folder


def _notes() -> list[Note]:
    """The labs that are up."""
    found = []
    for path in sorted(_folder().glob("*.json")):
        with suppress(OSError, ValueError, TypeError):
            note = Note(**json.loads(path.read_text(encoding="utf-8")))
            if note.world != _pid_namespace():
                continue  # seen through a shared folder; its pids mean nothing here
            if _stat(note.pid)[_STAT_START] == note.started:
                found.append(note)
                continue
        path.unlink(missing_ok=True)
    return found


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _stat(pid: int) -> list[int]:
    """Numbers of /proc/PID/stat after the state; raises OSError if there is no such process."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    # The command's name is in brackets and may hold anything; the last bracket ends it.
    fields = text.rpartition(")")[2].split()
    return [0, *map(int, fields[1:])]


def _init_of(outer: int) -> int | None:
    """The pid, as seen from here, of the init whose parent is `outer`; None if there is none."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, IndexError):
                if _stat(int(entry.name))[_STAT_PARENT] == outer:
                    return int(entry.name)
    return None


def python_environment() -> dict[str, str]:
    """Ours, with this very installation first in Python's path."""
    root = str(Path(__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}:{inherited}" if inherited else root}


def _environment() -> dict[str, str]:
    """Our environment; `bartizan` is found in it, also where its virtual environment is not on."""
    path = os.environ.get("PATH", os.defpath)
    return {**os.environ, "PATH": f"{path}:{Path(sys.executable).parent}"}


# --- inside -----------------------------------------------------------------------------------


def _table(lab: Lab) -> str:
    rows = [("host", "namespace", "addresses", "labels")]
    rows.append(("node", "", " ".join(lab.node.addresses), ""))
    for host in lab.hosts.values():
        labels = ",".join(f"{key}={value}" for key, value in host.plan.labels.items())
        rows.append((host.name, host.plan.namespace, " ".join(host.addresses), labels))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  " + "  ".join([*cells, row[3]]).rstrip())
    return "\n".join(lines)


def _inside(plan: topology.Topology, command: Sequence[str], *, firewall: bool) -> int:
    """In the enclosure: make the lab, run the shell or command in its node, end the lab."""
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with Lab(plan) as lab:
            # /run is private here, /var/lib is not: what `bartizan run` keeps must go with the lab.
            environment = {"BARTIZAN_STATE_DIR": str(lab.folder / "state"), **_environment()}
            if firewall:
                environment |= daemon.start(lab).environment
            if not command:
                print(f"lab {lab.topology.name}, {enclosure.describe()}\n{_table(lab)}")
                print("This shell is in the node. In a host: `bartizan lab exec HOST -- COMMAND`.")
                print("`bartizan run` works here; $BARTIZAN_STATE_DIR is where it keeps things.")
                print("Leaving the shell ends the lab.", flush=True)
            shell = os.environ.get("SHELL") or shutil.which("bash") or "/bin/sh"
            argv = lab.node.command(command or [shell])
            child = subprocess.Popen(argv, env=environment)
            signal.signal(signal.SIGTERM, lambda *_: child.terminate())
            code = child.wait()
            return code if code >= 0 else 128 - code
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return FAILED


def main() -> int:
    """The part of `up` that runs in the enclosure; people use `bartizan lab`."""
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser(prog="python -m lab.commands")
    parser.add_argument("file", help="its name in messages")
    parser.add_argument("--descriptor", type=int, required=True, help="where its text is read")
    parser.add_argument("--firewall", action="store_true")
    chosen = parser.parse_args(sys.argv[1:split])
    os.lseek(chosen.descriptor, 0, os.SEEK_SET)
    with open(chosen.descriptor, encoding="utf-8") as content:  # noqa: PTH123 (a descriptor)
        plan = topology.parse(content.read(), chosen.file)
    return _inside(plan, sys.argv[split + 1 :], firewall=chosen.firewall)


if __name__ == "__main__":
    sys.exit(main())
