"""The configuration: all errors at once with their places; flag, environment, file, default."""

from pathlib import Path

import pytest

from conntrack.address import parse_address
from firewall.agent.config import Config
from firewall.agent.document import DocumentError
from firewall.agent.lineup import specs
from firewall.agent.loading import needs_restart, read
from firewall.agent.setting import settings


def problems(text, **more):
    with pytest.raises(DocumentError) as caught:
        read(text, "bartizan.yaml", **more)
    return [str(problem) for problem in caught.value.problems]


def test_an_empty_file_gives_every_default():
    """Nothing must be written to begin."""
    loaded = read("")
    assert loaded.config == Config()
    assert set(loaded.sources.values()) == {"default"}


def test_every_error_is_reported_at_once_with_its_place():
    """file:line:column: path: message."""
    text = (
        "workers: many\n"
        "polcy: {}\n"
        "policy:\n"
        "  enforcement: sometimes\n"
        "  audit: perhaps\n"
        "proxy: {port: 70000}\n"
        "run_dir: relative\n"
        "labels: {filter: ['k9s:app', '!(']}\n"
        "endpoints:\n"
        "  - {name: a, addresses: [10.0.0.300]}\n"
    )
    found = problems(text)
    assert found == sorted(found, key=lambda line: [int(part) for part in line.split(":")[1:3]])
    assert found[1].startswith("bartizan.yaml:2:1: polcy: unknown setting 'polcy'; did you mean")
    places = {line.split(": ")[1]: line for line in found}
    assert places["workers"].startswith("bartizan.yaml:1:10: workers: expected a whole number")
    assert "or auto" in places["workers"]
    assert "'sometimes'" in places["policy.enforcement"]
    assert places["policy.audit"].startswith("bartizan.yaml:5:10: ")
    assert "70000 is outside 1-65535" in places["proxy.port"]
    assert "no absolute path" in places["run_dir"]
    assert any("k9s" in line for line in found)
    assert "item 1" in places["labels.filter"]
    assert places["endpoints[0].addresses[0]"].startswith("bartizan.yaml:10:27: ")
    assert len(found) == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("[1, 2]", "expected a mapping, got a list"),
        ("workers: 1\nworkers: 2", "workers is given twice; first at line 1"),
        ("---\nworkers: 1\n---\nworkers: 2", "a second document"),
        ("workers: [1]", "expected text, got a list"),
        ("labels: {filter: k8s:app}", "expected a list"),
        ("mark_mask: 0x0f0f0000", "contiguous"),
        ("identity: {grace_period_s: -1}", "outside 0-86400"),
        ("identity: {grace_period_s: nan}", "expected a number of seconds, got 'nan'"),
        ("identity: {grace_period_s: 1_0}", "expected a number of seconds, got '1_0'"),
        ("workers: 1_0", "expected a whole number of processes or auto, got '1_0'"),
        ("workers: 08", "expected a whole number of processes or auto, got '08'"),
        ("flows: {export: {max_bytes: 10}}", "10 is outside 4096 or more"),
        ("conntrack: {limit: 0}", "0 is outside 16-16777216"),
        (f"run_dir: /{'a' * 89}", "is 90 bytes long; at most 89"),
        ("cluster_name: a b", "'a b' is no cluster name"),
        ("cluster_name: ''", "'' is no cluster name"),
        ("x: !!python/object/apply:os.system [ls]", "unknown setting"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    """One wrong thing, one message."""
    assert any(message in problem for problem in problems(text))


def test_flag_beats_environment_beats_file_beats_default():
    """The order of strength, and where each value came from."""
    text = "node_name: file\ncluster_name: file\nworkers: 2\n"
    loaded = read(
        text,
        "bartizan.yaml",
        {"node_name": "flag"},
        {"BARTIZAN_NODE_NAME": "env", "BARTIZAN_CLUSTER_NAME": "env", "BARTIZAN_OTHER": "x"},
    )
    config = loaded.config
    assert (config.node_name, config.cluster_name, config.workers) == ("flag", "env", 2)
    assert loaded.sources["node_name"] == "flag"
    assert loaded.sources["cluster_name"] == "environment BARTIZAN_CLUSTER_NAME"
    assert loaded.sources["workers"] == "bartizan.yaml:3"
    assert loaded.sources["queue_base"] == "default"


def test_sections_lists_and_words_come_from_flags_too():
    """Every setting has a flag and a variable."""
    loaded = read(
        "",
        overrides={"policy.audit": "yes", "workers": "auto", "flows.export.path": "/tmp/f"},
        environment={"BARTIZAN_LABELS_FILTER": "k8s:app, !k8s:app.secret"},
    )
    assert loaded.config.policy.audit is True
    assert loaded.config.workers == 0
    assert loaded.config.flows.export.path == Path("/tmp/f")
    assert loaded.config.labels.filter == ("k8s:app", "!k8s:app.secret")


def test_a_wrong_flag_or_variable_is_named():
    """No line number, but the name that was used."""
    found = problems("", overrides={"polcy.audit": "on"}, environment={"BARTIZAN_WORKERS": "x"})
    assert any(
        p.startswith("--set polcy.audit: unknown setting") and "policy.audit" in p for p in found
    )
    assert any(p.startswith("BARTIZAN_WORKERS: ") for p in found)


def test_scalars_keep_the_type_of_their_setting():
    """YAML's `on`, `0755` and `1:30` change no type."""
    config = read("gso: off\nnode_name: 0755\ncluster_name: on\nmark_mask: 0xff0000").config
    assert config.gso is False
    assert config.node_name == "0755"
    assert config.cluster_name == "on"
    assert config.mark_mask == 0xFF0000


def test_endpoints_are_declared_inline():
    """The same words as in the API."""
    config = read("endpoints: [{name: a, addresses: [10.0.0.1], labels: {app: web}}]").config
    (declared,) = config.endpoints
    assert declared.addresses == (parse_address("10.0.0.1"),)
    assert "k8s:app=web" in declared.labels.strings()


def test_two_inline_endpoints_of_one_name_are_refused():
    """A name means one endpoint."""
    text = "endpoints:\n- {name: a, addresses: [10.0.0.1]}\n- {name: a, addresses: [10.0.0.2]}"
    assert problems(text) == [
        "bartizan.yaml:3:3: endpoints[1]: endpoint a is given twice; first at line 2"
    ]


def test_a_reload_tells_what_needs_a_restart():
    """Only settings marked live take effect at once."""
    old = read("workers: 1").config
    new = read("workers: 2\npolicy: {audit: on}\nproxy: {port: 99}").config
    assert needs_restart(old, new) == ("workers", "proxy.port")


def test_every_setting_has_a_meaning_and_one_variable():
    """The schema is complete."""
    rows = list(settings(Config))
    assert len({row.variable for row in rows}) == len(rows)
    assert all(row.meaning.text for row in rows)


def test_the_example_is_valid_and_says_the_defaults():
    """examples/bartizan.yaml shows every setting with its default value."""
    path = Path(__file__).resolve().parents[2] / "examples" / "bartizan.yaml"
    text = path.read_text()
    loaded = read(text, str(path))
    assert loaded.config == Config()
    mentioned = {row.path.rpartition(".")[2] for row in settings(Config)}
    assert all(f"{name}:" in text for name in mentioned)


@pytest.mark.parametrize(
    ("text", "share"), [("", 65_536), ("conntrack: {source_limit: 9}", 9)], ids=["auto", "given"]
)
def test_a_source_has_a_share_of_the_tracked_flows(text, share):
    """A quarter, unless something else is configured; every worker is told."""
    config = read(text).config
    assert config.conntrack.share == share
    for spec in specs(config):
        if spec.kind == "datapath":
            at = spec.arguments.index("--source-limit")
            assert spec.arguments[at + 1] == str(share)


def test_settings_of_the_proxy_are_a_mapping_and_checked_where_they_stand():
    text = (
        "proxy:\n"
        "  limits:\n"
        "    head_bytes: 8192\n"
        "    strip_headers: [X-A, x-b]\n"
        "  access_log_encoding: json\n"
        "  access_log_format: {code: '%RESPONSE_CODE%'}\n"
    )
    proxy = read(text, "f").config.proxy
    assert proxy.limits == ("head_bytes=8192", "strip_headers=X-A,x-b")
    assert proxy.access_log_format == '{"code": "%RESPONSE_CODE%"}'
    assert read("proxy: {limits: ['head_bytes=1']}", "f").config.proxy.limits == ("head_bytes=1",)
    wrong = (
        "proxy:\n"
        "  limits:\n"
        "    head_byte: 1\n"
        "    head_timeout_s: soon\n"
        "    underscore_names: maybe\n"
        "  access_log_format: '%NOPE%'\n"
    )
    with pytest.raises(DocumentError) as caught:
        read(wrong, "f")
    said = str(caught.value)
    assert "f:3:5: proxy.limits.head_byte: unknown setting" in said
    assert "did you mean head_bytes?" in said
    assert "f:4:21: proxy.limits.head_timeout_s: head_timeout_s=soon: not a number" in said
    assert "f:5:23: proxy.limits.underscore_names: underscore_names=maybe: one of allow" in said
    assert "f:6:22: proxy.access_log_format: %NOPE%: no such operator" in said
