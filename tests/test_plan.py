"""The plan beside measurements: the profiler's memory events of real steps of real scripts, shards
of a 70B model on the meta device, and the peaks of one H200. CPUs have torch's allocator too."""

import contextlib
import io
import json
import os
import runpy
import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import forked
import numpy as np
import plan_worker
import pytest
import torch
from inprocess import run_here
from scripts import ENVIRONMENT, ROOT, SCRIPTS, parser_of
from small import ARCHITECTURES, small_config
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from bench.plan import SHAPES
from nanopost import InputError, dist, divergence, footprint, lora, packing, plan
from nanopost.batch import Example, batch_of
from nanopost.config import Config
from nanopost.model import ActorCritic, CausalLM, ScalarModel
from nanopost.save import save_model
from nanopost.tokenizer import Tokenizer
from runs import toy

REWARD = """
import zlib

def uneven(completions, **columns):
    return [float(zlib.crc32(repr(c).encode()) % 997) for c in completions]
"""
LLAMA_70B = SHAPES["70B"]
QWEN_1_5B = {
    **SHAPES["7B"],
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def write_config(folder, hf_config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    return folder


def planned(model, script, *flags) -> Namespace:
    return plan.parsed(["--model", str(model), "--script", script, *map(str, flags)])


PLAIN = {**plan_worker.SIZES, "vocab_size": 4096}
HYBRID = {
    **ARCHITECTURES["qwen3_5_text"],
    "model_type": "qwen3_5_text",
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
TWO = {**HYBRID, "num_hidden_layers": 2, "layer_types": HYBRID["layer_types"][2:]}
EXPERTS = {
    **ARCHITECTURES["qwen3_moe"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
}
GEMMA = {**ARCHITECTURES["gemma3_text"], "model_type": "gemma3_text", "sliding_window": 48}


def total(parts) -> float:
    return sum(parts.values())


# -------------------------------------------------------------------------- scripts, in one process
def write_inputs(folder, prompt: int, answer: int, **sizes):
    """A model, and rows of so many tokens: a byte is a token."""
    more = {"hidden_act": "silu", "rope_theta": 1e4, "eos_token_id": 1, "pad_token_id": 0}
    config = Config.of({**plan_worker.SIZES, **more, "initializer_range": 0.02, **sizes})
    weights = CausalLM(config).init_weights(0).state_dict().items()
    save_model(folder / "model", weights, config, toy.tokenizer_files())
    user = [{"role": "user", "content": "a" * (prompt - 2)}]
    b, c = ([{"role": "assistant", "content": letter * (answer - 1)}] for letter in "bc")
    rows = {
        "chats": {"messages": user + b},
        "pairs": {"prompt": user, "chosen": b, "rejected": c},
        "prompts": {"prompt": user},
    }
    for name, row in rows.items():
        # They begin differently: they share nothing.
        lines = [json.dumps(row).replace("a" * 9, f"{i:02}aaaaaaa") for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "reward.py").write_text(REWARD)


DATA = {"sft": "chats", "rm": "pairs", "dpo": "pairs", "grpo": "prompts", "ppo": "prompts"}
DATA |= {"distill": "prompts"}
WIDER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3}  # a teacher
PAIRS = {"rows": 8, "tokens": 1024}
OF_PAIRS = {"prompt": 64, "trained": 2 / 3}
SAMPLED = {"prompts": 4, "group": 4, "minibatches": 1, "tokens": 352, "max_new_tokens": 16}
DISTILLED = {"prompts": 32, "minibatches": 1, "tokens": 512, "max_new_tokens": 16}
# name: script, sizes of the model, tokens of prompt and of answer, flags, flags of the plan alone
RUNS = {
    "sft, tied, qk-norm": (
        "sft",
        {"vocab_size": 8192, "tie_word_embeddings": True, "model_type": "qwen3"},
        (64, 64),
        {"rows": 16, "tokens": 1024},
        {},
    ),
    "sft, a large untied head, no grouped queries": (
        "sft",
        {"vocab_size": 16384, "num_key_value_heads": 8, "num_hidden_layers": 2},
        (64, 64),
        {"rows": 8, "tokens": 512},
        {},
    ),
    "sft, recomputed": (
        "sft",
        {"num_hidden_layers": 8},
        (64, 64),
        {"rows": 16, "tokens": 1024, "checkpointing": "full"},
        {},
    ),
    "sft, linear attention, gated attention": (
        "sft",
        TWO,
        (64, 64),
        {"rows": 16, "tokens": 1024},
        {},
    ),
    "sft, windows, four norms": ("sft", GEMMA, (64, 64), {"rows": 16, "tokens": 1024}, {}),
    "sft, experts": ("sft", EXPERTS, (64, 64), {"rows": 16, "tokens": 1024}, {}),
    "grpo, windows over what is shared": ("grpo", GEMMA, (112, 1), SAMPLED, {}),
    "grpo, linear attention, bf16": ("grpo", TWO, (112, 1), {**SAMPLED, "dtype": "bf16"}, {}),
    "sft, bf16": ("sft", {}, (64, 64), {"rows": 16, "tokens": 1024, "dtype": "bf16"}, {}),
    "rm": ("rm", {}, (64, 64), PAIRS, {"prompt": 64}),
    "dpo, a frozen reference": ("dpo", {}, (64, 64), PAIRS, OF_PAIRS),
    "dpo, adapters, one model": ("dpo", {}, (64, 64), {**PAIRS, "lora": 16}, OF_PAIRS),
    "sft, adapters beside NF4, bf16": (
        "sft",
        {},
        (64, 64),
        {"rows": 16, "tokens": 1024, "lora": 16, "quantize": "nf4", "dtype": "bf16"},
        {},
    ),
    "sft, fixed point": (
        "sft",
        {"vocab_size": 8192, "num_hidden_layers": 2},
        (64, 64),
        {"rows": 2, "tokens": 128, "reproducible": True},
        {},
    ),
    "grpo, a frozen reference": ("grpo", {}, (112, 1), {**SAMPLED, "beta": 0.1}, {}),
    "grpo, bf16, weights of the engine": ("grpo", {}, (112, 1), {**SAMPLED, "dtype": "bf16"}, {}),
    "grpo, the engine's cache": (
        "grpo",
        {"vocab_size": 512, "num_key_value_heads": 8},
        (252, 1),
        {**SAMPLED, "group": 6, "tokens": 256, "max_new_tokens": 4},
        {},
    ),
    "ppo, a value model": ("ppo", {}, (112, 1), {**SAMPLED, "ppo_epochs": 1}, {}),
    "distill, a large head": (
        "distill",
        {"vocab_size": 8192, "num_hidden_layers": 1},
        (16, 1),
        {**DISTILLED, "beta": 0.3},
        {},
    ),
    "distill, bf16": (
        "distill",
        {"num_hidden_layers": 2},
        (16, 1),
        {**DISTILLED, "tokens": 384, "max_new_tokens": 8, "dtype": "bf16"},
        {},
    ),
    "ppo, a value head": (
        "ppo",
        {},
        (112, 1),
        {**SAMPLED, "ppo_epochs": 1, "value_model": "head"},
        {},
    ),
}


def words(flags) -> list[str]:
    found = []
    for name, value in flags.items():
        found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


LONG = (
    "grpo, windows over what is shared",
    "grpo, linear attention, bf16",
    "sft, windows, four norms",
    "sft, recomputed",
    "distill, bf16",
    "ppo, a value model",
    "sft, adapters beside NF4, bf16",
)


def in_turn(names):
    return [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in names]


@pytest.mark.parametrize("name", in_turn(RUNS))
def test_a_script_peaks_where_the_plan_says(name, tmp_path):
    script, sizes, (prompt, answer), flags, of_plan = RUNS[name]
    of_plan = dict(of_plan)
    write_inputs(tmp_path, prompt, answer, **sizes)
    run = {"model": tmp_path / "model", "data": tmp_path / f"{DATA[script]}.jsonl"}
    run |= {"out": tmp_path / "out", "device": "cpu", "steps": 2, "holdout": 1}
    run |= {"save_every": 0, "eval_every": 0, **flags}
    if script == "sft":
        run["train_on"] = "all"
    if script in ("grpo", "ppo"):
        run["reward"] = f"{tmp_path}/reward.py:uneven"
    if script == "distill":
        write_inputs(tmp_path / "other", prompt, answer, **{**sizes, **WIDER})
        run["teacher"] = of_plan["teacher"] = tmp_path / "other" / "model"

    def train():
        with contextlib.redirect_stdout(io.StringIO()):
            run_here(f"train_{script}.py", *words(run))

    measured = plan_worker.peak(plan_worker.profiled(train))
    length = prompt if DATA[script] == "prompts" else prompt + answer
    args = planned(
        tmp_path / "model", script, "--gpu", "cpu", "--length", length, *words({**flags, **of_plan})
    )
    print(f"{name}: measured {measured / 1e6:.2f} MB, planned {plan.peak(args) / 1e6:.2f}")
    assert plan.peak(args) == pytest.approx(measured, rel=0.05)
    if "cache" in name:
        assert total(plan.memory(args)["rollout"]) == plan.peak(args)


DIVERGENCES = {
    "--beta 1": footprint.KL,
    "--beta 0.3": footprint.JENSEN_SHANNON,
    "--beta 0.3 --teacher_top_k 8 --lora 4": footprint.LIKELIEST,
}


@pytest.mark.parametrize("flags", DIVERGENCES)
def test_a_divergence_takes_as_many_buffers_as_the_plan_says(flags, tmp_path, monkeypatch):
    """Two chunks, each of them far larger than all else."""
    rows, vocabulary, width = 32, 4096, 8
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", {"cpu": rows * vocabulary})
    folder = write_config(tmp_path / "model", {**PLAIN, "hidden_size": width})
    given = ["--gpu", "cpu", "--length", 1, "--max_new_tokens", 2 * rows, "--prompts", 1]
    args = planned(folder, "distill", *given, *flags.split())
    hidden_MD, teacher_MD = torch.randn(2, 2 * rows, width)
    weight_VD, teacher_VD = torch.randn(2, vocabulary, width)
    hidden_MD.requires_grad_()
    weight_VD.requires_grad_(not args.lora)
    target_M, found = torch.zeros(2 * rows, dtype=torch.long), []
    given = hidden_MD, weight_VD, target_M, 0.8, teacher_MD, teacher_VD

    def forward():
        found.extend(divergence.from_teacher(*given, args.beta, args.teacher_top_k))

    peaks = [plan_worker.peak(plan_worker.profiled(forward))]
    peaks.append(plan_worker.peak(plan_worker.profiled(lambda: found[2].sum().backward())))
    buffer = 4 * rows * vocabulary
    assert [round(peak / buffer) for peak in peaks] == [*DIVERGENCES[flags]]
    _, *planned_peaks = footprint.divergence_bytes(args, args.config)
    head = 0 if args.lora else weight_VD.nbytes  # in flight, elsewhere in the plan
    assert planned_peaks[0] == pytest.approx(peaks[0], rel=0.02)
    assert planned_peaks[1] + head == pytest.approx(peaks[1], rel=0.02)


def test_on_gpus_the_head_of_a_teacher_is_held_whole(tmp_path):
    folder = write_config(tmp_path / "model", PLAIN)
    large = write_config(tmp_path / "teacher", {**PLAIN, "vocab_size": 2**17, "hidden_size": 1024})
    flags = "--gpus", 8, "--gpu", "h100", "--length", 16, "--teacher"
    args = planned(folder, "distill", *flags, large)
    for parts in footprint.memory(args).values():
        assert parts["teacher's head"] == 2 * 2**17 * 1024


# ------------------------------------------------------------------------------------------- blocks
BLOCKS_OF = []
for name in ARCHITECTURES:
    for layer in range(small_config(name).layers):
        # With adapters nothing asks for the gradient of what the first block reads.
        BLOCKS_OF += [(name, layer, rank) for rank in (0, 4) if layer or not rank]


@pytest.mark.parametrize("name, layer, rank", BLOCKS_OF)
def test_a_block_keeps_for_its_backward_pass_what_the_plan_says(name, layer, rank, tmp_path):
    """rank: of adapters. Two documents of two chunks each."""
    config = small_config(name, **{**WIDE, "sliding_window": 48})
    model = CausalLM(config).init_weights(0)
    if rank:
        lora.apply(model, rank).to_empty(device="cpu")
        for p in model.parameters():
            p.data.fill_(0.01)
    ids, mask = np.arange(128) % 61, np.ones(128, bool)
    batch = batch_of([Example(ids, mask), Example((ids + 1) % 61, mask)])
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x

    forward = model.model.layers[layer].forward

    def watched(*inputs):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            return forward(*inputs)

    model.model.layers[layer].forward = watched
    outputs = model(batch)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert outputs[0].requires_grad
    folder = write_config(tmp_path / "model", config.hf)
    flags = ["--gpu", "cpu", "--rows", 2, "--length", 128, "--tokens", 256, "--lora", rank]
    expected = footprint.block_activations(
        planned(folder, "sft", *flags), config, config.blocks[layer]
    )
    assert expected == pytest.approx(measured, rel=0.02)


# ------------------------------------------------------------------------------------------- FSDP2
@pytest.fixture
def fake():
    """A process group of this process that stands for many: collectives do nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def of_setting(folder, ranks, dtype, rows, length, how=None, **sizes):
    """The plan's sum for what plan_worker.measured measures."""
    write_config(folder, plan_worker.small_config(**{**plan_worker.SIZES, **sizes}).hf)
    flags = {"gpu": "cpu", "gpus": ranks, "tokens": rows * length, "length": length}
    flags |= {"rows": 2 * rows * ranks, "dtype": {"float32": "fp32", "bfloat16": "bf16"}[dtype]}
    return plan.peak(planned(folder, "sft", *words({**flags, **(how or {})})))


BLOCKS = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 1024}
FULL = {"checkpointing": "full"}
BF16 = {"torch_dtype": "bfloat16"}
SHARDED = {
    "activations": {"rows": 2, "length": 256},
    "recomputed activations": {"rows": 4, "length": 256, "how": FULL},
    "kept products": {"rows": 4, "length": 256, "how": {"checkpointing": "selective"}},
    "weights of blocks": {"rows": 1, "length": 64, "how": FULL, **BLOCKS},
    "a block's gradients": {"rows": 1, "length": 256, **BLOCKS},
    "whole gradients": {"rows": 1, "length": 256, "how": {"reduce": "step"}},
    "replicas": {"rows": 1, "length": 256, "how": {"replicas": 32}},
    "fixed point": {"rows": 1, "length": 64, "vocab_size": 8192, "how": {"reproducible": True}},
    "an untied head": {"rows": 1, "length": 256, "vocab_size": 16384},
    "a tied head": {
        "rows": 1,
        "length": 64,
        "vocab_size": 16384,
        "tie_word_embeddings": True,
        "num_hidden_layers": 2,
    },
    "adapters": {"rows": 2, "length": 256, "how": {"lora": 16}, **BF16},
    "recomputed linear attention": {"rows": 1, "length": 128, "how": FULL, **TWO},
    "kept products of linear attention": {
        "rows": 1,
        "length": 256,
        "how": {"checkpointing": "selective"},
        **TWO,
    },
    "fewer experts than ranks": {
        "rows": 2,
        "length": 256,
        "how": FULL,
        **{**EXPERTS, "num_experts": 16, "num_experts_per_tok": 8},
    },
    "gradients of experts": {"rows": 1, "length": 64, "how": FULL, **EXPERTS, "num_experts": 64},
    "NF4": {
        "rows": 1,
        "length": 64,
        "how": {"lora": 4, "quantize": "nf4"},
        **{**BLOCKS, "num_hidden_layers": 6},
        **BF16,
    },
}
OF_64 = [(name, "bfloat16") for name in SHARDED]
OF_64 += [(name, "float32") for name in ("activations", "a tied head")]
LONG_OF_64 = ("recomputed activations", "an untied head", "adapters")


@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(*case, marks=pytest.mark.long if case[0] in LONG_OF_64 else ())
        for case in OF_64
    ],
)
def test_a_rank_of_64_peaks_where_the_plan_says(name, dtype, fake, tmp_path):
    world = dist.World(0, 64, torch.device("cpu"), getattr(torch, dtype))
    measured = plan_worker.measured(world, **SHARDED[name])
    expected = of_setting(tmp_path / "model", 64, dtype, **SHARDED[name])
    print(f"{name}, {dtype}: measured {measured / 1e6:.2f} MB, planned {expected / 1e6:.2f}")
    assert expected == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
def test_two_ranks_over_gloo_peak_where_the_plan_says(tmp_path):
    settings = [("float32", SHARDED["activations"]), ("bfloat16", SHARDED["an untied head"])]
    worker = [plan_worker.__file__, tmp_path / "found", json.dumps(settings)]
    done = forked.run(worker, {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, ranks=2)
    assert done.returncode == 0, done.stderr
    for (dtype, setting), measured in zip(settings, json.loads((tmp_path / "found").read_text())):
        expected = of_setting(tmp_path / "model", 2, dtype, **setting)
        print(f"{dtype}: measured {measured / 1e6:.2f} MB, planned {expected / 1e6:.2f}")
        assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("ranks", [8, 48, 64])
def test_shards_of_70b_are_those_of_fsdp2_to_the_byte(ranks, tmp_path):
    """48 does not divide what it shards. Nothing is allocated: 70B are 282 GB."""
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        config = Config.of(LLAMA_70B)
        with torch.device("meta"):
            model = CausalLM(config)
        model = dist.shard(model, dist.World(0, ranks, torch.device("cpu"), torch.bfloat16))
        shards = [p.to_local() for p in model.parameters()]
        assert {p.device.type for p in shards} == {"meta"}
        size = sum(4 * p.numel() for p in shards)
    finally:
        torch.distributed.destroy_process_group()
    folder = write_config(tmp_path / "model", LLAMA_70B)
    found = plan.memory(planned(folder, "sft", "--gpus", ranks))["update"]
    assert found["weights"] == size and found["gradients"] == size and found["moments"] == 2 * size


def test_numbers_of_parameters_are_those_of_the_models(tmp_path):
    folder = write_config(tmp_path / "model", LLAMA_70B)
    with torch.device("meta"):
        config = Config.of(LLAMA_70B)
        policy, both = CausalLM(config), ActorCritic(config, config.with_scalar_head(None))

    def size(model):
        return sum(p.numel() for p in model.parameters())

    assert plan.numbers(planned(folder, "grpo").units).trained == size(policy) == 70_553_706_496
    assert plan.numbers(planned(folder, "ppo").units).trained == size(both)
    assert plan.policy_size(planned(folder, "ppo")) == size(policy)
    linear = [p for name, p in policy.named_parameters() if ".layers." in name and p.ndim == 2]
    found = plan.numbers(planned(folder, "sft", "--lora", 16).units, rank=16)
    assert found.linear == sum(p.numel() for p in linear)
    assert found.frozen == size(policy) - found.linear
    lora.apply(policy, 16)
    trained = [p.numel() for p in policy.parameters() if p.requires_grad]
    assert found.trained == sum(trained) == 207_093_760


@pytest.mark.parametrize("architecture", [HYBRID, GEMMA])
def test_numbers_of_blocks_that_differ_are_those_of_the_model(architecture, tmp_path):
    config = plan_worker.small_config(**{**plan_worker.SIZES, **architecture})
    folder = write_config(tmp_path / "model", config.hf)
    for script in ("grpo", "ppo"):
        with torch.device("meta"):
            policy = CausalLM(config)
            value = ScalarModel(config.with_scalar_head(None))
        size = sum(p.numel() for p in policy.parameters())
        if script == "ppo":
            size += sum(p.numel() for p in value.parameters())
        assert plan.numbers(planned(folder, script).units).trained == size
    found = plan.numbers(planned(folder, "sft", "--lora", 4).units, rank=4)
    lora.apply(policy, 4)
    trained = [p.numel() for p in policy.parameters() if p.requires_grad]
    assert found.trained == sum(trained)
    assert found.frozen + found.linear == sum(p.numel() for p in policy.parameters()) - sum(trained)
    adapted = lora.layers(policy).values()
    assert found.linear == sum(layer.weight.numel() for layer in adapted)


def test_a_row_of_the_cache_is_as_large_as_the_engine_makes_it(tmp_path):
    config = plan_worker.small_config(**{**plan_worker.SIZES, **HYBRID})
    folder = write_config(tmp_path / "model", config.hf)
    args = planned(folder, "grpo", "--gpu", "cpu")
    cache = CausalLM(config).cache(3, 20)
    held = sum(x.nbytes for layer in cache.held for x in layer)
    assert 3 * footprint.cache_bytes(args, 20) == held


# ------------------------------------------------------------------------------------------- a GPU
def test_two_runs_on_an_h200_peak_where_the_plan_says(tmp_path):
    """bench/train_step.py's, of whole sequences, so as if each completion had a prompt of its own.
    Their torch, 2.11, kept keys and values for every query head."""
    jobs = json.loads((ROOT / "bench/results/train_step.json").read_text())["jobs"]
    folder = write_config(tmp_path / "model", QWEN_1_5B)
    sft = planned(folder, "sft", "--gpu", "h200", "--rows", 64, "--length", 1024)
    shapes = ["--prompts", 256, "--group", 1, "--length", 190, "--max_new_tokens", 512]
    grpo = planned(folder, "grpo", "--gpu", "h200", *shapes)
    for args, name in ((sft, "sft"), (grpo, "grpo")):
        assert 8000 < plan.tokens_of_micro_batch(args) <= 8192
        repeated = 2 * 2 * (12 - 2) * 128 * 28 * plan.tokens_of_micro_batch(args)
        expected = plan.peak(args) - footprint.RESERVED + repeated
        measured = jobs[name]["peak_mb"] * 2**20
        print(f"{name}: measured {measured / 1e9:.2f} GB, planned {expected / 1e9:.2f}")
        assert expected == pytest.approx(measured, rel=0.02)


# -------------------------------------------------------------------------------------------- time
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("architecture", [{"num_hidden_layers": 2}, HYBRID, GEMMA])
def test_operations_are_those_that_torch_counts(checkpointing, architecture, tmp_path):
    """Of products with weights: torch counts no attention on a CPU."""
    sizes = {**plan_worker.SIZES, "vocab_size": 16384, **architecture}
    config = plan_worker.small_config(**sizes)
    model = CausalLM(config).init_weights(0)
    model.model.checkpointing = checkpointing
    ids, mask = torch.arange(128), torch.ones(128, dtype=torch.bool)
    batch = batch_of([Example(ids.roll(row), mask) for row in range(4)])
    with FlopCounterMode(display=False) as counter:
        (-model(batch)[0].sum()).backward()
    counts = counter.get_flop_counts()["Global"]
    counted = counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0)
    folder = write_config(tmp_path / "model", config.hf)
    flags = ["--gpu", "cpu", "--rows", 4, "--length", 128, "--tokens", 512]
    flags += ["--trained", 127 / 128]
    args = planned(folder, "sft", *flags, "--checkpointing", checkpointing)
    attention = plan.forward_flops(args, config, 128).mixing
    attention *= 512 * (3 if checkpointing == "none" else 4)
    assert plan.update_flops(args) - attention == pytest.approx(counted, rel=1e-9)


def test_operations_of_a_recurrence_are_those_that_torch_counts(tmp_path):
    """It counts neither a triangular system nor the convolution."""
    config = plan_worker.small_config(**{**plan_worker.SIZES, **HYBRID})
    batch = batch_of([Example(torch.arange(128), torch.ones(128, dtype=torch.bool))])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        CausalLM(config).init_weights(0)(batch)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    s = config.delta
    convolution = 2 * s.kernel * (2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim)
    system = 64 * s.value_heads * (s.key_dim + s.value_dim)
    layers = sum(layer.kind == "linear_attention" for layer in config.blocks)
    planned = plan.recurrence_flops(config, 64) - convolution - system
    assert counted == layers * 128 * planned


# script: flags, and of a row or prompt: how many sequences, tokens they share, and their own
SHARING = {
    "sft": (["--length", 20], 1, 0, 20),
    "rm": (["--length", 20, "--prompt", 12], 2, 12, 8),
    "dpo": (["--length", 20, "--prompt", 0], 2, 0, 20),
    "kto": (["--length", 20, "--prompt", 19], 2, 19, 1),
    "online_dpo": (["--length", 12, "--max_new_tokens", 8, "--group", 4], 2, 12, 8),
    "grpo": (["--length", 12, "--max_new_tokens", 8, "--group", 4], 4, 12, 8),
    "ppo": (["--length", 12, "--max_new_tokens", 8, "--group", 1], 1, 12, 8),
    "distill": (["--length", 12, "--max_new_tokens", 8], 1, 12, 8),
}


@pytest.mark.parametrize("script", SHARING)
def test_tokens_and_keys_are_those_of_the_different_beginnings(script, tmp_path):
    """A token is computed for each different beginning of sequences, and sees all of it."""
    flags, count, prompt, new = SHARING[script]
    sequences = [(*range(prompt), *((i, j) for j in range(new))) for i in range(count)]
    computed = {s[:end] for s in sequences for end in range(1, prompt + new + 1)}
    folder = write_config(tmp_path / "model", plan_worker.small_config(**PLAIN).hf)
    of_step = "--prompts" if script in footprint.SAMPLE else "--rows"
    minibatches = ["--minibatches", 1] if script in plan.ONLY["minibatches"] else []
    args = planned(folder, script, *flags, *minibatches, of_step, 6)
    assert plan.tokens_of_step(args) == 6 * len(computed)
    assert footprint.whole_tokens(args) == sum(map(len, sequences)) / len(computed)
    # The plan takes a token to see half of itself.
    keys = sum(len(beginning) - 0.5 for beginning in computed)
    assert plan.mean_length(args) == pytest.approx(2 * keys / len(computed), rel=1e-12)
    if script in footprint.PAIRS:  # the smallest micro-batch has one
        args = planned(folder, script, *flags, of_step, 1, "--gpus", 8)
        assert plan.tokens_of_micro_batch(args) == len(computed)


@pytest.mark.parametrize("length, window", [(9, None), (9, 9), (9, 12), (9, 4), (200, 1)])
def test_keys_that_a_window_leaves_are_counted(length, window):
    """A token sees half of itself."""
    keys = sum(min(i + 0.5, window or length) for i in range(length))
    assert plan.mean_keys(length, window) == pytest.approx(keys / length, rel=1e-12)


@pytest.mark.parametrize("more", [{}, EXPERTS], ids=["dense", "fewer experts than ranks"])
def test_bytes_that_ranks_exchange_are_those_of_fsdp2(more, fake, tmp_path, monkeypatch):
    sent = {"gather": 0, "reduce": 0}

    def count(name, kind):
        original = getattr(torch.distributed, name)

        def counted(*given, **named):
            tensors = [x for x in [*given, *named.values()] if isinstance(x, torch.Tensor)]
            sent[kind] += max(x.nbytes for x in tensors)
            return original(*given, **named)

        monkeypatch.setattr(torch.distributed, name, counted)

    names = {"all_gather_single": "gather", "reduce_scatter_single": "reduce"}
    if not hasattr(torch.distributed, "all_gather_single"):  # torch 2.11
        names = {"all_gather_into_tensor": "gather", "reduce_scatter_tensor": "reduce"}
    for name, kind in names.items():
        count(name, kind)
    sizes = {"rows": 2, "length": 64, "vocab_size": 4096, **more}
    world = dist.World(0, 64, torch.device("cpu"), torch.bfloat16)
    plan_worker.measured(world, **sizes)  # three micro-batches
    folder = write_config(tmp_path / "model", plan_worker.small_config(**{**PLAIN, **more}).hf)
    flags = ["--gpus", 64, "--rows", 128, "--length", 64, "--tokens", 128, "--network", 1]
    args = planned(folder, "sft", *flags)
    assert plan.micro_batches(args) == 1
    each = (sent["gather"] + sent["reduce"]) / 3
    seconds = each * 63 / 64 / (1e9 * plan.COLLECTIVES)
    assert plan.collective_seconds(args) == pytest.approx(seconds, rel=1e-3)


def test_rows_that_fsdp2_adds_are_gathered_in_every_pass(tmp_path):
    """Of a teacher, a reference and a value model, with fewer experts than ranks."""
    config = plan_worker.small_config(**{**PLAIN, **EXPERTS})
    folder = write_config(tmp_path / "model", config.hf)
    with torch.device("meta"):
        policy, both = CausalLM(config), ActorCritic(config, config.with_scalar_head(None))

    def gathered(module):
        return sum(64 * -(-len(p) // 64) * p[0].numel() for p in module.parameters())

    def seconds(script, *more):
        args = planned(folder, script, "--gpus", 64, "--network", 1, *more)
        return plan.collective_seconds(args) / plan.micro_batches(args)

    block = max(gathered(block) for block in policy.model.layers)
    root = gathered(policy) - sum(gathered(block) for block in policy.model.layers)
    teacher = planned(folder, "distill", "--gpus", 64, "--teacher", folder)
    assert footprint.teacher_pass(teacher)[1] == 2 * (root + 2 * block)
    one_pass = 2 * gathered(policy) * 63 / 64 / (1e9 * plan.COLLECTIVES)
    served = seconds("distill", "--teacher", "http://localhost:1")
    assert seconds("distill", "--teacher", folder) - served == pytest.approx(one_pass)
    assert seconds("grpo", "--beta", 0.1) - seconds("grpo") == pytest.approx(one_pass)

    decoders = both.policy.model, both.value.model
    root = gathered(both) - sum(gathered(x) for decoder in decoders for x in decoder.layers)
    found = footprint.update(planned(folder, "ppo", "--gpus", 64))  # the value model's pass is it
    assert found["gathered weights"] == 2 * (root + 2 * block)
    assert 4 * block < found["gradients in flight"] < 4.1 * block


def test_more_of_what_costs_time_takes_longer(tmp_path):
    folder = write_config(tmp_path / "model", LLAMA_70B)
    base = ["--gpus", 64, "--tokens", 8192, "--checkpointing", "full", "--server_gpus", 16]

    def seconds(*more):
        return plan.seconds(planned(folder, "grpo", *base, *more))

    before = seconds()
    assert before.keys() >= {"update", "rollout", "sync", "optimizer"}
    assert seconds("--max_new_tokens", 1024)["rollout"] > 1.9 * before["rollout"]
    assert seconds("--server_gpus", 32)["rollout"] < before["rollout"]
    assert seconds("--lora", 16)["update"] < 0.8 * before["update"]
    assert seconds("--checkpointing", "none")["update"] < 0.85 * before["update"]
    assert seconds("--beta", 0.1)["update"] > 1.2 * before["update"]
    assert seconds("--network", 5)["waiting for collectives"] > before["waiting for collectives"]
    assert seconds("--offload")["optimizer"] > before["optimizer"]


# -------------------------------------------------------------------------------------------- flags
def test_what_makes_it_fit_fits_and_the_cheapest_comes_first(tmp_path):
    folder = write_config(tmp_path / "model", LLAMA_70B)
    args = planned(folder, "grpo", "--gpus", 64, "--tokens", 8192)
    assert plan.peak(args) > args.machine.memory
    ways = plan.fitting(args)
    assert ways
    for change, other in ways:
        flags = plan.words(change).split()
        again = planned(folder, "grpo", "--gpus", 64, "--tokens", 8192, *flags)
        assert plan.peak(again) == plan.peak(other) <= args.machine.memory
        for flag in change:  # none of them is idle
            fewer = {name: value for name, value in change.items() if name != flag}
            without = Namespace(**{**vars(args), **fewer})
            assert plan.peak(without) > args.machine.memory or plan.cost(without) > plan.cost(other)
    whole = [plan.cost(other) for change, other in ways if "lora" not in change]
    assert whole == sorted(whole) and ["lora" in change for change, _ in ways][: len(whole)] == [
        False
    ] * len(whole)


def test_each_way_to_less_memory_takes_less(tmp_path):
    folder = write_config(tmp_path / "model", SHAPES["7B"])

    def peak(*flags, script="grpo"):
        return plan.peak(planned(folder, script, "--gpus", 8, "--tokens", 8192, *flags))

    before = peak()
    order = [before, peak("--checkpointing", "selective"), peak("--checkpointing", "full")]
    assert order == sorted(order, reverse=True) and len({*order}) == 3
    assert peak("--tokens", 4096) < before and peak("--lora", 16) < before
    assert peak("--lora", 16, "--quantize", "nf4") < peak("--lora", 16)
    assert peak("--server_gpus", 8) < before and peak("--offload") < before
    assert peak("--replicas", 2) > before and peak("--reduce", "step") > before
    assert peak("--beta", 0.1) > before
    assert peak("--beta", 0.1, "--lora", 16) == peak("--lora", 16)  # the same model
    assert peak(script="dpo") > peak("--reference", "precomputed", script="dpo")


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_have_the_scripts_defaults(script, tmp_path):
    folder = write_config(tmp_path / "model", SHAPES["0.5B"])
    name = script.removeprefix("train_").removesuffix(".py")
    args, theirs = vars(planned(folder, name)), parser_of(script)
    shared = {action.dest: action.default for action in theirs._actions if action.dest in args}
    if name in ("dpo", "kto", "online_dpo", "distill"):
        del shared["beta"]  # of another meaning
    for flag, default in shared.items():
        if flag != "model":
            assert args[flag] == default, flag
    assert {"tokens", "kernels", "dtype"} <= shared.keys()
    for flag, scripts in plan.ONLY.items():
        if flag not in ("server_gpus", "beta", "prompt"):
            assert (flag in shared) == (name in scripts), flag


BAD = {
    "--gpus 6 --replicas 4": "--gpus 6 does not divide into 4 replicas: change --replicas.",
    "--reproducible --reduce step": "--reproducible takes neither --reduce step nor --replicas:",
    "--quantize nf4": "--quantize nf4 is of weights that --lora freezes: add --lora RANK.",
    "--script grpo --teacher there": "--script grpo has no --teacher: leave it out.",
    "--script distill --group 2": "--script distill has no --group: leave it out.",
    "--script sft --server_gpus 8": "--script sft has no --server_gpus: leave it out.",
    "--script dpo --group 8": "--script dpo has no --group: leave it out.",
    "--script grpo --rows 8": "--script grpo has no --rows: leave it out.",
    "--server_gpus 8 --engine colocate": "--server_gpus and --engine colocate are two",
    "--engine colocate --max_staleness 1": "--engine colocate sleeps while the model trains: drop",
    "--tokens 512": "--tokens 512 is less than a sequence of 1024 tokens: raise it, or lower",
    "--script dpo --tokens 512": "--tokens 512 is less than a pair of 1024 tokens: raise it, or",
    "--script dpo --prompt 400 --tokens 1023": "--tokens 1023 is less than a pair of 1024 tokens:",
    "--script online_dpo --tokens 2047": "--tokens 2047 is less than a pair of 2048 tokens: raise",
    "--script kto --prompt 512": "--prompt 512 is what the sides of a pair share of --length 512:",
    "--length 40000": "sequences of 40512 tokens exceed the model's 32768 positions: lower",
    "--engine_tokens 100": "sequences of 1024 tokens exceed --engine_tokens 100: raise it.",
}


@pytest.mark.parametrize("flags", BAD)
def test_a_plan_that_no_script_could_run_is_refused_in_a_sentence(flags, tmp_path):
    folder = write_config(tmp_path / "model", SHAPES["0.5B"])
    given = flags.split()
    script = given.pop(1) if given[0] == "--script" else "grpo"
    given = given[1:] if flags.startswith("--script") else given
    if "--tokens" not in given:
        given += ["--tokens", "65536"]
    with pytest.raises(InputError) as error:
        planned(folder, script, *given)
    assert str(error.value).startswith(BAD[flags])


@pytest.mark.parametrize("tokens", [47, 48])
def test_the_plan_refuses_the_tokens_that_the_scripts_refuse(tokens, tmp_path):
    """Pairs that share most of their tokens: the scripts ask for room for both sides, whole."""
    folder = write_config(tmp_path / "model", SHAPES["0.5B"])
    toy.write_model(tmp_path / "toy")
    tokenizer = Tokenizer.load(tmp_path / "toy")
    prompt = [{"role": "user", "content": "1"}]
    length = len(tokenizer.prompt_ids(prompt))
    new = 24 - length
    online = ["--length", length, "--max_new_tokens", new]
    for ask in (
        lambda: packing.pack([24 + 24], tokens),
        lambda: planned(folder, "dpo", "--length", 24, "--prompt", 20, "--tokens", tokens),
        lambda: tokenizer.with_prompts([[{"prompt": prompt}]], None, new, tokens, 512, sides=2),
        lambda: planned(folder, "online_dpo", *online, "--tokens", tokens),
    ):
        with pytest.raises(InputError) if tokens < 48 else contextlib.nullcontext():
            ask()


def test_the_command_prints_a_table_and_what_would_fit(tmp_path, monkeypatch, capsys):
    folder = write_config(tmp_path / "model", SHAPES["7B"])

    def run(*flags):
        words = ["--model", folder, *flags]
        monkeypatch.setattr(sys, "argv", ["nanopost.plan", *map(str, words)])
        runpy.run_path(plan.__file__, run_name="__main__")
        return capsys.readouterr().out

    printed = run("--script", "ppo", "--gpus", 8, "--beta", 0.05)
    for word in ("weights", "reference", "KV cache", "update", "rollout", "does not fit into 80"):
        assert word in printed
    assert "computed tokens per second" in printed  # the scripts count a shared prompt twice
    assert "--checkpointing full" in printed.split("what would make it fit")[1]
    with pytest.raises(SystemExit, match="^error: --quantize nf4 .* add --lora RANK.$"):
        run("--script", "sft", "--quantize", "nf4")


# ------------------------------------------------------------------------------------------ dry run
DRY = {
    "train_sft.py": "--data {chats}",
    "train_rm.py": "--data {pairs}",
    "train_dpo.py": "--data {pairs} --reference precomputed --offload",
    "train_kto.py": "--data {pairs} --lora 4 --quantize nf4",
    "train_online_dpo.py": "--data {prompts} --reward exact --max_new_tokens 8 --engine colocate",
    "train_grpo.py": "--data {prompts} --reward exact --max_new_tokens 8 --vllm http://nowhere:1 "
    "--beta 0.1 --record",
    "train_ppo.py": "--data {prompts} --reward model:{scorer} --max_new_tokens 8",
    "train_distill.py": "--data {prompts} --teacher {teacher} --max_new_tokens 8 --beta 0.5",
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Rows, and the toy's model and a reward model without weights."""
    place = tmp_path_factory.mktemp("bare")
    toy.write_model(place / "model")
    (place / "model" / "model.safetensors").unlink()
    shutil.copytree(place / "model", place / "teacher")
    shutil.copytree(place / "model", place / "scorer")
    config = json.loads((place / "model" / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1}
    (place / "scorer" / "config.json").write_text(json.dumps(config))
    prompts = toy.prompt_rows(held_out=False)[:300]
    said = [{"role": "assistant", "content": row["answer"]} for row in prompts]
    wrong = [{"role": "assistant", "content": row["answer"] + "7"} for row in prompts]
    chats = [{"messages": [*row["prompt"], answer]} for row, answer in zip(prompts, said)]
    pairs = [
        {"prompt": row["prompt"], "chosen": [right], "rejected": [other]}
        for row, right, other in zip(prompts, said, wrong)
    ]
    for name, rows in (("prompts", prompts), ("chats", chats), ("pairs", pairs)):
        toy.write_rows(place / f"{name}.jsonl", rows)
    return place


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_checks_everything_and_writes_nothing(script, bare, tmp_path, capsys):
    paths = {name: bare / f"{name}.jsonl" for name in ("prompts", "chats", "pairs")}
    models = {name: bare / name for name in ("scorer", "teacher")}
    flags = DRY[script].format(**models, **paths).split()
    flags += ["--model", bare / "model", "--device", "cpu", "--tokens", 640, "--cache", tmp_path]
    if "--reference" not in DRY[script]:
        flags = flags[:-2]
    with pytest.raises(SystemExit) as ended:
        run_here(script, *flags, "--dry_run", "--out", tmp_path / "out")
    assert ended.value.code == 0 and not [*tmp_path.iterdir()]
    printed = capsys.readouterr().out
    assert printed.endswith("dry run: nothing was trained and nothing written\n")
    command = printed.split("python -m nanopost.plan ")[1].splitlines()[0]
    assert "--gpus 8" in command
    args = plan.parsed([*shlex.split(command), "--gpu", "cpu", "--gpus", "1"])
    assert args.tokens == 640 and "train_" + args.script + ".py" == script
    assert "\n".join(plan.table(args)) in printed
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        run_here(script, *flags, "--out", tmp_path / "out")


def test_a_dry_run_plans_with_the_average_length_of_the_rows(bare, tmp_path, capsys):
    rows = [{"text": "1" * length} for length in (9, 10, 29)]
    toy.write_rows(tmp_path / "texts.jsonl", rows)
    tokenizer = Tokenizer.load(bare / "model")
    lengths = [len(tokenizer.example(row, "all")) for row in rows]
    average = round(sum(lengths) / 3)
    assert min(lengths) < average < max(lengths)
    flags = ["--model", bare / "model", "--data", tmp_path / "texts.jsonl", "--train_on", "all"]
    with pytest.raises(SystemExit):
        run_here("train_sft.py", *flags, "--holdout", 0, "--dry_run", "--device", "cpu")
    said = f"rows of {min(lengths)} to {max(lengths)} tokens, {average} on average"
    assert said in (printed := capsys.readouterr().out) and f"--length {average}" in printed


def test_a_dry_run_plans_with_what_pairs_share_on_average(bare, tmp_path, capsys):
    rows = []
    for length in (9, 30, 90):
        prompt = [{"role": "user", "content": "1" * length}]
        sides = ([{"role": "assistant", "content": text}] for text in ("23", "34"))
        rows.append({"prompt": prompt, **dict(zip(("chosen", "rejected"), sides))})
    toy.write_rows(tmp_path / "pairs.jsonl", rows)
    tokenizer, both = Tokenizer.load(bare / "model"), []
    for row in rows:
        sides = (tokenizer.pair(row)[k].ids.tolist() for k in (0, 1))
        both.append(len(os.path.commonprefix([*sides])))
    assert len({*both}) == 3
    flags = ["--model", bare / "model", "--data", tmp_path / "pairs.jsonl", "--holdout", 0]
    with pytest.raises(SystemExit):
        run_here("train_dpo.py", *flags, "--dry_run", "--device", "cpu")
    assert f"--prompt {sum(both) // 3} " in capsys.readouterr().out


def test_a_dry_run_of_sides_that_differ_in_their_last_token_alone_has_a_plan(bare, capsys, few):
    """4 and 5 tokens, of which 4 are shared: 4 on average, rounded."""
    pair = tuple(Example(range(size), [False] + [True] * (size - 1)) for size in (4, 5))
    world = dist.World(0, 1, torch.device("cpu"), torch.float32)
    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    with pytest.raises(SystemExit):
        plan.end_dry_run("rm", {"model": bare / "model", "device": "cpu"}, world, [pair])
    assert "--length 4 --prompt 3" in capsys.readouterr().out


def test_a_dry_run_names_the_first_mistake(bare, tmp_path):
    flags = ["--model", bare / "model", "--out", tmp_path, "--dry_run", "--device", "cpu"]
    with pytest.raises(InputError, match="chats.jsonl:1: the columns are messages; it needs"):
        run_here("train_dpo.py", *flags, "--data", bare / "chats.jsonl")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds files that no run of these scripts wrote"):
        run_here("train_sft.py", *flags, "--data", bare / "chats.jsonl")
