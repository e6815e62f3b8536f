"""The adversarial HTTP corpus against the core: what the server would have got, read strictly.

The same cases run against a live proxy in netns-tests/test_l7proxy_corpus.py.
"""

import base64
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from header_corpus import HEADER_RULES, NOT_EXPRESSIBLE
from http_transcript import Script, snapshot

from l7proxy.commands import (
    CloseClient,
    CloseUpstream,
    OpenUpstream,
    SendClient,
    SendUpstream,
    ShutdownClient,
)

CORPUS = Path(__file__).resolve().parents[2] / "../shared/corpus/http"


def cases(name):
    path = CORPUS / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


needs_corpus = pytest.mark.skipif(
    not (CORPUS / "common.py").exists(), reason=f"{CORPUS} is not here"
)


def common():
    """The corpus's own strict reader of requests and its reading of the policy."""
    if "http_corpus_common" not in sys.modules:
        spec = importlib.util.spec_from_file_location("http_corpus_common", CORPUS / "common.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["http_corpus_common"] = module
        spec.loader.exec_module(module)
    return sys.modules["http_corpus_common"]


class Played:
    """A case played to its end: the server answers every complete request that it can read."""

    def __init__(self, segments, source, **limits) -> None:
        self.script = Script(source, **limits)
        self.client = b""
        self.servers = []
        self.ended = False
        for segment in segments:
            if segment and not self.ended:
                self._apply(self.script.perform("client_data", segment))

    def _apply(self, commands) -> None:
        for command in commands:
            match command:
                case SendClient(data):
                    self.client += data
                case OpenUpstream():
                    self.servers.append(common().Strict())
                    self._apply(self.script.perform("upstream_opened"))
                case SendUpstream(data):
                    for _ in self.servers[-1].feed(data):
                        reply = b"HTTP/1.1 200 OK\r\nX-Upstream: 1\r\nContent-Length: 0\r\n\r\n"
                        self._apply(self.script.perform("upstream_data", reply))
                case ShutdownClient() | CloseClient():
                    self.ended = True
                case CloseUpstream():
                    pass

    @property
    def requests(self):
        return [request for server in self.servers for request in server.reqs]

    @property
    def classes(self):
        """The answers, as the corpus calls them."""
        found = []
        for status, rest in re.findall(
            rb"HTTP/1\.1 (\d\d\d)[^\r]*\r\n((?:[^\r]+\r\n)*)\r\n", self.client
        ):
            if b"X-Upstream" in rest:
                found.append("forward")
            elif status == b"403":
                found.append("403")
            elif status != b"100":
                found.append("400-close")
        return found


def segments(case):
    if "segments" in case:
        return [base64.b64decode(segment["b64"]) for segment in case["segments"]]
    if "recipe" in case:
        return [base64.b64decode(part["b64"]) * part["repeat"] for part in case["recipe"]]
    return [base64.b64decode(case["bytes_b64"])]


@needs_corpus
@pytest.mark.parametrize("case", cases("h1_corpus.jsonl"), ids=lambda case: case["id"])
def test_server_never_reads_what_the_policy_denies(case):
    """P1 to P4 of the corpus: allowed, canonical, not too many, and the first answer is right."""
    played = Played(segments(case), snapshot())
    for server in played.servers:
        assert server.err is None
        assert not server.warn
    for request in played.requests:
        assert common().policy_ok(request), request
        assert common().normalise(request["target"]) == request["target"].partition("?")[0]
    assert len(played.requests) <= max(1, case["upstream_max_requests"])
    accepted = set(case["accept_first"])
    if "either-reject" in accepted:
        accepted |= {"400-close", "403"}
    first = played.classes[0] if played.classes else "no-answer"
    if first == "no-answer" and not played.ended:  # more bytes or the timeout would decide
        assert accepted & {"forward", "no-answer", "forward-aborted"} or (
            case["category"] == "resource"
        )
    else:
        assert first in accepted or (case["category"] == "resource")
    if isinstance(case["expect"], list):
        for wanted, got in zip(case["expect"], played.classes, strict=False):
            assert not (wanted == "403" and got == "forward")


@needs_corpus
@pytest.mark.parametrize(
    "case",
    [case for case in cases("h1_header_policy.jsonl") if case["id"] not in NOT_EXPRESSIBLE],
    ids=lambda case: case["id"],
)
def test_header_rules_are_held_against_what_the_server_gets(case):
    secrets = {("default", "token"): b"secret"}
    played = Played(
        segments(case),
        snapshot(HEADER_RULES),
        secrets=lambda namespace, name: secrets.get((namespace, name)),
        log_headers=("x-token",),
    )
    accepted = set(case["accept_first"])
    assert played.classes[0] in accepted | ({"400-close"} if "either-reject" in accepted else set())
    if case["expect_upstream_headers"] and played.requests:
        seen = dict(played.requests[0]["headers"])
        for name, value in case["expect_upstream_headers"].items():
            assert seen[name] == value
        assert "x-role" not in seen
