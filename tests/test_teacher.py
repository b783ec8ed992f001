"""A teacher in the student's forward pass: what it gives at each target is what both models say of
that sequence alone, whatever is packed beside it or shared."""

import numpy as np
import pytest
import torch
from small import random_ids, small_model

from nanopost import InputError
from nanopost.batch import Example, batch_of
from nanopost.divergence import divergence, with_rest
from nanopost.teacher import Teacher

VOCABULARY, TEMPERATURE = 61, 0.8


@pytest.fixture(scope="module")
def models():
    wide = {"hidden_size": 48, "head_dim": 16, "num_hidden_layers": 1, "vocab_size": 64}
    return small_model(0), small_model(1, **wide)


def group(prompt, *lengths, seed=0):
    """Completions of one prompt; the first token of each completion is not trained."""
    start = random_ids(prompt, 50 + seed)
    ids = [[*start, *random_ids(n, 10 * seed + i)] for i, n in enumerate(lengths)]
    return [Example(x, np.arange(len(x)) > prompt) for x in ids]


def logits(model, ids):
    cu = torch.tensor([0, len(ids)], dtype=torch.int32)
    hidden = model.model.packed(torch.tensor(ids), torch.arange(len(ids)), cu, len(ids))
    return model.logits(hidden)[:, :VOCABULARY].double() / TEMPERATURE


@torch.no_grad()
def alone(student, teacher, e, beta, top_k):
    """Log-prob, entropy and divergence at the tokens of one sequence, from whole logits."""
    found = torch.zeros(3, len(e), dtype=torch.float64)
    p, q = (logits(model, e.ids.tolist()).log_softmax(-1) for model in (student, teacher))
    for t in e.mask.nonzero()[0]:
        p_t, q_t = p[t - 1 : t], q[t - 1 : t]
        pair = p_t, q_t
        if top_k:
            pair = [with_rest(x, q_t.topk(top_k).indices) for x in (p_t, q_t)]
        entropy = -(p_t.exp() * p_t).sum()
        found[:, t] = torch.stack([p_t[0, e.ids[t]], entropy, divergence(*pair, beta)[0]])
    return found


@pytest.mark.parametrize("beta, top_k", [(1.0, 0), (0.0, 5), (0.4, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_each_sequence_gets_what_it_would_get_alone(models, beta, top_k, shared):
    student, teacher = models
    examples = group(6, 4, 9, 3) if shared else [*group(6, 4), *group(2, 8, seed=1)]
    batch = batch_of(examples)
    assert (batch.prefixes is not None) == shared
    judge = Teacher(teacher, VOCABULARY, torch.float32, TEMPERATURE, beta, top_k)
    found = [batch.split(x.detach()) for x in student(batch, head=judge(batch))]
    for s, e in enumerate(examples):
        expected = alone(student, teacher, e, beta, top_k)
        ours = torch.from_numpy(np.stack([x[s] for x in found])).double()
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


def test_the_teacher_gets_no_gradient_and_the_student_all_of_its_own(models):
    student, teacher = models
    judge = Teacher(teacher, VOCABULARY, torch.float32, 1.0, 1.0, 0)
    batch = batch_of(group(3, 4))
    student(batch, head=judge(batch))[2].sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    student.zero_grad(set_to_none=True)


def test_a_dummy_has_nothing_to_learn_and_a_gradient_for_each_parameter(models):
    student, teacher = models
    judge = Teacher(teacher, VOCABULARY, torch.float32, 1.0, 0.5, 0)
    batch = batch_of([])
    found = student(batch, head=judge(batch))
    assert all(x.shape == (2,) and not x.any() for x in found)
    found[2].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())
    student.zero_grad(set_to_none=True)


def test_a_teacher_of_fewer_tokens_is_refused():
    with pytest.raises(InputError, match="has 61 tokens and the student 64: take a teacher"):
        Teacher(small_model(), 64, torch.float32, 1.0, 1.0, 0)
