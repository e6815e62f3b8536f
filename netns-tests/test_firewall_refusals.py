"""What is wrong is refused with words that help, and changes nothing."""

import http
import os
from pathlib import Path

import pytest
from netfilterqueue import NetfilterQueue
from rules import peers, policy, ports
from traffic import delivered, eventually, token, udp

from lab.daemon import ApiRefused, Bartizan, command
from lab.laboratory import LabError


@pytest.fixture
def two(lab, bartizan):
    made = lab(a="app=a", b="app=b")
    made.firewall = bartizan(made)
    return made


def test_an_address_belongs_to_one_endpoint(two):
    """The second claim is refused with a conflict that names the first; the first keeps it."""
    a = two.host("a")
    with pytest.raises(ApiRefused) as caught:
        two.firewall.put("/v1/endpoint/thief", {"addresses": [a.address4], "labels": ["app=b"]})
    assert caught.value.status in (http.HTTPStatus.CONFLICT, http.HTTPStatus.UNPROCESSABLE_ENTITY)
    message = str(caught.value)
    assert a.address4 in message
    assert "a" in message
    assert two.firewall.endpoint("a")["addresses"]["ipv4"] == [a.address4]
    with pytest.raises(ApiRefused) as absent:
        two.firewall.endpoint("thief")
    assert absent.value.status == http.HTTPStatus.NOT_FOUND


def test_a_policy_with_a_mistake_changes_nothing_and_says_where_it_is(two):
    """422 with file:line:column; the revision in force stays."""
    before = two.firewall.get("/v1/policy")["revision"]
    broken = policy("app=b", ingress=[{**peers("app=a"), **ports("99999/TCP")}])
    with pytest.raises(ApiRefused) as caught:
        two.firewall.apply(broken, "broken.yaml")
    assert caught.value.status == http.HTTPStatus.UNPROCESSABLE_ENTITY
    assert "broken.yaml:" in str(caught.value)
    assert two.firewall.get("/v1/policy")["revision"] == before
    a, b = two.host("a"), two.host("b")
    payload = token()
    delivered(a, b, udp(a, b, 53, payload), payload)


def test_a_second_daemon_in_one_namespace_is_refused(two):
    """Two would fight over queues and rules; the first goes on undisturbed."""
    done = two.node.run(
        [*command(), "run", "-c", two.firewall.config_path], env=two.firewall.environment
    )
    assert done.returncode not in (0, None)
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    a, b = two.host("a"), two.host("b")
    payload = token()
    delivered(a, b, udp(a, b, 53, payload), payload)


def _config(folder) -> Path:
    path = folder / "bartizan.yaml"
    path.write_text(f"run_dir: {folder}/run\nstate_dir: {folder}/state\nworkers: 1\n")
    return path


def test_without_the_right_to_change_the_network_the_daemon_says_so(lab, tmp_path):
    """CAP_NET_ADMIN taken away: exit 3, one reason, no rule and no worker left behind."""
    made = lab(a="")
    without = ["setpriv", "--inh-caps=-all", "--bounding-set=-net_admin"]
    done = made.node.run([*without, *command(), "run", "-c", _config(tmp_path)])
    assert done.returncode == 3
    assert "CAP_NET_ADMIN" in done.stderr or "root" in done.stderr
    assert "Traceback" not in done.stderr
    eventually(lambda: not made.node.netns.processes(), "every process has ended")


@pytest.mark.needs("nfqueue")
@pytest.mark.parametrize("number", [0, 1])
def test_a_queue_that_somebody_else_holds_is_named_and_nothing_is_left(lab, number):
    """Exit 3, long before a start is given up; also if it is only one of two that is held."""
    made = lab(a="")
    holder = made.node.netns.within(NetfilterQueue)
    made.node.netns.within(lambda: holder.bind(number, lambda packet: packet.drop()))
    try:
        with pytest.raises(LabError, match="ended with exit 3") as caught:
            Bartizan(made, {"workers": 2}).start()
    finally:
        holder.unbind()
    assert f"queue {number} is read by process {os.getpid()} (" in str(caught.value)
    assert "set queue_base to another number" in str(caught.value)
    assert "BARTIZAN" not in made.node.run(["iptables-save"]).stdout
    eventually(lambda: not made.node.netns.processes(), "every process has ended")


def test_a_configuration_mistake_has_file_line_and_column(lab, tmp_path):
    """Exit 2 before anything was touched."""
    made = lab(a="")
    config = tmp_path / "bartizan.yaml"
    config.write_text("workers: 1\nworkerz: 2\n")
    done = made.node.run([*command(), "run", "-c", config])
    assert done.returncode == 2
    assert f"{config}:2:" in done.stderr
    assert "NFQUEUE" not in made.node.run(["iptables-save"]).stdout


def test_an_unreachable_agent_is_said_with_the_next_step(lab):
    """Exit 3, as every command documents it."""
    made = lab(a="")
    done = made.node.run([*command(), "--api-socket", "/run/nobody.sock", "status"])
    assert done.returncode == 3
    assert "bartizan run" in done.stderr
