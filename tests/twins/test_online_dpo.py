"""train_online_dpo.py and its twin."""

import pytest

from twins import common, online_dpo


@pytest.fixture(scope="module")
def place(place):
    online_dpo.write_more(place)
    return place


@pytest.mark.parametrize("name", online_dpo.RUNS)
def test_the_twin_agrees(place, tmp_path, name):
    common.check(online_dpo, name, place, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", online_dpo.RUNS)
def test_each_flag_matters(place, tmp_path, name):
    args = common.check(online_dpo, name, place, tmp_path)
    also = common.given(online_dpo, "all", args)
    if name == "all":
        also = {"max_new_tokens": 5, "prompts": 4, "steps": 4}  # by default, many
    common.check_flags_matter(online_dpo, args, also=also)


@pytest.mark.parametrize("name", ["all", "judge"])
def test_it_agrees_after_a_resume(place, tmp_path, name):
    common.check(online_dpo, name, place, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "without_reference"])
def test_it_agrees_after_a_resume_on_two_ranks(place, tmp_path, name):
    common.check(online_dpo, name, place, tmp_path, ranks=2, resume=True)


def test_its_metrics_are_those_that_it_logs():
    common.check_metrics(online_dpo)
