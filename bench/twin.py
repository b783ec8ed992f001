"""SFT steps on a CPU, log-probs in chunks beside whole logits -> bench/results/cpu_twin.json.

    python -m bench.twin

The same step three ways, in turn: our torch code (nanopost/logprob.py); the logits of all tokens at
once, with cross_entropy and an entropy for the log; and these without the entropy. A model of 4
layers and width 256, 2,048 packed tokens, AdamW, fp32. Peak memory is the largest resident size of
the process, less that of the same step with a vocabulary of 256. Then the log-probs alone, forward
and backward: their peak beyond the head's weight and its gradient.
"""

import json
import statistics
from pathlib import Path

from bench import common
from bench.side_by_side import THREADS, run

CHILD = """
import json, sys, time
import torch
import torch.nn.functional as F
from nanopost import model
from nanopost.batch import Example, batch_of
from nanopost.config import Config
from nanopost.model import CausalLM

kind, vocabulary, share, steps = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])

def whole(hidden_ND, weight_VD, target_N, temperature, **options):
    z_NV = hidden_ND @ weight_VD.T
    logp_N = -F.cross_entropy(z_NV, target_N, reduction="none", ignore_index=-100)
    if kind == "whole, no entropy":
        return logp_N, torch.zeros_like(logp_N)
    with torch.no_grad():
        log_p_NV = z_NV.log_softmax(-1)
        return logp_N, -torch.linalg.vecdot(log_p_NV.exp(), log_p_NV) * (target_N >= 0)

if kind != "chunks":
    model.logprob = whole
config = Config.of(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
)
policy = CausalLM(config).init_weights(0)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=True)
torch.manual_seed(0)
untrained = round(128 * (1 - share))
mask = [False] * untrained + [True] * (128 - untrained)
ids = torch.randint(0, min(vocabulary, 4096), (16, 128)).tolist()
batch = batch_of([Example(row, mask) for row in ids])
seconds, losses = [], []
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
    room = torch.ones_like(weight)  # what the gradient will take
    before = peak_mb()
    del room
    for _ in range(3):
        weight.grad = None
        logp_N, entropy_N = logprob(hidden, weight, target)
        (logp_N + entropy_N).sum().backward()
    return peak_mb() - before

steps(2, 8)  # load what is loaded on first use
print(steps(int(sys.argv[1]), int(sys.argv[2])))
"""
KINDS = ("chunks", "whole", "whole, no entropy")
ADAMW_MB = 16 * 256 / 2**20  # per entry: fp32 weight, gradient and two moments of 256 numbers


def step(kind, vocabulary, share, steps) -> dict:
    """One run -> its median step in seconds, its peak in MB, and its losses."""
    stdout, peak = run(["-c", CHILD, kind, vocabulary, share, steps])
    result = json.loads(stdout.splitlines()[-1])
    seconds = statistics.median(result["seconds"])
    return {"seconds": seconds, "peak_mb": peak, "losses": result["losses"]}


def compared(vocabulary, share, steps, rounds, small_mb) -> dict[str, dict]:
    """{kind: medians over the rounds}. small_mb: the peak with a small vocabulary."""
    runs = {kind: [] for kind in KINDS}
    for k in range(rounds):
        first = k % len(KINDS)
        for kind in KINDS[first:] + KINDS[:first]:
            runs[kind].append(step(kind, vocabulary, share, steps))
    check_losses({kind: runs[kind][0]["losses"] for kind in KINDS})
    row = {}
    for kind in KINDS:
        peak = statistics.median(r["peak_mb"] for r in runs[kind])
        row[kind] = {
            "seconds": statistics.median(r["seconds"] for r in runs[kind]),
            "peak_mb_beyond_weights": peak - small_mb - vocabulary * ADAMW_MB,
        }
    return row


def check_losses(losses: dict[str, list[float]]):
    for kind in KINDS:
        largest = max(abs(a - b) for a, b in zip(losses["chunks"], losses[kind]))
        if not largest <= 1e-4:
            raise AssertionError(f"the losses of chunks and {kind} differ by {largest}: {losses}")


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=8)
    add("--vocabularies", type=int, nargs="+", default=[4096, 151936])
    add("--shares", type=float, nargs="+", default=[0.7], help="of the tokens: those trained")
    add("--out", type=Path, default=common.RESULTS, help="folder")
    args = parser.parse_args()
    results = {}
    for share in args.shares:
        small_mb = min(step("chunks", 256, share, args.steps)["peak_mb"] for _ in range(2))
        for vocabulary in args.vocabularies:
            row = compared(vocabulary, share, args.steps, args.rounds, small_mb)
            results[f"V {vocabulary}, {share:.0%} trained"] = row
            print(f"V {vocabulary:,d}, {share:.0%} trained")
            for kind, found in row.items():
                peak = found["peak_mb_beyond_weights"]
                print(f"  {kind:18s} {found['seconds']:.3f} s, {peak:5.0f} MB", flush=True)
    head = {}
    for vocabulary in (1024, *args.vocabularies):
        peaks = [float(run(["-c", HEAD, 1434, vocabulary])[0]) for _ in range(3)]
        head[vocabulary] = statistics.median(peaks)
    print("log-probs of 1,434 tokens alone, beyond weight and gradient:")
    for vocabulary, mb in head.items():
        print(f"  V {vocabulary:,d}: {mb:.0f} MB")
    result = {
        **common.origin("torch"),
        "threads": THREADS,
        "rounds": args.rounds,
        "steps": args.steps,
        "results": results,
        "peak_mb_of_log_probs_alone": head,
    }
    common.save(args.out / "cpu_twin.json", result)


if __name__ == "__main__":
    main()
