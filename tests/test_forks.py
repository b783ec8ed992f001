"""Every patch in forks/: it applies exactly, is short and plain, and its script runs."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripts import metrics, run

from forks import NAMES, ROOT, apply, files, flags_of, header, patched, rows_of, script_of, text
from nanopost import hf
from nanopost.batch import Example
from nanopost.forward import logprobs
from runs import toy

# Forks that people combine, in the order in which they are applied.
COMBINED = [
    ("two_sided_clip", "overlong_mask", "entropy_bonus"),
    ("overlong_mask", "top_entropy", "off_policy_mask", "kl_reward", "median_baseline"),
    ("gdpo", "two_sided_clip", "entropy_bonus", "top_entropy"),
    ("multi_turn", "echo", "overlong_mask"),
    ("multi_turn", "curriculum", "two_sided_clip", "overlong_mask", "entropy_bonus"),
]
REWARD = """
def digits(completions, **columns):
    return [sum(c.isdigit() for c in text[0]["content"]) / 8 for text in completions]
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The scripts without a fork."""
    return patched(tmp_path_factory.mktemp("plain"))


def may_touch_two_files(name):
    """An optimizer, an architecture or a row format may, and may add 30 lines in place of 15."""
    return bool(re.search(r"optimizer(?! step)|architecture|row format", header(name)))


# ------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize("name", NAMES)
def test_a_fork_says_what_it_does_and_how_to_run_it(name):
    assert header(name).split("\n")[0] and flags_of(name)
    assert all(len(line) <= 100 for line in header(name).splitlines())
    assert f"{name}.diff" in (ROOT / "forks" / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_fork_is_a_few_lines_of_one_file(name):
    added = [x for x in text(name).splitlines() if x.startswith("+") and not x.startswith("+++")]
    if may_touch_two_files(name):
        assert len(files(name)) <= 2 and len(added) <= 30
    else:
        assert len(files(name)) == 1 and len(added) <= 15


# --------------------------------------------------------------------------------------- applying
@pytest.mark.parametrize("name", NAMES)
def test_a_fork_applies_exactly_and_leaves_plain_code(name, tmp_path):
    folder = patched(tmp_path)
    before = {file: (folder / file).read_text() for file in files(name)}
    done = apply(folder, name)
    assert done.returncode == 0 and "offset" not in done.stderr, done.stderr
    assert all((folder / file).read_text() != text for file, text in before.items())
    check_style(folder, files(name))


@pytest.mark.parametrize("names", COMBINED, ids="+".join)
def test_forks_that_people_combine_apply_together(names, tmp_path):
    check_style(patched(tmp_path, *names), [script_of(names[0])])


def check_style(folder, files):
    pytest.importorskip("ruff")
    for command in (["format", "--check"], ["check", "--quiet"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------- running
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The toy's model, rows of every format and a reward."""
    folder = tmp_path_factory.mktemp("forks")
    toy.write_model(folder / "model")
    toy.write_model(folder / "teacher", seed=1)
    (folder / "reward.py").write_text(REWARD)
    prompts = toy.prompt_rows(held_out=False)[:12]
    chats = toy.sft_rows(copies=1)[:12]
    pairs = []
    for row in prompts:
        answers = {"chosen": row["answer"], "rejected": "<answer>7</answer>"}
        sides = {k: [{"role": "assistant", "content": text}] for k, text in answers.items()}
        pairs.append(row | sides)
    for name, rows in (("prompts", prompts), ("chats", chats), ("pairs", pairs)):
        toy.write_rows(folder / f"{name}.jsonl", rows)
    return folder


def small_run(place, script):
    """Flags that make a run of a script small; given last, they replace those before them."""
    sampled = ["--reward", f"{place}/reward.py:digits", "--prompts", 8, "--max_new_tokens", 8]
    return {
        "train_grpo.py": [*sampled, "--data", f"{place}/prompts.jsonl"],
        "train_ppo.py": [*sampled, "--data", f"{place}/prompts.jsonl"],
        "train_online_dpo.py": [*sampled, "--data", f"{place}/prompts.jsonl"],
        "train_dpo.py": ["--rows", 4, "--data", f"{place}/pairs.jsonl"],
        "train_kto.py": ["--rows", 4, "--data", f"{place}/pairs.jsonl"],
        "train_rm.py": ["--rows", 4, "--data", f"{place}/pairs.jsonl"],
        "train_sft.py": ["--rows", 4, "--data", f"{place}/chats.jsonl"],
    }[script]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_fork_runs_by_the_command_line_of_its_header(name, place, tmp_path):
    script = script_of(name)
    flags = [*flags_of(name), *small_run(place, script)]
    if rows_of(name):  # a row format of its own
        (tmp_path / "rows.jsonl").write_text(json.dumps(rows_of(name)[0]) + "\n")
        rows = (tmp_path / "rows.jsonl").read_text() * 8
        (tmp_path / "rows.jsonl").write_text(rows)
        flags += ["--data", tmp_path / "rows.jsonl"]
    if "--teacher" in flags:
        flags += ["--teacher", place / "teacher"]
    flags += ["--model", place / "model", "--out", tmp_path / "out", "--holdout", 2]
    flags += ["--steps", 3, "--save_every", 0, "--lr", 1e-3, "--warmup", 0, "--device", "cpu"]
    run(patched(tmp_path, name) / script, *flags)
    check_run(tmp_path / "out", place)


@pytest.mark.slow
@pytest.mark.parametrize("names", COMBINED[-2:], ids="+".join)
def test_forks_run_together(place, tmp_path, names):
    flags = [*flags_of("multi_turn"), *small_run(place, "train_grpo.py")]
    flags += ["--model", place / "model", "--out", tmp_path / "out", "--stop", *"abcdefghijklmnop"]
    flags += ["--steps", 3, "--save_every", 0, "--lr", 1e-3, "--warmup", 0, "--device", "cpu"]
    run(patched(tmp_path, *names) / "train_grpo.py", *flags, "--holdout", 2)
    check_run(tmp_path / "out", place)


def test_distillation_credits_a_token_by_how_much_likelier_it_is_for_the_teacher(
    place, tmp_path, alone
):
    flags = [*flags_of("distill"), *small_run(place, "train_grpo.py"), "--group", 2]
    flags += ["--teacher", place / "teacher", "--model", place / "model", "--holdout", 2]
    flags += ["--out", tmp_path / "out", "--steps", 1, "--record", "--device", "cpu"]
    run(patched(tmp_path, "distill") / "train_grpo.py", *flags)
    _, *lines = map(json.loads, (tmp_path / "out/records/000001.jsonl").read_text().splitlines())
    assert len(lines) == 16
    examples = [Example(line["ids"], line["mask"]) for line in lines]
    of_teacher = logprobs(hf.load_model(place / "teacher"), examples, 1000, 1.0, "cpu")
    for line, e, logp_T in zip(lines, examples, of_teacher):
        expected_T = (logp_T - np.array(line["engine_logp"])) * e.mask
        assert np.abs(expected_T).max() > 0.01
        np.testing.assert_allclose(line["adv"], expected_T, atol=1e-5)


def check_run(out, place):
    lines = metrics(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    values = torch.tensor([x for line in lines for x in line.values()])
    assert values.isfinite().all()
    before, after = (load_file(x / "model.safetensors") for x in (place / "model", out))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
