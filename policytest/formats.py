"""Results for programs: JSON lines, JUnit XML, TAP 14, GitHub annotations.

Sources: JUnit as read by Jenkins and GitLab (testsuites/testsuite/testcase/failure); TAP 14
(testanything.org); GitHub's workflow commands.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from firewall.policy.problem import Problem
from policytest.answer import Answer
from policytest.case import TlsHello
from policytest.play import Result
from policytest.report import answer_text, title_of

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 section 2.2 has no character for."""


def row(result: Result) -> dict[str, Any]:
    """Return one check as JSON shows it."""
    check, got = result.check, result.got
    request = check.traffic.request
    found: dict[str, Any] = {
        "case": result.file,
        "step": result.step,
        "from": check.source,
        "to": check.destination,
        "port": check.traffic.text,
        "expected": "allow" if check.expected.allowed else "deny",
        "got": got.word,
        "by": list(got.by),
        "why": got.why,
        "passed": result.passed,
        "line": check.line,
        "column": check.column,
    }
    if isinstance(request, TlsHello):
        found["tls"] = {"sni": request.server_name}
    elif request is not None:
        found["http"] = f"{request.method} {request.path}"
        if request.hello is not None:
            found["tls"] = {"sni": request.hello.server_name}
    if got.reason:
        found["reason"] = got.reason
    if got.direction:
        found["direction"] = got.direction
    for name, answer in (("model", result.model), ("packets", result.packets)):
        if answer is not None and (result.model is None or result.packets is None):
            found["judge"] = name
        elif answer is not None:
            found[name] = {"got": answer.word, "by": list(answer.by), "why": answer.why}
    if result.faults:
        found["faults"] = list(result.faults)
    if result.explanation:
        found["explanation"] = result.explanation.splitlines()
    if result.flows:
        found["flows"] = list(result.flows)
    return found


def json_line(result: Result) -> str:
    """Return one check as a line of JSON."""
    return json.dumps(row(result), ensure_ascii=False)


def detail(result: Result) -> str:
    """Return everything that is known about a failure, as text."""
    lines = list(result.faults)
    if not result.agrees:
        pairs: tuple[tuple[str, Answer | None], ...] = (
            ("model", result.model),
            ("packets", result.packets),
        )
        lines += [f"{name}: {answer_text(answer)}" for name, answer in pairs if answer]
    lines += result.explanation.splitlines()
    lines += result.flows
    return "\n".join(lines)


def junit(results: Sequence[Result]) -> str:
    """Return the results as JUnit XML: a suite per file, a case per check."""
    root = ET.Element("testsuites", name="bartizan test")
    suites: dict[str, list[Result]] = {}
    for result in results:
        suites.setdefault(result.file, []).append(result)
    for file, mine in suites.items():
        failures = [result for result in mine if not result.passed]
        suite = ET.SubElement(
            root, "testsuite", name=file, tests=str(len(mine)), failures=str(len(failures))
        )
        for result in mine:
            case = ET.SubElement(
                suite,
                "testcase",
                classname=_xml(file),
                name=_xml(title_of(result.step, result.check)),
                file=file,
                line=str(result.check.line),
            )
            if not result.passed:
                kind = "failure" if result.agrees else "disagreement"
                failure = ET.SubElement(case, "failure", type=kind, message=_xml(_headline(result)))
                failure.text = _xml(detail(result))
    for key in ("tests", "failures"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, "unicode") + "\n"


def _headline(result: Result) -> str:
    return result.faults[0] if result.faults else "model and packets disagree"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def tap(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of a TAP 14 document."""
    yield "TAP version 14"
    yield f"1..{len(results)}"
    for number, result in enumerate(results, start=1):
        title = f"{result.file}: {title_of(result.step, result.check)}"
        # "#" begins a directive and "\" escapes (TAP 14, Test Points).
        escaped = title.replace("\\", "\\\\").replace("#", "\\#")
        yield f"{'ok' if result.passed else 'not ok'} {number} - {escaped}"
        if not result.passed:
            yield "  ---"
            # JSON is YAML: no value can break out of the block.
            yield f"  message: {json.dumps(_headline(result))}"
            yield f"  severity: {'fail' if result.agrees else 'disagreement'}"
            yield f"  at: {{file: {json.dumps(result.file)}, line: {result.check.line}}}"
            yield f"  data: {json.dumps(row(result))}"
            yield "  ..."


def annotations(results: Iterable[Result]) -> Iterator[str]:
    """Yield a GitHub workflow command for every failure."""
    for result in results:
        if not result.passed:
            check = result.check
            place = result.file, check.line, check.column
            yield _annotation("error", place, title_of(result.step, check), detail(result))


def problem_annotations(problems: Iterable[Problem]) -> Iterator[str]:
    """Yield a GitHub workflow command for every problem of a file."""
    for one in problems:
        place = one.file, one.line, one.column
        yield _annotation(one.severity, place, one.path or "policy test", one.message)


def _annotation(kind: str, place: tuple[str, int, int], title: str, text: str) -> str:
    file, line, column = place
    where = f"file={_property(file)},line={line},col={column},title={_property(title)}"
    return f"::{kind} {where}::{_data(text)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
