"""What --reproducible costs, in time and memory, on a CPU in fp32 with one thread per rank.

    python -m bench.reproducible              # -> bench/results/reproducible.json

An optimizer step of SFT on 16 rows of 100 to 500 tokens, of a Qwen3 of 4 layers and width 256, with
and without the flag, on one and two ranks, in turns. Time is that of the processor, of all ranks
together, in the cheapest of five steps, since others may use the machine. Memory is a rank's
largest resident size.
"""

import json
import os
import resource
import statistics
import sys
import time

from bench import common

MODEL = common.SMALL | {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def measure(same_bytes: bool):
    """One rank's part; rank 0 prints {"seconds", "mb"}."""
    import numpy as np
    import torch

    from nanopost import dist, optim
    from nanopost.batch import Example
    from nanopost.config import Config
    from nanopost.forward import batches
    from nanopost.model import CausalLM

    torch.set_num_threads(1)
    world = dist.init("cpu", "fp32", 0, same_bytes)
    model = dist.shard(CausalLM(Config.of(MODEL)).init_weights(0), world)
    optimizer = optim.adamw(model, 0.1)
    optim.set_learning_rate(optimizer, 1e-3)
    draw = np.random.default_rng(0)
    lengths = draw.integers(100, 500, 16)
    examples = [Example(draw.integers(0, 4096, n), np.ones(n, bool)) for n in lengths]
    seconds = []
    for _ in range(6):
        began = time.process_time()
        for batch in batches(model, examples[world.rank :: world.size], 1024, "cpu"):
            logp_N, _ = model(batch)
            (-logp_N.sum() / lengths.sum()).backward()
        dist.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - began)
    total = dist.all_sum(min(seconds[1:]))
    (peak,) = dist.all_max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if world.rank == 0:
        print(json.dumps({"seconds": total, "mb": peak}), flush=True)
    dist.finish()


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=["plain", "reproducible"], help="of one rank")
    args = parser.parse_args()
    if args.part:
        measure(args.part == "reproducible")
        return
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    environment = os.environ | common.OFFLINE | {"OMP_NUM_THREADS": "1"}
    found = {}
    for _ in range(args.rounds):
        for ranks in (1, 2):
            for part in ("plain", "reproducible"):
                command = [*launch, ranks, "-m", "bench.reproducible", "--part", part]
                done = common.run(command, env=environment, capture_output=True, text=True)
                line = json.loads(done.stdout.splitlines()[-1])
                found.setdefault(f"{part} on {ranks}", []).append(line)
    for ranks in (1, 2):
        plain, other = found[f"plain on {ranks}"], found[f"reproducible on {ranks}"]
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(plain, other)]
        more = [b["mb"] - a["mb"] for a, b in zip(plain, other)]
        low, high = min(ratios), max(ratios)
        print(f"{ranks}: {low:.2f} to {high:.2f} times the step, {statistics.median(more):+.0f} MB")
    common.save(common.RESULTS / "reproducible.json", {**common.origin("torch"), "found": found})


if __name__ == "__main__":
    sys.exit(main())
