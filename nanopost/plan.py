"""python -m nanopost.plan: what a run needs per GPU, and how long its steps take, before you rent.

    --model DIR --script grpo --gpus 64 --tokens 32768 --checkpointing full --vllm 16
    --model DIR --script sft --gpus 8 --gpu a100 --lora 16 --quantize nf4

DIR needs no more than a config.json: nothing is allocated. Flags have the names, values and
defaults of the scripts. It prints the memory of a GPU by part, at each moment of a step that may be
the largest; the time of a step by part; and, if it does not fit, which flags make it fit, all of
them tried, those first that cost the fewest GPU-seconds per token.

Memory is what torch allocates, plus RESERVED on a GPU. Each formula says where it comes from.
tests/test_plan.py compares the sums with the profiler's memory events of real steps on a CPU. What
only CUDA allocates is checked by two peaks of one H200 (bench/results/train_step.json): the rest of
what depends on `cuda` below, on several GPUs above all, is derived from the code, not measured.
Times are estimates: rates by data sheets, times the shares that UTILISATION and its neighbours
state.

Letters: N tokens of a micro-batch, M of them trained, L layers, D width, F width of the MLP, A
heads times their width, G the same of key/value heads, V vocabulary, R ranks that share a weight, b
bytes of a number in the dtype that computes.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import torch

from nanopost import InputError, hf
from nanopost.cli import Parser, above, at_least
from nanopost.engine import PREFILL_TOKENS
from nanopost.logprob import CHUNK_ELEMENTS, CHUNK_ENTRIES, SAVED_ELEMENTS
from nanopost.lora import HEADS
from nanopost.model import ActorCritic, CausalLM, Config, ScalarModel
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
NODE = 8  # GPUs of a node
RESERVED = 3e9  # assumed: CUDA's context, NCCL's buffers, and what the allocator cannot reuse
UTILISATION = 0.3  # of `matmul`: 0.29 was measured on an H200, without --compile (docs/results.md)
FP32 = 16  # times slower than bf16, without TF32
BANDWIDTH = 0.6  # assumed share of `bandwidth` that decoding and the optimizer reach
COLLECTIVES = 0.7  # assumed share of `link` and `network` that collectives reach
PCIE = 25e9  # bytes/s, assumed: what --offload moves between a GPU and its host
HOST = 20e9  # bytes/s, assumed: a rank's share of the host's memory bandwidth
# A decoding step of the native engine waits for its launches: 66 ms for 28 layers on an H200.
LAUNCHES = 66e-3 / 28
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes: 4 bits, a scale per 64, a scale per 256 of these

PAIRS = ("rm", "dpo", "kto", "online_dpo")
SAMPLE = ("online_dpo", "grpo", "ppo")
SCRIPTS = ("sft", *PAIRS, "grpo", "ppo")
# Defaults that differ between scripts.
DEFAULTS = {
    "online_dpo": {"prompts": 64, "group": 4, "minibatches": 1},
    "grpo": {"prompts": 64, "group": 8, "minibatches": 2},
    "ppo": {"prompts": 256, "group": 1, "minibatches": 2},
}


# ------------------------------------------------------------------------------------------- models
@dataclass(frozen=True)
class Unit:
    """What FSDP2 shards and gathers at once: a block, of which there are `count`, or the root, with
    embeddings, last norms and heads."""

    kind: str  # root, block, or block of the value model
    count: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


def units_of(script: str, config: Config, value_config: Config | None = None) -> tuple[Unit, ...]:
    """The models that a script trains, on the meta device."""
    with torch.device("meta"):
        if script == "rm":
            model = ScalarModel(config)
        elif script == "ppo":
            model = ActorCritic(config, value_config)
        else:
            model = CausalLM(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    of_root = tuple((name, shape) for name, shape in shapes.items() if ".layers." not in name)
    units = [Unit("root", 1, of_root)]
    policy = "policy.model" if script == "ppo" else "model"
    for kind, decoder, c in (
        ("block", policy, config),
        ("value block", "value.model", value_config),
    ):
        first = f"{decoder}.layers.0."
        of_block = tuple((name, x) for name, x in shapes.items() if name.startswith(first))
        if of_block:
            units.append(Unit(kind, c.layers, of_block))
    return tuple(units)


def share(shape: tuple[int, ...], ranks: int) -> int:
    """Numbers of a parameter that rank 0 holds: FSDP2 cuts rows into pieces of equal size."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])


@lru_cache
def numbers(units: tuple[Unit, ...], rank: int = 0, ranks: int = 1) -> "Numbers":
    """How many the first of `ranks` holds. rank: of adapters on all linear layers of blocks; 0:
    everything trains."""
    trained = frozen = linear = 0
    for unit in units:
        for name, shape in unit.shapes:
            size = unit.count * share(shape, ranks)
            if not rank or name in HEADS:
                trained += size
            elif unit.kind != "root" and len(shape) == 2:
                linear += size
                out, into = shape
                trained += unit.count * (share((rank, into), ranks) + share((out, rank), ranks))
            else:
                frozen += size
    return Numbers(trained, frozen, linear)


class Numbers(NamedTuple):
    trained: int
    frozen: int  # by --lora, outside of
    linear: int  # linear layers of blocks


def unit(args, kind: str) -> Numbers:
    """Of one unit; of the largest of its blocks, for "block"."""
    sizes = []
    for u in args.units:
        if u.kind.endswith(kind):
            sizes.append(numbers((replace(u, count=1),), args.lora))
    return max(sizes, key=sum)


def policy_size(args) -> int:
    """Parameters of the language model."""
    return numbers(args.policy).trained


# -------------------------------------------------------------------------------------- what is set
def cuda(args) -> bool:
    return args.gpu != "cpu"


def compute_bytes(args) -> int:
    """b, as dist.init decides."""
    if args.dtype == "auto":
        return 2 if cuda(args) else 4
    return {"fp32": 4, "bf16": 2}[args.dtype]


def ranks(args) -> int:
    """R: the ranks that share each weight."""
    return args.gpus // args.replicas


def frozen_bytes(args, linear: bool) -> float:
    """Of a weight that --lora freezes: NF4, or, if bf16 computes, the folder's dtype."""
    if linear and args.quantize == "nf4":
        return NF4
    return args.config.dtype.itemsize if compute_bytes(args) == 2 else 4


def is_sharded(args) -> bool:
    """Whether FSDP2 holds the model (dist.shard): not on one rank that computes in the dtype in
    which it holds the weights."""
    b = compute_bytes(args)
    is_whole = b == 4 or (args.lora and frozen_bytes(args, linear=False) == b)
    return args.gpus > 1 or args.offload or not is_whole


def has_reference(args) -> bool:
    """Whether a second model is held. With --lora it is the same model without its adapters."""
    if args.lora:
        return False
    return args.script == "online_dpo" or asks_reference(args) and args.reference == "frozen"


def asks_reference(args) -> bool:
    if args.script in ("grpo", "ppo"):
        return args.beta > 0
    return args.script in ("dpo", "kto", "online_dpo")


def samples_here(args) -> bool:
    """Whether a GPU that trains samples too."""
    return args.script in SAMPLE and not args.vllm


def rows_at_once(args) -> int:
    """Completions that a rank samples at once (Engine._parts)."""
    rows = -(-args.prompts // args.gpus) * args.group
    return max(1, min(rows, args.engine_rows, args.engine_tokens // longest(args)))


def longest(args) -> int:
    """Tokens of a row, of a sequence of a pair, or of a prompt and its completion."""
    return args.length + (args.max_new_tokens if args.script in SAMPLE else 0)


def tokens_of_step(args) -> int:
    """Tokens that a step trains on, over all ranks, each once."""
    if args.script == "sft":
        return args.rows * args.length
    if args.script == "online_dpo":  # the best and the worst of each group
        return 2 * args.prompts * longest(args)
    if args.script in PAIRS:
        return 2 * args.rows * args.length
    return args.prompts * args.group * longest(args)


def tokens_of_micro_batch(args) -> int:
    """N. The tokens of an optimizer step, over all ranks, are cut into as few micro-batches as
    --tokens allows, the same number for each rank, and these filled evenly
    (packing.micro_batches)."""
    each = tokens_of_step(args) / args.minibatches / args.gpus
    return max(math.ceil(each / math.ceil(each / args.tokens)), least_tokens(args))


def least_tokens(args) -> int:
    """Of a micro-batch: it holds a whole sequence, or a pair."""
    return longest(args) * (2 if args.script in PAIRS else 1)


# ------------------------------------------------------------------------------ memory: activations
def block_activations(args, c: Config) -> float:
    """Bytes of one block that wait for its backward pass, all of them kept (model.Block)."""
    b = compute_bytes(args)
    D, F, A, G = c.width, c.mlp_width, c.heads * c.head_dim, c.kv_heads * c.head_dim
    # RMSNorm keeps its input and 1 / rms, in fp32; a CPU has no fused kernel, and keeps the input
    # in fp32, and the quotient too, for the gradient of the weight. Its output waits in the layer
    # that reads it.
    norms = 2 * (norm_bytes(args, D) + b * D)
    qk_norms = norm_bytes(args, A + G) + 4 * (c.heads + c.kv_heads - 1) if c.qk_norm else 0
    # Attention keeps q, k, v, its output, and the logsumexp in fp32. On a CPU, o_proj reads a copy
    # of the output: the stacks of documents are put together (attention._stacked).
    attention = b * (A + 2 * G + A) + 4 * c.heads
    if not cuda(args):
        attention += b * A
    mlp = b * 4 * F  # gate, up, silu(gate), and the product, which down_proj reads
    lora = b * 7 * args.lora  # x A^T, of each of seven layers
    return tokens_of_micro_batch(args) * (norms + qk_norms + attention + mlp + lora)


def norm_bytes(args, width: int) -> float:
    """Per token: what RMSNorm keeps of one row of a width."""
    if cuda(args):
        return compute_bytes(args) * width + 4
    return (4 if args.lora else 8) * width + 4


def kept_by_block(args, c: Config) -> float:
    """Bytes of each block from its forward to its backward pass, under --checkpointing."""
    N, b = tokens_of_micro_batch(args), compute_bytes(args)
    A, G = c.heads * c.head_dim, c.kv_heads * c.head_dim
    if args.checkpointing == "full":  # the input alone
        return N * b * c.width
    if args.checkpointing == "selective":  # and what the seven matrices gave
        return N * b * (3 * c.width + A + 2 * G + 2 * c.mlp_width)
    return block_activations(args, c)


def blocks_activations(args, c: Config) -> float:
    """Bytes of all blocks, and of cos and sin of the positions, in fp32."""
    rotary = tokens_of_micro_batch(args) * 4 * c.head_dim
    return c.layers * kept_by_block(args, c) + rotary


def inside_a_block(args, c: Config) -> float:
    """Bytes beyond that while the backward pass is in a block: what was recomputed of it, and the
    gradients of silu(gate), of up, and of the residual stream."""
    recomputed = block_activations(args, c) - kept_by_block(args, c)
    gradients = compute_bytes(args) * (2 * c.mlp_width + c.width)
    # NF4 is made whole a layer at a time: 4 bytes in fp32, beside 2 in the folder's dtype.
    layer = 6 * c.width * c.mlp_width if args.quantize == "nf4" else 0
    return recomputed + tokens_of_micro_batch(args) * gradients + layer


# -------------------------------------------------------------------------------- memory: log-probs
def logprob_bytes(args, c: Config) -> tuple[float, float, float]:
    """-> bytes that wait for the backward pass, and beyond them at the peaks of the forward and of
    the backward pass. Without the gradient of the head's weight."""
    N, D, V, b = tokens_of_micro_batch(args), c.width, c.vocab_size, compute_bytes(args)
    M = max(1, math.ceil(N * args.trained))
    if cuda(args) and b == 2 and args.kernels == "auto":  # kernels/logprob.py
        tiles = -(-V // 256) * M * 4  # a maximum, a sum and an entropy for each tile
        kept = b * M * D
        if 2 * M * V <= args.machine.memory / 16:  # e^(z-m)
            kept += 2 * M * V + tiles
        chunk = max(1024, 2**28 // (b * M))
        return kept, 3 * tiles + b * N * D, b * M * min(V, chunk) + 2 * 4 * M * D
    # logprob.py: three buffers of a chunk, two of this one and one of the last, not freed yet. In
    # the backward pass the chunk's part of the weight's gradient, in fp32, can be beside two. A
    # single chunk of few log-probs is saved, and needs a buffer less.
    device = "cuda" if cuda(args) else "cpu"
    chunk, saved = min(V, max(CHUNK_ENTRIES, CHUNK_ELEMENTS[device] // M)), 0
    if M * V <= SAVED_ELEMENTS:
        chunk, saved = V, 1
    buffer, part = 4 * M * chunk, 4 * chunk * D
    converted = 0 if b == 4 or cuda(args) else 4 * (M + chunk) * D  # to fp32, for a CPU's matmuls
    kept = b * M * D + saved * buffer
    forward = (3 - saved) * buffer + converted + b * N * D
    backward = (2 - saved) * buffer + max((1 - saved) * buffer, part) + converted + 4 * M * D
    return kept, forward, backward


# ----------------------------------------------------------------------------------- memory: update
def held(args) -> dict[str, float]:
    """Bytes of a rank from step to step."""
    mine = numbers(args.units, args.lora, ranks(args))
    frozen = frozen_bytes(args, False) * mine.frozen + frozen_bytes(args, True) * mine.linear
    return {"weights": 4 * mine.trained + frozen, "moments": 8 * mine.trained}


def gradient_bytes(args) -> float:
    """fp32 shards of a rank; with --reduce step, whole ones until the last micro-batch; with
    --reproducible, int64 sums, and no gradient from one micro-batch to the next."""
    if args.reproducible:
        return 8 * numbers(args.units, args.lora, ranks(args)).trained
    if args.reduce == "step" and args.gpus > 1:
        return 4 * numbers(args.units, args.lora).trained
    return 4 * numbers(args.units, args.lora, ranks(args)).trained


def gathered_bytes(args, of: Numbers) -> float:
    """What FSDP2 gathers, whole, in the dtype that computes; NF4 stays packed."""
    if not is_sharded(args):
        return 0
    b = compute_bytes(args)
    linear = NF4 if args.quantize == "nf4" else b
    return b * (of.trained + of.frozen) + linear * of.linear


def reference_bytes(args) -> float:
    """A language model in fp32, in shards of its own (hf.load_model)."""
    if not has_reference(args):
        return 0
    return 4 * numbers(args.policy, 0, ranks(args)).trained


def engine_weights(args) -> float:
    """The native engine's copy, whole, in the dtype that computes: none on one rank that holds the
    weights in it (Engine.beside)."""
    if not samples_here(args) or args.engine == "colocate":
        return 0
    if not is_sharded(args) and not args.max_staleness:
        return 0
    return compute_bytes(args) * policy_size(args)


def update(args) -> dict[str, float]:
    """Bytes of a rank at the worst instant of an update's second micro-batch, or of a later one:
    there are gradients already. {part: bytes}"""
    c, v, b, N = args.config, args.value_config, compute_bytes(args), tokens_of_micro_batch(args)
    sharded, full = is_sharded(args), not args.lora
    block, root = unit(args, "block"), unit(args, "root")
    one, whole = gathered_bytes(args, block), gathered_bytes(args, root)
    inside, blocks = inside_a_block(args, c), blocks_activations(args, c)
    last, forward, backward = N * norm_bytes(args, c.width), 0, 0
    if args.script != "rm":
        kept, forward, backward = logprob_bytes(args, c)
        last += kept

    # Gradients of weights are new tensors. Without FSDP2 they are added to those of the
    # micro-batches before at once, but a tied head's waits for the embedding's. FSDP2 holds those
    # of a unit until all are there, copies them into one fp32 buffer to reduce, and holds this
    # until the next unit's.
    embedding = full * b * c.vocab_size * c.width
    head = 0 if args.script == "rm" else embedding
    waiting = head if sharded or c.tied else 0
    down = full * sharded * b * c.width * c.mlp_width  # down_proj's, the first of a block
    buffer = sharded * 4 * block.trained
    mine = buffer / ranks(args)
    ended = sharded * b * block.trained + buffer + mine
    of_root = sharded * (b * root.trained + 4 * root.trained + 4 * root.trained / ranks(args))
    if args.reproducible:  # two of fp64 while fixed point is computed, and this pass's gradients
        gradients = 4 * numbers(args.units, args.lora, ranks(args)).trained
        ended += sharded * 16 * block.trained
        of_root += sharded * 16 * root.trained + gradients
        if not sharded:
            of_root += 16 * max(math.prod(shape) for u in args.units for _, shape in u.shapes)

    # In a backward pass FSDP2 holds the root, a block, and the next one as it arrives.
    instants = [
        ("the head's forward pass", blocks + last, forward, whole + one, 0),
        ("the head's backward pass", blocks + last, backward, whole + one, head),
        ("the last block", blocks + inside, 0, whole + 2 * one, waiting + down),
        (
            "the block before it",
            blocks - kept_by_block(args, c) + inside,
            0,
            whole + 2 * one,
            waiting + down + buffer,
        ),
        ("a block's end", blocks - kept_by_block(args, c), 0, whole + one, waiting + ended),
        ("the embedding", 0, 0, whole, waiting + embedding + buffer),
        ("the root's end", 0, 0, 0, of_root),
    ]
    if args.script == "ppo":  # the value model runs last: its backward pass comes first
        waits = blocks + last + N * 4 * c.width  # hidden states, in fp32
        if v:
            waits += blocks_activations(args, v) + inside_a_block(args, v)
            if sharded:  # its embedding is in the root, too
                more = full * b * v.vocab_size * v.width
                instants = [(*others, flight + more) for *others, flight in instants[:-1]]
                instants.append(("the root's end", 0, 0, 0, of_root))
        instants.append(("the value model", waits, 0, whole + 2 * one, down + buffer))
    name, *parts = max(instants, key=lambda parts: sum(parts[1:]))
    names = ("activations", "log-prob buffers", "gathered weights", "gradients in flight")
    return {"gradients": gradient_bytes(args), **dict(zip(names, parts))}


# ---------------------------------------------------------------------------- memory: other moments
def cache_bytes_per_token(args) -> float:
    """Keys and values in all layers (attention.Cache)."""
    c = args.config
    return 2 * c.layers * c.kv_heads * c.head_dim * compute_bytes(args)


def rollout(args) -> dict[str, float]:
    """Bytes of a rank that samples with its own engine, beside what it holds."""
    c, b, rows = args.config, compute_bytes(args), rows_at_once(args)
    if args.engine == "colocate":
        return {"vLLM": args.vllm_memory * args.machine.memory}
    # engine.sample, per entry of the vocabulary: logits and log-probs in fp32, and in fp64 the
    # probabilities and their cumulative sum.
    decode = 24 * rows * c.vocab_size
    # A prompt of several samples is computed once: norms, q, k, v, their fp32 copies, and the MLP.
    prompts = min(PREFILL_TOKENS, -(-rows // args.group) * args.length)
    prefill = prompts * b * (3 * c.width + 3 * c.mlp_width)
    return {
        "KV cache": rows * longest(args) * cache_bytes_per_token(args),
        "decoding, or prompts": max(decode, prefill),
    }


def sync(args) -> dict[str, float]:
    """Bytes of a rank while weights go to the engine, one at a time (dist.full_weights): a whole
    one in fp32, and what it was gathered into. One rank sends its own tensor."""
    one = 4 * max(math.prod(shape) for u in args.policy for _, shape in u.shapes)
    if args.lora:
        return {"gathered weights": one * (2 if args.gpus > 1 else 1)}  # the merged one is new
    return {"gathered weights": 2 * one if args.gpus > 1 else 0}


def memory(args) -> dict[str, dict[str, float]]:
    """{moment of a step: {part: bytes per GPU}}."""
    always = {**held(args), "reference": reference_bytes(args)}
    always["engine weights"] = engine_weights(args)
    if cuda(args):
        always["reserved"] = RESERVED
    training = update(args)
    if args.offload:  # on the host
        always |= {"weights": 0, "moments": 0, "reference": 0}
        training["gradients"] = 0
    moments = {"update": {**always, **training}}
    if samples_here(args):
        moments["rollout"] = {**always, **rollout(args)}
    if args.script in SAMPLE:
        moments["sync"] = {**always, **sync(args)}
    return moments


def peak(args) -> float:
    """Bytes of a GPU at the worst moment."""
    return max(sum(parts.values()) for parts in memory(args).values())


def host_bytes(args) -> float:
    """Of a node's memory, with --offload."""
    if not args.offload:
        return 0
    mine = sum(held(args).values()) + gradient_bytes(args) + reference_bytes(args)
    return mine * min(args.gpus, NODE)


# --------------------------------------------------------------------------------------------- time
def forward_flops(c: Config, length: int) -> tuple[float, float, float]:
    """Per token: of the blocks' matrices, of causal attention over half a sequence, and of the
    head."""
    A, G = c.heads * c.head_dim, c.kv_heads * c.head_dim
    matrices = 2 * c.layers * c.width * (2 * A + 2 * G + 3 * c.mlp_width)
    attention = 4 * c.layers * A * length / 2
    return matrices, attention, 2 * c.vocab_size * c.width


def update_flops(args) -> float:
    """Of a step's updates, over all GPUs, with what comes before them without gradients."""
    tokens, length = tokens_of_step(args), longest(args)
    epochs = args.ppo_epochs if args.script == "ppo" else 1
    total = 0.0
    for c in (args.config, args.value_config):
        if c is None:
            continue
        is_policy = c is args.config and args.script != "rm"
        matrices, attention, head = forward_flops(c, length)
        head *= is_policy * args.trained
        # Forward, input gradients and weight gradients; adapters need no weight gradients.
        passes = 2 if args.lora else 3
        # What is computed again ends before down_proj, whose output nothing waits for.
        again = 0 if args.checkpointing == "none" else attention
        if args.checkpointing == "full":
            again += matrices - 2 * c.layers * c.width * c.mlp_width
        stored = (
            2 * tokens_of_micro_batch(args) * args.trained * c.vocab_size
            <= args.machine.memory / 16
        )
        if not (stored and cuda(args)):
            again += head
        total += epochs * (passes * (matrices + head) + 3 * attention + again)
        forward = matrices + attention + head
        total += forward * passes_without_gradient(args, is_policy)
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
    every = numbers(args.units, args.lora)
    weights, gradients = gathered_bytes(args, every), 4 * every.trained
    policy = gathered_bytes(args, numbers(args.policy, args.lora))
    without = passes_without_gradient(args, True) * policy
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
    c, b = args.config, compute_bytes(args)
    weights = b * policy_size(args)
    matrices, attention, _ = forward_flops(c, args.length)
    gpus = args.vllm or args.gpus
    prefill = args.prompts * args.length * (matrices + attention)
    prefill /= gpus * args.machine.matmul * UTILISATION
    rate = args.machine.bandwidth * BANDWIDTH
    tokens = args.length + args.max_new_tokens / 2
    if args.vllm or args.engine == "colocate":
        group = servers_gpus(args) if args.vllm else 1  # GPUs that hold one copy of the weights
        rows = -(-args.prompts * args.group * group // gpus)
        size = weights + rows * tokens * cache_bytes_per_token(args)
        return prefill + args.max_new_tokens * size / (group * rate)
    rows = rows_at_once(args)
    size = weights + rows * tokens * cache_bytes_per_token(args) + 24 * rows * c.vocab_size
    step = size / rate + (LAUNCHES * c.layers if cuda(args) else 0)
    rounds = -(-args.prompts // args.gpus) * args.group / rows
    return prefill + math.ceil(rounds) * args.max_new_tokens * step


def servers_gpus(args) -> int:
    """GPUs that share one copy of the weights on a vLLM server: they take half of the memory."""
    needed = compute_bytes(args) * policy_size(args) / (0.5 * args.machine.memory)
    return 2 ** max(0, math.ceil(math.log2(needed)))


def sync_seconds(args) -> float:
    """Every weight gathered in fp32, then sent to the servers in the dtype that computes."""
    size = policy_size(args)
    total = seconds_between(args, 4 * size, ranks(args))
    if args.vllm:
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
    return sum(seconds(args).values()) * (args.gpus + args.vllm) / tokens_of_step(args)


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
        servers = {"vllm": group * -(-max(1, args.gpus // 4) // group)}
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
def parsed(arguments=None) -> Namespace:
    """The flags, and beside them what is derived from files: config,
    value_config, units (of what trains), policy (units of the language model) and machine.

    InputError for what no script could run."""
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
    add("--vllm", type=at_least(0), default=0, metavar="GPUS", help="GPUs of vLLM servers, beside")
    add("--vllm_memory", type=above(0.0, 1.0), default=0.3)
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS.get(args.script, {"minibatches": 1}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.trained is None:
        args.trained = args.max_new_tokens / longest(args) if args.script in SAMPLE else 1.0
    args.config = hf.read_config(args.model)
    args.value_config = None
    if args.script == "ppo" and args.value_model != "head":
        args.value_config = hf.read_config(args.value_model or args.model).with_scalar_head(None)
    check(args)
    args.units = units_of(args.script, args.config, args.value_config)
    args.policy = units_of("grpo", args.config)
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
    if args.vllm and args.script not in SAMPLE:
        raise InputError(f"--script {args.script} samples nothing: drop --vllm.")
    if args.vllm and args.engine == "colocate":
        raise InputError("--vllm and --engine colocate are two engines: give one of them.")
    if args.engine == "colocate" and args.max_staleness:
        raise InputError("--engine colocate sleeps while the model trains: drop --max_staleness.")
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
    lines = [f"{'GB per GPU':26s}" + "".join(f"{moment:>10s}" for moment in moments)]
    for part in parts:
        sizes = [found.get(part, 0) for found in moments.values()]
        if any(sizes):
            lines.append(f"  {part:24s}" + "".join(f"{size / 1e9:10.2f}" for size in sizes))
    sums = [sum(found.values()) for found in moments.values()]
    lines.append(f"  {'sum':24s}" + "".join(f"{size / 1e9:10.2f}" for size in sums))
    fits = "fits" if max(sums) <= args.machine.memory else "does not fit"
    lines.append(f"{fits} into {args.machine.memory / 1e9:.0f} GB ({args.gpu})")
    if host := host_bytes(args):
        lines.append(f"{host / 1e9:.0f} GB of a node's own memory")
    found = seconds(args)
    total, tokens = sum(found.values()), tokens_of_step(args)
    lines.append("seconds per step")
    lines += [f"  {part:24s}{value:10.2f}" for part, value in found.items()]
    lines.append(
        f"  {'sum':24s}{total:10.2f}: {tokens / total:,.0f} tokens per second, "
        f"{tokens / total / (args.gpus + args.vllm):,.0f} per GPU"
    )
    return lines


def words(change: dict) -> str:
    """As on a command line."""
    found = []
    for name, value in change.items():
        found.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(found)


def main(arguments=None):
    args = parsed(arguments)
    size = numbers(args.units).trained
    count = micro_batches(args) // optimizer_steps(args)
    say(
        f"{args.script} of {size / 1e9:.2f}B parameters on {args.gpus} {args.gpu}: for each "
        f"optimizer step, a GPU has {count} x {tokens_of_micro_batch(args):,} tokens"
    )
    say("\n".join(table(args)))
    if peak(args) <= args.machine.memory:
        return
    ways = fitting(args)
    say("what would make it fit:" if ways else "no three of these flags make it fit.")
    for change, other in ways[:6]:
        say(
            f"  {words(change):48s} {peak(other) / 1e9:6.1f} GB, "
            f"{1e6 * cost(other) / 3600:6.2f} GPU-hours per million tokens"
        )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
