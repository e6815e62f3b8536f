"""The part of the reader that makes checks: one by one, and from truth tables.

A table's row names who sends, its columns who is meant: `.` allowed, `X` denied, `-` not stated.
"""

from collections.abc import Iterator
from functools import partial

from conntrack.address import format_address, parse_address
from firewall.policy.readers.document import Value, shorten
from policytest.case import NODE, Check, Expected, Matrix
from policytest.traffic import (
    EXPECTED_FIELDS,
    TRAFFIC_FIELDS,
    read_expected,
    read_traffic,
)

CHECK_FIELDS = ("from", "to", *TRAFFIC_FIELDS, *EXPECTED_FIELDS)
MATRIX_FIELDS = (*TRAFFIC_FIELDS, "columns", "rows")

SIGNS = {".": True, "X": False}
"""What a cell expects; `-` states nothing."""


def read_expectations(value: Value, step: int) -> list[Check]:
    """Read the list `expect` of a step."""
    return [check for item in value.items() if (check := _check(item, step)) is not None]


def _check(value: Value, step: int) -> Check | None:
    fields = value.fields(CHECK_FIELDS)
    if not value.is_mapping:
        return None
    ends = []
    for name in ("from", "to"):
        if name not in fields:
            value.error(f"needs {name}: namespace/name, host:NAME, {NODE} or an address")
        elif (text := fields[name].text()) is not None:
            ends.append(entity(text))
    expected = read_expected(value, fields)
    destination = ends[-1] if ends else ""
    traffic = read_traffic(value, fields, partial(host_name, destination))
    if len(ends) != 2 or expected is None or traffic is None:
        return None
    return Check(step, ends[0], ends[1], traffic, expected, *value.mark)


def entity(text: str) -> str:
    """Return the name of one end of a check in its one form: addresses are written anew."""
    try:
        return format_address(parse_address(text))
    except ValueError:
        return text if "/" in text or ":" in text or text == NODE else f"default/{text}"


def host_name(title: str) -> str:
    """Return the HTTP host of an end: `b.x` for x/b, the name of a host, `[v6]` for an address."""
    try:
        address = parse_address(title)
    except ValueError:
        namespace, _, name = title.partition("/")
        return f"{name}.{namespace}" if name else title.removeprefix("host:")
    text = format_address(address)
    return f"[{text}]" if len(address) == 16 else text


def read_matrices(
    value: Value, step: int, hosts: tuple[str, ...]
) -> Iterator[tuple[Matrix, list[Check]]]:
    """Read the list `matrix` of a step.

    Args:
        value: the list.
        step: number of the step.
        hosts: titles of the hosts, which columns default to after the rows.
    """
    for number, item in enumerate(value.items()):
        fields = item.fields(MATRIX_FIELDS)
        if "rows" not in fields:
            if item.is_mapping:
                item.error('needs rows: {x/a: ".X"}')
            continue
        rows = {entity(name): row for name, row in fields["rows"].pairs().items()}
        columns = tuple(dict.fromkeys((*rows, *hosts)))
        if "columns" in fields:
            columns = tuple(entity(one.text() or "") for one in fields["columns"].items())
        matrix = None
        cells: list[Check] = []
        for column, destination in enumerate(columns):
            traffic = read_traffic(item, fields, partial(host_name, destination))
            if traffic is None:
                break
            matrix = matrix or Matrix(
                number=number, traffic=traffic, columns=columns, rows=tuple(rows)
            )
            for source, row in rows.items():
                sign = _signs(row, len(columns), report=column == 0)[column]
                if sign in SIGNS:
                    expected = Expected(SIGNS[sign])
                    place = row.mark
                    cells.append(
                        Check(step, source, destination, traffic, expected, *place, number)
                    )
        if matrix is not None:
            order = {name: at for at, name in enumerate(rows)}
            yield matrix, sorted(cells, key=lambda check: order[check.source])


def _signs(row: Value, wanted: int, *, report: bool) -> str:
    """Return a row's signs without spaces; as many as there are columns, wrong ones as `-`."""
    text = "" if row.is_null else getattr(row.node, "text", "")
    signs = "".join(text.split())
    strange = sorted(set(signs) - set(".X-"))
    if report and strange:
        row.error(f'"{shorten(text)}": {strange[0]!r} is no sign; write . allowed, X denied, -')
    elif report and len(signs) != wanted:
        row.error(f"has {len(signs)} signs for {wanted} columns")
    return signs[:wanted].ljust(wanted, "-")
