"""A few kills of runs of all scripts, of kills.py's two hundred."""

import pytest
from kills import SCRIPTS, main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_runs_that_are_killed_at_random_leave_what_they_would_have(kills, capsys):
    main(kills, 3, SCRIPTS)
    assert capsys.readouterr().out.endswith(f"{kills} kills, no difference\n")
