"""A few of kills.py's two hundred kills."""

import pytest
from kills import SCRIPTS, main


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills, seed",
    [
        # One run with --reproducible: SIGINT on two ranks, SIGTERM on one, SIGKILL on two.
        (3, 813),
        pytest.param(20, 3, marks=pytest.mark.long),
    ],
)
def test_runs_that_are_killed_at_random_leave_what_they_would_have(kills, seed, capsys):
    main(kills, seed, SCRIPTS)
    assert capsys.readouterr().out.endswith(f"{kills} kills, no difference\n")
