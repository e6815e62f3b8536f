"""The adversarial HTTP corpus against the core: what the server would have got, read strictly.

The same cases run against a live proxy in netns-tests/test_l7proxy_corpus.py.
"""

import base64
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from header_corpus import HEADER_RULES, NOT_EXPRESSIBLE
from http_played import Played
from http_transcript import Script, snapshot

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


def play(segments, source, **limits):
    def read(server, data):
        return server.feed(data)

    return Played(Script(source, **limits), segments, lambda: common().Strict(), read)


def requests_of(played):
    return [request for server in played.servers for request in server.reqs]


def classes_of(played):
    """The answers, as the corpus calls them."""
    called = {"F": "forward", "403": "403"}
    return [called.get(answer, "400-close") for answer in played.answers if answer != "100"]


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
    played = play(segments(case), snapshot())
    for server in played.servers:
        assert server.err is None
        assert not server.warn
    for request in requests_of(played):
        assert common().policy_ok(request), request
        assert common().normalise(request["target"]) == request["target"].partition("?")[0]
    assert len(requests_of(played)) <= max(1, case["upstream_max_requests"])
    accepted = set(case["accept_first"])
    if "either-reject" in accepted:
        accepted |= {"400-close", "403"}
    first = classes_of(played)[0] if classes_of(played) else "no-answer"
    if first == "no-answer" and not played.ended:  # more bytes or the timeout would decide
        assert accepted & {"forward", "no-answer", "forward-aborted"} or (
            case["category"] == "resource"
        )
    else:
        assert first in accepted or (case["category"] == "resource")
    if isinstance(case["expect"], list):
        for wanted, got in zip(case["expect"], classes_of(played), strict=False):
            assert not (wanted == "403" and got == "forward")


@needs_corpus
@pytest.mark.parametrize(
    "case",
    [case for case in cases("h1_header_policy.jsonl") if case["id"] not in NOT_EXPRESSIBLE],
    ids=lambda case: case["id"],
)
def test_header_rules_are_held_against_what_the_server_gets(case):
    secrets = {("default", "token"): b"secret"}
    played = play(
        segments(case),
        snapshot(HEADER_RULES),
        secrets=lambda namespace, name: secrets.get((namespace, name)),
        log_headers=("x-token",),
    )
    accepted = set(case["accept_first"])
    assert classes_of(played)[0] in accepted | (
        {"400-close"} if "either-reject" in accepted else set()
    )
    if case["expect_upstream_headers"] and requests_of(played):
        seen = dict(requests_of(played)[0]["headers"])
        for name, value in case["expect_upstream_headers"].items():
            assert seen[name] == value
        assert "x-role" not in seen
