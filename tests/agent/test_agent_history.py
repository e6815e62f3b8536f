"""Which snapshot explains a flow: that of its policy revision and its time."""

import pytest

from firewall.agent.history import History
from firewall.policy.snapshot import Snapshot


@pytest.fixture
def history():
    """Three policy revisions; the second was published twice, as endpoints changed."""
    kept = History(kept_count=4)
    for revision, policy_revision, since in ((1, 1, 100), (2, 2, 200), (3, 2, 300), (4, 3, 400)):
        snapshot = Snapshot(revision=revision, policy_revision=policy_revision)
        kept.note(snapshot, {}, since)
    return kept


@pytest.mark.parametrize(
    ("policy_revision", "time_ns", "revision"),
    [
        (1, 150, 1),
        (2, 250, 2),
        (2, 350, 3),
        (2, 450, 3),  # a worker that had not yet loaded the next one
        (3, 399, 4),  # a worker's clock a moment before ours
        (0, 350, 3),
        (9, 350, None),
        (0, 50, None),
    ],
)
def test_a_flow_is_explained_by_the_snapshot_of_its_revision_and_time(
    history, policy_revision, time_ns, revision
):
    """Revision 0: the record does not say, so the time alone counts."""
    past = history.at(policy_revision, time_ns)
    assert (past.snapshot.revision if past else None) == revision


def test_old_snapshots_are_forgotten_and_the_latest_is_kept(history):
    """Bounded, whatever changes come."""
    history.note(Snapshot(revision=5, policy_revision=4), {}, 500)
    assert history.at(1, 150) is None
    assert history.latest().snapshot.revision == 5


def test_a_view_is_made_once_per_snapshot(history):
    """Making one costs milliseconds with thousands of identities."""
    past = history.latest()
    assert history.view(past) is history.view(past)
    assert history.view(past).revision == 4
