"""Rewards: verifiers of answers, and the loading of a user's own function.

A reward is f(completions, **columns) -> list[float | None], TRL's signature. completions: strings, or message
lists of which the last is read. columns: those of the rows and what the loop adds (prompts, prompt_ids,
completion_ids), each a list as long as completions. None says that the reward does not apply to a completion.
"""

import importlib.util
import inspect
import itertools
import math
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanopost import InputError, forward
from nanopost.batch import Example
from nanopost.hf import load_scalar_model
from nanopost.verify import (
    boxed,
    exact,
    full_match,
    gsm8k,
    gsm8k_format,
    overlong,
    text_of,
)


class Reward(NamedTuple):
    name: str  # in the metrics: rewards/NAME/mean
    function: Callable


# ---------------------------------------------------------------------------------------- loading and calling
def load_rewards(specs: list[str], weights: list[float] | None, tokenizer=None, device=None):
    """All of --reward, and --reward_weights or ones -> (list[Reward], list[float])."""
    if not specs:
        raise InputError(
            "--reward is missing: say what scores the answers (--help lists what there is)."
        )
    rewards = []
    for spec in specs:
        reward, taken = load_reward(spec, tokenizer, device), {r.name for r in rewards}
        names = itertools.chain([reward.name], (f"{reward.name}-{k}" for k in itertools.count(2)))
        rewards.append(
            reward._replace(name=next(n for n in names if n not in taken))
        )  # each has metrics of its own
    if weights and len(weights) != len(rewards):
        raise InputError(
            f"--reward_weights has {len(weights)} values for {len(rewards)} rewards; one each."
        )
    return rewards, weights or [1.0] * len(rewards)


def load_reward(spec: str, tokenizer=None, device=None) -> Reward:
    """A --reward: gsm8k, boxed, exact, format, regex:PATTERN, length:MAX:BUFFER, model:FOLDER or file.py:function.

    A class is made once, without arguments, so that its instance can hold state; the instance is called.
    """
    built_in = {"gsm8k": gsm8k, "boxed": boxed, "exact": exact, "format": gsm8k_format}
    if spec in built_in:
        return Reward(spec, built_in[spec])
    kind, _, argument = spec.partition(":")
    if kind == "regex":
        return Reward(spec, full_match(argument))
    if kind == "length":
        return Reward(kind, overlong(argument))
    if kind == "model":
        return Reward(kind, ModelReward(argument, tokenizer, device))
    path, _, name = (spec + ":").rpartition(":") if spec.endswith(".py") else spec.rpartition(":")
    if path.endswith(".py"):
        return Reward(name, _from_file(Path(path), name))
    raise InputError(
        f"--reward {spec!r} is unknown: built in are {', '.join(built_in)}, regex:PATTERN, "
        f"length:MAX:BUFFER and model:FOLDER; one of your own is file.py:function."
    )


def _from_file(path, name):
    if not path.is_file():
        raise InputError(f"--reward {path}:{name}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.append(
            folder
        )  # so that it can import its neighbours, which must be found there and nowhere before
    for beside in path.parent.resolve().glob("*.py"):
        taken = re.search(
            rf"^\s*(from|import)\s+{beside.stem}\b", path.read_text(), re.MULTILINE
        ) and (importlib.util.find_spec(beside.stem).origin)
        if taken and Path(taken).resolve() != beside:
            raise InputError(
                f"--reward {path}:{name}: it imports {beside.name} beside it, but {taken} has that name: "
                "rename it."
            )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(
        module
    )  # what the file raises is shown as it is: its own traceback says it best
    own = [
        key for key, value in vars(module).items() if getattr(value, "__module__", "") == spec.name
    ]
    function = vars(module).get(name)
    if not callable(function):
        raise InputError(
            f"--reward {path}:{name}: {path} has no function {name!r}; it has "
            f"{', '.join(own) or 'none'}."
        )
    function = function() if inspect.isclass(function) else function
    if not callable(function):
        raise InputError(
            f"--reward {path}:{name}: an instance of the class {name} cannot be called; give it "
            f"__call__(self, completions, **columns)."
        )
    return function


def score(reward: Reward, completions: list, columns: dict[str, list]) -> list[float | None]:
    """One float or None for each completion; anything else is an InputError that names the completion."""
    if not completions:
        return []
    _check_arguments(reward, completions, columns)
    try:
        values = reward.function(completions=completions, **columns)
    except InputError:
        raise
    except Exception as error:  # a user's function raises anything: it is named and chained
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"Reward {reward.name} raised {type(error).__name__}: {error} ({at.filename}:"
            f"{at.lineno}) {_culprit(reward, completions, columns, error)}"
        ) from error
    if not hasattr(values, "__len__"):
        raise InputError(
            f"Reward {reward.name} returned {type(values).__name__}, no list of float | None."
        )
    if len(values) != len(completions):
        raise InputError(
            f"Reward {reward.name} returned {len(values)} values for {len(completions)} "
            f"completions: return one for each, None where it does not apply."
        )
    return [_number(reward, value, i, completions[i]) for i, value in enumerate(values)]


def score_groups(
    rewards: list[Reward], decode: Callable, rows: list[dict], groups: list[list], size: int
):
    """Rewards of the rollouts of each row -> float64 reward_FPG, NaN where one does not apply.

    groups: for each row `size` Rollouts. They are decoded without special tokens; a row whose prompt is a list of
    messages gets its completions as messages. Columns are the rows' own, and prompts, prompt_ids and completion_ids.
    """
    flat, flat_rows = (
        [r for group in groups for r in group],
        [row for row, g in zip(rows, groups) for _ in g],
    )
    texts = [decode(r.ids, skip_special=True) for r in flat]
    completions = [
        [{"role": "assistant", "content": text}] if isinstance(row["prompt"], list) else text
        for text, row in zip(texts, flat_rows)
    ]
    names = dict.fromkeys(
        name for row in rows for name in row if name not in ("prompt", "prompt_ids", "__line__")
    )
    columns = {name: [row.get(name) for row in flat_rows] for name in names}
    columns |= {
        "prompts": [row["prompt"] for row in flat_rows],
        "prompt_ids": [r.prompt for r in flat],
        "completion_ids": [r.ids for r in flat],
    }
    scores = [score(reward, completions, columns) if flat else [] for reward in rewards]
    return torch.tensor(np.array(scores, np.float64).reshape(len(rewards), len(rows), size))


def total_reward(
    rewards: list[Reward],
    weights: list[float],
    judge: Reward | None,
    decode: Callable,
    rows: list[dict],
    groups: list[list],
    size: int,
) -> torch.Tensor:
    """The weighted sum of the rewards, and the wins that a judge gives -> float64 reward_PG."""
    reward_PG = torch.zeros(len(rows), size, dtype=torch.float64)
    if rewards:
        reward_PG += combine_rewards(score_groups(rewards, decode, rows, groups, size), weights)
    if judge:
        reward_PG += judged(judge, decode, rows, groups)
    return reward_PG


def judged(judge: Reward, decode: Callable, rows: list[dict], groups: list[list]) -> torch.Tensor:
    """Each answer's wins over the others of its group -> float64 reward_PG.

    judge: f(prompts, pairs) -> for each pair of texts 0 (the first is better), 1 (the second) or None (a tie).
    """
    texts = [[decode(r.ids, skip_special=True) for r in group] for group in groups]
    duels = [
        (p, i, j) for p, group in enumerate(texts) for i in range(len(group)) for j in range(i)
    ]
    try:
        verdicts = (
            judge.function(
                [rows[p]["prompt"] for p, _, _ in duels],
                [(texts[p][i], texts[p][j]) for p, i, j in duels],
            )
            if duels
            else []
        )
    except Exception as error:  # a user's function raises anything: it is named and chained
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"--judge {judge.name} raised {type(error).__name__}: {error} ({at.filename}:{at.lineno}) on "
            f"{len(duels)} pairs."
        ) from error
    if len(verdicts) != len(duels) or any(v not in (0, 1, None) for v in verdicts):
        raise InputError(
            f"--judge {judge.name} gave {len(verdicts)} verdicts for {len(duels)} pairs, or one that is "
            "not 0, 1 or None: it returns one of these for each pair."
        )
    wins_PG = torch.zeros(len(groups), max(map(len, groups), default=0), dtype=torch.float64)
    for (p, i, j), verdict in zip(duels, verdicts):
        if verdict is not None:
            wins_PG[p, (i, j)[verdict]] += 1
    return wins_PG


class ModelReward:
    """A reward: the score that a reward model gives prompt and completion, token by token as they were sampled."""

    def __init__(self, folder, tokenizer, device, tokens: int = 8192):
        """tokenizer: the policy's, whose tokens the reward model has to know. tokens: of a micro-batch, at most."""
        tokenizer.check_same(folder, "--reward model:")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = load_scalar_model(folder, device, dtype)
        self.device, self.tokens = device, tokens

    def __call__(self, completions, prompt_ids, completion_ids, **columns):
        ids = [[*prompt, *new] for prompt, new in zip(prompt_ids, completion_ids)]
        return forward.scores(
            self.model, [Example(i, [False] * len(i)) for i in ids], self.tokens, self.device
        )


def _check_arguments(reward, completions, columns):
    try:
        inspect.signature(reward.function).bind(completions=completions, **columns)
    except TypeError as error:
        raise InputError(
            f"Reward {reward.name} cannot be called with completions and the columns "
            f"{', '.join(columns) or '(none)'}: {error}; it takes completions, the columns it "
            f"needs and **columns, and --rename renames those of the data."
        ) from error


def _culprit(reward, completions, columns, error):
    """Which completion a batch failed on: the first that fails in the same way when it is alone."""
    for i, completion in enumerate(completions):
        try:
            reward.function(
                completions=[completion], **{name: c[i : i + 1] for name, c in columns.items()}
            )
        except type(error):
            return f"on completion {i} of {len(completions)}, called alone: {_excerpt(completion)}."
        except Exception:  # not the failure to be explained
            continue
    return f"on the batch of {len(completions)} completions; none of them fails like that alone."


def _number(reward, value, i, completion):
    if value is None:
        return None
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise InputError(
            f"Reward {reward.name} returned {value!r}, no number, for completion {i}: "
            f"{_excerpt(completion)}."
        )
    if not math.isfinite(value):
        raise InputError(
            f"Reward {reward.name} returned {float(value)} for completion {i}, "
            f"{_excerpt(completion)}: return None where it does not apply."
        )
    return float(value)


def _excerpt(completion, length=120):
    text = text_of(completion)
    return repr(text if len(text) <= length else text[:length] + "...")


def combine_rewards(rewards, weights):
    """Weighted sum over reward functions; None or NaN (does not apply) adds nothing -> float64 tensor [...].

    rewards: [F, ...], a tensor or nested lists; weights: F numbers. InputError names a completion that has no reward.
    """
    if len(weights) != len(rewards):
        raise InputError(
            f"--reward_weights has {len(weights)} values for {len(rewards)} rewards; one each."
        )
    rewards = np.asarray(rewards, np.float64)
    lost = np.argwhere(np.isnan(rewards).all(0))
    if len(lost):
        raise InputError(
            f"No reward applies to completion {', '.join(map(str, lost[0]))}, nor to {len(lost) - 1} "
            f"others of {rewards[0].size}: all returned None; add a --reward that scores such rows."
        )
    return torch.from_numpy(np.tensordot(np.array(weights, np.float64), np.nan_to_num(rewards), 1))
