"""The Rollout record, and the native engine: sampling from the policy over a KV cache.

Shapes: P prompts, B living rows (n to a prompt), T sampled positions, V vocabulary, D width.

An engine has four calls: generate, sync_weights, sleep and wake, close. Tokens in, tokens out. The log-prob of each
sampled token is that of the distribution it was drawn from, in fp32. Each row draws from random numbers of its own,
made from its seed, so a rollout depends on weights, prompt, sampling and seed and not on its neighbours, on the
number of ranks, or on the order in which rows finish.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanopost import dist
from nanopost.batch import Example


@dataclass
class Rollout:
    """One sampled completion. ids includes the stop token if one was sampled: it is an action like the others."""

    prompt: list[int]
    ids: list[int]
    logp: np.ndarray  # fp32, one for each of ids
    finish: str  # "stop": a stop token or string; "length": max_tokens reached
    version: int  # of the weights it was sampled with

    def example(self) -> Example:
        """Prompt and completion as one sequence. Its mask and the column engine_logp are on what was sampled."""
        mask = np.arange(len(self.prompt) + len(self.ids)) >= len(self.prompt)
        logp = np.concatenate([np.zeros(len(self.prompt), np.float32), self.logp])
        return Example(self.prompt + self.ids, mask, {"engine_logp": logp})


def sample_records(decode: Callable, rollouts: list[Rollout], **columns) -> list[dict]:
    """What samples.jsonl shows of rollouts: text, finish, and columns of one number each."""
    return [
        {
            "prompt": decode(r.prompt),
            "completion": decode(r.ids),
            "finish": r.finish,
            **{name: float(value) for name, value in zip(columns, values)},
        }
        for r, *values in zip(rollouts, *columns.values())
    ]


class LogpGap:
    """How far the engine's log-probs of sampled tokens are from the trainer's, of one policy: before it is updated."""

    def __init__(self, limit: float):
        self.limit, self.total, self.tokens, self.largest = limit, 0.0, 0, 0.0

    def add(self, logp_N, engine_logp_N, mask_N):
        gap_N = (logp_N.detach() - engine_logp_N).abs() * mask_N
        self.total, self.tokens = self.total + float(gap_N.sum()), self.tokens + int(mask_N.sum())
        self.largest = max(self.largest, float(gap_N.max()))

    def metrics(self) -> dict[str, float]:
        """Mean and largest of what was added, over all ranks (a collective); begins anew."""
        name, (largest,) = "sampling/sampling_logp_difference", dist.all_max(self.largest)
        found = {**dist.means({f"{name}/mean": (self.total, self.tokens)}), f"{name}/max": largest}
        self.__init__(self.limit)
        return found

    def check(self, step: int, metrics: dict[str, float]):
        """RuntimeError if the mean is above the limit."""
        if (gap := metrics.get("sampling/sampling_logp_difference/mean", 0.0)) > self.limit:
            raise RuntimeError(
                f"step {step}: engine and trainer disagree by {gap:.2g} in mean log-prob "
                f"(--max_logp_gap {self.limit:g}): the engine's weights are stale, or its precision is "
                "too low."
            )


def length_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """completions/*: lengths in tokens and the share without an end, over all ranks (a collective)."""
    length_B, unended = [len(r.ids) for r in rollouts], sum(r.finish == "length" for r in rollouts)
    longest, shortest = dist.all_max(max(length_B, default=0), -min(length_B, default=2**31))
    return {
        **dist.means(
            {
                "completions/mean_length": (sum(length_B), len(rollouts)),
                "completions/clipped_ratio": (unended, len(rollouts)),
            }
        ),
        "completions/min_length": -shortest,
        "completions/max_length": longest,
    }
