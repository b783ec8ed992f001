"""TRL's own DPO loss as an oracle: DPOTrainer._compute_loss is run, not transcribed."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanopost.batch import Example

P, T, BETA = 7, 9, 0.3


def random_step():
    """Random log-probs of P pairs of answers of uneven length.

    -> (pairs of examples with the column ref_logp, logp_ST, log sum_v p_v^2 as [S, T])."""
    draw = np.random.default_rng(3)
    pairs = []
    logp_ST = -draw.exponential(1.0, (2 * P, T))
    for _ in range(P):
        prompt = int(draw.integers(1, 4))
        sides = []
        for _ in range(2):
            length = int(draw.integers(prompt + 1, T + 1))
            sides.append(Example(np.arange(length) + 1, np.arange(length) >= prompt))
        pairs.append(tuple(sides))
    for s, e in enumerate(e for pair in pairs for e in pair):
        logp_ST[s, : len(e)] *= e.mask
        logp_ST[s, len(e) :] = 0
        e.columns["ref_logp"] = float(np.float32(logp_ST[s].sum() + draw.normal()))
    return pairs, logp_ST, -draw.exponential(1.0, (2 * P, T))


def loss_and_gradient(step, name, dtype=torch.float64, ld_alpha=None, wpo=False, **options):
    """-> (the mean loss, its gradient with respect to logp_ST). options: label_smoothing,
    f_divergence_type, f_alpha_divergence_coef."""
    trl = pytest.importorskip("trl")
    pairs, logp_ST, log_sum_sq_ST = step
    flat = [pair[side] for side in range(2) for pair in pairs]
    order = [2 * p + side for side in range(2) for p in range(P)]
    mask_ST = torch.zeros(2 * P, T, dtype=torch.long)
    for s, e in enumerate(flat):
        mask_ST[s, : len(e)] = torch.tensor(e.mask)
    logp = torch.tensor(logp_ST[order], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(2 * P, T - 1, dtype=dtype)
    outputs = SimpleNamespace(
        log_probs=logp[:, 1:],
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros > 1,
        log_sum_sq_probs=torch.tensor(log_sum_sq_ST[order], dtype=dtype)[:, 1:],
    )
    ref_logp_S = torch.tensor([e.columns["ref_logp"] for e in flat], dtype=dtype)
    inputs = {
        "input_ids": torch.ones(2 * P, T, dtype=torch.long),
        "attention_mask": torch.ones(2 * P, T),
        "completion_mask": mask_ST,
        "ref_chosen_logps": ref_logp_S[:P],
        "ref_rejected_logps": ref_logp_S[P:],
    }
    settings = {
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 1.0,
        **options,
    }
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=ld_alpha,
        use_weighting=wpo,
        precompute_ref_logps=True,
        loss_types=[name],
        loss_weights=[1.0],
        beta=BETA,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
        **settings,
    )
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    grad_ST = np.empty((2 * P, T))
    grad_ST[order] = logp.grad.double().numpy() * mask_ST.numpy()
    return float(loss.detach()), grad_ST
