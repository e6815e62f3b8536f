"""Hostile DNS: no server is asked for a name outside policy, nothing else than an answer is learnt.

`dns_mutants` makes the cases, and reads what comes of them. FUZZ_SEED and FUZZ_CASES choose other
cases and more of them.
"""

import os
import random
from collections import Counter

import dns.rcode
import pytest
from dns_mutants import addresses, allowed, question, questions, reply
from dns_realm import CLIENT, SERVER, TCP, UDP, view

from l7proxy import dns as wire_format
from l7proxy.accesslog import Ends
from l7proxy.dns_desk import Desk
from l7proxy.dns_policy import NamePolicy
from l7proxy.limits import Limits

FIRST = int(os.environ.get("FUZZ_SEED", "1"))
COUNT = int(os.environ.get("FUZZ_CASES", "2000"))


def _policy() -> NamePolicy:
    made = NamePolicy()
    made.follow(view())
    return made


POLICY = _policy()


class World:
    """One question, and what the server says to it."""

    def __init__(self, seed: int) -> None:
        dice = random.Random(seed)
        self.counts: Counter[str] = Counter()
        desk = Desk(POLICY, Limits(), lambda name: self.counts.update([name]), lambda _event: None)
        begun = desk.begin(
            question(dice), Ends(CLIENT, 4000, SERVER, 53), dice.choice((UDP, TCP)), 0.0
        )
        self.asked = b""
        self.lesson = None
        self.said = b""
        if begun.pending is None:
            return
        begun.pending.number = 0x1234
        self.asked = wire_format.with_id(begun.pending.query.wire, begun.pending.number)
        self.said = reply(self.asked, dice)
        finished = desk.finish(begun.pending, self.said, 1.0)
        if finished is None:
            desk.abandon(begun.pending)
        else:
            self.lesson = finished.lesson
        assert desk.pending_count == 0

    @property
    def faults(self) -> list[str]:
        if not self.asked:
            return []
        names = questions(self.asked)
        found = [f"asked for {name}" for name in names if not allowed(name)]
        if len(names) != 1:
            found.append(f"{len(names)} questions")
        if self.lesson is not None:
            if self.said[:2] != self.asked[:2] or questions(self.said) != names:
                found.append("learnt from what answers something else")
            lesson = tuple(self.lesson.name.encode().lower().split(b"."))[:-1]
            if [lesson] != names:
                found.append(f"learnt for {lesson}")
            if not set(self.lesson.addresses) <= addresses(self.said, names[0]):
                found.append(f"learnt {self.lesson.addresses}")
        return found


def test_nobody_is_asked_what_policy_denies_and_only_answers_teach():
    learnt = 0
    for seed in range(FIRST, FIRST + COUNT):
        world = World(seed)
        assert not world.faults, f"seed {seed}: {world.faults} {world.asked!r} {world.said!r}"
        learnt += world.lesson is not None
    assert learnt > COUNT / 30  # or nothing was put to the test


# --- each check, taken away ----------------------------------------------------------------------


@pytest.fixture
def unremembered():
    """What was read with a check is not there without it, nor the other way round."""
    wire_format._read.cache_clear()
    yield
    wire_format._read.cache_clear()


def dots_inside_labels(patch):
    patch(wire_format, "_text", lambda labels: b".".join(labels).decode("latin-1").lower())


def ids_of_answers(patch):
    read = wire_format.read_answer
    patch(
        wire_format,
        "read_answer",
        lambda said, query, _number: read(said, query, int.from_bytes(said[:2], "big")),
    )


def questions_of_answers(patch):
    patch(wire_format, "_same_question", lambda _one, _two: True)


def owners_of_records(patch):
    def anybody(self, read=wire_format._Records.read):
        return read(self)._replace(owner="api.example.")

    patch(wire_format._Records, "read", anybody)


def errors_have_no_addresses(patch):
    patch(dns.rcode, "from_flags", lambda _flags, _edns: dns.rcode.NOERROR)


def names_of_policy(patch):
    patch(
        NamePolicy,
        "judge",
        lambda self, traffic, _name, judge=NamePolicy.judge: judge(self, traffic, "api.example."),
    )


@pytest.mark.parametrize(
    "check",
    [
        dots_inside_labels, ids_of_answers, questions_of_answers,
        owners_of_records, errors_have_no_addresses, names_of_policy,
    ],
    ids=lambda check: check.__name__,
)  # fmt: skip
def test_a_check_that_is_missing_is_missed(check, monkeypatch, unremembered):
    check(monkeypatch.setattr)
    assert any(World(seed).faults for seed in range(1, 3000)), "not missed"
