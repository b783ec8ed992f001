"""Time of the blocks that are not attention, beside others' -> bench/results/DEVICE_blocks.json.

    python -m bench.blocks          # anywhere; on a GPU in bf16, beside flash-linear-attention too
    python -m bench.blocks --try      # tiny: does the script work?

Forward and backward pass; ways take turns, medians count.

deltanet: the gated delta rule with its convolution, on packed documents, of Qwen3.5-0.8B's sizes
(16 heads of 128). transformers pads documents to the longest; its torch path is what runs without
extra packages, flash-linear-attention takes them packed.

experts: of a mixture whose routes are given: on a GPU Qwen3-30B-A3B's, 8 of 128 and 8,192 tokens;
on a CPU smaller ones. transformers has a loop over experts, and a grouped product.
"""

import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import common
from nanopost import deltanet
from nanopost.attention import Packing
from nanopost.config import Config, DeltaSizes
from nanopost.moe import Experts

CASES = {  # tokens of each document
    "one long document": [2048],
    "equal documents": [256] * 8,
    "ragged documents": [700, 30, 410, 90, 250, 16, 512, 40],
}
DELTA_SIZES = DeltaSizes(16, 16, 128, 128, 4)
EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "moe_intermediate_size": 192,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
}
ON_GPU = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}


# ----------------------------------------------------------------------------------- gated DeltaNet
def delta_inputs(lengths, sizes, device, dtype):
    draw = torch.Generator().manual_seed(0)
    count, heads = sum(lengths), sizes.value_heads
    channels = 2 * sizes.key_heads * sizes.key_dim + heads * sizes.value_dim
    shapes = [(count, channels), (count, heads), (count, heads), (channels, sizes.kernel)]
    qkv, decay, beta, weight = (torch.randn(shape, generator=draw) for shape in shapes)
    given = qkv, -0.3 * decay.exp(), beta.sigmoid(), 0.3 * weight
    return [x.to(device, dtype).requires_grad_() for x in given]


def delta_of_nanopost(given, lengths, sizes):
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(given[0].device)
    chunks = deltanet.Chunks.of(Packing(cu_seqlens, max(lengths)), sizes.kernel)
    return lambda: deltanet.packed(*given, sizes, chunks)[0]


def transformers_padded(given, lengths, sizes):
    """Convolution and chunked rule of transformers' torch path, on rows padded to the longest."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

    def forward():
        qkv, decay, beta, weight = given
        pad = torch.nn.utils.rnn.pad_sequence
        qkv, decay, beta = (pad(x.split(lengths), batch_first=True) for x in (qkv, decay, beta))
        qkv = theirs.causal_conv1d_fn(qkv.mT, weight, activation="silu").mT
        keys = sizes.key_heads * sizes.key_dim
        q, k, v = qkv.split([keys, keys, sizes.value_heads * sizes.value_dim], -1)
        q, k = (x.unflatten(2, (-1, sizes.key_dim)) for x in (q, k))
        v = v.unflatten(2, (-1, sizes.value_dim))
        rule = theirs.torch_chunk_gated_delta_rule
        out, _ = rule(q, k, v, decay, beta, use_qk_l2norm_in_kernel=True)
        return torch.cat([row[:length] for row, length in zip(out, lengths)])

    return forward


def flash_linear_attention(given, lengths, sizes):
    """Its Triton kernels, packed. Needs a GPU, and the package."""
    from fla.modules.convolution import causal_conv1d
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(given[0].device)

    def forward():
        qkv, decay, beta, weight = given
        mixed, _ = causal_conv1d(qkv[None], weight, activation="silu", cu_seqlens=cu_seqlens)
        keys = sizes.key_heads * sizes.key_dim
        q, k, v = mixed.split([keys, keys, sizes.value_heads * sizes.value_dim], -1)
        q, k = (x.unflatten(2, (-1, sizes.key_dim)) for x in (q, k))
        v = v.unflatten(2, (-1, sizes.value_dim))
        out, _ = chunk_gated_delta_rule(
            q,
            k,
            v,
            decay[None].float(),
            beta[None],
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=cu_seqlens,
        )
        return out[0]

    return forward


DELTA = {
    "nanopost": delta_of_nanopost,
    "transformers, torch": transformers_padded,
    "flash-linear-attention": flash_linear_attention,
}


# ------------------------------------------------------------------------------------------ experts
def expert_inputs(sizes, tokens, device, dtype):
    """x_ND, the experts' matrices, which experts each token takes, and their weights."""
    draw = torch.Generator().manual_seed(0)
    count, active, width = sizes["num_experts"], sizes["num_experts_per_tok"], sizes["hidden_size"]
    inner = sizes["moe_intermediate_size"]
    shapes = [(tokens, width), (count, 2 * inner, width), (count, width, inner)]
    x, gate_up, down = (torch.randn(shape, generator=draw) for shape in shapes)
    weight, expert = torch.randn(tokens, count, generator=draw).softmax(-1).topk(active)
    given = x, gate_up / width**0.5, down / inner**0.5, weight
    return [*(t.to(device, dtype).requires_grad_() for t in given), expert.to(device)]


def experts_of_nanopost(sizes):
    return Experts(Config.of(sizes))


def experts_of_transformers(sizes, kind):
    from transformers.models.qwen3_moe import modeling_qwen3_moe as theirs

    config = theirs.Qwen3MoeConfig(**sizes)
    config._experts_implementation = kind
    return theirs.Qwen3MoeExperts(config)


OF_EXPERTS = {
    "nanopost": experts_of_nanopost,
    "transformers, a loop": partial(experts_of_transformers, kind="eager"),
    "transformers, grouped": partial(experts_of_transformers, kind="grouped_mm"),
}


# -------------------------------------------------------------------------------------- measurement
def seconds_of(forward, given) -> float:
    """Of a forward and backward pass."""
    cuda = given[0].is_cuda
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    torch.autograd.grad(forward().float().square().sum(), given)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(forwards, given, rounds) -> dict[str, float]:
    """Median seconds of each, if all compute the same."""
    expected = forwards["nanopost"]().float()
    for name, forward in forwards.items():
        gap = (forward().float() - expected).norm() / expected.norm()
        assert gap < (2e-2 if expected.is_cuda else 1e-4), f"{name} computes something else: {gap}"
    seconds = {name: [] for name in forwards}
    for _ in range(rounds + 1):
        for name, forward in forwards.items():
            seconds[name].append(seconds_of(forward, given))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def report(what, found):
    for name, seconds in found.items():
        ratio = seconds / found["nanopost"]
        print(f"{what}: {name} {seconds:.3f} s, {ratio:.2f} of ours", flush=True)


def deltanet_table(cases, sizes, rounds, device, dtype) -> dict[str, dict[str, float]]:
    table = {}
    for case, lengths in cases.items():
        given, forwards = delta_inputs(lengths, sizes, device, dtype), {}
        for name, way in DELTA.items():
            if name == "flash-linear-attention" and device == "cpu":
                continue
            try:
                forwards[name] = way(given, lengths, sizes)
            except ImportError:
                print(f"{name}: not installed, not measured", flush=True)
        table[case] = measure(forwards, given, rounds)
        report(f"deltanet, {case}", table[case])
    return table


def experts_table(sizes, tokens, rounds, device, dtype) -> dict[str, float]:
    *given, expert_NA = expert_inputs(sizes, tokens, device, dtype)
    x_ND, gate_up, down, weight_NA = given
    matrices, forwards = {"gate_up_proj": gate_up, "down_proj": down}, {}
    for name, way in OF_EXPERTS.items():
        with torch.device("meta"):
            experts = way(sizes)
        inputs = matrices, (x_ND, expert_NA, weight_NA)
        forwards[name] = partial(torch.func.functional_call, experts, *inputs)
    found = measure(forwards, given, rounds)
    report("experts", found)
    return found


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--try", dest="tiny", action="store_true")
    parser.add_argument("--out", default=common.RESULTS, type=Path, help="folder")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes, cases, experts, tokens, rounds = DELTA_SIZES, CASES, EXPERTS, 2048, args.rounds
    if device == "cuda":
        experts, tokens = {**EXPERTS, **ON_GPU}, 8192
    if args.tiny:
        sizes, cases = DeltaSizes(2, 4, 8, 8, 4), {"ragged documents": [70, 3, 41]}
        experts, tokens, rounds = {**EXPERTS, "num_experts": 16}, 20, 1
    result = {
        **common.origin("torch", "transformers", "flash-linear-attention"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "deltanet": deltanet_table(cases, sizes, rounds, device, dtype),
        "experts": experts_table(experts, tokens, rounds, device, dtype),
        "sizes": {"deltanet": sizes._asdict(), "experts": experts, "tokens": tokens},
    }
    if not args.tiny:
        common.save(args.out / f"{'gpu' if device == 'cuda' else 'cpu'}_blocks.json", result)


if __name__ == "__main__":
    main()
