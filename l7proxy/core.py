"""What all that decide about a client connection have in common: events in, commands out.

A core is told of events by method calls, `@event`, and returns the commands to perform, in order;
it knows no socket and no clock. Fail closed: an error of ours ends both sides, whatever it was.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from l7proxy import refusals
from l7proxy.commands import CloseClient, Command, Log, Record
from l7proxy.limits import Limits
from l7proxy.phase import CLOSED, Phase
from l7proxy.refusals import Refusal
from l7proxy.timer import Timer


class Core(ABC):
    """One client connection in one of its forms.

    Args:
        phase: what it begins with.
        limits: what a connection may use.
        now: monotonic seconds.
    """

    __slots__ = ("_commands", "_phase", "_timer")

    def __init__(self, phase: Phase, limits: Limits, now: float) -> None:
        self._phase = phase
        self._commands: list[Command] = []
        self._timer = Timer(limits, now)

    @property
    def deadline(self) -> float:
        """Monotonic time at which `tick` must be called, infinity if never."""
        return self._timer.deadline

    @abstractmethod
    def _settle(self) -> None:
        """Do what is to be done after each event."""

    @abstractmethod
    def _break_off(self, refusal: Refusal) -> None:
        """Record the refusal, and reset both sides."""

    def _close_client(self, *, reset: bool = False) -> None:
        self._phase = CLOSED
        self._timer.stop()
        self._commands.append(CloseClient(reset))

    def _log(self, record: Record) -> None:
        self._commands.append(Log(record))


_C = TypeVar("_C", bound=Core)
_P = ParamSpec("_P")


def event(
    step: Callable[Concatenate[_C, _P], None],
) -> Callable[Concatenate[_C, _P], list[Command]]:
    """Make an event method of a step: it returns the commands, and fails closed."""

    def method(self: _C, /, *args: _P.args, **kwargs: _P.kwargs) -> list[Command]:
        asked: list[Command] = []
        self._commands = asked
        if self._phase is CLOSED:
            return asked
        try:
            step(self, *args, **kwargs)
            self._settle()
        except Exception as error:  # noqa: BLE001 - whatever went wrong, nothing more may pass
            detail = f"internal_error{{{type(error).__name__}: {error}}}"
            self._break_off(refusals.INTERNAL._replace(status=0, detail=detail))
        return asked

    method.__doc__, method.__name__ = step.__doc__, step.__name__
    return method
