"""Small parts of the agent: numbers of prefixes, export, metrics text, worker commands, log."""

import pytest

from conntrack.address import parse_prefix
from firewall.agent.collector import Allowance, _time
from firewall.agent.exporter import Exporter
from firewall.agent.lineup import specs
from firewall.agent.loading import read
from firewall.agent.numbers import PrefixNumbers, prefix_labels
from firewall.agent.status import Exposition
from firewall.agent.worker import is_worker
from firewall.flows.filters import FilterError
from firewall.identities.registry import LocalNumbers


def numbers(tmp_path):
    fresh = PrefixNumbers(tmp_path, LocalNumbers())
    fresh.restore()
    return fresh


def test_prefixes_keep_their_numbers_over_a_restart(tmp_path):
    """Workers that outlived the agent know them."""
    ten, v6 = parse_prefix("10.0.0.0/8"), parse_prefix("fd00::/64")
    first = numbers(tmp_path)
    first.follow({parse_prefix("192.0.2.0/24")})
    first.follow({ten, v6})
    before = dict(first.items())
    second = numbers(tmp_path)
    second.follow({v6, ten, parse_prefix("198.51.100.0/24")})
    after = dict(second.items())
    assert {prefix: after[prefix] for prefix in before} == before
    assert len(set(after.values())) == 3


def test_a_damaged_number_file_costs_only_the_numbers(tmp_path):
    """It is kept aside, and the prefixes are numbered anew."""
    first = numbers(tmp_path)
    first.follow({parse_prefix("10.0.0.0/8")})
    (tmp_path / "prefixes").write_text("garbage")
    second = numbers(tmp_path)
    second.follow({parse_prefix("10.0.0.0/8")})
    assert len(list(second.items())) == 1
    assert (tmp_path / "prefixes.unusable").read_text() == "garbage"


def test_a_prefix_identity_has_ciliums_labels():
    """`-` for `:` in IPv6, since selectors split at colons."""
    assert prefix_labels(parse_prefix("10.0.0.0/8")).strings() == (
        "cidr:10.0.0.0/8", "reserved:world",
    )  # fmt: skip
    assert prefix_labels(parse_prefix("fd00::/64")).strings()[0] == "cidr:fd00--/64"


def test_exported_lines_are_rotated_and_none_is_cut(tmp_path):
    """The newest lines are in the file, the older ones in .1, .2; the oldest are gone."""
    path = tmp_path / "flows.jsonl"
    exporter = Exporter(path, max_bytes=100, backups=2)
    lines = [b"%08d\n" % number for number in range(60)]
    for line in lines:
        exporter.append([line])
    files = [tmp_path / "flows.jsonl.2", tmp_path / "flows.jsonl.1", path]
    kept = b"".join(file.read_bytes() for file in files)
    assert kept == b"".join(lines[-len(kept) // 9 :])
    assert all(file.stat().st_size <= 100 + 9 for file in files)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert exporter.lost_count == 0


def test_a_batch_larger_than_a_file_is_spread(tmp_path):
    """One call may fill several files."""
    path = tmp_path / "flows.jsonl"
    exporter = Exporter(path, max_bytes=50, backups=9)
    exporter.append([b"x" * 9 + b"\n"] * 20)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 200


def test_what_cannot_be_exported_is_counted_and_tried_again(tmp_path):
    """A directory that is missing, then made."""
    path = tmp_path / "later" / "flows.jsonl"
    exporter = Exporter(path, max_bytes=100, backups=0)
    exporter.append([b"1\n", b"2\n"])
    assert exporter.lost_count == 2
    assert exporter.error
    path.parent.mkdir()
    exporter.append([b"3\n"])
    assert path.read_bytes() == b"3\n"
    assert exporter.error == ""


def test_metrics_of_one_name_stand_together_and_labels_are_escaped():
    """Prometheus' text format 0.0.4."""
    exposition = Exposition()
    exposition.add("a_total", 1, worker="x")
    exposition.add("b", 2.5)
    exposition.add("a_total", 12345678901, worker='y"\\\n')
    assert exposition.text().splitlines() == [
        "# TYPE a_total counter",
        'a_total{worker="x"} 1',
        'a_total{worker="y\\"\\\\\\n"} 12345678901',
        "# TYPE b gauge",
        "b 2.5",
    ]


def test_a_worker_is_known_by_its_whole_command():
    """A foreign process, or one of another run directory, is never taken for ours."""
    config = read("run_dir: /run/x\nworkers: 2\nqueue_base: 4\ngso: off").config
    listed = specs(config)
    assert [spec.name for spec in listed] == ["datapath-0", "datapath-1", "l7proxy-0"]
    assert all(is_worker(spec.arguments, config.run_dir) for spec in listed)
    assert not is_worker(listed[0].arguments, config.state_dir)
    assert not is_worker(("-m", "http.server", "--run-dir", "/run/x"), config.run_dir)
    assert not is_worker((), config.run_dir)
    text = " ".join(listed[1].arguments)
    assert "--number 1 --bank 0 --queue 5" in text
    assert "--no-gso" in text


@pytest.mark.parametrize(
    ("text", "ago_s"), [("45s", 45), ("1h30m", 5400), ("2m", 120), ("0.5s", 0.5), ("1h43", 6180)]
)
def test_times_may_be_given_as_how_long_ago(text, ago_s):
    """As `hubble observe --since` takes them."""
    now_ns = 10**19
    assert _time({"since": text}, "since", now_ns) == now_ns - int(ago_s * 10**9)


@pytest.mark.parametrize("text", ["", "yesterday", "5", "1s2h"])
def test_a_time_that_is_none_is_refused_with_the_form(text):
    """The message says what can be written."""
    with pytest.raises(FilterError, match="how long ago: 1h30m"):
        _time({"since": text}, "since", 0)


def test_a_flood_of_flows_is_bounded_and_a_quiet_second_refills():
    """Twice the rate in a burst, then the rate."""
    allowance = Allowance(100)
    assert allowance.take(1000, 1.0) == 200
    assert allowance.take(1000, 1.0) == 0
    assert allowance.take(1000, 1.5) == 50
    assert allowance.take(10, 2.5) == 10
    assert allowance.take(1000, 99.0) == 200
