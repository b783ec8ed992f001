"""From hidden states to the log-probability and the entropy of each target, without the logits of a whole batch.

Shapes: N packed tokens, M of them with a target, V vocabulary, C a chunk of it, J chunks, D width.

    z = hidden W^T / temperature        logp = z_y - logsumexp z        entropy = -sum_v p_v log p_v,  p = softmax z

The logits of a chunk are made, used and thrown away. With w_j the mass of chunk j and p, H within it, by the chain rule

    log w_j = lse_j - logsumexp_j lse_j        logp = log p_y + log w_j(y)        entropy = sum_j w_j (H_j - log w_j)

The backward pass makes the logits again (one matmul more, [N, V] never held), unless they are few and were kept. With
upstream gradients g of logp and h of entropy,

    dz_v = g (1[v = y] - p_v) - h p_v (log p_v + entropy),   then divided by the temperature.

Chunks of the vocabulary and not of tokens: each row of dW is then written once, and matmuls keep all their rows.
"""

import torch

# Logits alive at once: on a CPU what its cache holds, on a GPU 1 GiB; and enough of them that reading the rows pays.
CHUNK_ELEMENTS, CHUNK_ENTRIES = {"cpu": 2**20, "cuda": 2**28}, 256
KEPT_ELEMENTS = 2**22  # of log-probs, 16 MiB in fp32
HALF = torch.bfloat16, torch.float16


def logprob(
    hidden_ND,
    weight_VD,
    target_N,
    temperature: float = 1.0,
    chunk: int | None = None,
    kernels: str = "auto",
):
    """Log-probability of each target and entropy of its distribution -> (logp_N, entropy_N), fp32.

    hidden_ND, weight_VD: fp32, bf16, fp16 (fp64 gives fp64 back). target_N: int64; a negative target has no
    distribution: its row is dropped before the head and both results are 0 there. temperature > 0 divides the logits.
    chunk: entries of the vocabulary whose logits are held at once; the default follows from M. Differentiable in hidden
    and weight, exactly.
    kernels: auto takes Triton's for bf16 and fp16 on CUDA (kernels/logprob.py), torch never.
    """
    if kernels == "auto" and hidden_ND.is_cuda and hidden_ND.dtype == weight_VD.dtype in HALF:
        from kernels.logprob import logprob_triton

        return logprob_triton(hidden_ND, weight_VD, target_N, temperature)
    return _LogProb.apply(hidden_ND, weight_VD, target_N, temperature, chunk)


def matmul_fp32(a, b):
    """a @ b with the product kept in fp32 (or fp64) whatever the inputs: bf16 logits would cost 2 % of a ratio.

    For use under no_grad or in an autograd.Function: torch.mm(out_dtype=...) has no derivative."""
    if a.is_cuda and a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(_accumulator(a)) @ b.to(_accumulator(b))


def _accumulator(x):
    return torch.promote_types(x.dtype, torch.float32)


def _ready(x):
    """Converted once, where matmul_fp32 would convert."""
    return x if x.is_cuda else x.to(_accumulator(x))


def _chunks(weight_VD, target_M, chunk):
    """weight_CD, where in d_weight it stands, which targets are in it, and where (anywhere, for those that are not)."""
    for first in range(0, len(weight_VD), chunk):
        weight_CD, at_M = weight_VD[first : first + chunk], target_M - first
        inside_M = (at_M >= 0) & (at_M < len(weight_CD))
        yield (
            _ready(weight_CD),
            slice(first, first + chunk),
            inside_M,
            at_M.clamp(0, len(weight_CD) - 1)[:, None],
        )


def _logits(hidden_MD, weight_CD, temperature):
    z_MC = matmul_fp32(hidden_MD, weight_CD.T)
    return z_MC if temperature == 1.0 else z_MC.div_(temperature)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, temperature, chunk):
        keep_M = (target_N >= 0).nonzero()[:, 0]
        hidden_MD, target_M = hidden_ND.index_select(0, keep_M), target_N.index_select(0, keep_M)
        tokens, vocabulary = len(keep_M), len(weight_VD)
        few = tokens * vocabulary <= KEPT_ELEMENTS
        chunk = chunk or (
            vocabulary
            if few
            else max(CHUNK_ENTRIES, CHUNK_ELEMENTS[hidden_ND.device.type] // tokens)
        )
        ready_MD, lse_JM, entropy_JM = _ready(hidden_MD), [], []
        log_p_M = torch.zeros(
            tokens, dtype=_accumulator(hidden_ND), device=hidden_ND.device
        )  # of targets in chunks
        for weight_CD, _, inside_M, at_M1 in _chunks(weight_VD, target_M, chunk):
            z_MC = _logits(ready_MD, weight_CD, temperature)
            log_p_MC = z_MC.log_softmax(-1)
            lse_JM.append(z_MC[:, 0] - log_p_MC[:, 0])
            entropy_JM.append(-torch.linalg.vecdot(torch.exp(log_p_MC, out=z_MC), log_p_MC))
            log_p_M = log_p_MC.gather(1, at_M1)[:, 0].where(inside_M, log_p_M)
        lse_JM, entropy_JM = torch.stack(lse_JM), torch.stack(entropy_JM)
        lse_M = lse_JM.logsumexp(0)
        log_w_JM = lse_JM - lse_M
        logp_M = log_p_M + log_w_JM.gather(0, (target_M // chunk)[None])[0]
        entropy_M = (log_w_JM.exp() * (entropy_JM - log_w_JM)).sum(0)
        kept_MV = log_p_MC if few and chunk >= vocabulary else None
        ctx.save_for_backward(hidden_MD, weight_VD, target_M, keep_M, lse_M, entropy_M, kept_MV)
        ctx.temperature, ctx.chunk, ctx.num_tokens = temperature, chunk, len(target_N)
        ctx.set_materialize_grads(False)
        return tuple(
            hidden_ND.new_zeros(len(target_N), dtype=x.dtype).index_copy_(0, keep_M, x)
            for x in (logp_M, entropy_M)
        )

    @staticmethod
    def backward(ctx, g_N, h_N):
        hidden_MD, weight_VD, target_M, keep_M, lse_M, entropy_M, kept_MV = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        g_M, h_M = (None if x is None else x.index_select(0, keep_M) for x in (g_N, h_N))
        d_hidden_MD = (
            torch.zeros_like(hidden_MD, dtype=_accumulator(hidden_MD)) if need_hidden else None
        )
        d_weight_VD = torch.empty_like(weight_VD) if need_weight else None
        ready_MD = _ready(hidden_MD)
        for weight_CD, c, inside_M, at_M1 in _chunks(weight_VD, target_M, ctx.chunk):
            log_p_MC = kept_MV
            if kept_MV is None:
                log_p_MC = _logits(ready_MD, weight_CD, ctx.temperature).sub_(lse_M[:, None])
            p_MC = log_p_MC.exp()
            coefficient = 0.0 if g_M is None else -g_M[:, None]
            if h_M is not None:
                coefficient = coefficient - h_M[:, None] * (log_p_MC + entropy_M[:, None])
            dz_MC = p_MC.mul_(coefficient)
            if g_M is not None:
                dz_MC.scatter_add_(1, at_M1, g_M.where(inside_M, 0)[:, None])
            dz_MC = dz_MC.div_(ctx.temperature).to(ready_MD.dtype)
            if need_hidden:
                d_hidden_MD += matmul_fp32(dz_MC, weight_CD)
            if need_weight:
                d_weight_VD[c] = matmul_fp32(dz_MC.T, ready_MD)
        if need_hidden:
            shape = ctx.num_tokens, hidden_MD.shape[1]
            d_hidden_MD = hidden_MD.new_zeros(shape).index_copy_(
                0, keep_M, d_hidden_MD.to(hidden_MD.dtype)
            )
        return d_hidden_MD, d_weight_VD, None, None, None
