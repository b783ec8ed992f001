"""Log-prob kernels on one GPU: right first, then how fast, beside what others have -> bench/results/kernels.json, .png.

    python -m bench.kernels                             # CUDA, bf16, under eight minutes
    TRITON_INTERPRET=1 python -m bench.kernels --try    # anywhere, tiny: does the script work?

Every contestant gives log-probs (and ours entropies) of N tokens and the gradients of hidden and weight for
per-token upstream gradients, or, where it knows only a scalar loss, for its sum (then part of the gradient is made in
the forward pass: compare both together). Logits are random, and peaked, where
kernels that skip small gradients have less to do. Times are medians; memory is the peak above inputs and their
gradients; the error is that of log-probs against float64 of the same bf16 inputs, on 256 tokens. Peers that are not
installed are left out, and the result says so: pip install liger-kernel cut-cross-entropy.
"""

import argparse
import json
import statistics
import subprocess
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels.logprob import logprob_reference, logprob_triton
from nanopost.logprob import logprob

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(8192, 151936, 4096), (8192, 151936, 2048), (8192, 128256, 4096), (8192, 256000, 2048)]


# --------------------------------------------------------------------------------------------------------- contestants
def naive(hidden, weight, target):
    return -F.cross_entropy((hidden @ weight.T).float(), target, reduction="none")


def chunked(hidden, weight, target):
    """Cross-entropy of 1,024 tokens at a time, recomputed in the backward pass: what torch.compile is given."""
    parts = zip(hidden.split(1024), target.split(1024))
    return torch.cat(
        [
            torch.utils.checkpoint.checkpoint(naive, h, weight, t, use_reentrant=False)
            for h, t in parts
        ]
    )


def contestants(tiny: bool) -> dict:
    """name -> f(hidden, weight, target) -> logp_N, or a scalar loss for those that know no other."""
    found = {
        "nanopost kernel": lambda *x: logprob_triton(*x, store=False)[0],
        "nanopost kernel, stored": lambda *x: logprob_triton(*x, store=True)[0],
        "nanopost torch twin": lambda *x: logprob(*x, kernels="torch")[0],
        "naive": naive,
        "chunked": chunked,
    }
    if tiny:
        return found
    found["chunked, compiled"] = torch.compile(chunked)
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["liger-kernel"] = lambda h, w, t: (
            -liger_fused_linear_cross_entropy(h, w, t, reduction="sum")
        )
    except ImportError:
        found["liger-kernel"] = None
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda h, w, t: (
            -linear_cross_entropy(h, w, t, reduction="none")
        )
        found["cut-cross-entropy, exact"] = lambda h, w, t: (
            -linear_cross_entropy(h, w, t, reduction="none", impl="cce_exact")
        )
    except ImportError:
        found["cut-cross-entropy"] = None
    return found


# ----------------------------------------------------------------------------------------------------------- measuring
def inputs(shape, peaked, device):
    tokens, vocabulary, width = shape
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, generator=generator, device=device)
    weight = torch.randn(vocabulary, width, generator=generator, device=device) / width**0.5
    target = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
    if peaked:  # the target's own direction, so that it holds nearly all the mass
        hidden = hidden + 24 * weight[target] / weight[target].norm(dim=1, keepdim=True)
    g = torch.randn(tokens, generator=generator, device=device)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, g


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function, repeats):
    times = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measured(function, shape, peaked, device, repeats):
    hidden, weight, target, g = inputs(shape, peaked, device)

    def both():
        hidden.grad = weight.grad = None
        out = function(hidden, weight, target)
        ((out * g).sum() if out.ndim else out).backward()

    both(), both()
    forward = seconds(lambda: function(hidden, weight, target), repeats)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    whole = seconds(both, repeats)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device == "cuda" else None
    found = {"forward_ms": 1e3 * forward, "forward_backward_ms": 1e3 * whole, "peak_mb": peak}
    with torch.no_grad():
        some = slice(0, 256)
        out = function(hidden[some], weight, target[some])
        if out.ndim:
            exact = logprob_reference(hidden[some].double(), weight.double(), target[some])[0]
            found["rms_error"] = float((out.double() - exact).square().mean().sqrt())
    return found


def check(device):
    """Values and gradients of the kernel against float64, before anything is timed."""
    for shape in ((300, 1025, 72), (129, 777, 64)):
        hidden, weight, target, g = inputs(shape, False, device)
        target[::3] = -100
        h = g.flip(0)
        found = []
        for function in (
            logprob_reference,
            *(partial(logprob_triton, store=store) for store in (False, True)),
        ):
            dtype = torch.float64 if function is logprob_reference else hidden.dtype
            leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
            logp, entropy = function(*leaves, target)
            (g * logp + h * entropy).sum().backward()
            found.append((logp.detach(), entropy.detach(), *(x.grad for x in leaves)))
        for name, b, *ours in zip(("logp", "entropy", "d_hidden", "d_weight"), *found):
            gap = max(float((a.double() - b.double()).abs().max() / b.abs().max()) for a in ours)
            limit = (
                1e-4 if name in ("logp", "entropy") or device == "cpu" else 1e-2
            )  # gradients come in bf16
            print(f"  {shape} {name}: {gap:.1e}", flush=True)
            if not gap < limit:
                raise AssertionError(f"{name} is off by {gap:.2g} of its largest value at {shape}")


def plot(results, path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 4), layout="constrained", squeeze=False
    )
    for axis, (shape, found) in zip(axes[0], results.items()):
        names = [n for n, v in found["random"].items() if v]
        axis.barh(names, [found["random"][n]["forward_backward_ms"] for n in names])
        axis.axvline(found["floor_ms"], color="tab:red", linestyle="--", linewidth=1)
        axis.set(
            title=shape, xlabel="forward and backward, ms (red: 4 matmuls at the measured rate)"
        )
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--try", action="store_true", dest="tiny")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/kernels")
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    check(device)
    results, rate = {}, None
    if device == "cuda":
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        a @ b
        rate = 2 * 8192**3 / seconds(lambda: a @ b, 20)
        del a, b
    for shape in [(64, 257, 32)] if args.tiny else SHAPES:
        tokens, vocabulary, width = shape
        found = results[" x ".join(map(str, shape))] = {
            "floor_ms": 1e3 * 8 * tokens * vocabulary * width / rate if rate else 0.0
        }
        for kind in ("random", "peaked"):
            found[kind] = {}
            for name, function in contestants(args.tiny).items():
                torch._dynamo.reset()  # else the second shape is compiled for any shape
                try:
                    measure = function and measured(
                        function, shape, kind == "peaked", device, args.repeats
                    )
                except torch.OutOfMemoryError:
                    measure = None
                found[kind][name] = measure
                print(shape, kind, name, measure or "not installed, or out of memory", flush=True)
                if device == "cuda":
                    torch.cuda.empty_cache()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    result = {
        "device": torch.cuda.get_device_name() if rate else "cpu",
        "matmul_tflops": rate and rate / 1e12,
        "versions": {n: version(n) for n in ("torch", "triton")},
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "results": results,
    }
    if args.tiny:
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
