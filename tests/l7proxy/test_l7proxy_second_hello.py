"""What follows the first hello passes unread, but for a second one with another name."""

import hellos
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.client_hello import HelloRefused
from l7proxy.second_hello import SecondHello

NAME = "a.example"
SAME = hellos.real(NAME)
OTHER = hellos.real("b.example")
CHANGE = b"\x14\x03\x03\x00\x01\x01"
EARLY = b"\x17\x03\x03\x00\x05early"
ALERT = b"\x15\x03\x03\x00\x02\x01\x70"
SERVER_HELLO = hellos.records(b"\x02" + hellos.vector(3, b"\x03\x03" + bytes(range(32)) + b"\x00"))
RETRY = hellos.retry_request()


def watch():
    return SecondHello(NAME, 16 * 1024)


def play(*steps, cuts=(1 << 20,)):
    """Perform ("c", bytes) and ("s", bytes) in pieces of these sizes; what passed to the server."""
    watched, passed, turn = watch(), b"", 0
    for end, data in steps:
        start = 0
        while start < len(data):
            part = data[start : start + cuts[turn % len(cuts)]]
            start += len(part)
            turn += 1
            if end == "c":
                passed += part if watched.over else watched.from_client(part)
            else:
                watched.from_server(part)
                if watched.over:
                    passed += watched.rest()
    return passed, watched


@pytest.mark.parametrize(
    "steps",
    [
        [("s", SERVER_HELLO), ("c", CHANGE + EARLY)],
        [("c", EARLY), ("s", SERVER_HELLO), ("c", CHANGE)],
        [("s", RETRY), ("c", CHANGE + SAME + EARLY)],
        [("c", EARLY), ("s", RETRY), ("c", CHANGE + SAME)],
        [("c", SAME), ("s", RETRY), ("c", EARLY)],
        [("s", ALERT + SERVER_HELLO), ("c", CHANGE)],
        [("s", b"HTTP/1.1 400 Bad Request\r\n\r\n"), ("c", b"anything")],
        [("s", SERVER_HELLO), ("c", b"anything at all")],
    ],
)
def test_what_belongs_there_passes_whole(steps):
    sent = b"".join(data for end, data in steps if end == "c")
    for cuts in ((1 << 20,), (1,), (7, 3), (100,)):
        passed, watched = play(*steps, cuts=cuts)
        assert passed == sent
        assert watched.over


@pytest.mark.parametrize(
    "steps",
    [
        [("s", RETRY), ("c", OTHER)],
        [("s", RETRY), ("c", CHANGE + OTHER)],
        [("c", EARLY), ("s", RETRY), ("c", OTHER)],
        [("c", OTHER)],
        [("c", EARLY + CHANGE + OTHER)],
        [("c", SAME + OTHER)],
        [("s", RETRY), ("c", hellos.real(None))],
        [("s", RETRY), ("c", hellos.records(b"\x0b" + bytes(20)))],
        [("s", RETRY), ("c", b"\x18\x03\x03\x00\x01\x00")],
        [("s", RETRY), ("c", b"\x17\x03\x03\xff\xff")],
    ],
)
def test_another_name_never_reaches_the_server(steps):
    for cuts in ((1 << 20,), (1,), (7, 3)):
        with pytest.raises(HelloRefused):
            play(*steps, cuts=cuts)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("cs"), st.sampled_from([SAME, OTHER, CHANGE, EARLY, RETRY, ALERT])
        ),
        max_size=6,
    ),
    st.lists(st.integers(1, 700), min_size=1, max_size=5),
)
def test_before_the_server_has_answered_no_other_hello_passes(steps, cuts):
    """Whatever comes in whatever order and pieces."""
    try:
        passed, watched = play(*steps, cuts=cuts)
    except HelloRefused:
        return
    if not watched.over:
        assert OTHER not in passed


@given(st.lists(st.tuples(st.sampled_from("cs"), st.binary(max_size=60)), max_size=8))
def test_any_bytes_give_a_decision_and_nothing_is_held_for_ever(steps):
    try:
        passed, watched = play(*steps)
    except HelloRefused:
        return
    sent = b"".join(data for end, data in steps if end == "c")
    assert passed + watched.rest() == sent
