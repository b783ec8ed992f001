"""Rewards: loading, calling and summing them.

A reward is f(completions, **columns) -> list[float | None], TRL's signature. completions: strings,
or lists of messages of which the last is read. columns: those of the rows, plus prompts, prompt_ids
and completion_ids, each a list as long as completions. None: the reward does not apply.

Shapes: F reward functions, P prompts, G completions per prompt.
"""

import importlib.util
import inspect
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
from nanopost.verify import boxed, exact, full_match, gsm8k, gsm8k_format, length_limit, text_of

BUILT_IN = {"gsm8k": gsm8k, "boxed": boxed, "exact": exact, "format": gsm8k_format}


class Reward(NamedTuple):
    name: str  # in the metrics: rewards/NAME/mean
    function: Callable


# ------------------------------------------------------------------------------------------ loading
def load(specs: list[str], weights: list[float] | None, tokenizer=None, device=None):
    """The values of --reward and --reward_weights -> (list[Reward], list[float]).

    Weights are 1 by default. Each reward gets its own name, and so its own metrics.
    """
    if not specs:
        raise InputError("--reward is missing: say what scores the answers (see --help).")
    if weights and len(weights) != len(specs):
        raise InputError(
            f"--reward_weights has {len(weights)} values for {len(specs)} rewards; give one each."
        )
    rewards = []
    for spec in specs:
        reward = load_one(spec, tokenizer, device)
        taken = [other.name for other in rewards]
        rewards.append(Reward(_unused_name(reward.name, taken), reward.function))
    return rewards, weights or [1.0] * len(rewards)


def _unused_name(name, taken):
    """name, or else the first of name-2, name-3, ... that is free."""
    unused = name
    number = 2
    while unused in taken:
        unused = f"{name}-{number}"
        number += 1
    return unused


def load_one(spec: str, tokenizer=None, device=None) -> Reward:
    """One value of --reward.

    That is gsm8k, boxed, exact, format, regex:PATTERN, length:MAX:BUFFER, model:FOLDER or
    file.py:function. A class in place of the function can keep state between calls: it is
    instantiated once, without arguments.
    """
    if spec in BUILT_IN:
        return Reward(spec, BUILT_IN[spec])
    kind, _, argument = spec.partition(":")
    if kind == "regex":
        return Reward(spec, full_match(argument))
    if kind == "length":
        return Reward(kind, length_limit(argument))
    if kind == "model":
        return Reward(kind, ModelReward(argument, tokenizer, device))
    if spec.endswith(".py"):
        spec += ":"  # no function is named: the error lists those of the file
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        return Reward(name, _from_file(Path(path), name))
    raise InputError(
        f"--reward {spec!r} is unknown: built in are {', '.join(BUILT_IN)}, regex:PATTERN, "
        f"length:MAX:BUFFER and model:FOLDER; give your own as file.py:function."
    )


def _from_file(path, name):
    if not path.is_file():
        raise InputError(f"--reward {path}:{name}: there is no file {path}.")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)  # so that the file can import its neighbours
    _check_neighbours(path, name)
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)  # an error in the file itself keeps its own traceback
    function = vars(module).get(name)
    if not callable(function):
        own = []
        for key, value in vars(module).items():
            if getattr(value, "__module__", "") == spec.name:
                own.append(key)
        raise InputError(
            f"--reward {path}:{name}: {path} has no function {name!r}; it has "
            f"{', '.join(own) or 'none'}."
        )
    if inspect.isclass(function):
        function = function()
    if not callable(function):
        raise InputError(
            f"--reward {path}:{name}: an instance of the class {name} is not callable; give it "
            f"__call__(self, completions, **columns)."
        )
    return function


def _check_neighbours(path, name):
    """A neighbour that the file imports must not be shadowed by another module of its name."""
    source = path.read_text(encoding="utf-8")
    for neighbour in path.parent.resolve().glob("*.py"):
        imported = rf"^\s*(from|import)\s+{neighbour.stem}\b"
        if not re.search(imported, source, re.MULTILINE):
            continue
        found = importlib.util.find_spec(neighbour.stem).origin
        if found and Path(found).resolve() != neighbour:
            raise InputError(
                f"--reward {path}:{name}: it imports its neighbour {neighbour.name}, but {found} "
                f"has that name: rename the neighbour."
            )


class ModelReward:
    """A reward: a reward model's score of prompt and completion, token by token as sampled."""

    def __init__(self, folder, tokenizer, device, tokens: int = 8192):
        """tokenizer: the policy's; the reward model's must be the same.

        tokens: maximum tokens per micro-batch.
        """
        tokenizer.check_same(folder, "--reward model:")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = load_scalar_model(folder, device, dtype)
        self.device = device
        self.tokens = tokens

    def __call__(self, completions, prompt_ids, completion_ids, **columns):
        examples = []
        for prompt, new in zip(prompt_ids, completion_ids):
            ids = [*prompt, *new]
            examples.append(Example(ids, [False] * len(ids)))
        return forward.scores(self.model, examples, self.tokens, self.device)


# ------------------------------------------------------------------------------------------ calling
def score(
    functions: list[Reward], decode: Callable, rows_P: list[dict], groups: list[list]
) -> torch.Tensor:
    """Rewards of the G Rollouts of each row -> float64 reward_FPG, NaN where one does not apply.

    Special tokens are not decoded. A row whose prompt is a list of messages has its completions as
    messages. The columns are the row's own, plus prompts, prompt_ids and completion_ids.
    """
    flat = [(row, rollout) for row, group in zip(rows_P, groups) for rollout in group]
    completions = []
    for row, rollout in flat:
        text = decode(rollout.ids, skip_special=True)
        if isinstance(row["prompt"], list):
            completions.append([{"role": "assistant", "content": text}])
        else:
            completions.append(text)
    names = dict.fromkeys(name for row in rows_P for name in row)
    columns = {}
    for name in names:
        if name not in ("prompt", "prompt_ids", "__line__"):
            columns[name] = [row.get(name) for row, _ in flat]
    columns["prompts"] = [row["prompt"] for row, _ in flat]
    columns["prompt_ids"] = [rollout.prompt for _, rollout in flat]
    columns["completion_ids"] = [rollout.ids for _, rollout in flat]

    scores = [call(reward, completions, columns) for reward in functions]
    size = max(map(len, groups), default=0)
    scores = np.array(scores, np.float64).reshape(len(functions), len(groups), size)
    return torch.from_numpy(scores)


def call(reward: Reward, completions: list, columns: dict[str, list]) -> list[float | None]:
    """One float or None per completion.

    InputError names the completion for which the function raises or returns something else.
    """
    if not completions:
        return []
    _check_arguments(reward, completions, columns)
    try:
        values = reward.function(completions=completions, **columns)
    except InputError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise InputError(
            f"Reward {reward.name} {_raised(error)} {_culprit(reward, completions, columns, error)}"
        ) from error
    if not hasattr(values, "__len__"):
        raise InputError(
            f"Reward {reward.name} returned {type(values).__name__}, not a list of float | None."
        )
    if len(values) != len(completions):
        raise InputError(
            f"Reward {reward.name} returned {len(values)} values for {len(completions)} "
            f"completions: return one for each, None where it does not apply."
        )
    return [_number(reward, value, i, completions[i]) for i, value in enumerate(values)]


def judged(judge: Reward, decode: Callable, rows_P: list[dict], groups: list[list]) -> torch.Tensor:
    """Each completion's wins over the others of its group -> float64 reward_PG.

    judge: f(prompts, pairs) -> for each pair of texts, 0 (the first is better), 1 (the second is)
    or None (a tie). InputError if it raises or returns something else.
    """
    duels, prompts, pairs = [], [], []
    for p, group in enumerate(groups):
        texts = [decode(rollout.ids, skip_special=True) for rollout in group]
        for i in range(len(group)):
            for j in range(i):
                duels.append((p, i, j))
                prompts.append(rows_P[p]["prompt"])
                pairs.append((texts[i], texts[j]))
    wins_PG = torch.zeros(len(groups), max(map(len, groups), default=0), dtype=torch.float64)
    if not duels:
        return wins_PG
    try:
        verdicts = judge.function(prompts, pairs)
    except Exception as error:  # a user's function may raise anything
        raise InputError(f"--judge {judge.name} {_raised(error)} on {len(duels)} pairs.") from error
    if len(verdicts) != len(duels) or any(v not in (0, 1, None) for v in verdicts):
        raise InputError(
            f"--judge {judge.name} gave {len(verdicts)} verdicts for {len(duels)} pairs, or one "
            f"that is not 0, 1 or None: return one of these for each pair."
        )
    for (p, i, j), verdict in zip(duels, verdicts):
        if verdict == 0:
            wins_PG[p, i] += 1
        elif verdict == 1:
            wins_PG[p, j] += 1
    return wins_PG


def _check_arguments(reward, completions, columns):
    try:
        inspect.signature(reward.function).bind(completions=completions, **columns)
    except TypeError as error:
        raise InputError(
            f"Reward {reward.name} cannot be called with completions and the columns "
            f"{', '.join(columns) or '(none)'}: {error}; it takes completions, the columns it "
            f"needs and **columns, and --rename renames those of the data."
        ) from error


def _raised(error):
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {error} ({last.filename}:{last.lineno})"


def _culprit(reward, completions, columns, error):
    """Which completion is to blame: the first that, called alone, fails in the same way."""
    for i, completion in enumerate(completions):
        own = {name: column[i : i + 1] for name, column in columns.items()}
        try:
            reward.function(completions=[completion], **own)
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
            f"Reward {reward.name} returned {value!r}, not a number, for completion {i}: "
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
    if len(text) > length:
        text = text[:length] + "..."
    return repr(text)


# ------------------------------------------------------------------------------------------ summing
def total(reward_FPG, weights: list[float]) -> torch.Tensor:
    """Weighted sum over the F rewards -> float64 reward_PG. NaN (does not apply) adds nothing.

    InputError names a completion that no reward scores.
    """
    reward_FPG = np.asarray(reward_FPG, np.float64)
    unscored = np.argwhere(np.isnan(reward_FPG).all(0))
    if len(unscored):
        raise InputError(
            f"No reward applies to completion {', '.join(map(str, unscored[0]))}, nor to "
            f"{len(unscored) - 1} others of {reward_FPG[0].size}: all returned None; add a "
            f"--reward that scores such rows."
        )
    weight_F = np.array(weights, np.float64)
    return torch.from_numpy(np.tensordot(weight_F, np.nan_to_num(reward_FPG), 1))


def sums(names: list[str], reward_FPG: torch.Tensor) -> dict:
    """One name per reward function -> {name: (sum of its values, their number)}, for means."""
    pairs = {}
    for name, reward_PG in zip(names, reward_FPG):
        pairs[name] = reward_PG.nansum(), (~reward_PG.isnan()).sum()
    return pairs
