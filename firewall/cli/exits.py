"""What the exit code of `bartizan` means; the same in every command."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Documented in docs/cli.md; scripts depend on them."""

    OK = 0
    FAILED = 1
    """The thing asked about is not well, or the agent refused."""
    USAGE = 2
    """The command line or the configuration is wrong (click's own code)."""
    UNABLE = 3
    """The machine cannot: no agent, no NFQUEUE, no permission."""
    INVALID = 4
    """A policy, endpoint, test or capture file is invalid."""
    NOTHING_SELECTED = 5
    """`bartizan test`: no check is selected."""
    DISAGREEMENT = 6
    """`bartizan test`: the model and real packets disagree."""
