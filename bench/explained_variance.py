"""How much of the Monte-Carlo returns a value model explains, and the most that any model could.

    python -m bench.explained_variance --policy out/toy/ppo --value out/toy/ppo/value     # the toy

Completions of the same prompts are sampled many times. The return of a token is the reward of its
completion; a state is what precedes it. The variance of returns within a state is what no value
function explains. It is estimated, without bias, from the states visited more than once, and all
three numbers are over these. The best attainable is 1 - variance within states / total variance.
"""

from collections import defaultdict

import numpy as np
import torch

from bench import common
from nanopost import hf
from nanopost.batch import Example, batch_of
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.packing import pack
from nanopost.tokenizer import Tokenizer
from runs import toy


def sampled_returns(tokenizer, policy, rows, samples: int) -> dict[tuple, list[float]]:
    """The returns seen from each state: {ids before a token: rewards of its completions}."""
    engine = Engine.of(policy, tokenizer)
    prompts = [tokenizer.prompt_ids(row["prompt"]) for row in rows]
    seeds = [prompt_seed(1, serial) for serial in range(len(rows))]
    returns = defaultdict(list)
    for row, group in zip(rows, engine.generate(prompts, samples, Sampling(8), seeds)):
        for r in group:
            reward = float(tokenizer.decode(r.ids, skip_special=True) == row["answer"])
            for t in range(len(r.ids)):
                returns[tuple(r.prompt + r.ids[:t])].append(reward)
    return returns


@torch.no_grad()
def values_of(model, states: list[tuple]) -> dict[tuple, float]:
    """The value of each state: at its last token."""
    values = {}
    for part in pack([len(state) for state in states], 8192):
        batch = batch_of([Example(states[i], [False] * len(states[i])) for i in part])
        value_S = model(batch)[batch.last_S]
        for i, value in zip(part, value_S.tolist()):
            values[states[i]] = value
    return values


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--policy", default="out/toy/ppo")
    parser.add_argument("--value", default="out/toy/ppo/value")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--held_out", action="store_true", help="prompts that were not trained on")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.policy)
    policy = hf.load_model(args.policy)
    value_model = hf.load_scalar_model(args.value)
    rows = toy.prompt_rows(args.held_out)
    if not args.held_out:
        rows = rows[:: len(rows) // args.prompts]  # spread over all sums
    returns = sampled_returns(tokenizer, policy, rows[: args.prompts], args.samples)

    states = [state for state, found in returns.items() if len(found) > 1]
    values = values_of(value_model, states)
    return_T = np.concatenate([returns[state] for state in states])
    value_T = np.concatenate([[values[state]] * len(returns[state]) for state in states])
    within = sum(len(returns[state]) * np.var(returns[state], ddof=1) for state in states)
    total = np.var(return_T)
    explained = 1 - np.var(return_T - value_T) / total
    best = 1 - within / len(return_T) / total
    print(f"{len(return_T):,} tokens in {len(states):,} states; mean return {return_T.mean():.3f}")
    print(f"explained variance of the value model   {explained:.3f}")
    print(f"the best attainable                     {best:.3f}")


if __name__ == "__main__":
    main()
