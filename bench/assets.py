"""What both sides of a comparison start from: one model folder and one file of rows, made offline.

The text is the source of the Python standard library. Default sizes are those of the comparisons:
4 layers, width 256, 4,096 tokens. The tests make smaller models.
"""

import json
import random
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, START, END, NEVER = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|never|>"
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# Without the newline after a turn, which TRL trains in pairs and nanopost does not.
TIGHT = CHATML.replace("{{- '\n' }}\n", "")


def corpus(max_characters: int = 3_000_000) -> list[str]:
    """Source files of the standard library, in order, until there are that many characters."""
    texts, total = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        total += len(texts[-1])
        if total > max_characters:
            break
    return texts


def make_model(
    folder,
    vocab: int = 4096,
    width: int = 256,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 4,
    mlp_width: int = 768,
    scale: float = 0.02,
    characters: int = 3_000_000,
    endless: bool = False,
    stop_ids: tuple[int, ...] = (),
    template: str = CHATML,
) -> PreTrainedTokenizerFast:
    """Write a random Qwen3 with its tokenizer to a folder, with transformers.

    scale: standard deviation of the weights. characters: of the text that the tokenizer learns
    from. stop_ids: end a completion, as <|im_end|> does. endless: almost no completion ends, since
    the one stop token is among 4,097 that are equally likely; there is no chat template then.
    """
    raw = _train_tokenizer(vocab, characters)
    vocab = raw.get_vocab_size()
    if endless:
        raw.add_special_tokens([NEVER])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=NEVER if endless else END,
        chat_template=None if endless else template,
        padding_side="left",
    )
    stops = [tokenizer.eos_token_id, *stop_ids]
    config = Qwen3Config(
        vocab_size=vocab + endless,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        initializer_range=scale,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stops,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = stops
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _train_tokenizer(vocab, characters):
    """A byte-level BPE of the corpus."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, START, END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(corpus(characters), trainer)
    return raw


def random_stops(count: int = 48, vocab: int = 4096) -> tuple[int, ...]:
    """Ids of which a random model samples one every vocab / count tokens: lengths are ragged."""
    return tuple(random.Random(1).sample(range(300, vocab), count))


def pieces(
    tokenizer, count: int, log_mean: float, log_std: float, low: int, high: int, seed: int
) -> list[str]:
    """Stretches of the corpus of log-normal length in tokens, clipped to low..high."""
    draw = random.Random(seed)
    ids = []
    for text in corpus(600_000):
        ids += tokenizer(text[:40_000])["input_ids"]
    drawn = [draw.lognormvariate(log_mean, log_std) for _ in range(count)]
    lengths = [int(min(high, max(low, length))) for length in drawn]
    starts = [draw.randrange(len(ids) - length) for length in lengths]
    return [tokenizer.decode(ids[start : start + length]) for start, length in zip(starts, lengths)]


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def chat_rows(tokenizer, count: int, longest: int = 440, seed: int = 0) -> list[dict]:
    """Rows {"messages"}: a short question, and an answer of up to `longest` tokens, median 148."""
    questions = pieces(tokenizer, count, 2.7, 0.4, 6, 40, seed + 1)
    answers = pieces(tokenizer, count, 5.0, 0.7, 16, longest, seed)
    return [
        {"messages": [message("user", question), message("assistant", answer)]}
        for question, answer in zip(questions, answers)
    ]


def pair_rows(tokenizer, count: int, longest: int = 400, seed: int = 0) -> list[dict]:
    """Rows {"prompt", "chosen", "rejected"} of messages; answers of up to `longest` tokens, median
    110.

    They are stripped: a newline at the start of an answer would merge with the prompt's last one
    into a single token, which nanopost refuses.
    """
    questions = pieces(tokenizer, count, 3.5, 0.4, 8, 80, seed)
    chosen = pieces(tokenizer, count, 4.7, 0.6, 16, longest, seed + 1)
    rejected = pieces(tokenizer, count, 4.7, 0.6, 16, longest, seed + 2)
    return [
        {
            "prompt": [message("user", question)],
            "chosen": [message("assistant", good.strip())],
            "rejected": [message("assistant", bad.strip())],
        }
        for question, good, bad in zip(questions, chosen, rejected)
    ]


def prompt_rows(tokenizer, count: int, seed: int = 0) -> list[dict]:
    """Rows {"prompt"} of 16 to 80 tokens: messages, or text if the tokenizer has no template."""
    texts = pieces(tokenizer, count, 3.7, 0.4, 16, 80, seed)
    if tokenizer.chat_template is None:
        return [{"prompt": text} for text in texts]
    return [{"prompt": [message("user", text)]} for text in texts]


def write_rows(path, rows: list[dict]):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
