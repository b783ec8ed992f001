"""Whole steps of every script, a random Qwen2.5-1.5B -> bench/results/train_step.json.

    python -m bench.train_step                    # one GPU, bf16; --only sft for one of them
    python -m bench.train_step --try              # anywhere, a tiny model: does the script work?

If TRL is installed its trainers take the same steps: in bf16 over fp32 weights like ours, packed
into the same bins in SFT, with transformers' generate in GRPO.

Model FLOPs: 6 per token and weight of the blocks, 6 per trained token and weight of the head, and
causal attention; recomputation counts nothing. Utilisation is relative to the rate that a large
matrix product reaches on the same machine just before. Steps count from the third on, whole, the
optimizer included. Memory is the peak of what torch allocates. The profile is of another run: the
operators that take the most time, in bench/results/train_step_*.txt. "policy loss" is GRPO's for
one micro-batch with everything on (correction, clip, KL, sums), from log-probs to their gradients:
what a fused kernel for it could save at most.
"""

import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench import common
from bench.common import flags
from bench.kernels import matmul_flops, seconds
from nanopost import hf, losses
from nanopost.batch import Sequences
from nanopost.model import CausalLM, Config
from runs import toy

WARM = 2
# Of a step: tokens per micro-batch, bins, pairs, prompts, PPO's prompts, and longest completion.
FULL = {"tokens": 8192, "bins": 8, "pairs": 32, "prompts": 32, "ppo": 256, "completion": 512}
TINY = {"tokens": 512, "bins": 2, "pairs": 8, "prompts": 4, "ppo": 8, "completion": 16}
REWARD = common.ROOT / "bench/reward.py:length_modulo_7"
# Runs a script as `python script` does, then prints the peak of torch's memory.
CHILD = """
import runpy, sys
import torch
profile, script, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
if profile:
    from torch.profiler import ProfilerActivity, profile as profiled
    activity, by = ProfilerActivity.CPU, "self_cpu_time_total"
    if torch.cuda.is_available():
        activity, by = ProfilerActivity.CUDA, "self_cuda_time_total"
    with profiled(activities=[activity], acc_events=True) as found:
        runpy.run_path(script, run_name="__main__")
    events = found.key_averages()
    with open(profile, "w") as file:
        file.write(events.table(sort_by=by, row_limit=25, max_name_column_width=70))
else:
    runpy.run_path(script, run_name="__main__")
print(torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0)
"""


# ------------------------------------------------------------------------------------------- inputs
def shape(tiny: bool) -> Config:
    sizes = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "vocab_size": 151936,
    }
    if tiny:
        sizes = {
            "hidden_size": 128,  # heads of 32: vLLM on a CPU has no smaller ones
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 512,
        }
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


def write_inputs(
    folder: Path, config: Config, longest: int, device: str = "cpu", num_pairs: int = 1000
) -> list[int]:
    """Write a model, chats, pairs and prompts, a byte per token -> tokens of each chat row."""
    with torch.device(device):
        model = CausalLM(config).init_weights(0)
    hf.save_model(folder / "model", model.state_dict().items(), config, toy.tokenizer_files())
    draw = random.Random(0)

    def said(role, log_mean):
        length = int(min(longest, max(16, draw.lognormvariate(log_mean, 0.7))))
        text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=length))
        return [{"role": role, "content": text}]

    chats, pairs, prompts = [], [], []
    for _ in range(4000):
        chats.append({"messages": said("user", 4) + said("assistant", 6.5)})
    for _ in range(num_pairs):
        prompt, chosen, rejected = said("user", 5), said("assistant", 6), said("assistant", 6)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    for _ in range(400):
        prompts.append({"prompt": said("user", 5)})
    for name, rows in (("chats", chats), ("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = []
    for row in chats:
        question, answer = (len(message["content"]) for message in row["messages"])
        lengths.append(question + answer + 3)  # with the two roles and the end
    return lengths


# ------------------------------------------------------------------------------------ command lines
def our_jobs(folder: Path, tiny: bool) -> dict[str, list]:
    """name -> command line. Steps of SFT hold 64k tokens in packed bins of 8k."""
    sizes = TINY if tiny else FULL
    shared = flags(
        model=folder / "model",
        lr=1e-6,
        warmup=0,
        holdout=2,
        save_every=0,
        eval_every=0,
        out=folder / "out",
        overwrite=True,
        tokens=sizes["tokens"],
        device="cpu" if tiny else None,
    )
    chats, pairs, prompt_file = (folder / f"{n}.jsonl" for n in ("chats", "pairs", "prompts"))
    sampled = flags(data=prompt_file, max_new_tokens=sizes["completion"], reward=REWARD)
    sft = ["train_sft.py", *shared, *flags(data=chats, bins=sizes["bins"], train_on="all")]
    dpo = ["train_dpo.py", *shared, *flags(data=pairs, rows=sizes["pairs"])]
    kto = ["train_kto.py", *shared, *flags(data=pairs, rows=sizes["pairs"])]
    rm = ["train_rm.py", *shared, *flags(data=pairs, rows=sizes["pairs"])]
    online = ["train_online_dpo.py", *shared, *sampled, *flags(prompts=sizes["prompts"], group=4)]
    grpo = ["train_grpo.py", *shared, *sampled, *flags(prompts=sizes["prompts"], group=8)]
    ppo = ["train_ppo.py", *shared, *sampled, *flags(prompts=sizes["ppo"])]
    return {
        "sft": sft,
        "dpo": dpo,
        "rm": rm,
        "kto": kto,
        "sft, --compile": [*sft, "--compile"],
        "sft, --kernels torch": [*sft, "--kernels", "torch"],
        "sft, --checkpointing": [*sft, "--checkpointing", "full"],
        "dpo, --kernels torch": [*dpo, "--kernels", "torch"],
        "grpo": grpo,  # the slowest last
        "ppo": ppo,
        "online_dpo": online,
    }


def trl_jobs(folder: Path, tiny: bool) -> dict[str, list]:
    """The same steps by TRL's trainers."""
    sizes = TINY if tiny else FULL
    shared = flags(model=folder / "model", lr=1e-6, device="cpu" if tiny else "cuda", dtype="bf16")
    chats, pairs, prompts = (folder / f"{n}.jsonl" for n in ("chats", "pairs", "prompts"))
    sft = flags(
        data=chats,
        packing=True,
        max_length=sizes["tokens"],
        batch=1,
        accumulate=sizes["bins"],
        train_on="all",
    )
    dpo = flags(data=pairs, max_length=sizes["tokens"], batch=4, accumulate=sizes["pairs"] // 4)
    grpo = flags(
        data=prompts,
        max_new_tokens=sizes["completion"],
        batch=16,
        accumulate=sizes["prompts"] // 2,
    )
    return {
        "sft, TRL": ["bench/trl_sft.py", *shared, *sft],
        "dpo, TRL": ["bench/trl_preference.py", "dpo", *shared, *dpo],
        "grpo, TRL": ["bench/trl_grpo.py", *shared, *grpo],
    }


# ---------------------------------------------------------------------------------------- measuring
def run(folder: Path, command, steps: int, profile="") -> tuple[list[dict], float]:
    """-> (metrics of each step, peak memory in MB)."""
    done = common.run(
        ["-c", CHILD, profile, *command, "--steps", steps],
        env=os.environ | common.OFFLINE | {"PYTHONPATH": str(common.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    *said, peak = done.stdout.splitlines()
    if command[0].startswith("train_"):
        return common.metrics(folder / "out")[1:], float(peak)
    theirs = json.loads(said[-1])
    speeds = [n / s for n, s in zip(theirs["tokens"], theirs["seconds"])]
    return [{"tokens_per_second": speed} for speed in speeds], float(peak)


def sft_flops(config: Config, lengths: list[int]) -> float:
    """Per token, forward and backward, all tokens trained."""
    with torch.device("meta"):
        model = CausalLM(config)
    blocks = 0
    for name, p in model.named_parameters():
        if ".layers." in name and p.ndim == 2:
            blocks += p.numel()
    # tokens that a token looks back at, on average
    attended = sum(n * n for n in lengths) / sum(lengths) / 2
    attention = 2 * 2 * attended * config.layers * config.heads * config.head_dim
    return 3 * (2 * blocks + 2 * config.vocab_size * config.width + attention)


def policy_loss_ms(device: str, tokens: int = 8192) -> dict[str, float]:
    """Forward and backward of train_grpo.py's loss on packed tokens of 64 sequences, in ms."""
    draw = torch.Generator(device).manual_seed(0)
    old_logp_N, engine_logp_N, ref_logp_N, adv_N = (
        torch.randn(4, tokens, generator=draw, device=device) / 10 - 1
    )
    logp_N = old_logp_N.clone().requires_grad_()
    mask_N = torch.ones(tokens, dtype=torch.bool, device=device)
    index_N = torch.arange(tokens, device=device) * 64 // tokens
    sequences = Sequences(mask_N, index_N, 64)

    def loss_of(logp_N):
        log_ratio_N = losses.log_ratio(logp_N, old_logp_N, sequences, "token")
        weight_N = losses.token_weights(sequences, "token")
        correction_N, _ = losses.importance_weight(
            old_logp_N, engine_logp_N, sequences, "token", "truncate", 2.0
        )
        loss, _ = losses.policy_loss_clip(
            log_ratio_N, logp_N, adv_N, weight_N * correction_N, 0.2, 0.28
        )
        return loss + 0.04 * (weight_N * losses.kl_k3(logp_N, ref_logp_N)).sum()

    def milliseconds(function):
        def both():
            logp_N.grad = None
            function(logp_N).backward()

        for _ in range(2):
            both()
        return 1e3 * seconds(both, 20)

    eager = milliseconds(loss_of)
    return {"as it is": eager, "compiled": milliseconds(torch.compile(loss_of))}


def medians(lines: list[dict], names) -> dict[str, float]:
    """Of each metric, over the steps after the warm-up."""
    found = {}
    for name in names:
        found[name] = statistics.median(m[name] for m in lines[WARM:])
    return found


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--try", action="store_true", dest="tiny", help="write no results")
    add("--only", nargs="+", default=[""], help="jobs whose names begin with one of these")
    add("--steps", type=int, default=6)
    add("--seconds", type=int, help="start no further job after so many")
    add("--profile", nargs="*", default=["sft", "dpo", "grpo"], help="jobs to run once more")
    add("--out", type=Path, default=common.RESULTS, help="folder")
    args = parser.parse_args()
    config = shape(args.tiny)
    device, rate, longest = "cuda", None, 4000
    if args.tiny:
        device, longest = "cpu", 200
    else:
        rate = matmul_flops()
        torch.cuda.empty_cache()
    result = {"device": "cpu", **common.origin("torch", "triton", "trl"), "steps": args.steps}
    if not args.tiny:
        result |= {"device": torch.cuda.get_device_name(), "matmul_tflops": rate / 1e12}
    found = result["jobs"] = {"policy loss of 8,192 tokens, ms": policy_loss_ms(device)}
    print(found, flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        profiles = folder if args.tiny else args.out
        lengths = write_inputs(folder, config, longest, device)
        jobs = our_jobs(folder, args.tiny)
        if importlib.util.find_spec("trl") is None:
            print("TRL is not installed: its trainers are skipped")
        else:
            theirs = trl_jobs(folder, args.tiny)
            jobs = {name: jobs[name] for name in ("sft", "dpo")} | theirs | jobs
        for name, command in jobs.items():
            if not name.startswith(tuple(args.only)):
                continue
            if args.seconds and time.perf_counter() - began > args.seconds:
                print(
                    f"{name}: not measured: the time limit (--seconds {args.seconds}) is reached",
                    flush=True,
                )
                continue
            try:
                lines, peak = run(folder, command, args.steps)
            except RuntimeError as error:  # out of memory, say: the others are still measured
                found[name] = {"failed": str(error)[-500:]}
                print(name, error, flush=True)
                continue
            times = [key for key in ("time/rollout", "time/step") if key in lines[0]]
            found[name] = medians(lines, ["tokens_per_second", *times]) | {"peak_mb": peak}
            if name.startswith("sft") and rate:
                speed = found[name]["tokens_per_second"]
                found[name]["utilisation"] = speed * sft_flops(config, lengths) / rate
            print(name, found[name], flush=True)
            if name in args.profile:
                run(folder, command, 2, profiles / f"train_step_{name}.txt")
            if not args.tiny:
                common.save(args.out / "train_step.json", result)


if __name__ == "__main__":
    main()
