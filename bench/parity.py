"""50 steps beside TRL's trainer, from the same weights, rows, order and AdamW, in fp32.

    python -m bench.parity sft                          # writes bench/results/sft_parity.json, .png
    python -m bench.parity dpo

TRL pads its rows, which it gets in the order in which our script takes them; ours are packed. Both
sides' rates fall linearly from --lr at the first step to --lr / --steps at the last.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer

from bench import assets, common
from nanopost import packing

ROWS, SEED, TOKENS = 8, 0, 2048


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


def both(folder: Path, kind: Kind, steps: int, lr: float) -> dict:
    """Train on both sides -> {metric: {"ours": one number a step, "theirs": likewise}}."""
    model, data, ordered = (folder / name for name in ("model", "rows.jsonl", "ordered.jsonl"))
    assets.make_model(model, template=kind.template)
    rows = kind.rows(AutoTokenizer.from_pretrained(model), 300)
    assets.write_rows(data, rows)
    assets.write_rows(folder / "held_out.jsonl", rows[:4])
    order = packing.take(len(rows), SEED, 0, steps * ROWS)
    assets.write_rows(ordered, [rows[i] for i in order])

    shared = common.flags(model=model, steps=steps, lr=lr, weight_decay=0.1)
    done = common.run(
        ["-m", *kind.theirs, *shared, *common.flags(data=ordered, batch=ROWS)],
        stdout=subprocess.PIPE,
        text=True,
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    own = common.flags(
        data=data,
        eval_data=folder / "held_out.jsonl",
        out=folder / "out",
        rows=ROWS,
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
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder")
    args = parser.parse_args()
    kind = KINDS[args.kind]
    lr = args.lr or kind.lr
    with tempfile.TemporaryDirectory() as folder:
        curves = both(Path(folder), kind, args.steps, lr)
    largest = {name: max(gaps(curve)) for name, curve in curves.items()}
    settings = {
        "model": "Qwen3, 4 layers, 256 wide, vocabulary 4,096, random weights",
        "precision": "fp32",
        "steps": args.steps,
        "rows": ROWS,
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
    common.save(args.out / f"{args.kind}_parity.json", result)
    plot(
        curves,
        f"{kind.ours}, packed",
        f"TRL {args.kind.upper()}Trainer, padded",
        args.out / f"{args.kind}_parity.png",
    )
    print("largest differences:  " + "   ".join(f"{name} {x:.1e}" for name, x in largest.items()))


if __name__ == "__main__":
    main()
