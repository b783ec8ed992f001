"""How far a student's distribution is from a teacher's, at each target: over the whole vocabulary,
or over the teacher's likeliest tokens and the rest of them as one.

Shapes: M targets, V vocabulary, C categories (tokens, or K tokens and the rest), D and E widths of
student and teacher, R rows of a chunk.

    p  the student's, q the teacher's,  m = beta q + (1 - beta) p           2306.13649 eq. 1
    beta = 1             KL(p || q), the reverse KL: seeks a mode of the teacher
    beta = 0             KL(q || p), the forward KL: covers all of its modes
    0 < beta < 1         beta KL(q || m) + (1 - beta) KL(p || m), the generalised JSD

Logits of whole rows are computed a chunk at a time, used and discarded; the backward pass computes
them again. Neither model's [M, V] is ever held.
"""

import math

import torch

from nanopost.logprob import accumulator, matmul_fp32, ready

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}  # logits of one model at once


# ------------------------------------------------------------------------------------- definitions
def divergence(logp_MC, teacher_logp_MC, beta: float):
    """Between two distributions over C categories, given by their log-probs -> divergence_M, nats.
    Differentiable."""
    if beta == 1:
        return kl(logp_MC, teacher_logp_MC)
    if beta == 0:
        return kl(teacher_logp_MC, logp_MC)
    log_m_MC = torch.logaddexp(
        teacher_logp_MC + math.log(beta),
        logp_MC + math.log1p(-beta),
    )
    return beta * kl(teacher_logp_MC, log_m_MC) + (1 - beta) * kl(logp_MC, log_m_MC)


def kl(logp_MC, other_MC):
    """KL(p || other) = sum_c p_c (log p_c - log other_c) -> [M]."""
    return (logp_MC.exp() * (logp_MC - other_MC)).sum(-1)


def with_rest(logp_MV, id_MK):
    """Log-probs of K tokens, and of all others together -> [M, K+1]. K < V.

    The rest is added up, and not what the K leave of 1: where they hold nearly everything that
    would be rounding, and its gradient a thousand times too large.
    """
    rest_M = logp_MV.scatter(1, id_MK, -torch.inf).logsumexp(-1)
    return torch.cat([logp_MV.gather(1, id_MK), rest_M[:, None]], 1)


# ------------------------------------------------------------------------------ from hidden states
def from_teacher(
    hidden_MD,
    weight_VD,
    target_M,
    temperature: float,
    teacher_hidden_ME,
    teacher_weight_VE,
    beta: float,
    top_k: int = 0,
):
    """Divergence from a teacher that reads the same tokens -> (logp_M, entropy_M, divergence_M).

    hidden_MD, weight_VD: the student's hidden states and head, fp32, bf16 or fp16 (fp64 gives fp64
    back); the teacher's likewise, over the same vocabulary. target_M: int64, the tokens whose
    log-prob is logp_M. temperature: divides the logits of both. top_k: of the teacher's tokens, the
    rest being one; 0: all tokens. logp and entropy are the student's, over the whole vocabulary.
    Differentiable in the student's two, exactly; the teacher gets no gradient.
    """
    teacher_weight_VE = ready(teacher_weight_VE)

    def of_rows(logit_RV, part):
        logp_RV = logit_RV.log_softmax(-1)
        teacher_RV = matmul_fp32(ready(teacher_hidden_ME[part]), teacher_weight_VE.T)
        teacher_RV = teacher_RV.div_(temperature).log_softmax(-1)
        pair = logp_RV, teacher_RV
        if top_k:
            id_RK = teacher_RV.topk(top_k, -1).indices
            pair = with_rest(logp_RV, id_RK), with_rest(teacher_RV, id_RK)
        return *_of_targets(logp_RV, target_M[part]), divergence(*pair, beta)

    return _ByRows.apply(hidden_MD, weight_VD, temperature, of_rows)


def from_log_probs(
    hidden_MD,
    weight_VD,
    target_M,
    temperature: float,
    teacher_id_MK,
    teacher_logp_MK,
    beta: float,
):
    """The same for a teacher of which only the K likeliest tokens are known, such as a server.

    teacher_id_MK: int64. teacher_logp_MK: fp32. The rest is what they leave of 1, but at least
    1e-6: fp32 resolves no less.
    """
    left_M = (1 - teacher_logp_MK.exp().sum(-1)).clamp(min=1e-6)
    teacher_MC = torch.cat([teacher_logp_MK, left_M.log()[:, None]], 1)

    def of_rows(logit_RV, part):
        logp_RV = logit_RV.log_softmax(-1)
        logp_RC = with_rest(logp_RV, teacher_id_MK[part])
        return *_of_targets(logp_RV, target_M[part]), divergence(logp_RC, teacher_MC[part], beta)

    return _ByRows.apply(hidden_MD, weight_VD, temperature, of_rows)


def _of_targets(logp_RV, target_R):
    """-> log-prob of each target, entropy."""
    entropy_R = -(logp_RV.exp() * logp_RV).sum(-1)
    return logp_RV.gather(1, target_R[:, None])[:, 0], entropy_R


class _ByRows(torch.autograd.Function):
    """of_rows(logit_RV, part) -> tensors [R], for one chunk of rows after another.

    What of_rows computes is differentiated by autograd, a chunk at a time; the two matmuls are
    differentiated here, so that the gradient of the weight adds up in fp32.
    """

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, temperature, of_rows):
        ctx.save_for_backward(hidden_MD, weight_VD)
        ctx.temperature, ctx.of_rows = temperature, of_rows
        ctx.set_materialize_grads(False)
        found = []
        weight_VD = ready(weight_VD)
        for part in _parts(hidden_MD, weight_VD):
            logit_RV = matmul_fp32(ready(hidden_MD[part]), weight_VD.T).div_(temperature)
            found.append(of_rows(logit_RV, part))
        return tuple(torch.cat(x) for x in zip(*found))

    @staticmethod
    def backward(ctx, *upstream):
        hidden_MD, weight_VD = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden_MD = torch.empty_like(hidden_MD)
        d_weight_VD = None
        if need_weight:
            d_weight_VD = torch.zeros_like(weight_VD, dtype=accumulator(weight_VD))
        ready_VD = ready(weight_VD)
        for part in _parts(hidden_MD, weight_VD):
            hidden_RD = ready(hidden_MD[part])
            logit_RV = matmul_fp32(hidden_RD, ready_VD.T).div_(ctx.temperature)
            with torch.enable_grad():
                outputs = ctx.of_rows(logit_RV.requires_grad_(), part)
            used = [(x, g[part]) for x, g in zip(outputs, upstream) if g is not None]
            (d_RV,) = torch.autograd.grad([x for x, _ in used], logit_RV, [g for _, g in used])
            d_RV = d_RV.div_(ctx.temperature).to(hidden_RD.dtype)
            if need_hidden:
                d_hidden_MD[part] = matmul_fp32(d_RV, ready_VD)
            if need_weight:
                d_weight_VD += matmul_fp32(d_RV.T, hidden_RD)
            del logit_RV, outputs, used, d_RV  # not to be held beside the next chunk's
        return (
            d_hidden_MD if need_hidden else None,
            d_weight_VD.to(weight_VD.dtype) if need_weight else None,
            None,
            None,
        )


def _parts(hidden_MD, weight_VD):
    """Chunks of rows, one at least."""
    rows = max(16, CHUNK_ELEMENTS[hidden_MD.device.type] // len(weight_VD))
    return [slice(i, i + rows) for i in range(0, max(1, len(hidden_MD)), rows)]
