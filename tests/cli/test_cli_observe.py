"""`bartizan observe --input-file`: Hubble's flags over a file of flows."""

import json

from click.testing import CliRunner

from firewall.cli import main
from firewall.cli.exits import ExitCode


def _flow(source: str, verdict: str, second: int) -> str:
    reason = {"drop_reason": 133} if verdict == "DROPPED" else {}
    flow = {
        "time": f"2026-11-22T13:31:{second:02d}.129000000Z",
        "verdict": verdict,
        **reason,
        "IP": {"source": "10.0.0.30", "destination": "10.0.0.147", "ipVersion": "IPv4"},
        "l4": {"TCP": {"source_port": 54842, "destination_port": 80, "flags": {"SYN": True}}},
        "source": {"ID": 3, "identity": 22654, "namespace": "default", "pod_name": source},
        "destination": {
            "ID": 2,
            "identity": 16530,
            "namespace": "default",
            "pod_name": "deathstar",
        },
        "Type": "L3_L4",
        "event_type": {"type": 5},
        "traffic_direction": "INGRESS",
        "is_reply": False,
        "Summary": "TCP Flags: SYN",
    }
    return json.dumps({"flow": flow, "node_name": "lab", "time": flow["time"]})


FLOWS = "\n".join(
    [
        _flow("xwing", "DROPPED", 1),
        _flow("tiefighter", "FORWARDED", 2),
        _flow("xwing", "DROPPED", 3),
    ]
)


def _observe(*arguments: str):
    command = ["observe", "--input-file", "-", *arguments]
    return CliRunner(env={"TZ": "UTC"}).invoke(main, command, input=FLOWS)


def test_the_compact_line_is_hubbles() -> None:
    """Names, ports, identities, arrow, match type, direction, verdict, summary."""
    answer = _observe("--last", "1", "--from-pod", "default/xwing")
    assert answer.output.endswith(
        "default/xwing:54842 (ID:22654) -> default/deathstar:80 (ID:16530) "
        "policy-verdict:none INGRESS DENIED (TCP Flags: SYN)\n"
    )


def test_different_filters_narrow() -> None:
    """AND between flags."""
    assert not _observe("--from-pod", "default/tiefighter", "--verdict", "DROPPED").output


def test_the_same_filter_again_widens() -> None:
    """OR inside one flag."""
    answer = _observe("--from-pod", "default/tiefighter", "--from-pod", "default/xwing")
    assert len(answer.output.splitlines()) == 3


def test_not_negates_the_filter_after_it_only() -> None:
    """The order of options matters for --not and for nothing else."""
    answer = _observe("--verdict", "DROPPED", "--not", "--from-pod", "default/tiefighter")
    assert len(answer.output.splitlines()) == 2


def test_not_at_the_end_is_an_error() -> None:
    """Nothing is negated silently."""
    assert _observe("--not").exit_code == ExitCode.USAGE
    assert _observe("--not", "--follow").exit_code == ExitCode.USAGE


def test_a_wrong_value_names_its_flag() -> None:
    """The message says which flag and what it takes."""
    answer = _observe("--verdict", "MAYBE")
    assert answer.exit_code == ExitCode.USAGE
    assert "--verdict" in answer.output


def test_json_passes_the_lines_through() -> None:
    """One object per line, as exported."""
    assert _observe("-o", "json").output.splitlines() == FLOWS.splitlines()


def test_the_short_forms_of_hubble_are_taken() -> None:
    """-4 and -6 for the IP version, negated too, and `tab` for a table."""
    assert len(_observe("-4").output.splitlines()) == 3
    assert not _observe("-6").output
    assert len(_observe("--not", "-6").output.splitlines()) == 3
    assert _observe("-o", "tab").output == _observe("-o", "table").output != ""


def test_a_table_cannot_follow() -> None:
    """Its columns need every row first."""
    assert _observe("-o", "table", "--follow").exit_code == ExitCode.USAGE


def test_a_damaged_line_is_named_by_file_and_number() -> None:
    """Nothing of a broken file is half shown."""
    answer = CliRunner().invoke(main, ["observe", "--input-file", "-"], input=FLOWS + "\n{")
    assert answer.exit_code == ExitCode.FAILED
    assert "-:4:" in answer.output
