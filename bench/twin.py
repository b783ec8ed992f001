"""SFT steps with log-probs in chunks (nanopost/logprob.py) beside whole logits on a CPU -> bench/results/cpu_twin.json.

    python -m bench.twin

The same step three ways, in turn: our torch code; the logits of all tokens at once with cross_entropy and an entropy
for the log; and these without the entropy. A model of 4 layers and width 256, 2,048 packed tokens, AdamW, fp32. Peak
memory is the process's largest resident size, less that of the same step with a vocabulary of 256. Then the log-probs
alone, forward and backward: their peak beyond the head's weight and its gradient.
"""

import argparse
import json
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from bench.side_by_side import ROOT, THREADS, run

CHILD = """
import json, sys, time
import torch
import torch.nn.functional as F
from nanopost import data, model
from nanopost.model import CausalLM, Config

kind, vocabulary, share, steps = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])

def whole(hidden_ND, weight_VD, target_N, temperature, kernels=None):
    z_NV = hidden_ND @ weight_VD.T
    logp_N = -F.cross_entropy(z_NV, target_N, reduction="none", ignore_index=-100)
    if kind == "whole, no entropy":
        return logp_N, torch.zeros_like(logp_N)
    with torch.no_grad():
        log_p_NV = z_NV.log_softmax(-1)
        return logp_N, -torch.linalg.vecdot(log_p_NV.exp(), log_p_NV) * (target_N >= 0)

if kind != "chunks":
    model.logprob = whole
config = Config.of({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256,
                    "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
                    "num_key_value_heads": 4, "head_dim": 32, "vocab_size": vocabulary, "tie_word_embeddings": True})
policy = CausalLM(config).init_weights(0)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=True)
torch.manual_seed(0)
untrained = round(128 * (1 - share))
examples = [data.Example(torch.randint(0, min(vocabulary, 4096), (128,)).tolist(),
                         [False] * untrained + [True] * (128 - untrained)) for _ in range(16)]
batch, seconds, losses = data.batch_of(examples), [], []
for _ in range(steps):
    began = time.perf_counter()
    logp_N, entropy_N = policy(batch)
    loss = -logp_N.sum() / batch.mask_N.sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds.append(time.perf_counter() - began)
    losses.append(float(loss.detach()))
print(json.dumps({"seconds": seconds[2:], "losses": losses}))
"""
HEAD = """
import resource, sys
import torch
from nanopost.logprob import logprob

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def steps(tokens, vocabulary):
    hidden, weight = (torch.randn(rows, 256, requires_grad=True) for rows in (tokens, vocabulary))
    target = torch.randint(0, vocabulary, (tokens,))
    room = torch.ones_like(weight)  # that the gradient will take
    before = peak_mb()
    del room
    for _ in range(3):
        weight.grad = None
        logp_N, entropy_N = logprob(hidden, weight, target)
        (logp_N + entropy_N).sum().backward()
    return peak_mb() - before

steps(2, 8)  # what is loaded when first needed
print(steps(int(sys.argv[1]), int(sys.argv[2])))
"""
KINDS = "chunks", "whole", "whole, no entropy"


def step(kind, vocabulary, share, steps):
    out, peak = run(["-c", CHILD, kind, vocabulary, share, steps])
    found = json.loads(out.splitlines()[-1])
    return statistics.median(found["seconds"]), peak, found["losses"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 151936])
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.7], help="of the tokens that are trained"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cpu_twin.json")
    args = parser.parse_args()
    found = {}
    for share in args.shares:
        small = min(step("chunks", 256, share, args.steps)[1] for _ in range(2))
        for vocabulary in args.vocabularies:
            rounds = {kind: [] for kind in KINDS}
            for k in range(args.rounds):
                for kind in KINDS[k % 3 :] + KINDS[: k % 3]:
                    rounds[kind].append(step(kind, vocabulary, share, args.steps))
            first, *others = (rounds[kind][0][2] for kind in KINDS)
            if any(abs(a - b) > 1e-4 for other in others for a, b in zip(first, other)):
                raise AssertionError(f"the losses differ: {first} {others}")
            weights_mb = (
                16 * vocabulary * 256 / 2**20
            )  # weight, gradient and Adam's two moments, in fp32
            row = {
                kind: {
                    "seconds": statistics.median(s for s, *_ in of),
                    "peak_mb_beyond_weights": statistics.median(p for _, p, _ in of)
                    - small
                    - weights_mb,
                }
                for kind, of in rounds.items()
            }
            found[f"V {vocabulary}, {share:.0%} trained"] = row
            print(
                f"V {vocabulary:7,d}  {share:4.0%} trained  "
                + "   ".join(
                    f"{kind}: {v['seconds']:.3f} s, {v['peak_mb_beyond_weights']:5.0f} MB"
                    for kind, v in row.items()
                ),
                flush=True,
            )
    head = {
        vocabulary: statistics.median(
            float(run(["-c", HEAD, 1434, vocabulary])[0]) for _ in range(3)
        )
        for vocabulary in (1024, *args.vocabularies)
    }
    print(
        "log-probs of 1,434 tokens alone, beyond weight and gradient: "
        + ", ".join(f"V {vocabulary:,}: {mb:.0f} MB" for vocabulary, mb in head.items())
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    result = {
        "torch": version("torch"),
        "threads": THREADS,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "rounds": args.rounds,
        "steps": args.steps,
        "results": found,
        "peak_mb_of_log_probs_alone": head,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
