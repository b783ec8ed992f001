"""The toy: a tiny model and a task that it learns in minutes on a CPU: two-digit addition as chat.

    user: 12+34=?        assistant: <answer>46</answer>

    python runs/toy.py out/toy                            # the model, and rows for SFT and for RL
    python runs/toy.py out/toy --pairs out/toy/sft        # preference pairs from its mistakes
    python runs/toy.py out/toy_tools --tools              # another model and task: see tool_rows
    python runs/toy.py out/toy_gemma3 --arch gemma3       # the same with another architecture

The SFT rows hold each sum six times, and half of their answers are near misses (off by 1, 2, 9, 10
or 11). SFT on them teaches the skill and the format, but leaves the model as unsure as a base
model: mostly right when greedy, but only about one time in four when sampled at temperature 1.
Reinforcement learning can then close that gap. A tenth of the sums are held out, chosen by hash.
"""

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # nanopost need not be installed

from nanopost import hf
from nanopost.config import FAMILIES, Config
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.model import CausalLM
from nanopost.save import save_model
from nanopost.tokenizer import Tokenizer
from nanopost.tools import call, schema

TEMPLATE = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>' + message['content'] + \
('<|end|>' if message['role'] == 'assistant' else '') }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""
# The same, with the names of tools before the messages, and calls as Qwen's template writes them.
TOOLS_TEMPLATE = """\
{%- for tool in tools or [] -%}{{ '<|tool|>' + tool['function']['name'] }}{%- endfor -%}
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>' + message['content'] }}
{%- for call in message['tool_calls'] or [] -%}
{{ '<tool_call>{"name": "' + call['function']['name'] + '", "arguments": ' + \
call['function']['arguments'] | tojson + '}</tool_call>' }}
{%- endfor -%}
{{ '<|end|>' if message['role'] == 'assistant' else '' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TAGS = ("<answer>", "</answer>")
# A token each, so that a call of the calculator is short.
TOOL_TAGS = ("<tool_call>", "</tool_call>", '{"name": "', '", "arguments": {"a": ', ', "b": ', "}}")
NEAR_MISS = (1, 2, 9, 10, 11, -1, -2, -9, -10, -11)


# -------------------------------------------------------------------------------------------- model
SIZES = {
    "hidden_act": "silu",
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
# --arch -> what else its config.json says. All have about a million parameters.
ARCHITECTURES = {
    "qwen3": {"model_type": "qwen3"},
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        "layer_types": 3 * ["linear_attention"] + ["full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "partial_rotary_factor": 0.5,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "layer_types": 3 * ["sliding_attention"] + ["full_attention"],
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 1000.0,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.0,
    },
}


def write_model(folder, seed: int = 0, with_tools: bool = False, arch: str = "qwen3"):
    """Write a randomly initialised model of about a million parameters, with its tokenizer. arch: a
    key of ARCHITECTURES."""
    own = ARCHITECTURES[arch]
    config = Config.of(
        {
            "architectures": [FAMILIES[own["model_type"]].causal],
            "model_type": own["model_type"],
            "vocab_size": 272 if with_tools else 264,
            **SIZES,
            **own,
        }
    )
    model = CausalLM(config).init_weights(seed)
    save_model(folder, model.state_dict().items(), config, tokenizer_files(with_tools))


def tokenizer_files(with_tools: bool = False) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json.

    A token per byte, so that any text encodes; two answer tags; five special tokens. with_tools:
    one more of these, and a token for each piece of a tool call.
    """
    special = [*SPECIAL, "<|tool|>"] if with_tools else SPECIAL
    tags = [*TAGS, *TOOL_TAGS] if with_tools else TAGS
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TOOLS_TEMPLATE if with_tools else TEMPLATE,
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


# --------------------------------------------------------------------------------------------- rows
def sft_rows(
    held_out: bool = False, noise: float = 0.5, copies: int = 6, seed: int = 0
) -> list[dict]:
    """{"messages"}: each sum of one side of the split `copies` times, a share `noise` near misses.

    Copies show that the noise is noise: with one of each, the skill depends on the seed.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(copies):
        for a, b in _sums(held_out):
            total = a + b
            if draw.random() < noise:
                total += draw.choice(NEAR_MISS)
            answer = {"role": "assistant", "content": _answer(total)}
            rows.append({"messages": [_question(a, b), answer]})
    return rows


def prompt_rows(held_out: bool) -> list[dict]:
    """{"prompt", "answer"}: the right answer, for the reward `exact`."""
    return [{"prompt": [_question(a, b)], "answer": _answer(a + b)} for a, b in _sums(held_out)]


def pair_rows(folder, held_out: bool, samples: int = 2, seed: int = 0) -> list[dict]:
    """{"prompt", "answer", "chosen", "rejected"} of the sums that the model in `folder` gets wrong.

    chosen: the right answer; rejected: the first wrong one of `samples` samples.
    """
    tokenizer = Tokenizer.load(folder)
    engine = Engine.of(hf.load_model(folder), tokenizer)
    rows = prompt_rows(held_out)
    prompts = [tokenizer.prompt_ids(row["prompt"]) for row in rows]
    seeds = [prompt_seed(seed, serial) for serial in range(len(rows))]
    groups = engine.generate(prompts, samples, Sampling(8), seeds)
    pairs = []
    for row, group in zip(rows, groups):
        texts = [tokenizer.decode(rollout.ids, skip_special=True) for rollout in group]
        wrong = [text for text in texts if text != row["answer"]]
        if wrong:
            chosen = [{"role": "assistant", "content": row["answer"]}]
            rejected = [{"role": "assistant", "content": wrong[0]}]
            pairs.append({**row, "chosen": chosen, "rejected": rejected})
    return pairs


class Calculator:
    """An environment as TRL's environment_factory takes it: its public methods are tools."""

    def reset(self, **columns):
        """It keeps nothing."""

    def times(self, a: int, b: int) -> int:
        """Multiplies two numbers.

        Args:
            a: The first number
            b: The second number
        """
        return a * b


def tool_rows(held_out: bool, noise: float = 0.65, seed: int = 0) -> list[dict]:
    """{"messages", "tools"}: products of two-digit numbers, by the calculator. The model reads its
    result in a second turn.

        user: 12*34=?        assistant: <tool_call>{"name": "times", ...}</tool_call>
        tool: 408            assistant: <answer>408</answer>

    A share `noise` go wrong: a guess without a call, a call of another number, or a result that is
    copied with an error. So SFT on them teaches all of it, but leaves the model unsure.
    """
    draw, tools = random.Random(seed), [schema(Calculator().times)]
    rows = []
    for a, b in _sums(held_out):
        said = a * b
        messages = [_question(a, b, "*")]
        what = "right"
        if draw.random() < noise:
            what = draw.choice(["guess", "guess", "call", "copy"])
        if what != "guess":
            given = a + (draw.choice(NEAR_MISS[:5]) if what == "call" else 0)
            said = given * b
            calls = [call("times", {"a": given, "b": b}, 0)]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            messages.append({"role": "tool", "name": "times", "content": str(said)})
        if what in ("guess", "copy"):
            said += draw.choice(NEAR_MISS)
        messages.append({"role": "assistant", "content": _answer(said)})
        rows.append({"messages": messages, "tools": tools})
    return rows


def product_rows(held_out: bool) -> list[dict]:
    """{"prompt", "answer"} of the products, for the reward `exact` and --env."""
    pairs = _sums(held_out)
    return [{"prompt": [_question(a, b, "*")], "answer": _answer(a * b)} for a, b in pairs]


def _question(a, b, operator="+"):
    return {"role": "user", "content": f"{a}{operator}{b}=?"}


def _answer(total):
    return f"<answer>{max(0, total)}</answer>"


def _sums(held_out):
    """The pairs of two-digit numbers on one side of the split; a+b and b+a are on the same."""
    two_digit = range(10, 100)
    return [(a, b) for a in two_digit for b in two_digit if _is_held_out(a, b) == held_out]


def _is_held_out(a, b):
    name = f"{min(a, b)}+{max(a, b)}"
    return hashlib.sha256(name.encode()).digest()[0] < 26


# -------------------------------------------------------------------------------------------- files
def write_rows(path, rows: list[dict]):
    """Write rows as JSONL."""
    lines = [json.dumps(row) + "\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf8")
    print(f"{path}: {len(rows):,} rows")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write the files")
    parser.add_argument("--pairs", metavar="MODEL", help="write pairs from this model instead")
    parser.add_argument("--tools", action="store_true", help="write the task with a calculator")
    parser.add_argument("--arch", default="qwen3", choices=ARCHITECTURES, help="of the model")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.pairs:
        write_rows(args.folder / "pairs.jsonl", pair_rows(args.pairs, held_out=False))
        write_rows(args.folder / "pairs_heldout.jsonl", pair_rows(args.pairs, held_out=True))
        return
    write_model(args.folder / "model", with_tools=args.tools, arch=args.arch)
    if args.tools:
        write_rows(args.folder / "sft.jsonl", tool_rows(held_out=False))
        write_rows(args.folder / "sft_heldout.jsonl", tool_rows(held_out=True, noise=0.0))
        write_rows(args.folder / "prompts.jsonl", product_rows(held_out=False))
        write_rows(args.folder / "prompts_heldout.jsonl", product_rows(held_out=True))
        return
    write_rows(args.folder / "sft.jsonl", sft_rows())
    write_rows(args.folder / "sft_heldout.jsonl", sft_rows(held_out=True, noise=0.0, copies=1))
    write_rows(args.folder / "prompts.jsonl", prompt_rows(held_out=False))
    write_rows(args.folder / "prompts_heldout.jsonl", prompt_rows(held_out=True))


if __name__ == "__main__":
    main()
