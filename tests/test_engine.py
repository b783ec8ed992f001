"""The native engine against the trainer's forward, transformers' samplers and the distribution."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import random_ids, small_model

from nanopost import InputError, hf
from nanopost.batch import Example, batch_of
from nanopost.engine import Engine, Sampling, cut, prompt_seed, sample

PROMPTS = [random_ids(n, seed=n) for n in (5, 1, 17, 9)]
SEEDS = [prompt_seed(0, i) for i in range(len(PROMPTS))]


def trainer_logp(model, rollout, temperature):
    ids = rollout.prompt + rollout.ids
    batch = batch_of([Example(np.array(ids, np.int32), np.arange(len(ids)) >= len(rollout.prompt))])
    with torch.no_grad():
        logp_N, _ = model(batch, temperature)
    return logp_N[batch.mask_N].numpy()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(
    "windows", [{}, {"model_type": "mistral", "architectures": None, "sliding_window": 6}]
)
def test_log_probs_are_the_trainers_at_every_temperature(temperature, windows):
    model = small_model(**windows)
    groups = Engine(model, stop_ids=[3, 7]).generate(PROMPTS, 4, Sampling(24, temperature), SEEDS)
    for rollout in (r for group in groups for r in group):
        np.testing.assert_allclose(
            rollout.logp, trainer_logp(model, rollout, temperature), atol=1e-5
        )


def test_log_probs_follow_the_weights_after_a_sync():
    model, trained = small_model(0), small_model(1)
    engine = Engine(model, stop_ids=[3])
    engine.sync_weights(trained.state_dict().items(), version=5)
    ((rollout,),) = engine.generate(PROMPTS[:1], 1, Sampling(12), [1])
    assert rollout.version == 5
    np.testing.assert_allclose(rollout.logp, trainer_logp(trained, rollout, 1.0), atol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            rollout.logp, trainer_logp(small_model(0), rollout, 1.0), atol=1e-2
        )


def test_shared_weights_are_seen_without_a_copy():
    model = small_model()
    engine = Engine(model, stop_ids=[])
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    before = model.lm_head.weight.data_ptr()
    engine.sync_weights(model.state_dict().items(), version=1)
    ((rollout,),) = engine.generate(PROMPTS[:1], 1, Sampling(6), [1])
    assert model.lm_head.weight.data_ptr() == before
    np.testing.assert_allclose(rollout.logp, trainer_logp(model, rollout, 1.0), atol=1e-5)


@pytest.mark.parametrize(
    "size, dtype, shares",
    [(1, torch.float32, True), (2, torch.float32, False), (1, torch.bfloat16, False)],
)
def test_a_scripts_engine_shares_the_weights_of_one_process_in_fp32(tmp_path, size, dtype, shares):
    model = small_model()
    hf.save_model(tmp_path, model.state_dict().items(), model.config, {})
    world = SimpleNamespace(size=size, dtype=dtype, device=torch.device("cpu"))
    tokenizer = SimpleNamespace(stop_ids={3}, decode=str)
    engine = Engine.beside(model, tmp_path, world, tokenizer, rows=7)
    assert (engine.model is model) == shares
    assert (engine.stop_ids.tolist(), engine.decode, engine.rows) == ([3], str, 7)
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(dtype))


def test_a_rollout_depends_on_its_seed_and_not_on_its_neighbours():
    engine = Engine(small_model(), stop_ids=range(8))  # rows end at many different steps
    together = engine.generate(PROMPTS, 6, Sampling(30), SEEDS)
    again = engine.generate(PROMPTS, 6, Sampling(30), SEEDS)
    alone = [engine.generate([p], 6, Sampling(30), [s])[0] for p, s in zip(PROMPTS, SEEDS)]
    few_rows = Engine(small_model(), stop_ids=range(8), rows=7).generate(
        PROMPTS, 6, Sampling(30), SEEDS
    )
    ids = [[r.ids for r in group] for group in together]
    for other in (again, alone, few_rows):
        assert ids == [[r.ids for r in group] for group in other]
    assert len({tuple(r) for group in ids for r in group}) > 12
    assert len({len(r) for group in ids for r in group}) > 3


def test_stop_tokens_end_a_completion_and_stay_in_it():
    groups = Engine(small_model(), stop_ids=range(12)).generate(PROMPTS, 8, Sampling(6), SEEDS)
    flat = [r for group in groups for r in group]
    assert {r.finish for r in flat} == {"stop", "length"}
    for r in flat:
        assert len(r.ids) == len(r.logp) <= 6
        assert (r.finish == "stop") == (r.ids[-1] < 12)
        assert all(i >= 12 for i in r.ids[:-1])
        assert r.finish == "stop" or len(r.ids) == 6


def test_stop_strings_end_a_completion():
    engine = Engine(
        small_model(), stop_ids=[], decode=lambda ids: "".join(chr(97 + i % 26) for i in ids)
    )
    plain = engine.generate(PROMPTS, 4, Sampling(20), SEEDS)
    stopped = engine.generate(PROMPTS, 4, Sampling(20, stop=("a", "bc")), SEEDS)
    for p, s in zip((r for g in plain for r in g), (r for g in stopped for r in g)):
        text = engine.decode(p.ids)
        ends = [text.find(x) + len(x) for x in ("a", "bc") if x in text]
        assert engine.decode(s.ids) == (text[: min(ends)] if ends else text)
        assert s.finish == ("stop" if ends else "length")


def test_greedy_takes_the_likeliest_token_each_time():
    model = small_model()
    for (rollout,) in Engine(model, stop_ids=[]).generate(PROMPTS, 1, Sampling(16, temperature=0)):
        ids = list(rollout.prompt)
        for token in rollout.ids:
            cu = torch.tensor([0, len(ids)], dtype=torch.int32)
            hidden = model.model.packed(torch.tensor(ids), torch.arange(len(ids)), cu, len(ids))
            assert token == int(model.logits(hidden[-1:]).argmax())
            ids.append(token)
        assert not rollout.logp.any()


def test_draws_have_the_frequencies_of_the_distribution():
    logits = torch.tensor([2.0, 0.0, 1.0, -30.0, -1.0])
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token_B, logp_B = sample(logits.expand(200_000, -1), uniform, Sampling(1, temperature=0.7))
    p = (logits / 0.7).softmax(-1)
    assert (
        torch.bincount(token_B, minlength=5) / 200_000 - p
    ).abs().max() < 0.004  # 3.5 standard errors
    torch.testing.assert_close(logp_B, p.log()[token_B])


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    edges = torch.tensor([0.0, 0.5 - 1e-17, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, edges, Sampling(1))[0].tolist() == [1, 3, 3, 3]


@pytest.mark.parametrize(
    "top_k, top_p, min_p", [(5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.1), (9, 0.7, 0.05)]
)
def test_cutting_a_distribution_is_that_of_transformers(top_k, top_p, min_p):
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(16, 40, generator=torch.Generator().manual_seed(1)) * 2
    expected = logits
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = transformers.MinPLogitsWarper(min_p)(None, expected)
    torch.testing.assert_close(
        cut(logits.log_softmax(-1), top_k, top_p, min_p), expected.log_softmax(-1)
    )


def test_what_cannot_be_sampled_is_refused_in_a_sentence():
    engine = Engine(small_model(), stop_ids=[])
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        engine.generate([[1], []], 1, Sampling(3))
    with pytest.raises(
        InputError, match="prompt of 200 tokens and 57 new ones exceed the model's 256"
    ):
        engine.generate([[1] * 200], 1, Sampling(57))


def test_samplings_are_values():
    assert replace(Sampling(5), temperature=0.5) == Sampling(5, 0.5)
