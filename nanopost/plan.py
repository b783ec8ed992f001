"""python -m nanopost.plan: what a run needs per GPU, and how long its steps take, before you rent.

    --model DIR --script grpo --gpus 64 --tokens 32768 --checkpointing full --server_gpus 16
    --model DIR --script sft --gpus 8 --gpu a100 --lora 16 --quantize nf4
    --model DIR --script distill --gpus 8 --teacher DIR

DIR needs no more than a config.json: nothing is allocated. Flags have the names, values and
defaults of the scripts. It prints the memory of a GPU by part, at each moment of a step that may be
the largest; the time of a step by part; and, if it does not fit, which flags make it fit, all of
them tried: first those that train all weights, then those with --lora, each by what a token costs.
Its tokens are those computed, a shared prompt once; the tokens_per_second of train_dpo.py,
train_kto.py and train_rm.py counts it in both sides of a pair.

The formulas of memory are in footprint.py. Times are estimates: rates by data sheets, times the
shares that UTILISATION and its neighbours state.
"""

import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

import torch

from nanopost import InputError, hf
from nanopost.batch import shared
from nanopost.cli import Parser, above, at_least, command, is_address
from nanopost.config import LINEAR, Config, Layer
from nanopost.dist import finish
from nanopost.footprint import (
    NODE,
    PAIRS,
    SAMPLE,
    SCRIPTS,
    asks_reference,
    cache_bytes,
    chunk_tokens,
    completions,
    compute_bytes,
    cuda,
    gathered,
    gathered_bytes,
    gradient_bytes,
    has_reference,
    held,
    host_bytes,
    least_tokens,
    longest,
    memory,
    numbers,
    peak,
    policy_size,
    queries,
    ranks,
    rows_at_once,
    samples_here,
    tokens_of_micro_batch,
    tokens_of_row,
    tokens_of_step,
    units_of,
)
from nanopost.terminal import say


# --------------------------------------------------------------------------------------------- GPUs
@dataclass(frozen=True)
class GPU:
    """memory: bytes. matmul: FLOP/s in bf16, dense. The others: bytes/s, of its memory, and one way
    to a GPU of the same node (link) and of another (network)."""

    memory: float
    matmul: float
    bandwidth: float
    link: float
    network: float


# From NVIDIA's data sheets: those of the SXM modules for h100, h200 and a100. A link is half of
# what they call total NVLink or PCIe bandwidth. The network is no part of a GPU: a DGX has one
# adapter of 400 Gb/s (H100, H200) or 200 Gb/s (A100) per GPU; 100 and 25 Gb/s are assumptions.
GPUS = {
    "h100": GPU(80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h200": GPU(141e9, 989e12, 4.8e12, 450e9, 50e9),
    "a100": GPU(80e9, 312e12, 2.039e12, 300e9, 25e9),
    "l40s": GPU(48e9, 362e12, 0.864e12, 32e9, 12.5e9),
    "rtx4090": GPU(24e9, 165e12, 1.008e12, 32e9, 3.1e9),
    "cpu": GPU(16e9, 0.1e12, 20e9, 5e9, 1e9),  # some CPU, in fp32: no data sheet
}
UTILISATION = 0.3  # of `matmul`: 0.29 was measured on an H200, without --compile (docs/results.md)
FP32 = 16  # times slower than bf16, without TF32
BANDWIDTH = 0.6  # assumed share of `bandwidth` that decoding and the optimizer reach
COLLECTIVES = 0.7  # assumed share of `link` and `network` that collectives reach
PCIE = 25e9  # bytes/s, assumed: what --offload moves between a GPU and its host
HOST = 20e9  # bytes/s, assumed: a rank's share of the host's memory bandwidth
# A decoding step of the native engine waits for its launches: 66 ms for 28 layers on an H200.
LAUNCHES = 66e-3 / 28

# Flags that only some scripts have, or that matter to memory and time in these alone.
ONLY = {
    "prompt": ("rm", "dpo", "kto"),
    "rows": ("sft", "rm", "dpo", "kto"),
    "reference": ("dpo", "kto"),
    "beta": ("grpo", "ppo", "distill"),
    "old_logp": ("grpo", "ppo"),
    "minibatches": ("grpo", "ppo", "distill"),
    "group": ("online_dpo", "grpo", "ppo"),
    "teacher": ("distill",),
    "teacher_top_k": ("distill",),
    "ppo_epochs": ("ppo",),
    "value_model": ("ppo",),
    **dict.fromkeys(
        (
            "prompts",
            "max_new_tokens",
            "max_staleness",
            "engine",
            "engine_rows",
            "engine_tokens",
            "server_gpus",
            "vllm_memory",
        ),
        SAMPLE,
    ),
}
# Defaults that differ between scripts.
DEFAULTS = {
    "online_dpo": {"prompts": 64, "group": 4, "minibatches": 1},
    "grpo": {"prompts": 64, "group": 8, "minibatches": 2},
    "ppo": {"prompts": 256, "group": 1, "minibatches": 2},
    "distill": {"prompts": 64, "group": 1, "minibatches": 1},
}


# --------------------------------------------------------------------------------------------- time
class Flops(NamedTuple):
    """Of a forward pass, per token."""

    matrices: float  # of the blocks, in those of a token's experts
    mixing: float  # attention, and the recurrence of linear attention
    head: float


def forward_flops(args, c: Config, length: float) -> Flops:
    """length: twice the keys that a token sees on average, where no window cuts them.

    The recurrence is in fp32, whatever else computes: where that is bf16 on a GPU, its operations
    count as many as take the same time.
    """
    matrices = mixing = 0.0
    slower = FP32 if cuda(args) and compute_bytes(args) == 2 else 1
    for layer in c.blocks:
        matrices += 2 * c.width * (mixer_rows(c, layer) + fed_rows(c, layer))
        if layer.kind == LINEAR:
            mixing += slower * recurrence_flops(c, chunk_tokens(args))
        else:
            mixing += 4 * c.heads * c.head_dim * mean_keys(length, layer.window)
    return Flops(matrices, mixing, 2 * c.vocab_size * c.width)


def mixer_rows(c: Config, layer: Layer) -> int:
    """Rows of width D of a block's matrices, those of o_proj or out_proj as columns."""
    if layer.kind != LINEAR:
        return queries(c) + c.heads * c.head_dim + 2 * c.kv_heads * c.head_dim
    s = c.delta
    return 2 * s.key_heads * s.key_dim + 3 * s.value_heads * s.value_dim + 2 * s.value_heads


def fed_rows(c: Config, layer: Layer) -> int:
    """Of the MLP, or of a token's experts, the one that all share, and their router."""
    if not layer.experts:
        return 3 * c.mlp_width
    e = c.experts
    return 3 * (e.active * e.width + e.shared) + e.count + (1 if e.shared else 0)


def mean_keys(length: float, window: int | None) -> float:
    """That a token sees."""
    if window is None or window >= length:
        return length / 2
    return window - window**2 / (2 * length)


def recurrence_flops(c: Config, size: int) -> float:
    """Of deltanet.delta_rule and the convolution before it, per token. size: tokens of a chunk."""
    s = c.delta
    K, W = s.key_dim, s.value_dim
    channels = 2 * s.key_heads * K + s.value_heads * W
    pairs = 2 * size * (2 * K + W)  # k k^T, q k^T, and the product of the latter with what is added
    system = size * (K + W)
    state = 3 * 2 * K * W  # two of each token with the state, and one that adds up the next one
    return s.value_heads * (pairs + system + state) + 2 * s.kernel * channels


def mean_length(args) -> float:
    """Twice the keys that a token of a step sees on average."""
    if args.script in PAIRS and args.script not in SAMPLE:
        return (2 * args.length**2 - args.prompt**2) / tokens_of_row(args)
    if args.script not in SAMPLE:
        return args.length
    prompt, new, count = args.length, args.max_new_tokens, completions(args)
    return (prompt**2 + count * new * (2 * prompt + new)) / (prompt + count * new)


def update_flops(args) -> float:
    """Of a step's updates, over all GPUs, with what comes before them without gradients."""
    tokens, length = tokens_of_step(args), mean_length(args)
    epochs = args.ppo_epochs if args.script == "ppo" else 1
    total = 0.0
    for c in (args.config, args.value_config):
        if c is None:
            continue
        is_policy = c is args.config and args.script != "rm"
        matrices, mixing, head = forward_flops(args, c, length)
        head *= is_policy * args.trained
        # Forward, input gradients and weight gradients; adapters need no weight gradients.
        passes = 2 if args.lora else 3
        # What is computed again ends before down_proj, if nothing waits for its output.
        again = 0 if args.checkpointing == "none" else mixing
        if args.checkpointing == "full":
            again += matrices
            if not c.traits.post_norms:
                dense = sum(not layer.experts for layer in c.blocks)
                again -= 2 * dense * c.width * c.mlp_width
        stored = (
            2 * tokens_of_micro_batch(args) * args.trained * c.vocab_size
            <= args.machine.memory / 16
        )
        if not (stored and cuda(args)) or args.script == "distill":
            again += head
        total += epochs * (passes * (matrices + head) + 3 * mixing + again)
        forward = matrices + mixing + head
        total += forward * passes_without_gradient(args, is_policy)
    if args.teacher_config:  # its head again in the backward pass
        matrices, mixing, head = forward_flops(args, args.teacher_config, length)
        total += matrices + mixing + 2 * head * args.trained
    return total * tokens


def passes_without_gradient(args, is_policy: bool) -> int:
    if not is_policy:
        return int(args.script == "ppo")  # the values before the update
    count = int(args.script == "kto")  # the first of the two passes
    count += asks_reference(args) and args.reference == "frozen"
    ours = args.script in ("grpo", "ppo") and args.old_logp == "trainer"
    return count + int(ours or args.script == "ppo" and args.beta > 0)


def micro_batches(args) -> int:
    """Of a rank in a step's updates."""
    each = tokens_of_step(args) / (args.gpus * args.minibatches * args.tokens)
    return optimizer_steps(args) * math.ceil(each)


def optimizer_steps(args) -> int:
    """Of a step: a rollout batch has several in GRPO and PPO."""
    return args.minibatches * (args.ppo_epochs if args.script == "ppo" else 1)


def seconds_between(args, size: float, members: int) -> float:
    """A ring's all-gather or reduce-scatter of `size` bytes over `members` ranks: each link carries
    all but a rank's own part."""
    rate = args.machine.link if members <= NODE else args.machine.network
    return size * (members - 1) / members / (rate * COLLECTIVES)


def collective_seconds(args) -> float:
    """Of a step's updates: weights gathered for each pass, gradients reduced in fp32."""
    if args.gpus == 1:
        return 0
    shards, count = ranks(args), micro_batches(args)
    every = gathered(args.units, args.lora, shards)
    weights, gradients = gathered_bytes(args, every), 4 * every.trained
    policy = gathered_bytes(args, gathered(args.policy, args.lora, shards))
    without = passes_without_gradient(args, True) * policy
    if args.teacher_config:
        without += compute_bytes(args) * gathered(args.teacher_units, 0, shards).trained
    epochs = args.ppo_epochs if args.script == "ppo" else 1
    gathers = count * 2 * weights + count / epochs * without
    reductions = optimizer_steps(args) if args.reduce == "step" else count
    total = seconds_between(args, gathers + reductions * gradients, shards)
    if args.replicas > 1:  # an all-reduce of the shards between replicas
        size = 2 * reductions * gradients / shards * (args.replicas - 1) / args.replicas
        rate = args.machine.network if args.gpus > NODE else args.machine.link
        total += size / (rate * COLLECTIVES)
    return total


def optimizer_seconds(args) -> float:
    """AdamW reads weight, gradient and two moments, and writes three of them: 28 bytes."""
    size = 28 * numbers(args.units, args.lora, ranks(args)).trained
    steps = optimizer_steps(args)
    if args.offload:  # shards go to the GPU for each pass, gradients come back
        moved = 2 * held(args)["weights"] + gradient_bytes(args)
        return steps * size / HOST + micro_batches(args) * moved / PCIE
    return steps * size / (args.machine.bandwidth * BANDWIDTH)


def rollout_seconds(args) -> float:
    """Prompts at the rate of matmuls; then each decoding step reads all weights, and the cache of
    all rows, half full on average. Completions are as long as --max_new_tokens."""
    c = args.config
    matrices, mixing, _ = forward_flops(args, c, args.length)
    gpus = args.server_gpus or args.gpus
    prefill = args.prompts * args.length * (matrices + mixing)
    prefill /= gpus * args.machine.matmul * UTILISATION
    rate = args.machine.bandwidth * BANDWIDTH
    tokens = args.length + args.max_new_tokens / 2
    if args.server_gpus or args.engine == "colocate":
        group = (
            servers_gpus(args) if args.server_gpus else 1
        )  # GPUs that hold one copy of the weights
        rows = -(-args.prompts * args.group * group // gpus)
        size = weights_read(args, rows) + rows * cache_bytes(args, tokens)
        return prefill + args.max_new_tokens * size / (group * rate)
    rows = rows_at_once(args)
    size = weights_read(args, rows) + rows * cache_bytes(args, tokens) + 24 * rows * c.vocab_size
    step = size / rate + (LAUNCHES * c.layers if cuda(args) else 0)
    rounds = -(-args.prompts // args.gpus) * args.group / rows
    return prefill + math.ceil(rounds) * args.max_new_tokens * step


def weights_read(args, rows: int) -> float:
    """Bytes of the weights that a decoding step reads: of experts those that a row takes, if rows
    take them at random."""
    c, size = args.config, policy_size(args)
    if c.experts:
        e, mixtures = c.experts, sum(layer.experts for layer in c.blocks)
        unused = (1 - e.active / e.count) ** rows
        size -= unused * mixtures * 3 * e.count * e.width * c.width
    return compute_bytes(args) * size


def servers_gpus(args) -> int:
    """GPUs that share one copy of the weights on a vLLM server: they take half of the memory."""
    needed = compute_bytes(args) * policy_size(args) / (0.5 * args.machine.memory)
    return 2 ** max(0, math.ceil(math.log2(needed)))


def sync_seconds(args) -> float:
    """Every weight gathered in fp32, then sent to the servers in the dtype that computes."""
    size = policy_size(args)
    total = seconds_between(args, 4 * size, ranks(args))
    if args.server_gpus:
        total += compute_bytes(args) * size / (args.machine.network * COLLECTIVES)
    return total


def seconds(args) -> dict[str, float]:
    """{part of a step: seconds}. Collectives overlap with what is computed: only what they take
    beyond it counts."""
    compute = update_flops(args) / (args.gpus * args.machine.matmul * UTILISATION)
    if cuda(args) and compute_bytes(args) == 4:
        compute *= FP32
    found = {
        "update": compute,
        "waiting for collectives": max(0.0, collective_seconds(args) - compute),
        "optimizer": optimizer_seconds(args),
    }
    if args.script in SAMPLE:
        found |= {"rollout": rollout_seconds(args), "sync": sync_seconds(args)}
    return found


def cost(args) -> float:
    """GPU-seconds per token, those of servers included."""
    return sum(seconds(args).values()) * (args.gpus + args.server_gpus) / tokens_of_step(args)


# ----------------------------------------------------------------------------------- what would fit
def changes(args) -> Iterator[list[dict]]:
    """What can be changed, one flag each, from its mildest value to its strongest."""
    if has_reference(args) and args.script in ("dpo", "kto"):
        yield [{"reference": "precomputed"}]
    halves = [tokens_of_micro_batch(args) // 2**i for i in range(1, 20)]
    yield [{"tokens": tokens} for tokens in halves if tokens >= least_tokens(args)]
    if args.reduce == "step" and args.gpus > 1:
        yield [{"reduce": "micro_batch"}]
    order = ("none", "selective", "full")
    yield [{"checkpointing": kind} for kind in order[order.index(args.checkpointing) + 1 :]]
    if samples_here(args):
        if args.engine == "native":
            halves = [args.engine_tokens // 2**i for i in range(1, 20)]
            yield [{"engine_tokens": tokens} for tokens in halves if tokens >= longest(args)]
        group = servers_gpus(args)
        servers = {"server_gpus": group * -(-max(1, args.gpus // 4) // group)}
        yield [servers if args.engine == "native" else {**servers, "engine": "native"}]
    yield [{"gpus": args.gpus * 2**i} for i in range(1, 11) if args.gpus * 2**i <= 1024]
    if not args.offload and cuda(args):
        yield [{"offload": True}]
    if not args.lora:
        yield [{"lora": 16}]
        if cuda(args):
            yield [{"lora": 16, "quantize": "nf4"}]
    elif args.quantize == "none" and cuda(args):
        yield [{"quantize": "nf4"}]


def fitting(args) -> list[tuple[dict, Namespace]]:
    """Ways to make it fit with at most three flags, by what a token costs, those first that train
    all weights -> [(changes, arguments)]. A way with more flags is left out unless a token costs
    less than with any of fewer."""
    axes = [axis for axis in changes(args) if axis]
    found = []
    for count in (1, 2, 3):
        least = min((cost(other) for _, other in found), default=math.inf)
        for chosen in combinations(axes, count):
            best = None
            for values in product(*chosen):
                change = {flag: value for part in values for flag, value in part.items()}
                other = Namespace(**{**vars(args), **change})
                if peak(other) <= args.machine.memory and cost(other) < least:
                    if best is None or cost(other) < cost(best[1]):
                        best = change, other
            if best:
                found.append(best)
    return sorted(found, key=lambda way: ("lora" in way[0], cost(way[1])))


# ------------------------------------------------------------------------------------------ command
def flags() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder with a config.json")
    add("--script", required=True, choices=SCRIPTS)
    add("--gpus", type=at_least(1), default=1, help="GPUs that train: ranks")
    add("--gpu", default="h100", choices=[*GPUS])
    add("--memory", type=above(0.0), help="GB of a GPU; default: its data sheet's")
    add("--tflops", type=above(0.0), help="dense bf16 TFLOP/s; default: its data sheet's")
    add("--bandwidth", type=above(0.0), help="GB/s of its memory; default: its data sheet's")
    add("--link", type=above(0.0), help="GB/s, one way, within a node")
    add("--network", type=above(0.0), help="GB/s per GPU, one way, between nodes")
    add("--length", type=at_least(1), default=512, help="tokens of a row, or of a prompt")
    add("--prompt", type=at_least(0), default=0, help="of these, how many a pair's sides share")
    add(
        "--trained",
        type=above(0.0, 1.0),
        help="share of the tokens that are trained; default: all, of rollouts the completions",
    )
    add("--tokens", type=at_least(2), default=8192, help="maximum tokens per micro-batch")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on a GPU")
    add("--kernels", default="auto", choices=["auto", "torch"])
    add("--checkpointing", default="none", choices=["none", "selective", "full"])
    add("--lora", type=at_least(0), default=0, metavar="RANK", help="0: all weights train")
    add("--quantize", default="none", choices=["none", "nf4"], help="what --lora freezes")
    add("--replicas", type=at_least(1), default=1, help="HSDP: copies of the sharded model")
    add("--offload", action="store_true", help="weights, gradients, moments on the host")
    add("--reduce", default="micro_batch", choices=["step", "micro_batch"], help="of gradients")
    add("--reproducible", action="store_true", help="gradients in fixed point")
    add("--rows", type=at_least(1), default=64, help="rows or pairs of a step")
    add("--reference", default="frozen", choices=["frozen", "precomputed"], help="of DPO and KTO")
    add("--beta", type=at_least(0.0), default=0.0, help="of GRPO and PPO; 0: no reference model")
    add(
        "--teacher",
        nargs="+",
        metavar="FOLDER",
        help="of distillation, or addresses of servers; default: as large as --model",
    )
    add("--teacher_top_k", type=at_least(0), default=0, help="its likeliest tokens; 0: all")
    add("--prompts", type=at_least(1), help="of a step; default: the script's")
    add("--group", type=at_least(1), help="samples per prompt; default: the script's")
    add("--minibatches", type=at_least(1), help="of a step; default: the script's")
    add("--ppo_epochs", type=at_least(1), default=2)
    add("--value_model", metavar="FOLDER", help="PPO's, or head; default: --model")
    add("--max_new_tokens", type=at_least(1), default=512)
    add("--old_logp", default="engine", choices=["engine", "trainer"])
    add("--max_staleness", type=at_least(0), default=0)
    add("--engine", default="native", choices=["native", "colocate"])
    add("--engine_rows", type=at_least(1), default=512)
    add("--engine_tokens", type=at_least(1), default=2**18)
    add(
        "--server_gpus",
        type=at_least(0),
        default=0,
        help="GPUs of vLLM servers, beside --gpus; the script takes their addresses, --vllm URL",
    )
    add("--vllm_memory", type=above(0.0, 1.0), default=0.3)
    return parser


def parsed(arguments=None) -> Namespace:
    """The flags, and beside them what is derived from files: config, value_config and
    teacher_config, units (of what trains), policy (units of the language model), teacher_units and
    machine.

    InputError for what no script could run."""
    parser = flags()
    args = parser.parse_args(arguments)
    for name, scripts in ONLY.items():
        if args.script not in scripts and getattr(args, name) != parser.get_default(name):
            raise InputError(f"--script {args.script} has no --{name}: leave it out.")
    for name, value in DEFAULTS.get(args.script, {"minibatches": 1}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.trained is None:
        args.trained = 1.0
        if args.script in SAMPLE:
            new = completions(args) * args.max_new_tokens
            args.trained = new / (args.length + new)
    args.config = hf.read_config(args.model)
    args.value_config = None
    if args.script == "ppo" and args.value_model != "head":
        args.value_config = hf.read_config(args.value_model or args.model).with_scalar_head(None)
    args.teacher_config = None
    if args.script == "distill" and not is_address((args.teacher or [""])[0]):
        args.teacher_config = hf.read_config((args.teacher or [args.model])[0])
    check(args)
    args.units = units_of(args.script, args.config, args.value_config)
    args.policy = units_of("grpo", args.config)
    if args.teacher_config:
        args.teacher_units = units_of("grpo", args.teacher_config)
    sheet = GPUS[args.gpu]
    given = {
        "memory": args.memory and args.memory * 1e9,
        "matmul": args.tflops and args.tflops * 1e12,
        "bandwidth": args.bandwidth and args.bandwidth * 1e9,
        "link": args.link and args.link * 1e9,
        "network": args.network and args.network * 1e9,
    }
    args.machine = GPU(**{name: value or getattr(sheet, name) for name, value in given.items()})
    return args


def check(args):
    """InputError for flags that do not go together."""
    if args.config.scalar and args.script != "rm":
        raise InputError(f"{args.model} is a reward model: --script {args.script} trains others.")
    if args.gpus % args.replicas:
        raise InputError(
            f"--gpus {args.gpus} does not divide into {args.replicas} replicas: change --replicas."
        )
    if args.reproducible and (args.reduce == "step" or args.replicas > 1):
        raise InputError("--reproducible takes neither --reduce step nor --replicas: drop them.")
    if args.quantize == "nf4" and not args.lora:
        raise InputError("--quantize nf4 is of weights that --lora freezes: add --lora RANK.")
    if args.server_gpus and args.engine == "colocate":
        raise InputError("--server_gpus and --engine colocate are two engines: give one of them.")
    if args.engine == "colocate" and args.max_staleness:
        raise InputError("--engine colocate sleeps while the model trains: drop --max_staleness.")
    if args.prompt >= args.length:
        raise InputError(
            f"--prompt {args.prompt} is what the sides of a pair share of --length {args.length}: "
            "give less than that."
        )
    if args.tokens < least_tokens(args):
        what = "a pair" if args.script in PAIRS else "a sequence"
        raise InputError(
            f"--tokens {args.tokens} is less than {what} of {least_tokens(args)} tokens: raise it, "
            "or lower --length or --max_new_tokens."
        )
    if longest(args) > args.config.max_positions:
        raise InputError(
            f"sequences of {longest(args)} tokens exceed the model's {args.config.max_positions} "
            "positions: lower --length or --max_new_tokens."
        )
    if samples_here(args) and args.engine == "native" and longest(args) > args.engine_tokens:
        raise InputError(
            f"sequences of {longest(args)} tokens exceed --engine_tokens {args.engine_tokens}: "
            "raise it."
        )


def table(args) -> list[str]:
    """Lines: memory by part and moment, and time by part."""
    moments = memory(args)
    parts = [part for part in dict.fromkeys(p for found in moments.values() for p in found)]
    unit, name = (1e9, "GB") if peak(args) >= 1e9 else (1e6, "MB")
    where = "CPU" if args.gpu == "cpu" else "GPU"
    lines = [f"{f'{name} per {where}':26s}" + "".join(f"{moment:>10s}" for moment in moments)]
    for part in parts:
        sizes = [found.get(part, 0) for found in moments.values()]
        if any(sizes):
            lines.append(f"  {part:24s}" + "".join(f"{size / unit:10.2f}" for size in sizes))
    sums = [sum(found.values()) for found in moments.values()]
    lines.append(f"  {'sum':24s}" + "".join(f"{size / unit:10.2f}" for size in sums))
    fits = "fits" if max(sums) <= args.machine.memory else "does not fit"
    lines.append(f"{fits} into {args.machine.memory / 1e9:.0f} GB ({args.gpu})")
    if host := host_bytes(args):
        lines.append(f"{host / 1e9:.0f} GB of a node's own memory")
    found = seconds(args)
    total, tokens = sum(found.values()), tokens_of_step(args)
    lines.append("seconds per step")
    lines += [f"  {part:24s}{value:10.2f}" for part, value in found.items()]
    lines.append(
        f"  {'sum':24s}{total:10.2f}: {tokens / total:,.0f} computed tokens per second, "
        f"{tokens / total / (args.gpus + args.server_gpus):,.0f} per {where}"
    )
    return lines


def on_host(args) -> str:
    """What --offload needs beside the GPU's memory."""
    size = host_bytes(args)
    return f", {size / 1e9:,.0f} GB of a node's own memory" if size else ""


def words(change: dict) -> str:
    """As on a command line."""
    found = []
    for name, value in change.items():
        found.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(found)


def end_dry_run(script: str, given: dict, world, rows: list):
    """What a step of a script takes of the hardware at hand, and how to ask for other hardware;
    then the script ends. given: its flags. rows: the lengths of its rows or of its prompts, or its
    pairs. A collective."""
    lengths, words = rows, ["--model", given["model"], "--script", script, "--gpus", world.size]
    if script in ONLY["prompt"]:
        lengths = [len(e) for pair in rows for e in pair]
    length = max(1, round(sum(lengths) / len(lengths)))
    words += ["--length", length]
    if script in ONLY["prompt"]:
        prompt = sum(shared(pair)[1] for pair in rows) // len(rows)
        words += ["--prompt", min(prompt, length - 1)]
    defaults = vars(flags().parse_args(list(map(str, words))))
    for name in sorted(given.keys() & defaults.keys() - {"model"}):
        value = given[name]
        if script not in ONLY.get(name, SCRIPTS) or value in (None, defaults[name]):
            continue
        several = value if isinstance(value, list) else [value]
        words += [f"--{name}"] if value is True else [f"--{name}", *several]
    here = ["--gpu", "cpu"]
    if torch.cuda.is_available() and given["device"] != "cpu":
        name = torch.cuda.get_device_name().lower()
        known = next((gpu for gpu in GPUS if gpu.removeprefix("rtx") in name), "h100")
        here = ["--gpu", known, "--memory", torch.cuda.mem_get_info()[1] / 1e9]
    if world.rank == 0:
        say(f"rows of {min(lengths):,} to {max(lengths):,} tokens, {length:,} on average")
        main([str(word) for word in words + here])
        other = [*words, "--gpu", "h100"]
        other[other.index("--gpus") + 1] = 8
        say(f"on eight H100: python -m nanopost.plan {shlex.join(map(str, other))}")
        if given.get("env"):
            say(f"of an episode, one of up to {given['max_turns']} answers is counted here")
        say("dry run: nothing was trained and nothing written")
    finish()
    sys.exit(0)


def main(arguments=None):
    args = parsed(arguments)
    size = numbers(args.units).trained
    count = micro_batches(args) // optimizer_steps(args)
    say(
        f"{args.script} of {size:,} parameters on {args.gpus} {args.gpu}: for each optimizer step, "
        f"each has {count} x {tokens_of_micro_batch(args):,} tokens"
    )
    say("\n".join(table(args)))
    if peak(args) <= args.machine.memory:
        return
    ways = fitting(args)
    say("what would make it fit:" if ways else "no three of these flags make it fit.")
    for change, other in ways[:6]:
        say(
            f"  {words(change):48s} {peak(other) / 1e9:6.1f} GB, "
            f"{1e6 * cost(other) / 3600:6.2f} GPU-hours per million tokens{on_host(other)}"
        )


if __name__ == "__main__":
    command(main)
