"""The toy task learned for real, in short: one seed, three preference losses, and PPO.

The whole of it, over three seeds and all losses, is `python -m bench.toy`.
"""

import json

import pytest
from scripts import metrics, run

from nanopost import InputError, toy
from nanopost.tokenizer import Tokenizer


def test_the_toys_sums_are_for_the_toys_model(tmp_path):
    toy.write_model(tmp_path)
    toy.check(Tokenizer.load(tmp_path), tmp_path)
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    other["model"]["vocab"]["more"] = 400
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(
        InputError, match="--data toy, the default, has sums for the toy's own model"
    ):
        toy.check(Tokenizer.load(tmp_path), tmp_path)


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "sft"
    run("train_sft.py", "--out", folder, "--save_every", 0, "--eval_every", 0, timeout=900)
    return folder


@pytest.mark.parametrize(
    "loss, flags", [("sigmoid", ()), ("kto", ()), ("simpo", ("--beta", 2, "--gamma", 1))]
)
def test_a_preference_loss_tells_pairs_apart_and_raises_held_out_exact_match(
    sft, tmp_path, loss, flags
):
    run(
        "train_dpo.py",
        "--model",
        sft,
        "--out",
        tmp_path,
        "--loss",
        loss,
        *flags,
        "--steps",
        50,
        "--warmup",
        5,
        "--save_every",
        0,
        "--eval_every",
        0,
        timeout=900,
    )
    before, *_, after = metrics(tmp_path)
    gap = [m["eval/rewards/chosen"] - m["eval/rewards/rejected"] for m in (before, after)]
    assert after["eval/rewards/accuracies"] > 0.75 and gap[1] > gap[0] + 0.5
    assert after["eval/loss"] < before["eval/loss"]
    assert after["eval/accuracy"] > before["eval/accuracy"] + 0.05


def test_ppo_learns_from_the_exact_reward(sft, tmp_path):
    run(
        "train_ppo.py",
        "--model",
        sft,
        "--out",
        tmp_path,
        "--steps",
        15,
        "--warmup",
        3,
        "--save_every",
        0,
        "--eval_every",
        0,
        timeout=900,
    )
    before, *_, after = metrics(tmp_path)
    assert after["eval/accuracy"] > before["eval/accuracy"] + 0.1
