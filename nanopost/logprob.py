"""From hidden states to the log-probability and the entropy of each target, without the logits of a whole batch.

Shapes: N packed tokens, M of them with a target, C a chunk of those, V vocabulary, D width.

    z = hidden W^T / temperature        logp = z_y - logsumexp z        entropy = -sum_v p_v log p_v,  p = softmax z

The logits of a chunk are made, used and thrown away; the backward pass makes them again (one matmul more, [N, V]
never held), but for a single small chunk, which is kept. With upstream gradients g of logp and h of entropy,

    dz_v = g (1[v = y] - p_v) - h p_v (log p_v + entropy),   then divided by the temperature.
"""
import numpy as np
import torch

from nanopost.data import Example, batch_of, pack
from nanopost.dist import even

# Logits alive at once: on a CPU what its cache holds, on a GPU 1 GiB; and rows enough that reading the weight pays.
CHUNK_ELEMENTS, CHUNK_ROWS = {"cpu": 2**22, "cuda": 2**28}, 64
HALF = torch.bfloat16, torch.float16
KEPT_ELEMENTS = 2**22  # of log-probs, 16 MiB in fp32


def logprob(hidden_ND, weight_VD, target_N, temperature: float = 1.0, chunk: int | None = None, kernels: str = "auto"):
    """Log-probability of each target and entropy of its distribution -> (logp_N, entropy_N), fp32.

    hidden_ND, weight_VD: fp32, bf16, fp16 (fp64 gives fp64 back). target_N: int64; a negative target has no
    distribution: its row is dropped before the head and both results are 0 there. temperature > 0 divides the logits.
    chunk: rows whose logits are held at once; the default follows from V. Differentiable in hidden and weight, exactly.
    kernels: auto takes Triton's for bf16 and fp16 on CUDA (kernels/logprob.py), torch never.
    """
    if kernels == "auto" and hidden_ND.is_cuda and hidden_ND.dtype == weight_VD.dtype in HALF:
        from kernels.logprob import logprob_triton
        return logprob_triton(hidden_ND, weight_VD, target_N, temperature)
    chunk = chunk or max(CHUNK_ROWS, CHUNK_ELEMENTS[hidden_ND.device.type] // weight_VD.shape[0])
    return _LogProb.apply(hidden_ND, weight_VD, target_N, temperature, chunk)


def matmul_fp32(a, b):
    """a @ b with the product kept in fp32 (or fp64) whatever the inputs: bf16 logits would cost 2 % of a ratio."""
    if a.is_cuda and a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(_accumulator(a)) @ b.to(_accumulator(b))


def _accumulator(x):
    return torch.promote_types(x.dtype, torch.float32)


def _ready(weight_VD):
    """Converted once instead of in each chunk, where matmul_fp32 converts."""
    return weight_VD if weight_VD.is_cuda else weight_VD.to(_accumulator(weight_VD))


def _log_p(hidden_CD, weight_VD, temperature):
    z_CV = matmul_fp32(hidden_CD, weight_VD.T)
    return (z_CV if temperature == 1.0 else z_CV.div_(temperature)).log_softmax(-1)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, temperature, chunk):
        keep_M = (target_N >= 0).nonzero()[:, 0]
        hidden_MD, target_M = hidden_ND.index_select(0, keep_M), target_N.index_select(0, keep_M)
        stats, ready_VD = [], _ready(weight_VD)
        for h_CD, y_C in zip(hidden_MD.split(chunk), target_M.split(chunk)):
            log_p_CV = _log_p(h_CD, ready_VD, temperature)
            logp_C = log_p_CV.gather(1, y_C[:, None])[:, 0]
            stats.append(torch.stack([logp_C, -torch.linalg.vecdot(log_p_CV.exp(), log_p_CV)]))
        stats_2M = torch.cat(stats, 1)
        kept_MV = log_p_CV if len(stats) == 1 and log_p_CV.numel() <= KEPT_ELEMENTS else None
        ctx.save_for_backward(hidden_MD, weight_VD, target_M, keep_M, stats_2M[1], kept_MV)
        ctx.temperature, ctx.chunk, ctx.num_tokens = temperature, chunk, len(target_N)
        ctx.set_materialize_grads(False)
        logp_N, entropy_N = (torch.zeros(len(target_N), dtype=_accumulator(hidden_ND), device=hidden_ND.device)
                             for _ in range(2))  # not views of one tensor: FSDP2 hangs its hooks on outputs
        return (logp_N.index_copy_(0, keep_M, stats_2M[0].to(logp_N.dtype)),
                entropy_N.index_copy_(0, keep_M, stats_2M[1].to(logp_N.dtype)))

    @staticmethod
    def backward(ctx, g_N, h_N):
        hidden_MD, weight_VD, target_M, keep_M, entropy_M, kept_MV = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        ready_VD = _ready(weight_VD)
        g_M, h_M = (None if x is None else x.index_select(0, keep_M) for x in (g_N, h_N))
        d_hidden_MD = torch.empty_like(hidden_MD) if need_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=_accumulator(weight_VD)) if need_weight else None
        for first in range(0, len(keep_M), ctx.chunk):
            c = slice(first, first + ctx.chunk)
            log_p_CV = _log_p(hidden_MD[c], ready_VD, ctx.temperature) if kept_MV is None else kept_MV
            p_CV = log_p_CV.exp()
            coefficient = 0.0 if g_M is None else -g_M[c, None]
            if h_M is not None:
                coefficient = coefficient - h_M[c, None] * (log_p_CV + entropy_M[c, None])
            dz_CV = p_CV.mul_(coefficient)
            if g_M is not None:
                dz_CV.scatter_add_(1, target_M[c, None], g_M[c, None])
            dz_CV = dz_CV.div_(ctx.temperature).to(weight_VD.dtype)
            if need_hidden:
                d_hidden_MD[c] = dz_CV @ weight_VD
            if need_weight and dz_CV.dtype == d_weight_VD.dtype:
                d_weight_VD.addmm_(dz_CV.T, hidden_MD[c])
            elif need_weight:
                d_weight_VD += matmul_fp32(dz_CV.T, hidden_MD[c])
        if need_hidden:
            d_hidden_MD = hidden_MD.new_zeros(ctx.num_tokens, hidden_MD.shape[1]).index_copy_(0, keep_M, d_hidden_MD)
        if need_weight:
            d_weight_VD = d_weight_VD.to(weight_VD.dtype)
        return d_hidden_MD, d_weight_VD, None, None, None


def logprobs_of(model, examples: list, tokens: int, temperature: float, device) -> list[np.ndarray]:
    """Log-prob of each trained token of each Example under a model -> one fp32 array each, as per_token gives them."""
    return per_token(lambda batch: model(batch, temperature)[0], examples, tokens, device)


@torch.no_grad()
def per_token(forward, examples: list, tokens: int, device) -> list[np.ndarray]:
    """forward(batch) -> x_N, 0 where no target is; one fp32 array for each Example, aligned with its ids.

    A collective: every rank calls it, and runs as many micro-batches as the rank with most.
    """
    out = [None] * len(examples)
    for part in even(pack([len(e) for e in examples], tokens)):
        batch = batch_of([Example(examples[i].ids, examples[i].mask) for i in part], device)
        # Back from targets to the tokens themselves: what belongs to a token stands one place before it.
        x_N = forward(batch).roll(1).cpu().numpy()
        cuts = batch.cu_seqlens.tolist()
        for i, start, end in zip(part, cuts, cuts[1:]):
            out[i] = x_N[start:end]
    return out
