"""A part of the torture of saves that takes seconds; `python -m tests.torture.saves` does all of it."""

from tests.torture import saves


def test_no_kill_and_no_full_disk_costs_more_than_the_save_that_was_under_way():
    *kills, full_disk = saves.main(quick=True)
    assert sum(row.tries for row in kills) == 40
    assert {row.outcome for row in kills} == {"nothing lost"}
    assert full_disk.tries > 10
