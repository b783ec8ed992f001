"""Run by test_dist.py under torchrun: one optimizer step on uneven data for each number of tokens
per micro-batch, its gradient, what comes after it, and statistics over ranks, to a file.

    torchrun --nproc_per_node N tests/dist_worker.py OUT {step|fail|late} TOKENS ...
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from small import small_config

from nanopost import InputError, advantages, dist, optim
from nanopost.batch import Example
from nanopost.forward import batches, logprobs
from nanopost.model import CausalLM

torch.set_num_threads(1)
out, mode = Path(sys.argv[1]), sys.argv[2]
world = dist.init("cpu", timeout_minutes=1)
if mode == "fail" and world.rank == world.size - 1:
    raise InputError("the last rank has had enough.")
rng = np.random.default_rng(0)
plain = [Example(rng.integers(0, 61, n), rng.random(n) < 0.6) for n in (3, 40, 7, 2, 25, 11, 30)]

cut = [Example(e.ids, e.mask) for e in plain]
for e in cut:  # as if top-k had kept some: each token and a few others
    e.kept = [np.unique([i, *rng.integers(0, 61, rng.integers(0, 20))]) for i in e.ids]


def share(items):
    """This rank's items, dealt to three ranks at most: a fourth one has nothing."""
    if world.rank >= 3:
        return items[:0]
    return items[world.rank :: min(world.size, 3)]


def backward(model, tokens, examples):
    """One step's gradient -> its loss per trained token."""
    mine = share(examples)
    trained = dist.all_sum(sum(e.num_targets for e in mine))
    loss = 0.0
    for batch in batches(model, mine, tokens, "cpu"):
        logp_N, entropy_N = model(batch)
        part = -(logp_N + 0.1 * entropy_N).sum()
        if mode == "late" and world.rank == world.size - 1:
            raise InputError("the last rank has had enough of this step.")
        (part / trained).backward()
        loss += float(part.detach())
    return dist.all_sum(loss) / trained


def logp(model, tokens, examples):
    """Every example's log-probs as the model computes them now, outside of a step."""
    return [x.tolist() for x in logprobs(model, examples, tokens, 1.0, "cpu")]


def step(tokens, examples, **how):
    """A step of a new model, sharded like that -> all that test_dist.py looks at."""
    model = CausalLM(small_config())
    model.init_weights(0)
    model = dist.shard(model, world, **how)
    optimizer = optim.adamw(model, 0.1)
    optim.set_learning_rate(optimizer, 0.01)
    before = logp(model, tokens, examples)
    loss = backward(model, tokens, examples)
    gradient = {}
    for name, p in model.named_parameters():
        whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        gradient[name] = whole.clone()
    norm = dist.clip_grad_norm(model, 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return {
        "loss": loss,
        "gradient": gradient,
        "norm": norm,
        "before": before,
        "after": logp(model, tokens, examples),
        "weights": {name: w.clone() for name, w in dist.full_weights(model)},
    }


def in_order(part):
    """The rows of all ranks in the order in which `share` dealt them."""
    order = dist.gather(share(torch.arange(10)).tolist())
    rows = dict(zip(order, dist.gather(part.tolist())))
    return [rows[i] for i in range(10)]


def statistics():
    """What the reductions make of ten rows, dealt to the ranks."""
    draw = torch.Generator().manual_seed(1)
    all_PG = torch.randn(10, 4, generator=draw, dtype=torch.float64) + 3
    reward_PG, value_PG = share(all_PG), share(all_PG.square())
    mask_PG = share(torch.rand(10, 4, generator=draw) < 0.7)
    sums, _ = advantages.running_std((0, 0.0, 0.0), reward_PG[:1].flatten())
    sums, std = advantages.running_std(sums, reward_PG[1:].flatten())
    one_alone = {"of one rank": (3.0, 2)} if world.rank == 0 else {}
    meter = dist.Meter()
    for reward_G, mask_G in zip(reward_PG, mask_PG):
        meter.add(4, reward=reward_G.sum())
        meter.add(mask_G.sum().item(), masked=(reward_G * mask_G).sum(), share=1.0)
    return {
        "batch": in_order(advantages.batch(reward_PG)),
        "whitened": in_order(advantages.whiten(reward_PG, mask_PG)),
        "whitened, mean kept": in_order(advantages.whiten(reward_PG, mask_PG, shift_mean=False)),
        "running std": [*sums, std],
        "explained": advantages.explained_variance(value_PG, reward_PG, mask_PG),
        "means": dist.means(
            {"mean": (reward_PG.sum(), reward_PG.numel()), "of none": (0, 0), **one_alone}
        ),
        "meter": meter.means(),
        "highest": dist.all_max(max(reward_PG.flatten().tolist(), default=-math.inf)),
    }


found = {int(tokens): step(int(tokens), plain) for tokens in sys.argv[3:]}
for tokens in sys.argv[3:]:
    found[f"cut {tokens}"] = step(int(tokens), cut)
found["reduced once"] = step(45, plain, reduce="step")
found["offload"] = step(45, plain, offload=True)
found["selective"] = step(45, plain, checkpointing="selective")
if world.size > 1:
    found["replicas"] = step(45, plain, replicas=2)
    found["replicas, reduced once"] = step(45, plain, replicas=2, reduce="step")
found["statistics"] = statistics()
if world.rank == 0:
    torch.save(found, out)
dist.finish()
