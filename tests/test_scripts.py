"""The scripts run for real, by their command lines: what they write, what they refuse, and kill -9
at any instant."""

import json
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from kills import workers
from scripts import ENVIRONMENT, ROOT, command, metrics, run, weights

from nanopost import hf
from runs import toy

pytestmark = pytest.mark.slow

SFT = ("--steps", 8, "--rows", 16, "--lr", 3e-3, "--save_every", 2, "--eval_every", 4)
GRPO = ("--steps", 6, "--prompts", 4, "--group", 4, "--save_every", 2, "--eval_every", 3)
REWARD = """
class Digits:
    calls = 0

    def __call__(self, completions, answer, **columns):
        assert len(completions) == len(answer)
        self.calls += 1
        bonus = self.calls / 1000
        return [bonus + sum(c.isdigit() for c in text[0]["content"]) / 8 for text in completions]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def digits(completions, **columns):
    return [sum(c.isdigit() for c in text[0]["content"]) / 8 for text in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the toy's model, a short SFT run of it (sft), a reward file, a few prompts."""
    folder = tmp_path_factory.mktemp("scripts")
    toy.write_model(folder / "model")
    toy.write_rows(folder / "rows.jsonl", toy.sft_rows()[:1000])
    held_out = toy.sft_rows(held_out=True, noise=0.0, copies=1)
    toy.write_rows(folder / "rows_heldout.jsonl", held_out[:100])
    (folder / "reward.py").write_text(REWARD)
    prompts = [
        {"prompt": [{"role": "user", "content": f"{a}+11=?"}], "answer": str(a + 11)}
        for a in range(20, 30)
    ]
    toy.write_rows(folder / "prompts.jsonl", prompts)
    chats = [
        {"messages": [*row["prompt"], {"role": "assistant", "content": row["answer"]}]}
        for row in prompts
    ]
    toy.write_rows(folder / "chats.jsonl", chats)
    run("train_sft.py", *sft(folder, folder / "sft"))
    return folder


def sft(place, out, *more):
    data = ("--data", place / "rows.jsonl", "--eval_data", place / "rows_heldout.jsonl")
    return "--model", place / "model", *data, "--out", out, *SFT, *more


def grpo(place, out, *more):
    data = ("--data", place / "prompts.jsonl", "--eval_data", place / "prompts.jsonl")
    reward = ("--reward", f"{place}/reward.py:Digits", "--max_new_tokens", 8, "--lr", 1e-3)
    return "--model", place / "sft", *data, "--out", out, *GRPO, *reward, *more


def test_sft_writes_a_model_its_metrics_and_what_the_run_was(place):
    lines = metrics(place / "sft")
    assert [m["step"] for m in lines] == list(range(9))
    assert all({"loss", "entropy", "grad_norm", "lr", "num_tokens"} <= m.keys() for m in lines[1:])
    assert [m["step"] for m in lines if "eval/loss" in m] == [0, 4, 8]
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"] - 0.5
    (start,) = json.loads((place / "sft" / "run.json").read_text())
    assert start["args"]["rows"] == 16 and start["template_hash"]
    assert start["torch"] == torch.__version__
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
    """The same prompts, rollouts and minibatches, until rounding flips the draw of a token some
    steps later."""
    started = command("train_grpo.py", *grpo(place, place / "grpo2"), ranks=2)
    subprocess.run(started, env=ENVIRONMENT, check=True, timeout=300)
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


# Every choice of every flag of the family, with defaults and the tests above.
VARIANTS = [
    "--adv loo --ratio sequence_sum --beta 0.1",
    "--adv mean --agg constant --old_logp trainer --correct token-truncate",
    "--ratio sequence --agg sequence --beta 0.05 --tokens 64",
    "--loss cispo --adv batch --resample 3 --stop 999 --temperature 0.7",
    "--clip 0.2 0.28 --old_logp trainer --correct sequence-mask --minibatches 4 --group 8",
    "--loss sapo --agg sequence_sum --old_logp trainer --correct token-mask --beta 0.1 --kl k2",
    "--correct sequence-truncate --old_logp trainer --correct_cap 1.5",
]


@pytest.mark.parametrize("flags", VARIANTS)
def test_every_member_of_the_family_runs(place, tmp_path, flags):
    run("train_grpo.py", *grpo(place, tmp_path / "x"), *flags.split(), "--steps", 2)
    last = metrics(tmp_path / "x")[-1]
    assert last["step"] == 2 and last["grad_norm"] > 0 and abs(last["loss"]) < 10
    assert ("kl" in last) == ("--beta" in flags)


def test_groups_without_variance_end_in_a_sentence(place, tmp_path):
    flags = ("--reward", "regex:never", "--resample", 2)
    done = run("train_grpo.py", *grpo(place, tmp_path / "x"), *flags, ok=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "in 3 rounds of 4 prompts every group of 4 had equal rewards" in done.stderr
    assert not (tmp_path / "x" / "checkpoints").exists()  # nothing was trained


def test_groups_without_variance_are_kept_and_a_step_of_them_moves_nothing(place, tmp_path):
    """The default, --resample 0: nothing to learn is no gradient and no error."""
    flags = ("--steps", 2, "--reward", "regex:never")
    run("train_grpo.py", *grpo(place, tmp_path / "x"), *flags)
    assert all(m["grad_norm"] == 0 == m["loss"] for m in metrics(tmp_path / "x")[1:])
    assert weights(tmp_path / "x") == weights(place / "sft")


def test_without_held_out_rows_nothing_is_evaluated(place, tmp_path):
    data = ("--model", place / "sft", "--data", place / "chats.jsonl", "--holdout", 0)
    run("train_sft.py", *data, "--out", tmp_path, "--steps", 2, "--eval_every", 0)
    lines = metrics(tmp_path)
    assert [m["step"] for m in lines] == [0, 1, 2]
    assert not any(name.startswith("eval") for m in lines for name in m)


def test_two_ranks_write_a_run_once(place, tmp_path):
    done = run("train_sft.py", *sft(place, tmp_path), "--steps", 1, ranks=2)
    assert [m["step"] for m in metrics(tmp_path)] == [0, 1]
    assert len(json.loads((tmp_path / "run.json").read_text())) == 1
    assert done.stdout.count("step 1/1") == done.stdout.count("the model is in") == 1


def test_a_run_is_not_overwritten_unless_told(place):
    done = run("train_sft.py", *sft(place, place / "sft"), ok=False)
    assert done.returncode == 1 and "already holds a run: add --resume" in done.stderr
    assert len(metrics(place / "sft")) == 9


def test_another_template_than_the_one_trained_with_is_said_loudly(place, tmp_path):
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    flags = ("--chat_template", other, "--steps", 1)
    done = run("train_grpo.py", *grpo(place, tmp_path / "x"), *flags)
    assert "WARNING" in done.stdout and "was trained with another template" in done.stdout


# ----------------------------------------------------------------------------------------- refusals
DIVIDE = "--prompts 7 does not divide into 1 ranks x 3 minibatches: 6 or 9 would."


@pytest.mark.parametrize(
    "script, flags, sentence",
    [
        ("train_grpo.py", "--reward exact --prompts 7 --minibatches 3", DIVIDE),
        ("train_ppo.py", "--reward exact --prompts 7 --minibatches 3", DIVIDE),
        ("train_sft.py", "", "nowhere"),
        ("train_rm.py", "", "nowhere"),
        ("train_dpo.py", "--loss_weights 1 2", "2 values for 1 --loss"),
        ("train_kto.py", "", "nowhere"),
        ("train_online_dpo.py", "", "give --reward or --judge"),
        ("train_distill.py", "--teacher t --prompts 7 --minibatches 3", DIVIDE),
    ],
)
def test_what_a_person_gets_wrong_is_answered_with_one_sentence(tmp_path, script, flags, sentence):
    given = ("--model", tmp_path / "nowhere", "--data", tmp_path / "none", "--out", tmp_path / "x")
    done = run(script, *given, *flags.split(), ok=False)
    assert done.returncode == 1 and not (tmp_path / "x").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr


# ------------------------------------------------------------------------------------------ kill -9
class Killed:
    """A run that is started with --resume again and again, and killed each time.

    Where it stands is read from its folder alone: step k has begun when step k - 1 is in
    metrics.jsonl and saved, if it is to be saved; a save has begun when its .tmp folder is there.
    """

    def __init__(self, script, arguments, out, save_every):
        self.command = [ROOT / script, *arguments, "--out", out, "--resume"]
        self.out, self.save_every = Path(out), save_every

    def start(self):
        """Start, and wait until the folder is this start's: what an earlier one logged is gone."""
        before = self.manifest()
        log = Path(f"{self.out}.log")
        log.unlink(missing_ok=True)
        self.process = forked.start(forked.python, log, log, self.command, ENVIRONMENT)
        self.wait(lambda: self.manifest() != before)

    def manifest(self):
        try:
            return (self.out / "run.json").stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def wait(self, reached, *step):
        deadline = time.monotonic() + 200
        while not reached(*step):
            assert self.process.is_alive() and time.monotonic() < deadline, self.log()
            time.sleep(0.001)

    def kill(self) -> str:
        """-> where the run was: "save 4" or "step 5"."""
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL, self.log()
        unfinished = [*(self.out / "checkpoints").glob("*.tmp")]
        if unfinished:
            return f"save {int(unfinished[0].stem.removeprefix('step-'))}"
        last = self.last_step()
        if self.is_saved(last):
            return f"step {last + 1}"
        return f"save {last}"  # about to begin it

    def last_step(self):
        """The last step logged; -1 before the first line."""
        path = self.out / "metrics.jsonl"  # gone for a moment where a run replaces another
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else -1

    def is_saved(self, step):
        return step < 1 or step % self.save_every > 0 or self.folder(step).exists()

    def folder(self, step, suffix=""):
        return self.out / "checkpoints" / f"step-{step:06d}{suffix}"

    def begins_step(self, step):
        return self.last_step() >= step - 1 and self.is_saved(step - 1)

    def begins_save(self, step):
        return self.folder(step, ".tmp").exists() or self.folder(step).exists()

    def log(self):
        return Path(f"{self.out}.log").read_text()[-3000:]


def killed_and_resumed(run, instants, seed, longest) -> list[str]:
    """Kill a run at each instant, a random moment after it begins (at most longest[kind] seconds),
    then let it end -> where it was each time."""
    draw, found = random.Random(seed), []
    for kind, step in instants:
        run.start()
        run.wait({"step": run.begins_step, "save": run.begins_save}[kind], step)
        time.sleep(draw.random() * longest[kind])
        found.append(run.kill())
    # The rest in a python of its own: forks share how strings hash, and so the order of a set.
    python = [sys.executable, *map(str, run.command)]
    done = subprocess.run(python, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    kinds = {where.split()[0] for where in found}
    assert kinds == {"step", "save"}, found
    return found


def same_lines(out, other):
    """Of two runs, but for what a clock measures."""
    parts = []
    for folder in (out, other):
        lines = metrics(folder)
        for line in lines:
            for name in [n for n in line if n.startswith("time/") or n == "tokens_per_second"]:
                del line[name]
        parts.append(lines)
    assert parts[0] == parts[1]


def test_sft_killed_five_times_ends_with_the_weights_of_one_never_killed(place):
    killed = Killed("train_sft.py", sft(place, ""), place / "sft_killed", save_every=2)
    instants = [("step", 1), ("save", 2), ("save", 4), ("save", 6), ("step", 7)]
    killed_and_resumed(killed, instants, seed=0, longest={"step": 0.05, "save": 0.05})
    assert weights(place / "sft_killed") == weights(place / "sft")
    same_lines(place / "sft_killed", place / "sft")


def test_grpo_killed_five_times_ends_with_the_weights_of_one_never_killed(place, grpo_run):
    """Kills within a step are spread over its rollout and update by the times of the whole run."""
    killed = Killed("train_grpo.py", grpo(place, ""), place / "grpo_killed", save_every=2)
    instants = [("step", 1), ("save", 2), ("step", 3), ("save", 4), ("step", 5)]
    longest = {"step": metrics(grpo_run)[2]["time/step"], "save": 0.05}
    killed_and_resumed(killed, instants, seed=1, longest=longest)
    assert weights(place / "grpo_killed") == weights(grpo_run)
    same_lines(place / "grpo_killed", grpo_run)
    lines = [(p / "samples.jsonl").read_text() for p in (place / "grpo_killed", grpo_run)]
    assert lines[0] == lines[1]


# ------------------------------------------------------------------------- signals and failed steps
def started(script, arguments, out, ranks=0):
    """A run in the background that has logged two steps and never saves by itself."""
    flags = (*arguments, "--save_every", 0, "--keep", 1)
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(
            command(script, *flags, ranks=ranks), env=ENVIRONMENT, stdout=log, stderr=log
        )
    deadline = time.monotonic() + 200
    path = out / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, said(out)
        time.sleep(0.01)
    return process


def said(out):
    return Path(f"{out}.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_resumes_to_the_last_bit(place, tmp_path, number):
    out = tmp_path / "run"
    process = started("train_sft.py", sft(place, out, "--steps", 8), out)
    process.send_signal(number)
    assert process.wait(60) == 128 + number and "Traceback" not in said(out)
    step = metrics(out)[-1]["step"]
    assert 2 <= step < 8
    assert f"stopped by {number.name}: --resume continues after step {step}\n" in said(out)
    done = run("train_sft.py", *sft(place, out, "--resume"))
    assert f"resumed at step {step}\n" in done.stdout
    assert weights(out) == weights(place / "sft")
    same_lines(out, place / "sft")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_stopped_or_killed_leaves_a_checkpoint_and_no_process(
    place, tmp_path, number
):
    out = tmp_path / "run"
    process = started("train_sft.py", sft(place, out, "--steps", 500), out, ranks=2)
    assert len(workers(out)) == 2
    process.send_signal(number)
    process.wait(60)
    deadline = time.monotonic() + 60
    while workers(out):
        assert time.monotonic() < deadline, said(out)
        time.sleep(0.05)
    step = metrics(out)[-1]["step"]
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{step:06d}"], said(out)
    assert f"stopped by SIGTERM: --resume continues after step {step}\n" in said(out)


def test_a_reward_that_fails_leaves_the_step_before_it_to_resume_from(place, tmp_path, grpo_run):
    out, flag = tmp_path / "run", tmp_path / "fails"
    fails = f"calls.append(1); assert len(calls) < 10 or not os.path.exists({str(flag)!r})"
    failing = REWARD.replace("        assert", f"        {fails}\n        assert")
    (tmp_path / "reward.py").write_text("import os\ncalls = []\n" + failing)
    flag.write_text("")
    flags = ("--reward", f"{tmp_path}/reward.py:Digits", "--save_every", 0)
    done = run("train_grpo.py", *grpo(place, out, *flags), ok=False)
    step = metrics(out)[-1]["step"]
    assert done.returncode == 1 and 1 <= step < 6
    assert done.stderr.endswith(f"\n--resume continues after step {step}\n")
    assert "Traceback" not in done.stderr
    flag.unlink()
    run("train_grpo.py", *grpo(place, out, *flags, "--resume"))
    assert weights(out) == weights(grpo_run)
    same_lines(out, grpo_run)


def test_a_run_whose_reward_fails_at_once_is_run_again_by_the_same_command(place, tmp_path):
    (tmp_path / "reward.py").write_text("def f(completions, **columns):\n    return [1 / 0]\n")
    flags = ("--reward", f"{tmp_path}/reward.py:f", "--steps", 1)
    for _ in range(2):
        done = run("train_grpo.py", *grpo(place, tmp_path / "x", *flags), ok=False)
        assert done.stderr.endswith(
            "\nnothing was trained yet: correct it, then run the same command again\n"
        )


def test_a_resampled_batch_does_not_depend_on_the_number_of_ranks(place, tmp_path):
    """The groups kept, and which minibatch each is in; a rank draws none in a round of one."""
    flags = ("--resample", 6, "--steps", 3, "--reward", f"{place}/reward.py:digits")
    flags += ("--temperature", 0.5, "--lr", 1e-5, "--eval_every", 0, "--minibatches", 2)
    for ranks in (1, 2):
        run("train_grpo.py", *grpo(place, tmp_path / str(ranks), *flags), ranks=ranks)
    one, two = (metrics(tmp_path / name)[1:] for name in ("1", "2"))
    assert any(line["prompts_drawn"] % 2 for line in one)
    for a, b in zip(one, two, strict=True):
        for name in ("groups", "prompts_drawn", "frac_reward_zero_std"):
            assert a[name] == b[name], name
        for name in ("reward", "reward_std", "loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_what_a_run_will_do_is_said_before_it_starts(place, tmp_path):
    done = run("train_sft.py", *sft(place, tmp_path / "x", "--steps", 2, "--eval_rows", 7))
    assert "1,000 rows to train on, 7 held out\n" in done.stdout
    assert "of the 1,000 rows of an epoch: 2 steps, 0.032 epochs" in done.stdout
    done = run("train_grpo.py", *grpo(place, tmp_path / "y", "--steps", 1, "--eval_rows", 3))
    assert "10 prompts, 3 held out" in done.stdout and "1 steps of 4 prompts: 0.4 ep" in done.stdout


def test_a_closed_pipe_ends_a_run_with_a_sentence(place, tmp_path):
    words = shlex.join(command("train_sft.py", *sft(place, tmp_path), "--steps", 200))
    done = subprocess.run(
        ["bash", "-c", f"{words} | head -n 4"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    assert "error: what reads its output has ended" in done.stderr
    assert len(metrics(tmp_path)) < 100
