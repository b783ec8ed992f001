"""train_rm.py and its twin."""

import pytest

from twins import common, rm


@pytest.mark.parametrize("name", rm.RUNS)
def test_the_twin_agrees(place, tmp_path, name):
    common.check(rm, name, place, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", rm.RUNS)
def test_each_flag_matters(place, tmp_path, name):
    args = common.check(rm, name, place, tmp_path)
    common.check_flags_matter(rm, args)


@pytest.mark.parametrize("name", rm.RUNS)
def test_it_agrees_after_a_resume(place, tmp_path, name):
    common.check(rm, name, place, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truncated", "dropped"])
def test_it_agrees_after_a_resume_on_two_ranks(place, tmp_path, name):
    common.check(rm, name, place, tmp_path, ranks=2, resume=True)


def test_its_metrics_are_those_that_it_logs():
    common.check_metrics(rm)
