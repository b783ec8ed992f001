"""Log-prob and entropy of targets: exact in float64, close in bf16, and never [N, V] at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanopost.logprob import logprob

N, D, V = 7, 5, 11
TARGET_N = torch.tensor([3, -100, 0, V - 1, -100, -100, 6])


def inputs(seed=0, n=N, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(rows, D, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for rows in (n, V)
    ]


def plain(hidden_ND, weight_VD, target_N, temperature=1.0):
    """The definition, with the logits whole."""
    log_p_NV = torch.log_softmax(hidden_ND @ weight_VD.T / temperature, -1)
    has_N = target_N >= 0
    logp_N = log_p_NV.gather(1, target_N.clamp(min=0)[:, None])[:, 0]
    return logp_N.where(has_N, 0), (-(log_p_NV.exp() * log_p_NV).sum(-1)).where(has_N, 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_values_and_gradients_equal_those_of_log_softmax(chunk, temperature):
    qs = inputs()
    got, expected = logprob(*qs, TARGET_N, temperature, chunk), plain(*qs, TARGET_N, temperature)
    upstream = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for a, b in zip(got, expected):
        assert a.dtype == torch.float64 and (a - b).abs().max() <= 1e-14
    gradients = [torch.autograd.grad(out, qs, upstream.unbind()) for out in (got, expected)]
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-13


@pytest.mark.parametrize("outputs", ["logp", "entropy", "both"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_gradcheck(chunk, outputs):
    def function(hidden, weight):
        logp, entropy = logprob(hidden, weight, TARGET_N, 0.7, chunk)
        return {"logp": logp, "entropy": entropy, "both": (logp, entropy)}[outputs]

    assert torch.autograd.gradcheck(function, inputs(), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    "target_N", [[0, 1, 2, 3, 4, 5, 10], [-100] * 6 + [0], [-1, -100, -7, 2, 2, 2, 2]]
)
def test_rows_without_a_target_are_zero_and_give_no_gradient(target_N):
    target_N, qs = torch.tensor(target_N), inputs()
    logp_N, entropy_N = logprob(*qs, target_N, chunk=2)
    (logp_N.sum() + entropy_N.square().sum()).backward()
    assert ((logp_N == 0) == (target_N < 0)).all() and ((entropy_N == 0) == (target_N < 0)).all()
    assert ((qs[0].grad == 0).all(-1) == (target_N < 0)).all()


def test_no_target_at_all_gives_zeros_and_a_connected_graph():
    qs = inputs(dtype=torch.float32)
    logp_N, entropy_N = logprob(*qs, torch.full((N,), -100))
    assert not logp_N.any() and not entropy_N.any() and logp_N.dtype == torch.float32
    (logp_N.sum() + entropy_N.sum()).backward()
    assert not qs[0].grad.any() and not qs[1].grad.any()


def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_its_own():
    for frozen in (0, 1):
        qs, free = inputs(), inputs()
        qs[frozen].requires_grad_(False)
        logprob(*qs, TARGET_N)[0].sum().backward()
        logprob(*free, TARGET_N)[0].sum().backward()
        assert qs[frozen].grad is None and torch.equal(qs[1 - frozen].grad, free[1 - frozen].grad)


def test_using_it_twice_adds_the_gradients():
    (hidden, weight), (other, _) = inputs(), inputs(1)
    first, second = logprob(hidden, weight, TARGET_N), logprob(other, weight, TARGET_N, 0.7)
    (first[0].sum() + (first[1] * second[0]).sum()).backward()
    got, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    first, second = plain(hidden, weight, TARGET_N), plain(other, weight, TARGET_N, 0.7)
    (first[0].sum() + (first[1] * second[0]).sum()).backward()
    assert (got[0] - hidden.grad).abs().max() <= 1e-13 and (
        got[1] - weight.grad
    ).abs().max() <= 1e-13


def test_huge_logits_stay_finite_and_right():
    for scale in (30.0, 300.0):
        qs = inputs(scale=scale)
        got, expected = logprob(*qs, TARGET_N), plain(*qs, TARGET_N)
        assert expected[0].min() < -(scale**2) / 2
        for a, b in zip(got, expected):
            assert ((a - b).abs() <= 1e-13 * (1 + b.abs())).all()
        for a, b in zip(
            torch.autograd.grad(got, qs, torch.ones(2, N).double().unbind()),
            torch.autograd.grad(expected, qs, torch.ones(2, N).double().unbind()),
        ):
            assert ((a - b).abs() <= 1e-10 * (1 + b.abs())).all()


def wide(dtype, n=200, d=256, v=4000):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) * 2 / d**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator)


@pytest.mark.parametrize("dtype, grad_tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_inputs_give_the_log_probs_of_their_exact_values(dtype, grad_tolerance):
    """The logits of bf16 inputs stay fp32: rounded to bf16 they would be off by 2e-2."""
    hidden, weight, target_N = wide(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    got, expected = logprob(hidden, weight, target_N, chunk=64), plain(*exact, target_N)
    for a, b in zip(got, expected):
        assert a.dtype == torch.float32 and (a - b).square().mean().sqrt() <= 2e-6
    (got[0].sum() + got[1].sum()).backward()
    (expected[0].sum() + expected[1].sum()).backward()
    for a, b in zip((hidden, weight), exact):
        assert a.grad.dtype == dtype
        assert (a.grad - b.grad).norm() <= grad_tolerance * b.grad.norm()


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_the_logits_of_all_tokens_are_never_held():
    hidden, weight, target_N = wide(torch.float32, n=1000, d=8, v=5000)
    with Largest() as seen:
        logp_N, entropy_N = logprob(hidden, weight, target_N, chunk=100)
        (logp_N + entropy_N).sum().backward()
    assert seen.numel == 1000 * 100
    with Largest() as seen:  # nor by default
        sum(logprob(hidden, weight, target_N)).sum().backward()
    assert seen.numel < 1000 * 5000 / 4
    with Largest() as seen:
        plain(hidden, weight, target_N)
    assert seen.numel == 1000 * 5000  # the measure measures


def test_rows_without_a_target_never_meet_the_head():
    hidden, weight, target_N = wide(torch.float32, n=1000, d=8, v=5000)
    target_N[5:] = -100
    with Largest() as seen:
        logprob(hidden, weight, target_N)[0].sum().backward()
    assert seen.numel == 5000 * 8  # the weight's gradient; the logits of five rows are fewer


def test_results_do_not_depend_on_the_chunk():
    hidden, weight, target_N = wide(torch.float32, n=50)
    expected = plain(hidden.double(), weight.double(), target_N)
    for chunk in (7, 97, 4000):
        for a, b in zip(logprob(hidden, weight, target_N, chunk=chunk), expected):
            assert (a - b).abs().max() <= 5e-6
