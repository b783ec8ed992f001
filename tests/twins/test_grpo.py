"""train_grpo.py and its twin."""

import pytest

import forks
from twins import common, grpo, rollouts

HONEST = [name for name in grpo.RUNS if "max_logp_gap" not in grpo.RUNS[name]]
LYING = [name for name in grpo.RUNS if "max_logp_gap" in grpo.RUNS[name]]


@pytest.fixture(scope="module")
def there(place):
    rollouts.write_more(place)
    return place


@pytest.mark.parametrize("name", HONEST)
def test_the_twin_agrees_and_each_flag_matters(there, tmp_path, name):
    args = common.check(grpo, name, there, tmp_path)
    rollouts.check_flags_matter(grpo, name, args, there, tmp_path)


@pytest.mark.parametrize("name", LYING)
def test_the_twin_agrees_if_engine_and_trainer_do_not(there, tmp_path, name):
    """What is old, what is the engine's, and what corrects for it."""
    folder = forks.patched(tmp_path)
    rollouts.lying_engine(folder)
    args = common.parsed(grpo, name, there, tmp_path / "out")
    common.run(grpo.SCRIPT, *common.arguments(grpo, name, there, args.out), folder=folder)
    common.agree(grpo, args)
    rollouts.check_flags_matter(grpo, name, args, there, tmp_path)


@pytest.mark.parametrize("name", ["grpo", "resampled", "fork curriculum"])
def test_it_agrees_after_a_resume(there, tmp_path, name):
    common.check(grpo, name, there, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resampled", "fork curriculum"])
def test_it_agrees_after_a_resume_on_two_ranks(there, tmp_path, name):
    common.check(grpo, name, there, tmp_path, ranks=2, resume=True)
