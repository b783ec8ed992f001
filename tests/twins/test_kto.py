"""train_kto.py and its twin."""

import pytest

from twins import common, dpo, kto


@pytest.fixture(scope="module")
def place(place):
    dpo.write_near(place)
    return place


@pytest.mark.parametrize("name", kto.RUNS)
def test_the_twin_agrees(place, tmp_path, name):
    common.check(kto, name, place, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", kto.RUNS)
def test_each_flag_matters(place, tmp_path, name):
    args = common.check(kto, name, place, tmp_path)
    shown = common.given(kto, "kto", args) if name != "kto" else {}
    common.check_flags_matter(kto, args, also=shown)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_it_agrees_after_a_resume(place, tmp_path, name):
    common.check(kto, name, place, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto", "bco", *common.long("aot_unpaired")])
def test_it_agrees_after_a_resume_on_two_ranks(place, tmp_path, name):
    common.check(kto, name, place, tmp_path, ranks=2, resume=True)


def test_its_metrics_are_those_that_it_logs():
    common.check_metrics(kto)
