"""Lines of the log: one form for the agent and its workers."""

import json
import logging

from firewall.control.journal import Json, Logfmt, fields


def record(**values):
    made = logging.LogRecord("firewall.agent.engine", 30, "f", 1, 'it "works"', (), None)
    made.__dict__.update(fields(**values))
    return made


def test_a_log_line_is_logfmt_or_json():
    """Keys and values, quoted where white space or quotes would break them."""
    line = Logfmt().format(record(pid=7, error="no\nway", path="/a/b"))
    assert line.endswith(
        'level=warning subsys=engine msg="it \\"works\\"" pid=7 error="no\\nway" path=/a/b'
    )
    document = json.loads(Json().format(record(pid=7)))
    assert (document["msg"], document["pid"], document["level"]) == ('it "works"', 7, "warning")


def test_a_worker_is_named_in_its_lines():
    """Its modules are many, and say less than which worker it is."""
    assert " subsys=datapath-1 " in Logfmt("datapath-1").format(record())
    assert json.loads(Json("l7proxy-0").format(record()))["subsys"] == "l7proxy-0"
