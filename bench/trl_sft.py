"""TRL's SFTTrainer with a command line like train_sft.py's; prints one line of JSON.

    python -m bench.trl_sft --model DIR --data ROWS.jsonl --batch 1 --accumulate 8 --packing

Rows are taken in the file's order. Packed: TRL's best fit (bfd) into bins of --max_length tokens,
with documents kept apart. Otherwise padded.
"""

import argparse
import json
import os
import tempfile
import time

import bitsandbytes  # noqa: F401  here, so that it counts as an import and not as training
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench import common


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Recorder(TrainerCallback):
    """Seconds of each optimizer step, and what the trainer logs about it."""

    def __init__(self):
        self.seconds = []
        self.logs = []

    def on_step_begin(self, *args, **more):
        synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, *args, **more):
        synchronize()
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, args, state, control, logs, **more):
        self.logs.append({"step": state.global_step, **logs})

    def result(self, names) -> dict[str, list]:
        """Seconds, tokens, and the named metrics that were logged, one number a step."""
        steps = [log for log in self.logs if "loss" in log]
        seen = [0, *(log["num_tokens"] for log in steps)]
        tokens = [after - before for before, after in zip(seen, seen[1:])]
        found = {"seconds": self.seconds, "tokens": tokens}
        for name in names:
            if name in steps[0]:
                found[name] = [log[name] for log in steps]
        return found


def parser(doc) -> argparse.ArgumentParser:
    parser = common.parser(doc)
    add = parser.add_argument
    add("--model", required=True, help="folder")
    add("--data", required=True, help="JSONL")
    add("--steps", type=int, default=10)
    add("--batch", type=int, default=8, help="rows per micro-batch (packed: bins)")
    add("--accumulate", type=int, default=1, help="micro-batches per step")
    add("--lr", type=float, default=1e-4)
    add("--weight_decay", type=float, default=0.01)
    add("--recompute", action="store_true", help="activations: TRL's default, not ours")
    add("--max_length", type=int, default=512)
    add("--dtype", default="fp32", choices=["fp32", "bf16"], help="bf16: autocast, fp32 weights")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--lora", type=int, default=0, help="rank of peft's adapters; 0: none")
    add("--quantize", default="none", choices=["none", "nf4"], help="by bitsandbytes")
    add("--attention", default="sdpa", help="transformers' name: flash_attention_2, flex_attention")
    add("--liger", action="store_true", help="Liger's kernels")
    return parser


def adapters(args):
    """peft's configuration, with our defaults; None without --lora."""
    if not args.lora:
        return None
    return LoraConfig(
        r=args.lora, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def settings(args) -> dict:
    """What all trainers share: our AdamW, our rate without warm-up, a log line for each step, no
    checkpoints."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": args.device == "cpu",
        "bf16": args.dtype == "bf16",
        "use_liger_kernel": args.liger,
        "seed": 0,
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": args.accumulate,
        "gradient_checkpointing": args.recompute,
        "learning_rate": args.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": args.weight_decay,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def load(folder, quantize="none", attention="sdpa"):
    """The model in fp32 as transformers builds it, and its tokenizer."""
    more = {"attn_implementation": attention}
    if quantize == "nf4":
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    transformers.utils.logging.set_verbosity_error()
    disable_progress_bars()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    return model, AutoTokenizer.from_pretrained(folder)


def rows_of(path) -> Dataset:
    with open(path) as file:
        return Dataset.from_list([json.loads(line) for line in file])


def main():
    p = parser(__doc__)
    p.add_argument("--packing", action="store_true")
    p.add_argument("--train_on", default="assistant", choices=["assistant", "all"])
    args = p.parse_args()
    model, tokenizer = load(args.model, args.quantize, args.attention)
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
        peft_config=adapters(args),
    )
    trainer.train()
    print(json.dumps(recorder.result(["loss", "grad_norm", "entropy", "learning_rate"])))


if __name__ == "__main__":
    main()
