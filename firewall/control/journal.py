"""The log of the agent and of its workers: logfmt or JSON lines on standard error.

`log.info("worker started", extra=fields(kind="datapath", number=0))` becomes
`time=... level=info subsys=supervisor msg="worker started" kind=datapath number=0`. Under journald,
which stamps every line itself, the time is left out.
"""

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from typing import Any

_PLAIN = re.compile(r"[\w./:@%+,\-\[\]]+")
_LEVELS = {"WARNING": "warning", "CRITICAL": "error"}


def fields(**values: object) -> dict[str, Any]:
    """Return the `extra` of a log call that carries `values` as keys of the line."""
    return {"fields": values}


def configure(form: str, level: str, subsys: str = "") -> None:
    """Set the log up.

    Args:
        form: "logfmt" or "json".
        level: "debug", "info", "warning" or "error".
        subsys: who speaks, in every line; "" = the module that does.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(Json(subsys) if form == "json" else Logfmt(subsys))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    # aiohttp and asyncio tell their own stories at info and below.
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _values(record: logging.LogRecord, subsys: str) -> dict[str, object]:
    """Return a record's keys and values in the order of the line."""
    values: dict[str, object] = {}
    if "JOURNAL_STREAM" not in os.environ:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values["time"] = f"{stamp}.{int(record.msecs):03d}Z"
    values["level"] = _LEVELS.get(record.levelname, record.levelname.lower())
    values["subsys"] = subsys or record.name.rpartition(".")[2]
    values["msg"] = record.getMessage()
    extra = getattr(record, "fields", None)
    if isinstance(extra, Mapping):
        values.update(extra)
    return values


class Logfmt(logging.Formatter):
    """key=value, quoted where needed."""

    def __init__(self, subsys: str = "") -> None:
        super().__init__()
        self._subsys = subsys

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line, and its traceback below."""
        line = " ".join(
            f"{key}={_quote(value)}" for key, value in _values(record, self._subsys).items()
        )
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class Json(logging.Formatter):
    """One object per line."""

    def __init__(self, subsys: str = "") -> None:
        super().__init__()
        self._subsys = subsys

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one object, its traceback under `exception`."""
        values = _values(record, self._subsys)
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def _quote(value: object) -> str:
    """Quote what white space, quotes or control characters would break."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
