"""Is the GPU path right? Kernels, attention, every script -> bench/results/gpu_correctness.json.

    python -m bench.gpu_correctness                             # one GPU, three minutes
    TRITON_INTERPRET=1 python -m bench.gpu_correctness --try    # anywhere: does the script work?
    python -m bench.gpu_correctness --only scripts              # or: decoding, ...

kernels     log-probs, entropies and gradients of the Triton kernel and of its torch twin against
            float64; the same call twice gives the same bits.
attention   packed and cached attention on the GPU in bf16 against the CPU in fp64.
blocks      linear attention, local windows and experts: log-probs and gradients of rollouts that
            share prompts, in fp32 and bf16, against float64 on the CPU.
decoding    the native engine, with each step repeated as a CUDA graph, against the same steps one
            kernel at a time (tokens and log-probs), and against the trainer's forward; also with
            new weights between two tokens, and tokens/s of both.
scripts     three steps of every script on a small model: on the GPU in fp32, in bf16, and in bf16
            with each of --compile, --checkpointing, --offload and --kernels torch, against the CPU
            in fp32. Where a script samples, also the gap between engine and trainer.
resume      a run killed with -9 and resumed, beside two runs that were left alone: GPUs add in
            another order each time, so the two that were left alone say what is equal.

Each check is a line: what, the number found, its limit. The exit status is 1 if one is above.
One script runs per CPU core, all on one GPU.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread

import torch
from safetensors.torch import load_file

from bench import common, kernels
from bench.common import flags
from bench.train_step import REWARD, shape, write_inputs
from nanopost.attention import Packing, cached_attention, packed_attention, seen
from nanopost.batch import Example, batch_of
from nanopost.config import Config
from nanopost.engine import Engine, Sampling
from nanopost.logprob import logprob
from nanopost.model import CausalLM

AT_ONCE = os.cpu_count()
COMPARED = ("loss", "grad_norm", "entropy", "eval/loss", "rewards/margins", "kl")
GAP = "sampling/sampling_logp_difference/mean"


class Checks:
    """What was found, and whether it is within its limit."""

    def __init__(self):
        self.found = []

    def add(self, what: str, value: float, limit: float):
        good = value <= limit  # nan is not
        self.found.append({"what": what, "value": value, "limit": limit, "good": good})
        print(f"{'ok  ' if good else 'FAIL'} {what}: {value:.2e} (limit {limit:.0e})", flush=True)

    def crashed(self, what: str, text: str):
        self.found.append({"what": what, "crashed": text[-3000:], "good": False})
        print(f"FAIL {what}: crashed\n{text[-1500:]}", flush=True)


def relative(ours, exact) -> float:
    """|ours - exact| / |exact|, in float64 on the CPU."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-30))


# ----------------------------------------------------------------------------------------- kernels
def check_kernels(checks: Checks, device: str):
    triton = kernels.logprob_triton
    functions = {
        "kernel": partial(triton, store=False),
        "kernel, stored": partial(triton, store=True),
        "torch twin": partial(logprob, kernels="torch"),
    }
    shapes = [(33, 265, 72)]
    if device == "cuda":
        shapes += [(300, 1025, 72), (129, 777, 64), (1, 264, 64), (257, 4099, 136)]
        shapes += [(2048, 151936, 896), (1024, 128256, 2048)]
    for at in shapes:
        hidden, weight, target, g = kernels.inputs(at, False, device)
        target[::3] = -100
        double = hidden.double(), weight.double()
        exact = kernels.values_and_gradients(kernels.logprob_reference, *double, target, g)
        for name, function in functions.items():
            ours = kernels.values_and_gradients(function, hidden, weight, target, g)
            again = kernels.values_and_gradients(function, hidden, weight, target, g)
            for part, value in ours.items():
                limit = 1e-5
                if device == "cuda" and part.startswith("d_"):
                    limit = 1e-2  # bf16
                checks.add(f"{name} {at} {part}", relative(value, exact[part]), limit)
                if not value.equal(again[part]):
                    checks.add(f"{name} {at} {part}, twice", relative(again[part], value), 0.0)
        ignored = torch.full_like(target, -100)
        for name, function in functions.items():
            ours = kernels.values_and_gradients(function, hidden, weight, ignored, g)
            most = max(float(x.abs().max()) for x in ours.values())
            checks.add(f"{name} {at}, no targets", most, 0.0)


# --------------------------------------------------------------------------------------- attention
def check_attention(checks: Checks, device: str):
    draw = torch.Generator().manual_seed(0)
    lengths = [1, 700, 33, 128, 5, 257]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens = sum(lengths)
    shapes = [(14, 2, 64), (4, 4, 64), (8, 2, 128), (4, 2, 32)]
    if device == "cpu":  # a trial
        lengths, shapes = lengths[-2:], shapes[:1]
        cu_seqlens, tokens = torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths)
    for heads, groups, width in shapes:
        for window in (None, 2, 64, 4096):
            inputs = [
                torch.randn(tokens, n, width, generator=draw, dtype=torch.float64)
                for n in (heads, groups, groups)
            ]
            upstream = torch.randn(tokens, heads, width, generator=draw, dtype=torch.float64)
            here = Packing(cu_seqlens, max(lengths))
            there = Packing(cu_seqlens.to(device), max(lengths))
            compare_attention(
                checks,
                f"attention {heads}/{groups}x{width} window {window}",
                inputs,
                upstream,
                lambda *qkv, at=there, window=window: packed_attention(*qkv, at, window),
                lambda *qkv, at=here, window=window: packed_attention(*qkv, at, window),
                device,
            )
    check_prefixes(checks, device, draw)
    for window in (None, 20):
        q_BHK = torch.randn(5, 8, 64, generator=draw)
        k_BGTK, v_BGTK = torch.randn(2, 5, 2, 90, 64, generator=draw)
        length_B = torch.tensor([1, 90, 17, 20, 21])
        caches = [x.double() for x in (q_BHK, k_BGTK, v_BGTK)]
        seen_BT = seen(length_B, 90, window, torch.float64)
        exact = cached_attention(*caches, seen_BT)
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            caches = [x.to(device, dtype) for x in (q_BHK, k_BGTK, v_BGTK)]
            ours = cached_attention(*caches, seen(length_B.to(device), 90, window, dtype))
            checks.add(f"cached attention, window {window} {dtype}", relative(ours, exact), limit)


def compare_attention(checks, name, inputs, upstream, ours_of, exact_of, device):
    """Outputs and gradients of two functions of q, k and v: in fp32 and bf16, and in float64."""
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        qkv = [x.to(dtype).double().requires_grad_() for x in inputs]
        exact = exact_of(*qkv)
        exact.backward(upstream)
        ours_qkv = [x.to(device, dtype).requires_grad_() for x in inputs]
        ours = ours_of(*ours_qkv)
        ours.backward(upstream.to(device, dtype))
        checks.add(f"{name} {dtype}", relative(ours, exact), limit)
        gaps = [relative(a.grad, b.grad) for a, b in zip(ours_qkv, qkv)]
        checks.add(f"{name} {dtype}, gradients", max(gaps), limit)


def check_prefixes(checks, device, draw):
    """Of a tree of sequences, against whole sequences in float64."""
    lengths = [40, 300, 7] if device == "cpu" else [700, 1300, 7, 129]
    prompt, *ends = (torch.randint(97, (n,), generator=draw).tolist() for n in lengths)
    ids = (
        [[*prompt, *end] for end in ends] + [[*prompt, *ends[0], *end] for end in ends] + [ends[0]]
    )
    batch = batch_of([Example(x, [True] * len(x)) for x in ids])
    index_N, first_U = batch.prefixes.index_N, batch.prefixes.first_U
    whole = Packing(batch.cu_seqlens, batch.max_seqlen)
    there = batch.to(device)
    shared = Packing(there.cu_seqlens, there.max_seqlen, there.prefixes)
    for heads, groups, width in [(14, 2, 64), (8, 2, 128)]:
        tokens, wide = len(first_U), {"generator": draw, "dtype": torch.float64}
        inputs = [torch.randn(tokens, n, width, **wide) for n in (heads, groups, groups)]
        upstream = torch.randn(tokens, heads, width, **wide)
        for window in (None, 64, 4096):

            def of_whole(*qkv, window=window):
                return packed_attention(*(x[index_N] for x in qkv), whole, window)[first_U]

            compare_attention(
                checks,
                f"shared prefixes {heads}/{groups}x{width} window {window}",
                inputs,
                upstream,
                lambda *qkv, window=window: packed_attention(*qkv, shared, window),
                of_whole,
                device,
            )


# ------------------------------------------------------------------------------------------ blocks
BLOCKS = {
    "qwen3_5_text": {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "gemma3_text": {
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "sliding_window": 24,
    },
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128},
}


def check_blocks(checks: Checks, device: str):
    """The rollouts are those of the exact model, and name its experts: rounding changes none."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 500, (n,), generator=draw).tolist() for n in (5, 90, 17)]
    sampling, seeds = Sampling(8 if device == "cpu" else 40), [0, 10, 20]
    for family, more in BLOCKS.items():
        sizes = {"model_type": family, "architectures": None, "head_dim": 64}
        config = Config.of({**small().hf, **sizes, **more})
        for dtype, limits in ((torch.float32, (1e-5, 1e-4)), (torch.bfloat16, (5e-3, 5e-2))):
            model = CausalLM(config).init_weights(0).to(device, dtype)
            exact = CausalLM(config).double()
            exact.load_state_dict({name: x.cpu() for name, x in model.state_dict().items()})
            groups = Engine(exact, stop_ids=[]).generate(prompts, 4, sampling, seeds)
            examples = [r.example() for group in groups for r in group]
            found = [values_and_gradients(m, examples) for m in (model, exact)]
            kind = f"blocks, {family}, {str(dtype).removeprefix('torch.')}"
            parts = zip(("log-probs", "gradients"), limits, zip(*found))
            for what, limit, (ours, theirs) in parts:
                checks.add(f"{kind}: {what}", relative(ours, theirs), limit)


def values_and_gradients(model, examples):
    """-> logp_M, and the gradient of its sum by all parameters, as one tensor."""
    model.model.replays = True
    batch = batch_of(examples, model.head_weight.device)
    logp_N, _ = model(batch)
    logp_N.sum().backward()
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    return logp_N[batch.mask_N], gradient


# ---------------------------------------------------------------------------------------- decoding
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7},
    "top-k and top-p": {"top_k": 40, "top_p": 0.9, "kept": True},
}


def check_decoding(checks: Checks, device: str):
    """More rollouts than rows, of more tokens than one graph reads positions."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 500, (n,), generator=draw).tolist() for n in (5, 40, 17, 90) * 4]
    tokens, rows = 400, 24
    if device == "cpu":  # a trial
        prompts, tokens, rows = prompts[:2], 12, 5
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        name, models = str(dtype).removeprefix("torch."), []
        for seed in (0, 1, 0):  # the old weights, the new ones, and those of the engine
            models.append(CausalLM(small()).init_weights(seed).to(device, dtype))
        for kind, more in SAMPLINGS.items():
            found, speed = [], []
            for graphs in (False, device == "cuda"):
                engine = Engine(models[0], stop_ids=[1, 2], rows=rows)
                engine.graphs = graphs
                engine.generate(prompts[:2], 1, Sampling(4, **more))  # loads the kernels
                began = time.perf_counter()
                groups = engine.generate(prompts, 4, Sampling(tokens, **more), list(range(16)))
                found.append([r for group in groups for r in group])
                drawn = sum(len(r.ids) for r in found[-1])
                speed.append(drawn / (time.perf_counter() - began))
            rates = "{:.0f} tokens/s, as a graph {:.0f}".format(*speed)
            print(f"decoding, {name}, {kind}: {rates}", flush=True)
            differ = sum(a.ids != b.ids for a, b in zip(*found)) / len(found[0])
            checks.add(f"decoding, {name}, {kind}: rollouts that a graph changes", differ, 0.0)
            gaps = [abs(a.logp - b.logp).max() for a, b in zip(*found) if a.ids == b.ids]
            checks.add(f"decoding, {name}, {kind}: log-probs of a graph", max(gaps), 1e-5)
            if kind == "sampled":
                gap = max(trainer_gap(models, r, 0.7) for r in found[1])
                checks.add(f"decoding, {name}: log-probs of the trainer", gap, limit)

        engine = Engine(models[2], stop_ids=[1, 2], rows=rows)
        other = Thread(target=engine.sync_weights, args=(models[1].state_dict().items(), 1))
        tell = partial(start_once, other)
        groups = engine.generate(prompts, 4, Sampling(tokens, 0.7), list(range(16)), tell)
        other.join()
        rollouts = [r for group in groups for r in group]
        if {v for r in rollouts for v in r.versions} != {0, 1}:
            checks.crashed(f"decoding, {name}", "no token has the new weights, or none the old")
        gap = max(trainer_gap(models, r, 0.7) for r in rollouts)
        checks.add(f"decoding, {name}: log-probs of the trainer, synced meanwhile", gap, limit)


def start_once(thread, _):
    """Called whenever the engine has looked at its tokens: the first time, weights are synced."""
    if thread.ident is None:
        thread.start()


@torch.no_grad()
def trainer_gap(models, rollout, temperature) -> float:
    """The largest difference of a rollout's log-probs from those of the weights that drew it."""
    mask = [i >= len(rollout.prompt) for i in range(len(rollout.prompt) + len(rollout.ids))]
    batch = batch_of([Example(rollout.prompt + rollout.ids, mask)], models[0].head_weight.device)
    gaps = []
    for version in set(rollout.versions.tolist()):
        logp_N, _ = models[version](batch, temperature)
        gap_T = abs(logp_N[batch.mask_N].cpu().numpy() - rollout.logp)
        gaps.append(float(gap_T[rollout.versions == version].max()))
    return max(gaps)


# ----------------------------------------------------------------------------------------- scripts
def small(tiny: bool = False) -> Config:
    """Of train_step.py's family, with heads of 64 (tiny: of 16) and a vocabulary that fills no
    tile."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    if tiny:  # bf16 is slow on a CPU
        sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    return Config.of({**shape(tiny=True).hf, **sizes, "vocab_size": 531})


def script_jobs(folder: Path) -> dict[str, list]:
    """name -> command line without --out, --device and --dtype; many flags on at once."""
    shared = flags(
        model=folder / "model",
        lr=1e-4,
        warmup=0,
        holdout=8,
        steps=3,
        save_every=1,
        eval_every=1,
        tokens=1024,
        overwrite=True,
    )
    chats, pairs, prompts = (folder / f"{n}.jsonl" for n in ("chats", "pairs", "prompts"))
    sampled = flags(data=prompts, max_new_tokens=24, reward=REWARD, prompts=8, stop=["q"])
    model, dpo, rl = folder / "model", flags(data=pairs, rows=8), [*shared, *sampled]
    cache = folder / "cache"
    evaluate = ["-m", "nanopost.eval", *flags(model=model, data=prompts)]
    evaluate += flags(max_new_tokens=24, limit=16)
    return {
        "sft": ["train_sft.py", *shared, *flags(data=chats, rows=16)],
        "sft dft": ["train_sft.py", *shared, *flags(data=chats, bins=4, loss="dft")],
        "dpo": ["train_dpo.py", *shared, *dpo],
        "dpo cached": ["train_dpo.py", *shared, *dpo, *flags(reference="precomputed", cache=cache)],
        "kto": ["train_kto.py", *shared, *dpo],
        "rm": ["train_rm.py", *shared, *dpo, *flags(centre=0.01)],
        "online": ["train_online_dpo.py", *rl, *flags(group=2)],
        "grpo": ["train_grpo.py", *rl, *flags(group=4, minibatches=2)],
        "grpo kl": [
            *("train_grpo.py", *rl),
            *flags(group=4, beta=0.04, old_logp="trainer", correct="sequence-mask", resample=1),
        ],
        "distill": [
            *("train_distill.py", *rl),
            *flags(teacher=folder / "model_sft", beta=0.5, minibatches=2),
        ],
        "ppo": ["train_ppo.py", *rl, *flags(beta=0.05, score_scale=True, value_warmup=1)],
        "ppo head": [
            *("train_ppo.py", *rl),
            *flags(group=2, value_model="head", old_logp="trainer", whiten_rewards=True),
        ],
        "grpo judged": [
            *("train_grpo.py", *shared, *flags(data=prompts, max_new_tokens=24, prompts=8)),
            *flags(reward=f"model:{folder / 'model_rm'}", group=4),
        ],
        "sft lora": ["train_sft.py", *shared, *flags(data=chats, rows=16, lora=8)],
        "dpo nf4": ["train_dpo.py", *shared, *dpo, *flags(lora=8, quantize="nf4")],
        "grpo nf4": [*("train_grpo.py", *rl), *flags(group=4, beta=0.04, lora=8, quantize="nf4")],
        "eval": [*evaluate, *flags(reward=REWARD, samples=2, top_k=50, top_p=0.9)],
        "eval kl": [*evaluate, *flags(kl=model)],
    }


def variants(name: str, tiny: bool) -> dict[str, list]:
    """name -> flags. The first is what the others are compared with."""
    found = {"CPU fp32": flags(device="cpu", dtype="fp32")}
    if tiny:
        return found | {"bf16": flags(device="cpu", dtype="bf16")}
    found["fp32"] = flags(device="cuda", dtype="fp32")
    found["bf16"] = flags(device="cuda", dtype="bf16")
    if name in ("sft", "dpo", "grpo"):
        found["bf16 --checkpointing"] = [*found["bf16"], "--checkpointing", "full"]
        found["bf16 --checkpointing selective"] = [
            *found["bf16"],
            *flags(checkpointing="selective"),
        ]
        found["bf16 --offload"] = [*found["bf16"], "--offload"]
        found["bf16 --kernels torch"] = [*found["bf16"], *flags(kernels="torch")]
        found["bf16 --compile"] = [*found["bf16"], "--compile"]
    return found


def run_quietly(command, **options):
    return common.run(command, capture_output=True, text=True, check=False, **options)


def check_scripts(checks: Checks, folder: Path, tiny: bool):
    for name, more in (("rm", []), ("sft", flags(lr=1e-3))):  # a judge and a teacher
        train = [*script_jobs(folder)[name], "--device", "cpu", *more]
        done = run_quietly([*train, "--out", folder / f"model_{name}"])
        if done.returncode:
            checks.crashed(f"model_{name}", done.stderr)
    jobs = []
    for name, command in script_jobs(folder).items():
        if tiny and name not in ("sft", "grpo", "grpo nf4", "grpo judged", "eval kl"):
            continue
        for variant, more in variants(name, tiny).items():
            jobs.append((name, variant, [*command, *more]))

    def run_job(job):
        name, variant, command = job
        out = folder / f"{name}, {variant}".replace(" ", "_")
        if not name.startswith("eval"):
            command = [*command, "--out", out]
        began = time.perf_counter()
        done = run_quietly(command)
        return done, out, time.perf_counter() - began

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(run_job, jobs))
    expected = drawn = None
    for (name, variant, _), (done, out, seconds) in zip(jobs, results):
        what = f"{name}, {variant}"
        print(f"     {what}: {seconds:.0f} s", flush=True)
        if done.returncode:
            checks.crashed(what, done.stderr)
            continue
        if name.startswith("eval"):
            print(done.stdout, flush=True)
            continue
        lines = common.metrics(out)
        if variant == "CPU fp32":
            expected, drawn = lines, samples(out)
        else:
            compare(checks, what, lines, expected, "bf16" in variant, samples(out) == drawn)


def samples(out) -> list[str]:
    """The completions that the run showed of its first step."""
    lines = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
    return [line["completion"] for line in lines if line["step"] == 1]


def compare(checks: Checks, what: str, lines, expected, bf16: bool, same_samples: bool):
    """The first step's metrics, unless tokens were drawn otherwise, and every step's gap between
    engine and trainer."""
    ours, theirs = lines[1], expected[1]
    names = [n for n in COMPARED if n in ours and n in theirs and same_samples]
    for name in names:
        limit = 5e-2 if bf16 else 1e-3
        if "judged" in what:
            limit *= 10  # nearly equal scores, divided by their std
        gap = abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 0.05)
        checks.add(f"{what}: {name} {ours[name]:.4g} for {theirs[name]:.4g}", gap, limit)
    for line in lines:
        if GAP in line:
            limit = 3e-2 if bf16 else 1e-4
            checks.add(f"{what}: step {line['step']} engine and trainer", line[GAP], limit)


# ------------------------------------------------------------------------------------------ resume
def check_resume(checks: Checks, folder: Path, tiny: bool):
    device = flags(device="cpu" if tiny else "cuda", dtype="bf16")
    jobs = []
    for name in ("grpo",) if tiny else ("sft", "grpo", "ppo", "dpo"):
        command = [*script_jobs(folder)[name], *device]
        command[command.index("--steps") + 1] = "6"
        jobs.append((name, command))

    def run_job(job):
        name, command = job
        outs = [folder / f"resume_{name}_{i}" for i in range(3)]
        done = [run_quietly([*command, "--out", out]) for out in outs[:2]]
        kill_at([*command, "--out", outs[2]], outs[2] / "metrics.jsonl", lines=4)
        command = [word for word in command if word != "--overwrite"]
        done.append(run_quietly([*command, "--resume", "--out", outs[2]]))
        return outs, done

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(run_job, jobs))
    for (name, _), (outs, done) in zip(jobs, results):
        failed = [d.stderr for d in done if d.returncode]
        if failed:
            checks.crashed(f"resume, {name}", failed[0])
            continue
        if "resumed at step" not in done[2].stdout:
            checks.crashed(f"resume, {name}", f"it did not resume:\n{done[2].stdout}")
        first, second, resumed = (weights(out) for out in outs)
        start = weights(folder / "model")
        moved = relative(first, start)
        apart = relative(second, first)
        checks.add(f"resume, {name}: two runs left alone (moved {moved:.0e})", apart, moved / 2)
        gap = relative(resumed, first)
        checks.add(f"resume, {name}: killed and resumed", gap, 10 * apart)


def kill_at(command, log: Path, lines: int):
    """Start it, and kill it with -9 once its log has so many lines."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=common.ROOT,
        env=os.environ | common.OFFLINE,
        **quiet,
    )
    while child.poll() is None:
        if log.exists() and log.read_text().count("\n") >= lines:
            child.send_signal(signal.SIGKILL)
        time.sleep(0.01)


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def main():
    parser = common.parser(__doc__)
    parts = ["kernels", "attention", "blocks", "decoding", "scripts", "resume"]
    parser.add_argument("--try", action="store_true", dest="tiny", help="write no results")
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder")
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    checks, began = Checks(), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, small(args.tiny), 200, num_pairs=200)
        work = {
            "kernels": lambda: check_kernels(checks, device),
            "attention": lambda: check_attention(checks, device),
            "blocks": lambda: check_blocks(checks, device),
            "decoding": lambda: check_decoding(checks, device),
            "scripts": lambda: check_scripts(checks, folder, args.tiny),
            "resume": lambda: check_resume(checks, folder, args.tiny),
        }
        for part in args.only:
            try:
                work[part]()
            except Exception:
                checks.crashed(part, traceback.format_exc())
            print(f"---- {part}: {time.perf_counter() - began:.0f} s", flush=True)
    bad = [c["what"] for c in checks.found if not c["good"]]
    print(f"{len(checks.found) - len(bad)} of {len(checks.found)} good", *bad, sep="\n  ")
    if not args.tiny:
        result = {
            "device": torch.cuda.get_device_name(),
            **common.origin("torch", "triton"),
            "checks": checks.found,
        }
        name = "gpu_correctness.json"
        if args.only != parts:
            name = f"gpu_correctness_{'_'.join(args.only)}.json"
        common.save(args.out / name, result)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
