"""TRL's SFTTrainer on a folder and rows, as a command line like that of train_sft.py; prints one JSON line.

    python -m bench.trl_sft --model DIR --data ROWS.jsonl --batch 1 --accumulate 8 --packing

Rows are taken in the file's order. Packed: best fit to 512 tokens (its bfd), documents apart. Else padded.
"""

import argparse
import json
import os
import tempfile
import time

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Recorder(TrainerCallback):
    """Seconds of each optimizer step and what the trainer logs of it."""

    def __init__(self):
        self.seconds, self.logs = [], []

    def on_step_begin(self, *args, **more):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **more):
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, args, state, control, logs, **more):
        self.logs.append({"step": state.global_step, **logs})


def settings(args, **more) -> dict:
    """What the trainers share: AdamW and a constant rate, logging each step and saving nothing."""
    return dict(
        output_dir=tempfile.mkdtemp(),
        use_cpu=args.device == "cpu",
        bf16=args.dtype == "bf16",
        seed=0,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        gradient_checkpointing=args.recompute,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=args.weight_decay,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **more,
    )


def parser(doc) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--data", required=True, help="JSONL")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="rows of a micro-batch (packed: bins)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="activations, as TRL does by default; ours does not",
    )
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument(
        "--dtype", default="fp32", choices=["fp32", "bf16"], help="bf16: autocast over fp32 weights"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser


def load(folder):
    """The model in fp32 as transformers builds it, and its tokenizer."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    transformers.utils.logging.set_verbosity_error()
    disable_progress_bars()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ), AutoTokenizer.from_pretrained(folder)


def rows_of(path) -> Dataset:
    with open(path) as file:
        return Dataset.from_list([json.loads(line) for line in file])


def main():
    p = parser(__doc__)
    p.add_argument("--packing", action="store_true")
    p.add_argument("--train_on", default="assistant", choices=["assistant", "all"])
    args = p.parse_args()
    model, tokenizer = load(args.model)
    recorder = Recorder()
    config = SFTConfig(
        **settings(args),
        packing=args.packing,
        packing_strategy="bfd",
        max_length=args.max_length,
        assistant_only_loss=args.train_on == "assistant",
        train_sampling_strategy="sequential",
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows_of(args.data),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.train()
    steps = [log for log in recorder.logs if "loss" in log]
    seen = [log["num_tokens"] for log in steps]
    tokens = [b - a for a, b in zip([0, *seen], seen)]
    print(
        json.dumps(
            {
                "seconds": recorder.seconds,
                "tokens": tokens,
                "loss": [log["loss"] for log in steps],
                "grad_norm": [log["grad_norm"] for log in steps],
                "entropy": [log["entropy"] for log in steps],
            }
        )
    )


if __name__ == "__main__":
    main()
