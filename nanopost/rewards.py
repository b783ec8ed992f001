"""Rewards: loading, calling and summing them.

A reward is f(completions, **columns) -> list[float | None], TRL's signature. None: the reward does
not apply. completions: as in TRL, strings where a row's prompt is a string, and lists of one
message where it is a list of messages; verify.text_of reads both. Their text is what samples.jsonl
shows, without the token that ended it. columns: those of the rows, plus

    prompts, prompt_ids, completion_ids
    step          of training, that in metrics.jsonl; in an evaluation, the step that would follow

each a list as long as completions. All are copies, so a reward may change them. With an environment
(environment.py), a completion is the list of all messages after the prompt, and there are also

    environments          the instances, each with its episode played
    environment_rewards   of these; None where one gave none

A reward with state_dict() and load_state_dict(state) is saved in checkpoints and restored by
--resume, on each rank its own; an evaluation leaves its state as it was. Any other state (globals,
attributes, files) is lost when a run is killed, and evaluations change it too.

Shapes: F reward functions, P prompts, G completions per prompt.
"""

import base64
import copy
import importlib.util
import inspect
import io
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanopost import InputError, dist, forward, sandbox
from nanopost.batch import Example
from nanopost.hf import load_scalar_model
from nanopost.packing import CHUNK
from nanopost.rollout import completion_text
from nanopost.rows import errors_at, place
from nanopost.terminal import say
from nanopost.verify import (
    TESTED,
    boxed,
    code,
    exact,
    full_match,
    gsm8k,
    gsm8k_format,
    import_math_verify,
    length_limit,
    math_verify,
    passes_without_program,
    text_of,
    unsafe_code,
)


def environment(completions, environment_rewards, **columns):
    """The reward that the environment of each completion gave."""
    return environment_rewards


BUILT_IN = {
    "gsm8k": gsm8k,
    "boxed": boxed,
    "math_verify": math_verify,
    "code": code,
    "exact": exact,
    "format": gsm8k_format,
    "environment": environment,
}
GIVEN = ("completions", "prompts", "prompt_ids", "completion_ids", "step")  # by the run
# By the run, if it has an environment.
OF_EPISODES = ("environments", "environment_rewards", "completion_lengths")
LARGEST_STATE = 64 * 2**20  # bytes


class Reward(NamedTuple):
    name: str  # in the metrics: rewards/NAME/mean
    function: Callable
    timeout: float = 0.0  # seconds per call; 0: no limit


# ------------------------------------------------------------------------------------------ loading
def load(
    specs: list[str],
    weights: list[float] | None,
    tokenizer=None,
    world=None,
    tokens: int = 8192,
    timeout: float = 0.0,
    isolated: bool = True,
):
    """The values of --reward and --reward_weights -> (list[Reward], list[float]).

    Weights are 1 by default. Each reward gets its own name, and so its own metrics. tokenizer: the
    policy's. world, tokens: device, dtype and maximum tokens per micro-batch of reward models.
    timeout: seconds per call of a reward, 0 for no limit; see guarded. isolated: whether the reward
    code runs programs in a sandbox.
    """
    if not specs:
        raise InputError("--reward is missing: say what scores the answers (see --help).")
    if weights and len(weights) != len(specs):
        raise InputError(
            f"--reward_weights has {len(weights)} values for {len(specs)} rewards; give one each."
        )
    if not isolated and "code" not in specs:
        raise InputError("--unsafe_code is about --reward code: give both, or neither.")
    rewards = []
    for spec in specs:
        reward = load_one(spec, tokenizer, world, tokens, timeout, isolated)
        taken = [other.name for other in rewards]
        rewards.append(reward._replace(name=_unused_name(reward.name, taken)))
    return rewards, weights or [1.0] * len(rewards)


def _unused_name(name, taken):
    """name, or else the first of name-2, name-3, ... that is free."""
    unused = name
    number = 2
    while unused in taken:
        unused = f"{name}-{number}"
        number += 1
    return unused


def load_one(
    spec: str,
    tokenizer=None,
    world=None,
    tokens: int = 8192,
    timeout: float = 0.0,
    isolated: bool = True,
) -> Reward:
    """One value of --reward, with the arguments of load.

    That is a name of BUILT_IN, regex:PATTERN, length:MAX:BUFFER, model:FOLDER or file.py:function.
    A class in place of the function can keep state between calls: it is instantiated once, without
    arguments.
    """
    if spec == "math_verify":
        import_math_verify()
    if spec == "code":
        sandbox.check(isolated)
        if not isolated:
            say("warning: --unsafe_code: sampled programs run with this user's rights")
            return Reward(spec, unsafe_code, timeout)
    if spec in BUILT_IN:
        return Reward(spec, BUILT_IN[spec], timeout)
    kind, _, argument = spec.partition(":")
    if kind in ("regex", "model") and not argument:
        what = {"regex": "PATTERN, such as regex:yes|no", "model": "FOLDER of a reward model"}
        raise InputError(f"--reward {spec}: write {kind}:{what[kind]}.")
    if kind == "regex":
        return Reward(spec, full_match(argument), timeout)
    if kind == "length":
        return Reward(kind, length_limit(argument), timeout)
    if kind == "model":
        model = ModelReward(argument, tokenizer, world.device, world.dtype, tokens)
        return Reward(kind, model, timeout)
    if spec.endswith(".py"):
        spec += ":"  # no function is named: the error lists those of the file
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        return Reward(name, _instance(spec), timeout)
    raise InputError(
        f"--reward {spec!r} is unknown: built in are {', '.join(BUILT_IN)}, regex:PATTERN, "
        f"length:MAX:BUFFER and model:FOLDER; give your own as file.py:function."
    )


def from_file(spec: str, flag: str) -> Callable:
    """The function or the class that a flag names as file.py:name."""
    path, _, name = spec.rpartition(":")
    path, given = Path(path), f"{flag} {spec}"
    if path.suffix != ".py":
        raise InputError(f"{given}: name it as file.py:name.")
    if not path.is_file():
        raise InputError(f"{given}: there is no file {path}.")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)  # so that the file can import its neighbours
    _check_neighbours(path, given)
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _no_exit(given), guarded():
        spec.loader.exec_module(module)  # an error in the file itself keeps its own traceback
    found = vars(module).get(name)
    if not callable(found):
        own = []
        for key, value in vars(module).items():
            if getattr(value, "__module__", "") == spec.name:
                own.append(key)
        raise InputError(f"{given}: {path} has no {name!r}; it has {', '.join(own) or 'none'}.")
    return found


def _instance(spec) -> Callable:
    """What --reward names as file.py:name; of a class, an instance."""
    function = from_file(spec, "--reward")
    if inspect.isclass(function):
        with _no_exit(f"--reward {spec}"), guarded():
            function = function()
    if not callable(function):
        name = spec.rpartition(":")[2]
        raise InputError(
            f"--reward {spec}: an instance of the class {name} is not callable; give it "
            f"__call__(self, completions, **columns)."
        )
    return function


def _check_neighbours(path, given):
    """A neighbour that the file imports must not be shadowed by another module of its name."""
    source = path.read_text(encoding="utf-8")
    for neighbour in path.parent.resolve().glob("*.py"):
        imported = rf"^\s*(from|import)\s+{neighbour.stem}\b"
        if not re.search(imported, source, re.MULTILINE):
            continue
        found = importlib.util.find_spec(neighbour.stem).origin
        if found and Path(found).resolve() != neighbour:
            raise InputError(
                f"{given}: it imports its neighbour {neighbour.name}, but {found} has that name: "
                "rename the neighbour."
            )


class ModelReward:
    """A reward: a reward model's score of prompt and completion, token by token as sampled."""

    def __init__(self, folder, tokenizer, device, dtype, tokens: int):
        """tokenizer: the policy's; the reward model's must be the same.

        dtype: of the weights. tokens: maximum tokens per micro-batch.
        """
        tokenizer.check_same(folder, "--reward model:")
        self.model = load_scalar_model(folder, device, dtype)
        self.device = device
        self.tokens = tokens

    def __call__(self, completions, prompt_ids, completion_ids, **columns):
        examples = []
        for prompt, new in zip(prompt_ids, completion_ids):
            ids = [*prompt, *new]
            examples.append(Example(ids, [False] * len(ids)))
        return forward.scores(self.model, examples, self.tokens, self.device)


# ---------------------------------------------------------------------------------- before step 1
def check(functions: list[Reward], rows: list[dict]) -> str:
    """InputError, with file and line, if a reward does not find its columns in the rows -> a
    warning about columns that rewards do not see, or "".

    The built-in rewards need theirs in each row, and a gold answer that they can read. Own rewards
    may meet rows without, which have None there; a column that no row has is missing.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in names if name not in ("prompt", "__line__", *GIVEN)]
    for reward in functions:
        is_built_in = reward.function in (*BUILT_IN.values(), unsafe_code)
        for name in _needed(reward.function):
            without = [row for row in rows if row.get(name) is None]
            if without and (is_built_in or len(without) == len(rows)):
                way_out = f"the columns are {', '.join(columns) or 'none'}: --rename theirs={name}"
                if name in columns:
                    way_out = "remove or complete these rows"
                raise InputError(
                    f"{place(without[0])}: reward {reward.name} needs the column {name}, which is "
                    f"missing or null in {len(without):,} of {len(rows):,} rows; {way_out}."
                )
        named = _needed(reward.function, known=GIVEN)
        _check_arguments(reward, [*columns, *GIVEN, *(x for x in OF_EPISODES if x in named)])
        if is_built_in and reward.function is not environment:
            for row in rows:
                with errors_at(row):
                    given = {name: [row.get(name)] for name in columns}
                    reward.function([""], prompts=[row.get("prompt") or ""], **given)
            if reward.function in (code, unsafe_code):
                _check_tests(rows, isolated=reward.function is code)
    hidden = [name for name in names if name in GIVEN and name != "prompt_ids"]
    if not hidden:
        return ""
    return (
        f"warning: rewards do not see the data's {', '.join(hidden)}, since the run gives them "
        f"columns of that name: --rename {hidden[0]}=other."
    )


def _check_tests(rows, isolated):
    """InputError if the tests of a row say nothing about a program: an empty one passes them."""
    sample = rows[:: math.ceil(len(rows) / TESTED) or 1]
    if len(sample) < len(rows):
        say(f"reward code: the tests of {len(sample)} of {len(rows):,} rows were tried")
    if row := passes_without_program(sample, isolated):
        raise InputError(
            f"{place(row)}: Reward code: an empty program passes the tests: they must fail for a "
            "wrong program by themselves (no unittest, no function that nothing calls)."
        )


def _needed(function, known=(*GIVEN, *OF_EPISODES)):
    """The columns, but for known ones, that a reward cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # a builtin of C
        return []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in named if p.default is p.empty and p.name not in known]


def _check_arguments(reward, columns):
    """InputError if the reward cannot be called with completions and columns of these names."""
    try:
        inspect.signature(reward.function).bind(**dict.fromkeys(["completions", *columns]))
    except ValueError:  # a builtin of C: the call itself will tell
        return
    except TypeError as error:
        raise InputError(
            f"Reward {reward.name} cannot be called with completions and the columns "
            f"{', '.join(columns) or '(none)'}: {error}; it takes completions, the columns it "
            f"needs and **columns, and --rename renames those of the data."
        ) from error


# ------------------------------------------------------------------------------------------ calling
class _Expired(BaseException):
    """Not an Exception, which a reward may catch."""


@contextmanager
def guarded(timeout: float = 0.0):
    """For code of the user, which must neither end the process nor change what the run relies on.

    What it prints goes to stderr; the working directory and autograd's mode are restored; os._exit
    raises SystemExit, as exit() does. After `timeout` seconds (0: never) it is stopped by SIGALRM.
    That reaches Python code, waiting (sleep, sockets, processes) and regular expressions, but
    neither native code that does not return nor threads and processes that it has started; and code
    that sets SIGALRM itself stops the clock.
    """
    folder, process, leave, grad = os.getcwd(), os.getpid(), os._exit, torch.is_grad_enabled()

    def no_exit(status):
        if os.getpid() != process:  # a process that the user's code has forked may end
            leave(status)
        raise SystemExit(status)

    expired = []

    def expire(*_):
        expired.append(True)
        raise _Expired

    os._exit = no_exit
    if timeout:
        before = signal.signal(signal.SIGALRM, expire)
        signal.setitimer(signal.ITIMER_REAL, timeout, 1.0)  # again, if the first is caught
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if timeout:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        os._exit = leave
        os.chdir(folder)
        torch.set_grad_enabled(grad)
    if expired:  # and caught: what came after is not an answer
        raise _Expired


@contextmanager
def _no_exit(what):
    """InputError where user's code, called `what`, ends the process."""
    try:
        yield
    except SystemExit as error:
        raise InputError(
            f"{what} {_raised(error)}: a file of rewards must not end the run."
        ) from error


def score(
    functions: list[Reward], tokenizer, rows_P: list[dict], groups: list[list], step: int = 1
):
    """Rewards of the G Rollouts of each row -> float64 reward_FPG, NaN where one does not apply.

    Each rollout gets its row's answer, for samples.jsonl. step: the one of training that they are
    for, or that would follow an evaluation. With --reproducible each call of a reward is for one
    chunk of prompts (packing.part).
    """
    if dist.reproducible and len(groups) > CHUNK:
        parts = []
        for i in range(0, len(groups), CHUNK):
            chunk = rows_P[i : i + CHUNK], groups[i : i + CHUNK]
            parts.append(score(functions, tokenizer, *chunk, step))
        return torch.cat(parts, 1)
    flat = [(row, rollout) for row, group in zip(rows_P, groups) for rollout in group]
    completions = []
    for row, rollout in flat:
        rollout.answer = row.get("answer")
        text = completion_text(rollout, tokenizer)
        if rollout.episode is not None:
            completions.append(rollout.episode.messages)
        elif isinstance(row["prompt"], list):
            completions.append([{"role": "assistant", "content": text}])
        else:
            completions.append(text)
    names = dict.fromkeys(name for row in rows_P for name in row)
    columns = {}
    for name in names:
        if name not in ("prompt", "__line__", *GIVEN):
            columns[name] = [row.get(name) for row, _ in flat]
    columns["prompts"] = [_prompt(row, rollout) for row, rollout in flat]
    columns["prompt_ids"] = [rollout.prompt for _, rollout in flat]
    columns["completion_ids"] = [rollout.ids for _, rollout in flat]
    columns["step"] = [step] * len(flat)
    if any(rollout.episode is not None for _, rollout in flat):
        columns["environments"] = [rollout.episode.environment for _, rollout in flat]
        columns["completion_lengths"] = [rollout.length for _, rollout in flat]
        columns["environment_rewards"] = [rollout.episode.reward for _, rollout in flat]

    scores = [call(reward, completions, columns) for reward in functions]
    size = max(map(len, groups), default=0)
    scores = np.array(scores, np.float64).reshape(len(functions), len(groups), size)
    return torch.from_numpy(scores)


def _prompt(row, rollout):
    """What the policy was asked: the row's prompt, and what an environment has added."""
    return row["prompt"] if rollout.episode is None else rollout.episode.prompt


def call(reward: Reward, completions: list, columns: dict[str, list]) -> list[float | None]:
    """One float or None per completion.

    InputError names the completion for which the function raises or returns something else.
    """
    if not completions:
        return []
    _check_arguments(reward, columns)
    try:
        with guarded(reward.timeout):
            values = _called(reward, completions, columns)
    except InputError:
        raise
    except _Expired as error:
        raise InputError(
            f"Reward {reward.name} took more than --reward_timeout {reward.timeout:g} seconds for "
            f"{len(completions)} completions, the first of them {_excerpt(completions[0])}: raise "
            "the limit, or make the reward return."
        ) from error
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise InputError(
            f"Reward {reward.name} {_raised(error)} {_culprit(reward, completions, columns, error)}"
        ) from error
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise InputError(
            f"Reward {reward.name} returned {type(values).__name__}, not a list of float | None."
        )
    if len(values) != len(completions):
        raise InputError(
            f"Reward {reward.name} returned {len(values)} values for {len(completions)} "
            f"completions: return one for each, None where it does not apply."
        )
    return [_number(reward, value, i, completions[i]) for i, value in enumerate(values)]


def _called(reward, completions, columns):
    """Call the function with copies, which it may change; of an environment there is no copy."""
    copies = {}
    for name, column in {"completions": completions, **columns}.items():
        if name == "environments":
            copies[name] = list(column)
        else:
            copies[name] = [copy.deepcopy(value) for value in column]
    return reward.function(**copies)


def judged(judge: Reward, tokenizer, rows_P: list[dict], groups: list[list]) -> torch.Tensor:
    """Each completion's wins over the others of its group -> float64 reward_PG.

    judge: f(prompts, pairs) -> for each pair of texts, 0 (the first is better), 1 (the second is)
    or None (a tie). InputError if it raises or returns something else.
    """
    duels, prompts, pairs = [], [], []
    for p, group in enumerate(groups):
        texts = [completion_text(rollout, tokenizer) for rollout in group]
        for i in range(len(group)):
            for j in range(i):
                duels.append((p, i, j))
                prompts.append(copy.deepcopy(_prompt(rows_P[p], group[i])))
                pairs.append((texts[i], texts[j]))
    wins_PG = torch.zeros(len(groups), max(map(len, groups), default=0), dtype=torch.float64)
    if not duels:
        return wins_PG
    try:
        with guarded(judge.timeout):
            verdicts = judge.function(prompts, pairs)
    except _Expired as error:
        raise InputError(
            f"--judge {judge.name} took more than --reward_timeout {judge.timeout:g} seconds for "
            f"{len(duels)} pairs: raise the limit, or make the judge return."
        ) from error
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        raise InputError(f"--judge {judge.name} {_raised(error)} on {len(duels)} pairs.") from error
    if hasattr(verdicts, "tolist"):
        verdicts = verdicts.tolist()
    if not isinstance(verdicts, (list, tuple)):
        raise InputError(
            f"--judge {judge.name} returned {type(verdicts).__name__}, not a list of 0, 1 or None."
        )
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


def _raised(error):
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f.filename not in (__file__, "<frozen _sitebuiltins>")]
    last = (theirs or frames)[-1]
    at = f"({last.filename}:{last.lineno})"
    if isinstance(error, SystemExit):
        return f"called exit({error.code}) {at}"
    return f"raised {type(error).__name__}: {error} {at}"


def _culprit(reward, completions, columns, error):
    """Which completion is to blame: the first that, called alone, fails in the same way."""
    for i, completion in enumerate(completions):
        own = {name: column[i : i + 1] for name, column in columns.items()}
        try:
            with guarded(reward.timeout):
                _called(reward, [completion], own)
        except type(error):
            return f"on completion {i} of {len(completions)}, called alone: {_excerpt(completion)}."
        except _Expired:
            return f"on the batch of {len(completions)} completions."
        except (Exception, SystemExit):  # not the failure to be explained
            continue
    return f"on the batch of {len(completions)} completions; none of them fails like that alone."


def _number(reward, value, i, completion):
    if value is None:
        return None
    try:
        is_number = not isinstance(value, str) and np.shape(value) == ()
        number = float(value) if is_number else None
    except Exception:  # whatever a user's object does
        number = None
    if number is None:
        raise InputError(
            f"Reward {reward.name} returned {value!r:.80}, not a number, for completion {i}: "
            f"{_excerpt(completion)}."
        )
    if not math.isfinite(number):
        raise InputError(
            f"Reward {reward.name} returned {number} for completion {i}, "
            f"{_excerpt(completion)}: return None where it does not apply."
        )
    return number


def _excerpt(completion, length=120):
    text = text_of(completion)
    if len(text) > length:
        text = text[:length] + "..."
    return repr(text)


# -------------------------------------------------------------------------------------------- state
def states(functions: list[Reward]) -> list[str]:
    """The state of all rewards that have one, as one text per rank for state.json; [] if none has.
    A collective."""
    own = {reward.name: _state(reward) for reward in functions}
    own = {name: state for name, state in own.items() if state is not None}
    if not own:
        return []
    buffer = io.BytesIO()
    try:
        torch.save(own, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # of pickle, or of the user's objects
        raise InputError(
            "a reward's state_dict() cannot be saved: make it of numbers, text, lists, dicts and "
            f"tensors ({type(error).__name__})."
        ) from error
    size = len(buffer.getvalue())
    if size > LARGEST_STATE:
        raise InputError(
            f"a reward's state_dict() takes {size >> 20} MiB of at most "
            f"{LARGEST_STATE >> 20}: leave out what does not change."
        )
    return dist.gather([base64.b64encode(buffer.getvalue()).decode()])


def restore(functions: list[Reward], state: dict) -> str:
    """Give rewards what a run's state holds from `states` -> a warning if that is lost, or "".

    A fresh run's state gets it here, so that what cannot be saved is known before the first step. A
    collective.
    """
    saved = state.setdefault("rewards", states(functions))
    if not saved:
        return ""
    if len(saved) != torch.distributed.get_world_size():
        return (
            f"warning: rewards start without their state, which {len(saved)} ranks had saved and "
            f"{torch.distributed.get_world_size()} resume."
        )
    data = io.BytesIO(base64.b64decode(saved[torch.distributed.get_rank()]))
    given = torch.load(data, weights_only=True)
    _restore(functions, given)
    if lost := given.keys() - {reward.name for reward in functions}:
        return f"warning: the saved state of {', '.join(sorted(lost))} is lost: no such reward."
    return ""


@contextmanager
def held_out(functions: list[Reward]):
    """For an evaluation: the rewards' state is afterwards what it was before."""
    before = {reward.name: copy.deepcopy(_state(reward)) for reward in functions}
    try:
        yield
    finally:
        _restore(functions, before)


def _state(reward):
    """state_dict() of a reward that has it and load_state_dict, else None."""
    if not all(hasattr(reward.function, name) for name in ("state_dict", "load_state_dict")):
        return None
    with _no_exit(f"Reward {reward.name}'s state_dict"), guarded():
        return reward.function.state_dict()


def _restore(functions, given):
    for reward in functions:
        state = given.get(reward.name)
        if state is not None and hasattr(reward.function, "load_state_dict"):
            with _no_exit(f"Reward {reward.name}'s load_state_dict"), guarded():
                reward.function.load_state_dict(state)


# ------------------------------------------------------------------------------------------ summing
def total(reward_FPG, weights: list[float]) -> torch.Tensor:
    """Weighted sum over the F rewards -> float64 reward_PG. NaN (does not apply) adds nothing, but
    the sum is NaN where no reward applies."""
    reward_FPG = np.asarray(reward_FPG, np.float64)
    weight_F = np.array(weights, np.float64)
    reward_PG = np.tensordot(weight_F, np.nan_to_num(reward_FPG), 1)
    reward_PG[np.isnan(reward_FPG).all(0)] = np.nan
    return torch.from_numpy(reward_PG)


def sums(names: list[str], reward_FPG: torch.Tensor) -> dict:
    """One name per reward function -> {name: (its values, their number)}, for means."""
    pairs = {}
    for name, reward_PG in zip(names, reward_FPG):
        applies_PG = ~reward_PG.isnan()
        pairs[name] = reward_PG[applies_PG], applies_PG.sum()
    return pairs
