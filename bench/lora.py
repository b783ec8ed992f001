"""LoRA and QLoRA beside TRL with peft and bitsandbytes -> bench/results/cpu_lora.json.

    python -m bench.lora                           # on two threads of a CPU, in fp32
    python -m bench.lora --model smollm2           # a folder's model, not the bench's random one
    python -m bench.lora --try                     # one short round: does the script work?

Jobs take turns, and peak memory is that above the imports: see side_by_side.py. Full training is
beside each for comparison. Rank 16 on all linear layers of the blocks.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from bench import common
from bench.common import flags
from bench.side_by_side import MAKE, THREADS, WARM, interleaved, ours, print_table, ratio

KINDS = {
    "full": {},
    "lora": {"lora": 16},
    "nf4": {"lora": 16, "quantize": "nf4"},
}


def jobs_of(name: str, model: str, folder: str, steps: int, tokens: int) -> dict:
    """{job: command line}: SFT in steps of 2,048 tokens, or DPO in steps of 4 pairs."""
    jobs = {}
    shared = flags(model=model, steps=steps, lr=1e-4)
    for kind, values in KINDS.items():
        more = flags(**values)
        if name == "sft":
            data = f"{folder}/sft.jsonl"
            theirs = ["-m", "bench.trl_sft", *shared, "--packing", *flags(data=data)]
            theirs += flags(batch=1, accumulate=4)
            own = ours(folder, name, tokens=tokens, bins=2048 // tokens, max_length=512, data=data)
            mine = ["train_sft.py", *shared, *own]
        else:
            ordered, data = f"{folder}/dpo-ordered.jsonl", f"{folder}/dpo.jsonl"
            theirs = ["-m", "bench.trl_preference", "dpo", *shared, *flags(data=ordered)]
            theirs += flags(batch=1, accumulate=4)
            own = ours(folder, name, tokens=tokens, rows=4, data=data)
            mine = ["train_dpo.py", *shared, *own]
        jobs[f"trl {kind}"] = [*theirs, *more]
        jobs[f"nanopost {kind}"] = [*mine, *more]
    return jobs


def with_template_of(ours, given, folder) -> str:
    """`given`, a model folder, with the template of ours, in which TRL finds the answers."""
    shutil.copytree(given, folder, copy_function=os.symlink)
    template = Path(folder, "chat_template.jinja")
    template.unlink(missing_ok=True)
    template.symlink_to(Path(ours, "chat_template.jinja"))
    return folder


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--try", action="store_true", dest="tiny", help="write no results")
    parser.add_argument("--work", nargs="+", default=["sft", "dpo"], choices=["sft", "dpo"])
    parser.add_argument("--model", help="folder; default: a random Qwen3, 4 layers, 256 wide")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--tokens", type=int, default=512, help="of our micro-batches; TRL's are of 512"
    )
    parser.add_argument("--out", default=common.RESULTS / "cpu_lora.json", type=Path)
    args = parser.parse_args()
    if args.tiny:
        args.rounds, args.steps = 1, WARM + 1
    settings = {"threads": THREADS, "cores": os.cpu_count(), "precision": "fp32", "rank": 16}
    settings |= {"rounds": args.rounds, "steps": args.steps, "tokens": args.tokens}
    settings["model"] = Path(args.model).name if args.model else "random Qwen3, 4 layers, 256 wide"
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    result = {**common.origin(*packages), "settings": settings, "work": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.work:
            common.run(["-c", MAKE, folder, name], stdout=sys.stderr)
            model = f"{folder}/{name}"
            if args.model:
                model = with_template_of(model, args.model, f"{folder}/given-{name}")
            jobs = interleaved(jobs_of(name, model, folder, args.steps, args.tokens), args.rounds)
            print(name)
            print_table(jobs)
            ratios = {}
            for kind in KINDS:
                pair = {job: x for job, x in jobs.items() if job.endswith(f" {kind}")}
                for key in ("step_seconds", "peak_mb"):
                    ratios[f"{kind}, {key}"] = ratio(pair, key)["better_by"]
            for key, better_by in ratios.items():
                print(f"  {key}: {better_by:.2f} x better")
            result["work"][name] = {"jobs": jobs, "better_by": ratios}
    if not args.tiny:
        common.save(args.out, result)


if __name__ == "__main__":
    main()
