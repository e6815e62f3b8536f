"""The stage of a demo: runs commands in a lab, shows them with their evidence, and checks them.

Everything that is shown was run as shown. A demo that only looks right is worth nothing, so each
scene says beforehand what must come of it; what differs is collected in `differences`.
"""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TypeVar

from lab.daemon import Bartizan, command
from lab.laboratory import Lab, Machine

T = TypeVar("T")

WIDTH = 96
"""Columns; wider output is the terminal's business."""

FLOWS_S = 30.0
"""How long a flow may take from the decision to `bartizan observe` on a busy machine."""

_COMMAND_S = 60.0

_BOLD, _DIM, _RED, _GREEN, _YELLOW, _CYAN = "1", "2", "31", "32", "33", "36"
_ALLOWED = re.compile(r"\b(ALLOWED|FORWARDED|REDIRECTED|AUDITED)\b")
_DENIED = re.compile(r"\b(DENIED|DROPPED)\b")


class Stage:
    """Where a demo plays.

    Attributes:
        differences: What did not come as it should, one sentence each.
    """

    def __init__(self, lab: Lab, firewall: Bartizan) -> None:
        self._lab = lab
        self._firewall = firewall
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._seen: set[str] = set()
        self._scene = "before the first step"
        self.differences: list[str] = []

    # --- words --------------------------------------------------------------------------------

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def line(self, text: str = "") -> None:
        """Print one line now, also into a pipe."""
        print(text, flush=True)

    def scene(self, number: int, title: str, text: str) -> None:
        """Begin a scene: what is about to happen, and why it is worth a look."""
        self._scene = f"step {number}"
        rule = "─" * max(0, WIDTH - len(title) - 6)
        self.line()
        self.line(self._paint(f"── {number} {title} {rule}", _BOLD))
        for part in textwrap.wrap(text, WIDTH - 3):
            self.line(f"   {part}")

    def differs(self, text: str) -> None:
        """Note that something did not come as it should."""
        self.differences.append(f"{self._scene}: {text}")
        self.line(self._paint(f"   ✗ {text}", _RED))

    # --- commands -----------------------------------------------------------------------------

    def _show(self, machine: Machine, argv: Sequence[str]) -> None:
        prompt = self._paint(f"{machine.name}$", _CYAN)
        self.line()
        self.line(f"{prompt} {self._paint(_quoted(argv), _BOLD)}")

    def _output(self, text: str) -> None:
        for line in text.rstrip("\n").splitlines():
            self.line(f"  {line.rstrip()}")

    def run(
        self,
        machine: Machine,
        argv: Sequence[str],
        *,
        code: int = 0,
        output: str = "",
        quiet: bool = False,
    ) -> None:
        """Run a command, show it with its output and exit code, check both.

        `output` is a regular expression that must be found in what it prints; `quiet`: its output
        is worth showing only if it fails.
        """
        self._show(machine, argv)
        done = self._execute(machine, argv)
        said = done.stdout + done.stderr
        if not quiet or done.returncode != code:
            self._output(said)
        if done.returncode:
            colour = _YELLOW if done.returncode == code else _RED
            self.line(f"  {self._paint(f'exit {done.returncode}', colour)}")
        if done.returncode != code:
            self.differs(f"`{_quoted(argv)}` ended with {done.returncode}, expected {code}")
        if not re.search(output, said):
            self.differs(f"`{_quoted(argv)}` did not say {output!r}")

    def _execute(self, machine: Machine, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        ours = {"bartizan": command(), "python3": [sys.executable]}
        real = [*ours.get(argv[0], [argv[0]]), *argv[1:]]
        return machine.run(real, _COMMAND_S, env=self._firewall.environment)

    def bartizan(self, *argv: str, output: str = "", quiet: bool = False) -> None:
        """Run the `bartizan` command in the node; the arguments are those of `run`."""
        self.run(self._lab.node, ["bartizan", *argv], output=output, quiet=quiet)

    # --- flows --------------------------------------------------------------------------------

    def flow(self, pod: str, kind: str, pattern: str) -> str:
        """Show the newest flow of `pod` of a kind (`observe --type`); it must match.

        Returns:
            The line; empty if none came that matches `pattern` and was not shown before.
        """
        argv = [
            "bartizan", "observe", "--last", "1", "--type", kind, "--from-pod", pod,
            "--print-policy-names",
        ]  # fmt: skip
        newest = ""

        def came() -> bool:
            nonlocal newest
            newest = self._execute(self._lab.node, argv).stdout.strip()
            return newest not in self._seen and re.search(pattern, newest) is not None

        self._show(self._lab.node, argv)
        try:
            self._firewall.wait_until(came, "the flow", FLOWS_S)
        except TimeoutError:
            self.differs(f"the newest flow of {pod} is not {pattern!r}, but {newest!r}")
            newest = ""
        self._seen.add(newest)
        self.line(f"  {self._coloured_flow(newest)}")
        return newest

    def _coloured_flow(self, line: str) -> str:
        line = _ALLOWED.sub(lambda match: self._paint(match[0], _GREEN), line)
        return _DENIED.sub(lambda match: self._paint(match[0], _RED), line)

    def wait_until(self, condition: Callable[[], T], what: str, within_s: float) -> T | None:
        """The first truthy answer of `condition`; None, and a difference, if none comes in time."""
        try:
            return self._firewall.wait_until(condition, what, within_s)
        except TimeoutError as error:
            self.differs(str(error))
            return None

    # --- end ----------------------------------------------------------------------------------

    def curtain(self) -> bool:
        """Say what differed, if anything did; return whether everything came as it should."""
        if not self.differences:
            return True
        self.line()
        self.line(self._paint("Not everything came as it should:", f"{_BOLD};{_RED}"))
        for difference in self.differences:
            self.line(f"  {difference}")
        log = self._firewall.log().splitlines()
        if log:
            self.line(self._paint("The end of bartizan's log:", _DIM))
            self._output("\n".join(log[-20:]))
        return False


def _quoted(argv: Sequence[str]) -> str:
    """The command as one would type it."""
    return shlex.join(argv)
