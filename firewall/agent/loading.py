"""Reads a configuration: strongest first, flags, the environment, the file, the defaults.

A flag is `--set policy.audit=on`, a variable `BARTIZAN_POLICY_AUDIT`. `Loaded.sources` remembers
where each value came from. Everything wrong is reported at once, each with its place.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, get_type_hints

from conntrack.address import format_address, parse_prefix
from firewall.agent.config import Config
from firewall.agent.declaration import check_unique
from firewall.agent.document import (
    DocumentError,
    Place,
    Problem,
    Reader,
    Value,
    scalar,
    sequence,
    unknown,
)
from firewall.agent.nodes import host_labels
from firewall.agent.proxying import admin_problem, check_format
from firewall.agent.setting import SettingRow, settings, value
from firewall.datapath.marks import Marks, MaskError
from firewall.identities.labels import LabelError, LabelFilter

T = TypeVar("T")

_RUN_DIR_BYTES = 107 - len("/datapath-127.sock")
"""unix(7): the path of a socket has 107 bytes at most; that is the longest name in the folder."""

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)")
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")

_CLUSTER_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""A Kubernetes label's value that is not empty: selectors could not hold another."""


class Loaded(NamedTuple):
    """A configuration and where each value came from, by dotted path of the setting."""

    config: Config
    sources: dict[str, str]


def load(path: Path | None, overrides: Mapping[str, str], environment: Mapping[str, str]) -> Loaded:
    """Read the file, if one is given, and lay environment and flags over it.

    Raises:
        DocumentError: with everything that is wrong.
    """
    text = ""
    if path is not None:
        try:
            text = path.read_text()
        except OSError as error:
            raise _unreadable(path, str(error.strerror)) from error
        except UnicodeDecodeError as error:
            raise _unreadable(path, f"not UTF-8: {error}") from error
    return read(text, str(path or ""), overrides, environment)


def read(
    text: str,
    file: str = "",
    overrides: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Loaded:
    """Read a configuration from text.

    Args:
        text: YAML, one document; empty = all defaults.
        file: its name in messages.
        overrides: flags, by dotted path of the setting.
        environment: variables; others than BARTIZAN_<SETTING> are ignored.

    Raises:
        DocumentError: with everything that is wrong.
    """
    reader = Reader()
    documents = reader.compose(text, file)
    for extra in documents[1:]:
        reader.note(extra.place, "a second document; a configuration is one")
    given: dict[str, Value] = {}
    if documents:
        _flatten(reader, documents[0], Config, "", given)
    sources = {path: f"{v.place.file}:{v.place.line}" for path, v in given.items()}
    known = {row.path: row for row in settings(Config)}
    for row in known.values():
        if row.variable in (environment or {}):
            given[row.path] = _outside(environment or {}, row.variable, row, row.variable)
            sources[row.path] = f"environment {row.variable}"
    for key in overrides or {}:
        place = Place(f"--set {key}")
        if key in known:
            given[key] = _outside(overrides or {}, key, known[key], place.file)
            sources[key] = "flag"
        else:
            reader.note(place, unknown("setting", key, known))
    values = {
        row.path: _convert(reader, given[row.path], row)
        for row in known.values()
        if row.path in given
    }
    config = _build(Config, "", values)
    _check(reader, config, given)
    reader.finish()
    return Loaded(config, {path: sources.get(path, "default") for path in known})


def needs_restart(old: Config, new: Config) -> tuple[str, ...]:
    """Return the settings that differ and that a reload cannot apply."""
    return tuple(
        row.path
        for row in settings(Config)
        if not row.meaning.live and value(old, row.path) != value(new, row.path)
    )


def _flatten(
    reader: Reader, section: Value, schema: type, prefix: str, given: dict[str, Value]
) -> None:
    """Gather the values of a section and its subsections by dotted path."""
    hints = get_type_hints(schema)
    for name, entry in reader.mapping(section, [one.name for one in fields(schema)]).items():
        if is_dataclass(hints[name]):
            _flatten(reader, entry, hints[name], f"{prefix}{name}.", given)
        else:
            given[f"{prefix}{name}"] = entry


def _outside(texts: Mapping[str, str], key: str, row: SettingRow, file: str) -> Value:
    """Make a value of a flag's or variable's text; lists are YAML lists or split at commas."""
    text, place = texts[key], Place(file)
    structured = row.meaning.item is not None
    if row.default != () or structured:
        documents = Reader().compose(text, file) if structured else []
        return documents[0] if documents else scalar(text, place)
    documents = Reader().compose(text, file) if text.lstrip().startswith("[") else []
    return documents[0] if documents else sequence(re.split(r"\s*,\s*", text.strip()), place)


def _build(schema: type[T], prefix: str, values: Mapping[str, object]) -> T:
    """Make a section's dataclass of what was read, with defaults for the rest."""
    found: dict[str, object] = {}
    for name, kind in get_type_hints(schema).items():
        if isinstance(kind, type) and is_dataclass(kind):
            found[name] = _build(kind, f"{prefix}{name}.", values)
        elif f"{prefix}{name}" in values:
            found[name] = values[f"{prefix}{name}"]
    return schema(**found)


def _convert(reader: Reader, given: Value, row: SettingRow) -> object:
    """Read one value by the type of its setting; the default stands in for what is wrong."""
    kind, meaning = row.kind, row.meaning
    if meaning.shape is not None:
        return meaning.shape(reader, given)
    if meaning.item is not None:
        items = [meaning.item(reader, entry) for entry in reader.items(given)]
        return tuple(entry for entry in items if entry is not None)
    if kind == tuple[str, ...]:
        return reader.texts(given)
    if kind is bool:
        return reader.boolean(given)
    text = reader.text(given)
    if kind in (int, float):
        return _number(reader, given.place, text, row)
    if kind in (Path, Path | None):
        if not text:
            return row.default
        if not Path(text).is_absolute():
            reader.note(given.place, f"{text!r} is no absolute path")
        return Path(text)
    if meaning.words and text not in meaning.words:
        reader.note(given.place, unknown("value", text, meaning.words))
    return text


def _number(reader: Reader, place: Place, text: str, row: SettingRow) -> object:
    """Read a number in the unit of its setting; integers may be hexadecimal."""
    meaning = row.meaning
    if isinstance(meaning.words, Mapping) and text in meaning.words:
        return meaning.words[text]
    # Not what Python takes as well: 1_0, surrounding space, digits of other scripts, inf.
    if row.kind is int and _INTEGER.fullmatch(text):
        number: float = int(text, 0)
    elif row.kind is float and _DECIMAL.fullmatch(text):
        number = float(text)
    else:
        words = "".join(f" or {word}" for word in meaning.words)
        noun = "a whole number" if row.kind is int else "a number"
        unit = f" of {meaning.unit}" if meaning.unit else ""
        reader.note(place, f"expected {noun}{unit}{words}, got {text!r}")
        return row.default
    low, high = meaning.minimum, meaning.maximum
    if not (low is None or number >= low) or not (high is None or number <= high):
        bounds = f"{low}" if high is None else f"{low or 0}-{high}"
        reader.note(place, f"{text} is outside {bounds}{' or more' if high is None else ''}")
        return row.default
    return number


def _check(reader: Reader, config: Config, given: Mapping[str, Value]) -> None:
    """Check what one setting alone does not show."""
    if problem := admin_problem(config.proxy.admin):
        reader.note(_of(given, "proxy.admin"), problem)
    check_format(
        reader,
        _of(given, "proxy.access_log_format"),
        config.proxy.access_log_format,
        config.proxy.access_log_encoding,
    )
    for number, expression in enumerate(config.labels.filter):
        try:
            LabelFilter((expression,))
        except LabelError as error:
            reader.note(given["labels.filter"].place, f"item {number}: {error}")
    try:
        host_labels(config.node, config.node_labels)
    except LabelError as error:
        reader.note(_of(given, "node_labels"), str(error))
    for number, text in enumerate(config.fqdn.cluster_cidrs):
        try:
            parse_prefix(text)
        except ValueError as error:
            reader.note(_of(given, "fqdn.cluster_cidrs"), f"item {number}: {error}")
    try:
        Marks(config.mark_mask)
    except MaskError as error:
        reader.note(_of(given, "mark_mask"), str(error))
    check_unique(reader, "node", config.nodes)
    check_unique(reader, "endpoint", config.endpoints)
    nodes = {address: node for node in config.nodes for address in node.addresses}
    for declaration in config.endpoints:
        for address in declaration.addresses:
            if (node := nodes.get(address)) is not None:
                text = f"{format_address(address)} belongs to node {node.name} already"
                reader.note(declaration.place, f"{text} (line {node.place.line})")
    size_bytes = len(os.fsencode(config.run_dir))
    if size_bytes > _RUN_DIR_BYTES:
        reader.note(
            _of(given, "run_dir"),
            f"is {size_bytes} bytes long; at most {_RUN_DIR_BYTES}, because sockets lie in it",
        )
    if not _CLUSTER_NAME.fullmatch(config.cluster_name):
        reader.note(
            _of(given, "cluster_name"),
            f"{config.cluster_name!r} is no cluster name: it is a label's value, at most 63 "
            "letters, digits, '-', '_' and '.'",
        )


def _of(given: Mapping[str, Value], path: str) -> Place:
    """Return the place of a setting, wherever it came from."""
    return given[path].place if path in given else Place("", path=path)


def _unreadable(path: Path, reason: str) -> DocumentError:
    """Say that the file cannot be read."""
    return DocumentError([Problem(Place(str(path)), f"cannot be read: {reason}")])
