"""Every algorithm on the toy, short runs over several seeds -> tables and plots in bench/results.

    python -m bench.toy models          # the toy, and each seed's SFT model, pairs and reward model
    python -m bench.toy preference      # DPO and its family, KTO, online DPO
    python -m bench.toy grpo            # GRPO and its family
    python -m bench.toy ppo             # rewarded for the right sum, or by the reward model
    python -m bench.toy distill         # the SFT model learns from one that GRPO has made sure

A run is one process of one thread; --jobs of them run side by side. What --runs already holds is
not repeated. A variant that is a fork runs in a copy of the repository, with forks/NAME.diff
applied. A cell is the median over the seeds, or the worst of them. Held-out exact match, sampled at
temperature 1 and greedy, is on 821 sums that no run trains on.
"""

import json
import math
import os
import re
import shutil
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench import common
from bench.common import ROOT, flags


class Variant(NamedTuple):
    flags: str = ""
    script: str = "train_dpo.py"
    fork: str = ""


def kto(flags: str) -> Variant:
    return Variant(flags, "train_kto.py")


def grpo(flags: str = "", fork: str = "") -> Variant:
    return Variant(flags, "train_grpo.py", fork)


def ppo(flags: str = "") -> Variant:
    return Variant(flags, "train_ppo.py")


PREFERENCE = {
    "sigmoid": Variant(),
    "sigmoid_norm": Variant("--loss sigmoid_norm"),
    "ipo": Variant("--loss ipo --beta 0.1"),
    "hinge": Variant("--loss hinge"),
    "robust": Variant("--loss robust --smoothing 0.05"),
    "exo": Variant("--loss exo --smoothing 0.001"),
    "nca": Variant("--loss nca"),
    "bco": kto("--loss bco"),
    "sppo": Variant("--loss sppo"),
    "aot": kto("--loss aot"),
    "aot_unpaired": kto("--loss aot_unpaired"),
    "apo_zero": Variant("--loss apo_zero"),
    "apo_down": Variant("--loss apo_down"),
    "discopop": Variant("--loss discopop"),
    "simpo": Variant("--loss simpo --beta 2 --gamma 1"),
    "cpo": Variant("--loss cpo sft --loss_weights 1 0.2"),
    "orpo": Variant("--loss orpo"),
    "kto": kto("--loss kto"),
    "sigmoid + 0.2 sft (RPO)": Variant("--loss sigmoid sft --loss_weights 1 0.2"),
    "sigmoid, beta 0.1": Variant("--beta 0.1"),
    "sigmoid, reference follows": Variant("--follow_every 64", fork="tr_dpo"),
    "online": Variant("", "train_online_dpo.py"),
}
GRPO = {
    "GRPO (token)": grpo(),
    "GRPO (sequence)": grpo("--agg sequence"),
    "Dr. GRPO": grpo("--adv mean --agg constant"),
    "DAPO": grpo("--clip 0.2 0.28 --resample 2"),
    "RLOO": grpo("--adv loo --ratio sequence_sum --agg sequence --beta 0.01", fork="kl_reward"),
    "GSPO": grpo("--ratio sequence --agg sequence --clip 0.03 0.04"),
    "LUSPO": grpo("--ratio sequence --agg sequence_sum --clip 0.03 0.04"),
    "CISPO": grpo("--loss cispo"),
    "SAPO": grpo("--loss sapo --agg sequence"),
    "GDPO": grpo("--adv gdpo --reward exact regex:<answer>\\d+</answer>", fork="gdpo"),
    "two-sided clip": grpo("--delta 2", fork="two_sided_clip"),
    "batch std": grpo("--adv batch"),
    "entropy bonus": grpo("--entropy_coef 0.003", fork="entropy_bonus"),
    "KL 0.01": grpo("--beta 0.01"),
    "half of the tokens": grpo("--top_entropy 0.5", fork="top_entropy"),
    "a fifth of the tokens": grpo("--top_entropy 0.2", fork="top_entropy"),
    "8 minibatches": grpo("--minibatches 8"),
    "8 minibatches, off-policy mask": grpo(
        "--minibatches 8 --off_policy_mask 0.05", fork="off_policy_mask"
    ),
    "GRPO, half the rate": grpo("--lr 5e-4"),
    "CISPO, half the rate": grpo("--loss cispo --lr 5e-4"),
    "SAPO, half the rate": grpo("--loss sapo --agg sequence --lr 5e-4"),
}
FROM_REWARD_MODEL = "--reward exact model:{rm} --reward_weights 0 1"
PPO = {
    "exact reward": ppo(),
    "exact reward, head on the policy": ppo("--value_model head"),
    "reward model": ppo(f"{FROM_REWARD_MODEL} --score_scale --beta 0.4"),
    "reward model, no KL": ppo(FROM_REWARD_MODEL),
}
TEACHER = "--teacher {teacher}"


def distill(flags: str = "") -> Variant:
    return Variant(f"{TEACHER} {flags}", "train_distill.py")


DISTILL = {
    "reverse KL": distill(),
    "forward KL": distill("--beta 0"),
    "JSD, beta 0.5": distill("--beta 0.5"),
    "reverse KL, top 8": distill("--teacher_top_k 8"),
    "forward KL, on given answers": distill(
        "--beta 0 --on_policy 0 --data {toy}/sft.jsonl --eval_data {toy}/sft_heldout.jsonl"
    ),
    "policy gradient": grpo(f"{TEACHER} --prompts 32 --minibatches 1", fork="distill"),
}
FAMILIES = {"preference": PREFERENCE, "grpo": GRPO, "ppo": PPO, "distill": DISTILL}
STEPS = {"preference": 120, "grpo": 60, "ppo": 80, "distill": 80}
# The toy's settings, as in runs/toy*.sh; a variant's own flags override them.
PAIRS = "--rows 64 --lr 2e-4 --warmup 20 --beta 1"
SAMPLED = "--reward exact --max_new_tokens 8"
SETTINGS = {
    "train_sft.py": "--steps 700 --rows 64 --lr 3e-3 --warmup 20",
    "train_rm.py": "--steps 800 --rows 64 --lr 5e-4 --warmup 20",
    "train_dpo.py": PAIRS,
    "train_kto.py": PAIRS,
    "train_online_dpo.py": f"{SAMPLED} --prompts 64 --group 4 --lr 5e-4 --warmup 20 --beta 0.1",
    "train_grpo.py": f"{SAMPLED} --prompts 64 --group 8 --minibatches 2 --lr 1e-3 --warmup 10",
    "train_distill.py": "--max_new_tokens 8 --prompts 256 --lr 1e-3 --warmup 5",
    "train_ppo.py": f"{SAMPLED} --prompts 256 --ppo_epochs 2 --minibatches 2 --lr 5e-4 --warmup 10",
}


# ------------------------------------------------------------------------------------- runs, models
def run(command, log, root=ROOT):
    """One process of one thread; it writes to a log."""
    environment = os.environ | common.OFFLINE | {"OMP_NUM_THREADS": "1"}
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        done = common.run(
            command, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: see {log}")


def train(script, model, data, out, seed, more=(), root=ROOT):
    """Run a script with the toy's settings, unless `out` holds a whole run of it."""
    if (out / "config.json").exists():
        return
    own = flags(
        model=model,
        data=f"{data}.jsonl",
        eval_data=f"{data}_heldout.jsonl",
        out=out,
        seed=seed,
        device="cpu",
        save_every=0,
        eval_every=0,
        overwrite=True,
    )
    run([script, *own, *SETTINGS[script].split(), *more], f"{out}.log", root)


def make_models(runs: Path, seed: int, steps: int | None):
    """A seed's SFT model, the pairs of its slips, and a reward model."""
    sft, pairs, rm = runs / f"sft{seed}", runs / f"pairs{seed}", runs / f"rm{seed}"
    more = flags(steps=steps)
    train("train_sft.py", runs / "toy/model", runs / "toy/sft", sft, seed, more)
    run(["runs/toy.py", pairs, "--pairs", sft], f"{pairs}.log")
    train("train_rm.py", sft, pairs / "pairs", rm, seed, more)


def make_teacher(runs: Path, seed: int):
    """What GRPO makes of a seed's SFT model."""
    more = flags(steps=100)
    train(
        "train_grpo.py",
        runs / f"sft{seed}",
        runs / "toy/prompts",
        runs / f"teacher{seed}",
        seed,
        more,
    )


def forked(runs: Path, fork: str) -> Path:
    """A copy of what the scripts need, with a fork's patch applied -> its folder."""
    tree = runs / "forks" / fork
    shutil.rmtree(tree, ignore_errors=True)
    for folder in ("nanopost", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder)
    for script in ROOT.glob("train_*.py"):
        shutil.copy(script, tree)
    # The copy may be inside this repository, to which git would apply the patch: it is to see none.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    patch = ROOT / "forks" / f"{fork}.diff"
    subprocess.run(["git", "apply", patch], cwd=tree, env=environment, check=True)
    return tree


def run_variant(runs: Path, name: str, variant: Variant, seed: int, steps: int) -> list[dict]:
    """-> its metrics, those of step 0 first."""
    sft = runs / f"sft{seed}"
    data = runs / "toy/prompts"
    if SETTINGS[variant.script] == PAIRS:
        data = runs / f"pairs{seed}/pairs"
    out = runs / variant.script.removesuffix(".py") / re.sub("[ /]", "_", f"{name}-{seed}")
    root = ROOT
    if variant.fork:
        root = runs / "forks" / variant.fork
    places = {"rm": runs / f"rm{seed}", "teacher": runs / f"teacher{seed}", "toy": runs / "toy"}
    more = variant.flags.format(**places).split()
    train(variant.script, sft, data, out, seed, [*more, *flags(steps=steps)], root)
    lines = common.metrics(out)
    if variant.script not in ("train_grpo.py", "train_ppo.py"):  # these evaluate themselves
        lines[0] |= held_out(runs, sft, sft, seed)
        lines[-1] |= held_out(runs, out, sft, seed)
    before, after = lines[0], lines[-1]
    changes = []
    for key in ("accuracy", "greedy"):
        changes.append(f"{key} {before[f'eval/{key}']:.3f} -> {after[f'eval/{key}']:.3f}")
    print(f"  {name}, seed {seed}: {', '.join(changes)}", flush=True)
    return lines


def held_out(runs: Path, model: Path, sft: Path, seed: int) -> dict[str, float]:
    """Held-out exact match of a model (sampled: a mean of four samples), and its KL to the SFT
    model, from nanopost.eval; kept in a file beside the model's folder."""
    file = Path(f"{model}.eval.json")
    if file.exists():
        return json.loads(file.read_text())
    shared = flags(
        model=model,
        data=runs / "toy/prompts_heldout.jsonl",
        max_new_tokens=8,
        seed=seed,
        device="cpu",
    )
    asked = {
        "eval/accuracy": flags(reward="exact", samples=4),
        "eval/greedy": flags(reward="exact"),
        "eval/kl": flags(kl=sft),
    }
    found = {}
    for name, question in asked.items():
        log = Path(f"{model}.eval.log")
        run(["-m", "nanopost.eval", *shared, *question], log)
        # accuracy exact         0.3130   95% interval   0.2822 to   0.3456   821 rows
        found[name] = float(
            re.search(r"^(?:accuracy|kl) .*?(-?\d+\.\d+)", log.read_text(), re.M)[1]
        )
    common.save(file, found)
    return found


# --------------------------------------------------------------------------------- tables and plots
def steps_to(lines: list[dict], level: float = 0.8) -> float:
    """The first step whose rollouts are that good, as a mean of five steps. Infinite if there is
    none, or if rollouts were selected."""
    rewards = []
    for m in lines[1:]:
        if m.get("groups") == m.get("prompts_drawn"):
            rewards.append(m["rewards/exact/mean"])
    for k in range(5, len(rewards) + 1):
        if statistics.mean(rewards[k - 5 : k]) >= level:
            return k
    return math.inf


def summary(runs: dict[int, list[dict]]) -> dict[str, float | None]:
    """{seed: metrics} -> a row of the table."""
    median = statistics.median
    first = [lines[0] for lines in runs.values()]
    last = [lines[-1] for lines in runs.values()]
    rises = [after["eval/accuracy"] - before["eval/accuracy"] for before, after in zip(first, last)]
    row = {
        "sampled before": median(m["eval/accuracy"] for m in first),
        "sampled": median(m["eval/accuracy"] for m in last),
        "worst rise": min(rises),
        "greedy before": median(m["eval/greedy"] for m in first),
        "greedy": median(m["eval/greedy"] for m in last),
    }
    for name, key in (("pairs right", "eval/rewards/accuracies"), ("kl", "eval/kl")):
        if key in last[0]:
            row[name] = median(m[key] for m in last)
    if "rewards/exact/mean" in last[0]:
        steps = median(steps_to(lines) for lines in runs.values())
        row["steps to 0.8"] = steps if steps < math.inf else None
    if "val/explained_variance" in last[0]:
        ends = []
        for lines in runs.values():
            last_steps = lines[1:][-10:]
            ends.append(statistics.mean(m["val/explained_variance"] for m in last_steps))
        row["explained variance"] = median(ends)
    return row


def cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if name == "steps to 0.8" else f"{value:.3f}"


def table(rows: dict[str, dict]) -> str:
    columns = {}  # an ordered set
    for row in rows.values():
        columns |= dict.fromkeys(row)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        cells = [cell(column, row.get(column)) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: dict[str, dict[int, list[dict]]], path):
    """Reward of the rollouts over the steps: a panel for each variant, a line for each seed."""
    from matplotlib import pyplot as plt

    height = math.ceil(len(runs) / 4)
    figure, axes = plt.subplots(
        height,
        4,
        figsize=(14, 2.4 * height),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[len(runs) :]:
        axis.axis("off")
    for axis, (name, of_seed) in zip(axes.flat, runs.items()):
        for lines in of_seed.values():
            steps = [m["step"] for m in lines[1:]]
            axis.plot(steps, [m["rewards/exact/mean"] for m in lines[1:]], linewidth=1)
        axis.axhline(0.8, color="gray", linewidth=0.5, linestyle="--")
        axis.set_title(name, fontsize=9)
    figure.supxlabel("step")
    figure.supylabel("right sums among the rollouts")
    figure.savefig(path, dpi=75)


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("what", choices=["models", *FAMILIES])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--only", nargs="+", metavar="NAME", help="only these variants")
    add(
        "--steps", type=int, help=f"default: {STEPS}; models: 700 for SFT, 800 for the reward model"
    )
    add("--jobs", type=int, default=os.cpu_count())
    add("--runs", default=ROOT / "out/bench", type=Path, help="folder for the runs themselves")
    add("--out", default=common.RESULTS, type=Path)
    args = parser.parse_args()
    runs = args.runs.resolve()
    if args.what == "models":
        run(["runs/toy.py", runs / "toy"], runs / "toy.log")
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: make_models(runs, seed, args.steps), args.seeds))
        return

    variants = FAMILIES[args.what]
    names = args.only or list(variants)
    unknown = [name for name in names if name not in variants]
    if unknown:
        parser.error(f"--only {unknown}: the variants are {', '.join(map(repr, variants))}")
    steps = args.steps or STEPS[args.what]
    for fork in {variants[name].fork for name in names} - {""}:
        forked(runs, fork)
    if args.what == "distill":
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: make_teacher(runs, seed), args.seeds))
    if args.what in ("preference", "distill"):
        for seed in args.seeds:  # before the pool, where all variants would ask for it at once
            held_out(runs, runs / f"sft{seed}", runs / f"sft{seed}", seed)
    found = {name: {} for name in names}
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {}
        for seed in args.seeds:
            for name in names:
                futures[name, seed] = pool.submit(
                    run_variant, runs, name, variants[name], seed, steps
                )
        for (name, seed), future in futures.items():
            found[name][seed] = future.result()

    rows = {name: summary(of_seed) for name, of_seed in found.items()}
    print(table(rows))
    result = {
        **common.origin("torch"),
        "steps": steps,
        "seeds": args.seeds,
        "variants": {name: variants[name]._asdict() for name in names},
        "settings": SETTINGS,
        "table": rows,
    }
    common.save(args.out / f"toy_{args.what}.json", result)
    (args.out / f"toy_{args.what}.md").write_text(table(rows) + "\n")
    if args.what in ("grpo", "ppo"):
        plot(found, args.out / f"toy_{args.what}.png")


if __name__ == "__main__":
    main()
