"""What runs of 0.5B, 7B and 70B need, by nanopost/plan.py -> the table in docs/results.md.

    python -m bench.plan

Nothing is measured and nothing is allocated. The shapes are those of Qwen2.5-0.5B, Qwen2.5-7B and
Llama-3-70B.
"""

import json
import shlex
import tempfile
from pathlib import Path

from bench import common
from nanopost import plan

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "0.5B": {
        **QWEN,
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7B": {
        **QWEN,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "70B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
SFT = "--script sft --length 1024 --rows 512"
GRPO = "--script grpo --length 512 --max_new_tokens 1536 --prompts 128"
RUNS = [
    ("0.5B", f"{SFT} --gpu rtx4090 --tokens 8192"),
    ("0.5B", f"{GRPO} --gpu h100 --tokens 16384"),
    ("7B", f"{SFT} --gpu h100 --gpus 8 --tokens 16384 --checkpointing full"),
    ("7B", f"{SFT} --gpu h100 --tokens 16384 --checkpointing full --lora 16"),
    ("7B", f"{SFT} --gpu rtx4090 --tokens 8192 --checkpointing full --lora 16 --quantize nf4"),
    ("7B", "--script dpo --length 1024 --gpu h100 --gpus 8 --tokens 8192 --checkpointing full"),
    ("7B", f"{GRPO} --gpu h100 --gpus 8 --tokens 16384 --checkpointing full"),
    ("7B", f"{GRPO} --gpu h100 --gpus 8 --tokens 16384 --checkpointing full --server_gpus 8"),
    ("7B", "--script ppo --length 512 --gpu h100 --gpus 8 --tokens 8192 --beta 0.05"),
    ("70B", f"{SFT} --gpu h100 --gpus 64 --tokens 8192 --checkpointing full"),
    ("70B", f"{SFT} --gpu h100 --gpus 8 --tokens 8192 --checkpointing full --lora 16"),
    (
        "70B",
        f"{SFT} --gpu h100 --gpus 2 --tokens 8192 --checkpointing full --lora 16 --quantize nf4",
    ),
    ("70B", f"{GRPO} --gpu h100 --gpus 64 --tokens 16384 --checkpointing full --server_gpus 32"),
    ("70B", f"{GRPO} --gpu h100 --gpus 64 --tokens 16384 --checkpointing full"),
]


def row(folder: Path, size: str, flags: str) -> dict:
    (folder / "config.json").write_text(json.dumps(SHAPES[size]))
    args = plan.parsed(["--model", str(folder), *shlex.split(flags)])
    moments = plan.memory(args)
    worst = max(moments, key=lambda name: sum(moments[name].values()))
    parts = sorted(moments[worst].items(), key=lambda part: -part[1])[:3]
    time = sum(plan.seconds(args).values())
    ways = plan.fitting(args) if plan.peak(args) > args.machine.memory else []
    return {
        "model": size,
        "flags": flags,
        "GB": plan.peak(args) / 1e9,
        "of": args.machine.memory / 1e9,
        "largest": {name: size / 1e9 for name, size in parts},
        "seconds": time,
        "tokens per second and GPU": plan.tokens_of_step(args)
        / time
        / (args.gpus + args.server_gpus),
        "fits with": [plan.words(change) for change, _ in ways[:2]],
    }


def line(found: dict) -> str:
    parts = ", ".join(f"{name} {size:.0f}" for name, size in found["largest"].items())
    fits = f"{found['GB']:.0f} of {found['of']:.0f}"
    if found["GB"] > found["of"]:
        fits = f"**{fits}**; fits with {' or '.join(f'`{way}`' for way in found['fits with'])}"
    return (
        f"| {found['model']} | `{found['flags']}` | {fits} | {parts} | {found['seconds']:.0f} | "
        f"{found['tokens per second and GPU']:,.0f} |"
    )


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(Path(folder), *run) for run in RUNS]
    print("| model | flags | GB per GPU | most of it | s per step | tokens/s and GPU |")
    print("|---|---|---|---|---|---|")
    for found in rows:
        print(line(found))
    common.save(args.out / "plan.json", {**common.origin("torch"), "runs": rows})


if __name__ == "__main__":
    main()
