"""A part of the torture of runs that takes seconds; `python -m tests.torture.stops` does all of it."""

from tests.torture import stops


def test_a_rank_that_is_killed_is_restarted_by_torchruns_agent_and_the_run_comes_to_its_end():
    rows = stops.main(quick=True)
    assert sum(row.tries for row in rows) == 2
    assert {row.outcome for row in rows} == {"came to its last step"}
