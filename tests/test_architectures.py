"""Around the blocks of each architecture: recomputed, compiled, sharded, and in whole runs. What
they compute is in test_model.py and test_deltanet.py."""

import copy
import shutil

import numpy as np
import pytest
import torch
from inprocess import run_here
from ranks import on_ranks
from scripts import metrics
from small import ARCHITECTURES, random_ids, small_config, small_model
from test_reproducible import plainly, remains
from twins import double

from nanopost import dist, hf, optim
from nanopost.batch import Example, batch_of
from nanopost.forward import batches
from nanopost.model import CausalLM
from nanopost.save import save_model
from runs import toy

CPU = torch.device("cpu")
NAMES = [*ARCHITECTURES]


def example(ids, first=1):
    return Example(np.array(ids), np.arange(len(ids)) >= first)


def groups(count=2):
    """Prompts with several answers of each, which share what they begin with, and longer ones."""
    examples = []
    for seed in range(count):
        prompt = random_ids(11 + 9 * seed, seed)
        examples += [example(prompt + random_ids(n, 9 + n), len(prompt)) for n in (3, 8, 5)]
    return [*examples, example(random_ids(70, 5)), example(random_ids(2, 6))]


def gradients(model, examples):
    logp_N, entropy_N = model(batch_of(examples))
    (-(logp_N + 0.1 * entropy_N).sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def same(some, others, atol):
    assert some.keys() == others.keys()
    for name, x in some.items():
        torch.testing.assert_close(x, others[name], rtol=1e-4, atol=atol)


# ------------------------------------------------------------------------------ from outside
@pytest.mark.parametrize("name", NAMES)
def test_what_is_recomputed_has_the_same_gradient(name):
    model = small_model(model_type=name)
    whole = gradients(model, groups())
    for kind in ("selective", "full"):
        model.model.checkpointing = kind
        same(gradients(model, groups()), whole, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen3_5_text", "gemma3_text"])
def test_layers_of_a_kind_share_the_compiled_code(name):
    """A kind of layer has two variants: for the first number of tokens, and for any. Sampling with
    the trainer's own model has some more, but none for each layer."""
    torch._dynamo.reset()
    twice = {"num_hidden_layers": 2 * small_config(name).layers}
    for key in ("layer_types", "no_rope_layers"):
        if key in ARCHITECTURES[name]:
            twice[key] = 2 * ARCHITECTURES[name][key]
    model = small_model(model_type=name, **twice)
    compiled, kinds = copy.deepcopy(model), len({*model.config.blocks})
    for block in compiled.model.layers:
        block.compile(backend="eager")
    limits = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    with limits, torch._dynamo.config.patch(recompile_limit=2 * kinds):
        for count in (1, 2, 3):
            same(gradients(compiled, groups(count)), gradients(model, groups(count)), atol=1e-5)
    assert 8 * kinds <= dist.VARIANTS
    with limits, torch._dynamo.config.patch(recompile_limit=8 * kinds):
        samples(compiled)


@torch.no_grad()
def samples(model):
    """A prompt, and tokens after it, as an engine computes them: of the trainer's model, if it has
    none of its own."""
    cache, cu_seqlens = model.cache(1, 16), torch.tensor([0, 5], dtype=torch.int32)

    def write(layer, *new):
        first = torch.zeros(1, dtype=torch.long)
        cache.write_prompts(layer, *new, row_A=first, prompt_A=first)

    model.prefill(torch.arange(5), torch.arange(5), cu_seqlens, 5, write)
    cache.length_B.fill_(5)
    for token in (7, 8, 9):
        cache.longest = int(cache.length_B.max()) + 1
        model.decode(torch.tensor([token]), cache)


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_all_else_does_not(name):
    model = small_model(model_type=name)
    decayed, left = optim.adamw(model, 0.1).param_groups
    assert (decayed["weight_decay"], left["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    for p in left["params"]:
        assert names[id(p)].endswith(("norm.weight", "A_log", "dt_bias"))
    assert all(p.ndim > 1 for p in decayed["params"])


# ------------------------------------------------------------------------------------------- ranks
def step_of(model, seed):
    """A training step of uneven examples -> the norm of its gradient."""
    draw = np.random.default_rng(seed)
    lengths = (3, 70, 7, 2, 25, 11, 30)
    examples = [Example(draw.integers(0, 61, n), draw.random(n) < 0.6) for n in lengths]
    mine = examples[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
    for batch in batches(model, mine, 80, "cpu"):
        logp_N, _ = model(batch)
        (-logp_N.sum() / 100).backward()
    return dist.clip_grad_norm(model, 0.5)


def trained(name, rank, size, **how):
    """Norms of three steps, and the weights after them."""
    world = dist.World(rank, size, CPU, torch.float32)
    model = dist.shard(CausalLM(small_config(name)).init_weights(0), world, **how)
    optimizer = optim.adamw(model, 0.1)
    optim.set_learning_rate(optimizer, 0.003)
    norms = []
    for seed in range(3):
        norms.append(step_of(model, seed))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norms, {n: w.numpy() for n, w in dist.full_weights(model)}


@pytest.mark.parametrize("name", ["qwen3_5_moe_text"])
def test_weights_are_the_same_bytes_on_any_number_of_ranks(name, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "reproducible", True)

    def task(rank, size):
        norms, found = trained(name, rank, size)
        return norms, {n: w.tobytes() for n, w in found.items()}

    (one,), three = (on_ranks(size, tmp_path, task) for size in (1, 3))
    assert three == [one] * 3


@pytest.mark.parametrize("name", ["qwen3_5_text", "gemma3_text"])
def test_two_ranks_train_as_one_does(name, tmp_path):
    def task(rank, size):
        return trained(name, rank, size, checkpointing="full" if size > 1 else "none")

    (one,), two = (on_ranks(size, tmp_path, task) for size in (1, 2))
    np.testing.assert_allclose(one[0], two[0][0], rtol=1e-4)
    for n, w in one[1].items():
        np.testing.assert_allclose(two[0][1][n], w, atol=2e-3, err_msg=n)


# ----------------------------------------------------------------------------------------- scripts
REWARD = """
def ids(completions, completion_ids, **columns):
    return [sum(ids) % 10 / 10 for ids in completion_ids]
"""
SAMPLES = "--data {place}/prompts.jsonl --reward {place}/reward.py:ids --max_new_tokens 6"
RUNS = {
    "train_sft.py": "--data {place}/chats.jsonl --rows 6",
    "train_dpo.py": "--data {place}/pairs.jsonl --rows 4",
    "train_grpo.py": f"{SAMPLES} --prompts 16 --group 2 --minibatches 2 --beta 0.05",
    "train_ppo.py": f"{SAMPLES} --prompts 16 --group 1 --beta 0.05",
}
SHARED = (
    "--model {place}/{name} --holdout 4 --steps 3 --warmup 0 --lr 3e-3 --eval_every 2 "
    "--save_every 2 --keep 9 --tokens 256 --device cpu --reproducible"
)


TRAINED = [("train_ppo.py", "qwen3_5_text"), ("train_dpo.py", "gemma3_text")]
for script in RUNS:
    for name in ("qwen3_5_text", "gemma3_text", "qwen3_moe"):
        if (script, name) not in TRAINED:
            TRAINED.append(pytest.param(script, name, marks=pytest.mark.long))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows, and a small model of each architecture with the toy's tokenizer."""
    folder = tmp_path_factory.mktemp("place")
    for name in NAMES:
        toys = {"vocab_size": 264, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
        model = small_model(model_type=name, **toys)
        tensors = model.state_dict().items()
        save_model(folder / name, tensors, model.config, toy.tokenizer_files())
    prompts = toy.prompt_rows(held_out=False)[:24]
    chats, pairs = [], []
    for row in prompts:
        right, wrong = (
            [{"role": "assistant", "content": row["answer"] + more}] for more in ("", "7")
        )
        chats.append({"messages": [*row["prompt"], *right]})
        pairs.append({"prompt": row["prompt"], "chosen": right, "rejected": wrong})
    for name, rows in (("prompts", prompts), ("chats", chats), ("pairs", pairs)):
        toy.write_rows(folder / f"{name}.jsonl", rows)
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.mark.parametrize("script, name", TRAINED)
def test_a_script_trains_it_on_two_ranks_as_on_one_and_after_a_kill(place, tmp_path, script, name):
    given = f"{SHARED} {RUNS[script]}".format(place=place, name=name).split()
    one, two = tmp_path / "one", tmp_path / "two"
    run_here(script, *given, "--out", one)
    lines = metrics(one)
    assert len(lines) == 4 and all(line["grad_norm"] > 0 for line in lines[1:])
    assert hf.load_model(one).config.family == name
    found = remains(one)
    double.run_ranks(2, script, [*given, "--out", two], tmp_path / "log", run=plainly)
    assert remains(two) == found

    # As if it was killed after its checkpoint of step 2.
    (one / "model.safetensors").unlink()
    for path in (one / "checkpoints").glob("step-*3"):
        shutil.rmtree(path)
    run_here(script, *given, "--out", one, "--resume")
    assert remains(one) == found
