"""Settings: what can be set, and what is refused."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from l7proxy.limits import LimitError, Limits, override
from l7proxy.metrics import all_refusals
from l7proxy.secrets import SecretFiles

DOCS = Path(__file__).resolve().parents[2] / "docs" / "l7.md"


def test_settings_are_parsed_by_the_type_of_their_default():
    limits = override(
        Limits(),
        ["head_bytes=100", "linger_s=0.5", "request_id=false", "strip_headers=X-A, x-b",
         "escaped_twice=keep", "denied_body=No."],
    )  # fmt: skip
    assert (limits.head_bytes, limits.linger_s, limits.request_id) == (100, 0.5, False)
    assert limits.strip_headers == ("x-a", "x-b")
    assert override(Limits(), ["request_timeout_s=0"]).request_timeout_s == 0
    assert (limits.escaped_twice, limits.denied_body) == ("keep", "No.")


@pytest.mark.parametrize(
    "text",
    ["head_bytes", "nothing=1", "head_bytes=x", "head_bytes=0", "head_bytes=-1", "linger_s=inf",
     "linger_s=nan", "request_id=yes", "escaped_twice=maybe", "denied_body=a\r\nb",
     "h2_stream_bytes=65534", "h2_stream_bytes=2147483648", "h2_connection_bytes=1000"],
)  # fmt: skip
def test_other_settings_are_refused_by_name(text):
    with pytest.raises(LimitError, match=re.escape(text.split("=")[0])):
        override(Limits(), [text])


def test_every_setting_and_every_refusal_is_documented():
    text = DOCS.read_text(encoding="utf-8")
    for field in fields(Limits):
        assert f"`{field.name}`" in text, field.name
    for refusal in all_refusals():
        assert f"`{refusal.detail}`" in text, refusal.detail


def test_secret_is_a_files_content_and_names_cannot_leave_the_folder(tmp_path):
    (tmp_path / "ns").mkdir()
    (tmp_path / "ns" / "token").write_bytes(b"value\n")
    (tmp_path / "outside").write_bytes(b"x")
    secrets = SecretFiles(tmp_path / "ns" / "..")
    assert secrets("ns", "token") == b"value"
    assert secrets("ns", "absent") is None
    (tmp_path / "ns" / "empty").write_bytes(b"\n")
    assert secrets("ns", "empty") is None
    assert secrets("..", "outside") is None
    assert secrets("ns", "../outside") is None
    (tmp_path / "ns" / "token").write_bytes(b"other")
    assert secrets("ns", "token") == b"value"
    secrets.forget()
    assert secrets("ns", "token") == b"other"
