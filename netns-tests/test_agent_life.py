"""The life of the daemon: what it leaves, what it survives, what it refuses."""

import json
import os
import resource
import signal
import stat

import pytest
from evidence import alive, passes, workers
from traffic import eventually

from firewall.agent.daemon import UPKEEP_S
from lab.daemon import READY_S, command


def traces(node, run_dir):
    """Everything of ours that the node still has."""
    found = []
    for program in ("iptables-save", "ip6tables-save"):
        found += [line for line in node.run([program]).stdout.splitlines() if "BARTIZAN" in line]
    tables = node.run(["nft", "list tables"]).stdout.splitlines()
    found += [line for line in tables if "bartizan" in line]
    found += [line for line in node.run(["ipset", "list", "-n"]).stdout.splitlines() if line]
    for family in ("-4", "-6"):
        rules = node.run(["ip", family, "rule"]).stdout
        found += [line for line in rules.splitlines() if "fwmark" in line]
        found += node.run(["ip", family, "route", "show", "table", "17953"]).stdout.splitlines()
    found += [str(path) for path in run_dir.iterdir()]
    return found


def test_after_sigterm_nothing_is_left(two):
    """No chain, set, routing rule, socket file or process."""
    firewall = two.firewall
    pids = workers(firewall).values()
    assert traces(two.node, firewall.run_dir)
    assert firewall.stop() == 0
    assert traces(two.node, firewall.run_dir) == []
    assert not any(map(alive, pids))


def test_rules_of_others_are_left_as_they_are(two):
    """Only our chains and our jumps go."""
    theirs = ["-t", "mangle", "-A", "PREROUTING", "-p", "tcp", "--dport", "9", "-j", "ACCEPT"]
    two.node.run(["iptables", *theirs], check=True)
    two.firewall.stop()
    saved = two.node.run(["iptables-save", "-t", "mangle"]).stdout
    assert "--dport 9 -j ACCEPT" in saved


def test_rules_that_somebody_flushed_come_back(two):
    """A flushed firewall is open: it must not stay so."""
    for program in ("iptables", "ip6tables"):
        two.node.run([program, "-t", "mangle", "-F", "PREROUTING"], check=True)

    def restored():
        saved = two.node.run(["iptables-save", "-t", "mangle"]).stdout
        return "-A PREROUTING -j BARTIZAN-PREROUTING" in saved

    eventually(restored, "our jump is back")


def test_a_flush_of_the_whole_ruleset_is_noticed_at_once(two):
    """`nft flush ruleset`: what nftables.service begins with when it is restarted."""
    jump = "-A PREROUTING -j BARTIZAN-PREROUTING"

    def restored():
        programs = ("iptables-save", "ip6tables-save")
        saved = [two.node.run([program, "-t", "mangle"]).stdout for program in programs]
        tables = two.node.run(["nft", "list", "tables"]).stdout
        return all(jump in text for text in saved) and "table ip bartizan" in tables

    eventually(restored, "the rules are there")
    for _ in range(2):  # the second comes when the next look is as far away as it can be
        two.node.run(["nft", "flush", "ruleset"], check=True)
        eventually(restored, "our rules are back", within_s=UPKEEP_S / 2)
    passes(two)


def test_the_api_socket_is_for_its_group_and_the_state_for_root(two):
    """0660 and 0700, whatever the umask."""
    firewall = two.firewall
    assert stat.S_IMODE(firewall.api_socket.stat().st_mode) == 0o660
    assert stat.S_IMODE(firewall.state_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((firewall.run_dir / "datapath-0.sock").stat().st_mode) == 0o600


def test_a_second_daemon_is_told_the_first_ones_pid(two):
    """Exit 3; another run and state directory does not help."""
    firewall = two.firewall
    elsewhere = ["--set", f"run_dir={two.folder}/r2", "--set", f"state_dir={two.folder}/s2"]
    done = two.node.run([*command(), "run", "-c", firewall.config_path, *elsewhere])
    assert done.returncode == 3
    assert str(firewall.get("/v1/status")["agent"]["pid"]) in done.stderr
    passes(two)


def test_cleanup_removes_what_a_killed_agent_left(two):
    """Refused (exit 3) while a daemon runs, complete afterwards."""
    firewall = two.firewall
    pids = workers(firewall).values()
    clean = [*command(), "cleanup", "-c", firewall.config_path]
    refused = two.node.run(clean)
    assert refused.returncode == 3
    assert "stop it" in refused.stderr
    firewall.kill()
    assert traces(two.node, firewall.run_dir)
    done = two.node.run(clean)
    assert done.returncode == 0, done.stderr
    assert traces(two.node, firewall.run_dir) == []
    assert not any(map(alive, pids))


@pytest.mark.parametrize("name", ["endpoints", "policies"])
def test_a_state_file_cut_short_keeps_the_daemon_from_starting(two, name):
    """Exit 3 with the file's name and the way out; the file stays; the workers go on."""
    firewall = two.firewall
    pids = workers(firewall)
    firewall.kill()
    path = firewall.state_dir / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    done = two.node.run([*command(), "run", "-c", firewall.config_path])
    assert done.returncode == 3
    assert f"{path}: is cut short" in done.stderr
    assert "move it away" in done.stderr
    assert path.read_bytes() == whole[:-7]
    passes(two)
    path.write_bytes(whole)
    firewall.start()
    assert workers(firewall) == pids
    assert len(firewall.get("/v1/endpoint")) == 2


def test_sigusr1_writes_the_state_to_the_log(two):
    """For when the API does not answer."""
    firewall = two.firewall
    firewall.process.send_signal(signal.SIGUSR1)

    def dumped():
        lines = [line for line in firewall.log().splitlines() if "state: " in line]
        return lines and '\\"endpoints\\"' in lines[-1]

    eventually(dumped, "the state is in the log")


def test_a_node_that_cannot_list_its_links_is_followed_again(two):
    """Out of descriptors, the agent cannot ask for addresses; it says so, and asks again."""
    firewall, pid = two.firewall, two.firewall.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    two.node.run(["ip", "address", "add", "192.0.2.77/32", "dev", "lo"])
    eventually(lambda: "links not followed" in firewall.log(), "the trouble is in the log")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)

    def known():
        return {"prefix": "192.0.2.77/32", "identity": 1} in firewall.get("/v1/ipcache")

    eventually(known, "the new address is the node's own")
    assert firewall.process.poll() is None
    eventually(lambda: not firewall.get("/v1/status")["errors"], "the trouble is over")


def test_readiness_is_told_to_the_service_manager(lab, bartizan, tmp_path):
    """sd_notify: READY=1 once the snapshot is enforced, STOPPING=1 at the end."""
    import socket

    made = lab(a="app=a")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(READY_S)
        manager.bind(str(tmp_path / "notify"))
        os.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        try:
            firewall = bartizan(made, {"workers": 1})
        finally:
            del os.environ["NOTIFY_SOCKET"]
        assert manager.recv(4096).startswith(b"READY=1\nSTATUS=")
        firewall.stop()
        said = manager.recv(4096)
        while said.startswith(b"STATUS="):
            said = manager.recv(4096)
        assert said == b"STOPPING=1"


def test_an_unusable_machine_is_said_and_nothing_is_left(lab, tmp_path):
    """Without the privilege to change rules: exit 3 and the reason."""
    made = lab(a="app=a")
    config = tmp_path / "bartizan.yaml"
    config.write_text(json.dumps({"run_dir": f"{tmp_path}/r", "state_dir": f"{tmp_path}/s"}))
    drop = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    done = made.node.run([*drop, *command(), "run", "-c", config])
    assert done.returncode == 3
    assert "CAP_NET_ADMIN" in done.stderr
    assert "Traceback" not in done.stderr
