"""50 steps beside TRL's trainer, from the same weights, rows, order and AdamW, in fp32.

    python -m bench.parity sft                          # writes bench/results/sft_parity.json, .png
    python -m bench.parity dpo
    python -m bench.parity sft --model SmolLM2-135M-Instruct --data messages.jsonl --name real_sft

The first two make a random model and rows. With --model and --data, rows of more than --max_length
tokens are left out, and the last answer of a conversation is trained. TRL pads its rows, which it
gets in the order in which our script takes them; ours are packed. Both sides' rates fall linearly
from --lr at the first step to --lr / --steps at the last.
"""

import gzip
import json
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from bench import assets, common
from nanopost import packing

SEED, TOKENS = 0, 2048
RANDOM = "Qwen3, 4 layers, 256 wide, vocabulary 4,096, random weights"


class Kind(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    rows: object
    template: str
    lr: float
    names: tuple[str, ...]  # of the metrics that both sides log


KINDS = {
    "sft": Kind(
        ours="train_sft.py",
        theirs=("bench.trl_sft",),
        rows=assets.chat_rows,
        template=assets.CHATML,
        lr=1e-3,
        names=("loss", "grad_norm", "entropy"),
    ),
    "dpo": Kind(
        ours="train_dpo.py",
        theirs=("bench.trl_preference", "dpo"),
        rows=assets.pair_rows,
        template=assets.TIGHT,
        lr=1e-4,
        names=("loss", "rewards/margins", "grad_norm"),
    ),
}


def real_rows(tokenizer, path, longest: int) -> list[dict]:
    """The rows of a file that have at most `longest` tokens; of a conversation, its last answer."""
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        given = [json.loads(line) for line in file]
    rows = []
    for row in given:
        if "messages" in row:
            *prompt, answer = row["messages"]
            row = {"prompt": prompt, "completion": [answer]}
        sides = [side for side in ("completion", "chosen", "rejected") if side in row]
        row = {"prompt": row["prompt"], **{side: row[side] for side in sides}}
        whole = [tokenizer.apply_chat_template(row["prompt"] + row[x]) for x in sides]
        lengths = [len(x["input_ids"] if hasattr(x, "keys") else x) for x in whole]
        roles = [row[x][-1]["role"] for x in sides]
        if max(lengths) <= longest and set(roles) == {"assistant"}:
            rows.append(row)
    return rows


def both(folder: Path, kind: Kind, args, lr: float) -> dict:
    """Train on both sides -> {metric: {"ours": one number a step, "theirs": likewise}}."""
    model, data, ordered = (folder / name for name in ("model", "rows.jsonl", "ordered.jsonl"))
    if args.model:
        model = args.model
        rows = real_rows(AutoTokenizer.from_pretrained(model), args.data, args.max_length)
    else:
        assets.make_model(model, template=kind.template)
        rows = kind.rows(AutoTokenizer.from_pretrained(model), 300)
    assets.write_rows(data, rows)
    assets.write_rows(folder / "held_out.jsonl", rows[:4])
    order = packing.take(len(rows), SEED, 0, args.steps * args.rows)
    assets.write_rows(ordered, [rows[i] for i in order])

    shared = common.flags(model=model, steps=args.steps, lr=lr, weight_decay=0.1)
    done = common.run(
        ["-m", *kind.theirs, *shared, *common.flags(data=ordered, batch=args.rows)],
        stdout=subprocess.PIPE,
        text=True,
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    own = common.flags(
        data=data,
        eval_data=folder / "held_out.jsonl",
        out=folder / "out",
        rows=args.rows,
        seed=SEED,
        tokens=TOKENS,
        warmup=0,
        eval_every=0,
        save_every=0,
    )
    common.run([kind.ours, *shared, *own])
    ours = common.metrics(folder / "out")[1:]
    curves = {}
    for name in kind.names:
        curves[name] = {"ours": [m[name] for m in ours], "theirs": theirs[name]}
    return curves


def gaps(curve: dict) -> list[float]:
    return [abs(ours - theirs) for ours, theirs in zip(curve["ours"], curve["theirs"])]


def plot(curves: dict, our_label: str, their_label: str, path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2,
        len(curves),
        figsize=(5 * len(curves), 5.5),
        sharex=True,
        height_ratios=[2, 1],
        layout="constrained",
    )
    for (name, curve), (top, bottom) in zip(curves.items(), axes.T):
        steps = range(1, len(curve["ours"]) + 1)
        top.plot(steps, curve["theirs"], "tab:orange", linewidth=5, alpha=0.5, label=their_label)
        top.plot(steps, curve["ours"], "tab:blue", linewidth=1.5, label=our_label)
        top.set_title(name)
        top.legend()
        bottom.semilogy(steps, [max(gap, 1e-9) for gap in gaps(curve)], ".", color="black")
        bottom.axhline(1e-3, color="tab:red", linewidth=1, linestyle="--")
        bottom.set(xlabel="step", ylabel="|difference|", ylim=(1e-8, 1e-2))
    figure.savefig(path, dpi=120)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, help="default: 1e-3 for sft, 1e-4 for dpo")
    parser.add_argument("--rows", type=int, default=8, help="per optimizer step")
    parser.add_argument("--model", help="folder; default: a random one")
    parser.add_argument("--data", help="rows for --model")
    parser.add_argument("--max_length", type=int, default=512, help="of a row of --data")
    parser.add_argument("--name", help="of the results; default: sft_parity or dpo_parity")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder")
    args = parser.parse_args()
    kind = KINDS[args.kind]
    lr, name = args.lr or kind.lr, args.name or f"{args.kind}_parity"
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    with tempfile.TemporaryDirectory() as folder:
        curves = both(Path(folder), kind, args, lr)
    largest = {metric: max(gaps(curve)) for metric, curve in curves.items()}
    settings = {
        "model": Path(args.model).name if args.model else RANDOM,
        "precision": "fp32",
        "steps": args.steps,
        "rows": args.rows,
        "lr": lr,
        "schedule": "linear to 0, no warm-up",
        "weight_decay": 0.1,
        "tokens": TOKENS,
    }
    result = {
        **common.origin("torch", "transformers", "trl"),
        "settings": settings,
        "largest_difference": largest,
        **curves,
    }
    common.save(args.out / f"{name}.json", result)
    plot(
        curves,
        f"{kind.ours}, packed",
        f"TRL {args.kind.upper()}Trainer, padded",
        args.out / f"{name}.png",
    )
    print(
        "largest differences:  " + "   ".join(f"{metric} {x:.1e}" for metric, x in largest.items())
    )


if __name__ == "__main__":
    main()
