"""What each option that trades memory for time saves and costs -> bench/results/cpu_options.json.

    python -m bench.options                        # on two threads of a CPU, in fp32
    python -m bench.options --try                  # one short round: does the script work?

SFT in steps of 2,048 tokens, in four micro-batches, on one rank, two and four, each beside the same
run without the option. Jobs take turns. Peak memory is that of the largest rank, above the imports:
see side_by_side.py.
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path

from bench import common
from bench.common import flags
from bench.side_by_side import MAKE, THREADS, WARM, imports_mb, our_steps, ours, run

OPTIONS = {
    1: (
        "",
        "--checkpointing selective",
        "--checkpointing full",
        "--offload",
        "--reproducible",
        "--lora 16",
        "--lora 16 --quantize nf4",
    ),
    2: ("", "--reduce step", "--offload", "--reproducible"),
    4: ("", "--replicas 2"),
}
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def jobs_of(folder: str, steps: int) -> dict[tuple[int, str], list]:
    """{(ranks, option): command line}."""
    shared = flags(model=f"{folder}/sft", steps=steps, lr=1e-4, data=f"{folder}/sft.jsonl")
    shared += ours(folder, "sft", tokens=512, bins=4, max_length=512)
    jobs = {}
    for ranks, options in OPTIONS.items():
        launch = [] if ranks == 1 else [*LAUNCH, str(ranks)]
        for option in options:
            jobs[ranks, option] = [*launch, "train_sft.py", *shared, *option.split()]
    return jobs


def measured(jobs: dict, folder: str, rounds: int) -> dict[tuple[int, str], dict]:
    """Medians over the rounds of the median step, in seconds, and of the peak, in MB."""
    seconds, peaks = {job: [] for job in jobs}, {job: [] for job in jobs}
    for _ in range(rounds):
        for job, command in jobs.items():
            _, peak = run(command)
            steps = our_steps(f"{folder}/out")["seconds"][WARM:]
            seconds[job].append(statistics.median(steps))
            peaks[job].append(peak)
    imports = imports_mb(["train_sft.py"])
    return {
        job: {
            "step_seconds": statistics.median(seconds[job]),
            "peak_mb": statistics.median(peaks[job]) - imports,
        }
        for job in jobs
    }


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--try", action="store_true", dest="tiny", help="write no results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default=common.RESULTS / "cpu_options.json", type=Path)
    args = parser.parse_args()
    if args.tiny:
        args.rounds, args.steps = 1, WARM + 1
    with tempfile.TemporaryDirectory() as folder:
        common.run(["-c", MAKE, folder, "sft"], stdout=sys.stderr)
        found = measured(jobs_of(folder, args.steps), folder, args.rounds)
    rows = []
    for (ranks, option), one in found.items():
        base = found[ranks, ""]
        time = one["step_seconds"] / base["step_seconds"]
        memory = one["peak_mb"] / base["peak_mb"]
        rows.append({"ranks": ranks, "option": option, **one, "time": time, "memory": memory})
        size, step = one["peak_mb"], one["step_seconds"]
        print(
            f"{ranks} ranks  {option or 'none':28s} step {step:.3f} s, {time:.2f} times; "
            f"{size:4.0f} MB, {memory:.2f} times"
        )
    settings = {"threads of a rank": THREADS, "cores": os.cpu_count(), "precision": "fp32"}
    settings |= {"rounds": args.rounds, "steps": args.steps}
    if not args.tiny:
        result = {**common.origin("torch"), "settings": settings, "options": rows}
        common.save(args.out, result)


if __name__ == "__main__":
    main()
