"""Every flag, choice, metric and fork is covered by some run of the twins."""

import ast
import importlib
import re
import shlex
from functools import cache

import pytest
from scripts import ROOT, SCRIPTS

import forks
from twins import common


def module(script):
    """The twin of train_sft.py is twins/sft.py."""
    name = script.removeprefix("train_").removesuffix(".py")
    return importlib.import_module(f"twins.{name}")


@cache
def values_of(script) -> dict[str, list]:
    """flag -> its value in each run of the script that is no fork's."""
    twin, found = module(script), {}
    for name in twin.RUNS:
        if not name.startswith("fork "):
            for flag, value in vars(common.parsed(twin, name, "PLACE", "OUT")).items():
                found.setdefault(flag, []).append(value)
    return found


def listed(value) -> list:
    return value if isinstance(value, list) else [value]


# Flags that a script refuses unless they have their defaults: test_loops.py.
NONE_BUT_DEFAULT = {"train_distill.py": ("top_k", "top_p", "min_p", "reward_weights")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_another_value_than_its_default_in_some_run(script):
    values = values_of(script)
    for action in common.parser(script)._actions:
        name = action.dest
        if name == "help" or name in common.PLUMBING or name in NONE_BUT_DEFAULT.get(script, ()):
            continue
        assert any(value != action.default for value in values[name]), f"no run gives --{name}"


REFUSED = {("train_grpo.py", "kl", "k1")}  # but by the fork kl_reward; test_loops.py


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_choice_is_taken_in_some_run(script):
    values = values_of(script)
    for action in common.parser(script)._actions:
        if action.choices and action.dest not in common.PLUMBING:
            taken = [x for value in values[action.dest] for x in listed(value)]
            missing = [choice for choice in action.choices if choice not in taken]
            missing = [x for x in missing if (script, action.dest, x) not in REFUSED]
            assert not missing, f"no run has --{action.dest} {' '.join(missing)}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_twin_is_compared_in_all_its_runs_and_after_a_resume_and_on_two_ranks(script):
    name = module(script).__name__.removeprefix("twins.")
    test = (ROOT / f"tests/twins/test_{name}.py").read_text()
    needed = ("check_flags_matter(", f"{name}.RUNS", "resume=True", "ranks=2", "check_metrics(")
    assert [text for text in needed if text not in test] == []


ARCHITECTURES = {"olmo2"}  # no twin has another model; test_forks_other.py compares transformers


def test_every_fork_has_a_run_that_gives_its_flags():
    there = {}
    for script in SCRIPTS:
        for name, flags in module(script).RUNS.items():
            if name.startswith("fork "):
                there[name.removeprefix("fork ")] = script, flags
    assert there.keys() == {*forks.NAMES} - ARCHITECTURES
    for fork, (script, flags) in there.items():
        assert script == forks.script_of(fork)
        own = {flag for flag in forks.flags_of(fork) if flag.startswith("--")}
        own -= {f"--{action.dest}" for action in common.parser(script)._actions}
        assert own <= set(shlex.split(flags)), f"the run of {fork} lacks a flag of it"


def test_what_is_left_out_is_a_flag_and_held_by_a_test():
    flags = {action.dest for script in SCRIPTS for action in common.parser(script)._actions}
    assert flags >= {*common.PLUMBING, *common.INVARIANT}
    for name, test in common.PLUMBING.items():
        found = re.search(rf"\b{name}\b", (ROOT / "tests" / test).read_text())
        assert found, f"{test} has no {name}"


def logged(script) -> set[str]:
    """The names of metrics that stand in a script's evaluate() and loop, as far as they stand there
    in full: keywords of .add(), keys of dictionaries with / in them or named metrics."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "meter.add":
            found |= {keyword.arg for keyword in node.keywords if keyword.arg}
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "metrics":
            for keys in [x.keys for x in ast.walk(node.value) if isinstance(x, ast.Dict)]:
                found |= {key.value for key in keys if isinstance(key, ast.Constant)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("eval/") and node.value != "eval/" and " " not in node.value:
                found.add(node.value)
    return {name for name in found if not name.startswith(common.UNTWINNED)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_is_computed_by_the_twin(script):
    """Its own test compares METRICS with what its runs log."""
    assert logged(script) - module(script).METRICS == set()
