"""Do alarms tell a healthy run from a sick one? All scripts on the toy, over several seeds, with
their usual settings, where no alarm may sound, and with an illness planted, which must be found.

    python -m bench.alarms                       # about an hour on two cores
    python -m bench.alarms --seeds 0 --only ill

What --runs already holds is not repeated. Whole, it writes bench/results/alarms.json. Exits with 1
at a false alarm, or at a missed illness.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench import common, toy
from bench.common import ROOT
from bench.toy import SETTINGS

EVALUATED = "--eval_every 20 --eval_rows 400"
REWARDS = '''
from nanopost.verify import exact, text_of


def constant(completions, **columns):
    return [0.5 for _ in completions]


def long(completions, **columns):
    """Length hardly counts, but an advantage is divided by the spread."""
    return [1 + 5e-5 * len(text_of(c)) for c in completions]


def dead(completions, step, answer, **columns):
    """A verifier that fails from step 21 on."""
    return [0.0 if s > 20 else float(a in text_of(c)) for c, s, a in zip(completions, step, answer)]
'''


class Case(NamedTuple):
    script: str
    flags: str = ""
    alarms: tuple[str, ...] = ()  # one of them must sound
    within: int = 0  # steps


HEALTHY = {
    "sft": Case("train_sft.py", "--steps 300"),
    "rm": Case("train_rm.py", "--steps 400"),
    # At the toy's usual rate, twice this one, seed 1 falls ill for fifty steps.
    "dpo": Case("train_dpo.py", "--steps 120 --lr 1e-4"),
    "dpo, simpo": Case("train_dpo.py", "--steps 120 --loss simpo --beta 2 --gamma 1"),
    "kto": Case("train_kto.py", "--steps 120"),
    "online dpo": Case("train_online_dpo.py", "--steps 120"),
    "grpo": Case("train_grpo.py", "--steps 100"),
    "grpo, kl": Case("train_grpo.py", "--steps 60 --beta 0.01"),
    "grpo, dapo": Case("train_grpo.py", "--steps 60 --clip 0.2 0.28 --resample 2"),
    "grpo, gspo": Case(
        "train_grpo.py", "--steps 60 --ratio sequence --agg sequence --clip 0.03 0.04"
    ),
    "distill": Case("train_distill.py", "--steps 80 --teacher {teacher}"),
    "distill, forward kl": Case("train_distill.py", "--steps 80 --teacher {teacher} --beta 0"),
    "ppo": Case("train_ppo.py", "--steps 80"),
    "ppo, kl": Case("train_ppo.py", "--steps 80 --beta 0.02"),
    "ppo, head": Case("train_ppo.py", "--steps 80 --value_model head"),
}
ILL = {
    "a constant reward": Case(
        "train_grpo.py", "--steps 10 --reward {rewards}:constant", ("reward_constant",), 5
    ),
    "a reward that dies": Case(
        "train_grpo.py", "--steps 40 --reward {rewards}:dead", ("reward_constant",), 30
    ),
    "a love of length": Case(
        "train_grpo.py",
        "--steps 50 --reward {rewards}:long --max_new_tokens 64",
        ("length_creeping",),
        40,
    ),
    "grpo at thirty times the rate": Case(
        "train_grpo.py",
        "--steps 60 --lr 3e-2 --beta 0.001",
        ("kl_exploding", "entropy_collapsed", "reward_std_collapsed", "reward_constant"),
        40,
    ),
    "ppo at forty times the rate": Case(
        "train_ppo.py",
        "--steps 60 --lr 2e-2 --beta 0.001",
        ("kl_exploding", "entropy_collapsed", "reward_constant", "value_explains_nothing"),
        40,
    ),
    "a value model that does not learn": Case(
        "train_ppo.py",
        "--steps 40 --lr 1e-5 --value_lr 1e-9",
        ("value_explains_nothing",),
        35,
    ),
    "dpo at fifty times the rate": Case(
        "train_dpo.py",
        "--steps 80 --lr 1e-2",
        ("chosen_and_rejected_sinking",),
        40,
    ),
    "distillation at fifty times the rate": Case(
        "train_distill.py",
        "--steps 40 --teacher {teacher} --lr 5e-2",
        ("loss_exploding", "entropy_collapsed"),
        30,
    ),
    "sft at a thousand times the rate": Case(
        "train_sft.py", "--steps 15 --lr 3", ("loss_exploding",), 10
    ),
    "sft of twenty rows by heart": Case(
        "train_sft.py",
        "--steps 200 --data {few} --rows 20 --lr 3e-3",
        ("held_out_falling",),
        200,
    ),
}


def train(runs: Path, name: str, case: Case, seed: int) -> list[dict]:
    """-> the alarms of a run."""
    sft, pairs = runs / f"sft{seed}", runs / f"pairs{seed}/pairs"
    data, model = runs / "toy/prompts", sft
    if SETTINGS[case.script] == toy.PAIRS or case.script == "train_rm.py":
        data = pairs
    if case.script == "train_sft.py":
        data = runs / "toy/sft"
        model = sft if "heart" in name else runs / "toy/model"
    files = {"rewards": runs / "rewards.py", "few": runs / "few.jsonl"}
    own = case.flags.format(**files, teacher=runs / f"teacher{seed}").split()
    out = runs / "alarms" / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    toy.train(case.script, model, data, out, seed, [*EVALUATED.split(), *own])
    log = out / "alarms.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def verdict(case: Case, alarms: list[dict]) -> str:
    """ "" if it is right, else what is wrong."""
    if not case.alarms:
        return ", ".join(f"false: {alarm['alarm']} at step {alarm['step']}" for alarm in alarms)
    found = [alarm["step"] for alarm in alarms if alarm["alarm"] in case.alarms]
    if not found:
        return f"none of {', '.join(case.alarms)}"
    late = f"found at step {found[0]}, after {case.within}"
    return late if found[0] > case.within else ""


def main():
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--only", choices=["healthy", "ill"])
    add("--jobs", type=int, default=os.cpu_count())
    add("--runs", default=ROOT / "out/bench", type=Path, help="folder for the runs themselves")
    args = parser.parse_args()
    runs = args.runs.resolve()
    toy.run(["runs/toy.py", runs / "toy"], runs / "toy.log")
    (runs / "rewards.py").write_text(REWARDS)
    rows = (runs / "toy/sft.jsonl").read_text().splitlines(keepends=True)
    (runs / "few.jsonl").write_text("".join(rows[:20]))
    cases = {"healthy": HEALTHY, "ill": ILL}
    cases = cases[args.only] if args.only else HEALTHY | ILL
    failed, table = 0, []
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: toy.make_models(runs, seed, None), args.seeds))
        list(pool.map(lambda seed: toy.make_teacher(runs, seed), args.seeds))
        jobs = {
            (name, seed): pool.submit(train, runs, name, case, seed)
            for seed in args.seeds
            for name, case in cases.items()
        }
        for (name, seed), job in jobs.items():
            alarms = job.result()
            wrong = verdict(cases[name], alarms)
            failed += bool(wrong)
            found = ", ".join(f"{alarm['alarm']} at {alarm['step']}" for alarm in alarms)
            print(f"{name}, seed {seed}: {wrong or 'right'} ({found or 'no alarm'})", flush=True)
            table.append({"case": name, "seed": seed, "wrong": wrong, "alarms": alarms})
    if not args.only:
        result = {**common.origin("torch"), "settings": SETTINGS, "runs": table}
        common.save(common.RESULTS / "alarms.json", result)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
