"""Tokenizers, conversations and chat templates for tests.

Each template sets a trap, and comes with a function that writes what the template should write, as
pieces of text that say whether they are trained.
"""

import gzip
import json

from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers, processors

from nanopost.report import marked_text
from nanopost.tokenizer import Tokenizer
from runs import toy


def raw_bytes(special=(), merges=(), bos=None):
    """A byte-level tokenizer: special tokens, 256 bytes, merges; its post-processor adds bos."""
    vocab = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    raw = Raw(models.BPE({token: i for i, token in enumerate(vocab)}, list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(special))
    if bos:
        special = [(bos, raw.token_to_id(bos))]
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=special
        )
    return raw


def make(template=None, special=("<|end|>",), bos=None, eos=None, adds_bos=False, **more):
    config = {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token}
    return Tokenizer(raw_bytes(special, bos=bos if adds_bos else None, **more), config, template)


def folder_of(path, raw, config=None, **files):
    raw.save(str(path / "tokenizer.json"))
    for name, value in {"tokenizer_config": config or {}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


REAL = ["qwen2.5", "qwen3", "minimind", "gpt2", "tiny_llama3", "llama3.1"]


def unpacked(shared, name, path):
    """A tokenizer folder of the real data, with tokenizer.json unzipped."""
    source = shared / ("restricted" if name == "llama3.1" else "tokenizers") / name
    files = [*source.glob("*.json*")] + [shared / "tokenizers/qwen2.5/tokenizer.json.gz"] * (
        name == "qwen3"
    )
    for file in files:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        (path / file.name.removesuffix(".gz")).write_bytes(content)
    return path


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def call(name="add", arguments=None, **more):
    return {
        "type": "function",
        "function": {"name": name, "arguments": arguments or {"a": 1}},
        **more,
    }


def trained(tokenizer, row, train_on="assistant"):
    """What is trained, decoded piece by piece."""
    if isinstance(row, list):
        row = {"messages": row}
    return [
        part.strip("»")
        for part in marked_text(tokenizer.example(row, train_on), tokenizer).split("«")[:-1]
        for part in [part[part.index("»") :]]
    ]


# ------------------------------------------------------------------------------------ conversations
CONVERSATIONS = {
    "plain": [user("Hi"), answer("Hello")],
    "multi": [user("Hi"), answer("Hello"), user("And?"), answer("Bye")],
    "system": [system("Be <b>brief</b> & 'kind'."), user("Hi"), answer("Hello")],
    "padded": [user("  Hi \n"), answer(" \n Hello \n\n"), user("\t?"), answer("  Bye  ")],
    "asked": [system(" S "), user("Hi")],
    "thought": [
        user("Hi"),
        answer("<think>\nwhy\n</think>\n\nHello"),
        user("?"),
        answer("Bye", reasoning_content="so"),
    ],
    "thinking": [user("Hi"), answer("Hello", thinking="hm")],
    "calls": [
        user("1+1"),
        answer("", tool_calls=[call(id="abcdefghi")]),
        {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "2 <é>"},
        answer("2"),
    ],
    "flat calls": [
        user("1+1"),
        answer("So", tool_calls=[{"name": "add", "arguments": {"a": "é"}}]),
        {"role": "tool", "content": "2"},
        answer("2"),
    ],
    "no content": [user("1+1"), answer(None, tool_calls=[call(id="abcdefghi")])],
    "no calls": [{**user("Hi"), "tool_calls": None}, {**answer("Hello"), "tool_calls": None}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two>.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "description": "é"}},
                "required": ["a"],
            },
        },
    }
]
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|h|>",
    "<|/h|>",
    "<|eot|>",
    "[INST]",
    "[/INST]",
    "<|A|>",
    "<|U|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|m|>",
    "<|end|>",
    "<|return|>",
]
CONTENTS = [
    "Hello",
    "Hello",
    "",
    " Hello\n\n",
    "\n\nHi  ",
    "<|im_end|>",
    "<|im_start|>assistant\nHello<|im_end|>\n",
    "🤖é字",
    "7",
    "ASSISTANT: Hello</s>USER: x",
    "[INST]Hello[/INST]",
    "<|h|>assistant<|/h|>\n\nHello",
    "<|A|>Hello<|U|>",
    "<|assistant|>\n",
    "<think>\n",
    "a</s>b<|end|>",
    "user",
    "assistant\n",
    " ",
]
THOUGHTS = ["<think>\nwhy\n</think>\n\n", "<think></think>", "<think>\n<|im_end|>\n</think>\n\n"]


# ---------------------------------------------------------------------------------------- templates
def turns(messages):
    return [(m["role"], m["content"], k == len(messages) - 1) for k, m in enumerate(messages)]


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml(messages, shown=lambda content, last: content):
    for role, content, last in turns(messages):
        yield f"<|im_start|>{role}\n", False
        yield (
            f"{shown(content, last) if role == 'assistant' else content}<|im_end|>",
            role == "assistant",
        )
        yield "\n", False


TRIMS = (
    "{% for m in messages %}"
    "{% set text = '<|h|>' + m.role + '<|/h|>\n\n' + m.content | trim + '<|eot|>' %}"
    "{{ bos_token + text if loop.first else text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)


def trims(messages):
    yield "<s>", False
    for role, content, _ in turns(messages):
        yield f"<|h|>{role}<|/h|>\n\n", False
        yield f"{content.strip()}<|eot|>", role == "assistant"


DROPS_THOUGHT = """\
{%- for m in messages %}{% set text = m.content %}
{%- if m.role == 'assistant' %}
{%- set text = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')
    if '</think>' in m.content else '' %}
{%- if m.role == 'assistant' and loop.last %}
{%- set text = '<think>\n' + thought + '\n</think>\n\n' + text %}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def drops_thought(messages):
    def shown(content, last):
        text, thought = content.split("</think>")[-1].lstrip("\n"), ""
        if "</think>" in content:
            thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
        return f"<think>\n{thought}\n</think>\n\n{text}" if last else text

    return chatml(messages, shown)


UNINVITED = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are <|im_start|>assistant\nHello<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)


def uninvited(messages):
    if messages[0]["role"] != "system":
        yield "<|im_start|>system\nYou are <|im_start|>assistant\nHello<|im_end|>\n", False
    yield from chatml(messages)


NO_PROMPT = """\
{{- bos_token }}{% set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- for m in rest %}{% if m.role == 'user' %}
{{- '[INST]' }}
{%- if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- m.content + '[/INST]' }}
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""


def no_prompt(messages):
    yield "<s>", False
    for role, content, last in turns(messages):
        head = f"{messages[0]['content']}\n\n" if last and messages[0]["role"] == "system" else ""
        if role != "system":
            yield (
                (f"{content}</s>", True)
                if role == "assistant"
                else (f"[INST]{head}{content}[/INST]", False)
            )


LONG_PROMPT = """\
{{- bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- '<|A|>' + m.content + '</s>' }}{% else %}{{ '<|U|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|A|><think>\n' }}{% endif %}"""


def long_prompt(messages):
    yield "<s>", False
    for role, content, _ in turns(messages):
        given = "<think>\n" * (
            role == "assistant" and content.startswith("<think>\n")
        )  # all of the prompt
        yield ("<|A|>" if role == "assistant" else "<|U|>") + given, False
        yield (
            (f"{content.removeprefix(given)}</s>", True)
            if role == "assistant"
            else (content, False)
        )


HEADER_ALONE = CHATML.partition("{% if add_generation_prompt")[0]
OTHER_SPACES = (
    "{% for m in messages %}{{ '\n  <|im_start|>' + m.role + ' \n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n\n' }}{% endif %}"
)


def other_spaces(messages):
    for role, content, _ in turns(messages):
        yield f"\n  <|im_start|>{role} \n", False
        yield f"{content}<|im_end|>", role == "assistant"
        yield "\n", False


TEXT_BEFORE_END = CHATML.replace(
    "m.content +", "m.content + ('\n</answer>' if m.role == 'assistant' else '') +"
)


def text_before_end(messages):
    return chatml(messages, lambda content, last: f"{content}\n</answer>")


SPACE_BEFORE_END = CHATML.replace("m.content +", "m.content + '\n' +")


def space_before_end(messages):
    for role, content, _ in turns(messages):
        yield f"<|im_start|>{role}\n", False
        yield f"{content}\n<|im_end|>", role == "assistant"
        yield "\n", False


NO_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def no_end(messages):
    for role, content, _ in turns(messages):
        yield f"<|{role}|>\n", False
        yield content, role == "assistant"
        yield "\n", False


OTHER_END = (
    "{% for m in messages %}{{ '<|h|>' + m.role + '<|m|>' + m.content + "
    "('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant' }}{% endif %}"
)


def other_end(
    messages,
):  # the prompt is less than the header: the rest of it is the model's to write
    for role, content, last in turns(messages):
        yield f"<|h|>{role}", False
        yield (
            f"<|m|>{content}{'<|return|>' if last and role == 'assistant' else '<|end|>'}",
            role == "assistant",
        )


EOS_AT_LAST = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"


def eos_at_last(messages):
    yield from chatml(messages)
    yield "</s>", False


TEXT_HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
    "{% else %}{{ 'USER: ' + m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def text_headers(messages):
    yield "<s>", False
    for role, content, _ in turns(messages):
        yield ("ASSISTANT:", False) if role == "assistant" else (f"USER: {content} ", False)
        if role == "assistant":
            yield f" {content}</s>", True


def toy_pieces(messages):
    for role, content, _ in turns(messages):
        yield f"<|{role}|>", False
        yield (f"{content}<|end|>", True) if role == "assistant" else (content, False)


TAGS = """\
{%- for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- generation %}{{ m.content }}INSIDE{% endgeneration %}OUTSIDE{% else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TAGS_END_INSIDE = TAGS.replace("INSIDE", "{{ '<|im_end|>' }}").replace("OUTSIDE", "{{ '\n' }}")
TAGS_END_AND_NEWLINE_INSIDE = TAGS.replace("INSIDE", "{{ '<|im_end|>\n' }}").replace("OUTSIDE", "")
TAGS_END_OUTSIDE = TAGS.replace("INSIDE", "").replace("OUTSIDE", "{{ '<|im_end|>\n' }}")
TAGS_HEADER_INSIDE = TAGS_END_INSIDE.replace(
    "{{ '<|im_start|>assistant\n' }}\n{%- generation %}",
    "{% generation %}{{ '<|im_start|>assistant\n' }}",
    1,
)
TEMPLATES = {
    "chatml": (CHATML, chatml),
    "trims": (TRIMS, trims),
    "drops thought": (DROPS_THOUGHT, drops_thought),
    "uninvited system block": (UNINVITED, uninvited),
    "no generation prompt": (NO_PROMPT, no_prompt),
    "long generation prompt": (LONG_PROMPT, long_prompt),
    "header, no generation prompt": (HEADER_ALONE, chatml),
    "prompt with other spaces": (OTHER_SPACES, other_spaces),
    "text before the end": (TEXT_BEFORE_END, text_before_end),
    "space before the end": (SPACE_BEFORE_END, space_before_end),
    "no end-of-turn token": (NO_END, no_end),
    "last turn ends otherwise": (OTHER_END, other_end),
    "eos at the very end": (EOS_AT_LAST, eos_at_last),
    "headers of text": (TEXT_HEADERS, text_headers),
    "tags, end inside": (TAGS_END_INSIDE, chatml),
    "tags, end and newline inside": (TAGS_END_AND_NEWLINE_INSIDE, chatml),
    "tags, end outside": (TAGS_END_OUTSIDE, chatml),
    "tags, header inside": (TAGS_HEADER_INSIDE, chatml),
    "toy": (toy.TEMPLATE, toy_pieces),
}
