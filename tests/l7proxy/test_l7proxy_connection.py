"""What the shell around an exchange can do."""

from typing import get_args

from l7proxy.commands import Command
from l7proxy.connection import ClientConnection


def test_every_command_can_be_performed():
    assert set(ClientConnection.PERFORM) == set(get_args(Command))
