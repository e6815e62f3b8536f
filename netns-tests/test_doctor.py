"""`bartizan doctor`: what it says of this machine, and of one whose kernel lacks something."""

import json
import os
import subprocess

import pytest
from traffic import eventually

from lab.daemon import command

NFQUEUE = """\
#!/bin/sh
rules="$(cat)"
case "$rules $*" in *NFQUEUE*)
    echo "Couldn't load target NFQUEUE: No such file or directory" >&2
    exit 2
esac
echo "$rules" | exec /usr/sbin/$(basename "$0") "$@"
"""
"""An iptables that answers as one does whose kernel has no such target."""


@pytest.fixture
def without_nfqueue(tmp_path):
    """The environment of a machine without the target."""
    for name in ("iptables", "ip6tables", "iptables-restore", "ip6tables-restore"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(NFQUEUE)
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


def examined(environment=None):
    """The exit code and the findings by name."""
    done = subprocess.run(
        [*command(), "doctor", "-o", "json"],
        check=False, capture_output=True, text=True, timeout=120, env=environment,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, {one["name"]: one for one in json.loads(done.stdout)}


@pytest.mark.needs("nfqueue", "nfqueue6", "tproxy", "socket", "connmark", "conntrack", "set", "nft")
def test_a_machine_that_has_everything_is_told_so():
    """The probes agree with the harness, which tries the same features in its own way."""
    code, findings = examined()
    assert code == 0
    for name in (
        "NFQUEUE via iptables", "TPROXY", "socket match", "ipset", "CONNMARK", "conntrack", "veth",
        "TPROXY and NFQUEUE behind NAT",
    ):  # fmt: skip
        assert findings[name]["state"] == "ok", findings[name]
    assert {"user namespaces", "capabilities", "IPv6"} <= findings.keys()


def test_what_the_kernel_lacks_is_named_with_its_cost_and_its_mend(without_nfqueue):
    """Exit 3; the other probes are made all the same."""
    code, findings = examined(without_nfqueue)
    assert code == 3
    assert findings["NFQUEUE via iptables"] == {
        "name": "NFQUEUE via iptables",
        "state": "missing",
        "detail": "Couldn't load target NFQUEUE: No such file or directory",
        "cost": "Bartizan cannot see a packet",
        "mend": "sudo modprobe nfnetlink_queue xt_NFQUEUE",
    }
    assert findings["veth"]["state"] == "ok"


def test_the_daemon_says_the_same_and_leaves_nothing(lab, without_nfqueue, tmp_path):
    """Exit 3 with the module's name; no chain, no worker."""
    made = lab(a="")
    config = tmp_path / "bartizan.yaml"
    config.write_text(f"run_dir: {tmp_path}/run\nstate_dir: {tmp_path}/state\nworkers: 1\n")
    done = made.node.run([*command(), "run", "-c", config], env=without_nfqueue)
    assert done.returncode == 3
    assert "modprobe xt_NFQUEUE" in done.stderr
    assert "Traceback" not in done.stderr
    assert "BARTIZAN" not in made.node.run(["iptables-save"]).stdout
    eventually(lambda: not made.node.netns.processes(), "every process has ended")
