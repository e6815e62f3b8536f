"""The life of an endpoint: which moves exist, who makes them, and what follows from a change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conntrack.address import parse_address
from firewall.endpoints.endpoint import LOG_COUNT, Answered, Endpoint, Step
from firewall.endpoints.lifecycle import (
    FIRST,
    MEANINGS,
    MOVES,
    EndpointState,
    Mover,
    TransitionError,
    move_for,
)
from firewall.identities.labels import LabelFilter, LabelSet
from firewall.identities.reserved import Reserved
from firewall.policy.snapshot import NamedPortRow

S = EndpointState
WEB = LabelSet.parse(["k8s:app=web"])
DB = LabelSet.parse(["k8s:app=db"])
INIT = LabelSet.parse(["reserved:init"])


def endpoint(state=S.READY, identity=300, labels=WEB):
    """An endpoint that was led to a state by the calls an agent makes."""
    made = Endpoint(7, "web", "default", time_ns=0, restored=state is S.RESTORING)
    made.set_labels(labels, 0)
    if state in (S.RESTORING, S.WAITING_FOR_IDENTITY):
        return made
    made.identity_allocated(identity, made.relevant, 0)
    if state is S.WAITING_TO_REGENERATE:
        return made
    made.begin_regeneration(0)
    if state is S.REGENERATING:
        return made
    made.finish_regeneration(1, 0)
    if state is S.READY:
        return made
    made.disconnect(0)
    if state is S.DISCONNECTED:
        made.disconnected(0)
    return made


@pytest.mark.parametrize("state", list(S), ids=lambda state: state.word)
def test_a_lost_number_leaves_an_endpoint_init_until_it_has_another(state):
    """Whoever waits, waits on; who was further waits again; who leaves does not care."""
    one = endpoint(state)
    if state in (S.DISCONNECTED, S.DISCONNECTING):
        assert one.lose_identity(5) is Step.NOTHING
        assert one.state is state
        return
    assert one.lose_identity(5) is Step.ALLOCATE
    assert one.identity is None
    assert one.row().identity == Reserved.INIT
    assert one.state is (S.RESTORING if state is S.RESTORING else S.WAITING_FOR_IDENTITY)
    assert one.identity_allocated(301, WEB, 6) == Answered(Step.REGENERATE, None)


def test_the_table_is_total_and_every_cell_has_a_reason():
    for before in (None, *S):
        row = FIRST if before is None else MOVES[before]
        assert set(row) == set(S)
        assert all(move.reason for move in row.values())
    assert set(MEANINGS) == set(S)


MOVE_TABLE = """
none                   restoring waiting-for-identity
restoring              restoring regenerating* disconnecting
waiting-for-identity   waiting-to-regenerate disconnecting
waiting-to-regenerate  restoring waiting-for-identity regenerating* disconnecting
regenerating           restoring waiting-for-identity waiting-to-regenerate ready* disconnecting
ready                  restoring waiting-for-identity waiting-to-regenerate disconnecting
disconnecting          disconnected
disconnected
"""


def test_the_moves_are_ciliums():
    """setState and BuilderSetStateLocked (*); the two differences are in the table's reasons."""
    rows = {}
    for before in (None, *S):
        moves = [(after, move_for(before, after).mover) for after in S]
        rows["none" if before is None else before.word] = [
            after.word + ("*" if mover is Mover.BUILDER else "")
            for after, mover in moves
            if mover is not Mover.NOBODY
        ]
    expected = {line.split()[0]: line.split()[1:] for line in MOVE_TABLE.strip().splitlines()}
    assert rows == expected


def test_nothing_leads_out_of_the_end():
    assert all(move.mover is Mover.NOBODY for move in MOVES[S.DISCONNECTED].values())


def test_every_state_can_be_reached_and_every_other_left():
    reached = {None}
    for _ in S:
        reached |= {a for b in reached for a in S if move_for(b, a).mover is not Mover.NOBODY}
    assert reached == {None, *S}


@pytest.mark.parametrize("state", list(S))
def test_the_calls_lead_to_every_state(state):
    assert endpoint(state).state is state


def test_a_refused_move_says_from_where_to_where_and_why():
    with pytest.raises(TransitionError) as caught:
        endpoint(S.DISCONNECTED).set_labels(DB, 0)
    assert str(caught.value) == (
        "endpoint web: disconnected -> waiting-for-identity refused: "
        "a removed endpoint stays removed; the same name is a new endpoint"
    )


def test_an_endpoint_without_labels_is_init():
    """Labels not known yet: reserved:init."""
    new = Endpoint(7, "web", time_ns=0)
    assert new.set_labels(LabelSet(), 0) is Step.ALLOCATE
    assert new.relevant == INIT
    assert new.row().identity == 5


def test_a_life_goes_from_identity_to_policy_to_ready():
    made = Endpoint(7, "web", "default", time_ns=1)
    assert made.set_labels(WEB, 2) is Step.ALLOCATE
    assert made.identity_allocated(300, WEB, 3) == Answered(Step.REGENERATE, None)
    made.begin_regeneration(4)
    assert made.finish_regeneration(9, 5)
    assert [change.after.word for change in made.log] == [
        "waiting-for-identity",
        "waiting-to-regenerate",
        "regenerating",
        "ready",
    ]
    assert made.policy_revision == 9
    assert made.log[-1].reason == "every worker enforces policy revision 9"
    assert made.log[-1].time_ns == 5


def test_a_label_change_is_a_new_identity():
    """Design section 5; the old number is given back for release."""
    web = endpoint()
    assert web.set_labels(DB, 0) is Step.ALLOCATE
    assert web.state is S.WAITING_FOR_IDENTITY
    assert web.identity == 300
    assert web.identity_allocated(301, DB, 0) == Answered(Step.REGENERATE, 300)
    assert web.row().identity == 301


def test_a_label_that_is_not_security_relevant_changes_nothing_else():
    web = endpoint()
    labels = LabelSet.parse(["k8s:app=web", "k8s:pod-template-hash=1"])
    assert web.set_labels(labels, 0) is Step.NOTHING
    assert web.state is S.READY
    assert web.labels == labels
    assert web.relevant == WEB


def test_the_filter_of_the_operator_decides_what_is_relevant():
    made = Endpoint(7, "web", time_ns=0, label_filter=LabelFilter(("!k8s:app",)))
    made.set_labels(WEB, 0)
    assert made.relevant == INIT


def test_an_answer_that_labels_have_overtaken_is_given_back():
    """Asked for WEB, then the labels became DB: the number of WEB must not be enforced."""
    made = endpoint(S.WAITING_FOR_IDENTITY)
    made.set_labels(DB, 0)
    assert made.identity_allocated(300, WEB, 0) == Answered(Step.ALLOCATE, 300)
    assert made.state is S.WAITING_FOR_IDENTITY
    assert made.identity is None


@pytest.mark.parametrize("state", [S.READY, S.DISCONNECTING, S.DISCONNECTED])
def test_an_answer_nobody_waits_for_is_given_back(state):
    assert endpoint(state).identity_allocated(999, WEB, 0) == Answered(Step.NOTHING, 999)


@pytest.mark.parametrize("state", [S.WAITING_TO_REGENERATE, S.REGENERATING])
def test_labels_that_change_on_the_way_send_it_back(state):
    web = endpoint(state)
    assert web.set_labels(DB, 0) is Step.ALLOCATE
    assert web.state is S.WAITING_FOR_IDENTITY
    assert not web.finish_regeneration(5, 0)
    assert web.policy_revision == 0


def test_an_acknowledgement_that_a_change_has_overtaken_does_not_make_it_ready():
    web = endpoint(S.REGENERATING)
    assert web.need_regeneration("policy changed", 0) is Step.REGENERATE
    assert not web.finish_regeneration(5, 0)
    assert web.state is S.WAITING_TO_REGENERATE


@pytest.mark.parametrize(
    ("state", "step"),
    [
        (S.READY, Step.REGENERATE),
        (S.REGENERATING, Step.REGENERATE),
        (S.WAITING_TO_REGENERATE, Step.REGENERATE),
        (S.WAITING_FOR_IDENTITY, Step.ALLOCATE),
        (S.RESTORING, Step.ALLOCATE),
        (S.DISCONNECTING, Step.NOTHING),
        (S.DISCONNECTED, Step.NOTHING),
    ],
)
def test_a_policy_change_makes_an_endpoint_wait_for_what_it_lacks(state, step):
    assert endpoint(state).need_regeneration("policy changed", 0) is step


def test_a_restored_endpoint_gets_its_identity_before_it_regenerates():
    """It stays restoring until its policy is published: the old one is still enforced."""
    web = endpoint(S.RESTORING)
    with pytest.raises(TransitionError):
        web.begin_regeneration(0)
    assert web.identity_allocated(300, WEB, 0) == Answered(Step.REGENERATE, None)
    assert web.state is S.RESTORING
    web.begin_regeneration(0)
    assert web.finish_regeneration(1, 0)


def test_nobody_but_the_builder_makes_an_endpoint_ready():
    """finish_regeneration is the only way, and only from regenerating."""
    for state in set(S) - {S.REGENERATING}:
        made = endpoint(state)
        assert not made.finish_regeneration(1, 0)
        assert made.state is state


def test_a_failed_publication_shows_and_is_tried_again():
    web = endpoint(S.REGENERATING)
    assert web.fail_regeneration("worker 1 refused revision 5", 0) is Step.REGENERATE
    assert web.shown_state == "not-ready"
    assert web.log[-1].reason == "worker 1 refused revision 5"
    web.begin_regeneration(0)
    web.finish_regeneration(2, 0)
    assert web.shown_state == "ready"


def test_removal_gives_the_identity_back_once():
    web = endpoint()
    assert web.disconnect(0, "declaration removed") == 300
    with pytest.raises(TransitionError, match="in this state already"):
        web.disconnect(0)
    web.disconnected(0)
    assert web.state is S.DISCONNECTED


def test_a_change_of_the_link_regenerates_and_an_equal_one_does_not():
    web = endpoint()
    address = parse_address("10.0.0.1")
    port = NamedPortRow("http", 6, 80)
    step = web.configure(
        0, addresses=[address], interface=("veth1", 4), named_ports=[port], netns="web"
    )
    assert step is Step.REGENERATE
    assert web.state is S.WAITING_TO_REGENERATE
    assert web.row().addresses == (address,)
    assert web.row().interface_index == 4
    web.begin_regeneration(0)
    web.finish_regeneration(1, 0)
    assert web.configure(0, addresses=[address], netns="elsewhere") is Step.NOTHING


def test_the_log_is_bounded():
    web = endpoint()
    for number in range(LOG_COUNT):
        web.need_regeneration("policy changed", number)
        web.begin_regeneration(number)
        web.finish_regeneration(number, number)
    assert len(web.log) == LOG_COUNT
    assert web.log[-1].time_ns == LOG_COUNT - 1


@given(st.lists(st.integers(0, 9), max_size=40))
def test_references_balance_whatever_happens(calls):
    """Property: every allocated number is held, or was given back exactly once."""
    web = Endpoint(7, "web", time_ns=0)
    sets = [LabelSet.parse([f"k8s:app={n}"]) for n in range(3)]
    held, asked = [], []
    for turn, call in enumerate(calls):
        try:
            if call < 3 and web.set_labels(sets[call], 0) is Step.ALLOCATE:
                asked.append(web.relevant)
            elif call < 5 and asked:
                held.append(number := 300 + turn)
                answer = web.identity_allocated(number, asked.pop(0), 0)
                if answer.release is not None:
                    held.remove(answer.release)
            elif call == 5:
                web.need_regeneration("policy", 0)
            elif call == 6:
                web.begin_regeneration(0)
            elif call == 7:
                web.finish_regeneration(turn, 0)
            elif call == 8 and turn > 20:
                released = web.disconnect(0)
                if released is not None:
                    held.remove(released)
        except TransitionError:
            continue
    assert held == ([] if web.identity is None else [web.identity])
