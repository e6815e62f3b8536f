"""What a setting is: a field of a configuration section that says what it means.

A section is a dataclass; each of its fields is made by `setting`, or is a section itself.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar, get_type_hints

from firewall.agent.document import Reader, Value

ENVIRONMENT_PREFIX = "BARTIZAN_"

T = TypeVar("T")


class Meaning(NamedTuple):
    """What the schema says about one setting besides type and default.

    Attributes:
        text: what it does, one sentence.
        unit: of a number, "" = it has none.
        minimum: least value.
        maximum: greatest value.
        words: values that are not a number but stand for one, or, for text, the only values.
        live: a reload (SIGHUP) applies it; others need a restart.
        shape: reads a value that is written in a shape of its own.
        item: reads one item of a list of mappings; None = that item is wrong.
    """

    text: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    words: Mapping[str, int] | tuple[str, ...] = ()
    live: bool = False
    shape: Callable[[Reader, Value], object] | None = None
    item: Callable[[Reader, Value], object | None] | None = None


class SettingRow(NamedTuple):
    """One setting of the schema: dotted path, type, default, meaning."""

    path: str
    kind: Any
    default: object
    meaning: Meaning

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return ENVIRONMENT_PREFIX + self.path.replace(".", "_").upper()


def setting(
    default: T,
    text: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    words: Mapping[str, int] | tuple[str, ...] = (),
    live: bool = False,
    shape: Callable[[Reader, Value], object] | None = None,
    item: Callable[[Reader, Value], object | None] | None = None,
) -> T:
    """Make the field of a setting; `Meaning` explains the arguments."""
    meaning = Meaning(text, unit, minimum, maximum, words, live, shape, item)
    return field(default=default, metadata={"meaning": meaning})


def settings(section: type, prefix: str = "") -> Iterator[SettingRow]:
    """Yield every setting of a section and its sections, in the order of the file."""
    hints = get_type_hints(section)
    for one in fields(section):
        path, kind = f"{prefix}{one.name}", hints[one.name]
        if isinstance(kind, type) and is_dataclass(kind):
            yield from settings(kind, f"{path}.")
        else:
            yield SettingRow(path, kind, one.default, one.metadata["meaning"])


def value(section: object, path: str) -> Any:
    """Return the value of a setting by its dotted path."""
    for name in path.split("."):
        section = getattr(section, name)
    return section
