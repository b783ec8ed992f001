"""Each script run for real, by its command line: what it writes, what it refuses, and kill -9 at any instant."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from scripts import ENVIRONMENT, command, metrics, run, weights

from nanopost import hf

SFT = ("--steps", 8, "--rows", 16, "--save_every", 2, "--eval_every", 4)
GRPO = (
    "--steps",
    6,
    "--prompts",
    4,
    "--group",
    4,
    "--save_every",
    2,
    "--eval_every",
    3,
    "--eval_data",
)
REWARD = """
class Digits:
    def __call__(self, completions, answer, **columns):
        assert len(completions) == len(answer)
        return [sum(c.isdigit() for c in text[0]["content"]) / 8 for text in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a short SFT run of the toy (sft), a reward file and a few held-out prompts."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "reward.py").write_text(REWARD)
    rows = [
        {"prompt": [{"role": "user", "content": f"{a}+11=?"}], "answer": str(a + 11)}
        for a in range(20, 30)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [[*row["prompt"], {"role": "assistant", "content": row["answer"]}] for row in rows]
    (folder / "sft.jsonl").write_text(
        "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    )
    run("train_sft.py", "--out", folder / "sft", *SFT)
    return folder


def grpo(place, out, *more):
    return (
        "--model",
        place / "sft",
        "--out",
        out,
        "--data",
        place / "prompts.jsonl",
        *GRPO,
        place / "prompts.jsonl",
        "--reward",
        f"{place}/reward.py:Digits",
        "--max_new_tokens",
        8,
        "--lr",
        1e-3,
        *more,
    )


def test_sft_writes_a_model_its_metrics_and_what_the_run_was(place):
    lines = metrics(place / "sft")
    assert [m["step"] for m in lines] == list(range(9))
    assert all({"loss", "entropy", "grad_norm", "lr", "num_tokens"} <= m.keys() for m in lines[1:])
    assert [m["step"] for m in lines if "eval/loss" in m] == [0, 4, 8]
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"] - 0.5
    (manifest,) = json.loads((place / "sft" / "run.json").read_text())
    assert (
        manifest["args"]["rows"] == 16
        and manifest["template_hash"]
        and manifest["torch"] == torch.__version__
    )
    assert hf.load_model(place / "sft").config.tied


def test_sft_loads_in_transformers_with_its_tokenizer_and_equal_logits(place):
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        place / "sft", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "sft")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12+34=?"}], add_generation_prompt=True, return_dict=False
    )
    ours = hf.load_model(place / "sft")
    cu = torch.tensor([0, len(ids)], dtype=torch.int32)
    logits = ours.logits(ours.model.packed(torch.tensor(ids), torch.arange(len(ids)), cu, len(ids)))
    torch.testing.assert_close(
        logits, theirs(torch.tensor([ids])).logits[0].float(), atol=1e-4, rtol=0
    )


@pytest.fixture(scope="module")
def grpo_run(place):
    run("train_grpo.py", *grpo(place, place / "grpo"), ranks=1)
    return place / "grpo"


def test_grpo_writes_metrics_samples_and_evaluations(grpo_run):
    lines = metrics(grpo_run)
    assert [m["step"] for m in lines] == list(range(7))
    assert [m["step"] for m in lines if "eval/accuracy" in m and "eval/greedy" in m] == [0, 3, 6]
    names = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/Digits/mean",
        "entropy",
        "completions/mean_length",
        "completions/clipped_ratio",
        "clip_ratio/region_mean",
        "sampling/sampling_logp_difference/max",
    }
    assert all(names <= m.keys() for m in lines[1:])
    assert all(m["sampling/sampling_logp_difference/max"] < 1e-4 for m in lines[1:])
    samples = [json.loads(line) for line in (grpo_run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 * 4 and all("<|assistant|>" in s["prompt"] for s in samples)


def test_grpo_on_two_ranks_is_grpo_on_one(place, grpo_run):
    """The same prompts, rollouts and minibatches, until rounding flips the draw of a token some steps later."""
    run("train_grpo.py", *grpo(place, place / "grpo2"), ranks=2)
    one, two = metrics(grpo_run), metrics(place / "grpo2")
    for a, b in zip(one[:3], two):
        for name in (
            "reward",
            "reward_std",
            "eval/accuracy",
            "completions/mean_length",
            "loss",
            "grad_norm",
        ):
            assert a.get(name) == pytest.approx(b.get(name), abs=2e-3), (a["step"], name)
    assert one[1]["reward"] == pytest.approx(two[1]["reward"], abs=1e-9)
    assert one[1]["grad_norm"] == pytest.approx(two[1]["grad_norm"], rel=1e-4)


VARIANTS = [
    ("--adv", "loo", "--ratio", "sequence_sum", "--beta", 0.1, "--kl", "k1", "--kl_in", "reward"),
    ("--adv", "mean", "--agg", "constant", "--old_logp", "trainer", "--correct", "token-truncate"),
    ("--ratio", "sequence", "--agg", "sequence", "--beta", 0.05, "--mask_overlong"),
    ("--loss", "cispo", "--adv", "batch", "--resample", 3, "--stop", "999", "--temperature", 0.7),
    (
        "--delta",
        1.5,
        "--correct",
        "sequence-mask",
        "--old_logp",
        "trainer",
        "--minibatches",
        4,
        "--tokens",
        64,
    ),
]


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: " ".join(map(str, flags)))
def test_every_member_of_the_family_runs(place, tmp_path, flags):
    run("train_grpo.py", *grpo(place, tmp_path / "x"), *flags, "--steps", 2)
    last = metrics(tmp_path / "x")[-1]
    assert last["step"] == 2 and last["grad_norm"] > 0 and abs(last["loss"]) < 10
    assert ("kl" in last) == ("--beta" in flags)


def test_batches_that_do_not_divide_say_which_would(place, tmp_path):
    done = run(
        "train_grpo.py", *grpo(place, tmp_path / "x"), "--prompts", 7, "--minibatches", 3, ok=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "error: --prompts 7 does not divide into 1 ranks x 3 minibatches: 6 or 9 would."
        in done.stderr
    )


def test_groups_without_variance_end_in_a_sentence(place, tmp_path):
    done = run(
        "train_grpo.py",
        *grpo(place, tmp_path / "x"),
        "--reward",
        "regex:never",
        "--resample",
        2,
        ok=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "in 3 rounds of 4 prompts every group of 4 had equal rewards" in done.stderr


def test_groups_without_variance_are_kept_and_a_step_without_any_other_goes_on(place, tmp_path):
    """The default, --resample 0: nothing to learn is no gradient and no error, as is a batch of unended answers."""
    for flags in (("--reward", "regex:never"), ("--mask_overlong", "--max_new_tokens", 1)):
        run("train_grpo.py", *grpo(place, tmp_path / "x"), "--steps", 2, "--overwrite", *flags)
        assert all(m["grad_norm"] == 0 == m["loss"] for m in metrics(tmp_path / "x")[1:])


def test_without_held_out_rows_nothing_is_evaluated(place, tmp_path):
    run(
        "train_sft.py",
        "--model",
        place / "sft",
        "--data",
        place / "sft.jsonl",
        "--holdout",
        0,
        "--out",
        tmp_path,
        "--steps",
        2,
        "--eval_every",
        0,
    )
    assert len(metrics(tmp_path)) == 3 and not any(
        name.startswith("eval") for m in metrics(tmp_path) for name in m
    )


def test_a_fresh_toy_on_two_ranks_is_written_once(tmp_path):
    run("train_sft.py", "--out", tmp_path, "--steps", 1, ranks=2)
    assert metrics(tmp_path)[-1]["step"] == 1


def test_a_run_is_not_overwritten_unless_told(place):
    done = run("train_sft.py", "--out", place / "sft", *SFT, ok=False)
    assert done.returncode == 1 and "already holds a run: add --resume" in done.stderr
    assert len(metrics(place / "sft")) == 9


def test_another_template_than_the_one_trained_with_is_said_loudly(place, tmp_path):
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    done = run(
        "train_grpo.py",
        *grpo(place, tmp_path / "x"),
        "--chat_template",
        tmp_path / "other.jinja",
        "--steps",
        1,
    )
    assert "WARNING" in done.stdout and "was trained with another template" in done.stdout


# ----------------------------------------------------------------------------------------------------------- kill -9
def killed_and_resumed(script, arguments, out, instants, seed):
    """Start again with --resume until a run lives; kill -9 the k-th in the phase that instants[k] names, a random
    moment after it begins. -> the log of each killed run."""
    draw, logs = random.Random(seed), []
    for phase in instants:
        log = Path(f"{out}-{len(logs)}.log")
        with open(log, "w") as file:
            process = subprocess.Popen(
                command(script, *arguments, "--out", out, "--verbose", "--resume"),
                env=ENVIRONMENT,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
            deadline = time.monotonic() + 200
            while (
                phase not in log.read_text()
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.002)
            time.sleep(draw.random() * 0.05)
            process.kill()
            assert process.wait() == -signal.SIGKILL, log.read_text()[-3000:]
        logs.append(log.read_text())
    run(script, *arguments, "--out", out, "--verbose", "--resume")
    return logs


def last_phase(log):
    return [line for line in log.splitlines() if line.startswith("# step")][-1]


def test_sft_killed_five_times_ends_with_the_weights_of_one_never_killed(place):
    instants = [
        "# step 1 update",
        "# step 2 save",
        "# step 4 save",
        "# step 6 save",
        "# step 7 update",
    ]
    logs = killed_and_resumed("train_sft.py", SFT, place / "sft_killed", instants, seed=0)
    assert any(last_phase(log).endswith("save") for log in logs)
    assert weights(place / "sft_killed") == weights(place / "sft")
    assert [m["step"] for m in metrics(place / "sft_killed")] == list(range(9))
    assert [m.get("loss") for m in metrics(place / "sft_killed")] == [
        m.get("loss") for m in metrics(place / "sft")
    ]


def test_grpo_killed_five_times_ends_with_the_weights_of_one_never_killed(place, grpo_run):
    instants = [
        "# step 1 rollout",
        "# step 2 save",
        "# step 3 rollout",
        "# step 4 save",
        "# step 5 update",
    ]
    logs = killed_and_resumed(
        "train_grpo.py", grpo(place, ""), place / "grpo_killed", instants, seed=1
    )
    assert any(last_phase(log).endswith("save") for log in logs)
    assert any(last_phase(log).endswith("rollout") for log in logs)
    assert weights(place / "grpo_killed") == weights(grpo_run)
    assert [m["step"] for m in metrics(place / "grpo_killed")] == list(range(7))
