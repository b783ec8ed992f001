"""Whole steps of every script, a random Qwen2.5-1.5B -> bench/results/train_step.json.

    python -m bench.train_step                    # one GPU, bf16; --only sft for one of them
    python -m bench.train_step --try              # anywhere, a tiny model: does the script work?

If TRL is installed its DPOTrainer takes the same steps, in bf16 over fp32 weights like ours. mfu.py
has more of SFT, grpo.py of GRPO, both beside TRL.

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
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from bench import common
from bench.common import flags
from bench.kernels import matmul_flops, seconds
from nanopost import losses
from nanopost.batch import Sequences
from nanopost.config import Config
from nanopost.model import CausalLM
from nanopost.save import save_model
from runs import toy

WARM = 2
TIMES = ["time/step", "time/rollout", "time/train", "time/sync"]
MEASURED = ["tokens_per_second", *TIMES, "frac_reward_zero_std"]  # where a script logs them
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


def tokenizer_files(vocabulary: int) -> dict[str, str]:
    """The toy's tokenizer, with a token for every id of the model. Text has none of these, but a
    random model draws from all ids, so few completions end early."""
    files = toy.tokenizer_files()
    tokenizer = json.loads(files["tokenizer.json"])
    vocab = tokenizer["model"]["vocab"]
    vocab |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocab |= {f"w{i}": i for i in set(range(vocabulary)) - set(vocab.values())}
    return files | {"tokenizer.json": json.dumps(tokenizer)}


def write_inputs(
    folder: Path, config: Config, longest: int, device: str = "cpu", num_pairs: int = 1000
) -> list[int]:
    """Write a model, chats, pairs and prompts, a byte per token -> tokens of each chat row."""
    with torch.device(device):
        model = CausalLM(config).init_weights(0)
    files = tokenizer_files(config.vocab_size)
    save_model(folder / "model", model.state_dict().items(), config, files)
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
def ours(folder: Path, tiny: bool, **values) -> list[str]:
    """What our scripts get in all jobs."""
    return flags(
        model=folder / "model",
        lr=1e-6,
        warmup=0,
        holdout=2,
        save_every=0,
        eval_every=0,
        out=folder / "out",
        overwrite=True,
        tokens=(TINY if tiny else FULL)["tokens"],
        device="cpu" if tiny else None,
        **values,
    )


def trls(folder: Path, tiny: bool, **values) -> list[str]:
    """What TRL's trainers get in all jobs."""
    device = "cpu" if tiny else "cuda"
    return flags(model=folder / "model", lr=1e-6, device=device, dtype="bf16", **values)


def our_jobs(folder: Path, tiny: bool) -> dict[str, list]:
    """name -> command line."""
    sizes = TINY if tiny else FULL
    chats, pairs, prompts = (folder / f"{n}.jsonl" for n in ("chats", "pairs", "prompts"))
    sampled = {"data": prompts, "max_new_tokens": sizes["completion"], "reward": REWARD}
    teacher = {"teacher": folder / "model"}  # as large as the student

    def job(script, **values):
        return [script, *ours(folder, tiny, **values)]

    sft = job("train_sft.py", data=chats, bins=sizes["bins"], train_on="all")
    dpo = job("train_dpo.py", data=pairs, rows=sizes["pairs"])
    return {
        "dpo": dpo,
        "sft": sft,
        "rm": job("train_rm.py", data=pairs, rows=sizes["pairs"]),
        "kto": job("train_kto.py", data=pairs, rows=sizes["pairs"]),
        "sft, --kernels torch": [*sft, "--kernels", "torch"],
        "dpo, --kernels torch": [*dpo, "--kernels", "torch"],
        "distill": job("train_distill.py", **sampled, prompts=sizes["ppo"], **teacher),
        # the slowest last
        "grpo": job("train_grpo.py", **sampled, prompts=sizes["prompts"], group=8),
        "ppo": job("train_ppo.py", **sampled, prompts=sizes["ppo"]),
        "online_dpo": job("train_online_dpo.py", **sampled, prompts=sizes["prompts"], group=4),
    }


def trl_jobs(folder: Path, tiny: bool) -> dict[str, list]:
    """The same steps by TRL's trainers: for SFT and GRPO see mfu.py and grpo.py."""
    sizes = TINY if tiny else FULL
    dpo = trls(
        folder,
        tiny,
        data=folder / "pairs.jsonl",
        max_length=sizes["tokens"],
        batch=4,
        accumulate=sizes["pairs"] // 4,
    )
    return {"dpo, TRL": ["bench/trl_preference.py", "dpo", *dpo]}


# ---------------------------------------------------------------------------------------- measuring
def run(folder: Path, command, steps: int, profile="", timeout=None) -> tuple[list[dict], float]:
    """-> (metrics of each step, peak memory in MB). RuntimeError if it fails."""
    done = common.run(
        ["-c", CHILD, profile, *command, "--steps", steps],
        env=os.environ | common.OFFLINE | {"PYTHONPATH": str(common.ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    *said, peak = done.stdout.splitlines()
    if command[0].startswith("train_"):
        return common.metrics(folder / "out")[1:], float(peak)
    theirs = json.loads(said[-1])
    lines = []
    for tokens, whole in zip(theirs["tokens"], theirs["seconds"]):
        lines.append({"tokens_per_second": tokens / whole, "time/step": whole})
    for line, rollout in zip(lines, theirs.get("generate_seconds", [])):
        line |= {"time/rollout": rollout, "time/train": line["time/step"] - rollout}
    return lines, float(peak)


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


def medians(lines: list[dict], warm: int) -> dict[str, float]:
    """Of each of MEASURED, over the steps after the warm-up."""
    found = {}
    for name in MEASURED:
        if name in lines[0]:
            found[name] = statistics.median(m[name] for m in lines[warm:])
    return found


# ------------------------------------------------------------------ what mfu.py and grpo.py share
def arguments(doc: str, steps: int, seconds: int | None, profiled=()):
    parser = common.parser(doc)
    add = parser.add_argument
    add("--try", action="store_true", dest="tiny", help="write no results")
    add("--only", nargs="+", default=[""], help="jobs whose names begin with one of these")
    add("--steps", type=int, default=steps)
    add("--seconds", type=int, default=seconds, help="start no further job after so many")
    add("--profile", nargs="*", default=list(profiled), help="jobs to run once more")
    add("--out", type=Path, default=common.RESULTS, help="folder")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.seconds = WARM + 1, 30
    return args


def start(args) -> tuple[dict, str]:
    """-> (where a result comes from, and on a GPU its matmul rate; the device)."""
    packages = ("torch", "triton", "trl", "transformers", "liger-kernel", "flash-attn")
    result = {"device": "cpu", **common.origin(*packages), "steps": args.steps}
    if args.tiny:
        return result, "cpu"
    rate = matmul_flops()
    torch.cuda.empty_cache()
    result |= {"device": torch.cuda.get_device_name(), "matmul_tflops": rate / 1e12}
    return result, "cuda"


def with_trl(ours: dict, theirs: dict) -> dict:
    """Jobs of TRL right after the first of ours, if TRL is installed."""
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed: its trainers are skipped")
        return ours
    first, *others = ours
    return {first: ours[first], **theirs, **{name: ours[name] for name in others}}


def measure(name: str, jobs: dict, folder: Path, args, result: dict, warm=WARM, flops=None):
    """Run jobs until --seconds have passed -> result["jobs"]; after each, in results/NAME.json.

    A job that is running then has a fifth of the time more, before it is ended.

    flops: of a token, for the utilisation of jobs of SFT; None: of none.
    """
    found = result.setdefault("jobs", {})
    profiles = folder if args.tiny else args.out
    began = time.perf_counter()
    for job, command in jobs.items():
        if not job.startswith(tuple(args.only)):
            continue
        spent = time.perf_counter() - began
        if args.seconds and spent > args.seconds:
            print(
                f"{job}: not measured: the time limit (--seconds {args.seconds}) is reached",
                flush=True,
            )
            continue
        timeout = None
        if args.seconds and not args.tiny:
            timeout = 1.2 * args.seconds - spent
        try:
            lines, peak = run(folder, command, args.steps, timeout=timeout)
        except (
            RuntimeError,
            subprocess.TimeoutExpired,
        ) as error:  # out of memory, say: the others are still measured
            found[job] = {"failed": str(error)[-500:]}
            print(job, error, flush=True)
            continue
        found[job] = medians(lines, warm) | {"peak_mb": peak}
        if flops and "matmul_tflops" in result and "sft.py" in command[0]:
            rate = result["matmul_tflops"] * 1e12
            found[job]["utilisation"] = found[job]["tokens_per_second"] * flops / rate
        print(job, found[job], flush=True)
        if job in args.profile:
            run(folder, command, 2, profiles / f"{name}_{job}.txt")
        if not args.tiny:
            common.save(args.out / f"{name}.json", result)


def main():
    args = arguments(__doc__, 6, None, ["sft", "dpo", "grpo"])
    config = shape(args.tiny)
    result, device = start(args)
    result["jobs"] = {"policy loss of 8,192 tokens, ms": policy_loss_ms(device)}
    print(result["jobs"], flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lengths = write_inputs(folder, config, 200 if args.tiny else 4000, device)
        jobs = with_trl(our_jobs(folder, args.tiny), trl_jobs(folder, args.tiny))
        measure("train_step", jobs, folder, args, result, flops=sft_flops(config, lengths))


if __name__ == "__main__":
    main()
