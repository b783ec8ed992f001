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
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanopost import InputError
from nanopost.advantages import combine_rewards, soft_overlong_penalty
from nanopost.data import Example, batch_of, pack
from nanopost.hf import load_scalar_model


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
        return scores_of(
            self.model, [Example(i, [False] * len(i)) for i in ids], self.tokens, self.device
        )


@torch.no_grad()
def scores_of(model, examples: list[Example], tokens: int, device) -> list[float]:
    """What a reward model gives each sequence: its value at the last token."""
    out = [0.0] * len(examples)
    for part in pack([len(e) for e in examples], max(tokens, *map(len, examples))):
        batch = batch_of([examples[i] for i in part], device)
        for i, score in zip(part, model(batch)[batch.cu_seqlens[1:].long() - 1].tolist()):
            out[i] = score
    return out


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


def text_of(completion) -> str:
    """The text of a completion: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


# ---------------------------------------------------------------------------------- plain match, form, length
def exact(completions, answer, **columns):
    """1 where the completion equals the column answer, white space at the ends aside."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer)]


def full_match(pattern: str) -> Callable:
    """1 where the whole completion matches the regular expression; its dot matches line ends too."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"--reward regex:{pattern}: not a regular expression: {error}.") from error
    return lambda completions, **columns: [
        float(bool(compiled.fullmatch(text_of(c)))) for c in completions
    ]


def gsm8k_format(completions, **columns):
    """1 where a completion has the form of GSM8K: some text, and a last line "#### number", the only ####."""
    parts = [text_of(c).partition("####") for c in completions]
    last_line = re.compile(r" -?\$?[0-9][0-9,]*(\.[0-9]+)?\s*")
    return [
        float(bool(head.strip() and head.endswith("\n") and last_line.fullmatch(tail)))
        for head, _, tail in parts
    ]


def overlong(limits: str) -> Callable:
    """soft_overlong_penalty of the tokens in the column completion_ids; limits: "MAX:BUFFER"."""
    if not re.fullmatch(r"\d+:\d+", limits):
        raise InputError(
            f"--reward length:{limits}: write length:MAX:BUFFER in tokens, as length:1024:256."
        )
    longest, buffer = map(int, limits.split(":"))
    soft_overlong_penalty(0, longest, buffer)  # refuses a buffer that does not fit before the run
    return lambda completions, completion_ids, **columns: [
        soft_overlong_penalty(len(ids), longest, buffer) for ids in completion_ids
    ]


# ------------------------------------------------------------------------------------------------------ gsm8k
# A minus is a sign where no operand stands before it (10-3 ends in 3); commas stand before three digits.
NUMBER = re.compile(
    r"((?<![\w.)])-)?[$€£]?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def gsm8k(completions, answer, **columns):
    """1 where the number after the last ####, or else the last one, is exactly that of the column answer."""
    gold = [final_number(str(a)) for a in answer]
    if None in gold:
        i = gold.index(None)
        raise InputError(
            f"Reward gsm8k: the answer {str(answer[i])[:80]!r} to completion {i} has no number; "
            f"name the right column with --rename."
        )
    return [float(final_number(text_of(c)) == number) for c, number in zip(completions, gold)]


def final_number(text: str) -> Decimal | None:
    """Number after the last ####, or else the last number; None without one. -$1,234.50 is -1234.5."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("{,}", ",").replace("\\!", "")
    _, marker, tail = text.rpartition("####")
    found = list(NUMBER.finditer(tail))[:1] if marker else []
    for number in found or list(NUMBER.finditer(text))[-1:]:
        return Decimal((number[1] or "") + number[2].replace(",", ""))
    return None


# ------------------------------------------------------------------------------------------------------ boxed
ARGUMENT = r"(\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-z]+|\w)"
REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"\\(text|mbox|mathrm)\s*\{\s*(or|and)\s*\}", ","),
        (
            r"(?:(?<=[\d})])|(?<=\\pi))\s*\\(text|mbox|mathrm)\s*\{[^{}]*\}(\s*\^\s*\{?\d\}?)?\s*$",
            "",
        ),  # units
        (r"\\(text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\2"),
        (
            r"\\[$%]|[$%]|\\(left|right|displaystyle)(?![a-zA-Z])|\^\s*\{?\s*\\circ\s*\}?|\\degree|°",
            "",
        ),
        (r"\\(le|ge|ne)q(?![a-zA-Z])", r"\\\1"),
        (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-zA-Z])|~|\s+", ""),  # but \\ ends the row of a matrix
        (r"\{,\}", ","),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\sqrt(\w)", r"\\sqrt{\1}"),
        (r"([_^])\{(\w)\}", r"\1\2"),
        (r"(?<![\w}.])(\d*\\pi|\d+)/(\d+)(?![\w{]|\\(?!\\|end)|\.\d)", r"\\frac{\1}{\2}"),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"^\w{1,2}(=|\\in(?![a-zA-Z]))(?!.*=)", ""),  # x = 5, x \in [0, 1]
        (r"\.+$", ""),
        (r"^\((\w)\)$", r"\1"),  # (C)
    ]
]


def boxed(completions, answer, **columns):
    r"""1 where the last \boxed{} says what the column answer says: that is bare or has a \boxed{} of its own.

    Equal are equal numbers, and LaTeX that is the same after the rewriting of plain_latex, which goes a bit
    further than is_equiv of the MATH data set (2103.03874). It knows no algebra: 2x + 1 is not 1 + 2x.
    """
    return [
        float(same_answer(last_boxed(text_of(c)), last_boxed(str(a)) or str(a)))
        for c, a in zip(completions, answer)
    ]


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...}, braces nested; None without one or its end."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    head = re.compile(r"\\(?:boxed|fbox)\s*(\{?)").match(text, start)
    if not head[1]:
        return re.compile(r"[^$\n]*").match(text, head.end())[0]  # \boxed 5$
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, head.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[head.end() : brace.start()]
    return None


def same_answer(given: str | None, answer: str) -> bool:
    """Whether two LaTeX answers are equal, as exact numbers or as rewritten text."""
    if given is None:
        return False
    given, answer = plain_latex(given), plain_latex(answer)
    number = exact_value(given)
    return given == answer or number is not None and number == exact_value(answer)


def answer_of(reward: str, text: str):
    """What a vote is about: the number of gsm8k, the boxed answer, else the whole text."""
    if reward == "gsm8k":
        return final_number(text)
    if reward == "boxed":
        plain = last_boxed(text) and plain_latex(last_boxed(text))
        return plain if exact_value(plain or "") is None else exact_value(plain)
    return text.strip() or None


def plain_latex(text: str) -> str:
    r"""One spelling for the many of an answer: no spaces, units, sized brackets; \frac{a}{b} in full."""
    for pattern, new in REWRITES:
        text = pattern.sub(new, text.strip())
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return re.sub(
        r"\\frac" + ARGUMENT + ARGUMENT, lambda m: f"\\frac{_braced(m[1])}{_braced(m[2])}", text
    )


def _braced(argument):
    return argument if argument[0] == "{" else "{" + argument + "}"


def exact_value(text: str) -> Fraction | None:
    r"""Value of 3, -0.25, \frac{1}{2} or the mixed 1\frac{4}{5}; None of anything else."""
    if re.fullmatch(r"-?\d{1,99}(\.\d{1,99})?", text):
        return Fraction(text)
    mixed = re.fullmatch(r"(-?)(\d{0,99})\\frac\{(-?\d{1,99})\}\{(-?\d{1,99})\}", text)
    if not mixed or not int(mixed[4]):
        return None
    value = int(mixed[2] or 0) + Fraction(int(mixed[3]), int(mixed[4]))
    return -value if mixed[1] else value
