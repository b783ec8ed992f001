"""Divergences of a student from its teacher: against torch.distributions in float64, value and
gradient, whole and cut to the teacher's likeliest tokens, and never [M, V] at once."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from nanopost import divergence as div
from nanopost import losses

M, D, E, V, K = 9, 5, 4, 13, 3
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch, request):
    """Chunks of two rows, so that every test has several, the last one shorter."""
    monkeypatch.setattr(div, "_parts", lambda hidden, weight: chunks(len(hidden), 2))


def chunks(count, rows):
    return [slice(i, i + rows) for i in range(0, max(1, count), rows)]


def inputs(seed=0, dtype=torch.float64, scale=1.0):
    """Hidden states and head of the student, then of the teacher."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (M, D), (V, D), (M, E), (V, E)
    made = [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    student = [x.to(dtype).requires_grad_() for x in made[:2]]
    return *student, *[x.to(dtype) for x in made[2:]]


TARGET_M = torch.arange(M) % V


def by_hand(p: Categorical, q: Categorical, beta):
    """Eq. 1 of 2306.13649, p the student and q the teacher."""
    if beta == 1:
        return kl_divergence(p, q)
    if beta == 0:
        return kl_divergence(q, p)
    m = Categorical(probs=beta * q.probs + (1 - beta) * p.probs)
    return beta * kl_divergence(q, m) + (1 - beta) * kl_divergence(p, m)


def distributions(hidden_MD, weight_VD, teacher_hidden_ME, teacher_weight_VE, temperature):
    p = Categorical(logits=hidden_MD @ weight_VD.T / temperature)
    return p, Categorical(logits=teacher_hidden_ME @ teacher_weight_VE.T / temperature)


def lumped(of: Categorical, id_MK):
    """The probabilities of a few tokens, and of all others as one."""
    inside_MV = torch.zeros_like(of.probs, dtype=torch.bool).scatter(1, id_MK, True)
    rest_M1 = (of.probs * ~inside_MV).sum(1, keepdim=True)
    return Categorical(probs=torch.cat([of.probs.gather(1, id_MK), rest_M1], 1))


def assert_same(found, expected, wanted, tolerance=1e-12):
    """Values, and gradients of the same weighted sum."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    weight_M = torch.linspace(-1, 2, M, dtype=torch.float64)
    ours = torch.autograd.grad((found * weight_M).sum(), wanted, retain_graph=True)
    theirs = torch.autograd.grad((expected * weight_M).sum(), wanted, retain_graph=True)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("beta", BETAS)
def test_over_the_whole_vocabulary_it_is_eq_1_value_and_gradient(beta, temperature):
    hidden, weight, *teacher = inputs()
    *_, found_M = div.from_teacher(hidden, weight, TARGET_M, temperature, *teacher, beta)
    expected_M = by_hand(*distributions(hidden, weight, *teacher, temperature), beta)
    assert_same(found_M, expected_M, (hidden, weight))


@pytest.mark.parametrize("beta", BETAS)
def test_over_the_likeliest_tokens_the_rest_is_one(beta):
    hidden, weight, *teacher = inputs(1)
    *_, found_M = div.from_teacher(hidden, weight, TARGET_M, 0.8, *teacher, beta, top_k=K)
    p, q = distributions(hidden, weight, *teacher, 0.8)
    id_MK = q.probs.sort(1, descending=True).indices[:, :K]
    assert_same(found_M, by_hand(lumped(p, id_MK), lumped(q, id_MK), beta), (hidden, weight))
    # Lumping loses information, and never adds any (data processing inequality).
    assert (found_M <= by_hand(p, q, beta) + 1e-12).all() and (found_M > 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_with_all_tokens_but_one_nothing_is_lost(beta):
    hidden, weight, *teacher = inputs(2)
    whole = div.from_teacher(hidden, weight, TARGET_M, 1.0, *teacher, beta)[2]
    cut = div.from_teacher(hidden, weight, TARGET_M, 1.0, *teacher, beta, top_k=V - 1)[2]
    assert_same(cut, whole, (hidden, weight))


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_known_by_its_likeliest_tokens_gives_the_same(beta):
    hidden, weight, *teacher = inputs(3)
    _, q = distributions(hidden, weight, *teacher, 1.0)
    logp_MK, id_MK = q.logits.topk(K)
    found = div.from_log_probs(hidden, weight, TARGET_M, 1.0, id_MK, logp_MK, beta)
    expected = div.from_teacher(hidden, weight, TARGET_M, 1.0, *teacher, beta, top_k=K)
    for a, b in zip(found, expected):
        assert_same(a, b, (hidden, weight), 1e-11)


def test_a_teacher_that_is_sure_leaves_a_rest_that_fp32_can_tell():
    """Its log-probs add up to 1 or a little more, and the rest would be the log of nothing."""
    hidden, weight, *_ = inputs(4, torch.float32)
    id_MK = torch.arange(K).repeat(M, 1)
    logp_MK = torch.tensor([0.0, -30.0, -40.0]).repeat(M, 1)
    *_, found_M = div.from_log_probs(hidden, weight, TARGET_M, 1.0, id_MK, logp_MK, 1.0)
    found_M.sum().backward()
    assert found_M.isfinite().all() and hidden.grad.isfinite().all()
    p = Categorical(logits=(hidden @ weight.T).detach().double())
    q = torch.tensor([1.0, math.exp(-30), math.exp(-40), 1e-6], dtype=torch.float64)
    expected_M = (lumped(p, id_MK).probs * (lumped(p, id_MK).probs / q).log()).sum(1)
    torch.testing.assert_close(found_M.double(), expected_M, rtol=1e-5, atol=1e-5)


def test_the_rest_of_a_sure_student_is_added_up_and_not_what_is_left_of_one():
    """In fp32 1 - p is 0 here; the log-prob of the rest and its gradient are still right."""
    logit_MV = torch.tensor([[40.0, 1.0, 2.0, 3.0]], requires_grad=True)
    id_MK = torch.tensor([[0]])
    found = div.with_rest(logit_MV.log_softmax(-1), id_MK)
    exact = logit_MV.detach().double().requires_grad_()
    expected = torch.stack([exact[:, 0], exact[:, 1:].logsumexp(1)], 1) - exact.logsumexp(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    found[0, 1].backward()
    expected[0, 1].backward()
    torch.testing.assert_close(logit_MV.grad.double(), exact.grad, rtol=1e-5, atol=1e-12)


def test_log_prob_and_entropy_are_the_students_and_have_gradients():
    hidden, weight, *teacher = inputs(5)
    logp_M, entropy_M, _ = div.from_teacher(hidden, weight, TARGET_M, 0.7, *teacher, 0.3, top_k=K)
    p, _ = distributions(hidden, weight, *teacher, 0.7)
    assert_same(logp_M, p.log_prob(TARGET_M), (hidden, weight))
    assert_same(entropy_M, p.entropy(), (hidden, weight))


def test_it_is_zero_at_the_teacher_and_has_no_gradient_there():
    hidden, weight, *_ = inputs(6)
    for beta in BETAS:
        *_, found_M = div.from_teacher(
            hidden, weight, TARGET_M, 1.0, hidden.detach(), weight.detach(), beta
        )
        gradients = torch.autograd.grad(found_M.sum(), (hidden, weight))
        assert found_M.abs().max() < 1e-14
        assert max(g.abs().max() for g in gradients) < 1e-13


@pytest.mark.parametrize("top_k", [0, K])
def test_without_targets_there_is_nothing_and_a_gradient_of_zeros(top_k):
    hidden, weight, *teacher = inputs(7)
    none = hidden[:0], weight, TARGET_M[:0], 1.0, teacher[0][:0], teacher[1], 0.5, top_k
    found = div.from_teacher(*none)
    assert [x.shape for x in found] == [(0,)] * 3
    found[2].sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("beta", BETAS)
def test_in_bf16_it_is_close_and_the_gradients_have_its_dtype(beta):
    hidden, weight, *teacher = inputs(8, torch.bfloat16)
    *_, found_M = div.from_teacher(hidden, weight, TARGET_M, 1.0, *teacher, beta)
    assert found_M.dtype == torch.float32
    found_M.sum().backward()
    exact = [x.detach().double() for x in (hidden, weight, *teacher)]
    wanted = [x.requires_grad_() for x in exact[:2]]
    expected_M = by_hand(*distributions(*exact, 1.0), beta)
    torch.testing.assert_close(found_M.double(), expected_M, rtol=1e-5, atol=1e-5)
    for x, g in zip((hidden, weight), torch.autograd.grad(expected_M.sum(), wanted)):
        assert x.grad.dtype == torch.bfloat16
        torch.testing.assert_close(x.grad.double(), g, rtol=2e-2, atol=2e-2)


def test_the_gradient_of_the_weight_adds_up_in_fp32(monkeypatch):
    """In bf16, over 256 chunks, it would be 1.6% off."""
    monkeypatch.undo()
    monkeypatch.setattr(div, "_parts", lambda hidden, weight: chunks(len(hidden), 4))
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(n, 8, generator=generator) for n in (1024, 24, 1024, 24)]
    rounded = [x.to(torch.bfloat16) for x in made]
    weight = rounded[1].requires_grad_()
    target_M = torch.arange(1024) % 24
    div.from_teacher(rounded[0], weight, target_M, 1.0, *rounded[2:], 1.0)[2].sum().backward()
    exact = [x.detach().double() for x in rounded]
    exact_weight = exact[1].requires_grad_()
    by_hand(*distributions(*exact, 1.0), 1.0).sum().backward()
    error = (weight.grad.double() - exact_weight.grad).norm() / exact_weight.grad.norm()
    assert error < 4e-3


class Largest(TorchDispatchMode):
    """The largest tensor that an operator makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("top_k", [0, K])
def test_logits_are_held_for_a_chunk_of_rows_alone(monkeypatch, top_k):
    monkeypatch.undo()
    monkeypatch.setitem(div.CHUNK_ELEMENTS, "cpu", 16 * 1000)
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(100, 8, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(1000, 8, generator=generator) for _ in range(2))
    target_M = torch.arange(100)
    with Largest() as largest:
        *_, found_M = div.from_teacher(
            hidden.requires_grad_(), weight.requires_grad_(), target_M, 1.0,
            teacher_hidden, teacher_weight, 0.5, top_k,
        )  # fmt: skip
        found_M.sum().backward()
    assert largest.elements == 16 * 1000


# ----------------------------------------------------------------------------- as a policy gradient
def test_the_policy_gradient_is_that_of_the_reverse_kl_in_expectation():
    """Over every token that can be drawn in a state, with log q - log p as its advantage."""
    hidden, weight, *teacher = inputs(9)
    p, q = distributions(hidden, weight, *teacher, 1.0)
    expected = torch.autograd.grad(kl_divergence(p, q).sum(), (hidden, weight))
    found = [torch.zeros_like(x) for x in (hidden, weight)]
    for token in range(V):
        logp_M = distributions(hidden, weight, *teacher, 1.0)[0].logits[:, token]
        adv_M = q.logits[:, token] - logp_M.detach()
        loss, _ = losses.policy_loss_clip(
            logp_M - logp_M.detach(), logp_M, adv_M, p.probs[:, token].detach(), 0.2, 0.2
        )
        for total, g in zip(found, torch.autograd.grad(loss, (hidden, weight))):
            total += g
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
