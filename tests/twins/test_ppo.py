"""train_ppo.py and its twin."""

import pytest

from twins import common, ppo, rollouts


@pytest.fixture(scope="module")
def place(place):
    rollouts.write_more(place)
    return place


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """That with the script of the run `name`: its engine lies where the run allows a gap."""
    name = request.getfixturevalue("name")
    if "--max_logp_gap" in ppo.RUNS[name]:
        found = rollouts.lying_engine(tmp_path)
    else:
        found = common.folder_of(name, tmp_path)
    monkeypatch.setattr(common, "folder_of", lambda *_: found)
    return found


@pytest.mark.parametrize("name", ppo.RUNS)
def test_the_twin_agrees(place, tmp_path, folder, name):
    common.check(ppo, name, place, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", ppo.RUNS)
def test_each_flag_matters(place, tmp_path, folder, name):
    args = common.check(ppo, name, place, tmp_path)
    rollouts.check_flags_matter(ppo, name, args, place, folder)


@pytest.mark.parametrize("name", ["ppo", "warmed up", "head", "lora", "fork adaptive_kl"])
def test_it_agrees_after_a_resume(place, tmp_path, folder, name):
    common.check(ppo, name, place, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ppo", *common.long("warmed up", "the engine's", "lora", "fork adaptive_kl")]
)
def test_it_agrees_after_a_resume_on_two_ranks(place, tmp_path, folder, name):
    common.check(ppo, name, place, tmp_path, ranks=2, resume=True)


def test_its_metrics_are_those_that_it_logs():
    common.check_metrics(ppo)
