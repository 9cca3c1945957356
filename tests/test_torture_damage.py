"""A part of the torture by damage that takes seconds; `python -m tests.torture.damage` does all of it."""

from tests.torture import damage


def test_whatever_is_damaged_is_named_and_never_used():
    rows = damage.main(quick=True)
    assert len(rows) == 3 + 2 + 3 + 3  # files of a checkpoint, ways to use a merged file, files of the others
    assert sum(row.tries for row in rows) > 150
