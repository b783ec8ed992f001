"""Log-prob kernels on one GPU: right? then how fast, beside others? -> bench/results/kernels.json.

    python -m bench.kernels                             # CUDA, bf16
    TRITON_INTERPRET=1 python -m bench.kernels --try    # anywhere, tiny: does the script work?

Every contestant gives the log-probs of N tokens (ours their entropies too) and the gradients of
hidden and weight for per-token upstream gradients. One that knows only a scalar loss gives the
gradients of its sum, part of which it computes in the forward pass: compare the two passes
together. Logits are random, and at the first shape peaked too, where kernels that skip small
gradients have less to do. Times are medians. Memory is the peak above inputs and their gradients.
The error is that of the log-probs of 256 tokens, against float64 of the same bf16 inputs. Peers
that are not installed are skipped, and the result says so: pip install liger-kernel
cut-cross-entropy. The targets are those at the first shape on an H100.
"""

import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import common
from kernels.logprob import logprob_reference, logprob_triton
from nanopost.logprob import logprob

SHAPES = [(8192, 151936, 4096), (8192, 151936, 2048), (8192, 128256, 4096), (8192, 256000, 2048)]
TINY = [(64, 257, 32)]


# ------------------------------------------------------------------------------------- contestants
def naive(hidden, weight, target):
    return -F.cross_entropy((hidden @ weight.T).float(), target, reduction="none")


def chunked(hidden, weight, target):
    """1,024 tokens at a time, recomputed in the backward pass: what torch.compile is given."""
    parts = zip(hidden.split(1024), target.split(1024))
    checkpoint = partial(torch.utils.checkpoint.checkpoint, naive, use_reentrant=False)
    return torch.cat([checkpoint(h, weight, t) for h, t in parts])


def contestants(tiny: bool) -> dict:
    """name -> f(hidden, weight, target) -> logp_N, or a scalar where that is all it knows. None: it
    is not installed."""
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
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        found["liger-kernel"] = lambda h, w, t: -liger(h, w, t, reduction="sum")
    except ImportError:
        found["liger-kernel"] = None
    try:
        from cut_cross_entropy import linear_cross_entropy

        cce = partial(linear_cross_entropy, reduction="none")
        found["cut-cross-entropy"] = lambda *x: -cce(*x)
        found["cut-cross-entropy, exact"] = lambda *x: -cce(*x, filter_eps=None)
    except ImportError:
        found["cut-cross-entropy"] = None
    return found


# --------------------------------------------------------------------------------------- measuring
def inputs(shape, peaked, device):
    tokens, vocabulary, width = shape
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, generator=generator, device=device)
    weight = torch.randn(vocabulary, width, generator=generator, device=device) / width**0.5
    target = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
    if peaked:  # along the target's own direction, so that it has nearly all the mass
        hidden = hidden + 24 * weight[target] / weight[target].norm(dim=1, keepdim=True)
    g = torch.randn(tokens, generator=generator, device=device)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, g


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function, repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matmul_flops() -> float:
    """The rate that a large bf16 product reaches on this GPU, in FLOP/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * 8192**3 / seconds(lambda: a @ b, 20)


def measured(function, shape, peaked, device, repeats) -> dict:
    hidden, weight, target, g = inputs(shape, peaked, device)

    def both():
        hidden.grad = weight.grad = None
        out = function(hidden, weight, target)
        loss = (out * g).sum() if out.ndim else out
        loss.backward()

    for _ in range(2):
        both()
    forward = seconds(lambda: function(hidden, weight, target), repeats)
    before = 0
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    whole = seconds(both, repeats)
    found = {"forward_ms": 1e3 * forward, "forward_backward_ms": 1e3 * whole, "peak_mb": None}
    if device == "cuda":
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.no_grad():
        hidden, target = hidden[:256], target[:256]
        out = function(hidden, weight, target)
        if out.ndim:
            exact = logprob_reference(hidden.double(), weight.double(), target)[0]
            found["rms_error"] = float((out.double() - exact).square().mean().sqrt())
    return found


def check(device):
    """Values and gradients of the kernel against float64, before anything is timed."""
    for shape in ((300, 1025, 72), (129, 777, 64)):
        hidden, weight, target, g = inputs(shape, False, device)
        target[::3] = -100
        exact = values_and_gradients(logprob_reference, hidden.double(), weight.double(), target, g)
        for store in (False, True):
            kernel = partial(logprob_triton, store=store)
            ours = values_and_gradients(kernel, hidden, weight, target, g)
            for name, value in ours.items():
                gap = float((value.double() - exact[name]).abs().max() / exact[name].abs().max())
                limit = 1e-4
                if device == "cuda" and name.startswith("d_"):
                    limit = 1e-2  # bf16
                print(f"  {shape} store={store} {name}: {gap:.1e}", flush=True)
                if not gap < limit:
                    raise AssertionError(f"{name} is off by {gap:.2g} of its maximum at {shape}")


def values_and_gradients(function, hidden, weight, target, g) -> dict:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logp, entropy = function(hidden, weight, target)
    (g * logp + g.flip(0) * entropy).sum().backward()
    return {
        "logp": logp.detach(),
        "entropy": entropy.detach(),
        "d_hidden": hidden.grad,
        "d_weight": weight.grad,
    }


def compare(shape, kind: str, device, repeats) -> dict:
    """Every contestant at one shape. None: it is not installed."""
    found = {}
    for name, function in contestants(tiny=device == "cpu").items():
        torch._dynamo.reset()  # otherwise the second shape is compiled for any shape
        found[name] = None
        if function is not None:
            try:
                found[name] = measured(function, shape, kind == "peaked", device, repeats)
            except Exception as error:  # of a peer: the others are still measured
                if name.startswith("nanopost"):
                    raise
                found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(shape, kind, name, found[name] or "not installed", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def targets(found: dict[str, dict | None]) -> list[dict]:
    """Our kernel beside its targets, from what compare gives. None: not measured."""
    recomputed, stored = found["nanopost kernel"], found["nanopost kernel, stored"]

    def times_as_fast(peer):
        theirs = (found.get(peer) or {}).get("forward_backward_ms")
        ours = min(recomputed["forward_backward_ms"], stored["forward_backward_ms"])
        return theirs and theirs / ours

    memory = recomputed["peak_mb"]
    most = [  # name, measured, at most, at most to stretch for
        ("forward, ms", recomputed["forward_ms"], 17, 15),
        ("forward and backward, ms", recomputed["forward_backward_ms"], 64, 58),
        ("forward and backward, stored, ms", stored["forward_backward_ms"], 64, 50),
        ("memory beyond inputs and their gradients, GB", memory and memory / 1024, 1, None),
        ("rms error of log-probs", recomputed["rms_error"], 1e-4, None),
    ]
    least = [
        ("times as fast as liger-kernel", times_as_fast("liger-kernel"), 3),
        ("times as fast as cut-cross-entropy, exact", times_as_fast("cut-cross-entropy, exact"), 2),
    ]
    rows = []
    for name, value, target, stretch in most:
        row = {"what": name, "measured": value, "at_most": target, "met": None}
        if value is not None:
            row["met"] = value <= target
            if stretch is not None:
                row |= {"stretch": stretch, "stretch_met": value <= stretch}
        rows.append(row)
    for name, value, target in least:
        met = None if value is None else value >= target
        rows.append({"what": name, "measured": value, "at_least": target, "met": met})
    return rows


def print_targets(rows: list[dict]):
    for row in rows:
        if row["met"] is None:
            print(f"target: {row['what']}: not measured")
            continue
        bound = f"at most {row['at_most']:g}" if "at_most" in row else f"at least {row['at_least']}"
        verdict = "met" if row["met"] else "missed"
        if "stretch" in row:
            verdict += f"; {row['stretch']}: {'met' if row['stretch_met'] else 'missed'}"
        print(f"target: {row['what']}: {row['measured']:.3g}, {bound}: {verdict}", flush=True)


def plot(results, path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 4), layout="constrained", squeeze=False
    )
    for axis, (shape, found) in zip(axes[0], results.items()):
        times = {n: v.get("forward_backward_ms", 0) for n, v in found["random"].items() if v}
        axis.barh(list(times), list(times.values()))
        axis.axvline(found["floor_ms"], color="tab:red", linestyle="--", linewidth=1)
        label = "forward and backward, ms (red: 4 matmuls at the measured rate)"
        axis.set(title=shape, xlabel=label)
    figure.savefig(path, dpi=110)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--try", action="store_true", dest="tiny", help="write no results")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only so many")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder")
    args = parser.parse_args()
    if args.tiny:
        check("cpu")
        for shape in TINY:
            for kind in ("random", "peaked"):
                found = compare(shape, kind, "cpu", args.repeats)
        print_targets(targets(found))
        return
    check("cuda")
    rate = matmul_flops()
    torch.cuda.empty_cache()
    results = {}
    result = {
        "device": torch.cuda.get_device_name(),
        "matmul_tflops": rate / 1e12,
        **common.origin("torch", "triton"),
        "results": results,
    }
    for i, shape in enumerate(SHAPES[: args.shapes]):
        tokens, vocabulary, width = shape
        found = {"floor_ms": 1e3 * 8 * tokens * vocabulary * width / rate}
        for kind in ("random", "peaked") if i == 0 else ("random",):
            found[kind] = compare(shape, kind, "cuda", args.repeats)
        if i == 0:
            result["targets"] = targets(found["random"])
            print_targets(result["targets"])
        results[" x ".join(map(str, shape))] = found
        common.save(args.out / "kernels.json", result)
    plot(results, args.out / "kernels.png")


if __name__ == "__main__":
    main()
