"""Log lines: Envoy's default, every operator, JSON, what nobody can forge, and mistakes."""

import errno
import json

import msgspec
import pytest
from http_transcript import Script, snapshot
from hypothesis import given
from hypothesis import strategies as st

from firewall.policy.snapshot import HeaderMatchRow, HttpRuleRow
from l7proxy.accesslog import Ends, is_final
from l7proxy.commands import Log, Record, RecordKind
from l7proxy.logfile import AccessLog
from l7proxy.logformat import FormatError, Line, compile_format

A, B = bytes((10, 0, 1, 1)), bytes((10, 0, 2, 1))
ENDED_NS = 1_460_751_420_310_123_456
GET = b"GET /public/a?x HTTP/1.1\r\nHost: svc\r\n%b\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer: z\r\nVia: a\r\nVia: b\r\n\r\nhi"


def final(headers=b"", answer=OK, method=b"GET", rules=None, **limits):
    """The final record of one request, a quarter of a second after each step."""
    script = Script(snapshot(**({"rules": rules} if rules else {})), **limits)
    events = [("client_data", (GET % headers).replace(b"GET", method, 1)), ("upstream_opened",)]
    if answer:
        events.append(("upstream_data", answer))
    for event, *arguments in events:
        script.perform(event, *arguments)
        script.now += 0.25
    return [c.record for c in script.commands if isinstance(c, Log) and is_final(c.record)][-1]


def line(text, record, encoding="text", source=A, **more):
    about = Line(record, (source, 5000), (B, 80), 40001, 7, 9, ENDED_NS, "node")
    return compile_format(text, encoding)(about._replace(**more))


def test_the_default_is_envoys():
    record = final(b"User-Agent: curl\r\nX-Request-Id: abc\r\nX-Forwarded-For: ::1\r\n")
    assert line("", record) == (
        '[2016-04-15T20:16:59.810Z] "GET /public/a?x HTTP/1.1" 200 - 0 2 500 500 "::1" "curl" '
        '"abc" "svc" "10.0.2.1:80"\n'
    )


def test_no_header_stands_in_the_place_of_the_path():
    """Envoy's default shows X-ENVOY-ORIGINAL-PATH first, which only a proxy that rewrites sets."""
    assert '"GET /public/a?x HTTP/1.1"' in line("", final(b"X-Envoy-Original-Path: /forged\r\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("%START_TIME%", "2016-04-15T20:16:59.810Z"),
        ("%START_TIME(%Y/%m/%d %H:%M:%S)%", "2016/04/15 20:16:59"),
        ("%START_TIME(%s.%3f)%", "1460751419.810"),
        ("%START_TIME(%E6S %f %6f)%", "59.810123 810123456 810123"),
        ("%REQ(:METHOD)% %REQ(:PATH)% %REQ(:AUTHORITY)%", "GET /public/a?x svc"),
        ("%REQ(:SCHEME)% %DOWNSTREAM_REMOTE_PORT%", "http 5000"),
        ("%REQ(X-NONE)%|%REQ(X-None?User-Agent)%|%REQ(USER-AGENT):2%", "-|curl|cu"),
        ("%RESP(SERVER)% %RESP(via)% %RESP(none)% %TRAILER(x)%", "z a,b - -"),
        ("%PROTOCOL% %RESPONSE_CODE% %RESPONSE_FLAGS%", "HTTP/1.1 200 -"),
        ("%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS%", "via_upstream -"),
        ("%BYTES_RECEIVED% %BYTES_SENT%", "0 2"),
        ("%DURATION% %REQUEST_DURATION% %RESPONSE_DURATION%", "500 0 500"),
        ("%UPSTREAM_HOST% %UPSTREAM_LOCAL_ADDRESS%", "10.0.2.1:80 10.0.1.1:40001"),
        ("%DOWNSTREAM_REMOTE_ADDRESS%", "10.0.1.1:5000"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "10.0.1.1"),
        ("%DOWNSTREAM_LOCAL_ADDRESS%", "10.0.2.1:80"),
        ("%REQUESTED_SERVER_NAME% %UPSTREAM_TRANSPORT_FAILURE_REASON%", "- -"),
        ("%CONNECTION_ID% %STREAM_ID% %HOSTNAME%", "7 9 node"),
        ("%ROUTE_NAME%", "default/public"),
        ("%DYNAMIC_METADATA(cilium.l7policy:source_identity)%", "1001"),
        ("100%% %PROTOCOL%%%", "100% HTTP/1.1%"),
    ],
)  # fmt: skip
def test_every_operator_says_what_envoys_does(text, said):
    assert line(text, final(b"User-Agent: curl\r\n")) == said + "\n"


def test_what_is_not_known_is_a_dash_in_text_and_null_in_json():
    record = Record(RecordKind.REQUEST, None, "", "", "", "", 0, "DPE", "http1.codec_error")
    text = "%REQ(:PATH)% %ROUTE_NAME% %UPSTREAM_LOCAL_ADDRESS% %CONNECTION_TERMINATION_DETAILS%"
    assert line(text, record, upstream_port=0) == "- - - http1.codec_error\n"
    assert json.loads(line('{"path": "%REQ(:PATH)%"}', record, "json")) == {"path": None}


def test_json_keeps_types_and_names_in_their_order():
    said = line('{"b": "%RESPONSE_CODE%", "a": "%PROTOCOL%!", "t": "text"}', final(), "json")
    assert said == '{"b":200,"a":"HTTP/1.1!","t":"text"}\n'
    assert json.loads(line("", final(), "json"))["response_code_details"] == "via_upstream"


def test_an_ipv6_address_with_a_port_is_bracketed():
    said = line("%DOWNSTREAM_REMOTE_ADDRESS%", final(), source=bytes(15) + b"\x01")
    assert said == "[::1]:5000\n"


@given(st.binary(max_size=40), st.sampled_from(["text", "json"]))
def test_no_header_can_forge_a_line(value, encoding):
    """Whatever bytes: one line, ASCII, and the quotes around the value are the only ones."""
    record = msgspec.structs.replace(final(), request_fields=[(b"x", b"X", value)])
    text = '"%REQ(X)%"' if encoding == "text" else '{"x": "%REQ(X)%"}'
    said = line(text, record, encoding)
    assert said.isascii()
    assert said.count("\n") == 1
    assert all(character >= " " for character in said[:-1])
    if encoding == "text":
        assert said.count('"') == 2
    else:
        assert json.loads(said) == {"x": value.decode("latin-1")}


def test_the_value_of_a_secret_is_not_shown_nor_put_into_flow_records():
    match = HeaderMatchRow(name="X-Token", secret_namespace="n", secret_name="s", mismatch="LOG")
    rules = (HttpRuleRow(path="/public/.*", header_matches=(match,)), HttpRuleRow(path="/.*"))
    record = final(b"X-Token: hunter2\r\n", rules=rules, log_headers=("x-token",))
    assert line("%REQ(X-Token)% %REQ(X-TOKEN?:PATH)%", record) == "[redacted] [redacted]\n"
    assert record.headers == (("x-token", "[redacted]"),)


@pytest.mark.parametrize(
    ("text", "encoding", "why"),
    [
        ("%NOPE%", "text", "no such operator; there are .*BYTES_SENT"),
        ("a %REQ(X", "text", "at character 3"),
        ("50% off", "text", "%% for a percent sign"),
        ("%REQ%", "text", "a header's name"),
        ("%REQ(a b)%", "text", "a header's name"),
        ("%REQ(a?b?c)%", "text", "NAME\\?OTHER"),
        ("%PROTOCOL(x)%", "text", "takes no argument"),
        ("%START_TIME(%Q)%", "text", "'%Q' is none of strftime's"),
        ("%DYNAMIC_METADATA(x:y)%", "text", "there are cilium.l7policy:allowed"),
        ("%PROTOCOL%", "json", "not a JSON object"),
        ('{"a": 1}', "json", "values are format strings"),
        ('{"a": "%NOPE%"}', "json", "no such operator"),
    ],
)
def test_a_format_that_cannot_be_used_is_refused_with_the_reason(text, encoding, why):
    with pytest.raises(FormatError, match=why):
        compile_format(text, encoding)


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "access.log"
    log = AccessLog(path, compile_format("%STREAM_ID%"), "node")
    ends = Ends(A, 1, B, 2)

    class Full:
        """As a disk with room for three bytes, of which a write(2) takes what fits."""

        room = 3

        def __init__(self, file):
            self.file = file

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def fileno(self):
            return self.file.fileno()

    whole = log._file
    monkeypatch.setattr(log, "_file", Full(whole))
    for _ in range(3):  # "1", "2" and "3", each with its end: "2" is cut
        log.write(final(), ends, 0)
    log.flush()
    assert log.lost_count == 2
    log.write(final(), ends, 0)
    log.flush()
    assert log.lost_count == 3
    assert log.problem == f"access log {path}: No space left on device"
    monkeypatch.setattr(log, "_file", whole)
    log.write(final(), ends, 0)
    log.close()
    assert path.read_text() == "1\n2\n5\n"
    assert log.problem == ""


def test_a_log_whose_folder_is_missing_begins_when_it_is_there(tmp_path):
    path = tmp_path / "logs" / "access.log"
    log = AccessLog(path, compile_format("%STREAM_ID%"), "node")
    assert log.problem == f"access log {path}: No such file or directory"
    log.write(final(), Ends(A, 1, B, 2), 0)
    log.flush()
    log.follow()
    assert log.lost_count == 1
    path.parent.mkdir()
    log.follow()
    log.write(final(), Ends(A, 1, B, 2), 0)
    log.close()
    assert path.read_text() == "2\n"
    assert log.problem == ""


def test_a_log_that_was_moved_away_goes_on_in_a_new_file(tmp_path):
    """As logrotate does it; what was written before stays in the old one."""
    path = tmp_path / "access.log"
    log = AccessLog(path, compile_format("%STREAM_ID%"), "node")
    ends = Ends(A, 1, B, 2)
    log.write(final(), ends, 0)
    log.follow()
    log.write(final(), ends, 0)
    path.rename(tmp_path / "access.log.1")
    log.follow()
    log.write(final(), ends, 0)
    log.close()
    assert (tmp_path / "access.log.1").read_text() == "1\n2\n"
    assert path.read_text() == "3\n"
