"""A part of the torture of saves that takes seconds; `python -m tests.torture.saves` does all of it."""

from tests.torture import saves


def test_no_kill_and_no_full_disk_costs_more_than_the_save_that_was_under_way():
    rows = saves.main(quick=True)
    assert len(rows) == 5
    assert all(row.tries >= 2 for row in rows)
