"""torchrun, FSDP2, reductions over ranks, and full weights out of the shards.

A run always has a process group, of one process if need be, so no call site asks whether there is one.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nanopost import InputError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device


def init(device: str = "auto", timeout_minutes: float = 30) -> World:
    """Join the processes that torchrun started, or be one alone. device: auto, cpu or cuda."""
    sys.excepthook = _one_sentence
    rank, size, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(
                f"rank {rank} wants GPU {local} and this machine has {torch.cuda.device_count()}: "
                "lower --nproc_per_node or add --device cpu."
            )
        torch.cuda.set_device(local)
    else:
        torch.set_flush_denormal(True)  # late in training, denormals slow some CPUs down tenfold
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore()}
    dist.init_process_group(
        backend, rank=rank, world_size=size, timeout=timedelta(minutes=timeout_minutes), **alone
    )
    sys.excepthook = _one_sentence  # again: init_process_group put its own in place
    return World(
        rank, size, torch.device(device, local) if device == "cuda" else torch.device("cpu")
    )


def _one_sentence(kind, error, trace):
    """A person's mistake is answered with its sentence alone; a bug keeps its traceback."""
    if issubclass(kind, InputError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif issubclass(kind, KeyboardInterrupt):
        print("stopped: --resume goes on from the newest checkpoint", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(
            1
        )  # a rank that waits for the others' clean-up would keep all of them waiting for it


def finish():
    """The last line of a script. Several processes wait for each other and then leave without more ado: on a busy
    machine the taking down of gloo's threads has aborted a rank whose work was done."""
    if dist.get_world_size() == 1:
        return dist.destroy_process_group()
    dist.barrier()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def shard(
    model,
    world: World,
    bf16: bool,
    checkpointing: bool = False,
    compile: bool = False,
    kernels: str = "auto",
):
    """Apply activation checkpointing, compilation and FSDP2 to a model of model.py, block by block, and return it.
    kernels: see logprob.

    On a CPU in fp32 with one process the model stays as it is. Else every block and the root are sharded over all
    ranks: fp32 master weights, compute in bf16 where `bf16` says so, gradients reduced in fp32 and averaged over
    ranks (a loop multiplies its loss by world.size to undo that). The root is resharded after forward too: nothing
    outside its forward may read a weight.
    """
    decoders = [m for m in model.modules() if hasattr(m, "checkpointing")]
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels
    blocks = [block for decoder in decoders for block in decoder.layers]
    for decoder in decoders:
        decoder.checkpointing = checkpointing
    if compile:
        for block in blocks:
            block.compile()
    if world.size == 1 and not bf16:
        return model
    mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    return model


def full_weights(model, part: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, whole fp32 tensor), one after the other, on every rank: a collective, so all must iterate.

    A tied head is not among them (the model has none). Both the saved folder and an engine's copy are made from this.
    part: "policy." or "value." of an ActorCritic.
    """
    for name, p in model.state_dict().items():
        if name.startswith(part):
            yield (
                name.removeprefix(part),
                (p.full_tensor() if isinstance(p, DTensor) else p).detach(),
            )


def clip_grad_norm(model, max_norm: float) -> float:
    """Scale the gradients to a global L2 norm of at most max_norm (0: any) -> the norm before, over all ranks.

    A norm that is not finite raises FloatingPointError before the optimizer can spread it.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norm < float("inf"):
        raise FloatingPointError(
            f"the gradient norm is {norm}: lower --lr; the weights are those of the step before."
        )
    return norm


def all_sum(*values: float) -> list[float]:
    """Each value summed over ranks, in float64."""
    return _reduce(values, dist.ReduceOp.SUM)


def all_max(*values: float) -> list[float]:
    """Each value's maximum over ranks."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values, op):
    total = torch.tensor([float(v) for v in values], dtype=torch.float64)
    dist.all_reduce(total, op)  # on the CPU (gloo), so that no GPU waits for a number
    return total.tolist()


def even(micro_batches: list[list]) -> list[list]:
    """A rank's micro-batches, with empty ones behind until it has as many as the rank with most.

    Each forward and backward pass is a collective: a rank that ran fewer would leave the others waiting for ever.
    """
    return micro_batches + [[]] * (int(all_max(len(micro_batches))[0]) - len(micro_batches))


def mean_and_std(x: torch.Tensor) -> tuple[float, float]:
    """Of all numbers of all ranks, the latter with n - 1."""
    x = x.double()
    total, squares, count = all_sum(x.sum(), x.square().sum(), x.numel())
    mean = total / max(1, count)
    return mean, (max(0.0, squares - count * mean**2) / max(1, count - 1)) ** 0.5


def means(metrics: dict[str, tuple[float, float]]) -> dict[str, float]:
    """{name: (sum, count)} -> {name: sum / count}, both added up over ranks first. A mean of nothing is left out: as 0
    it would look like one. Every rank has the same names."""
    total = all_sum(*(x for pair in metrics.values() for x in pair))
    return {name: a / n for name, a, n in zip(metrics, total[::2], total[1::2]) if n}


def gather(values: list) -> list:
    """The lists of all ranks as one, rank by rank, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [v for part in parts for v in part]
