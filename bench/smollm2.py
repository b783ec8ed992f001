"""SmolLM2-135M-Instruct through every script, on a CPU -> bench/results/smollm2_NAME.jsonl, .png

    python -m bench.smollm2 SmolLM2-135M-Instruct --messages messages.jsonl --pairs pairs.jsonl \\
        --gsm8k train.jsonl
    python -m bench.smollm2 SmolLM2-135M-Instruct --only ppo        # sums need no file

A run takes 10 to 45 minutes on two cores, and continues where it was stopped. Runs that are done
are not repeated: delete their folders in out/smollm2.

    grpo, grpo-1, grpo-2    two-digit sums asked in words, three seeds: runs/smollm2.sh
    ppo                     the same sums, with a value model
    gsm8k                   GRPO for the form of GSM8K's answers, a last line "#### number"
    sft                     conversations                       --messages
    reward, dpo             preference pairs                    --pairs
    given, distill          four of its layers learn from it, first on the last answers of
                            conversations, then on policy       --messages
    beside_trl              TRL's GRPOTrainer on what grpo trains on -> smollm2_grpo_trl.json, and
                            .png with both curves
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench import common
from bench.common import flags
from nanopost import hf, packing
from nanopost.config import Config
from nanopost.save import save_model
from nanopost.tokenizer import Tokenizer, tokenizer_files

SUMS = "out/smollm2/train.jsonl", "out/smollm2/held_out.jsonl"
ASKED = Path("out/smollm2/gsm8k.jsonl")
ANSWERED, STUDENT = Path("out/smollm2/answered.jsonl"), Path("out/smollm2/student")
KEPT = 0, 10, 20, 29  # of 30 layers
GRPO_STEPS = 80
# Metrics that TRL logs too and that mean the same there: not its reward_std and entropy.
BOTH = ("reward", "completions/mean_length", "completions/clipped_ratio", "grad_norm")
HINT = "\nThink step by step, then give the answer on a last line: #### number"


def sampled(rows, held_out, reward, **changes) -> list[str]:
    values = {
        "data": rows,
        "eval_data": held_out,
        "eval_rows": 100,
        "reward": reward,
        "prompts": 8,
        "group": 8,
        "minibatches": 1,
        "max_new_tokens": 16,
        "lr": 1e-5,
        "warmup": 0,
        "eval_every": 20,
        "save_every": 10,
    }
    return flags(**values | changes)


def jobs(args) -> dict[str, list[str]]:
    """{name: a script and its flags, but for --model and --out}."""
    found = {}
    for seed in (0, 1, 2):
        name = f"grpo-{seed}" if seed else "grpo"
        found[name] = ["train_grpo.py", *sampled(*SUMS, "gsm8k", steps=GRPO_STEPS, seed=seed)]
    found["ppo"] = [
        "train_ppo.py",
        *sampled(*SUMS, "gsm8k", steps=60, value_lr=2e-5, lam=1, ppo_epochs=1),
    ]
    if args.gsm8k:
        asked = sampled(ASKED, None, "format", steps=40, group=4, max_new_tokens=160)
        found["gsm8k"] = ["train_grpo.py", *asked, *flags(holdout=40)]
    stored = flags(rows=8, tokens=2048, warmup=2, save_every=10, eval_every=20, holdout=100)
    if args.messages:
        found["sft"] = ["train_sft.py", *stored, *flags(data=args.messages, steps=100, lr=2e-5)]
        teach = flags(teacher=args.model, data=ANSWERED, holdout=40, prompts=16, tokens=2048)
        teach += flags(max_prompt=200, max_new_tokens=48, steps=60, warmup=2, eval_every=20)
        on_given = flags(model=STUDENT, on_policy=0, beta=0, lr=3e-4)
        found["given"] = ["train_distill.py", *teach, *on_given]
        on_policy = flags(model="out/smollm2/given", beta=1, lr=1e-4)
        found["distill"] = ["train_distill.py", *teach, *on_policy]
    if args.pairs:
        pairs = [*stored, *flags(data=args.pairs, max_length=512, eval_rows=50)]
        found["reward"] = ["train_rm.py", *pairs, *flags(steps=60, lr=2e-5)]
        found["dpo"] = ["train_dpo.py", *pairs, *flags(steps=60, lr=2e-6, beta=0.1)]
    return found


def write_questions(path):
    """GSM8K's questions, with a hint of the form that is rewarded."""
    with open(path, encoding="utf-8") as file, open(ASKED, "w", encoding="utf-8") as out:
        for line in file:
            text = json.loads(line)["question"] + HINT
            out.write(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n")


def write_answered(path):
    """The last answer of each conversation, and what comes before it."""
    with open(path, encoding="utf-8") as file, open(ANSWERED, "w", encoding="utf-8") as out:
        for line in file:
            *prompt, answer = json.loads(line)["messages"]
            if answer["role"] == "assistant":
                out.write(json.dumps({"prompt": prompt, "completion": [answer]}) + "\n")


def write_student(model):
    """Embeddings, last norm and some layers of a model, as a model."""
    teacher = hf.load_model(model)
    config = Config.of({**teacher.config.hf, "num_hidden_layers": len(KEPT)})
    kept = []
    for name, p in teacher.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None:
            kept.append((name, p))
        elif int(layer[1]) in KEPT:
            place = KEPT.index(int(layer[1]))
            kept.append((name.replace(layer[0], f"model.layers.{place}."), p))
    save_model(STUDENT, kept, config, tokenizer_files(model, Tokenizer.load(model)))


def beside_trl(model: str):
    """TRL's GRPOTrainer on the rows of `grpo`, in their order, with its rates and settings.

    Its metrics are written as those of a run, so that nanopost.plot lays both curves over each
    other. Where all groups have equal rewards TRL steps all the same, on gradients of zero.
    """
    ours, out = Path("out/smollm2/grpo"), Path("out/smollm2/trl")
    if not (ours / "metrics.jsonl").exists():
        sys.exit(f"{ours} is not there: run --only grpo first")
    if not (out / "metrics.jsonl").exists():
        lines = Path(SUMS[0]).read_text().splitlines(keepends=True)
        order = packing.take(len(lines), 0, 0, 8 * GRPO_STEPS)
        out.mkdir(parents=True, exist_ok=True)
        ordered = out / "ordered.jsonl"
        ordered.write_text("".join(lines[i] for i in order))
        shared = flags(model=model, data=ordered, steps=GRPO_STEPS, lr=1e-5, weight_decay=0)
        batch = flags(batch=8, accumulate=8, group=8, max_new_tokens=16)
        command = ["-m", "bench.trl_grpo", *shared, *batch, *flags(reward="gsm8k", out=out)]
        done = common.run(command, stdout=subprocess.PIPE, text=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        columns = zip(*(theirs[name] for name in BOTH))
        steps = [{"step": k, **dict(zip(BOTH, values))} for k, values in enumerate(columns, 1)]
        for name, temperature in (("eval/accuracy", 1), ("eval/greedy", 0)):
            steps[-1][name] = held_out(out, temperature)
        result = {**common.origin("torch", "transformers", "trl"), "steps": steps}
        common.save(common.RESULTS / "smollm2_grpo_trl.json", result)
        text = "".join(json.dumps(step) + "\n" for step in steps)
        (out / "metrics.jsonl").write_text(text)
    picture = common.RESULTS / "smollm2_grpo_trl.png"
    command = ["-m", "nanopost.plot", ours, out, *flags(metrics=BOTH, smooth=5, out=picture)]
    common.run(command)


def held_out(model, temperature: float) -> float:
    """The share of a hundred held-out sums that a model gets right."""
    scored = Path("out/smollm2/scored.jsonl")
    asked = flags(model=model, data=SUMS[1], reward="gsm8k", limit=100, max_new_tokens=16)
    more = flags(temperature=temperature, device="cpu", out=scored)
    common.run(["-m", "nanopost.eval", *asked, *more])
    return sum(json.loads(line)["rewards"][0][0] for line in scored.open()) / 100


def run(name: str, command: list[str], model: str):
    """One run, from where it is; then its metrics and its picture among the results."""
    out = Path("out/smollm2", name)
    if not (out / "config.json").exists():
        again = ["--resume"] if (out / "metrics.jsonl").exists() else []
        script, *more = command
        common.run([script, "--model", model, *more, "--out", out, "--device", "cpu", *again])
    common.run(["-m", "nanopost.plot", out])
    label = name.replace("-", "_")
    shutil.copy(common.ROOT / out / "metrics.jsonl", common.RESULTS / f"smollm2_{label}.jsonl")
    shutil.copy(common.ROOT / out / "curves.png", common.RESULTS / f"smollm2_{label}.png")


def main():
    parser = common.parser(__doc__)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--messages", help="JSONL with messages")
    parser.add_argument("--pairs", help="JSONL with prompt, chosen and rejected")
    parser.add_argument("--gsm8k", help="JSONL with question")
    parser.add_argument(
        "--only", nargs="+", help="names of runs; default: all that have their file"
    )
    args = parser.parse_args()
    found = jobs(args)
    names = [*found, "beside_trl"]
    for name in args.only or ():
        if name not in names:
            parser.error(f"no run {name!r}: there are {', '.join(names)}, given their files")
    if not Path(SUMS[0]).exists():
        common.run(["runs/smollm2_sums.py", Path(SUMS[0]).parent])
    if args.gsm8k:
        write_questions(args.gsm8k)
    if args.messages:
        write_answered(args.messages)
        write_student(args.model)
    for name in args.only or names:
        if name == "beside_trl":
            beside_trl(args.model)
        else:
            run(name, found[name], args.model)


if __name__ == "__main__":
    main()
