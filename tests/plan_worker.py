"""Steps under the profiler: the largest sum of what was allocated minus freed. test_plan.py calls
it in its own process, with torch's fake process group, and runs it with gloo:

    torchrun --nproc_per_node 2 tests/plan_worker.py OUT SETTINGS      both JSON
"""

import gc
import json
import sys
from pathlib import Path

import torch
from small import small_config
from torch.profiler import ProfilerActivity, profile, record_function

from nanopost import dist, lora, optim
from nanopost.batch import Example, batch_of
from nanopost.model import CausalLM

MARK = "a micro-batch"
SIZES = {
    "model_type": "qwen2",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def profiled(function) -> list[tuple[int, str, int, int]]:
    """What a function allocates (bytes above 0) and frees, and marks -> (start, name, bytes, end),
    in ns, in order."""
    gc.collect()  # what others have left is not freed inside
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    found = []
    for event in prof.profiler.kineto_results.events():
        if event.name() in ("[memory]", MARK):
            start = event.start_ns()
            found.append((start, event.name(), event.nbytes(), start + event.duration_ns()))
    return sorted(found)


def peak(events) -> int:
    """The largest of what was allocated minus freed."""
    level = most = 0
    for _, _, size, _ in events:
        level += size
        most = max(most, level)
    return most


def peak_of_marks(events, live: list[int]) -> int:
    """The same within the marks. live: bytes of tensors that were known to be there at the start of
    each. What gloo's threads free is not recorded: the level is set right at each start, and the
    mark with the fewest of such frees counts."""
    peaks = []
    for start, name, _, end in events:
        if name == MARK:
            level = most = live[len(peaks)]
            for at, _, size, _ in events:
                if start <= at <= end:
                    level += size
                    most = max(most, level)
            peaks.append(most)
    return min(peaks)


def local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def measured(world, rows: int, length: int, how: dict | None = None, again=1, **sizes) -> int:
    """Peak bytes of a rank in a micro-batch of SFT, when there are gradients and moments already.
    how: lora, quantize, and what dist.shard takes. again: steps, of which one counts (see
    peak_of_marks). sizes: of the model."""
    how = dict(how or {})
    rank, packed = how.pop("lora", 0), how.pop("quantize", "none") == "nf4"
    dist.reproducible = how.pop("reproducible", False)
    config = small_config(**{**SIZES, **sizes})
    ids = torch.arange(length) % config.vocab_size
    mask = torch.ones(length, dtype=torch.bool)
    batch = batch_of([Example(ids.roll(row), mask) for row in range(rows)])
    live = []

    def run():
        with torch.device("meta"):
            model = CausalLM(config)
        if rank:
            lora.apply(model, rank)
            if packed:
                lora.quantize(model)
            if world.dtype == torch.bfloat16:
                lora.hold_in_stored_dtype(model)
        model = dist.shard(model, world, **how).to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                local(p).fill_(0.01 if p.is_floating_point() else 1)
        optimizer = optim.adamw(model, 0.1)

        def held():
            tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
            tensors += [x for state in optimizer.state.values() for x in state.values()]
            if dist.reproducible:
                tensors += [x.total for x in model.order_free.sums.values()]
            storages = [local(x).untyped_storage() for x in tensors if x is not None]
            return sum({x.data_ptr(): x.nbytes() for x in storages}.values())  # some share one

        def micro_batch(last=False):
            dist.before_pass(model, last)
            logp_N, _ = model(batch)
            (-logp_N.sum()).backward()
            dist.after_pass(model)

        micro_batch(last=True)
        optimizer.step()  # there are moments
        whole = 0
        if how.get("reduce") == "step":
            whole = 4 * sum(p.numel() for p in model.parameters())
        for _ in range(again):
            optimizer.zero_grad(set_to_none=True)
            micro_batch()  # there are gradients
            live.append(held() + whole)
            with record_function(MARK):
                micro_batch()

    events = profiled(run)
    return peak_of_marks(events, live)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found, world = [], dist.init("cpu", "fp32")
    for dtype, setting in json.loads(sys.argv[2]):
        of_setting = dist.World(world.rank, world.size, world.device, getattr(torch, dtype))
        found.append(measured(of_setting, again=3, **setting))
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.finish()
