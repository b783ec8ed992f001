"""Twenty kills of runs of all scripts, of kills.py's two hundred."""

import pytest
from kills import SCRIPTS, main

pytestmark = pytest.mark.slow


def test_runs_that_are_killed_at_random_leave_what_they_would_have(capsys):
    main(20, 3, SCRIPTS)
    assert capsys.readouterr().out.endswith("20 kills, no difference\n")
