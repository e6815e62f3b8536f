"""What people and programs are told about the results."""

import json
from xml.etree import ElementTree as ET

import yaml
from policytest_reading import WEB, case_of, results, written

from policytest import formats, report
from policytest.answer import Answer
from policytest.coverage import coverage
from policytest.selection import filtered

CASE = case_of(
    written(
        policies=[WEB],
        hosts=[{"name": "out", "ip": "203.0.113.7"}],
        steps=[
            {
                "name": 'it\'s "odd" & <so>',
                "matrix": [{"port": 80, "rows": {"x/a": "-.X", "x/b": "X-.", "host:out": ".X-"}}],
            },
            {
                "name": "fine",
                "expect": [{"from": "x/a", "to": "x/b", "port": 80, "verdict": "allow"}],
            },
        ],
    )
)
RESULTS = results(CASE)
FAILED = [result for result in RESULTS if not result.passed]


def test_three_cells_are_wrong():
    wrong = {(result.check.source, result.check.destination) for result in FAILED}
    assert wrong == {("x/b", "x/a"), ("x/a", "host:out")}


def test_a_table_marks_the_cells_that_differ():
    lines = report.file_report(CASE, RESULTS, "model", verbose=False)
    at = next(i for i, line in enumerate(lines) if "not as expected" in line)
    assert [line.split() for line in lines[at + 1 : at + 5]] == [
        ["x/a", "x/b", "host:out"],
        ["x/a", "-", ".", ".*"],
        ["x/b", ".*", "-", "."],
        ["host:out", ".", "X", "-"],
    ]


def test_a_table_of_many_columns_numbers_them():
    endpoints = [{"name": f"a-rather-long-name-{n}"} for n in range(9)]
    rows = {f"a-rather-long-name-{n}": "." * 9 for n in range(9)}
    case = case_of(written(endpoints=endpoints, matrix=[{"port": 80, "rows": rows}]))
    lines = report.file_report(case, results(case), "model", verbose=True)
    assert any(
        line.split()[:4]
        == ["1", "default/a-rather-long-name-0,", "2", "default/a-rather-long-name-1,"]
        for line in lines
    )
    assert all(len(line) < 200 for line in lines if ", 2 " not in line)


def test_a_failure_tells_what_why_and_how_to_see_it_again():
    text = "\n".join(report.file_report(CASE, RESULTS, "model", verbose=False))
    assert "FAIL x/a -> host:out 80/TCP   t.yaml:" in text
    assert "expected deny, got allow: no policy restricts it" in text
    assert "| ALLOWED x/a -> 203.0.113.7 (reserved:world) 80/TCP" in text


def test_the_command_that_repeats_a_check_repeats_just_that():
    import shlex

    words = shlex.split(report.command(FAILED[0], "model"))
    assert words[:3] == ["bartizan", "test", "t.yaml"]
    chosen = filtered([words[words.index("--filter") + 1]])
    picked = [c for step in CASE.steps for c in step.checks if chosen(step, c)]
    assert picked == [FAILED[0].check]


def test_the_summary_counts():
    assert report.summary(RESULTS, 1, 0.5) == "1 file, 7 checks, 2 failed (model, 0.5 s)"


def test_json_has_one_object_per_check():
    rows = [json.loads(formats.json_line(result)) for result in RESULTS]
    assert len(rows) == 7
    wrong = next(row for row in rows if not row["passed"])
    assert wrong.keys() >= {"case", "step", "from", "to", "port", "expected", "got", "by", "why"}
    assert (wrong["from"], wrong["to"], wrong["expected"], wrong["got"]) == (
        "x/a", "host:out", "deny", "allow",
    )  # fmt: skip
    assert rows[-1]["by"] == ["x/web"]


def test_junit_has_a_case_per_check_and_survives_odd_names():
    root = ET.fromstring(formats.junit(RESULTS))
    assert (root.get("tests"), root.get("failures")) == ("7", "2")
    cases = root.findall("testsuite/testcase")
    assert len(cases) == 7
    assert cases[0].get("name").startswith('it\'s "odd" & <so>: ')
    assert len(root.findall("testsuite/testcase/failure")) == 2


def test_junit_holds_no_character_that_xml_has_not():
    odd = RESULTS[0]._replace(step="\x1b[31m\x00red", faults=("\x07",))
    ET.fromstring(formats.junit([odd]))


def test_tap_says_the_plan_and_one_line_per_check():
    lines = list(formats.tap(RESULTS))
    assert lines[:2] == ["TAP version 14", "1..7"]
    points = [line for line in lines if line.startswith(("ok ", "not ok "))]
    assert [point.split(" - ")[0] for point in points][:2] == ["ok 1", "not ok 2"]
    begin = lines.index("  ---")
    block = yaml.safe_load("\n".join(lines[begin + 1 : lines.index("  ...")]))
    assert block["message"].startswith("expected deny, got allow")


def test_annotations_name_file_line_and_column_on_one_line():
    [first, _] = formats.annotations(RESULTS)
    assert first.startswith("::error file=t.yaml,line=")
    assert "\n" not in first
    assert "%0A" in first


def test_a_disagreement_is_shown_with_both_answers():
    model, packets = Answer(True, ("x/web",), why="m"), Answer(False, ("default-deny",), why="p")
    split = RESULTS[-1]._replace(model=model, packets=packets, explanation="because")
    assert not split.agrees
    assert not split.passed
    text = "\n".join(report.file_report(CASE, [split], "", verbose=False))
    assert "model and packets disagree" in text
    assert "model    allow by x/web: m" in text
    assert "packets  deny by default-deny: p" in text
    assert "disagree on 1" in report.summary([split], 1, 0.0)
    cell = RESULTS[0]._replace(model=model, packets=packets)
    assert any("./X*" in line for line in report.file_report(CASE, [cell], "", verbose=False))


def test_coverage_names_the_rules_that_decided_nothing():
    import copy

    policy = copy.deepcopy(WEB)
    policy["spec"]["ingress"].append({"fromEndpoints": [{"matchLabels": {"app": "nobody"}}]})
    expect = [{"from": "x/a", "to": "x/b", "port": 80, "verdict": "allow"}]
    case = case_of(written(policies=[policy], expect=expect))
    lines = list(coverage([case], results(case)))
    assert lines[0] == "coverage: 1 of 2 rules were the reason for a verdict"
    assert lines[2].endswith("CiliumNetworkPolicy x/web  spec.ingress[1]")


def test_default_deny_is_a_reason_of_the_rule_that_switched_it_on():
    expect = [{"from": "x/a", "to": "x/b", "port": 81, "verdict": "deny"}]
    case = case_of(written(policies=[WEB], expect=expect))
    assert list(coverage([case], results(case))) == [
        "coverage: 1 of 1 rules were the reason for a verdict"
    ]
