"""The toy's files, and the toy learned in short: SFT and GRPO; with -m long more losses, and PPO.

The whole of it, over three seeds and all losses, is `python -m bench.toy`.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import ENVIRONMENT, ROOT, metrics, run

from nanopost import hf
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.environment import Environments
from nanopost.rewards import load, score
from nanopost.rollout import Rollout
from nanopost.tokenizer import Tokenizer
from runs import toy


def write(*arguments, cwd):
    command = [sys.executable, str(ROOT / "runs/toy.py"), *map(str, arguments)]
    subprocess.run(command, cwd=cwd, env=ENVIRONMENT, check=True, timeout=300)


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]


def asked(question):
    return [{"role": "user", "content": question}]


def answered(answer):
    return [{"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The toy, written from another folder than the repository's."""
    place = tmp_path_factory.mktemp("toy")
    write("made/toy", cwd=place)
    return place / "made/toy"


@pytest.mark.parametrize(
    "name, count, first, last",
    [
        ("prompts", 7279, ("10+10=?", "<answer>20</answer>"), ("99+99=?", "<answer>198</answer>")),
        (
            "prompts_heldout",
            821,
            ("10+13=?", "<answer>23</answer>"),
            ("99+98=?", "<answer>197</answer>"),
        ),
    ],
)
def test_prompts_have_the_right_answers(folder, name, count, first, last):
    rows = lines(folder / f"{name}.jsonl")
    assert len(rows) == count
    for row, (question, answer) in ((rows[0], first), (rows[-1], last)):
        assert row == {"prompt": asked(question), "answer": answer}


def test_half_of_the_rows_to_train_on_are_near_misses(folder):
    right = {row["prompt"][0]["content"]: row["answer"] for row in lines(folder / "prompts.jsonl")}
    rows = [row["messages"] for row in lines(folder / "sft.jsonl")]
    assert len(rows) == 6 * 7279
    first = [answer["content"] for _, answer in rows[:8]]
    assert first == [f"<answer>{n}</answer>" for n in (20, 21, 33, 24, 36, 26, 37, 28)]
    assert [question["content"] for question, _ in rows] == 6 * list(right)
    wrong = [a["content"] for q, a in rows if a["content"] != right[q["content"]]]
    assert 0.49 < len(wrong) / len(rows) < 0.51


def test_the_held_out_rows_are_right_and_of_other_sums(folder):
    rows = [row["messages"] for row in lines(folder / "sft_heldout.jsonl")]
    prompts = lines(folder / "prompts_heldout.jsonl")
    assert rows == [[*row["prompt"], *answered(row["answer"])] for row in prompts]
    trained = {row["prompt"][0]["content"] for row in lines(folder / "prompts.jsonl")}
    for question, _ in rows:
        a, b = question["content"].removesuffix("=?").split("+")
        assert not trained & {f"{a}+{b}=?", f"{b}+{a}=?"}


@pytest.mark.parametrize("arch", toy.ARCHITECTURES)
def test_models_of_all_architectures_are_of_one_size(tmp_path, arch):
    toy.write_model(tmp_path, arch=arch)
    model = hf.load_model(tmp_path)
    assert model.config.family == toy.ARCHITECTURES[arch]["model_type"]
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 1.1e6


def test_the_model_is_the_same_each_time_and_knows_its_tokens(folder, tmp_path):
    toy.write_model(tmp_path)
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / "model" / name).read_bytes()
    tokenizer = Tokenizer.load(folder / "model")
    ids = tokenizer.prompt_ids(asked("1+2=?"))
    assert tokenizer.decode(ids) == "<|user|>1+2=?<|assistant|>" and len(ids) == 7
    assert tokenizer.stop_ids == {1} and len(tokenizer.raw.encode("<answer>46</answer>").ids) == 4


def test_pairs_are_the_right_answer_and_a_slip(folder):
    rows = toy.pair_rows(folder / "model", held_out=True)
    assert len(rows) == 821  # an untrained model is always wrong
    assert rows[0]["prompt"] == asked("10+13=?") and rows[0]["answer"] == "<answer>23</answer>"
    for row in rows:
        assert list(row) == ["prompt", "answer", "chosen", "rejected"]
        assert row["chosen"] == answered(row["answer"]) != row["rejected"]


# ----------------------------------------------------------------------------------------- learning
QUIET = ("--device", "cpu", "--save_every", 0, "--eval_every", 0)


def data(folder, name):
    return "--data", folder / f"{name}.jsonl", "--eval_data", folder / f"{name}_heldout.jsonl"


@pytest.fixture(scope="module")
def sft(folder):
    out = folder / "sft"
    flags = ("--steps", 700, "--lr", 3e-3, *data(folder, "sft"), *QUIET)
    run("train_sft.py", "--model", folder / "model", "--out", out, *flags, timeout=900)
    return out


@pytest.fixture(scope="module")
def pairs(folder, sft):
    write(folder, "--pairs", sft, cwd=folder)
    return data(folder, "pairs")


def exact_match(model) -> float:
    """Share of the held-out sums that a sample at temperature 1 gets right."""
    rows = toy.prompt_rows(held_out=True)
    tokenizer = Tokenizer.load(model)
    engine = Engine.of(hf.load_model(model), tokenizer)
    prompts = [tokenizer.prompt_ids(row["prompt"]) for row in rows]
    seeds = [prompt_seed(0, serial) for serial in range(len(rows))]
    groups = engine.generate(prompts, 1, Sampling(8), seeds)
    functions, _ = load(["exact"], None)
    return float(score(functions, tokenizer, rows, groups).mean())


@pytest.mark.long
@pytest.mark.parametrize(
    "script, flags, rise",
    [
        ("train_dpo.py", ("--beta", 1), 0.5),
        ("train_dpo.py", ("--loss", "simpo", "--beta", 2, "--gamma", 1), 0.1),  # per token
        ("train_kto.py", ("--loss", "kto", "--beta", 1), 0.5),
    ],
)
def test_a_preference_loss_tells_pairs_apart_and_raises_held_out_exact_match(
    sft, pairs, tmp_path, script, flags, rise
):
    flags += ("--steps", 50, "--lr", 2e-4, "--warmup", 5, *pairs, *QUIET)
    run(script, "--model", sft, "--out", tmp_path, *flags, timeout=900)
    before, *_, after = metrics(tmp_path)
    gap = [m["eval/rewards/chosen"] - m["eval/rewards/rejected"] for m in (before, after)]
    # Chance is 0.5, with about 1,100 pairs that the SFT model's samples are a half of.
    assert after["eval/rewards/accuracies"] > 0.65 and gap[1] > gap[0] + rise
    assert after["eval/loss"] < before["eval/loss"]
    assert exact_match(tmp_path) > exact_match(sft) + 0.05


@pytest.mark.slow
def test_grpo_learns_from_rollouts_that_run_ahead(folder, sft, tmp_path):
    flags = ("--steps", 25, "--prompts", 64, "--group", 8, "--lr", 2e-4, "--max_new_tokens", 8)
    flags += ("--reward", "exact", "--max_staleness", 2)
    flags += ("--old_logp", "trainer", "--correct", "token-truncate")
    flags += (*data(folder, "prompts"), *QUIET)
    run("train_grpo.py", "--model", sft, "--out", tmp_path, *flags, timeout=900)
    before, *steps, after = metrics(tmp_path)
    assert after["eval/accuracy"] > before["eval/accuracy"] + 0.1
    assert max(line["staleness/max"] for line in steps) <= 2
    assert sum(line["staleness/mean"] > 0 for line in steps) > len(steps) / 2


@pytest.mark.long
def test_ppo_learns_from_the_exact_reward(folder, sft, tmp_path):
    flags = ("--steps", 15, "--prompts", 256, "--lr", 5e-4, "--warmup", 3, "--max_new_tokens", 8)
    flags += ("--reward", "exact", *data(folder, "prompts"), *QUIET)
    run("train_ppo.py", "--model", sft, "--out", tmp_path, *flags, timeout=900)
    before, *_, after = metrics(tmp_path)
    assert after["eval/accuracy"] > before["eval/accuracy"] + 0.1


# ------------------------------------------------------------------------------------- with a tool
def test_rows_with_a_calculator_hold_its_results_and_are_wrong_as_often_as_said():
    rows, results = toy.tool_rows(held_out=True), []
    for row in rows:
        question, *calls, answer = row["messages"]
        a, b = map(int, question["content"].removesuffix("=?").split("*"))
        if calls:
            arguments = calls[0]["tool_calls"][0]["function"]["arguments"]
            assert calls[1]["content"] == str(toy.Calculator().times(**arguments))
        right = answer["content"] == f"<answer>{a * b}</answer>"
        results.append((right, bool(calls)))
    share = sum(right for right, _ in results) / len(rows)
    assert len(rows) == 821 and abs(share - 0.35) < 0.05
    assert 0.2 < results.count((False, True)) / len(rows) < 0.45
    clean = toy.tool_rows(held_out=True, noise=0.0)
    expected = [row["answer"] for row in toy.product_rows(held_out=True)]
    assert [row["messages"][-1]["content"] for row in clean] == expected


def test_its_task_is_two_short_answers(tmp_path):
    """In an episode of the run's own environment, with its own flags for lengths."""
    toy.write_model(tmp_path, with_tools=True)
    tokenizer = Tokenizer.load(tmp_path)
    environments = Environments(f"{ROOT / 'runs/toy.py'}:Calculator", tokenizer, 3, 9.0, 512)
    rows = toy.product_rows(held_out=True)[-2:]
    clean = toy.tool_rows(held_out=True, noise=0.0)[-2:]
    assert environments.schemas == clean[0]["tools"]
    for row, sft in zip(rows, clean):
        row |= {"tools": sft["tools"]}
        row["prompt_ids"] = tokenizer.prompt_ids(row["prompt"], row["tools"])
        example = tokenizer.example(sft)

        def generate(prompts, n, sampling, seeds, example=example):
            """What SFT has taught, up to the next end."""
            (prompt,), ids = prompts, example.ids.tolist()
            assert ids[: len(prompt)] == prompt
            answer = ids[len(prompt) : ids.index(1, len(prompt)) + 1]
            assert len(answer) <= sampling.max_tokens
            return [[Rollout(prompt, answer, np.zeros(len(answer), np.float32), "stop", 0)]]

        engine = SimpleNamespace(generate=generate)
        ((rollout,),) = environments.play(engine, [row], 1, Sampling(20), [0])
        assert rollout.prompt + rollout.ids == example.ids.tolist()
        assert (rollout.example().mask == example.mask).all()
        functions, _ = load(["exact"], None)
        assert score(functions, tokenizer, [row], [[rollout]]).tolist() == [[[1.0]]]
