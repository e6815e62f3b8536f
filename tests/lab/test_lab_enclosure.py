"""What a user is told who may not have an enclosure."""

import errno

import pytest

from lab import enclosure

REFUSED = PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize(
    ("setting", "value", "command"),
    [
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        (
            "/proc/sys/kernel/unprivileged_userns_clone",
            "0",
            "sudo sysctl -w kernel.unprivileged_userns_clone=1",
        ),
        (
            "/proc/sys/user/max_user_namespaces",
            "0",
            "sudo sysctl -w user.max_user_namespaces=1000",
        ),
    ],
)
def test_the_setting_that_forbids_is_named_with_the_command_that_allows(
    monkeypatch, setting, value, command
):
    """Ubuntu's AppArmor, Debian's patch, and the limit of every kernel."""
    monkeypatch.setattr(enclosure, "_read", {setting: value}.get)
    assert enclosure.why_not(REFUSED).splitlines()[-1].strip() == command


def test_without_such_a_setting_a_container_is_the_likely_reason(monkeypatch):
    """Docker's seccomp profile answers EPERM and leaves no trace in /proc."""
    monkeypatch.setattr(enclosure, "_read", {}.get)
    assert "--privileged" in enclosure.why_not(REFUSED)
