"""The toy task learned for real, in short: one seed, three preference losses, PPO, and the reward model behind it.

The whole of it, over three seeds and all losses, is `python -m bench.toy`.
"""
import pytest
from scripts import metrics, run


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "sft"
    run("train_sft.py", "--out", folder, "--steps", 320, "--save_every", 0, "--eval_every", 0, timeout=600)
    return folder


@pytest.mark.parametrize("loss, flags", [("sigmoid", ()), ("kto", ("--lr", 4e-4)), ("simpo", ("--beta", 2))])
def test_a_loss_raises_the_accuracy_on_held_out_pairs(sft, tmp_path, loss, flags):
    run("train_dpo.py", "--model", sft, "--out", tmp_path, "--loss", loss, *flags, "--steps", 50, "--warmup", 5,
        "--save_every", 0, "--eval_every", 0, timeout=600)
    before, *_, after = metrics(tmp_path)
    assert after["eval/rewards/accuracies"] > max(before["eval/rewards/accuracies"] + 0.1, 0.6)
    assert after["eval/loss"] < before["eval/loss"]


def test_ppo_learns_from_the_exact_reward(sft, tmp_path):
    run("train_ppo.py", "--model", sft, "--out", tmp_path, "--steps", 12, "--prompts", 256, "--warmup", 2, "--lr", 1e-3,
        "--save_every", 0, "--eval_every", 0, timeout=600)
    before, *_, after = metrics(tmp_path)
    assert after["eval/accuracy"] > before["eval/accuracy"] + 0.1
