"""Adapters against peft: logits, gradients, files, both ways; one base, untouched, on any ranks."""

import gc
import json
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from inprocess import run_here
from safetensors.torch import load_file, save_file
from scripts import metrics
from small import random_ids, small_config, small_model
from test_hf import in_child
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.tensor import DTensor

from nanopost import InputError, checkpoint, dist, hf, lora, optim
from nanopost.batch import Example, batch_of
from nanopost.engine import Engine, Sampling
from nanopost.eval import main as eval_main
from nanopost.forward import batches, logprobs
from nanopost.model import ScalarModel
from nanopost.save import save_adapter, save_model
from nanopost.storage import SINGLE
from nanopost.teacher import Teacher
from nanopost.tokenizer import Tokenizer, tokenizer_files
from runs import toy

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
IDS = random_ids(40, 3)
ALL = {"k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def save(folder, model, dtype=None):
    save_model(folder, model.state_dict().items(), model.config, dtype=dtype)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small Qwen2, which has biases, and a tied head."""
    kind = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    model = small_model(4, **kind, tie_word_embeddings=True)
    draw = torch.Generator().manual_seed(8)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=draw)
    return save(tmp_path_factory.mktemp("base"), model)


@pytest.fixture(scope="module")
def rewarding(tmp_path_factory):
    """A folder with a small reward model."""
    model = ScalarModel(small_config().with_scalar_head(0))
    draw = torch.Generator().manual_seed(9)
    for p in model.parameters():
        if p.ndim == 2:
            p.data = 0.2 * torch.randn(p.shape, generator=draw)
    return save(tmp_path_factory.mktemp("reward"), model)


def adapted(folder, rank=3, load=hf.load_model, noise=0.1, **options):
    """A folder's model with adapters, B away from 0."""
    model = load(folder, shard=lambda model: lora.apply(model, rank, **options))
    draw = torch.Generator().manual_seed(6)
    for layer in lora.layers(model).values():
        layer.lora_B.data += noise * torch.randn(layer.lora_B.shape, generator=draw)
    return model


def write_adapter(model, folder):
    save_adapter(folder, dist.full_weights(model).trained(), lora.peft_config(model))
    return folder


def theirs_of(folder, adapter=None, kind=transformers.AutoModelForCausalLM, **options):
    """peft's model of a base and an adapter in fp32; a new adapter, its B random, from options."""
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    draw = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data += 0.1 * torch.randn(p.shape, generator=draw)
    return model


def their_logits(model):
    return model(torch.tensor([IDS])).logits[0]


def example(ids=IDS, mask=None):
    ids = np.array(ids)
    return Example(ids, np.arange(len(ids)) > 0 if mask is None else mask)


def our_logits(model):
    batch = batch_of([example()])
    stream = batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen
    return model.logits(model.model.packed(*stream))


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


# ---------------------------------------------------------------------------------------- as peft's
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 5.5, "rslora": True}, {"targets": ["q_proj", "down_proj"]}]
)
def test_an_adapter_written_here_is_the_same_model_in_peft(base, tmp_path, options):
    model = adapted(base, **options)
    write_adapter(model, tmp_path / "adapter")
    theirs = theirs_of(base, tmp_path / "adapter")
    close(our_logits(model), their_logits(theirs))
    with theirs.disable_adapter():
        assert not torch.allclose(our_logits(model), their_logits(theirs), atol=0.1)
    theirs.save_pretrained(tmp_path / "again")
    ours = load_file(tmp_path / "adapter" / lora.WEIGHTS)
    again = load_file(tmp_path / "again" / lora.WEIGHTS)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_an_adapter_is_written_by_the_rank_that_writes_and_replaces_the_old_one_whole(
    base, tmp_path
):
    """A limit on file sizes acts as a full disk."""
    model, taken = adapted(base), []
    trained = list(dist.full_weights(model).trained())
    given = lora.peft_config(model)
    stream = (taken.append(name) or (name, x) for name, x in trained)
    save_adapter(tmp_path / "adapter", stream, given, write=False)
    assert taken == [name for name, _ in trained] and not list(tmp_path.iterdir())

    write_adapter(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    changed = [(name, x + 1) for name, x in trained]

    def save_without_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        with pytest.raises(InputError, match=r"adapter: the disk is full: free.*--resume.*[.]$"):
            save_adapter(tmp_path / "adapter", changed, given)

    assert in_child(save_without_room) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert files == before
    save_adapter(tmp_path / "adapter", changed, given, {"more.txt": "more"})
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert files.keys() == before.keys() | {"more.txt"}
    assert files[lora.WEIGHTS] != before[lora.WEIGHTS]


def test_the_default_layers_are_those_of_peft_and_so_is_the_first_draw(base):
    theirs = theirs_of(base, r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = adapted(base, rank=16, noise=0.0)
    there = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    here = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = [lora.peft_name(name).replace(".weight", ".default.weight") for name in here]
    assert names == [*there]
    assert {name.split(".")[-2] for name in here} == ALL
    for p, q in zip(here.values(), there.values()):
        assert p.shape == q.shape and p.dtype == torch.float32
    for name, p in here.items():
        if name.endswith("lora_B"):
            assert not p.any()
            continue
        bound, q = p.shape[1] ** -0.5, there[names[[*here].index(name)]]
        assert 0.97 * bound < float(p.abs().max()) <= bound
        assert float(p.std()) == pytest.approx(float(q.std()), rel=0.1)
    draws = [layer.first_A() for layer in lora.layers(model).values()]
    assert len({float(draw[0, 0]) for draw in draws}) == len(draws)
    other = lora.layers(adapted(base, rank=16, seed=1)).values()
    assert not any(torch.equal(layer.first_A(), draw) for layer, draw in zip(other, draws))
    assert torch.equal(next(iter(lora.layers(model).values())).lora_A, draws[0])


@pytest.mark.parametrize("name", ["qwen3_5_text", "gemma3_text"])
def test_adapters_of_other_architectures_are_those_of_peft(name, tmp_path):
    """On all linear layers: not on the convolution, the decays and norms of linear attention."""
    base = save(tmp_path / "base", small_model(4, model_type=name))
    model = adapted(base)
    theirs = theirs_of(base, r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    there = {n for n, p in theirs.named_parameters() if p.requires_grad}
    here = [n for n, p in model.named_parameters() if p.requires_grad]
    assert there == {lora.peft_name(n).replace(".weight", ".default.weight") for n in here}
    theirs = theirs_of(base, write_adapter(model, tmp_path / "adapter"))
    close(our_logits(model), their_logits(theirs), atol=1e-4)
    (-model(batch_of([example()]))[0].sum() / 39).backward()
    theirs(torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert expected.keys() == there
    for n, p in model.named_parameters():
        if p.grad is not None:
            gradient = expected[lora.peft_name(n).replace(".weight", ".default.weight")]
            close(p.grad, gradient, atol=1e-4 * float(gradient.abs().max()))
    whole = dict(dist.full_weights(model))
    for n, p in theirs.merge_and_unload().named_parameters():
        close(whole[n], p)


@pytest.mark.parametrize("options", [{"alpha": 8.0}, {"alpha": 4.0, "rslora": True}])
def test_gradients_and_weights_after_three_steps_are_those_of_peft(base, tmp_path, options):
    model = adapted(base, **options)
    theirs = theirs_of(base, write_adapter(model, tmp_path / "adapter"))
    ours = optim.adamw(model, 0.1)
    there = [p for p in theirs.parameters() if p.requires_grad]
    their_optimizer = torch.optim.AdamW(there, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    optim.set_learning_rate(ours, 1e-2)
    for step in range(3):
        ids = random_ids(30, step)
        ours.zero_grad()
        their_optimizer.zero_grad()
        logp_N, _ = model(batch_of([example(ids)]))
        (-logp_N.sum() / 29).backward()
        theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss.backward()
        gradients = {
            lora.peft_name(n).replace(".weight", ".default.weight"): p.grad
            for n, p in model.named_parameters()
            if p.grad is not None
        }
        expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            close(gradient, expected[name], atol=1e-5 * float(expected[name].abs().max()) + 1e-7)
        ours.step()
        their_optimizer.step()
    close(our_logits(model), their_logits(theirs), atol=1e-4)
    whole = dict(dist.full_weights(model))
    for name, p in theirs.merge_and_unload().named_parameters():
        close(whole[name], p)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["v_proj", "up_proj"], "lora_alpha": 11, "use_rslora": True},
        {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 5}},
        {"target_modules": r".*\.1\.mlp\..*_proj"},
    ],
)
def test_an_adapter_of_peft_reads_as_its_merged_model(base, tmp_path, options):
    theirs = theirs_of(base, r=4, task_type="CAUSAL_LM", **options)
    theirs.save_pretrained(tmp_path)
    model = hf.load_model(tmp_path)
    close(our_logits(model), their_logits(theirs))
    expected = dict(theirs.merge_and_unload().named_parameters())
    for name, p in model.named_parameters():
        close(p, expected[name])


def scores(model):
    """Of three sequences, at their last tokens."""
    rows = [random_ids(length, length) for length in (9, 4, 12)]
    if isinstance(model, ScalarModel):
        batch = batch_of([example(row) for row in rows])
        return model(batch)[batch.last_S]
    return torch.cat([model(torch.tensor([row])).logits[0] for row in rows])


def test_adapters_of_reward_models_have_their_head_with_them(rewarding, base, tmp_path):
    kind = transformers.AutoModelForSequenceClassification
    model = adapted(rewarding, load=hf.load_scalar_model)
    assert model.score.weight.requires_grad and not model.model.norm.weight.requires_grad
    model.score.weight.data += 0.1
    theirs = theirs_of(rewarding, write_adapter(model, tmp_path / "ours"), kind, num_labels=1)
    close(scores(model), scores(theirs))
    # A language model as the base: the head is peft's alone.
    theirs = kind.from_pretrained(base, num_labels=1, pad_token_id=0)
    options = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "r": 2}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    theirs.save_pretrained(tmp_path / "theirs")
    found = hf.load_scalar_model(tmp_path / "theirs")
    close(scores(found), scores(theirs.eval()))
    with pytest.raises(InputError, match="is a reward model and writes no text"):
        hf.load_model(tmp_path / "theirs")


def test_merging_is_in_fp32_whatever_the_dtype_of_the_base(base, tmp_path):
    rounded = save(tmp_path / "base", hf.load_model(base), torch.bfloat16)
    theirs = theirs_of(rounded, r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs.save_pretrained(tmp_path / "adapter")
    expected = dict(theirs.merge_and_unload().named_parameters())
    for dtype in (torch.float32, torch.bfloat16):
        for name, p in hf.load_model(tmp_path / "adapter", dtype=dtype).named_parameters():
            assert p.dtype == dtype
            torch.testing.assert_close(p, expected[name].to(dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"use_dora": True}, "use_dora true is not supported"),
        ({"bias": "all"}, 'bias "all" is not supported'),
        ({"peft_type": "LOHA"}, 'peft_type "LOHA" is not supported'),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern .* is not supported"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa" is not supported'),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save .* is not supported"),
        ({"base_model_name_or_path": "Qwen/Qwen9"}, "its base model, Qwen/Qwen9, is no model"),
        ({"base_model_name_or_path": None}, "its base model, None, is no model"),
        ("weights", "has no adapter_model.safetensors: save the adapter with peft as safetensors"),
        ("damaged", "adapter_model.safetensors: damaged or incomplete"),
        ("json", "adapter_config.json: not valid JSON"),
        ("foreign", "lora_magnitude_vector .1 such tensors. is not of a plain LoRA adapter"),
        ("half", "q_proj .1 such tensors. is not of a plain LoRA adapter"),
        ("head", "changes lm_head.weight .61, 32., which in the base model .* is not there"),
        ("shape", r"changes .*q_proj.weight .32, 31., which in the base model .* is .32, 32.: is"),
        ("score", "has a score.weight, as a reward model has, but its task_type is not SEQ_CLS"),
    ],
)
def test_what_an_adapter_holds_that_is_not_computed_is_refused(base, tmp_path, change, words):
    write_adapter(adapted(base, targets=["q_proj"]), tmp_path)
    path, weights = tmp_path / lora.CONFIG, load_file(tmp_path / lora.WEIGHTS)
    config = json.loads(path.read_text())
    first = next(iter(weights))
    layer = first.removesuffix(".lora_A.weight")
    if isinstance(change, dict):
        path.write_text(json.dumps(config | change))
    elif change == "json":
        path.write_text("{")
    elif change == "weights":
        (tmp_path / lora.WEIGHTS).unlink()
    elif change == "damaged":
        (tmp_path / lora.WEIGHTS).write_bytes(b"no")
    else:
        if change == "foreign":
            weights[f"{layer}.lora_magnitude_vector"] = torch.ones(3)
        elif change == "half":
            del weights[first]
        elif change == "head":
            weights["base_model.model.lm_head.lora_A.weight"] = torch.ones(3, 32)
            weights["base_model.model.lm_head.lora_B.weight"] = torch.ones(61, 3)
        elif change == "shape":
            weights[first] = weights[first][:, 1:].contiguous()
        else:
            weights["base_model.model.score.weight"] = torch.ones(1, 32)
        save_file(weights, tmp_path / lora.WEIGHTS)
    with pytest.raises(InputError, match=words) as caught:
        hf.load_model(tmp_path)
    assert str(caught.value).endswith((".", "?")) and "\n" not in str(caught.value)


def test_a_layer_that_no_block_has_is_refused(base):
    with pytest.raises(InputError, match="--lora_targets lm_head: no linear layer .* are q_proj"):
        adapted(base, targets=["q_proj", "lm_head"])
    with pytest.raises(InputError, match="--lora 100: no layer is more than 32 wide"):
        adapted(base, rank=100)


def test_the_hash_of_an_adapter_is_that_of_its_base_too(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    model = adapted(tmp_path / "base")
    folder = write_adapter(model, tmp_path / "adapter")
    hashes = [hf.content_hash(folder)]
    changed = hf.load_model(base)
    changed.model.norm.weight.data += 1
    save(tmp_path / "base", changed)
    hashes.append(hf.content_hash(folder))
    lora.layers(model)["model.layers.0.mlp.up_proj"].lora_A.data += 1
    hashes.append(hf.content_hash(write_adapter(model, folder)))
    assert len(set(hashes)) == 3


# ----------------------------------------------------------------------------- one base, untouched
def test_with_adapters_off_the_model_is_its_base_bit_for_bit(base):
    model, plain = adapted(base), hf.load_model(base)
    reference = lora.Reference(model)
    batch = batch_of([example()])
    found = reference(batch, 0.7)
    assert not found[0].requires_grad
    for x, y in zip(found, plain(batch, 0.7)):
        assert torch.equal(x, y)
    again, _ = model(batch, 0.7)
    assert again.requires_grad and not torch.equal(again, found[0])


def bytes_of(tensors):
    return [(name, x.detach().clone()) for name, x in tensors]


def equal(some, others):
    some, others = dict(some), dict(others)
    return some.keys() == others.keys() and all(torch.equal(some[n], others[n]) for n in some)


def test_a_thousand_syncs_leave_base_and_engine_bit_for_bit(base):
    model, engine = adapted(base), Engine(hf.load_model(base), stop_ids=[])
    start = bytes_of(dist.full_weights(model).held())
    engine.sync_weights(dist.full_weights(model), 1)
    first = bytes_of(engine.model.named_parameters())
    other = bytes_of(model.named_parameters())
    for version in range(2, 1002):
        if version % 2:  # there and back: only the adapters of the moment count
            for layer in lora.layers(model).values():
                layer.lora_B.data.neg_()
        engine.sync_weights(dist.full_weights(model), version)
    assert equal(model.named_parameters(), other) and equal(dist.full_weights(model).held(), start)
    assert equal(engine.model.named_parameters(), first)
    plain = dict(hf.load_model(base).named_parameters())
    for name, p in model.named_parameters():
        assert lora.is_adapter(name) or torch.equal(p, plain[name])


def test_an_engine_of_the_trainers_model_computes_adapters_itself(base, alone):
    model = adapted(base)
    engine, apart = Engine(model, [], shared=True), Engine(hf.load_model(base), [])
    with pytest.raises(ValueError, match="samples with the trainer's own weights"):
        engine.sync_weights(dist.full_weights(adapted(base)), 2)
    for sampler in (engine, apart):
        sampler.sync_weights(dist.full_weights(model), 1)
        ((rollout,),) = sampler.generate([IDS[:5]], 1, Sampling(12), [3])
        (logp_T,) = logprobs(model, [rollout.example()], 64, 1.0, "cpu")
        np.testing.assert_allclose(rollout.logp, logp_T[5:], atol=1e-4)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_frozen_weights_keep_the_dtype_of_their_folder_and_adapters_are_fp32(
    base, tmp_path, alone, stored
):
    """A base in bf16 needs no FSDP2 in one process; one in fp32 does, which casts it."""
    folder = save(tmp_path, hf.load_model(base), stored)
    world = dist.World(0, 1, torch.device("cpu"), torch.bfloat16)

    def shard(model):
        lora.hold_in_stored_dtype(lora.apply(model, 3))
        return dist.shard(model, world)

    model = hf.load_model(folder, shard=shard)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if lora.is_adapter(name) else stored)
        assert isinstance(p, DTensor) == (stored == torch.float32)
    logp_N, _ = model(batch_of([example()]))
    (-logp_N.sum()).backward()
    gradient = lora.layers(model)["model.layers.1.mlp.down_proj"].lora_B.grad
    assert gradient.dtype == torch.float32 and full(gradient).any()
    expected, _ = hf.load_model(folder, dtype=torch.bfloat16)(batch_of([example()]))
    assert torch.equal(logp_N, expected)  # B is 0
    merged = dict(dist.full_weights(model))["model.layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.float32


# ------------------------------------------------------------------------------------------- ranks
def _rank(rank, size, folder, name, base):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / f'{name}-store'}", rank=rank, world_size=size
    )
    torch.set_num_threads(1)
    steps = range(2) if name.startswith("begin") else range(2, 4)
    world = dist.World(rank, size, torch.device("cpu"), torch.float32)

    def shard(model):
        return dist.shard(lora.apply(model, 3, alpha=6.0), world)

    model = hf.load_model(base, shard=shard)
    optimizer = optim.adamw(model, 0.1)
    optim.set_learning_rate(optimizer, 1e-2)
    if name.startswith("go on"):
        found = checkpoint.latest(folder / "run")
        names = {n.removeprefix("model.") for n in stored_names(found) if n.startswith("model.")}
        assert names and all(map(lora.is_adapter, names))
        checkpoint.load(found, model, optimizer)
    for step in steps:
        lengths = (3, 40, 7, 25, 11)
        examples = [example(random_ids(n, 10 * step + n)) for n in lengths]
        for batch in batches(model, examples[rank::size], 40, "cpu"):
            logp_N, _ = model(batch)
            (-logp_N.sum() / 81).backward()
        gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    if name == "begin 2":
        checkpoint.save(folder / "run", 2, model, optimizer, {})
    (logp_T,) = logprobs(lora.Reference(model), [example()], 64, 1.0, "cpu")
    weights = dict(dist.full_weights(model))
    adapters = dict(dist.full_weights(model).trained())
    if rank == 0:
        torch.save((gradients, weights, adapters, logp_T), folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


def stored_names(path):
    return checkpoint._Reader(path).read_metadata().state_dict_metadata


def full(p):
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()


def test_ranks_change_nothing_and_a_run_goes_on_with_any_number_of_them(base, tmp_path):
    found = {}
    for size, name in [(1, "begin 1"), (2, "begin 2"), (4, "begin 4")] + [
        (size, f"go on {size}") for size in (1, 2, 4)
    ]:
        mp.start_processes(_rank, (size, tmp_path, name, base), nprocs=size, start_method="fork")
        found[name] = torch.load(tmp_path / f"{name}.pt", weights_only=False)
    with torch.no_grad():
        plain_N, _ = hf.load_model(base)(batch_of([example()]))
    for name in found:
        first = found[f"{name[:-1]}1"]
        for one, many in zip(first[:3], found[name][:3]):
            assert one.keys() == many.keys()
            for n in one:
                torch.testing.assert_close(many[n], one[n], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[name][3][1:], plain_N[:-1], atol=2e-5)
    assert len(found["begin 1"][0]) == 28  # A and B of seven layers in two blocks


# ----------------------------------------------------------------------------------------- scripts
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two random toy models, pairs, prompts, chats and a reward."""
    folder = tmp_path_factory.mktemp("place")
    toy.write_model(folder / "toy")
    toy.write_model(folder / "teacher", seed=1)
    rows = []
    for a in range(10, 34):
        chosen, rejected = f"<answer>{a + 17}</answer>", f"{a}" * (1 + a % 3)
        row = {
            "prompt": [{"role": "user", "content": f"{a}+17=?"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        rows.append(row)
    toy.write_rows(folder / "pairs.jsonl", rows)
    toy.write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    messages = [{"messages": row["prompt"] + row["chosen"]} for row in rows]
    toy.write_rows(folder / "chats.jsonl", messages)
    (folder / "reward.py").write_text(
        "def letters(completions, **columns):\n"
        "    return [sum(map(ord, c[-1]['content'])) % 5 for c in completions]\n"
    )
    return folder


def train(script, place, out, *more, model="toy", rank=4):
    sampled = ("grpo", "ppo", "online_dpo", "distill")
    data = {"sft": "chats", **dict.fromkeys(sampled, "prompts")}
    size = ["--rows", 6]
    if script in sampled:
        size = ["--prompts", 4, "--max_new_tokens", 6]
        size += ["--reward", f"{place / 'reward.py'}:letters"]
        size += ["--teacher", place / "teacher"] if script == "distill" else ["--group", 2]
    flags = ("--model", place / model, "--data", place / f"{data.get(script, 'pairs')}.jsonl")
    flags += ("--holdout", 2, "--out", out, "--steps", 4, "--lr", 1e-2, "--warmup", 0)
    run_here(f"train_{script}.py", *flags, *size, "--lora", rank, *more)


def parameters_alive() -> int:
    """Numbers in all parameters that this process holds, each counted once."""
    gc.collect()
    found = {}
    for x in gc.get_objects():
        if isinstance(x, torch.nn.Parameter) and not is_fake(x):  # which other tests leave behind
            found[x.data_ptr()] = x.numel()
    return sum(found.values())


@pytest.mark.parametrize(
    "script, more, bases",
    [
        ("dpo", [], 1),
        ("kto", [], 1),
        ("grpo", ["--beta", 0.1], 1),
        ("online_dpo", [], 1),
        ("ppo", ["--beta", 0.1, "--value_model", "head"], 1),
        ("ppo", ["--beta", 0.1], 2),  # and its value model
        ("dpo", ["--lora", 0], 2),
        ("grpo", ["--beta", 0.1, "--lora", 0], 2),
    ],
)
def test_with_adapters_policy_reference_and_engine_are_one_model(
    place, tmp_path, monkeypatch, script, more, bases
):
    before, seen = parameters_alive(), []
    clip = dist.clip_grad_norm

    def counted(*args):
        if not seen:
            seen.append(parameters_alive() - before)
        return clip(*args)

    monkeypatch.setattr(dist, "clip_grad_norm", counted)
    train(script, place, tmp_path / "out", *more)
    size = sum(p.numel() for p in hf.load_model(place / "toy").parameters())
    adapters = 0.1 * size * (more[-2:] != ["--lora", 0])
    assert bases * size <= seen[-1] <= bases * (size + adapters)


@pytest.mark.parametrize("script", ["sft", "dpo", "grpo"])
def test_a_run_leaves_a_merged_model_and_its_adapter_which_are_the_same(place, tmp_path, script):
    train(script, place, tmp_path / "out")
    out = tmp_path / "out"
    merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    theirs = theirs_of(place / "toy", out / "adapter")
    close(their_logits(merged), their_logits(theirs))
    ours = our_logits(hf.load_model(out))
    close(ours, their_logits(merged))
    close(our_logits(hf.load_model(out / "adapter")), ours)
    assert not torch.allclose(ours, our_logits(hf.load_model(place / "toy")), atol=1e-2)
    assert Tokenizer.load(out / "adapter").stop_ids == Tokenizer.load(out).stop_ids


def test_an_adapters_folder_is_a_model_wherever_one_is_named(place, tmp_path, monkeypatch):
    """Trained on, evaluated, as a reward, a reference and a value model; its tokenizer is that of
    its base where it has none."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    train("sft", place, tmp_path / "sft")
    train("rm", place, tmp_path / "rm")
    adapter, reward = tmp_path / "sft" / "adapter", f"model:{tmp_path / 'rm' / 'adapter'}"
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (adapter / name).unlink(missing_ok=True)
    for number, model in enumerate([adapter, tmp_path / "sft"]):
        out = tmp_path / f"ppo{number}"
        train("ppo", place, out, "--reward", reward, "--lora", 0, "--beta", 0.1, model=model)
        asked = f"--model {model} --kl {model} --max_new_tokens 6 --data {place / 'prompts.jsonl'}"
        eval_main(asked.split())
    torch.set_flush_denormal(False)
    one, two = load_file(tmp_path / "ppo0" / SINGLE), load_file(tmp_path / "ppo1" / SINGLE)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)
    assert (tmp_path / "ppo0" / "tokenizer.json").exists()
    assert (tmp_path / "ppo0" / "value" / "config.json").exists()


def test_stop_tokens_of_an_adapter_are_those_of_its_base(place, tmp_path):
    """peft and TRL save no generation_config.json beside an adapter."""
    shutil.copytree(place / "toy", tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    adapter = write_adapter(adapted(tmp_path / "base"), tmp_path / "adapter")
    for name in ("", "tokenizer.json"):  # with a tokenizer of its own, and without
        if name:
            shutil.copy(place / "toy" / name, adapter / name)
        tokenizer = Tokenizer.load(adapter)
        assert 9 in tokenizer.stop_ids
        files = tokenizer_files(adapter, tokenizer)
        assert files["tokenizer.json"] == (place / "toy" / "tokenizer.json").read_bytes()
        assert json.loads(files["generation_config.json"])["eos_token_id"][:2] == [1, 9]


def test_adapters_of_a_merged_adapter_are_not_written_by_themselves(place, tmp_path, capsys):
    train("sft", place, tmp_path / "sft")
    train("dpo", place, tmp_path / "dpo", model=tmp_path / "sft" / "adapter")
    assert "dpo/adapter is not written: the base of its adapters" in capsys.readouterr().out
    assert not (tmp_path / "dpo" / "adapter").exists()
    assert (tmp_path / "dpo" / SINGLE).exists()


@pytest.mark.parametrize("more", [[], ["--quantize", "nf4"]])
def test_a_model_learns_with_adapters_alone(place, tmp_path, more):
    """A random model, whose embedding stays as it is, learns the rows by heart."""
    train("sft", place, tmp_path / "out", "--steps", 60, "--eval_every", 0, *more, rank=8)
    losses = [line["loss"] for line in metrics(tmp_path / "out")[1:]]
    assert losses[-1] < losses[0] / 4


def test_a_teacher_has_neither_adapters_nor_4_bits_and_stays_as_it_is(place, tmp_path, monkeypatch):
    teachers, made = [], Teacher.__init__

    def watched(self, model, *given):
        teachers.append(model)
        made(self, model, *given)

    monkeypatch.setattr(Teacher, "__init__", watched)
    more = ("--steps", 6, "--eval_every", 0, "--quantize", "nf4")
    train("distill", place, tmp_path / "out", *more, rank=8)
    (teacher,), stored = teachers, hf.load_model(place / "teacher").state_dict()
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, stored[name]), name
    first, *_, last = metrics(tmp_path / "out")
    assert last["eval/divergence"] < 0.9 * first["eval/divergence"]


class Stopped(BaseException):
    """As by a kill."""


def stopped_after(step, monkeypatch):
    save = checkpoint.save

    def save_and_stop(out, now, *rest, **others):
        save(out, now, *rest, **others)
        if now == step:
            raise Stopped

    monkeypatch.setattr(checkpoint, "save", save_and_stop)


@pytest.mark.parametrize("script", ["sft", "rm", "dpo", "grpo", "ppo"])
def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(
    place, tmp_path, monkeypatch, script
):
    more = ["--save_every", 2, "--seed", 3]
    train(script, place, tmp_path / "whole", *more)
    with monkeypatch.context() as patched:
        stopped_after(2, patched)
        with pytest.raises(Stopped):
            train(script, place, tmp_path / "out", *more)
    names = {n for n in stored_names(checkpoint.latest(tmp_path / "out")) if n.startswith("model.")}
    assert names and all(lora.is_trained(name.removeprefix("model.")) for name in names)
    train(script, place, tmp_path / "out", *more, "--resume")
    for name in (SINGLE, f"adapter/{lora.WEIGHTS}"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_changed_base_or_other_adapters_are_not_resumed(place, tmp_path, monkeypatch):
    shutil.copytree(place / "toy", tmp_path / "toy")
    with monkeypatch.context() as patched:
        stopped_after(2, patched)
        with pytest.raises(Stopped):
            train("sft", place, tmp_path / "out", "--save_every", 2, model=tmp_path / "toy")
    for rank, words in ((3, "lora: 4 -> 3"), (0, "lora: 4 -> None")):
        with pytest.raises(InputError, match=words):
            train("sft", place, tmp_path / "out", "--resume", model=tmp_path / "toy", rank=rank)
    model = hf.load_model(tmp_path / "toy")
    model.model.norm.weight.data += 1e-3
    save_model(tmp_path / "toy", model.state_dict().items(), model.config)
    with pytest.raises(InputError, match="toy no longer has the weights that they belong to"):
        train("sft", place, tmp_path / "out", "--resume", model=tmp_path / "toy")
    # A base may move.
    train("sft", place, tmp_path / "out", "--resume", model=place / "toy")


def test_an_adapter_knows_its_base_and_its_rank(place, tmp_path):
    shutil.copytree(place / "toy", tmp_path / "toy")
    train("sft", place, tmp_path / "out", model=tmp_path / "toy")
    folder = tmp_path / "out" / "adapter"
    hf.load_model(folder)
    config = json.loads((folder / lora.CONFIG).read_text())
    (folder / lora.CONFIG).write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(InputError, match="says rank 2, but .* has 4: copy the folder again"):
        hf.load_model(folder)
    (folder / lora.CONFIG).write_text(json.dumps(config))
    model = hf.load_model(tmp_path / "toy")
    model.model.norm.weight.data += 1e-3
    save_model(tmp_path / "toy", model.state_dict().items(), model.config)
    with pytest.raises(InputError, match="toy, has other weights than it was trained beside"):
        hf.load_model(folder)


def test_a_run_without_adapters_leaves_none_of_the_run_that_it_replaces(place, tmp_path):
    train("sft", place, tmp_path)
    assert (tmp_path / "adapter").is_dir()
    train("sft", place, tmp_path, "--lora", 0, "--overwrite")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("flag", [["--lora_alpha", 8], ["--lora_targets", "q_proj"], ["--rslora"]])
def test_flags_of_adapters_need_a_rank(place, tmp_path, flag):
    with pytest.raises(InputError, match=f"{flag[0]} is about adapters: give their rank too"):
        train("sft", place, tmp_path, *flag, rank=0)
