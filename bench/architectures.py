"""SFT, DPO, GRPO and PPO on the toy, for each architecture -> bench/results/architectures.json.

    python -m bench.architectures                         # about ten minutes for each of them
    python -m bench.architectures --arch qwen3_5 --steps 5

The models are those of runs/toy.py --arch, the settings those of bench/toy.py: SFT on noisy sums;
from what it gives, DPO on its slips, GRPO, and PPO with a value model of its own. A run is one
process of one thread; what --runs already holds is not repeated. Held-out exact match, sampled at
temperature 1 and greedy, is on 821 sums that no run trains on.
"""

from pathlib import Path

from bench import common, toy
from bench.common import ROOT, flags
from runs.toy import ARCHITECTURES

VARIANTS = {"DPO": toy.Variant(), "GRPO": toy.grpo(), "PPO": toy.ppo()}
STEPS = {"SFT": 700, "DPO": 120, "GRPO": 60, "PPO": 80}


def learn(runs: Path, arch: str, seed: int, steps: dict[str, int]) -> dict[str, dict]:
    """{SFT or a variant: held-out exact match of its model}."""
    toy.run(["runs/toy.py", runs / "toy", "--arch", arch], runs / "toy.log")
    sft, pairs = runs / f"sft{seed}", runs / f"pairs{seed}"
    more = flags(steps=steps["SFT"])
    toy.train("train_sft.py", runs / "toy/model", runs / "toy/sft", sft, seed, more)
    toy.run(["runs/toy.py", pairs, "--pairs", sft], f"{pairs}.log")
    found = {"SFT": exact(toy.held_out(runs, sft, sft, seed))}
    for name, variant in VARIANTS.items():
        lines = toy.run_variant(runs, name, variant, seed, steps[name])
        found[name] = exact(lines[-1])
    return found


def exact(metrics: dict) -> dict[str, float]:
    return {"sampled": metrics["eval/accuracy"], "greedy": metrics["eval/greedy"]}


def table(found: dict[str, dict]) -> str:
    """Sampled, and in brackets greedy."""
    names = ["SFT", *VARIANTS]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for arch, runs in found.items():
        cells = [f"{runs[name]['sampled']:.3f} ({runs[name]['greedy']:.3f})" for name in names]
        lines.append(f"| {arch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--arch", nargs="+", default=[*ARCHITECTURES], choices=ARCHITECTURES)
    add("--seed", type=int, default=0)
    add("--steps", type=int, help=f"of each run; default: {STEPS}")
    add("--runs", default=ROOT / "out/architectures", type=Path, help="folder for the runs")
    add("--out", default=common.RESULTS, type=Path)
    args = parser.parse_args()
    steps = STEPS if args.steps is None else dict.fromkeys(STEPS, args.steps)
    found = {}
    for arch in args.arch:
        print(arch, flush=True)
        found[arch] = learn(args.runs.resolve() / arch, arch, args.seed, steps)
    print(table(found))
    result = {"steps": steps, "seed": args.seed, "settings": toy.SETTINGS, "held out": found}
    common.save(args.out / "architectures.json", {**common.origin("torch"), **result})


if __name__ == "__main__":
    main()
