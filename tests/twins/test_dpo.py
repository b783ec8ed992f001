"""train_dpo.py and its twin."""

import pytest

from twins import common, dpo


@pytest.fixture(scope="module")
def place(place):
    dpo.write_near(place)
    return place


@pytest.mark.parametrize("name", dpo.RUNS)
def test_the_twin_agrees(place, tmp_path, name):
    common.check(dpo, name, place, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", dpo.RUNS)
def test_each_flag_matters(place, tmp_path, name):
    args = common.check(dpo, name, place, tmp_path)
    # What the first run gives is not tried once more.
    shown = common.given(dpo, "forward_kl", args) if name != "forward_kl" else {}
    common.check_flags_matter(dpo, args, also=shown, folder=common.folder_of(name, tmp_path / "2"))


@pytest.mark.parametrize("name", ["forward_kl", "js", "fork tr_dpo"])
def test_it_agrees_after_a_resume(place, tmp_path, name):
    common.check(dpo, name, place, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "orpo", *common.long("alpha", "fork tr_dpo")])
def test_it_agrees_after_a_resume_on_two_ranks(place, tmp_path, name):
    common.check(dpo, name, place, tmp_path, ranks=2, resume=True)


def test_its_metrics_are_those_that_it_logs():
    common.check_metrics(dpo)
