"""The scripts side by side: the same banners in the same order, and the same lines where they do the same.

A shared line that is mended in one script and not in the others is a bug of the others.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["train_sft.py", "train_rm.py", "train_dpo.py", "train_grpo.py", "train_ppo.py"]
BANNER = re.compile(r"^# -{3,} (.+)$|^    # ---- ([a-z]+)", re.M)
BUDGET = {"train_ppo.py": 370}
# Flags whose help or default is a script's own.
OWN = {"rename", "out", "lr", "warmup", "weight_decay", "eval_every"}


def text(script):
    return (ROOT / script).read_text()


def banners(script):
    return [a or b for a, b in BANNER.findall(text(script))]


def block(script, name, last=False):
    """What stands between a banner and the next."""
    found = list(BANNER.finditer(text(script)))
    ends = [m.start() for m in found[1:]] + [len(text(script))]
    parts = [text(script)[m.end() : end] for m, end in zip(found, ends) if (m[1] or m[2]) == name]
    return parts[-1 if last else 0]


def shared_flags(script):
    """{flag: its line} of those that all scripts have."""
    part = block(script, "arguments").split("# Of this algorithm alone:")[0]
    return dict(re.findall(r'^(?=add\("--(\w+)")(.*)$', part, re.M))


def between(script, first, last):
    whole = text(script)
    start = whole.index(first)
    return whole[start : whole.index(last, start) + len(last)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_read_in_the_same_order_and_in_one_sitting(script):
    assert [
        name for name in banners(script) if name not in ("pairs", "rollout", "advantage", "sync")
    ] == [
        "arguments",
        "processes",
        "tokenizer and model",
        "data",
        "optimizer",
        "loop",
        "update",
        "log",
        "save",
        "save",
    ]
    assert len(text(script).splitlines()) <= BUDGET.get(script, 320)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_what_all_scripts_do_alike_stands_in_all_of_them_byte_for_byte(script):
    first = SCRIPTS[0]
    assert block(script, "processes") == block(first, "processes")
    for start, end in (
        ("tokenizer = Tokenizer.load(args.model", "stage = check_stage(args.model, tokenizer)\n"),
        ("shard = partial(", "kernels=args.kernels)\n"),
        ("found = checkpoint.to_resume(", "\n"),
        ("replace = args.overwrite", "logger.say(stage)\n"),
        ('state["args"] = ', "\n"),
        ("    if step == args.steps or args.eval_every", "\n"),
        ("    if args.save_every and step", 'logger.phase("save", step)\n'),
        ("dist.finish()", "\n"),
    ):
        assert between(script, start, end) == between(first, start, end)


def test_flags_that_scripts_share_are_spelled_and_explained_alike():
    first = shared_flags(SCRIPTS[0])
    assert len(first) == 25
    for script in SCRIPTS[1:]:
        flags = shared_flags(script)
        assert list(flags) == [name for name in first if name in flags], script
        assert first.keys() - flags.keys() <= {"schedule"}
        different = {name for name in flags if flags[name] != first[name]}
        assert different <= OWN | {"model"}, (script, different)


def test_grpo_and_ppo_differ_by_the_algorithm_alone():
    """The data block, rollouts, evaluation, sampled text and saving are the same code."""
    for start, end in (
        ('if args.data == "toy":', "reward_weights, tokenizer, world.device)\n"),
        ("def rollout(", "    return metrics\n"),
        ("sampling = Sampling(", "1e-3))\n"),
        ("def evaluate():", "\n\n\n"),
        ("    for name, scorer in", "e.columns[name] = logp\n"),
    ):
        assert between("train_ppo.py", start, end) == between("train_grpo.py", start, end)


def test_the_whole_fits_its_budget():
    parts = (
        [ROOT / script for script in SCRIPTS]
        + [*ROOT.glob("nanopost/*.py")]
        + [*ROOT.glob("kernels/*.py")]
    )
    assert sum(len(path.read_text().splitlines()) for path in parts) <= 6000
