"""`bartizan test`: what people expect of policies, held against the model and real packets."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from firewall.cli.exits import ExitCode

if TYPE_CHECKING:
    from firewall.policy.problem import Problem
    from policytest.case import Case
    from policytest.field import Field
    from policytest.play import Result


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--mode",
    type=click.Choice(["model", "packets", "both"]),
    help="Who answers; the default is both, and the model where the machine cannot send packets.",
)
@click.option("--filter", "patterns", multiple=True, metavar="TEXT",
              help="Only checks whose title holds TEXT (* = anything); repeatable.")  # fmt: skip
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write JUnit XML too.")  # fmt: skip
@click.option("--tap", is_flag=True, help="Print TAP 14.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table",
              show_default=True, help="json: one object per check and line.")  # fmt: skip
@click.option("--coverage", is_flag=True, help="List the rules that never decided anything.")
@click.option("-v", "--verbose", is_flag=True, help="Print every table, not only failing ones.")
def test(
    paths: tuple[Path, ...],
    mode: str | None,
    patterns: tuple[str, ...],
    junit: Path | None,
    output: str,
    *,
    tap: bool,
    coverage: bool,
    verbose: bool,
) -> None:
    """Run policy tests: files, or folders in which files say `kind: PolicyTest`.

    Exit codes: 0 all passed; 1 a check failed; 2 usage; 3 the machine cannot send packets;
    4 a file is invalid; 5 no check selected; 6 model and packets disagree.
    """
    if tap and output == "json":
        raise click.UsageError("--tap and -o json are two outputs: choose one")
    cases = _cases(paths or (Path(),))
    if mode != "model" and not _in_enclosure():
        code = _again_inside(_arguments(click.get_current_context()))
        if code != ExitCode.UNABLE or mode is not None:
            sys.exit(code)
        click.echo("no packets can be sent here (see above): the model alone answers", err=True)
        mode = "model"
    run = _Run(cases, mode, patterns)
    run.play()
    if not run.results:
        click.echo("no check is selected", err=True)
        sys.exit(ExitCode.NOTHING_SELECTED)
    _print(run, output, tap=tap, verbose=verbose)
    if junit is not None:
        from policytest.formats import junit as as_junit

        junit.write_text(as_junit(run.results), encoding="utf-8")
    if coverage:
        from policytest.coverage import coverage as lines_of

        for line in lines_of(cases, run.results):
            click.echo(line, err=tap or output == "json")
    sys.exit(run.code)


def _arguments(context: click.Context) -> list[str]:
    """Write the command line again, from what it was understood as."""
    given = context.params
    words = ["test", *(str(path) for path in given["paths"]), "-o", given["output"]]
    words += ["--mode", given["mode"]] if given["mode"] else []
    for pattern in given["patterns"]:
        words += ["--filter", pattern]
    words += ["--junit", str(given["junit"])] if given["junit"] else []
    return words + [f"--{flag}" for flag in ("tap", "coverage", "verbose") if given[flag]]


def _in_enclosure() -> bool:
    from lab import enclosure

    return enclosure.mode() is not None


def _again_inside(arguments: list[str]) -> int:
    """Run the same command in an enclosure of its own; its exit code."""
    from lab.commands import python_environment
    from lab.daemon import command

    inside = [sys.executable, "-m", "lab.enclosure", "--quiet", "--", *command(), *arguments]
    sys.stdout.flush()
    return subprocess.run(inside, check=False, env=python_environment()).returncode


def _cases(paths: Iterable[Path]) -> "list[Case]":
    """Read the files; ends the command if one is invalid, after all problems of all files."""
    from policytest.reader import read_case
    from policytest.selection import files_meant

    files = list(dict.fromkeys(files_meant(paths)))
    if not files:
        click.echo("no file here says `kind: PolicyTest`", err=True)
        sys.exit(ExitCode.NOTHING_SELECTED)
    reads = [read_case(file) for file in files]
    problems = [problem for read in reads for problem in read.problems]
    if not _in_enclosure():  # who sent us there has said all this
        _tell(problems)
    if any(read.case is None for read in reads):
        sys.exit(ExitCode.INVALID)
    return [read.case for read in reads if read.case is not None]


def _tell(problems: "Sequence[Problem]") -> None:
    for problem in problems:
        click.echo(f"{problem.severity}: {problem}", err=True)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        from policytest.formats import problem_annotations

        for line in problem_annotations(problems):
            click.echo(line)


class _Run:
    """One run over all files: results, time, exit code."""

    def __init__(self, cases: "list[Case]", mode: str | None, patterns: tuple[str, ...]) -> None:
        self.cases = cases
        self.mode = mode
        self.patterns = patterns
        self.results: list[Result] = []
        self.by_case: list[tuple[Case, list[Result]]] = []
        self.seconds = 0.0

    def play(self) -> None:
        """Play every case; ends the command if that cannot be done."""
        from policytest.model import ContradictionError

        began = time.monotonic()
        try:
            if self.mode == "model":
                self._play(self.cases, None)
            else:
                self._play_with_packets()
        except ContradictionError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(ExitCode.INVALID)
        self.seconds = time.monotonic() - began

    def _play_with_packets(self) -> None:
        from lab.laboratory import LabError
        from policytest.field import Field, FieldError, RefusedError, groups

        able = []
        for case in self.cases:
            if case.model_only and self.mode == "packets":
                click.echo(f"{case.file}: no packets: {case.model_only}", err=True)
                sys.exit(ExitCode.UNABLE)
            elif case.model_only:
                click.echo(f"{case.file}: model only: {case.model_only}", err=True)
                self._play([case], None)
            else:
                able.append(case)
        try:
            for group in groups(able):
                with Field(group) as field:
                    self._play(group, field)
        except (FieldError, LabError, OSError) as error:
            click.echo(f"packets: {error}", err=True)
            if self.mode is not None or self.results:
                sys.exit(ExitCode.UNABLE)
            self.mode = "model"
            self._play(self.cases, None)
        except RefusedError as error:
            click.echo(f"the daemon refuses what the model accepts: {error}", err=True)
            sys.exit(ExitCode.DISAGREEMENT)

    def _play(self, cases: "Sequence[Case]", field: "Field | None") -> None:
        from policytest.play import play
        from policytest.selection import filtered

        choice = filtered(self.patterns)
        compare = self.mode != "packets"
        for case in cases:
            if not any(choice(step, check) for step in case.steps for check in step.checks):
                continue
            found = list(play(case, choice, field=field, compare=compare))
            self.results += found
            self.by_case.append((case, found))

    @property
    def code(self) -> ExitCode:
        """The exit code: a disagreement weighs more than a failure."""
        if any(not result.agrees for result in self.results):
            return ExitCode.DISAGREEMENT
        return ExitCode.FAILED if any(r.faults for r in self.results) else ExitCode.OK


def _print(run: _Run, output: str, *, tap: bool, verbose: bool) -> None:
    from policytest import formats, report

    if output == "json":
        for result in run.results:
            click.echo(formats.json_line(result))
    elif tap:
        for line in formats.tap(run.results):
            click.echo(line)
    else:
        for case, results in run.by_case:
            for line in report.file_report(case, results, run.mode or "", verbose=verbose):
                click.echo(line)
        click.echo(report.summary(run.results, len(run.by_case), run.seconds))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in formats.annotations(run.results):
            click.echo(line)
