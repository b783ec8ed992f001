"""The recipes in runs/ as a person starts them, with --dry_run, on folders without weights.
Stand-ins for torchrun and python write down their arguments, with which the script runs here.
Memory is the plan's, on GPUs of 80 GB."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from inprocess import run_here
from scripts import ROOT
from test_plan import QWEN_1_5B

from bench.plan import SHAPES
from nanopost import plan
from runs import toy

SIZES = {"0.5B": SHAPES["0.5B"], "1.5B": QWEN_1_5B, "7B": SHAPES["7B"]}
RECIPES = [path.name for path in sorted((ROOT / "runs").glob("*.sh")) if "toy" not in path.name]
NOTE = """#!/bin/sh
case "$1" in -|*_sums.py) exec {python} "$@";; esac  # it writes the data
printf '%s\\0' "$@" > {place}/words
"""


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the recipes, their data, and Qwen2.5 without weights, with the toy's
    tokenizer."""
    place = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "runs", place / "runs")
    toy.write_model(place / "toy")
    (place / "toy" / "model.safetensors").unlink()
    for size, config in SIZES.items():
        shutil.copytree(place / "toy", place / f"Qwen2.5-{size}")
        (place / f"Qwen2.5-{size}" / "config.json").write_text(json.dumps(config))
    rows = [{"question": f"{n}+1=?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(300)]
    pairs = [
        {"prompt": "2+2=?", "chosen": [*asked, *said("4")], "rejected": [*asked, *said(str(n))]}
        for n in range(300)
        for asked in [[{"role": "user", "content": "2+2=?"}]]
    ]
    files = {
        "gsm8k/main/train-00000-of-00001": rows,
        "gsm8k/main/test-00000-of-00001": rows[:20],
        "ultrafeedback/data/train_prefs-00000-of-00001": pairs,
        "ultrafeedback/data/test_prefs-00000-of-00001": pairs[:20],
    }
    for name, table in files.items():
        path = place / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    for name in ("torchrun", "python"):
        path = place / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(NOTE.format(python=sys.executable, place=place))
        path.chmod(0o755)
    return place


def commanded(place, recipe, *arguments, gpus=1) -> tuple[str, list[str]]:
    """-> the script that a recipe starts, and the script's arguments."""
    environment = {**os.environ, "PATH": f"{place}/bin:{os.environ['PATH']}", "GPUS": str(gpus)}
    command = ["bash", place / "runs" / recipe, *arguments]
    subprocess.run(command, env=environment, cwd="/", check=True)
    words = (place / "words").read_text().split("\0")[:-1]
    while not words[0].endswith(".py"):
        words.pop(0)
    return words[0], words[1:]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_complete(recipe, place, monkeypatch, capsys):
    """Its data is read, its flags fit its script, and its header says how to start it."""
    script, words = commanded(place, recipe, "Qwen2.5-0.5B", "--dry_run", "--device", "cpu")
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as ended:
        run_here(script, *words)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "dry run: nothing was trained and nothing written" in printed
    assert not (place / words[words.index("--out") + 1] / "run.json").exists()
    header = (ROOT / "runs" / recipe).read_text().partition("set -euo")[0]
    assert f"bash runs/{recipe} " in header and "hf download" in header
    assert words[words.index("--out") + 1] in header


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "smollm2.sh"])
def test_it_fits_into_80_gb(recipe, size, gpus, place):
    script, words = commanded(place, recipe, f"Qwen2.5-{size}", gpus=gpus)
    known = vars(plan.flags().parse_args(["--model", "", "--script", "sft"]))
    name = script.removeprefix("train_").removesuffix(".py")
    longest = {"sft": 512, "grpo": 256, "ppo": 256}.get(name, 2048)
    flags = ["--script", name, "--gpus", str(gpus), "--length", str(longest)]
    value_of = dict(zip(words, words[1:]))
    for flag, value in value_of.items():
        known_here = flag.startswith("--") and flag.removeprefix("--") in known
        if known_here and name in plan.ONLY.get(flag.removeprefix("--"), plan.SCRIPTS):
            flags += [flag, value]
    model = flags.index("--model") + 1
    flags[model] = str(place / flags[model])
    args = plan.parsed(flags)
    peak = plan.peak(args)
    print(f"{shlex.join(flags)}: {peak / 1e9:.0f} GB")
    assert peak < 0.95 * args.machine.memory
