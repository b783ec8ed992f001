"""What --reproducible costs, in time and memory -> bench/results/reproducible.json.

    python -m bench.reproducible              # on a CPU, one thread per rank, in fp32

SFT and GRPO of the model of side_by_side.py, with and without the flag, on one and two ranks. Jobs
take turns, --rounds times; steps count from the third on. Peak memory is the largest resident
size of a rank, less that of the same command with --help.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import common, side_by_side
from bench.common import flags

side_by_side.THREADS = 1


def jobs(folder, steps) -> dict[str, list[str]]:
    """{name: command line}."""
    shared = {"holdout": 4, "steps": steps, "warmup": 0, "save_every": 0, "eval_every": 0}
    shared |= {"device": "cpu", "overwrite": True}
    scripts = {
        "sft": flags(rows=48, tokens=1024, max_length=512, **shared),
        "equal": flags(
            reward="length:200:100", prompts=16, group=8, max_new_tokens=64, tokens=2048, **shared
        ),
    }
    found = {}
    for name, given in scripts.items():
        script = {"sft": "train_sft.py", "equal": "train_grpo.py"}[name]
        for ranks in (1, 2):
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            for flag in ([], ["--reproducible"]):
                own = flags(
                    model=f"{folder}/{name}", data=f"{folder}/{name}.jsonl", out=f"{folder}/out"
                )
                key = f"{script.removesuffix('.py')} on {ranks}{' reproducible' if flag else ''}"
                found[key] = [*launch, script, *own, *given, *flag]
    return found


def measured(command, folder) -> dict:
    _, peak = side_by_side.run(command)
    return {**side_by_side.our_steps(f"{folder}/out"), "peak_mb": peak}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sft", "equal"):
            make = [sys.executable, "-c", side_by_side.MAKE, folder, name]
            subprocess.run(make, cwd=common.ROOT, check=True)
        commands, runs = jobs(folder, args.steps), {}
        names = list(commands)
        for k in range(args.rounds):
            for name in names[k % len(names) :] + names[: k % len(names)]:
                found = measured(commands[name], folder)
                found["seconds"] = found["seconds"][side_by_side.WARM :]
                runs.setdefault(name, []).append(found)
                print(
                    f"round {k + 1}  {name:32s} {statistics.median(found['seconds']):.3f} s",
                    flush=True,
                )
        result = {"origin": common.origin("torch"), "settings": vars(args), "jobs": {}}
        for name, command in commands.items():
            script = command[5]
            _, imports = side_by_side.run([script, "--help"])
            seconds = [statistics.median(x["seconds"]) for x in runs[name]]
            peaks = [x["peak_mb"] - imports for x in runs[name]]
            result["jobs"][name] = {
                "step_seconds": statistics.median(seconds),
                "peak_mb": statistics.median(peaks),
                "rounds": runs[name],
            }
    for name in [name for name in names if not name.endswith("reproducible")]:
        plain, other = result["jobs"][name], result["jobs"][f"{name} reproducible"]
        time = other["step_seconds"] / plain["step_seconds"]
        memory = other["peak_mb"] - plain["peak_mb"]
        print(
            f"{name}: {time:.2f} times the step, {memory:+.0f} MB a rank on {plain['peak_mb']:.0f}"
        )
    common.save(Path(common.RESULTS) / "reproducible.json", result)


if __name__ == "__main__":
    main()
