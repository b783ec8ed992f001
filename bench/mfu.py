"""SFT of a random Qwen2.5-1.5B in packed bins of 8k, and the share of the matmul rate that it
reaches -> bench/results/mfu.json.

    python -m bench.mfu                           # one GPU, bf16
    python -m bench.mfu --try                     # anywhere, a tiny model: does the script work?

The settings that matter, beside TRL's: packed into the same bins, in bf16 over fp32 weights, with
fused AdamW on both sides. TRL runs with the fastest attention there is (flash-attn if it is
installed), with and without recomputation, and with Liger's kernels if they are installed. What is
counted as a model FLOP, and how a step is timed, is in train_step.py.
"""

import importlib.util
import tempfile
from pathlib import Path

from bench import train_step
from bench.train_step import FULL, TINY

GOAL = 0.5  # of the matmul rate


def our_jobs(folder: Path, tiny: bool) -> dict[str, list]:
    """name -> command line. A step is 64k tokens in 8 bins."""
    bins = (TINY if tiny else FULL)["bins"]
    chats = folder / "chats.jsonl"
    own = train_step.ours(folder, tiny, data=chats, bins=bins, train_on="all")
    sft = ["train_sft.py", *own]
    selective = ["--checkpointing", "selective"]
    jobs = {
        "nanopost": sft,
        "nanopost --compile": [*sft, "--compile"],
        "nanopost --compile --checkpointing selective": [*sft, "--compile", *selective],
        "nanopost --checkpointing selective": [*sft, *selective],
        "nanopost --checkpointing full": [*sft, "--checkpointing", "full"],
    }
    if tiny:  # compiling for a CPU takes longer than all else
        jobs = {name: job for name, job in jobs.items() if "--compile" not in name}
    return jobs


def trl_jobs(folder: Path, tiny: bool) -> dict[str, list]:
    sizes = TINY if tiny else FULL
    own = train_step.trls(
        folder,
        tiny,
        data=folder / "chats.jsonl",
        packing=True,
        max_length=sizes["tokens"],
        batch=1,
        accumulate=sizes["bins"],
        train_on="all",
    )
    sft = ["bench/trl_sft.py", *own]
    if importlib.util.find_spec("flash_attn") is not None:
        sft += ["--attention", "flash_attention_2"]
    jobs = {"trl": sft, "trl, recompute": [*sft, "--recompute"]}
    if importlib.util.find_spec("liger_kernel") is not None:
        # The fastest first: there may be no time for the others.
        jobs = {"trl, liger": [*sft, "--liger"], **jobs}
    return jobs


def verdict(jobs: dict[str, dict]) -> str:
    """Ours beside TRL's, each in its fastest setting, and beside the goal."""
    best = {}
    for side in ("nanopost", "trl"):
        measured = [n for n in jobs if n.startswith(side) and "failed" not in jobs[n]]
        best[side] = max(measured, key=lambda n: jobs[n]["tokens_per_second"], default=None)
    sentences = []
    for name in filter(None, best.values()):
        speed, share = jobs[name]["tokens_per_second"], jobs[name].get("utilisation")
        sentence = f"{name}: {speed:,.0f} tokens/s"
        if share is not None:
            sentence += f", {share:.1%} of the matmul rate"
            if name.startswith("nanopost"):
                sentence += f" (goal {GOAL:.0%}: {'met' if share >= GOAL else 'missed'})"
        sentences.append(sentence)
    if all(best.values()):
        mine, other = (jobs[name]["tokens_per_second"] for name in best.values())
        sentences.append(f"{mine / other:.2f} times TRL's tokens/s")
    return "; ".join(sentences)


def main():
    args = train_step.arguments(__doc__, 5, 130)
    config = train_step.shape(args.tiny)
    result, device = train_step.start(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lengths = train_step.write_inputs(folder, config, 200 if args.tiny else 4000, device)
        jobs = train_step.with_trl(our_jobs(folder, args.tiny), trl_jobs(folder, args.tiny))
        flops = train_step.sft_flops(config, lengths)
        train_step.measure("mfu", jobs, folder, args, result, flops=flops)
    print(verdict(result["jobs"]))


if __name__ == "__main__":
    main()
