"""torchrun, FSDP2, reductions over ranks, and full weights from shards.

There is no tensor, context or expert parallelism: each would put collectives into the formulas of
model.py, and shards, packed rows and recomputed activations make dense models of 70B fit without.
A run always has a process group, even with a single process, so no call site checks for one.
"""

import ctypes
import io
import json
import math
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from nanopost import InputError, StepError, lora, nf4
from nanopost.reproducible import LARGEST, OrderFree, exact, rounded, sum_of_squares

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
VARIANTS = 64  # of a block's compiled code, at most
reproducible = False  # the same bytes on any number of ranks: set by init, see reproducible.py
last_words: Callable[[], str] | None = None  # of a run: printed after an error that ends it


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # to compute in: fp32, or bf16 over fp32 master weights


def init(
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    same_bytes: bool = False,
    dry: bool = False,
    timeout_minutes: float = 30,
) -> World:
    """Join the processes that torchrun started, or run as a single one, and seed torch.

    device: auto, cpu or cuda. dtype: fp32, bf16, or auto, which is bf16 on CUDA and fp32 on a CPU.
    same_bytes: on any number of ranks (see reproducible.py). dry: the device is meta, where tensors
    have no data.
    """
    global reproducible
    reproducible = same_bytes
    sys.excepthook = _one_sentence
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a sample's letters end no run
    _check_launch()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # A killed torchrun leaves no process behind: each gets SIGTERM (1: PR_SET_PDEATHSIG).
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        _check_launcher()
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"rank {rank} wants GPU {local_rank}, but this machine has "
                f"{torch.cuda.device_count()}: lower --nproc_per_node or add --device cpu."
            )
        torch.cuda.set_device(local_rank)
        if reproducible:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
    else:
        torch.set_flush_denormal(True)  # late in training, denormals slow some CPUs down tenfold
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=timeout_minutes),
        store=None if "RANK" in os.environ else dist.HashStore(),
    )
    sys.excepthook = _one_sentence  # init_process_group has replaced it
    torch.manual_seed(seed)
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" else "fp32"
    where = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if dry:
        where = torch.device("meta")
    return World(rank, size, where, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


def _check_launch():
    """InputError for half of what torchrun sets: the process would wait for others forever."""
    several = "RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"
    given = [name for name in LAUNCHED if name in os.environ]
    missing = [name for name in LAUNCHED if name not in os.environ]
    if several and missing:
        raise InputError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}: start several "
            f"processes with torchrun, or a single one with env -u {' -u '.join(given)}."
        )


def _check_launcher():
    """InputError if torchrun was killed before its death could be told: init_process_group would
    wait for it for half an hour. It listens before it starts the processes."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    for attempt in range(5):
        try:
            socket.create_connection(address, timeout=10).close()
            return
        except OSError as error:
            time.sleep(attempt)
            reason = error
    raise InputError(f"torchrun cannot be reached at {address[0]}:{address[1]} ({reason}).")


def _one_sentence(kind, error, trace):
    """A user's mistake prints only its sentence; a bug keeps its traceback. Then what is saved."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and "onnection" in str(error) and "gloo" in str(error):
        print(f"rank {dist.get_rank()}: another rank has stopped", file=sys.stderr, flush=True)
        time.sleep(1)  # so that torchrun reports the other one
        _exit(1)
    if issubclass(kind, (InputError, StepError)):
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif issubclass(kind, torch.OutOfMemoryError):
        way_out = "lower --tokens (per micro-batch), or add --checkpointing full"
        print(f"error: out of memory: {way_out}. {error}", file=sys.stderr, flush=True)
    elif issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr, flush=True)
    elif issubclass(kind, BrokenPipeError):
        closed = "error: what reads its output has ended (| head, say): let it print to a file"
        print(closed, file=sys.stderr, flush=True)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    else:
        sys.__excepthook__(kind, error, trace)
    if last_words is not None:
        print(last_words(), file=sys.stderr, flush=True)
    _tell_torchrun(f"{kind.__name__}: {error}")
    if several:
        _exit(1)  # a rank that waited for the others to clean up would keep them all waiting
    if dist.is_initialized():  # a thread of gloo's that outlives it would abort the process
        dist.destroy_process_group()


def _tell_torchrun(sentence):
    """torchrun's own report, which comes last, then has the sentence in it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": sentence, "timestamp": int(time.time())}, file)


def _exit(code):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def finish(code: int = 0):
    """The last line of a script. Several processes wait for each other, then exit at once: on a
    busy machine, tearing down gloo's threads has aborted a rank whose work was done.

    code: the exit status; a single process goes on after a 0."""
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
        if code:
            sys.exit(code)
        return
    dist.barrier()
    _exit(code)


# ------------------------------------------------------------------------------------------- models
def shard(
    model,
    world: World,
    checkpointing: str = "none",
    compile: bool = False,
    kernels: str = "auto",
    reduce: str = "micro_batch",
    replicas: int = 1,
    offload: bool = False,
):
    """Apply activation checkpointing, compilation and FSDP2 to a model of model.py -> the model.

    With one process the model stays as it is on a CPU in fp32, and with adapters (lora.py) beside
    frozen weights in world.dtype. Otherwise every block and the root are sharded over all ranks:
    fp32 master weights, compute in world.dtype, gradients summed over ranks in fp32: a loop divides
    its loss by the count of the whole step. The root is resharded after its forward too: nothing
    outside that forward may read a weight.
    checkpointing: none, selective or full (model.py). kernels: see logprob.py. reduce: micro_batch,
    or step: gradients are summed over ranks with the last micro-batch of a step alone, and until
    then each rank holds them whole. replicas: how many times the ranks hold the model, each time
    sharded over some of them (HSDP). offload: shards and moments are in the memory of the CPU.
    """
    decoders = [m for m in model.modules() if hasattr(m, "checkpointing")]
    blocks = [block for decoder in decoders for block in decoder.layers]
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels
    for decoder in decoders:
        decoder.checkpointing = checkpointing
    if compile:
        # Blocks of a kind share what is compiled, once for gradients, for none, and for samples of
        # prompts and of tokens, each for one size and for any. Beyond 8 torch would stop, silently.
        torch._dynamo.config.recompile_limit = VARIANTS
        for block in blocks:
            block.compile()
    model.reduce_last = reduce == "step" and world.size > 1
    model.runs_on = world.device
    if world.device.type == "meta":
        return model
    sharded = [*blocks, model]
    model.held_on = torch.device("cpu") if offload else world.device
    frozen = set()
    for name, p in model.named_parameters():
        if not p.requires_grad and p.is_floating_point() and not lora.is_exact(name):
            frozen.add(p.dtype)
    is_whole = world.dtype == torch.float32 or frozen == {world.dtype}
    if world.size > 1 or offload or not is_whole:
        _fully_shard(sharded, world, replicas, offload)
    if reproducible:
        model.order_free = OrderFree(model, sharded if world.size > 1 else [])
    return model


def _fully_shard(modules, world, replicas, offload):
    shape, names = (world.size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, world.size // replicas), ("replica", "shard")
    mesh = dist.device_mesh.init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    policy = OffloadPolicy()
    if offload:
        policy = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if world.dtype == torch.bfloat16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    how = {"mesh": mesh, "mp_policy": precision, "offload_policy": policy}
    for module in modules:
        fully_shard(module, **how, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # a sum, not torch's mean
        module.set_force_sum_reduction_for_comms(True)


def full_weights(model, part: str = "") -> "FullWeights":
    """(checkpoint name, whole tensor), one at a time. A collective: all ranks must iterate.

    fp32, but for frozen weights that are held in less; of NF4 the dequantised ones. Adapters are
    merged, from the untouched base each time. A tied head is not included (the model has none).
    Both the saved folder and an engine's copy are made from this. part: "policy." or "value." of an
    ActorCritic.
    """
    return FullWeights(model, part)


@dataclass
class FullWeights:
    """What full_weights returns: it can be iterated again."""

    model: torch.nn.Module
    part: str

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        held = dict(self.held())
        layers = dict(self.root.named_modules())
        for name, p in held.items():
            if lora.is_adapter(name) or nf4.is_scale(name):
                continue
            whole = full_tensor(p)
            path, _, kind = name.rpartition(".")
            layer = layers[path]
            if kind == "weight" and nf4.is_packed(layer):
                packed = nf4.Packed(*(full_tensor(held[f"{path}.{part}"]) for part in nf4.PARTS))
                whole = nf4.dequantize(packed, layer.in_features, layer.stored_dtype)
            if kind == "weight" and isinstance(layer, lora.LoRALinear):
                a, b = full_tensor(held[f"{path}.lora_A"]), full_tensor(held[f"{path}.lora_B"])
                whole = lora.merged(whole, a, b, layer.scale)
            yield name, whole

    def held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) as the model holds them: its own tensors or shards, adapters apart."""
        for name, p in self.model.state_dict().items():
            if name.startswith(self.part):
                yield name.removeprefix(self.part), p

    def trained(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in peft's format, whole tensor) of adapters and scalar heads. A collective."""
        for name, p in self.held():
            if lora.is_trained(name):
                yield lora.peft_name(name, self.root.config.is_inside), full_tensor(p)

    @property
    def adapted(self) -> bool:
        """Whether adapters are merged into these weights."""
        return bool(lora.layers(self.root))

    @property
    def root(self) -> torch.nn.Module:
        """The CausalLM or ScalarModel whose weights these are."""
        return self.model.get_submodule(self.part.removesuffix("."))


def full_tensor(p) -> torch.Tensor:
    """A parameter whole, if it is held in shards. A collective then."""
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def before_pass(model, last: bool):
    """Before a micro-batch goes through a model; last: of its optimizer step."""
    if getattr(model, "reduce_last", False):
        model.set_requires_gradient_sync(last)
    if hasattr(model, "order_free"):
        model.order_free.before_pass()


def after_pass(model):
    """After the backward pass of a micro-batch."""
    if hasattr(model, "order_free"):
        model.order_free.after_pass()


def clip_grad_norm(model, max_norm: float) -> float:
    """Scale gradients to a global L2 norm of at most max_norm (0: no limit) -> the norm before."""
    if hasattr(model, "order_free"):
        return _clip_order_free(model.order_free, max_norm or float("inf"))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _clip_order_free(order_free, max_norm):
    """clip_grad_norm, the same bytes on any number of ranks. StepError if a gradient may be beyond
    what its fixed point holds."""
    bound = all_sum(order_free.finish())
    if not math.isfinite(bound):
        return bound
    if bound >= LARGEST:
        raise StepError(
            f"a gradient may be as large as {bound:.3g}, and --reproducible adds up gradients "
            f"below {LARGEST:,.0f}: lower what scales the loss, or train without it."
        )
    gradients = [gradient for _, gradient in order_free.gradients()]
    (largest,) = all_max(max([float(g.abs().max()) for g in gradients if g.numel()], default=0.0))
    exponent = math.frexp(largest)[1]
    mine = sum(sum_of_squares(g, exponent) for g in gradients)
    norm = math.sqrt(rounded(Fraction(sum(gather([mine]))) * Fraction(2) ** (2 * exponent - 72)))
    if norm > max_norm:
        for g in gradients:
            g *= max_norm / (norm + 1e-6)  # as torch
    return norm


# --------------------------------------------------------------------------------------- reductions
def all_sum(value: float | torch.Tensor) -> float:
    """The sum over ranks, of all numbers of a tensor if it is one: exact, then rounded to float64,
    and so the same in any order."""
    return all_sums(value)[0]


def all_sums(*values: float | torch.Tensor) -> list[float]:
    """all_sum of each value."""
    rows = gather([[exact(value) for value in values]])
    return [rounded(sum(column)) for column in zip(*rows)]


def all_max(*values: float) -> list[float]:
    """Each value's maximum over ranks."""
    most = torch.tensor([float(v) for v in values], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)  # on the CPU (gloo), so that no GPU waits for a number
    return most.tolist()


def even(micro_batches: list[list]) -> list[list]:
    """A rank's micro-batches, padded with empty ones to the largest number on any rank.

    Each forward and backward pass is a collective: a rank that ran fewer would leave the others
    waiting forever.
    """
    most = int(all_max(len(micro_batches))[0])
    return micro_batches + [[]] * (most - len(micro_batches))


def mean_and_std(x: torch.Tensor) -> tuple[float, float]:
    """Mean and std (with n - 1) of all numbers on all ranks."""
    x = x.double()
    total, count = all_sums(x, x.numel())
    mean = total / max(1, count)
    squares = all_sum((x - mean).square())  # of x itself they would cancel
    return mean, (squares / max(1, count - 1)) ** 0.5


def means(metrics: dict[str, tuple]) -> dict[str, float]:
    """{name: (sum, count)} -> {name: sum / count}, both as in all_sum.

    A mean of nothing is dropped: a 0 would look like a mean. A name may be missing on some ranks.
    """
    mine = [(name, exact(total), exact(count)) for name, (total, count) in metrics.items()]
    totals = {}
    for name, total, count in gather(mine):
        before = totals.get(name, (0, 0))
        totals[name] = before[0] + total, before[1] + count
    return {name: rounded(total / count) for name, (total, count) in totals.items() if count}


def gather(values: list) -> list:
    """The lists of all ranks as one, rank by rank, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [v for part in parts for v in part]


def exchange(parts: list[list]) -> list:
    """Send the list parts[r] to rank r -> what all ranks have sent to this one, rank by rank."""
    mine, rank = parts[dist.get_rank()], dist.get_rank()
    if len(parts) == 1:
        return mine
    sent = [b"" if r == rank else pickle.dumps(part) for r, part in enumerate(parts)]
    size_R = torch.tensor([len(x) for x in sent])
    coming_R = torch.empty_like(size_R)
    dist.all_to_all_single(coming_R, size_R)
    outgoing = torch.frombuffer(bytearray(b"".join(sent)) or bytearray(1), dtype=torch.uint8)
    outgoing = outgoing[: int(size_R.sum())]
    incoming = torch.empty(int(coming_R.sum()), dtype=torch.uint8)
    dist.all_to_all_single(incoming, outgoing, coming_R.tolist(), size_R.tolist())
    came = []
    for r, x in enumerate(incoming.split(coming_R.tolist())):
        came += mine if r == rank else pickle.loads(x.numpy().tobytes())
    return came


class Meter:
    """Means of named metrics over a step. What is on a GPU stays there until the host reads all of
    it at once, in means(): a loop that read each number would wait for the GPU each time."""

    def __init__(self):
        self.sums, self.counts = {}, {}  # exact, of what is on the host
        self.on_device = {}  # name -> list of tensors

    def add(self, count: float, **sums: torch.Tensor | float):
        """count: how many trained tokens, sequences or pairs these are sums over. A tensor of
        several numbers is summed."""
        for name, value in sums.items():
            self.counts[name] = self.counts.get(name, 0) + exact(count)
            if isinstance(value, torch.Tensor) and value.is_cuda:
                self.on_device.setdefault(name, []).append(value.detach().double().flatten())
            else:
                self.sums[name] = self.sums.get(name, 0) + exact(value)

    def means(self) -> dict[str, float]:
        """{name: sum / count} over all ranks. A collective."""
        names = [name for name, values in self.on_device.items() for _ in values]
        values = [value for values in self.on_device.values() for value in values]
        if values:
            on_host = torch.cat(values).cpu().split([len(value) for value in values])
            for name, value in zip(names, on_host):
                self.sums[name] = self.sums.get(name, 0) + exact(value)
            self.on_device.clear()
        return means({name: (total, self.counts[name]) for name, total in self.sums.items()})
