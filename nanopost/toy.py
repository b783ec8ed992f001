"""A tiny model and a task that learn in minutes on a CPU: two-digit addition as chat rows.

    user: 12+34=?        assistant: <answer>46</answer>

The SFT rows hold each sum six times, and half of their answers are near misses (off by 1, 2, 9, 10 or 11). SFT on
them teaches the skill and the format and leaves the model unsure, as a base model is: greedy it is mostly right,
sampled it is right about once in four. That is what reinforcement learning can then bring out. A tenth of all pairs is
held out by a hash.
"""

import hashlib
import json
import random
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from nanopost import InputError, hf
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.model import CausalLM, Config
from nanopost.tokenizer import Tokenizer

TEMPLATE = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>' + message['content'] + ('<|end|>' if message['role'] == 'assistant' else '') }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
NEAR_MISS = (1, 2, 9, 10, 11, -1, -2, -9, -10, -11)


def write_model(folder, seed: int = 0):
    """Write a randomly initialised Qwen3-shaped model of 0.8 million parameters, with its tokenizer."""
    files = tokenizer_files()
    config = Config.of(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "vocab_size": 264,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "initializer_range": 0.08,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "bos_token_id": None,
        }
    )
    model = CausalLM(config).init_weights(seed)
    hf.save_model(folder, model.state_dict().items(), config, files)


def check(tokenizer: Tokenizer, folder):
    """InputError if a model that does not know the toy's tokens would be trained on its sums."""
    if (
        tokenizer.raw.get_vocab()
        != tokenizers.Tokenizer.from_str(tokenizer_files()["tokenizer.json"]).get_vocab()
    ):
        raise InputError(
            f"--data toy, the default, has sums for the toy's own model, and {folder} is another: give "
            "--data."
        )


def tokenizer_files() -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json: bytes (so any text encodes), two answer tags, five special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<answer>", "</answer>")])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "bos_token": None,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=1),
    }


def sft_rows(
    held_out: bool = False, noise: float = 0.5, copies: int = 6, seed: int = 0
) -> list[dict]:
    """{"messages"} of all pairs on one side of the split, each `copies` times, `noise` of the answers near misses.

    Copies, so that the noise of one pair is seen to be noise; with one of each the skill depends on the seed's luck.
    """
    draw = random.Random(seed)
    return [
        {
            "messages": [
                _question(a, b),
                {
                    "role": "assistant",
                    "content": _answer(
                        a + b + (draw.choice(NEAR_MISS) if draw.random() < noise else 0)
                    ),
                },
            ]
        }
        for _ in range(copies)
        for a, b in _pairs(held_out)
    ]


def prompt_rows(held_out: bool) -> list[dict]:
    """{"prompt", "answer"}: the true answer, for the reward `exact`."""
    return [{"prompt": [_question(a, b)], "answer": _answer(a + b)} for a, b in _pairs(held_out)]


def pair_rows(folder, held_out: bool, samples: int = 2, seed: int = 0) -> list[dict]:
    """{"prompt", "answer", "chosen", "rejected"}: the true answer, and the first wrong one among `samples` that the
    model in `folder` writes; what it always adds up rightly is left out."""
    tokenizer, model, rows = Tokenizer.load(folder), hf.load_model(folder), prompt_rows(held_out)
    engine = Engine(model, tokenizer.stop_ids)
    groups = engine.generate(
        [tokenizer.prompt_ids(row["prompt"]) for row in rows],
        samples,
        Sampling(8),
        [prompt_seed(seed, serial) for serial in range(len(rows))],
    )
    texts = [[tokenizer.decode(r.ids, skip_special=True) for r in group] for group in groups]
    return [
        {
            "prompt": row["prompt"],
            "answer": row["answer"],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": wrong[0]}],
        }
        for row, group in zip(rows, texts)
        if (wrong := [text for text in group if text != row["answer"]])
    ]


def _question(a, b):
    return {"role": "user", "content": f"{a}+{b}=?"}


def _answer(total):
    return f"<answer>{max(0, total)}</answer>"


def _pairs(held_out):
    """All pairs of two-digit numbers on one side of the split; the sum is held out with both of its orders."""

    def tenth(a, b):
        return hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()[0] < 26

    return [(a, b) for a in range(10, 100) for b in range(10, 100) if tenth(a, b) == held_out]


def make(folder):
    """The folder behind `--model toy`, written once."""
    if not (Path(folder) / "config.json").exists():
        write_model(folder)
