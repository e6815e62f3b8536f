"""Counters under Envoy's names, in its three forms."""

import json
import re

from http_transcript import Script, snapshot

from l7proxy.commands import Log
from l7proxy.metrics import BUCKETS_MS, Metrics
from l7proxy.stats import as_json, as_prometheus, as_text, chosen, gather

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def records(*events):
    """What is recorded of these events, a quarter of a second from one to the next."""
    script = Script(snapshot())
    for event, *arguments in events:
        script.perform(event, *arguments)
        script.now += 0.25
    return [command.record for command in script.commands if isinstance(command, Log)]


def get(path=b"/public/a"):
    return b"GET %b HTTP/1.1\r\nHost: svc\r\n\r\n" % path


def worker():
    metrics = Metrics()
    metrics.opened()
    metrics.upstream_opened()
    metrics.add("http_downstream_cx_idle_timeout")
    for record in records(
        ("client_data", get(b"/admin")),
        ("client_data", get()),
        ("upstream_opened",),
        ("upstream_data", OK),
        ("client_data", b"GET /\r\n"),
    ):
        metrics.observe(record)
    return [*metrics.rows(), *metrics.histograms()]


def test_workers_are_added_up_under_envoys_dotted_names():
    stats, times = gather([worker(), worker()])
    values = {stat.name: stat.value for stat in stats}
    assert values["http.bartizan.downstream_cx_total"] == 2
    assert values["http.bartizan.downstream_cx_active"] == 2
    assert values["http.bartizan.downstream_cx_idle_timeout"] == 2
    assert values["http.bartizan.downstream_rq_total"] == 6
    assert values["http.bartizan.downstream_rq_completed"] == 6
    assert values["http.bartizan.downstream_rq_http1_total"] == 6
    assert values["http.bartizan.downstream_rq_2xx"] == 2
    assert values["http.bartizan.downstream_rq_4xx"] == 4
    assert values["http.bartizan.cilium.l7policy.denied"] == 2
    assert values["cilium.access_denied"] == 2
    assert values["cluster.original_dst.upstream_rq_total"] == 2
    assert values["cluster.original_dst.upstream_rq_2xx"] == 2
    assert values["http.bartizan.downstream_rq_active"] == 0
    assert values["cluster.original_dst.upstream_cx_total"] == 2
    time = next(one for one in times if one.name == "http.bartizan.downstream_rq_time")
    assert time.buckets[-1] == 6
    # Half a second for the answered one; the two others were answered at once.
    assert time.sum_ms == 1000.0
    assert time.buckets[BUCKETS_MS.index(250)] == 4


def test_questions_of_dns_are_none_of_http():
    labels = {"proxy_type": "fqdn", "rule": "denied"}
    (stat,), _ = gather([[{"name": "policy_l7_total", "labels": labels, "value": 3}]])
    assert (stat.name, stat.value) == ("dns.l7policy.denied", 3)


def test_the_prometheus_form_has_envoys_names_labels_and_whole_histograms():
    text = as_prometheus(*gather([worker()]))
    prefix = 'envoy_http_conn_manager_prefix="bartizan"'
    assert f"envoy_http_downstream_rq_total{{{prefix}}} 3\n" in text
    assert f'envoy_http_downstream_rq_xx{{{prefix},envoy_response_code_class="4"}} 2\n' in text
    assert 'envoy_cluster_upstream_cx_total{envoy_cluster_name="original_dst"} 1\n' in text
    cluster = 'envoy_cluster_name="original_dst",envoy_response_code_class="2"'
    assert f"envoy_cluster_upstream_rq_xx{{{cluster}}} 1\n" in text
    assert "envoy_cilium_access_denied 1\n" in text
    assert f'envoy_http_downstream_rq_time_bucket{{{prefix},le="+Inf"}} 3\n' in text
    assert "# TYPE envoy_http_downstream_rq_time histogram\n" in text
    assert "# TYPE envoy_http_downstream_cx_active gauge\n" in text
    kinds = re.findall(r"# TYPE (\S+) ", text)
    assert len(kinds) == len(set(kinds))
    for line in text.splitlines():
        assert line.startswith("# TYPE ") or re.fullmatch(
            r'[a-z0-9_]+(\{([a-z_]+="[^"]*",?)+\})? [0-9.e+-]+', line
        ), line


def test_text_and_json_say_the_same():
    stats, times = gather([worker()])
    assert "http.bartizan.downstream_rq_total: 3\n" in as_text(stats, times)
    rows = {row["name"]: row for row in json.loads(as_json(stats, times))["stats"]}
    assert rows["http.bartizan.downstream_rq_total"]["value"] == 3
    assert rows["http.bartizan.downstream_rq_time"]["count"] == 3


def test_a_filter_and_used_only_choose():
    metrics = Metrics()
    stats, times = gather([[*metrics.rows(), *metrics.histograms()]])
    assert chosen(stats, times, "", used_only=True) == ([], [])
    stats, times = gather([worker()])
    found, _ = chosen(stats, times, r"downstream_rq_\dxx$", used_only=True)
    assert [stat.name[-3:] for stat in found] == ["2xx", "4xx"]


def test_reset_counts_from_zero_and_keeps_what_is_active():
    metrics = Metrics()
    metrics.opened()
    metrics.add("http_downstream_cx_overflow")
    begun, ended = records(("client_data", get()), ("upstream_opened",), ("upstream_data", OK))
    metrics.observe(begun)
    metrics.reset()
    values = {row["name"]: row["value"] for row in metrics.rows()}
    assert values["http_downstream_cx_active"] == 1
    assert values["http_downstream_rq_active"] == 1
    assert "http_downstream_cx_overflow_total" not in values
    metrics.observe(ended)
    values = {row["name"]: row["value"] for row in metrics.rows()}
    assert values["http_downstream_rq_active"] == 0
