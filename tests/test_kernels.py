"""The Triton kernels under the interpreter against float64, and compiled offline for Hopper.

What only a GPU can show (speed, bf16) is in bench/kernels.py: the interpreter's bf16 products are
wrong.
"""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels import logprob as fused  # noqa: E402
from nanopost.logprob import logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(tokens, vocabulary, width, seed=0, scale=1.0, ignored=0.3):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=draw)
    weight = torch.randn(vocabulary, width, generator=draw) * scale / width**0.5
    target = torch.randint(0, vocabulary, (tokens,), generator=draw)
    target[torch.rand(tokens, generator=draw) < ignored] = -100
    g, h = torch.randn(2, tokens, generator=draw)
    return [x.to(DEVICE) for x in (hidden, weight, target, g, h)]


def results(function, hidden, weight, target, g, h, temperature=1.0, parts="both"):
    """logp, entropy, and the gradients of sum g logp + h entropy, or of one part alone."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    logp, entropy = function(hidden, weight, target, temperature)
    sums = {"logp": (g * logp).sum(), "entropy": (h * entropy).sum()}
    (sums["logp"] + sums["entropy"] if parts == "both" else sums[parts]).backward()
    return logp.detach(), entropy.detach(), hidden.grad, weight.grad


def assert_close(ours, expected, tolerance):
    for name, a, b in zip(("logp", "entropy", "d_hidden", "d_weight"), ours, expected):
        assert a.isfinite().all(), name
        scale = max(1.0, float(b.abs().max()))
        assert float((a.double() - b.double()).abs().max()) < tolerance * scale, name


# Odd sizes; one token; a vocabulary within a tile, of whole tiles, and of one entry more; a width
# that is no multiple of 4.
@pytest.mark.parametrize(
    "tokens, vocabulary, width",
    [(17, 97, 24), (1, 33, 16), (16, 32, 16), (40, 65, 21), (5, 7, 3), (33, 64, 40)],
)
@pytest.mark.parametrize("temperature, store", [(1.0, False), (0.7, False), (0.7, True)])
def test_values_and_gradients_are_those_of_float64_and_of_the_twin(
    tokens, vocabulary, width, temperature, store
):
    given = inputs(tokens, vocabulary, width)
    ours = results(partial(fused.logprob_triton, store=store), *given, temperature)
    assert_close(ours, results(fused.logprob_reference, *given, temperature), 1e-5)
    assert_close(ours, results(logprob, *given, temperature), 1e-5)


@pytest.mark.parametrize("parts", ["logp", "entropy"])
def test_each_output_has_its_own_gradient(parts):
    given = inputs(20, 70, 16, seed=1)
    assert_close(
        results(fused.logprob_triton, *given, parts=parts),
        results(fused.logprob_reference, *given, parts=parts),
        1e-5,
    )


@pytest.mark.parametrize("store", [False, True])
def test_the_ends_of_the_vocabulary_and_peaked_and_very_negative_logits(store):
    hidden, weight, target, g, h = inputs(24, 65, 16, seed=2, scale=30.0, ignored=0.0)
    target[:8], target[8:16] = 0, 64
    weight[:, 0] -= 200 * hidden[:, 0].sign().mean()
    given = hidden, weight, target, g, h
    ours = results(partial(fused.logprob_triton, store=store), *given)
    expected = results(fused.logprob_reference, *given)
    assert (
        float(expected[0].min()) < -60 and float(expected[1].min()) < 1e-3
    )  # far from uniform, as it should be
    assert_close(ours, expected, 1e-5)
    assert float(ours[0].max()) <= 1e-6 and float(ours[1].min()) > -1e-5


def test_all_rows_ignored_and_a_frozen_head():
    hidden, weight, target, g, h = inputs(9, 40, 16)
    nothing = torch.full_like(target, -100)
    assert not any(x.any() for x in results(fused.logprob_triton, hidden, weight, nothing, g, h))
    hidden = hidden.requires_grad_()
    logp, entropy = fused.logprob_triton(hidden, weight, target)
    (g * logp + h * entropy).sum().backward()
    expected = results(fused.logprob_reference, hidden, weight, target, g, h)
    assert (
        torch.allclose(hidden.grad.double(), expected[2].double(), atol=1e-5)
        and weight.grad is None
    )


@pytest.mark.parametrize("store", [False, True])
def test_chunks_of_the_vocabulary_change_nothing_and_unwritten_memory_is_never_read(
    monkeypatch, store
):
    given = inputs(12, 2100, 16, seed=3)
    kernel = partial(fused.logprob_triton, store=store)
    whole = results(kernel, *given)
    monkeypatch.setattr(fused, "CHUNK_BYTES", 1)  # 1,024 entries at a time

    def poisoned(real):
        def make(*shape, **more):
            made = real(*shape, **more)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    assert_close(results(kernel, *given), whole, 1e-6)


def test_fp16_inputs_keep_their_statistics_in_fp32():
    hidden, weight, target, g, h = inputs(20, 70, 32, seed=4)
    given = hidden.half(), weight.half(), target, g, h
    logp, entropy, d_hidden, d_weight = results(fused.logprob_triton, *given)
    expected = results(fused.logprob_reference, *(x.double() for x in given[:2]), *given[2:])
    assert (
        logp.dtype == entropy.dtype == torch.float32
        and d_hidden.dtype == d_weight.dtype == torch.float16
    )
    assert (logp - expected[0]).abs().max() < 1e-5 and (entropy - expected[1]).abs().max() < 1e-5
    assert (d_hidden - expected[2]).abs().max() < 4e-3 and (
        d_weight - expected[3]
    ).abs().max() < 4e-3


def test_stored_exponentials_are_as_good_as_logits_computed_again():
    """fp16 inputs, so that bf16 is stored. Also for tokens that are nearly certain, where 1 - p is
    far below the precision of bf16."""
    hidden, weight, target, g, h = inputs(24, 100, 32, seed=5, ignored=0.0)
    hidden[:12] = 14 * weight[target[:12]] / weight[target[:12]].norm(dim=1, keepdim=True) ** 2
    given = hidden.half(), weight.half(), target, g, 0 * h
    expected = results(fused.logprob_reference, *(x.double() for x in given[:2]), *given[2:])
    assert -1e-2 < float(expected[0][:12].min()) < -1e-5
    for store in (False, True):
        ours = results(partial(fused.logprob_triton, store=store), *given)
        gap = (ours[2].double() - expected[2]).norm(dim=1) / expected[2].norm(dim=1)
        print(store, float(gap.max()))
        assert float(gap.max()) < 1e-2
        assert (ours[3] - expected[3]).abs().max() < 4e-3


def test_exponentials_are_stored_only_for_a_backward_pass_and_where_they_fit(monkeypatch):
    hidden, weight, target, *_ = inputs(24, 100, 32)
    real, asked = fused._statistics, []
    monkeypatch.setattr(
        fused, "_statistics", lambda *given: asked.append(bool(given[-1])) or real(*given)
    )
    for leaf, grad, store in (
        (True, True, True),
        (True, True, False),
        (True, False, True),
        (False, True, True),
    ):
        with torch.set_grad_enabled(grad):
            fused.logprob_triton(hidden.detach().requires_grad_(leaf), weight, target, store=store)
    assert asked == [True, False, False, False]
    if DEVICE == "cpu":  # a device without memory of its own
        fused.logprob_triton(hidden.requires_grad_(), weight, target)
        assert asked[-1] is False


# ---------------------------------------------------------------------------------- Hopper, offline
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import logprob as f

def compiled(kernel, blocks, pointers, stored=None):
    m, v, d, warps, stages = blocks
    names = kernel.arg_names
    constants = {"BLOCK_M": m, "BLOCK_V": v, "BLOCK_D": d, "IEEE": False}
    if not stored:
        constants["stored"] = None
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {}
    for name in names:
        if name == "stored" and stored:
            signature[name] = f"tensordesc<bf16[{m}, {v}]>"
        elif name in ("hidden", "weight"):
            signature[name] = f"tensordesc<bf16[{m if name == 'hidden' else v}, {d}]>"
        elif name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name == "inverse_temperature" else "i32"
    sixteens = "V", "D", "width", "first"
    attributes = {}
    for i, name in enumerate(names):
        if name.endswith("_ptr") or name in sixteens:
            attributes[i,] = [["tt.divisibility", 16]]
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

shared = {}
halves = {"dz_ptr": "*bf16", "stored_ptr": "*bf16", "target_ptr": "*i64"}
for name, kernel, blocks, stored in (
        ("stats", f._stats_kernel, f.STATS, False), ("storing", f._stats_kernel, f.STATS, True),
        ("gradient", f._gradient_kernel, f.GRADIENT, False),
        ("restore", f._restore_kernel, (f.RESTORED_ROWS, f.STATS[1], None, 8, 1), False)):
    made = compiled(kernel, blocks, halves, stored)
    asm, shared[name] = made.asm, made.metadata.shared
    open(f"{sys.argv[1]}/{name}.cubin", "wb").write(asm["cubin"])
    open(f"{sys.argv[1]}/{name}.ptx", "w").write(asm["ptx"])
print(json.dumps(shared))
"""


def test_compiled_for_hopper_they_use_wgmma_and_tma_and_do_not_spill(tmp_path):
    import triton

    tool = shutil.which("cuobjdump") or str(
        Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    )
    if not Path(tool).exists():
        pytest.skip("no cuobjdump in this triton")
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared, found = json.loads(done.stdout), {}
    assert (
        len(shared) == 4 and max(shared.values()) <= 227 * 1024
    )  # bytes of shared memory that a program can have
    for name in shared:
        ptx = (tmp_path / f"{name}.ptx").read_text()
        assert ".f64" not in ptx, name
        usage = subprocess.run(
            [tool, "--dump-resource-usage", tmp_path / f"{name}.cubin"],
            capture_output=True,
            text=True,
        )
        registers, stack = (
            int(re.search(rf"{key}:(\d+)", usage.stdout)[1]) for key in ("REG", "STACK")
        )
        found[name] = (
            registers,
            stack,
            ptx.count("wgmma.mma_async"),
            ptx.count("cp.async.bulk.tensor"),
        )
    print(json.dumps(found))
    assert all(found[name][2] and found[name][3] for name in ("stats", "storing", "gradient"))
    assert not any(stack for _, stack, _, _ in found.values())  # bytes of stack: what is spilled
