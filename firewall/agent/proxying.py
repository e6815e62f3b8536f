"""Settings of the proxy in the configuration: read as they are written, checked as it would.

The proxy knows its settings (`l7proxy.limits`) and its log's operators (`l7proxy.logformat`); what
it would refuse when it starts is refused here, with the place.
"""

import json
from dataclasses import fields

import yaml

from conntrack.address import parse_address
from firewall.agent.document import Place, Reader, Value
from l7proxy.limits import LimitError, Limits, override
from l7proxy.logformat import ENCODINGS, FormatError, compile_format

__all__ = ["ENCODINGS", "admin_problem", "check_format", "read_format", "read_limits"]

_LOOPBACK6 = bytes(15) + b"\x01"


def read_limits(reader: Reader, given: Value) -> tuple[str, ...]:
    """Read settings as a mapping, or as a list of name=value; return `name=value` each."""
    found: list[tuple[Place, str]] = []
    if isinstance(given.node, yaml.MappingNode):
        for name, entry in reader.mapping(given, [one.name for one in fields(Limits)]).items():
            several = isinstance(entry.node, yaml.SequenceNode)
            text = ",".join(reader.texts(entry)) if several else reader.text(entry)
            found.append((entry.place, f"{name}={text}"))
    else:
        found = [(entry.place, reader.text(entry)) for entry in reader.items(given)]
    kept: list[str] = []
    for place, assignment in found:
        try:
            override(Limits(), [assignment])
        except LimitError as error:
            reader.note(place, str(error))
        else:
            kept.append(assignment)
    return tuple(kept)


def read_format(reader: Reader, given: Value) -> str:
    """Read a format: text, or a mapping of formats, which is returned as JSON."""
    if not isinstance(given.node, yaml.MappingNode):
        return reader.text(given)
    names = [str(key.value) for key, _ in given.node.value]
    return json.dumps(
        {name: reader.text(entry) for name, entry in reader.mapping(given, names).items()}
    )


def admin_problem(text: str) -> str:
    """Return why the admin page cannot be served there, "" if it can: on loopback only."""
    if text in {"socket", "off"}:
        return ""
    host, _, port = text.rpartition(":")
    try:
        packed = parse_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        packed = b""
    local = packed[:1] == b"\x7f" if len(packed) == 4 else packed == _LOOPBACK6
    if not (local and port.isdigit() and 0 < int(port) < 65536):
        return f"{text!r}: socket, off, or a loopback address with a port, such as 127.0.0.1:9901"
    return ""


def check_format(reader: Reader, place: Place, text: str, encoding: str) -> None:
    """Note what is wrong with a format; an unknown encoding is noted elsewhere."""
    if encoding in ENCODINGS:
        try:
            compile_format(text, encoding)
        except FormatError as error:
            reader.note(place, str(error))
