"""A step beside what its matmuls and its attention alone take -> bench/results/floors.json.

    python -m bench.floors                        # the works of side_by_side.py, on two threads
    python -m bench.floors --work sft equal --rounds 1
    python -m bench.floors --try --work sft       # one short round: does the script work?

Nothing here models the work. The real script runs once while torch's dispatcher notes the shapes
and strides of every product of two matrices, forward and backward, and the calls of
nanopost.attention with their documents. Then it runs again, unobserved: after each step, in the
same process and on the same threads, torch.mm computes the same products of random numbers, into
memory that is there, and the same attention runs forward and backward. The last step but one is
profiled: where is the rest? "Python and dispatch" is the time in which no operator runs, and views.

Steps count from the third on; the last one, which ends with an evaluation, does not. Figures are
medians over steps and rounds, and shares are of each step's own time.
"""

import json
import math
import os
import runpy
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from bench import common, side_by_side
from bench.side_by_side import MAKE, THREADS, WARM
from nanopost import attention, dist, engine, model
from nanopost.run import Run

# Work -> our job of side_by_side.py.
JOBS = {
    "sft": "nanopost --tokens 1024",
    "sft_bf16": "nanopost --tokens 1024",
    "dpo": "nanopost --tokens 1024",
    "dpo, precomputed": "nanopost --tokens 1024, precomputed",
    "reward": "nanopost --tokens 1024",
    "equal": "nanopost --tokens 1024",
    "ragged": "nanopost --tokens 1024",
}
CHILD = """
import sys
from bench import floors
what, path, *command = sys.argv[1:]
{"record": floors.record, "measure": floors.measure}[what](path, command)
"""
PARTS = "train", "rollout"
PRODUCTS = torch.ops.aten.mm, torch.ops.aten.addmm


# -------------------------------------------------------------------------------------- what is run
class Layout(NamedTuple):
    """A tensor but for its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    grad: bool

    @classmethod
    def of(cls, x, grad=False):
        return cls(tuple(x.shape), x.stride(), x.dtype, grad and x.requires_grad)


class Product(NamedTuple):
    """a @ b, in one of PARTS."""

    part: str
    a: Layout
    b: Layout

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.a.shape) * self.b.shape[1]


class Attend(NamedTuple):
    """A call of a function of nanopost.attention, in one of PARTS; Layouts stand for tensors of
    floats. grad: with its backward pass."""

    part: str
    name: str
    args: tuple
    more: dict
    grad: bool


class Recorder(TorchDispatchMode):
    """Notes what is computed until it is taken."""

    def __init__(self):
        super().__init__()
        self.part, self.calls = "train", []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            first = 1 if function.overloadpacket is torch.ops.aten.addmm else 0
            a, b = args[first : first + 2]
            self.calls.append(Product(self.part, Layout.of(a), Layout.of(b)))
        return function(*args, **(kwargs or {}))

    def take(self) -> list:
        taken, self.calls = self.calls, []
        return taken


def record(path: str, command: list[str]):
    """Run a script -> a file of {step: what it computed}."""
    recorder, steps = Recorder(), {}
    log, generate = Run.log, engine.Engine.generate

    def logged(run, step, metrics):
        steps[step] = recorder.take()
        log(run, step, metrics)

    def generated(*args, **more):
        recorder.part = "rollout"
        rollouts = generate(*args, **more)
        recorder.part = "train"
        return rollouts

    def noted(name):
        function = getattr(attention, name)

        def call(*args, **more):
            floats = [x for x in args if is_float(x)]
            grad = torch.is_grad_enabled() and any(x.requires_grad for x in floats)
            given = tuple(noted_of(x, grad) for x in args)
            if any(map(is_float, more.values())):
                raise ValueError(f"{name} is called with a tensor by keyword")
            recorder.calls.append(Attend(recorder.part, name, given, more, grad))
            return function(*args, **more)

        return call

    Run.log, engine.Engine.generate = logged, generated
    for name in ("packed_attention", "cached_attention"):
        setattr(model, name, noted(name))
    with recorder:
        run_script(command)
    torch.save(steps, path)


def noted_of(x, grad: bool):
    """An argument as it is now: its Layout, a copy of integers, or itself."""
    if is_float(x):
        return Layout.of(x, grad)
    return x.clone() if isinstance(x, torch.Tensor) else x


def is_float(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def run_script(command: list[str]):
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


# ------------------------------------------------------------------------------------- and replayed
class Memory:
    """Random numbers in any layout. Layouts of about the same size share their memory."""

    def __init__(self):
        self.found = {}

    def __call__(self, slot, layout: Layout):
        size = 1 + sum((n - 1) * s for n, s in zip(layout.shape, layout.stride))
        size = 2 ** math.ceil(math.log2(size))
        key = slot, layout.dtype, size
        if key not in self.found:
            self.found[key] = torch.randn(size).to(layout.dtype)
        x = self.found[key].as_strided(layout.shape, layout.stride).detach()
        return x.requires_grad_(layout.grad)


@torch.no_grad()
def seconds_of_products(products: list[Product], memory: Memory) -> float:
    ready = []
    for _, a, b in products:
        shape = (a.shape[0], b.shape[1])
        out = Layout(shape, (shape[1], 1), a.dtype, False)
        ready.append((memory("a", a), memory("b", b), memory("out", out)))
    began = time.perf_counter()
    for a, b, out in ready:
        torch.mm(a, b, out=out)
    return time.perf_counter() - began


def seconds_of_attention(calls: list[Attend], memory: Memory) -> float:
    """Keys and values are those of another call where layouts are the same."""
    ready = []
    for _, name, given, more, grad in calls:
        args = [memory(i, x) if isinstance(x, Layout) else x for i, x in enumerate(given)]
        inputs = [x for x in args if is_float(x) and x.requires_grad]
        # The result is like the queries.
        upstream = torch.randn(given[0].shape).to(given[0].dtype) if grad else None
        ready.append((getattr(attention, name), args, more, inputs, upstream))
    began = time.perf_counter()
    for function, args, more, inputs, upstream in ready:
        with torch.set_grad_enabled(upstream is not None):
            out = function(*args, **more)
        if upstream is not None:
            torch.autograd.grad(out, inputs, upstream)
    return time.perf_counter() - began


def floors_of(calls: list, memory: Memory) -> dict:
    """Of one step: seconds of its products and of its attention, by part, and FLOPs."""
    found = {"matmuls": {}, "attention": {}, "flops": {}}
    for part in PARTS:
        products = [c for c in calls if isinstance(c, Product) and c.part == part]
        attends = [c for c in calls if isinstance(c, Attend) and c.part == part]
        found["matmuls"][part] = seconds_of_products(products, memory)
        found["attention"][part] = seconds_of_attention(attends, memory)
        found["flops"][part] = sum(product.flops for product in products)
    return found


def measure(path: str, command: list[str]):
    """Run a script again; prints one line of JSON: each step's seconds and floors, and the parts of
    a profiled one."""
    steps = torch.load(path, weights_only=False)
    profiled, memory, found = max(steps) - 1, Memory(), []
    log, profiler, clock = Run.log, profile(activities=[ProfilerActivity.CPU], acc_events=True), {}

    def logged(run, step, metrics):
        whole = time.perf_counter() - clock.get("began", 0.0)
        log(run, step, metrics)
        if WARM < step < profiled:
            seconds = {"step": whole, "rollout": metrics.get("time/rollout", 0.0)}
            found.append(seconds | floors_of(steps[step], memory))
        if step == profiled:
            profiler.stop()
            clock["profiled"] = whole
        elif step == profiled - 1:
            profiler.start()
        clock["began"] = time.perf_counter()

    Run.log = logged
    label()
    run_script(command)
    result = {"steps": found, "profile": parts_of(profiler.events(), clock["profiled"])}
    print(json.dumps(result | {"threads": torch.get_num_threads()}))


# ----------------------------------------------------------------------------------------- the rest
OPTIMIZER, LOGPROBS = "optimizer and gradients", "log-probs, without matmuls"
SAMPLING, CACHE = "sampling", "KV cache"
COPIES, PYTHON, ELEMENTWISE = "gathers and copies", "Python and dispatch", "elementwise"
# What a profile does not name by itself: functions, and the part that their time belongs to.
LABELS = [
    (dist, "clip_grad_norm", OPTIMIZER),
    (engine, "sample", SAMPLING),
    (attention.Cache, "append", CACHE),
    (attention.Cache, "keep", CACHE),
]
# A part, and what the name of an operator around it contains.
AROUND = [
    (OPTIMIZER, ("Optimizer.", "AccumulateGrad", OPTIMIZER)),
    (LOGPROBS, ("_LogProb",)),
    (SAMPLING, (SAMPLING,)),
    (CACHE, (CACHE,)),
]
COPYING = (
    *("cat", "clone", "constant_pad_nd", "copy_", "embedding", "embedding_dense_backward", "fill_"),
    *("gather", "index", "index_add_", "index_copy_", "index_put_", "_index_put_impl_", "scatter_"),
    *("index_select", "index_select_backward", "masked_fill_", "new_zeros", "select_backward"),
    *("slice_backward", "stack", "_to_copy", "zero_", "zeros", "empty", "empty_like"),
    *("empty_strided", "new_empty", "resize_", "index_fill", "repeat_interleave", "scatter_add_"),
)
VIEWS = (
    *("alias", "as_strided", "detach", "detach_", "expand", "expand_as", "flatten", "narrow"),
    *("permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to"),
    *("transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as", "_unsafe_view"),
    *("linear", "matmul", "result_type", "is_nonzero", "item", "_reshape_alias", "contiguous"),
)


def label():
    """Show the functions of LABELS in a profile."""

    def labelled(function, name):
        def call(*args, **more):
            with record_function(name):
                return function(*args, **more)

        return call

    for owner, name, part in LABELS:
        setattr(owner, name, labelled(getattr(owner, name), part))


def part_of(event) -> str:
    """The part of a step that an operator's own time belongs to."""
    name = event.name.removeprefix("aten::")
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return "matmuls"
    if "scaled_dot_product" in name:
        return "attention"
    around, names = event, []
    while around is not None:
        names.append(around.name)
        around = around.cpu_parent
    for part, needles in AROUND:
        if any(needle in n for n in names for needle in needles):
            return part
    if not event.name.startswith("aten::") or name in VIEWS:
        return PYTHON
    return COPIES if name in COPYING else ELEMENTWISE


def parts_of(events, seconds: float) -> dict[str, float]:
    """Shares of a profiled step, by part. Python gets what no operator has."""
    found = defaultdict(float)
    for event in events:
        found[part_of(event)] += event.self_cpu_time_total / 1e6 / seconds
    found.pop(PYTHON, None)
    found[PYTHON] = 1 - sum(found.values())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# ------------------------------------------------------------------------------------------ results
def shares_of(step: dict, part: str) -> dict[str, float]:
    """What the summary has of one part of one step."""
    seconds = step["rollout"]
    if part == "train":
        seconds = step["step"] - step["rollout"]  # all else
    matmuls, attends, flops = (step[kind][part] for kind in ("matmuls", "attention", "flops"))
    return {
        "seconds": seconds,
        "gflop": flops / 1e9,
        "gflop_per_second": flops / 1e9 / matmuls,
        "matmuls_seconds": matmuls,
        "matmuls_share": matmuls / seconds,
        "attention_seconds": attends,
        "attention_share": attends / seconds,
    }


def medians(found: list[dict]) -> dict[str, float]:
    """By key; 0 where one has no such key."""
    keys = {key for one in found for key in one}
    return {key: statistics.median(one.get(key, 0.0) for one in found) for key in sorted(keys)}


def summary(rounds: list[dict]) -> dict:
    """Medians over the steps of all rounds."""
    steps = [step for found in rounds for step in found["steps"]]
    result = {"step_seconds": statistics.median(step["step"] for step in steps), "parts": {}}
    for part in PARTS:
        if steps[0]["flops"][part]:
            result["parts"][part] = medians([shares_of(step, part) for step in steps])
    profile = medians([found["profile"] for found in rounds])
    result["profile"] = dict(sorted(profile.items(), key=lambda item: -item[1]))
    return result | {"threads": rounds[0]["threads"]}


def measured(name: str, folder: str, steps: int, rounds: int) -> dict:
    """One work -> its summary."""
    work = name.partition(",")[0]
    if not Path(folder, work).exists():
        side_by_side.run(["-c", MAKE, folder, work])
    command = side_by_side.jobs_of(work, folder, steps, steps)[JOBS[name]]
    calls = f"{folder}/calls.pt"
    side_by_side.run(["-c", CHILD, "record", calls, *command])
    recorded = side_by_side.our_steps(f"{folder}/out")["tokens"]
    found = []
    for _ in range(rounds):
        stdout, _ = side_by_side.run(["-c", CHILD, "measure", calls, *command])
        if side_by_side.our_steps(f"{folder}/out")["tokens"] != recorded:
            raise AssertionError(f"{name}: the second run trained on other tokens than the first")
        found.append(json.loads(stdout.splitlines()[-1]))
    tokens = statistics.mean(recorded[WARM:-2])
    return {"job": JOBS[name], "tokens_per_step": tokens, **summary(found)}


def table(work: dict[str, dict]) -> str:
    """The table of docs/results.md."""
    lines = [
        "| work | s | matmuls alone | attention alone | the rest of the step, profiled |",
        "|---|---|---|---|---|",
    ]
    for name, found in work.items():
        shares = found["profile"].items()
        others = [(part, share) for part, share in shares if part not in ("matmuls", "attention")]
        rest = ", ".join(f"{part} {share:.0%}" for part, share in others if share >= 0.005)
        for part, one in found["parts"].items():
            what = name if part == "train" else f"{name}, rollout"
            if part == "train" and len(found["parts"]) > 1:
                what = f"{name}, all but the rollout"
            speed = f"{one['gflop']:.0f} GFLOP at {one['gflop_per_second']:.0f} a second"
            cells = [
                what,
                f"{one['seconds']:.2f}",
                f"{one['matmuls_share']:.0%} ({speed})",
                f"{one['attention_share']:.0%}",
                rest,
            ]
            lines.append(f"| {' | '.join(cells)} |")
            rest = ""
    return "\n".join(lines)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--try", action="store_true", dest="tiny", help="write no results")
    parser.add_argument("--work", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", default=common.RESULTS, type=Path, help="folder")
    args = parser.parse_args()
    if args.tiny:
        args.rounds, args.steps = 1, WARM + 3  # one timed, one profiled, and the last
    settings = {"threads": THREADS, "cores": os.cpu_count(), "rounds": args.rounds}
    settings["load before"] = os.getloadavg()[0]  # by others, if it is not near 0
    result = {**common.origin("torch"), "settings": settings | {"steps": args.steps}, "work": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.work:
            found = result["work"][name] = measured(name, folder, args.steps, args.rounds)
            print(f"{name}: a step of {found['step_seconds']:.3f} s", flush=True)
            if not args.tiny:
                common.save(args.out / "floors.json", result)
    print(table(result["work"]))


if __name__ == "__main__":
    main()
