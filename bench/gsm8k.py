"""GSM8K from nothing on a CPU: a random 2 M parameter model learns the form of the answers by SFT, then by GRPO.

    python bench/gsm8k.py DATA TOKENIZER OUT       # about a quarter of an hour on one core

DATA: a folder with train.jsonl(.gz) and test.jsonl of GSM8K. TOKENIZER: a folder with tokenizer.json (about a thousand
tokens suffice). A model of this size learns no arithmetic; what it can learn is to end as the solutions do, with
"#### number": the rewards are gsm8k (the right number) and format (that form).
"""
import json
import subprocess
import sys
from pathlib import Path

from nanopost import hf
from nanopost.chat import Tokenizer
from nanopost.model import CausalLM, Config

data, source, out = map(Path, sys.argv[1:4])
root = Path(__file__).parents[1]
train = next(p for p in (data / "train.jsonl", data / "train.jsonl.gz") if p.exists())
tokenizer = Tokenizer.load(source)
config = Config.of({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 192,
    "vocab_size": tokenizer.vocab_size, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 1024,
    "tie_word_embeddings": True, "initializer_range": 0.06, "bos_token_id": tokenizer.bos_id,
    "eos_token_id": tokenizer.eos_id})
names = ("tokenizer.json", "tokenizer_config.json")
hf.save_model(out / "base", CausalLM(config).init_weights(0).state_dict().items(), config,
              {name: (source / name).read_bytes() for name in names})

(out / "eval.jsonl").write_text("".join((data / "test.jsonl").read_text().splitlines(keepends=True)[:100]))


def run(script, *arguments):
    subprocess.run([sys.executable, root / script, "--overwrite", *map(str, arguments)], check=True)


run("train_sft.py", "--model", out / "base", "--data", train, "--rename", "question=prompt", "answer=completion",
    "--out", out / "sft", "--rows", 16, "--steps", 110, "--lr", 3e-3, "--tokens", 4096, "--max_length", 512,
    "--save_every", 0)
run("train_grpo.py", "--model", out / "sft", "--data", train, "--eval_data", out / "eval.jsonl", "--rename",
    "question=prompt", "--out", out / "grpo", "--reward", "format", "gsm8k", "--prompts", 8, "--group", 8,
    "--minibatches", 1, "--steps", 40, "--lr", 5e-4, "--max_new_tokens", 256, "--tokens", 4096, "--eval_every", 20,
    "--resample", 2, "--save_every", 0)
lines = [json.loads(line) for line in (out / "grpo" / "metrics.jsonl").read_text().splitlines()]
steps = lines[1:]
print("steps with reward_std above zero:", sum(m["reward_std"] > 0 for m in steps), "of", len(steps))
print("held-out format rate, sampled:", [round(m["eval/accuracy"], 3) for m in lines if "eval/accuracy" in m])
