"""Whole steps of every script, a random model of Qwen2.5-1.5B's shape, one GPU -> bench/results/train_step.json.

    python -m bench.train_step                          # CUDA, bf16; --only sft for one of them
    python -m bench.train_step --try                    # anywhere, a tiny model: does the script work?

Where TRL is installed its trainers take the same steps beside ours, in bf16 over fp32 weights like ours, packed to the
same bins in SFT, with transformers' generate in GRPO.

Model FLOPs: 6 for each weight of the blocks and token, 6 for each weight of the head and trained token, and causal
attention; what is recomputed counts nothing. Utilisation is of the rate that a large matrix product reaches on the same
machine just before. Steps count from the third on, whole, optimizer included; memory is the peak of what torch
allocates. The profile is of one more run: the operators that take the most time, in bench/results/train_step_*.txt.
"policy loss" is GRPO's of a micro-batch with everything on (correction, clip, KL, sums), from log-probs to their
gradients: what a fused kernel for it could save at most.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from bench.kernels import seconds
from nanopost import hf, losses, toy
from nanopost.model import CausalLM, Config

ROOT = Path(__file__).resolve().parents[1]
WARM = 2
# Runs a script as `python script` does, and says afterwards what torch held at most.
CHILD = """
import json, runpy, sys
import torch
profile, script, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
if profile:
    from torch.profiler import ProfilerActivity as Activity, profile as profiled
    cuda = torch.cuda.is_available()
    with profiled(activities=[Activity.CUDA if cuda else Activity.CPU], acc_events=True) as found:
        runpy.run_path(script, run_name="__main__")
    by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    open(profile, "w").write(found.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70))
else:
    runpy.run_path(script, run_name="__main__")
print(torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0)
"""


def shape(tiny: bool) -> Config:
    sizes = (
        dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=512,
        )
        if tiny
        else dict(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            vocab_size=151936,
        )
    )
    return Config.of(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "bos_token_id": None,
            **sizes,
        }
    )


def write_inputs(folder: Path, config: Config, longest: int) -> dict:
    """Model, chats, pairs and prompts, a byte a token -> {"mean": tokens, "square": tokens^2} of a chat row."""
    model = CausalLM(config).init_weights(0)
    hf.save_model(folder / "model", model.state_dict().items(), config, toy.tokenizer_files())
    draw = random.Random(0)

    def text(log_mean):
        length = int(min(longest, max(16, draw.lognormvariate(log_mean, 0.7))))
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=length))

    def said(role, log_mean):
        return [{"role": role, "content": text(log_mean)}]

    def write(name, count, make):
        rows = [make() for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    chats = write("sft", 4000, lambda: {"messages": said("user", 4) + said("assistant", 6.5)})
    write(
        "dpo",
        1000,
        lambda: {
            "prompt": said("user", 5),
            "chosen": said("assistant", 6),
            "rejected": said("assistant", 6),
        },
    )
    write("grpo", 400, lambda: {"prompt": said("user", 5)})
    lengths = [sum(len(m["content"]) + 1 for m in row["messages"]) + 1 for row in chats]
    return {"mean": statistics.mean(lengths), "square": statistics.mean(n * n for n in lengths)}


def jobs(folder: Path, tiny: bool) -> dict[str, list]:
    """name -> command line. SFT steps hold 64k tokens in packed bins of 8k."""
    tokens, bins, completion = (512, 2, 16) if tiny else (8192, 8, 512)
    device = ["--device", "cpu"] if tiny else []
    common = [
        "--model",
        folder / "model",
        "--lr",
        1e-6,
        "--schedule",
        "constant",
        "--warmup",
        0,
        "--holdout",
        2,
        "--save_every",
        0,
        "--eval_every",
        0,
        "--overwrite",
        "--tokens",
        tokens,
        *device,
    ]
    sft = [
        "train_sft.py",
        "--data",
        folder / "sft.jsonl",
        "--bins",
        bins,
        "--train_on",
        "all",
        *common,
    ]
    dpo = ["train_dpo.py", "--data", folder / "dpo.jsonl", "--rows", 8 if tiny else 32, *common]
    grpo = [
        "train_grpo.py",
        "--data",
        folder / "grpo.jsonl",
        "--prompts",
        4 if tiny else 32,
        "--group",
        8,
        "--max_new_tokens",
        completion,
        "--reward",
        ROOT / "bench/reward.py:length_modulo_7",
        *common,
    ]
    rm = ["train_rm.py", "--data", folder / "dpo.jsonl", "--rows", 8 if tiny else 32, *common]
    ppo = [
        "train_ppo.py",
        "--data",
        folder / "grpo.jsonl",
        "--prompts",
        8 if tiny else 256,
        "--max_new_tokens",
        completion,
        "--reward",
        ROOT / "bench/reward.py:length_modulo_7",
        *common,
    ]
    common = [
        "--model",
        folder / "model",
        "--lr",
        1e-6,
        "--device",
        "cpu" if tiny else "cuda",
        "--dtype",
        "bf16",
    ]
    theirs = {
        "sft, TRL": [
            "bench/trl_sft.py",
            "--data",
            folder / "sft.jsonl",
            "--packing",
            "--max_length",
            tokens,
            "--batch",
            1,
            "--accumulate",
            bins,
            "--train_on",
            "all",
            *common,
        ],
        "dpo, TRL": [
            "bench/trl_preference.py",
            "dpo",
            "--data",
            folder / "dpo.jsonl",
            "--max_length",
            tokens,
            "--batch",
            4,
            "--accumulate",
            2 if tiny else 8,
            *common,
        ],
        "grpo, TRL": [
            "bench/trl_grpo.py",
            "--data",
            folder / "grpo.jsonl",
            "--max_new_tokens",
            completion,
            "--batch",
            16,
            "--accumulate",
            2 if tiny else 16,
            *common,
        ],
    }
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed: nothing is measured beside it")
        theirs = {}
    return {
        "sft": sft,
        "sft, --kernels torch": [*sft, "--kernels", "torch"],
        "sft, --compile": [*sft, "--compile"],
        "sft, --checkpointing": [*sft, "--checkpointing"],
        "dpo": dpo,
        "dpo, --kernels torch": [*dpo, "--kernels", "torch"],
        "grpo": grpo,
        "rm": rm,
        "ppo": ppo,
        **theirs,
    }


def run(folder: Path, command, steps: int, profile="") -> tuple[list[dict], float]:
    """-> (metrics of each step, peak memory in MB)."""
    ours = not command[0].startswith("bench/")
    command = [
        sys.executable,
        "-c",
        CHILD,
        profile,
        *command,
        "--steps",
        steps,
        *(["--out", folder / "out"] * ours),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    *said, peak = done.stdout.splitlines()
    if ours:
        lines = [
            json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()
        ][1:]
    else:
        steps = json.loads(said[-1])
        lines = [{"tokens_per_second": n / s} for n, s in zip(steps["tokens"], steps["seconds"])]
    return lines, float(peak)


def sft_flops(config: Config, lengths: dict) -> float:
    """Of a token, forward and backward, all of them trained."""
    with torch.device("meta"):
        model = CausalLM(config)
    blocks = sum(
        p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2
    )
    attended = (
        lengths["square"] / lengths["mean"] / 2
    )  # tokens that a token looks back at, on average
    attention = 2 * 2 * attended * config.layers * config.heads * config.head_dim
    return 3 * (2 * blocks + 2 * config.vocab_size * config.width + attention)


def policy_loss_ms(device: str, tokens: int) -> dict[str, float]:
    """Forward and backward of train_grpo.py's loss on so many packed tokens in 64 sequences, milliseconds."""
    draw = torch.Generator(device).manual_seed(0)
    old_logp_N, engine_logp_N, ref_logp_N, adv_N = (
        torch.randn(4, tokens, generator=draw, device=device) / 10 - 1
    )
    logp_N = old_logp_N.clone().requires_grad_()
    seq_N = torch.arange(tokens, device=device) * 64 // tokens
    layout = torch.ones(tokens, dtype=torch.bool, device=device), seq_N, 64

    def loss_of(logp_N):
        weight_N = losses.token_weights(*layout, "token")
        log_ratio_N = losses.log_ratio(logp_N, old_logp_N, *layout, "token")
        correction_N, _ = losses.importance_weight(
            old_logp_N, engine_logp_N, *layout, "token", "truncate", 2.0
        )
        loss, _ = losses.policy_loss_clip(log_ratio_N, adv_N, weight_N * correction_N, 0.2, 0.28)
        return loss + 0.04 * (weight_N * losses.kl_estimate(logp_N, ref_logp_N, "k3")).sum()

    found = {}
    for name, function in (("as it is", loss_of), ("compiled", torch.compile(loss_of))):

        def both(function=function):
            logp_N.grad = None
            function(logp_N).backward()

        both(), both()
        found[name] = 1e3 * seconds(both, 20)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--try", action="store_true", dest="tiny")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="jobs whose names begin with one of these"
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    args = parser.parse_args()
    config, found, rate = shape(args.tiny), {}, None
    if not args.tiny:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        a @ b
        rate = 2 * 8192**3 / seconds(lambda: a @ b, 20)
        del a, b
        torch.cuda.empty_cache()
    found["policy loss of 8,192 tokens, ms"] = policy_loss_ms("cuda" if rate else "cpu", 8192)
    print(found, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lengths = write_inputs(folder, config, 200 if args.tiny else 4000)
        for name, command in jobs(folder, args.tiny).items():
            if not name.startswith(tuple(args.only)):
                continue
            lines, peak = run(folder, command, args.steps)
            speed = statistics.median(m["tokens_per_second"] for m in lines[WARM:])
            found[name] = {"tokens_per_second": speed, "peak_mb": peak}
            if name.startswith("sft") and rate:
                found[name]["utilisation"] = speed * sft_flops(config, lengths) / rate
            if name.startswith(("grpo", "ppo")):
                found[name] |= {
                    key: statistics.median(m[key] for m in lines[WARM:])
                    for key in lines[0]
                    if key.startswith("time/")
                }
            print(name, found[name], flush=True)
            if name in ("sft", "dpo", "grpo"):
                run(
                    folder,
                    command,
                    2,
                    args.out / f"train_step_{name}.txt" if rate else folder / "profile.txt",
                )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    result = {
        "device": torch.cuda.get_device_name() if rate else "cpu",
        "matmul_tflops": rate and rate / 1e12,
        "versions": {n: version(n) for n in ("torch", "triton")},
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "steps": args.steps,
        "jobs": found,
    }
    if rate:
        (args.out / "train_step.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
