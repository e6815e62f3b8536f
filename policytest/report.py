"""Results for people: tables with the differing cells marked, and one block per failure."""

import shlex
from collections.abc import Iterator, Sequence

from policytest.answer import Answer
from policytest.case import Case, Check, Matrix, Step
from policytest.play import Result

WIDTH = 100
"""Columns of a table; with longer names its columns are numbered."""

_SIGNS = {True: ".", False: "X"}
_LEGEND = ". allowed  X denied  - not stated  * not as expected"


def title_of(step: str, check: Check) -> str:
    """Return the text that `--filter` is held against."""
    return f"{step}: {check.title}" if step else check.title


def command(result: Result, mode: str) -> str:
    """Return the command that repeats just one check."""
    parts = ["bartizan", "test", result.file, "--filter", title_of(result.step, result.check)]
    return shlex.join([*parts, *(["--mode", mode] if mode else [])])


def file_report(case: Case, results: Sequence[Result], mode: str, *, verbose: bool) -> list[str]:
    """Return the lines about one file.

    Args:
        case: the file.
        results: its results.
        mode: what `--mode` was, for the commands that repeat a check.
        verbose: print every table, not only those with a failure.
    """
    failed = [result for result in results if not result.passed]
    lines = [f"{'FAIL' if failed else 'ok':4}  {case.file}  {_counted(len(results), 'check')}"]
    for number, step in enumerate(case.steps):
        mine = {result.check: result for result in results if result.check.step == number}
        lines += _tables(step, mine, verbose=verbose)
    for result in failed:
        if result.explanation or result.flows or len(failed) <= 1:
            lines += _block(result, mode)
    untold = sum(not result.explanation for result in failed)
    if untold and len(failed) > 1:
        lines.append(f"  and {_counted(untold, 'more failure')} (-o json tells all)")
    return lines


def _tables(step: Step, results: dict[Check, Result], *, verbose: bool) -> Iterator[str]:
    for matrix in step.matrices:
        cells = {
            (result.check.source, result.check.destination): result
            for result in results.values()
            if result.check.matrix == matrix.number
        }
        if cells and (verbose or any(not result.passed for result in cells.values())):
            yield ""
            yield f"  {step.name + ': ' if step.name else ''}{_matrix_title(matrix)}   {_LEGEND}"
            yield from _table(matrix, cells)


def _matrix_title(matrix: Matrix) -> str:
    request = matrix.traffic.request
    said = f" {request}" if request is not None else ""
    return matrix.traffic.text + said


def _table(matrix: Matrix, cells: dict[tuple[str, str], Result]) -> Iterator[str]:
    wide = sum(len(name) + 2 for name in matrix.columns) > WIDTH
    heads = [str(at) if wide else name for at, name in enumerate(matrix.columns, start=1)]
    if wide:
        yield "  " + ", ".join(
            f"{at} {name}" for at, name in zip(heads, matrix.columns, strict=True)
        )
    left = max(map(len, matrix.rows))
    widths = [max(3, len(head)) for head in heads]
    yield _row("", left, heads, widths)
    for source in matrix.rows:
        signs = [_cell(cells.get((source, destination))) for destination in matrix.columns]
        yield _row(source, left, signs, widths)


def _row(name: str, left: int, cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"    {name.ljust(left)}  {'  '.join(padded)}".rstrip()


def _cell(result: Result | None) -> str:
    if result is None:
        return "-"
    if result.model is not None and result.packets is not None and not result.agrees:
        return f"{_SIGNS[result.model.allowed]}/{_SIGNS[result.packets.allowed]}*"
    return _SIGNS[result.got.allowed] + "*" * bool(result.faults)


def _block(result: Result, mode: str) -> Iterator[str]:
    check = result.check
    step = f", {result.step}" if result.step else ""
    yield ""
    yield f"  FAIL {check.title}   {result.file}:{check.line}:{check.column}{step}"
    for fault in result.faults:
        yield f"    {fault}"
    if not result.agrees and result.model is not None and result.packets is not None:
        yield "    model and packets disagree:"
        yield f"      model    {answer_text(result.model)}"
        yield f"      packets  {answer_text(result.packets)}"
    yield from (f"    | {line}" for line in result.explanation.splitlines())
    yield from (f"    flow {line}" for line in result.flows)
    yield f"    again: {command(result, mode)}"


def answer_text(answer: Answer) -> str:
    """Write an answer in one line."""
    reason = f" {answer.reason}" if answer.reason else ""
    return f"{answer.word}{reason} by {', '.join(answer.by)}: {answer.why}"


def summary(results: Sequence[Result], files: int, seconds: float) -> str:
    """Return the last line: how many of what, and how it went."""
    failed = sum(bool(result.faults) for result in results)
    split = sum(not result.agrees for result in results)
    parts = [f"{_counted(files, 'file')}, {_counted(len(results), 'check')}"]
    parts.append("all passed" if not failed and not split else f"{failed} failed")
    if split:
        parts.append(f"model and packets disagree on {split}")
    judges = [
        name
        for name, used in (
            ("model", any(result.model for result in results)),
            ("packets", any(result.packets for result in results)),
        )
        if used
    ]
    return f"{', '.join(parts)} ({' and '.join(judges)}, {seconds:.1f} s)"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
