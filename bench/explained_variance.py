"""How much of the Monte-Carlo returns a value model explains, beside the most that any could.

    python -m bench.explained_variance --policy out/ppo --value out/ppo/value       # the toy, exact reward

Completions of the same prompts are sampled again and again. The return of a token is the reward of its completion, a
state is what stands before it. Of the variance of returns, the part within a state is what no value function explains:
it is estimated, without bias, from the states that were visited more than once, and all three numbers are over those.
The best attainable is 1 - variance within states / variance of all.
"""

import argparse
from collections import defaultdict

import numpy as np
import torch

from nanopost import hf, toy
from nanopost.batch import Example, batch_of
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.packing import pack
from nanopost.tokenizer import Tokenizer


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="out/ppo")
    parser.add_argument("--value", default="out/ppo/value")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--held_out", action="store_true", help="prompts that were not trained on")
    args = parser.parse_args()
    tokenizer, policy, value = (
        load(folder)
        for load, folder in (
            (Tokenizer.load, args.policy),
            (hf.load_model, args.policy),
            (hf.load_scalar_model, args.value),
        )
    )
    rows = toy.prompt_rows(args.held_out)[:: 7279 // args.prompts if not args.held_out else 1][
        : args.prompts
    ]
    engine = Engine(policy, tokenizer.stop_ids)
    groups = engine.generate(
        [tokenizer.prompt_ids(row["prompt"]) for row in rows],
        args.samples,
        Sampling(8),
        [prompt_seed(1, serial) for serial in range(len(rows))],
    )
    returns, values = defaultdict(list), {}  # of each state
    for row, group in zip(rows, groups):
        for r in group:
            reward = float(tokenizer.decode(r.ids, skip_special=True) == row["answer"])
            for t in range(len(r.ids)):
                returns[tuple(r.prompt + r.ids[:t])].append(reward)
    states = [state for state, found in returns.items() if len(found) > 1]
    for part in pack([len(state) for state in states], 8192):
        batch = batch_of([Example(states[i], [False] * len(states[i])) for i in part])
        values.update(
            zip((states[i] for i in part), value(batch)[batch.cu_seqlens[1:].long() - 1].tolist())
        )
    every = np.concatenate([returns[state] for state in states])
    guess = np.concatenate([[values[state]] * len(returns[state]) for state in states])
    within = sum(len(returns[state]) * np.var(returns[state], ddof=1) for state in states) / len(
        every
    )
    print(f"{len(every):,} tokens in {len(states):,} states; mean return {every.mean():.3f}")
    print(
        f"explained variance of the value model   {1 - np.var(every - guess) / np.var(every):.3f}"
    )
    print(f"the best attainable                     {1 - within / np.var(every):.3f}")


if __name__ == "__main__":
    main()
