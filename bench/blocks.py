"""Time of the blocks that are not attention, beside others' -> bench/results/DEVICE_blocks.json.

    python -m bench.blocks          # anywhere; on a GPU in bf16, beside flash-linear-attention too
    python -m bench.blocks --try      # tiny: does the script work?

deltanet: the gated delta rule with its convolution, forward and backward, on packed documents, of
Qwen3.5-0.8B's sizes (16 heads of 128). transformers pads documents to the longest; its torch path
is what runs without extra packages, flash-linear-attention takes them packed. Ways take turns,
medians count.
"""

import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import common
from nanopost import deltanet
from nanopost.attention import Packing
from nanopost.config import DeltaSizes

CASES = {  # tokens of each document
    "one long document": [2048],
    "equal documents": [256] * 8,
    "ragged documents": [700, 30, 410, 90, 250, 16, 512, 40],
}


def inputs(lengths, sizes, device, dtype):
    draw = torch.Generator().manual_seed(0)
    count, heads = sum(lengths), sizes.value_heads
    channels = 2 * sizes.key_heads * sizes.key_dim + heads * sizes.value_dim
    shapes = [(count, channels), (count, heads), (count, heads), (channels, sizes.kernel)]
    qkv, decay, beta, weight = (torch.randn(shape, generator=draw) for shape in shapes)
    given = qkv, -0.3 * decay.exp(), beta.sigmoid(), 0.3 * weight
    return [x.to(device, dtype).requires_grad_() for x in given]


# --------------------------------------------------------------------------------------------- ways
def ours(given, lengths, sizes):
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


WAYS = {
    "nanopost": ours,
    "transformers, torch": transformers_padded,
    "flash-linear-attention": flash_linear_attention,
}


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


def measure(lengths, sizes, rounds, device) -> dict[str, float]:
    given = inputs(lengths, sizes, device, torch.bfloat16 if device == "cuda" else torch.float32)
    forwards = {}
    for name, way in WAYS.items():
        if name == "flash-linear-attention" and device == "cpu":
            continue
        try:
            forwards[name] = way(given, lengths, sizes)
        except ImportError:
            print(f"{name}: not installed, not measured", flush=True)
    expected = forwards["nanopost"]().float()
    for name, forward in forwards.items():
        gap = (forward().float() - expected).norm() / expected.norm()
        assert gap < (2e-2 if device == "cuda" else 1e-4), f"{name} computes something else: {gap}"
    seconds = {name: [] for name in forwards}
    for _ in range(rounds + 1):
        for name, forward in forwards.items():
            seconds[name].append(seconds_of(forward, given))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--try", dest="tiny", action="store_true")
    parser.add_argument("--out", default=common.RESULTS, type=Path, help="folder")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    sizes, cases, rounds = DeltaSizes(16, 16, 128, 128, 4), CASES, args.rounds
    if args.tiny:
        sizes, cases, rounds = DeltaSizes(2, 4, 8, 8, 4), {"ragged documents": [70, 3, 41]}, 1
    table = {}
    for case, lengths in cases.items():
        table[case] = found = measure(lengths, sizes, rounds, device)
        for name, seconds in found.items():
            ratio = seconds / found["nanopost"]
            print(f"deltanet, {case}: {name} {seconds:.3f} s, {ratio:.2f} of ours", flush=True)
    if not args.tiny:
        versions = common.origin("torch", "transformers", "flash-linear-attention")
        result = {**versions, "device": device, "sizes": sizes._asdict(), "deltanet": table}
        common.save(args.out / f"{'gpu' if device == 'cuda' else 'cpu'}_blocks.json", result)


if __name__ == "__main__":
    main()
