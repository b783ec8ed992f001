"""The bytes that each rank of a run holds, by part and moment, for plan.py.

It is what torch allocates, plus RESERVED on a GPU. Each formula says where it comes from.
tests/test_plan.py compares the sums with the profiler's memory events of real steps on a CPU. What
only CUDA allocates is checked by two peaks of one H200 (bench/results/train_step.json): the rest of
what depends on `cuda` below, on several GPUs above all, is derived from the code, not measured.

args: plan.py's flags, and what it derives from them.

Letters: N tokens of a micro-batch, M of them trained, L layers, D width, F width of the MLP, A
heads times their width, G the same of key/value heads, V vocabulary, R ranks that share a weight, b
bytes of a number in the dtype that computes.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from nanopost import divergence
from nanopost.config import Config
from nanopost.engine import PREFILL_TOKENS
from nanopost.logprob import CHUNK_ELEMENTS, CHUNK_ENTRIES, SAVED_ELEMENTS
from nanopost.lora import HEADS
from nanopost.model import ActorCritic, CausalLM, ScalarModel

NODE = 8  # GPUs of a node
RESERVED = 3e9  # assumed: CUDA's context, NCCL's buffers, and what the allocator cannot reuse
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes: 4 bits, a scale per 64, a scale per 256 of these

PAIRS = ("rm", "dpo", "kto", "online_dpo")
SAMPLE = ("online_dpo", "grpo", "ppo", "distill")
SCRIPTS = ("sft", *PAIRS, "grpo", "ppo", "distill")


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


def unit(units: tuple[Unit, ...], kind: str, rank: int = 0) -> Numbers:
    """Of one unit; of the largest of its blocks, for "block"."""
    sizes = []
    for u in units:
        if u.kind.endswith(kind):
            sizes.append(numbers((replace(u, count=1),), rank))
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


def teacher_is_sharded(args) -> bool:
    """Whether FSDP2 holds the teacher: it has no adapters, and its weights are in fp32."""
    return args.gpus > 1 or args.offload or compute_bytes(args) != 4


def samples_here(args) -> bool:
    """Whether a GPU that trains samples too."""
    return args.script in SAMPLE and not args.server_gpus


def rows_at_once(args) -> int:
    """Completions that a rank samples at once (Engine._generate)."""
    rows = -(-args.prompts // args.gpus) * args.group
    return max(1, min(rows, args.engine_rows, args.engine_tokens // longest(args)))


def longest(args) -> int:
    """Tokens of a row, of a sequence of a pair, or of a prompt and its completion."""
    return args.length + (args.max_new_tokens if args.script in SAMPLE else 0)


def completions(args) -> int:
    """Of a prompt, that are trained on: in online DPO the best and the worst of its group."""
    return 2 if args.script == "online_dpo" else args.group


def tokens_of_step(args) -> int:
    """Tokens that a step computes in its updates, over all ranks: a prompt once for all of its
    completions."""
    if args.script in SAMPLE:
        return args.prompts * (args.length + completions(args) * args.max_new_tokens)
    return args.rows * tokens_of_row(args)


def whole_tokens(args) -> float:
    """Tokens of whole sequences, for each one that is computed."""
    if args.script in SAMPLE:
        count = completions(args)
        return count * longest(args) / (args.length + count * args.max_new_tokens)
    return (2 if args.script in PAIRS else 1) * args.length / tokens_of_row(args)


def tokens_of_row(args) -> int:
    """Of a sequence, or of a pair, whose sides share --prompt."""
    return 2 * args.length - args.prompt if args.script in PAIRS else args.length


def tokens_of_micro_batch(args) -> int:
    """N. The tokens of an optimizer step, over all ranks, are cut into as few micro-batches as
    --tokens allows, the same number for each rank, and these filled evenly
    (packing.micro_batches)."""
    each = tokens_of_step(args) / args.minibatches / args.gpus
    if args.script == "online_dpo":
        least = args.length + 2 * args.max_new_tokens
    else:
        least = longest(args) if args.script in SAMPLE else tokens_of_row(args)
    return max(math.ceil(each / math.ceil(each / args.tokens)), least)


def least_tokens(args) -> int:
    """What --tokens must have room for: a sequence, or both sides of a pair. The scripts count the
    prompt in both, although they compute it once."""
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
    # Attention keeps q, k, v, its output, and the logsumexp in fp32; on a GPU, k and v of whole
    # sequences. On a CPU, where nothing is shared, o_proj reads a copy of the output: the stacks of
    # documents are put together (attention._stacked).
    whole = whole_tokens(args)
    attention = b * (A + 2 * G * (whole if cuda(args) else 1) + A) + 4 * c.heads
    if not cuda(args) and whole == 1:
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


# Buffers of a chunk of logits at the peaks of the forward and of the backward pass of
# divergence.from_teacher, as the profiler counts them: of a KL, of a Jensen-Shannon divergence, and
# of either over the teacher's likeliest tokens. AFTER: what the gradients of the weights wait with.
KL, JENSEN_SHANNON, LIKELIEST, AFTER = (6, 7), (7, 11), (5, 8), 4


def divergence_bytes(args, c: Config) -> tuple[float, float, float]:
    """As logprob_bytes, of a student and its teacher. What the teacher gave for the micro-batch
    before is there until the next forward pass ends."""
    N, D, V, b = tokens_of_micro_batch(args), c.width, c.vocab_size, compute_bytes(args)
    E = args.teacher_config.width if args.teacher_config else 0  # or it is on servers
    M = max(1, math.ceil(N * args.trained))
    chunk = divergence.CHUNK_ELEMENTS["cuda" if cuda(args) else "cpu"]
    buffer = 4 * V * min(M, max(16, chunk // V))
    of_forward, of_backward = KL if args.beta in (0, 1) else JENSEN_SHANNON
    if args.teacher_top_k:
        of_forward, of_backward = LIKELIEST
    head, of_teacher = 0, b * M * E
    if b == 2 and not cuda(args):  # both heads are converted to fp32, for a CPU's matmuls
        head, of_teacher = 4 * V * D, of_teacher + 4 * V * E
    total = 0 if args.lora else 4 * V * D  # the gradient of the head, which adds up in fp32
    beyond = total if b == 2 else 0  # or else it is the gradient in flight itself
    forward = of_forward * buffer + head + of_teacher + b * N * D
    backward = max(of_backward * buffer, AFTER * buffer + total) + head + beyond + b * M * D
    return b * M * D + of_teacher, forward, backward


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


def teacher_bytes(args) -> float:
    """A language model in fp32, in shards of its own."""
    if not args.teacher_config:
        return 0
    return 4 * numbers(args.teacher_units, 0, ranks(args)).trained


def teacher_head_bytes(args) -> float:
    """Its head, whole, in the dtype that computes, unless the model itself holds it so."""
    if not args.teacher_config or not teacher_is_sharded(args):
        return 0
    return compute_bytes(args) * args.teacher_config.vocab_size * args.teacher_config.width


def teacher_pass(args) -> tuple[float, float]:
    """Bytes of activations in a block of the teacher's forward pass, and of gathered weights: the
    root, a block, and the next one as it arrives."""
    c, b = args.teacher_config, compute_bytes(args)
    activations = tokens_of_micro_batch(args) * b * (3 * c.width + 3 * c.mlp_width)
    if not teacher_is_sharded(args):
        return activations, 0
    root, block = unit(args.teacher_units, "root"), unit(args.teacher_units, "block")
    return activations, b * (root.trained + 2 * block.trained)


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
    block, root = (unit(args.units, kind, args.lora) for kind in ("block", "root"))
    one, whole = gathered_bytes(args, block), gathered_bytes(args, root)
    inside, blocks = inside_a_block(args, c), blocks_activations(args, c)
    last, forward, backward = N * norm_bytes(args, c.width), 0, 0
    if args.script != "rm":
        of_head = divergence_bytes if args.script == "distill" else logprob_bytes
        kept, forward, backward = of_head(args, c)
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
    if args.teacher_config:
        activations, gathered = teacher_pass(args)
        instants.append(("the teacher's forward pass", activations, 0, gathered, 0))
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
    # engine.sample, per entry of the vocabulary, in fp32: logits, before and after the division by
    # the temperature, and probabilities.
    decode = 12 * rows * c.vocab_size
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
    always = {**held(args), "reference": reference_bytes(args), "teacher": teacher_bytes(args)}
    always["teacher's head"] = teacher_head_bytes(args)
    always["engine weights"] = engine_weights(args)
    if cuda(args):
        always["reserved"] = RESERVED
    training = update(args)
    if args.offload:  # on the host
        always |= {"weights": 0, "moments": 0, "reference": 0, "teacher": 0}
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
    mine = sum(held(args).values()) + gradient_bytes(args)
    mine += reference_bytes(args) + teacher_bytes(args)
    return mine * min(args.gpus, NODE)
