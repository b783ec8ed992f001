"""Log-probability and entropy of each target from hidden states, without all logits at once.

Shapes: N packed tokens, M of them with a target, V vocabulary, C a chunk of it, J chunks, D width,
E pairs of a target and an id that the cut (top-k, top-p, min-p) before it kept.

    z       = hidden W^T / temperature
    logp    = z_y - logsumexp z
    entropy = -sum_v p_v log p_v,    p = softmax z

Where the target was drawn from a distribution that was cut to the ids K and renormalised,

    logp    = z_y - logsumexp_K z

and entropy is still that of the whole distribution: it tells how far the policy has collapsed,
however much is cut, and runs with different cuts can be compared.

The logits of a chunk are computed, used and discarded. With w_j the mass of chunk j, and p and H
taken within it, by the chain rule

    log w_j = lse_j - logsumexp_j lse_j
    logp    = log p_y + log w_j(y)
    entropy = sum_j w_j (H_j - log w_j)

The backward pass recomputes the logits (one more matmul; [N, V] is never held), unless they are few
and were saved. With upstream gradients g of logp and h of entropy,

    dz_v = g (1[v = y] - q_v) - h p_v (log p_v + entropy),    then divided by the temperature,

where q is p, or p cut to K and renormalised.

Chunks are of the vocabulary, not of tokens: each row of dW is then written once, and matmuls keep
all their rows.
"""

import torch

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}  # logits at once: a CPU's cache; 1 GiB of a GPU
CHUNK_ENTRIES = 256  # at least: with fewer, reading the hidden states costs more than the matmul
SAVED_ELEMENTS = 2**22  # log-probs saved for the backward pass: 16 MiB in fp32
HALF = torch.bfloat16, torch.float16


def logprob(
    hidden_ND,
    weight_VD,
    target_N,
    temperature: float = 1.0,
    chunk: int | None = None,
    kernels: str = "auto",
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
):
    """Log-probability of each target and entropy of its distribution -> (logp_N, entropy_N), fp32.

    hidden_ND, weight_VD: fp32, bf16, fp16 (fp64 gives fp64 back). target_N: int64; where it is
    negative there is no target: the row is dropped before the head, and both results are 0.
    temperature: > 0, divides the logits. chunk: vocabulary entries whose logits are held at once;
    default: depends on M. kernels: auto: Triton for bf16 and fp16 on CUDA (kernels/logprob.py);
    torch: never Triton, nor with kept. Differentiable in hidden and weight, exactly.
    kept: (token_E, id_E), integers, the ids over which each target's log-prob is renormalised, the
    target itself among them; None: all. It costs no further matmul, a second chunk of logits, a
    byte for each of its entries, and some 40 bytes for each of the E pairs, whatever is kept.
    """
    if (
        kernels == "auto"
        and kept is None
        and hidden_ND.is_cuda
        and hidden_ND.dtype == weight_VD.dtype in HALF
    ):
        from kernels.logprob import logprob_triton

        return logprob_triton(hidden_ND, weight_VD, target_N, temperature)
    return _LogProb.apply(hidden_ND, weight_VD, target_N, temperature, chunk, kept)


def matmul_fp32(a, b):
    """a @ b, in fp32 (or fp64) whatever the inputs: bf16 logits would make ratios 2% wrong.

    For use under no_grad or in an autograd.Function: torch.mm(out_dtype=...) has no derivative.
    """
    if a.is_cuda and a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(accumulator(a)) @ b.to(accumulator(b))


def accumulator(x):
    return torch.promote_types(x.dtype, torch.float32)


def ready(x):
    """Convert once what matmul_fp32 would convert in each chunk."""
    if x.is_cuda:
        return x
    return x.to(accumulator(x))


def _chunks(weight_VD, target_M, chunk):
    """-> weight_CD, its slice of V, which targets are in it, and their index (any if not in it)."""
    for first in range(0, len(weight_VD), chunk):
        part = slice(first, first + chunk)
        weight_CD = weight_VD[part]
        at_M = target_M - first
        inside_M = (at_M >= 0) & (at_M < len(weight_CD))
        at_M1 = at_M.clamp(0, len(weight_CD) - 1)[:, None]
        yield ready(weight_CD), part, inside_M, at_M1


def _logits(hidden_MD, weight_CD, temperature):
    z_MC = matmul_fp32(hidden_MD, weight_CD.T)
    if temperature == 1.0:
        return z_MC
    return z_MC.div_(temperature)


def _by_chunk(kept, target_N, vocabulary, chunk):
    """(token_E, id_E) -> for each chunk (rows among M, entries of the chunk)."""
    token_E, id_E = kept
    id_E, order_E = id_E.sort()
    m_N = (target_N >= 0).cumsum(0) - 1
    m_E = m_N.index_select(0, token_E.index_select(0, order_E))
    chunks = -(-vocabulary // chunk)
    counts_J = (id_E // chunk).bincount(minlength=chunks).tolist()
    return list(zip(m_E.split(counts_J), (id_E % chunk).long().split(counts_J)))


def _cut(x_MC, kept):
    """Set x to -inf in place where an entry of the chunk was not kept."""
    dropped_MC = torch.ones_like(x_MC, dtype=torch.bool)
    dropped_MC[kept] = False
    return x_MC.masked_fill_(dropped_MC, -torch.inf)


def _spread(x_M, keep_M, num_tokens):
    """Put the rows with a target back in their places among zeros -> [N, ...]."""
    return x_M.new_zeros(num_tokens, *x_M.shape[1:]).index_copy_(0, keep_M, x_M)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, temperature, chunk, kept):
        keep_M = (target_N >= 0).nonzero()[:, 0]
        hidden_MD, target_M = hidden_ND.index_select(0, keep_M), target_N.index_select(0, keep_M)
        tokens, vocabulary = len(keep_M), len(weight_VD)
        few = tokens * vocabulary <= SAVED_ELEMENTS
        if chunk is None and few:
            chunk = vocabulary
        elif chunk is None:
            chunk = max(CHUNK_ENTRIES, CHUNK_ELEMENTS[hidden_ND.device.type] // tokens)
        ready_MD = ready(hidden_MD)
        lse_JM, entropy_JM = [], []
        # Log-prob of each target within its chunk.
        log_p_M = torch.zeros(tokens, dtype=accumulator(hidden_ND), device=hidden_ND.device)
        kept_lse_JM, z_y_M = [], log_p_M
        if kept is not None:
            kept = _by_chunk(kept, target_N, vocabulary, chunk)
        for weight_CD, part, inside_M, at_M1 in _chunks(weight_VD, target_M, chunk):
            z_MC = _logits(ready_MD, weight_CD, temperature)
            if kept is not None:
                kept_lse_JM.append(_cut(z_MC.clone(), kept[part.start // chunk]).logsumexp(-1))
                z_y_M = z_MC.gather(1, at_M1)[:, 0].where(inside_M, z_y_M)
            log_p_MC = z_MC.log_softmax(-1)
            lse_JM.append(z_MC[:, 0] - log_p_MC[:, 0])
            entropy_JM.append(-torch.linalg.vecdot(torch.exp(log_p_MC, out=z_MC), log_p_MC))
            log_p_M = log_p_MC.gather(1, at_M1)[:, 0].where(inside_M, log_p_M)
        lse_JM, entropy_JM = torch.stack(lse_JM), torch.stack(entropy_JM)
        lse_M = lse_JM.logsumexp(0)
        log_w_JM = lse_JM - lse_M
        logp_M = log_p_M + log_w_JM.gather(0, (target_M // chunk)[None])[0]
        entropy_M = (log_w_JM.exp() * (entropy_JM - log_w_JM)).sum(0)
        log_mass_M = None  # of what was kept
        if kept is not None:
            kept_lse_M = torch.stack(kept_lse_JM).logsumexp(0)
            logp_M, log_mass_M = z_y_M - kept_lse_M, kept_lse_M - lse_M
        saved_MV = None
        if few and chunk >= vocabulary:
            saved_MV = log_p_MC
        saved = hidden_MD, weight_VD, target_M, keep_M, lse_M, entropy_M, log_mass_M, saved_MV
        ctx.save_for_backward(*saved)
        ctx.temperature, ctx.chunk, ctx.num_tokens = temperature, chunk, len(target_N)
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        logp_N = _spread(logp_M, keep_M, len(target_N))
        return logp_N, _spread(entropy_M, keep_M, len(target_N))

    @staticmethod
    def backward(ctx, g_N, h_N):
        hidden_MD, weight_VD, target_M, keep_M, lse_M, entropy_M, *saved = ctx.saved_tensors
        log_mass_M, saved_MV = saved
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        g_M = g_N if g_N is None else g_N.index_select(0, keep_M)
        h_M = h_N if h_N is None else h_N.index_select(0, keep_M)
        d_hidden_ND = d_hidden_MD = d_weight_VD = None
        if need_hidden:
            d_hidden_MD = torch.zeros_like(hidden_MD, dtype=accumulator(hidden_MD))
        if need_weight:
            d_weight_VD = torch.empty_like(weight_VD)
        ready_MD = ready(hidden_MD)
        for weight_CD, part, inside_M, at_M1 in _chunks(weight_VD, target_M, ctx.chunk):
            log_p_MC = saved_MV
            if saved_MV is None:
                log_p_MC = _logits(ready_MD, weight_CD, ctx.temperature).sub_(lse_M[:, None])
            if ctx.kept is None:
                q_MC = log_p_MC.exp()
            else:
                kept_E = ctx.kept[part.start // ctx.chunk]
                q_MC = _cut(log_p_MC - log_mass_M[:, None], kept_E).exp_()
            dz_MC = q_MC.mul_(0.0 if g_M is None else -g_M[:, None])
            if h_M is not None:
                dz_MC -= log_p_MC.exp().mul_(h_M[:, None] * (log_p_MC + entropy_M[:, None]))
            if g_M is not None:
                dz_MC.scatter_add_(1, at_M1, g_M.where(inside_M, 0)[:, None])
            dz_MC = dz_MC.div_(ctx.temperature).to(ready_MD.dtype)
            if need_hidden:
                d_hidden_MD += matmul_fp32(dz_MC, weight_CD)
            if need_weight:
                d_weight_VD[part] = matmul_fp32(dz_MC.T, ready_MD)
        if need_hidden:
            d_hidden_ND = _spread(d_hidden_MD.to(hidden_MD.dtype), keep_M, ctx.num_tokens)
        return d_hidden_ND, d_weight_VD, None, None, None, None
