"""A rehearsal of the GPU: CUDA's branches on a CPU, in bf16, against fp32 (gpu_on_cpu.py).

bench/gpu_day.sh does the same on a real one.
"""

import gpu_on_cpu
import pytest
import torch
from inprocess import run_here
from safetensors.torch import load_file
from scripts import SCRIPTS, metrics
from small import small_config
from test_loops import ROLLOUTS, flags, place  # noqa: F401 (a fixture)

from kernels.logprob import _add_product
from nanopost import losses, preference
from nanopost.attention import Packing, packed_attention, repeat
from nanopost.batch import Example, Sequences, batch_of
from nanopost.logprob import logprob, matmul_fp32
from nanopost.model import ActorCritic, CausalLM, ScalarModel

VERSIONS = [gpu_on_cpu.varlen_attn_2_11, gpu_on_cpu.varlen_attn_2_13]
GAP = "sampling/sampling_logp_difference"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 2, 3, 100])
def test_attention_calls_the_cuda_kernel_for_what_the_cpu_computes(version, groups, window):
    lengths = [5, 1, 9]
    packing = Packing(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))
    draw = torch.Generator().manual_seed(groups)
    qkv = [torch.randn(15, n, 16, generator=draw).bfloat16() for n in (4, groups, groups)]
    exact = packed_attention(*(x.float() for x in qkv), packing, window)
    with gpu_on_cpu.pretended(version) as taken:
        ours = packed_attention(*qkv, packing, window)
    assert "packed_attention" in taken and ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.usefixtures("few")
def test_the_cuda_kernel_gets_the_keys_of_a_shared_prefix(version, window):
    ids = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], [1, 2, 3, 4, 7, 8, 9], [5], [5, 6, 7]]
    batch = batch_of([Example(x, [True] * len(x)) for x in ids])
    packing = Packing(batch.cu_seqlens, batch.max_seqlen, batch.prefixes)
    assert len(batch.prefixes.first_U) == 12
    draw = torch.Generator().manual_seed(0)
    qkv = [torch.randn(12, n, 16, generator=draw).bfloat16().requires_grad_() for n in (4, 2, 2)]
    wide = [x.detach().float().requires_grad_() for x in qkv]
    exact = packed_attention(*wide, packing, window)
    with gpu_on_cpu.pretended(version) as taken:
        ours = packed_attention(*qkv, packing, window)
        gradients = torch.autograd.grad(ours.float().sum(), qkv)
    assert {"packed_attention", "repeat"} <= taken
    for a, b in zip([ours, *gradients], [exact, *torch.autograd.grad(exact.sum(), wide)]):
        assert (a.float() - b).norm() < 1e-2 * b.norm()


def test_gradients_of_what_is_repeated_are_added_in_a_fixed_order():
    """On CUDA indexing sorts, and index_select would add atomically; on a CPU it is the other way
    round."""
    x, index = torch.ones(3, 2, requires_grad=True), torch.tensor([0, 0, 2])
    assert repeat(x, index).grad_fn.name() == "IndexSelectBackward0"
    with gpu_on_cpu.pretended():
        assert repeat(x, index).grad_fn.name() == "IndexBackward0"


def test_products_in_fp32_have_no_derivative_on_cuda_and_nothing_asks_for_one():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 6, generator=draw).bfloat16() for _ in range(2))
    with gpu_on_cpu.pretended():
        assert matmul_fp32(a, b).dtype == torch.float32
        assert torch.equal(matmul_fp32(a, b), a.float() @ b.float())
        total = torch.ones(6, 6)
        assert torch.equal(_add_product(total, a, b), total + a.float() @ b.float())
        with pytest.raises(RuntimeError):
            matmul_fp32(a.requires_grad_(), b).sum().backward()


@pytest.mark.parametrize("kind", [CausalLM, ScalarModel, ActorCritic])
def test_every_model_has_gradients_in_bf16_on_cuda(kind):
    """Those of fp32 on a CPU, to the precision of bf16. The torch twin is in there, in chunks."""
    torch.manual_seed(0)
    config = small_config()
    given = (config, config.with_scalar_head(0)) if kind is ActorCritic else (config,)
    model = kind(*given)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.ndim == 2 else torch.ones_like(p))
    examples = [Example([1 + i, 7, 8, 3, 9, 11 + i], [False, True, True] * 2) for i in range(3)]

    def gradients(model):
        outputs = model(batch_of(examples, "cpu"))
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        sum(x.float().square().sum() for x in outputs).backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters()])

    exact = gradients(model)
    model.zero_grad()
    with gpu_on_cpu.pretended() as taken:
        ours = gradients(model.to(torch.bfloat16))
    assert "packed_attention" in taken
    assert (ours - exact).norm() < 5e-2 * exact.norm()


def test_the_torch_twin_on_cuda_is_that_on_a_cpu_in_chunks():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=draw).bfloat16() for n in (9, 50))
    target = torch.tensor([3, -100, 49, 0, 7, 7, -100, 1, 20])
    found = []
    for chunk in (None, 16):
        for inputs in ((hidden.float(), weight.float()), (hidden, weight)):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            with gpu_on_cpu.pretended():
                logp, entropy = logprob(*leaves, target, 0.7, chunk, kernels="torch")
                (logp.sum() + 0.3 * entropy.square().sum()).backward()
            assert logp.dtype == entropy.dtype == torch.float32
            found.append([logp, entropy, *(x.grad.float() for x in leaves)])
    for other in found[1:]:
        for ours, exact in zip(other, found[0]):
            assert (ours - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("version", VERSIONS[:1])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_two_steps_as_on_a_gpu(place, tmp_path, script, version):  # noqa: F811
    """bf16 under FSDP2 in a group of one, an engine of its own; the first step is that of fp32."""
    more = ("--eval_every", 1, "--checkpointing", "full")
    run_here(script, *flags(place, script, tmp_path / "fp32", *more))
    with gpu_on_cpu.pretended(version) as taken:
        run_here(script, *flags(place, script, tmp_path / "bf16", *more, "--dtype", "bf16"))
    assert "packed_attention" in taken
    assert script in ("train_rm.py", "train_distill.py") or "logprob" in taken
    exact, ours = metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16")
    # A mean of nothing is no metric: of answers that ended, or of a minibatch of equal rewards.
    for line, other in zip(ours, exact, strict=True):
        assert line.keys() ^ other.keys() <= {f"{GAP}/mean", "completions/mean_terminated_length"}
    for line in ours[1:]:
        if f"{GAP}/mean" in line:
            assert 1e-5 < line[f"{GAP}/mean"] < 2e-2
    names = ["entropy"]
    if script not in ROLLOUTS:  # a token may be drawn otherwise
        names += ["loss", "eval/loss"]
    for name in names:
        if name in exact[1]:
            assert ours[1][name] == pytest.approx(exact[1][name], rel=5e-2, abs=5e-3)
    for p in load_file(tmp_path / "bf16/model.safetensors").values():
        assert p.isfinite().all() and p.dtype == torch.float32


# --------------------------------------------------------------------------------- other devices
# On meta tensors: what a loss makes on a CPU meets them in an error, as it would a GPU's.
META = {"device": "meta"}


def on_meta(count, dtype=torch.float32):
    return torch.ones(count, dtype=dtype, **META)


def test_losses_of_tokens_stay_on_their_device():
    x_N, adv_N = on_meta(6).requires_grad_(), on_meta(6)
    mask_N, index_N = on_meta(6, torch.bool), on_meta(6, torch.long)
    sequences = Sequences(mask_N, index_N, 2)
    found = [losses.sft_nll(x_N, mask_N), losses.sft_dft(x_N, mask_N)]
    for level in ("token", "sequence", "sequence_sum"):
        log_ratio_N = losses.log_ratio(x_N, adv_N, sequences, level)
        for how in ("token", "sequence", "constant", "sequence_sum"):
            weight_N = losses.token_weights(sequences, how)
            given = log_ratio_N, x_N, adv_N, weight_N
            found += losses.policy_loss_clip(*given, 0.1, 0.2)[:1]
            found += losses.policy_loss_cispo(*given, 5.0)[:1]
            found += losses.policy_loss_sapo(*given, (1.0, 1.05))[:1]
    for level in ("token", "sequence"):
        for mode in ("truncate", "mask"):
            weight_N, metrics = losses.importance_weight(adv_N, adv_N, sequences, level, mode, 2.0)
            found += [weight_N, *metrics.values()]
    value_loss, metrics = losses.value_loss(x_N, adv_N, adv_N, mask_N, 0.2)
    found += [value_loss, *metrics.values()]
    found += [kl(x_N, adv_N) for kl in (losses.kl_k1, losses.kl_k2, losses.kl_k3)]
    assert {x.device.type for x in found if isinstance(x, torch.Tensor)} == {"meta"}


@pytest.mark.parametrize("name", [*preference.LOSSES, *preference.COUPLED])
def test_losses_of_pairs_stay_on_their_device(name):
    loss = {**preference.LOSSES, **preference.COUPLED}[name]
    columns = dict.fromkeys(("logp", "ref_logp", "nll"), on_meta(4).requires_grad_())
    pairs_P = preference.read_pairs({**columns, "length": on_meta(4)}, preference.js)
    scalars = {"beta": 0.1, "smoothing": 0.1, "gamma": 0.5, "nll_tokens": 3.0, "shift": 0.1}
    labels = {"label_P": on_meta(2), "label_weights": [1.0, 2.0]}
    loss_P = preference.weighted([loss], [0.5], pairs_P, **scalars, **labels)
    sums = preference.pair_metrics(pairs_P, 0.1, [loss])
    assert {x.device.type for x in (loss_P, *sums.values())} == {"meta"}
