"""Run by test_dist.py under torchrun: one optimizer step on uneven data, its gradient and what comes after, to a file.

torchrun --nproc_per_node N tests/dist_worker.py OUT TOKENS {step|fail|hang}
"""

import sys
from pathlib import Path

import numpy as np
import torch
from small import small_config

from nanopost import InputError, dist, optim, packing
from nanopost.batch import Example, batch_of
from nanopost.forward import logprobs
from nanopost.model import CausalLM

torch.set_num_threads(1)
out, tokens, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
world = dist.init("cpu", timeout_minutes=1)
if mode == "fail" and world.rank == world.size - 1:
    raise InputError("the last rank has had enough.")

model = CausalLM(small_config())
model.init_weights(0)
model = dist.shard(model, world, bf16=False)
optimizer = optim.adamw(model, 0.1, (0.9, 0.95))
optim.set_learning_rate(optimizer, 0.01)
rng = np.random.default_rng(0)
examples = [Example(rng.integers(0, 61, n), rng.random(n) < 0.6) for n in (3, 40, 7, 2, 25, 11, 30)]
mine = (
    examples[world.rank :: min(world.size, 3)] if world.rank < 3 else []
)  # a fourth rank has nothing


def step():
    micro_batches = dist.even(packing.micro_batches([len(e) for e in mine], tokens))
    batches = [batch_of([mine[i] for i in m]) for m in micro_batches]
    (trained,) = dist.all_sum(sum(int(b.mask_N.sum()) for b in batches))
    loss = 0.0
    for batch in batches:
        logp_N, entropy_N = model(batch)
        part = -(logp_N + 0.1 * entropy_N).sum()
        (part * world.size / trained).backward()
        loss += float(part.detach())
    return dist.all_sum(loss)[0] / trained


def logp():
    """Every example's log-probs as the model computes them now, outside of a step."""
    return [x.tolist() for x in logprobs(model, examples, tokens, 1.0, "cpu")]


before = logp()
loss = step()
gradient = {
    name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
    for name, p in model.named_parameters()
}
norm = dist.clip_grad_norm(model, 0.5)
optimizer.step()
optimizer.zero_grad()
after = logp()
weights = dict(dist.full_weights(model))
if world.rank == 0:
    torch.save(
        {
            "loss": loss,
            "gradient": gradient,
            "norm": norm,
            "before": before,
            "after": after,
            "weights": {n: w.clone() for n, w in weights.items()},
        },
        out,
    )
dist.finish()
