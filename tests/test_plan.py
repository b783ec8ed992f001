"""The plan beside measurements: the profiler's memory events of real steps of real scripts, shards
of a 70B model on the meta device, and the peaks of one H200. CPUs have torch's allocator too."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import plan_worker
import pytest
import torch
from inprocess import run_here
from scripts import ROOT, SCRIPTS, parser_of
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanopost import InputError, dist, hf, plan
from nanopost.model import ActorCritic, CausalLM, Config
from runs import toy

REWARD = """
import zlib

def uneven(completions, **columns):
    return [float(zlib.crc32(repr(c).encode()) % 997) for c in completions]
"""
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN_1_5B = {  # of bench/train_step.py
    **LLAMA_70B,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
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


def total(parts) -> float:
    return sum(parts.values())


# --------------------------------------------------------------------------- scripts, in one process
def write_inputs(folder, prompt: int, answer: int, **sizes):
    """A model, and rows of so many tokens: a byte is a token."""
    more = {"hidden_act": "silu", "rope_theta": 1e4, "eos_token_id": 1, "pad_token_id": 0}
    config = Config.of({**plan_worker.SIZES, **more, "initializer_range": 0.02, **sizes})
    weights = CausalLM(config).init_weights(0).state_dict().items()
    hf.save_model(folder / "model", weights, config, toy.tokenizer_files())
    user = [{"role": "user", "content": "a" * (prompt - 2)}]
    b, c = ([{"role": "assistant", "content": letter * (answer - 1)}] for letter in "bc")
    rows = {
        "chats": {"messages": user + b},
        "pairs": {"prompt": user, "chosen": b, "rejected": c},
        "prompts": {"prompt": user},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    (folder / "reward.py").write_text(REWARD)


DATA = {"sft": "chats", "rm": "pairs", "dpo": "pairs", "grpo": "prompts", "ppo": "prompts"}
PAIRS = {"rows": 8, "tokens": 1024}
SAMPLED = {"prompts": 4, "group": 4, "minibatches": 1, "tokens": 1024, "max_new_tokens": 16}
# name: script, sizes of the model, tokens of prompt and of answer, flags, flags of the plan alone
RUNS = {
    "sft, tied, qk-norm": (
        "sft",
        {
            "vocab_size": 8192,
            "tie_word_embeddings": True,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
        },
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
        {"rows": 16, "tokens": 1024, "checkpointing": True},
        {"checkpointing": "full"},
    ),
    "sft, bf16": ("sft", {}, (64, 64), {"rows": 16, "tokens": 1024, "dtype": "bf16"}, {}),
    "rm": ("rm", {}, (64, 64), PAIRS, {}),
    "dpo, a frozen reference": ("dpo", {}, (64, 64), PAIRS, {"trained": 0.5}),
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


@pytest.mark.parametrize("name", RUNS)
def test_a_script_peaks_where_the_plan_says(name, tmp_path):
    script, sizes, (prompt, answer), flags, of_plan = RUNS[name]
    write_inputs(tmp_path, prompt, answer, **sizes)
    run = {"model": tmp_path / "model", "data": tmp_path / f"{DATA[script]}.jsonl"}
    run |= {"out": tmp_path / "out", "device": "cpu", "steps": 2, "holdout": 1}
    run |= {"save_every": 0, "eval_every": 0, **flags}
    if script == "sft":
        run["train_on"] = "all"
    if DATA[script] == "prompts":
        run["reward"] = f"{tmp_path}/reward.py:uneven"

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


# ------------------------------------------------------------------------------------------- FSDP2
@pytest.fixture
def fake(request):
    """A process group of this process that stands for many: collectives do nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def of_setting(folder, ranks, dtype, rows, length, checkpointing=False, step=False, **sizes):
    """The plan's sum for what plan_worker.measured measures."""
    write_config(folder, plan_worker.small_config(**{**plan_worker.SIZES, **sizes}).hf)
    flags = {"gpu": "cpu", "gpus": ranks, "tokens": rows * length, "length": length}
    flags |= {"rows": 2 * rows * ranks, "dtype": {"float32": "fp32", "bfloat16": "bf16"}[dtype]}
    flags |= {"checkpointing": "full" if checkpointing else "none"}
    flags |= {"reduce": "step" if step else "micro_batch"}
    return plan.peak(planned(folder, "sft", *words(flags)))


BLOCKS = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 1024}
SHARDED = {
    "activations": {"rows": 2, "length": 256},
    "recomputed activations": {"rows": 4, "length": 256, "checkpointing": True},
    "weights of blocks": {"rows": 1, "length": 64, "checkpointing": True, **BLOCKS},
    "a block's gradients": {"rows": 1, "length": 256, **BLOCKS},
    "an untied head": {"rows": 1, "length": 256, "vocab_size": 16384},
    "a tied head": {
        "rows": 1,
        "length": 64,
        "vocab_size": 16384,
        "tie_word_embeddings": True,
        "num_hidden_layers": 2,
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHARDED)
def test_a_rank_of_64_peaks_where_the_plan_says(name, dtype, fake, tmp_path):
    world = dist.World(0, 64, torch.device("cpu"), getattr(torch, dtype))
    measured = plan_worker.measured(world, **SHARDED[name])
    expected = of_setting(tmp_path / "model", 64, dtype, **SHARDED[name])
    print(f"{name}, {dtype}: measured {measured / 1e6:.2f} MB, planned {expected / 1e6:.2f}")
    assert expected == pytest.approx(measured, rel=0.05)


def test_gradients_that_wait_for_the_last_micro_batch_are_whole(fake, tmp_path):
    world = dist.World(0, 64, torch.device("cpu"), torch.bfloat16)
    setting = {"rows": 1, "length": 256, "step": True}
    measured = plan_worker.measured(world, **setting)
    expected = of_setting(tmp_path / "model", 64, "bfloat16", **setting)
    assert expected == pytest.approx(measured, rel=0.05)


def test_two_ranks_over_gloo_peak_where_the_plan_says(tmp_path):
    settings = [("float32", SHARDED["activations"]), ("bfloat16", SHARDED["an untied head"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = [plan_worker.__file__, str(tmp_path / "found"), json.dumps(settings)]
    done = subprocess.run(
        [sys.executable, *torchrun, *worker], env=environment, capture_output=True, text=True
    )
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
    found = plan.numbers(planned(folder, "sft", "--lora", 16).units, lora=16)
    assert found.linear == sum(p.numel() for p in linear)
    assert found.frozen == size(policy) - found.linear
    assert found.trained == sum(16 * (out + into) for out, into in (p.shape for p in linear))
