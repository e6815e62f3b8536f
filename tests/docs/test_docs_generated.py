"""Generated pages say what the source says."""

from docs.generate import stale


def test_no_generated_page_is_stale() -> None:
    """`make docs` was run after the last change of what it renders."""
    assert stale() == []
