"""What mutations.py found that no other test notices."""

import random

import numpy as np
import pytest
import torch
from inprocess import run_here
from scripts import metrics, run
from small import small_model
from tokenizers import Tokenizer as Raw
from tokenizers import models, pre_tokenizers, processors

from nanopost import checkpoint, dist, optim
from nanopost.batch import Example, batch_of
from nanopost.tokenizer import Tokenizer
from runs import toy

BOS_TEMPLATE = """\
{{- bos_token }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


def test_a_template_that_writes_bos_gets_no_second_from_the_tokenizer():
    tokens = ["<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()]
    raw = Raw(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens(["<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(raw, {"bos_token": "<s>", "eos_token": "</s>"}, BOS_TEMPLATE)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.text_ids("a")[0] == 0  # it gives a text one
    example = tokenizer.example({"messages": messages})
    for ids in (tokenizer.prompt_ids(messages[:1]), example.ids.tolist()):
        assert ids[0] == 0 and ids.count(0) == 1


def stepped(model, optimizer):
    (-model(batch_of([Example(np.arange(20), np.ones(20, bool))]))[0].sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def pair(seed):
    model = small_model(seed)
    optimizer = optim.adamw(model, 0.1)
    optim.set_learning_rate(optimizer, 0.01)
    return model, optimizer


def test_a_checkpoint_brings_back_weights_moments_and_random_state(alone, tmp_path):
    trained = pair(0)
    stepped(*trained)
    checkpoint.save(tmp_path, 7, *trained, {"consumed": 3})
    draws = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    fresh = pair(1)
    state = checkpoint.load(checkpoint.latest(tmp_path), *fresh)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == draws
    assert (state["step"], state["consumed"]) == (7, 3)
    assert all(map(torch.equal, stepped(*fresh), stepped(*trained)))


def test_weight_decay_leaves_norms_and_biases_alone():
    model = small_model(model_type="qwen2", architectures=None)
    groups = optim.adamw(model, 0.1).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {n for n, p in model.named_parameters() if not decay[id(p)]} == {
        n for n, _ in model.named_parameters() if "norm" in n or n.endswith("bias")
    }
    assert set(decay.values()) == {0.0, 0.1}


def test_full_weights_of_a_tied_model_have_no_head():
    assert "lm_head.weight" not in dict(dist.full_weights(small_model(tie_word_embeddings=True)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random toy model, SFT rows, prompts, and a reward that varies over what it
    writes."""
    folder = tmp_path_factory.mktemp("gaps")
    toy.write_model(folder / "toy")
    toy.write_rows(folder / "sft.jsonl", toy.sft_rows()[:40])
    toy.write_rows(folder / "prompts.jsonl", toy.prompt_rows(held_out=False)[:40])
    (folder / "reward.py").write_text(
        "def length(completions, **columns):\n"
        "    return [float(len(c[0]['content']) % 7) for c in completions]\n"
    )
    return folder


@pytest.mark.slow
def test_sft_on_two_ranks_is_sft_on_one(place):
    flags = ("--model", place / "toy", "--data", place / "sft.jsonl", "--holdout", 7)
    flags += ("--steps", 3, "--rows", 11, "--warmup", 0, "--lr", 1e-4, "--save_every", 0)
    run_here("train_sft.py", *flags, "--out", place / "1", "--tokens", 4096)
    run("train_sft.py", *flags, "--out", place / "2", "--tokens", 64, ranks=2)
    for one, two in zip(metrics(place / "1"), metrics(place / "2"), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & {"loss", "entropy", "grad_norm", "eval/loss"}:
            assert one[name] == pytest.approx(two[name], rel=1e-3), (one["step"], name)


def test_old_log_probs_of_the_trainer_are_those_of_the_engine(place):
    """Several updates of one batch of rollouts: the ratio is to the policy that sampled it, whoever
    recorded that."""
    flags = ("--model", place / "toy", "--data", place / "prompts.jsonl", "--holdout", 4)
    flags += ("--steps", 1, "--prompts", 4, "--group", 4, "--minibatches", 4, "--warmup", 0)
    flags += ("--lr", 3e-3, "--max_new_tokens", 8, "--save_every", 0)
    flags += ("--reward", f"{place}/reward.py:length")
    for who in ("engine", "trainer"):
        run_here("train_grpo.py", *flags, "--out", place / who, "--old_logp", who)
    engine, trainer = metrics(place / "engine")[-1], metrics(place / "trainer")[-1]
    assert engine["clip_ratio/region_mean"] > 0.01
    for name in ("loss", "grad_norm", "clip_ratio/region_mean"):
        assert engine[name] == pytest.approx(trainer[name], rel=1e-3), name
