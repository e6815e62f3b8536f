"""Agent and workers die, hang and come back: traffic is decided all the while."""

import os
import signal

from evidence import alive, passes, workers
from traffic import Echo, eventually, exchange, token


def test_killed_workers_come_back_with_the_same_snapshot(two):
    """kill -9 of every datapath worker; the kernel drops meanwhile."""
    firewall = two.firewall
    before = {key: pid for key, pid in workers(firewall).items() if key[0] == "datapath"}
    revision = firewall.get("/v1/status")["revision"]
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)

    def replaced():
        rows = [r for r in firewall.get("/v1/status")["workers"] if r["kind"] == "datapath"]
        return all(
            row["state"] == "running"
            and row["pid"] not in before.values()
            and row["revision"] == revision
            and row["restarts"] >= 1
            for row in rows
        )

    eventually(replaced, "both run again")
    passes(two)


def test_a_worker_that_hangs_is_replaced(two):
    """It runs and does not answer (SIGSTOP): after three unanswered questions it is killed."""
    firewall = two.firewall
    pid = workers(firewall)["datapath", 0]
    os.kill(pid, signal.SIGSTOP)

    def replaced():
        rows = firewall.get("/v1/status")["workers"]
        (row,) = (one for one in rows if (one["kind"], one["number"]) == ("datapath", 0))
        return row["state"] == "running" and row["pid"] != pid

    eventually(replaced, "another one runs", 90)
    eventually(lambda: not alive(pid), "the one that hung has ended")
    passes(two)


def test_traffic_goes_on_without_the_agent_and_the_next_one_adopts(two):
    """kill -9 of the agent: the same workers, endpoints and identities go on."""
    firewall = two.firewall
    a, b = two.host("a"), two.host("b")
    before = workers(firewall)
    identity = firewall.endpoint("a")["identity"]
    revision = firewall.get("/v1/status")["revision"]
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        connection = server.accept()
        firewall.kill()
        assert exchange(client, connection, token())
        passes(two)
        firewall.start()
        assert workers(firewall) == before
        assert all(row["adopted"] for row in firewall.get("/v1/status")["workers"])
        assert firewall.get("/v1/status")["revision"] >= revision
        assert firewall.endpoint("a")["identity"] == identity
        eventually(lambda: firewall.endpoint("a")["state"] == "ready", "its policy is enforced")
        assert exchange(client, connection, token())
    passes(two)


def test_a_worker_with_other_arguments_is_replaced_not_adopted(two):
    """The configuration changed while no agent was there."""
    firewall = two.firewall
    before = workers(firewall)
    firewall.kill()
    text = firewall.config_path.read_text()
    firewall.config_path.write_text(text.replace("workers: 2", "workers: 1\ncopy_range: 512"))
    firewall.start()
    after = workers(firewall)
    assert ("datapath", 1) not in after
    assert after["datapath", 0] != before["datapath", 0]
    eventually(lambda: not alive(before["datapath", 1]), "the surplus worker has ended")
    passes(two)


def test_a_damaged_snapshot_is_made_anew_above_what_workers_enforce(two):
    """Everything in it follows from other files; the damaged one is kept aside."""
    firewall = two.firewall
    revision = firewall.get("/v1/status")["revision"]
    firewall.kill()
    path = firewall.state_dir / "snapshot"
    path.write_bytes(path.read_bytes()[:100])
    firewall.start()
    assert firewall.get("/v1/status")["revision"] > revision
    assert len((firewall.state_dir / "snapshot.unusable").read_bytes()) == 100
    passes(two)
