"""The Rollout record, and metrics of a step's rollouts.

Shapes: T tokens of a completion.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nanopost import StepError, dist
from nanopost.batch import Example

GAP = "sampling/sampling_logp_difference"
NO_IDS = np.zeros(0, np.int32)


@dataclass
class Rollout:
    """One completion. ids includes the stop token if one was sampled: an action like any other.

    ids may include a turn of the environment (a tool's answer): it is not sampled, so it is not
    trained and has no length, value or reward.
    """

    prompt: list[int]
    ids: list[int]
    logp: np.ndarray  # fp32 [T], of the distribution it was drawn from; 0 where not sampled
    finish: str  # "stop": a stop token or string; "length": a limit of tokens, or of turns
    versions: np.ndarray | int  # int64 [T]: of the weights that each token was sampled with
    sampled: np.ndarray | None = None  # bool [T]: drawn from the policy; default: all of ids
    # [T] of int32 arrays: the ids that top-k, top-p or min-p kept, of which the token was drawn,
    # none where not sampled. None: nothing was cut, or Sampling.kept did not ask for them.
    kept: list[np.ndarray] | None = None
    # int16 [prompt + T, L, A], of a model with experts: those that the engine took for each token,
    # in L layers; -1 of the last token, which it was never given. None: the engine does not say.
    routes: np.ndarray | None = None
    arrived: int | None = None  # if it ran ahead: its place in the order in which groups finished
    answer: object = None  # the column of its row, once it has been rewarded: see rewards.score
    episode: object = None  # what an environment made of it: see environment.Episode

    def __post_init__(self):
        if np.ndim(self.versions) == 0:
            self.versions = np.full(len(self.ids), self.versions)
        if self.sampled is None:
            self.sampled = np.ones(len(self.ids), bool)

    @property
    def length(self) -> int:
        """Sampled tokens."""
        return int(self.sampled.sum())

    @property
    def version(self) -> int:
        """The oldest of its versions."""
        return int(self.versions.min())

    def extend(self, turn: list[int], answer: "Rollout"):
        """Append a turn of the environment, which is not sampled, and the answer to it."""
        self.ids = self.ids + turn + answer.ids
        self.logp = np.concatenate([self.logp, np.zeros(len(turn), np.float32), answer.logp])
        self.sampled = np.concatenate([self.sampled, np.zeros(len(turn), bool), answer.sampled])
        is_newer = answer.version > self.versions[-1]
        self.versions = np.concatenate([self.versions, [self.version] * len(turn), answer.versions])
        if self.kept is not None:
            self.kept = self.kept + [NO_IDS] * len(turn) + answer.kept
        if self.routes is None or answer.routes is None:
            self.routes = None
        elif is_newer:  # what was sampled with older weights is off-policy anyway
            self.routes = answer.routes
        else:
            # A token was sampled with the experts that those before it had then. The answer was
            # with what its own prefill found best for the turns before, which rounding may change.
            given = len(self.routes) - 1
            self.routes = np.concatenate([self.routes[:given], answer.routes[given:]])
        self.finish = answer.finish

    def example(self) -> Example:
        """Prompt and completion as one sequence; sampled tokens are its mask. Columns: engine_logp,
        and version, -1 where not sampled. Its kept ids and its routes are those of the rollout."""
        prompt = len(self.prompt)
        mask = np.concatenate([np.zeros(prompt, bool), self.sampled])
        logp = np.concatenate([np.zeros(prompt, np.float32), self.logp * self.sampled])
        version = np.concatenate([np.full(prompt, -1), np.where(self.sampled, self.versions, -1)])
        columns = {"engine_logp": logp, "version": version}
        kept = None if self.kept is None else [NO_IDS] * prompt + self.kept
        return Example(self.prompt + self.ids, mask, columns, kept, self.routes)


def unsampled(prompt: list[int], e: Example, max_new_tokens: int) -> Example:
    """A prompt as a rollout begins with it, and the completion of an example, from its first
    trained token on and cut to so many tokens. Columns as of a rollout's example: engine_logp 0 and
    version -1."""
    answer = e[e.prompt_length : e.prompt_length + max_new_tokens]
    mask = np.concatenate([np.zeros(len(prompt), bool), answer.mask])
    columns = {
        "engine_logp": np.zeros(len(mask), np.float32),
        "version": np.full(len(mask), -1),
    }
    return Example(np.concatenate([prompt, answer.ids]), mask, columns)


def completion_text(rollout: Rollout, tokenizer) -> str:
    """The text of a completion as samples.jsonl shows it, special tokens too, but without the token
    that ended it: what rewards and judges read."""
    ids = rollout.ids
    if ids and ids[-1] in tokenizer.stop_ids:
        ids = ids[: len(ids) - 1]
    return tokenizer.decode(ids)


def sample_records(decode: Callable, rollouts: list[Rollout], **columns) -> list[dict]:
    """Rollouts for samples.jsonl: text, finish reason, the row's answer if it has one, and columns
    of one number per rollout, None where it is NaN."""
    records = []
    for i, r in enumerate(rollouts):
        numbers = {name: float(values[i]) for name, values in columns.items()}
        numbers = {name: None if math.isnan(x) else x for name, x in numbers.items()}
        record = {"prompt": decode(r.prompt), "completion": decode(r.ids), "finish": r.finish}
        if r.answer is not None:
            record["answer"] = str(r.answer)
        records.append(record | numbers)
    return records


def length_metrics(groups: list[list[Rollout]]) -> dict[str, float]:
    """completions/*: sampled tokens, the share cut off at the length limit, and the share of
    completions that repeat, token by token, an earlier one of their group. tools/*, of an
    environment that has tools: calls per completion, and the share that failed. episodes/failed:
    the share in which the environment did. {} if there are no completions. A collective."""
    rollouts = [r for group in groups for r in group]
    distinct = sum(len({tuple(r.ids) for r in group}) for group in groups)
    length_B = [r.length for r in rollouts]
    cut_off = sum(r.finish == "length" for r in rollouts)
    episodes = [r.episode for r in rollouts if r.episode is not None]
    played = [episode for episode in episodes if episode.calls is not None]
    calls = sum(episode.calls for episode in played)
    longest, shortest = dist.all_max(max(length_B, default=0), -min(length_B, default=2**31))
    means = dist.means(
        {
            "completions/mean_length": (sum(length_B), len(rollouts)),
            "completions/clipped_ratio": (cut_off, len(rollouts)),
            "completions/duplicate_ratio": (len(rollouts) - distinct, len(rollouts)),
            "episodes/failed": (sum(bool(e.error) for e in episodes), len(episodes)),
            "tools/call_frequency": (calls, len(played)),
            "tools/failure_frequency": (sum(episode.failures for episode in played), calls),
        }
    )
    if not means:
        return {}
    return means | {"completions/min_length": -shortest, "completions/max_length": longest}


def staleness_metrics(rollouts: list[Rollout], version: int) -> dict[str, float]:
    """staleness/*: by how many steps the weights that drew a token are older than `version`, over
    sampled tokens. A collective."""
    ages = [version - r.versions[r.sampled] for r in rollouts]
    age = np.concatenate([[], *ages])
    mean = dist.means({"staleness/mean": (age.sum(), len(age))})
    return mean | {"staleness/max": dist.all_max(max(age, default=0))[0]}


class LogpGap:
    """How far the engine's log-probs are from the trainer's in a step's first minibatch, before the
    first update. Where a token was drawn with the trainer's weights, both are the same policy: the
    limit holds there, and nowhere else."""

    def __init__(self, limit: float | None, dtype: torch.dtype):
        """limit: of the mean over tokens; None: 1e-3 in fp32, 0.1 in bf16."""
        if limit is None:
            limit = 0.1 if dtype == torch.bfloat16 else 1e-3
        self.limit = limit
        self.found = []  # of each micro-batch, on its device: see add
        self.same = 0.0  # the mean gap where engine and trainer are the same policy

    def add(self, logp_N, engine_logp_N, mask_N, same_N):
        """same_N: bool, the token was drawn with the trainer's weights."""
        gap_N = (logp_N.detach() - engine_logp_N).abs() * mask_N
        same_N = same_N & mask_N
        numbers = gap_N.sum(), mask_N.sum(), gap_N.max(), (gap_N * same_N).sum(), same_N.sum()
        self.found.append(torch.stack(numbers).double())

    def metrics(self) -> dict[str, float]:
        """Mean and largest gap of all tokens since the last call, over all ranks. A collective."""
        found = torch.stack(self.found) if self.found else torch.zeros(1, 5)
        # The host waits for the device here alone.
        gaps, tokens, largest, same_gaps, same_tokens = found.T.tolist()
        self.found = []
        means = dist.means(
            {
                f"{GAP}/mean": (torch.tensor(gaps), sum(tokens)),
                "same": (torch.tensor(same_gaps), sum(same_tokens)),
            }
        )
        self.same = means.pop("same", 0.0)
        return means | {f"{GAP}/max": dist.all_max(max(largest))[0]}

    def check(self, step: int):
        """StepError if the mean of the last `metrics`, of one policy, is above the limit."""
        gap = self.same
        if not gap <= self.limit:  # nan too
            raise StepError(
                f"step {step}: before the first update engine and trainer are one policy, but "
                f"their log-probs differ by {gap:.2g} on average (--max_logp_gap "
                f"{self.limit:g}). Either the trainer sees different tokens, masks or a "
                "different temperature, or the engine has stale weights or too low a precision "
                "(--replay: or its run had other flags)."
            )
