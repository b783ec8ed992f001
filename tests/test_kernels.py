"""The Triton kernels under the interpreter against float64, and compiled offline for Hopper.

What only a GPU can show (speed, bf16) is bench/kernels.py's. The interpreter's bf16 products are wrong, so none here.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels import logprob as fused  # noqa: E402
from nanopost.logprob import logprob  # noqa: E402

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
    """logp, entropy and the gradients of sum g logp + h entropy, of one of these alone if parts says so."""
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


# Odd sizes; one token; a vocabulary within a tile, of whole tiles, and of one entry more; a width of no multiple of 4.
@pytest.mark.parametrize("tokens, vocabulary, width", [(17, 97, 24), (1, 33, 16), (16, 32, 16), (40, 65, 21),
                                                       (5, 7, 3), (33, 64, 40)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_float64_and_of_the_twin(tokens, vocabulary, width, temperature):
    given = inputs(tokens, vocabulary, width)
    ours = results(fused.logprob_triton, *given, temperature)
    assert_close(ours, results(fused.logprob_reference, *given, temperature), 1e-5)
    assert_close(ours, results(logprob, *given, temperature), 1e-5)


@pytest.mark.parametrize("parts", ["logp", "entropy"])
def test_each_output_has_its_own_gradient(parts):
    given = inputs(20, 70, 16, seed=1)
    assert_close(results(fused.logprob_triton, *given, parts=parts),
                 results(fused.logprob_reference, *given, parts=parts), 1e-5)


def test_the_ends_of_the_vocabulary_and_peaked_and_very_negative_logits():
    hidden, weight, target, g, h = inputs(24, 65, 16, seed=2, scale=30.0, ignored=0.0)
    target[:8], target[8:16] = 0, 64
    weight[:, 0] -= 200 * hidden[:, 0].sign().mean()
    given = hidden, weight, target, g, h
    ours, expected = results(fused.logprob_triton, *given), results(fused.logprob_reference, *given)
    assert float(expected[0].min()) < -60 and float(expected[1].min()) < 1e-3  # far from uniform, as it should be
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
    assert torch.allclose(hidden.grad.double(), expected[2].double(), atol=1e-5) and weight.grad is None


def test_chunks_of_the_vocabulary_change_nothing_and_unwritten_memory_is_never_read(monkeypatch):
    given = inputs(12, 2100, 16, seed=3)
    whole = results(fused.logprob_triton, *given)
    monkeypatch.setattr(fused, "CHUNK_BYTES", 1)  # 1,024 entries at a time

    def poisoned(real):
        def make(*shape, **more):
            made = real(*shape, **more)
            return made.fill_(float("nan")) if made.is_floating_point() else made
        return make
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    assert_close(results(fused.logprob_triton, *given), whole, 1e-6)


def test_fp16_inputs_keep_their_statistics_in_fp32():
    hidden, weight, target, g, h = inputs(20, 70, 32, seed=4)
    given = hidden.half(), weight.half(), target, g, h
    logp, entropy, d_hidden, d_weight = results(fused.logprob_triton, *given)
    expected = results(fused.logprob_reference, *(x.double() for x in given[:2]), *given[2:])
    assert logp.dtype == entropy.dtype == torch.float32 and d_hidden.dtype == d_weight.dtype == torch.float16
    assert (logp - expected[0]).abs().max() < 1e-5 and (entropy - expected[1]).abs().max() < 1e-5
    assert (d_hidden - expected[2]).abs().max() < 4e-3 and (d_weight - expected[3]).abs().max() < 4e-3


# --------------------------------------------------------------------------------------------------- Hopper, offline
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import logprob as f

def compiled(kernel, blocks, pointers):
    m, v, d, warps, stages = blocks
    names = kernel.arg_names
    constants = {"BLOCK_M": m, "BLOCK_V": v, "BLOCK_D": d, "IEEE": False}
    signature = {}
    for name in names:
        if name in ("hidden", "weight"):
            signature[name] = f"tensordesc<bf16[{m if name == 'hidden' else v}, {d}]>"
        elif name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name == "inverse_temperature" else "i32"
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n in ("V", "D")}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): c for n, c in constants.items()},
                       attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=stages))

for name, kernel, blocks, pointers in (
        ("stats", f._stats_kernel, f.STATS, {"target_ptr": "*i64"}),
        ("gradient", f._gradient_kernel, f.GRADIENT, {"target_ptr": "*i64", "dz_ptr": "*bf16"})):
    asm = compiled(kernel, blocks, pointers).asm
    open(f"{sys.argv[1]}/{name}.cubin", "wb").write(asm["cubin"])
    open(f"{sys.argv[1]}/{name}.ptx", "w").write(asm["ptx"])
"""


def test_compiled_for_hopper_both_use_wgmma_and_tma_and_do_not_spill(tmp_path):
    import triton
    tool = shutil.which("cuobjdump") or str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    if not Path(tool).exists():
        pytest.skip("no cuobjdump in this triton")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", COMPILE, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in ("stats", "gradient"):
        ptx = (tmp_path / f"{name}.ptx").read_text()
        usage = subprocess.run([tool, "--dump-resource-usage", tmp_path / f"{name}.cubin"], capture_output=True,
                               text=True)
        registers, stack = (int(re.search(rf"{key}:(\d+)", usage.stdout)[1]) for key in ("REG", "STACK"))
        found[name] = registers, stack, ptx.count("wgmma.mma_async"), ptx.count("cp.async.bulk.tensor")
    print(json.dumps(found))
    assert all(registers <= 255 and wgmma and tma for registers, _, wgmma, tma in found.values())
    assert not any(stack for _, stack, _, _ in found.values())  # bytes of stack: what is spilled
