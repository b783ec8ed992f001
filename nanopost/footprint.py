"""The bytes that each rank of a run holds, by part and moment, for plan.py.

It is what torch allocates, plus RESERVED on a GPU. Each formula says where it comes from.
tests/test_plan.py compares the sums with the profiler's memory events of real steps on a CPU. What
only CUDA allocates is checked by two peaks of one H200 (bench/results/train_step.json): the rest of
what depends on `cuda` below, on several GPUs above all, is derived from the code, not measured.

args: plan.py's flags, and what it derives from them.

Letters: N tokens of a micro-batch, M of them trained, L layers, D width, F width of the MLP, A
heads times their width, G the same of key/value heads, V vocabulary, R ranks that share a weight, b
bytes of a number in the dtype that computes. In linear attention H value heads, K and W width of a
key and of a value, C channels of the convolution and J tokens that it sees, T tokens of a chunk.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from nanopost import deltanet, divergence, lora
from nanopost.config import LINEAR, Config, Layer
from nanopost.engine import PREFILL_TOKENS
from nanopost.logprob import CHUNK_ELEMENTS, CHUNK_ENTRIES, SAVED_ELEMENTS
from nanopost.model import ActorCritic, CausalLM, ScalarModel

NODE = 8  # GPUs of a node
RESERVED = 3e9  # assumed: CUDA's context, NCCL's buffers, and what the allocator cannot reuse
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes: 4 bits, a scale per 64, a scale per 256 of these

PAIRS = ("rm", "dpo", "kto", "online_dpo")
SAMPLE = ("online_dpo", "grpo", "ppo", "distill")
SCRIPTS = ("sft", *PAIRS, "grpo", "ppo", "distill")


# ------------------------------------------------------------------------------------------- models
class Weight(NamedTuple):
    name: str
    shape: tuple[int, ...]
    linear: bool  # of a linear layer of a block


@dataclass(frozen=True)
class Unit:
    """What FSDP2 shards and gathers at once: a block, or the root, with embeddings, last norms and
    heads. layers: which blocks have these weights; of the root one."""

    kind: str  # root, block, or block of the value model
    layers: tuple[int, ...]
    weights: tuple[Weight, ...]


def units_of(script: str, config: Config, value_config: Config | None = None) -> tuple[Unit, ...]:
    """The models that a script trains, on the meta device."""
    with torch.device("meta"):
        if script == "rm":
            model = ScalarModel(config)
        elif script == "ppo":
            model = ActorCritic(config, value_config)
        else:
            model = CausalLM(config)
    linear = lora.linear_layers(model)
    units = [Unit("root", (0,), _weights(model, linear, but=".layers."))]
    decoders = {"block": "policy.model" if script == "ppo" else "model"}
    if value_config:
        decoders["value block"] = "value.model"
    for kind, path in decoders.items():
        equal = {}  # weights, with the names that they have in a block -> its blocks
        for layer, block in enumerate(model.get_submodule(path).layers):
            prefix = f"{path}.layers.{layer}."
            equal.setdefault(_weights(block, linear, prefix), []).append(layer)
        units += [Unit(kind, tuple(layers), weights) for weights, layers in equal.items()]
    return tuple(units)


def _weights(module, linear, prefix="", but=None) -> tuple[Weight, ...]:
    """prefix: of the module's names among those of `linear`. but: without names that have this."""
    found = []
    for name, p in module.named_parameters():
        if but is None or but not in name:
            layer = (prefix + name).rpartition(".")[0]
            is_matrix = layer in linear and p.ndim == 2
            found.append(Weight(name, tuple(p.shape), is_matrix))
    return tuple(found)


def share(shape: tuple[int, ...], ranks: int) -> int:
    """Numbers of a parameter that rank 0 holds: FSDP2 cuts rows into pieces of equal size."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])


@lru_cache
def numbers(units: tuple[Unit, ...], rank: int = 0, ranks: int = 1) -> "Numbers":
    """How many the first of `ranks` holds. rank: of adapters on all linear layers of blocks; 0:
    everything trains."""
    trained = frozen = linear = 0
    for unit in units:
        count = len(unit.layers)
        for name, shape, is_linear in unit.weights:
            size = count * share(shape, ranks)
            if not rank or name in lora.HEADS:
                trained += size
            elif is_linear:
                linear += size
                out, into = shape
                trained += count * (share((rank, into), ranks) + share((out, rank), ranks))
            else:
                frozen += size
    return Numbers(trained, frozen, linear)


class Numbers(NamedTuple):
    trained: int
    frozen: int  # by --lora, outside of
    linear: int  # linear layers of blocks


def gathered(units: tuple[Unit, ...], rank: int = 0, ranks: int = 1) -> Numbers:
    """Of all ranks, with the rows that FSDP2 adds to cut them evenly: 8 experts are gathered by 64
    ranks as 64."""
    return Numbers(*(ranks * count for count in numbers(units, rank, ranks)))


def unit(units: tuple[Unit, ...], kind: str, rank: int = 0, ranks: int = 1) -> Numbers:
    """One unit, gathered; of blocks, for "block", the largest."""
    each = [(replace(u, layers=u.layers[:1]),) for u in units if u.kind.endswith(kind)]
    return max((gathered(u, rank, ranks) for u in each), key=sum)


def block(units: tuple[Unit, ...], layer: int, rank: int = 0, ranks: int = 1) -> Numbers:
    """One block of the policy, gathered."""
    (found,) = [u for u in units if u.kind == "block" and layer in u.layers]
    return gathered((replace(found, layers=(layer,)),), rank, ranks)


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
def block_activations(args, c: Config, layer: Layer) -> float:
    """Bytes of one block that wait for its backward pass, all of them kept (model.Block)."""
    b, D = compute_bytes(args), c.width
    # RMSNorm's output waits in the layer that reads it, but for those whose output is added, and
    # for what frozen experts read.
    norms = 2 * (norm_bytes(args, c, D) + b * D)
    if args.lora and layer.experts and not c.experts.shared:
        norms -= b * D
    if c.traits.post_norms:
        norms += 2 * norm_bytes(args, c, D)
    mixed = linear_attention(args, c) if layer.kind == LINEAR else attention(args, c, layer)
    adapters = b * args.lora * adapted(c, layer)  # x A^T
    kept = tokens_of_micro_batch(args) * (norms + mixed + fed(args, c, layer) + adapters)
    return kept + mask_bytes(args, layer)


def norm_bytes(args, c: Config, width: int) -> float:
    """Per token: what RMSNorm keeps of one row of a width: its input and 1 / rms, in fp32. A CPU
    has no fused kernel, and keeps the input in fp32, and the quotient too, for the gradient of the
    weight; so does a norm with an offset, whose input is in fp32."""
    if cuda(args):
        return (4 if c.traits.norm_offset else compute_bytes(args)) * width + 4
    return (4 if args.lora else 8) * width + 4


def attention(args, c: Config, layer: Layer) -> float:
    """Per token: q, k, v, the output, and the logsumexp in fp32; on a GPU, k and v of whole
    sequences. On a CPU, where nothing is shared, o_proj reads a copy of the output: the stacks of
    documents are put together (attention._stacked). So it is with a window, for whole sequences."""
    b, A, G = compute_bytes(args), c.heads * c.head_dim, c.kv_heads * c.head_dim
    whole, on_cpu = whole_tokens(args), not cuda(args)
    in_stacks = on_cpu and (whole == 1 or is_cut(args, layer))
    queries = whole if in_stacks else 1
    keys = 1 if on_cpu and not in_stacks else whole
    kept = queries * (b * 2 * A + 4 * c.heads) + keys * b * 2 * G
    if in_stacks:
        kept += b * A
    if c.traits.qk_norm:
        kept += norm_bytes(args, c, A + G) + 4 * (c.heads + c.kv_heads - 1)
    if c.traits.gated_attention:  # the sigmoid, and the product, which o_proj reads
        kept += b * 2 * A
        if b == 4:  # q and its gate are one tensor, and q_norm keeps q
            kept += b * A
    return kept


def mask_bytes(args, layer: Layer) -> float:
    """On a CPU a window is a mask of numbers, for documents as long as the longest."""
    return compute_bytes(args) * longest(args) ** 2 if is_cut(args, layer) and not cuda(args) else 0


def is_cut(args, layer: Layer) -> bool:
    """Whether a window leaves out keys."""
    return layer.window is not None and layer.window < longest(args)


def linear_attention(args, c: Config) -> float:
    """Per token, of deltanet.DeltaNet."""
    b, s = compute_bytes(args), c.delta
    H, K, W, T = s.value_heads, s.key_dim, s.value_dim, chunk_tokens(args)
    padded = sum(-(-piece // T) * T for piece in pieces(args)) / sum(pieces(args))
    # J products of the convolution, for the gradient of its weight; its SiLU keeps what it reads,
    # and the lengths of q and k are computed from what it gives.
    channels = 2 * s.key_heads * K + H * W
    convolution = channels * ((0 if args.lora else s.kernel * b) + 2 * 4)
    # q, k and v in chunks, and the factors of products of matrices, which are copies: beta k and q,
    # k with each of these, q and k with the state; what the triangular system gives for v and k,
    # and what is added to the state.
    vectors = 4 * H * ((3 + 4 + 2) * K + 3 * W)
    squares = 4 * H * 5 * T  # decays, k k^T, the system, q k^T and its product with decays
    states = 4 * H * K * W / T
    scalars = 4 * H * 7 + 8 * s.key_heads
    norm = norm_bytes_of_heads(args, H, W) + H * W * (2 * b + 2 * 4)  # SiLU in fp32
    return convolution + padded * (vectors + squares + states) + scalars + norm


def norm_bytes_of_heads(args, heads: int, width: int) -> float:
    """As norm_bytes, of a norm without an offset over each head."""
    if cuda(args):
        return heads * (compute_bytes(args) * width + 4)
    return heads * ((4 if args.lora else 8) * width + 4)


def pieces(args) -> list[int]:
    """Tokens of the parts into which deltanet.Chunks.of cuts what begins alike: what is shared, and
    what each sequence has of its own."""
    if args.script in SAMPLE and completions(args) > 1:
        return [args.length, *[args.max_new_tokens] * completions(args)]
    if args.script in PAIRS and args.script not in SAMPLE and args.prompt:
        return [args.prompt, *[args.length - args.prompt] * 2]
    return [longest(args)]


def chunk_tokens(args) -> int:
    """T."""
    return min(deltanet.LONGEST, -(-max(pieces(args)) // 16) * 16)


def fed(args, c: Config, layer: Layer) -> float:
    """Per token, of the MLP: gate, up, silu(gate), and the product, which down_proj reads. Of
    experts (moe.MoE) as much of each that a token takes, and what comes out; indices, and the
    scores of all. What an expert's matrices read is kept for their gradients, which --lora does
    not ask for. The output of the shared one is scaled."""
    b, D = compute_bytes(args), c.width
    if not layer.experts:
        return b * 4 * c.mlp_width
    e = c.experts
    read = 0 if args.lora else D + e.width
    kept = e.active * (b * (3 * e.width + D + read) + 3 * 8) + 4 * e.count
    if e.shared:
        kept += b * (4 * e.shared + D + 1)
    return kept


def fed_products(c: Config, layer: Layer) -> int:
    """What the matrices of the MLP give, per token."""
    if not layer.experts:
        return 2 * c.mlp_width + c.width
    e = c.experts
    shared = 2 * e.shared + c.width + 1 if e.shared else 0
    return e.count + e.active * (2 * e.width + c.width) + shared


def adapted(c: Config, layer: Layer) -> int:
    """Linear layers of a block: not the experts, but the one that is shared, and its gate."""
    mixer = 5 if layer.kind == LINEAR else 4
    if layer.experts:
        return mixer + (4 if c.experts.shared else 0)
    return mixer + 3


def kept_by_block(args, c: Config, layer: Layer) -> float:
    """Bytes of a block from its forward to its backward pass, under --checkpointing."""
    N, b = tokens_of_micro_batch(args), compute_bytes(args)
    if args.checkpointing == "full":  # the input alone
        return N * b * c.width
    if args.checkpointing == "selective":  # and what its matrices gave
        if layer.kind == LINEAR:
            s = c.delta
            values = s.value_heads * s.value_dim
            mixed = 2 * s.key_heads * s.key_dim + 2 * values + 2 * s.value_heads
        else:
            mixed = queries(c) + 2 * c.kv_heads * c.head_dim
        return N * b * (2 * c.width + mixed + fed_products(c, layer))
    return block_activations(args, c, layer)


def queries(c: Config) -> int:
    """Rows of q_proj: with gated attention, of the gate too."""
    return c.heads * c.head_dim * (2 if c.traits.gated_attention else 1)


def blocks_activations(args, c: Config, last: int | None = None) -> float:
    """Bytes of all blocks, or of those up to one, and of cos and sin of the positions, in fp32."""
    turned = sum(int(c.head_dim * rope["partial_rotary_factor"]) for rope in c.ropes.values())
    kept = {layer: kept_by_block(args, c, layer) for layer in {*c.blocks}}
    blocks = c.blocks if last is None else c.blocks[: last + 1]
    return sum(kept[layer] for layer in blocks) + tokens_of_micro_batch(args) * 4 * turned


def inside_a_block(args, c: Config, layer: Layer) -> tuple[float, float]:
    """Bytes beyond that at the worst instant of the backward pass in a block: what was recomputed
    of it, and gradients of activations; and gradients of weights."""
    b, N = compute_bytes(args), tokens_of_micro_batch(args)
    recomputed = block_activations(args, c, layer) - kept_by_block(args, c, layer)
    # NF4 is made whole a layer at a time: 4 bytes in fp32, beside 2 in the folder's dtype.
    if args.quantize == "nf4":
        recomputed += 6 * c.width * max(c.mlp_width, queries(c))
    if not layer.experts:
        # Those of silu(gate), of up, and of the residual stream; and down_proj's, the first.
        first = 0 if args.lora else is_sharded(args) * b * c.width * c.mlp_width
        return recomputed + N * b * (2 * c.mlp_width + c.width), first
    e = c.experts
    given, inner = e.active * c.width, e.active * e.width
    matrix = 0 if args.lora else b * e.count * e.width * c.width
    copies = 1 if cuda(args) else 2  # on a CPU those of each expert are put together
    instants = [  # gradients of activations, in numbers per token, and of weights, in bytes
        (2 * given, 0),  # of what experts gave, in the order of tokens and in that of experts
        (2 * inner, copies * matrix),  # of what down_proj read
        (2 * inner - given + c.width, matrix),  # of silu(gate) and up; what experts gave is gone
        (copies * given + c.width - 2 * inner, (1 + 2 * copies) * matrix),  # of the input
    ]
    return max(((recomputed + N * b * more, first) for more, first in instants), key=sum)


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
    activations = tokens_of_micro_batch(args) * forward_bytes(args, c)
    if not teacher_is_sharded(args):
        return activations, 0
    root, largest = (unit(args.teacher_units, kind, 0, ranks(args)) for kind in ("root", "block"))
    return activations, b * (root.trained + 2 * largest.trained)


def forward_bytes(args, c: Config) -> float:
    """Per token: what a block holds at the worst instant of a pass without gradients: norms, q, k,
    v, their fp32 copies, and the MLP; or what deltanet.delta_rule computes with."""
    width = c.mlp_width
    if c.experts:
        width = max(width, c.experts.active * (c.experts.width + c.width))
    held = compute_bytes(args) * (3 * c.width + 3 * width)
    if any(layer.kind == LINEAR for layer in c.blocks):
        held = max(held, linear_attention(args, c))
    return held


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
    root = unit(args.units, "root", args.lora, ranks(args))
    one = gathered_bytes(args, block(args.units, c.layers - 1, args.lora, ranks(args)))
    whole, blocks = gathered_bytes(args, root), blocks_activations(args, c)
    last, forward, backward = N * norm_bytes(args, c, c.width), 0, 0
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
    of_root = sharded * (b * root.trained + 4 * root.trained + 4 * root.trained / ranks(args))
    if args.reproducible:  # two of fp64 while fixed point is computed, and this pass's gradients
        gradients = 4 * numbers(args.units, args.lora, ranks(args)).trained
        of_root += sharded * 16 * root.trained + gradients
        if not sharded:
            of_root += 16 * max(math.prod(w.shape) for u in args.units for w in u.weights)

    first = sharded * 4 * block(args.units, 0, args.lora, ranks(args)).trained
    instants = [
        ("the head's forward pass", blocks + last, forward, whole + one, 0),
        ("the head's backward pass", blocks + last, backward, whole + one, head),
        *in_blocks(args, whole, waiting),
        ("the embedding", 0, 0, whole, waiting + embedding + first),
        ("the root's end", 0, 0, 0, of_root),
    ]
    if args.script == "ppo":  # the value model runs last: its backward pass comes first
        waits = blocks + last + N * 4 * c.width  # hidden states, in fp32
        largest = unit(args.units, "block", args.lora, ranks(args))
        buffer, one = sharded * 4 * largest.trained, gathered_bytes(args, largest)
        first_of_block = 0
        if v:
            inside_each = (inside_a_block(args, v, layer) for layer in {*v.blocks})
            inside, first_of_block = max(inside_each, key=sum)
            waits += blocks_activations(args, v) + inside
            if sharded:  # its embedding is in the root, too
                more = full * b * v.vocab_size * v.width
                instants = [(*others, flight + more) for *others, flight in instants[:-1]]
                instants.append(("the root's end", 0, 0, 0, of_root))
        flight = first_of_block + buffer
        instants.append(("the value model", waits, 0, whole + 2 * one, flight))
    if args.teacher_config:
        activations, weights = teacher_pass(args)
        instants.append(("the teacher's forward pass", activations, 0, weights, 0))
    name, *parts = max(instants, key=lambda parts: sum(parts[1:]))
    names = ("activations", "log-prob buffers", "gathered weights", "gradients in flight")
    return {"gradients": gradient_bytes(args), **dict(zip(names, parts))}


def in_blocks(args, root: float, waiting: float) -> list[tuple]:
    """The instants of update while the backward pass is in the policy's blocks. root: bytes of it,
    gathered. waiting: of the head's gradient.

    FSDP2 holds the root, a block, and the next one as it arrives. Of equal blocks with equal ones
    above them, the last counts: the others have less beneath them.
    """
    c, b, sharded = args.config, compute_bytes(args), is_sharded(args)
    nothing = Numbers(0, 0, 0)
    sizes = [block(args.units, i, args.lora, ranks(args)) for i in range(c.layers)]
    above = zip(c.blocks, [*c.blocks[1:], None])
    instants = []
    for i in {pair: i for i, pair in enumerate(above)}.values():
        layer, waits = c.blocks[i], blocks_activations(args, c, i)
        here = gathered_bytes(args, sizes[i])
        next_one = gathered_bytes(args, sizes[i - 1] if i else nothing)
        buffer = sharded * 4 * sizes[i + 1].trained if i + 1 < c.layers else 0
        inside, first = inside_a_block(args, c, layer)
        flight = waiting + first + buffer
        instants.append((f"block {i}", waits + inside, 0, root + here + next_one, flight))
        trained = sharded * block(args.units, i, args.lora).trained
        padded = sharded * sizes[i].trained
        flight = waiting + b * trained + 4 * padded + 4 * padded / ranks(args)
        if args.reproducible:  # two of fp64 while fixed point is computed
            flight += 16 * padded
        waits -= kept_by_block(args, c, layer)
        instants.append((f"the end of block {i}", waits, 0, root + next_one, flight))
    return instants


# ---------------------------------------------------------------------------- memory: other moments
def cache_bytes(args, tokens: float) -> float:
    """Of a row of so many tokens: keys and values, the states of linear attention, and which
    experts were taken (CausalLM.cache)."""
    c, b, size = args.config, compute_bytes(args), 0
    for layer in c.blocks:
        if layer.kind == LINEAR:
            s = c.delta
            channels = 2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim
            size += b * (s.kernel - 1) * channels + 4 * s.value_heads * s.key_dim * s.value_dim
        else:
            size += tokens * 2 * c.kv_heads * c.head_dim * b
        if layer.experts:
            size += tokens * 2 * c.experts.active
    return size


def rollout(args) -> dict[str, float]:
    """Bytes of a rank that samples with its own engine, beside what it holds."""
    c, rows = args.config, rows_at_once(args)
    if args.engine == "colocate":
        return {"vLLM": args.vllm_memory * args.machine.memory}
    # engine.sample, per entry of the vocabulary, in fp32: logits, before and after the division by
    # the temperature, and probabilities.
    decode = 12 * rows * c.vocab_size
    # A prompt of several samples is computed once: norms, q, k, v, their fp32 copies, and the MLP.
    prompts = min(PREFILL_TOKENS, -(-rows // args.group) * args.length)
    prefill = prompts * forward_bytes(args, c)
    return {
        "KV cache": rows * cache_bytes(args, longest(args)),
        "decoding, or prompts": max(decode, prefill),
    }


def sync(args) -> dict[str, float]:
    """Bytes of a rank while weights go to the engine, one at a time (dist.full_weights): a whole
    one in fp32, and what it was gathered into. One rank sends its own tensor."""
    one = 4 * max(math.prod(w.shape) for u in args.policy for w in u.weights)
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
