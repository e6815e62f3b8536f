"""What can be said of the kernel's files and of failing commands without a kernel."""

import pytest

from firewall.datapath import kernel
from firewall.datapath.kernel import KernelError, QueueCounters, read_queues


def test_the_queues_counters_are_read_by_number(tmp_path):
    file = tmp_path / "nfnetlink_queue"
    file.write_text(
        "    7  31415     3 2   256    11    12     9999  1\n"
        "    0  31414     0 2   256     0     0        5  1\n"
    )
    assert read_queues(file) == (
        QueueCounters(
            queue=0, depth=0, kernel_dropped=0, user_dropped=0, packet_count=5, reader=31414
        ),
        QueueCounters(
            queue=7, depth=3, kernel_dropped=11, user_dropped=12, packet_count=9999, reader=31415
        ),
    )


def test_a_command_that_cannot_be_run_is_an_error_of_the_kernels_kind(tmp_path):
    """Whatever the reason: who keeps the rules in order tries again, and does not end."""
    file = tmp_path / "iptables"
    file.write_bytes(b"\x7fELF of another world")
    file.chmod(0o755)
    with pytest.raises(KernelError, match="Exec format error"):
        kernel._run([str(file), "-L"])


def test_a_kernel_without_queues_says_what_would_mend_it(tmp_path):
    with pytest.raises(KernelError, match="CONFIG_NETFILTER_NETLINK_QUEUE"):
        read_queues(tmp_path / "absent")


def test_a_missing_program_names_its_package(monkeypatch):
    with pytest.raises(KernelError, match="command not found") as caught:
        kernel._run(["ipset-that-is-not-there", "save"])
    assert caught.value.command == "ipset-that-is-not-there save"
    assert "iptables" in caught.value.remedy


def test_a_failing_command_shows_what_it_said_and_the_line_it_meant():
    script = "echo 'iptables-restore: line 2 failed' >&2; exit 1"
    with pytest.raises(KernelError) as caught:
        kernel._run(["sh", "-c", script], "*mangle\n-A X -j Y\nCOMMIT\n")
    assert "line 2 failed" in caught.value.reason
    assert "[line 2: -A X -j Y]" in caught.value.reason


def test_a_lack_of_rights_is_named():
    with pytest.raises(KernelError, match="run as root"):
        kernel._run(["sh", "-c", "echo 'Operation not permitted' >&2; exit 2"])


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("0:\tfrom all lookup local", (0, "", "local")),
        (
            "17953:\tfrom all fwmark 0x2000000/0xff000000 lookup 17953",
            (17953, "0x2000000/0xff000000", "17953"),
        ),
    ],
)
def test_a_routing_rule_is_recognised(line, read):
    assert kernel._rule_words(line) == read
