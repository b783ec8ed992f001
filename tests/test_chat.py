"""Ids and renderings against transformers; masks token by token against pieces written by hand, trap by trap."""

import gzip
import json
import random
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Raw

from nanopost import InputError
from nanopost.batch import Example
from nanopost.template import PROBE
from nanopost.tokenizer import (
    Tokenizer,
    check_stage,
    fingerprint,
    marked_text,
    report,
    tokenizer_files,
)
from runs import toy


# ------------------------------------------------------------------------------------------------------------- helpers
def raw_bytes(special=(), merges=(), bos=None):
    """A byte-level tokenizer: special tokens, 256 bytes, merges. With bos, its post-processor puts that first."""
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


REAL = ["qwen2.5", "qwen3", "minimind", "gpt2", "tiny_llama3", "llama3.1"]


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """name -> (Tokenizer, folder), read once."""
    cache = {}

    def load(name):
        if name not in cache:
            folder = unpacked(shared, name, tmp_path_factory.mktemp(name))
            cache[name] = Tokenizer.load(folder), folder
        return cache[name]

    return load


@pytest.fixture(scope="module")
def auto(real):
    transformers = pytest.importorskip("transformers")
    cache = {}

    def load(name):
        if name not in cache:
            cache[name] = transformers.AutoTokenizer.from_pretrained(real(name)[1])
        return cache[name]

    return load


@pytest.fixture
def frozen_clock(monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)

    monkeypatch.setattr("nanopost.template.datetime", Clock)
    monkeypatch.setattr(
        pytest.importorskip("transformers.utils.chat_template_utils"), "datetime", Clock
    )


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


# ------------------------------------------------------------------------------------------------------------------ ids
@pytest.mark.parametrize(
    "name, vectors",
    [("qwen2.5", "qwen2"), ("qwen3", "qwen2"), ("gpt2", "gpt2"), ("llama3.1", "llama3")],
)
def test_ids_are_those_of_the_vectors(shared, real, name, vectors):
    folder = shared / "tokenizers/vectors"
    texts = (folder / f"{vectors}.inp").read_text(encoding="utf8").split("\n__ggml_vocab_test__\n")
    lines = (folder / f"{vectors}.out").read_text().split("\n")
    for text, ids in zip(texts, lines):
        assert real(name)[0].encode(text) == [int(i) for i in ids.split()], text
    assert len(texts) == 47


STRINGS = [
    "Hello, world",
    "  two  spaces ",
    "\n\n",
    "e\u0301 \u00e9 \u212b",
    "🤖 👩‍👩‍👧 字",
    "<|im_start|>x<|im_end|>\n<think>a</think>",
    "<|begin_of_text|>Hi<|eot_id|>",
    "<|endoftext|>",
    "<tool_response>1</tool_response>",
    "1234567 3.14 ''s",
    "\r\n\tif",
]


@pytest.mark.parametrize("name", REAL)
def test_ids_are_those_of_autotokenizer(shared, real, auto, name):
    tokenizer, theirs = real(name)[0], auto(name)
    vectors = (
        (shared / "tokenizers/vectors/qwen2.inp")
        .read_text(encoding="utf8")
        .split("\n__ggml_vocab_test__\n")
    )
    for text in STRINGS + vectors:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text
        if not (theirs.bos_token and text.startswith(theirs.bos_token)):
            assert tokenizer.text_ids(text) == theirs(text)["input_ids"], text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        None if name == "gpt2" else theirs.pad_token_id,
    )
    assert tokenizer.vocab_size == len(theirs)


def test_tokens_that_only_tokenizer_config_has_are_added(real):
    tokenizer = real("qwen3")[0]
    assert tokenizer.encode("<tool_response></tool_response><think></think>") == [
        151665,
        151666,
        151667,
        151668,
    ]
    assert tokenizer.vocab_size == 151669


def added(content, **more):
    return {
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        **more,
    }


@pytest.mark.parametrize(
    "config, files",
    [
        (
            {"eos_token": "<e>"},
            {},
        ),  # in the vocabulary, but not declared as a token that text may spell
        ({"eos_token": added("<e>") | {"__type": "AddedToken"}}, {}),
        (
            {"eos_token": "<f>"},
            {"special_tokens_map": {"eos_token": "<e>", "pad_token": added("<f>")}},
        ),
        (
            {
                "eos_token": "<e>",
                "added_tokens_decoder": {"0": added("<s>", rstrip=True, special=True)},
            },
            {"special_tokens_map": {"eos_token": "<f>"}},
        ),
        (
            {
                "eos_token": "<e>",
                "added_tokens_decoder": {"259": added("<new>", lstrip=True, special=False)},
            },
            {},
        ),
        ({"bos_token": "<s>", "eos_token": "<e>", "add_bos_token": False}, {}),
        ({"bos_token": "<s>", "eos_token": "<e>", "add_bos_token": True}, {}),
    ],
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_special_tokens_of_every_file_are_those_of_autotokenizer(tmp_path, config, files, adds_bos):
    transformers = pytest.importorskip("transformers")
    raw = raw_bytes(["<s>"])
    vocab = {**{token: i for token, i in raw.get_vocab().items()}, "<e>": 257, "<f>": 258}
    raw.model = models.BPE(vocab, [])
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    folder = folder_of(
        tmp_path, raw, {"tokenizer_class": "PreTrainedTokenizerFast", **config}, **files
    )
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.named == theirs.special_tokens_map
    for text in ("a<e>b<f> <s>  c", "x <new> y"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.text_ids(text) == theirs(text)["input_ids"]


# ------------------------------------------------------------------------------------------------------------ rendering
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


def both_render(tokenizer, theirs, template, messages, **variables):
    """Our text and theirs; None where refused."""
    try:
        ours = tokenizer.render(messages, **variables)
    except InputError:
        ours = None
    try:
        return ours, theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, **variables
        )
    except Exception:  # a template may raise anything
        return ours, None


def test_every_template_renders_as_in_transformers(shared, real, auto, frozen_clock):
    accepted, theirs = 0, auto("tiny_llama3")
    contexts = {
        p.stem: json.loads(p.read_text())
        for p in (shared / "chat_templates/contexts").glob("*.json")
    }
    sources = [p.read_text() for p in (shared / "chat_templates").glob("*.jinja")]
    sources += [real(name)[0].template for name in REAL if name != "gpt2"]
    for template in sources:
        tokenizer = Tokenizer(real("tiny_llama3")[0].raw, real("tiny_llama3")[0].named, template)
        cases = [
            ({"messages": c, "tools": tools, "add_generation_prompt": prompt})
            for c in CONVERSATIONS.values()
            for tools in (None, TOOLS)
            for prompt in (False, True)
        ]
        cases += [
            *contexts.values(),
            {
                "messages": CONVERSATIONS["multi"],
                "enable_thinking": False,
                "add_generation_prompt": True,
            },
        ]
        for case in cases:
            ours, expected = both_render(tokenizer, theirs, template, **case)
            assert ours == expected
            accepted += expected is not None
    assert len(sources) == 19 and accepted > 500


@pytest.mark.parametrize("name", [name for name in REAL if name != "gpt2"])
def test_a_rendering_is_encoded_as_in_transformers_with_one_bos_at_most(
    real, auto, frozen_clock, name
):
    tokenizer, theirs = real(name)[0], auto(name)
    for messages in (CONVERSATIONS["multi"], CONVERSATIONS["padded"], CONVERSATIONS["system"]):
        expected = theirs.apply_chat_template(messages, return_dict=False)
        assert tokenizer.example({"messages": messages}).ids.tolist() == expected
        prompt = theirs.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.prompt_ids(messages[:-1]) == prompt
        if name in ("tiny_llama3", "llama3.1"):
            assert expected.count(tokenizer.bos_id) == 1
            doubled = theirs(theirs.apply_chat_template(messages, tokenize=False))["input_ids"]
            assert doubled.count(tokenizer.bos_id) == 2


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 2, 'a': 1} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 1,\n "b": 2\n}'),
        ("{{ [1, 'é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}", '[1,"\\u00e9"]'),
        (
            "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
            "Hi",
        ),
        ("{% set n = namespace(x=1, self=2) %}{% set n.x = n.x + 1 %}{{ n.x }}{{ n.self }}", "22"),
        ("{{ dict(a=1).a }}{{ strftime_now('%d %b %Y') }}", "126 Jul 2024"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "HiHello",
        ),
        (
            "{{ messages[0].nothing is defined }}{{ tools is none }}{{ documents is none }}{{ bos_token }}",
            "FalseTrueTrue<s>",
        ),
    ],
)
def test_templates_have_the_helpers_of_transformers(tmp_path, frozen_clock, template, expected):
    transformers = pytest.importorskip("transformers")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "chat_template": template,
    }
    folder = folder_of(tmp_path, raw_bytes(["<s>"]), config)
    messages = [{**user("Hi"), "nothing": None}, answer("Hello")]
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False
    )
    assert Tokenizer.load(folder).render(messages) == theirs == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.clear() }}",
        "{{ dict.update(messages[0], {'role': 'x'}) }}",
        "{% set n = namespace(_x=1) %}",
        "{{ range(10 ** 9) | list }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ '%s'.format_map }}{{ ('{0.__class__}').format(1) }}{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_is_untrusted(template):
    messages = [user("Hi")]
    with pytest.raises(InputError, match="the chat template"):
        make(template).render(messages)
    assert messages == [user("Hi")]


def test_errors_of_templates_name_the_row_and_quote_the_template():
    tokenizer = make("{{ raise_exception('Only cats may speak') }}")
    with pytest.raises(InputError, match="^a.jsonl:7: .*Only cats may speak"):
        tokenizer.example({"messages": [user("Hi")], "__line__": "a.jsonl:7"})
    with pytest.raises(InputError, match="line 2"):
        make("x\n{% if %}").render([user("Hi")])


# --------------------------------------------------------------------------------------------- masks: a trap a template
# Each comes with a function that writes what the template should, piece by piece, and says which pieces are trained.
def turns(messages):
    return [(m["role"], m["content"], k == len(messages) - 1) for k, m in enumerate(messages)]


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
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
    "{% for m in messages %}{% set text = '<|h|>' + m.role + '<|/h|>\n\n' + m.content | trim + '<|eot|>' %}"
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
{%- if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}
{%- if m.role == 'assistant' and loop.last %}{% set text = '<think>\n' + thought + '\n</think>\n\n' + text %}{% endif %}
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
{{- '[INST]' + (messages[0].content + '\n\n' if loop.last and messages[0].role == 'system' else '') }}
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


HEADER_ALONE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
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


def check(name, messages):
    template, pieces = TEMPLATES[name]
    tokenizer = make(template, SPECIAL, bos="<s>", eos="</s>")
    parts = [(tokenizer.encode(text), mask) for text, mask in pieces(messages)]
    example = tokenizer.example({"messages": messages})
    assert example.ids.tolist() == [i for ids, _ in parts for i in ids]
    assert example.mask.tolist() == [mask for ids, mask in parts for _ in ids], marked_text(
        example, tokenizer
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_right_token_by_token_whatever_the_contents(name):
    draw = random.Random(0)
    for _ in range(60):
        messages = [system(draw.choice(CONTENTS))] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            thought = (
                draw.choice(THOUGHTS) if name == "drops thought" and draw.random() < 0.5 else ""
            )
            messages += [user(draw.choice(CONTENTS)), answer(thought + draw.choice(CONTENTS))]
        check(name, messages)


def test_a_mask_spelled_out():
    tokenizer = make(CHATML, SPECIAL, eos="<|im_end|>", merges=[("H", "i"), ("Ġ", "y"), ("Ċ", "Ċ")])
    example = tokenizer.example(
        {"messages": [user("Hi"), answer("Hi y\n\n"), user("y"), answer("🤖")]}
    )
    tokens = [(tokenizer.decode([i]), bool(m)) for i, m in zip(example.ids, example.mask)]
    expected = (
        ["<|im_start|>", *"user\n", "Hi", "<|im_end|>", "\n", "<|im_start|>", *"assistant\n"],
        ["Hi", " y", "\n\n", "<|im_end|>"],
        ["\n", "<|im_start|>", *"user\n", "y", "<|im_end|>", "\n", "<|im_start|>", *"assistant\n"],
        ["\ufffd"] * 4 + ["<|im_end|>"],
        ["\n"],
    )
    assert tokens == [(token, bool(i % 2)) for i, part in enumerate(expected) for token in part]
    assert example.ids.dtype == np.int32 and example.mask.dtype == bool


def test_a_token_that_reaches_into_an_answer_is_trained_and_a_header_that_swallows_spaces_is_not():
    tokenizer = make(
        TEXT_HEADERS.replace("'ASSISTANT:' }}", "'ASSISTANT: ' }}"),
        SPECIAL,
        bos="<s>",
        eos="</s>",
        merges=[("Ġ", "y"), ("Ġ", "n")],
    )
    assert tokenizer.decode(tokenizer.prompt_ids([user("x")])).endswith("ASSISTANT: ")
    assert trained(tokenizer, [user("x"), answer("yes"), user("x"), answer("no")]) == [
        " yes</s>",
        " no</s>",
    ]
    raw = raw_bytes(["<s>", "</s>"])
    raw.add_special_tokens(
        [AddedToken("<|assistant|>", rstrip=True), AddedToken("<|end|>", lstrip=True, rstrip=True)]
    )
    swallows = Tokenizer(raw, {}, NO_END.replace("m.content + '\n'", "m.content + '<|end|>\n'"))
    example = swallows.example({"messages": [user("x"), answer("  yes "), user("x"), answer("no")]})
    ids = example.ids[example.mask]
    assert [swallows.decode([i]) for i in ids] == [*"yes", "<|end|>", *"no", "<|end|>"]


def test_a_post_processor_that_cuts_spaces_off_offsets_leaves_no_token_out():
    raw = raw_bytes(SPECIAL)
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    assert trained(Tokenizer(raw, {}, NO_END), [user("x"), answer(" \n y ")]) == [" \n y "]


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.NFC(),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ],
)
def test_offsets_of_normalised_and_multi_token_characters_are_right(normalizer):
    raw = raw_bytes(SPECIAL)
    if not isinstance(
        normalizer, normalizers.NFC
    ):  # SentencePiece: bytes of unknown characters, a space up front
        vocab = [
            *SPECIAL,
            "<unk>",
            *(f"<0x{b:02X}>" for b in range(256)),
            *"▁abcdefghijklmnopqrstuvwxyz\n",
        ]
        ids = {token: i for i, token in enumerate(vocab)}
        model = models.BPE(ids, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        raw = Raw(model)
        raw.add_special_tokens(SPECIAL)
    raw.normalizer = normalizer
    tokenizer = Tokenizer(raw, {"eos_token": "<|im_end|>"}, CHATML)
    for text in ("e\u0301x", "🤖", "x 字 e\u0301", "x"):
        example = tokenizer.example({"messages": [user(text), answer(text), user(text)]})
        ids, end = example.ids.tolist(), raw.token_to_id("<|im_end|>")
        ends = [k for k, i in enumerate(ids) if i == end]
        start = ends[0] + len(tokenizer.encode("\n<|im_start|>assistant\n"))
        assert np.flatnonzero(example.mask).tolist() == [*range(start + 1, ends[1] + 1)]


# -------------------------------------------------------------------------------------- masks of templates that exist
def as_is(end, before="", trim=str):
    return lambda content, last: before + trim(content) + end


GOLDEN = {  # bos, eos, other special tokens, and what is trained of an answer, read off the template
    "chatml": ("", "<|im_end|>", ["<|im_start|>"], as_is("<|im_end|>", trim=str.strip)),
    "zephyr": ("", "</s>", [], as_is("</s>", trim=str.strip)),
    "vicuna": ("<s>", "</s>", [], as_is("</s>", trim=str.strip)),
    "gemma2": (
        "<bos>",
        "<end_of_turn>",
        ["<start_of_turn>"],
        as_is("<end_of_turn>", trim=str.strip),
    ),
    "phi3.5_mini": (
        "<s>",
        "<|endoftext|>",
        ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        as_is("<|end|>"),
    ),
    "deepseek_r1_distill_qwen": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ["<｜User｜>", "<｜Assistant｜>"],
        as_is("<｜end▁of▁sentence｜>"),
    ),
    "mistral_nemo_2407": (
        "<s>",
        "</s>",
        ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"],
        as_is("</s>"),
    ),
    "gpt_oss": (
        "",
        "<|return|>",
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"],
        as_is("<|end|>", "<|message|>"),
    ),
    "smollm3": (
        "",
        "<|im_end|>",
        ["<|im_start|>"],
        as_is("<|im_end|>", trim=lambda c: c.lstrip("\n")),
    ),
    "qwen2.5": ("", "<|im_end|>", ["<|im_start|>"], as_is("<|im_end|>")),
    "qwen3": (
        "",
        "<|im_end|>",
        ["<|im_start|>"],
        lambda content, last: (
            ("<think>\n\n</think>\n\n" + content.lstrip("\n") if last else content) + "<|im_end|>"
        ),
    ),
    **dict.fromkeys(
        ["llama3", "llama3.1", "llama3.2"],
        (
            "<|begin_of_text|>",
            "<|eot_id|>",
            ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"],
            as_is("<|eot_id|>", trim=str.strip),
        ),
    ),
}
LOOKALIKE = (
    "<|im_start|>assistant\nHello<|im_end|>\n<start_of_turn>model\nASSISTANT: [/INST]<|end_header_id|>\n\n"
    "<｜Assistant｜>"
)
DIALOGUES = [
    ["Hi", "Hello"],
    ["Hi", "Hello", "And?", "Hello"],
    ["Hello", "Hello", "Hello", "Hello"],
    ["Hi", "", "", ""],
    ["  Hi \n", " \n Hello \n\n", "\t?", "\n\n  Bye "],
    [LOOKALIKE, "Hello", LOOKALIKE, "Hi"],
    ["Hi", LOOKALIKE, "?", LOOKALIKE],
    ["1", "2", "3", "4", "5", "6"],
]


def golden(shared, name):
    bos, eos, special, expected = GOLDEN[name]
    template = (shared / f"chat_templates/{name}.jinja").read_text()
    return make(template, [t for t in (bos, eos) if t] + special, bos, eos), expected


@pytest.mark.parametrize("name", GOLDEN)
def test_masks_of_every_template(shared, name):
    tokenizer, expected = golden(shared, name)
    for dialogue in DIALOGUES:
        messages = [(user, answer)[i % 2](content) for i, content in enumerate(dialogue)]
        wanted = [
            expected(content, i == len(dialogue) - 1) for i, content in enumerate(dialogue) if i % 2
        ]
        assert trained(tokenizer, messages) == wanted
        if name != "gemma2":  # which knows no system turn
            assert trained(tokenizer, [system(LOOKALIKE), *messages]) == wanted


def test_masks_of_thinking(shared):
    thought = "<think>\nwhy\n</think>\n\nHello"
    conversations = (
        [user("Hi"), answer(thought), user("?"), answer(thought)],
        [
            user("Hi"),
            answer("Hello", reasoning_content="why"),
            user("?"),
            answer("Hello", reasoning_content="why"),
        ],
    )
    tokenizer, _ = golden(shared, "qwen3")
    for messages in conversations:
        assert trained(tokenizer, messages) == ["Hello<|im_end|>", f"{thought}<|im_end|>"]
    r1, _ = golden(shared, "deepseek_r1_distill_qwen")
    assert trained(r1, conversations[0]) == ["\n\nHello<｜end▁of▁sentence｜>"] * 2
    oss, _ = golden(shared, "gpt_oss")
    assert trained(oss, conversations[1]) == ["<|channel|>final<|message|>Hello<|end|>"] * 2
    off = {"messages": conversations[0][:2], "chat_template_kwargs": {"enable_thinking": False}}
    assert trained(tokenizer, off) == [
        "why\n</think>\n\nHello<|im_end|>"
    ]  # as far as the prompt of a rollout agrees
    off["messages"] = [user("Hi"), answer("Hello")]
    assert trained(tokenizer, off) == ["Hello<|im_end|>"]
    smol, _ = golden(shared, "smollm3")
    assert trained(smol, [system("/no_think"), user("Hi"), answer("Hello")]) == ["Hello<|im_end|>"]


def test_masks_of_minimind_whose_prompt_writes_an_empty_thought(real):
    tokenizer = real("minimind")[0]
    messages = [user("Hi"), answer("Hello"), user("?"), answer("Bye")]
    assert trained(tokenizer, messages) == ["Hello<|im_end|>", "Bye<|im_end|>"]
    messages = [user("Hi"), answer("<think>\nwhy\n</think>\n\nHello")]
    assert trained(tokenizer, messages) == ["why\n</think>\n\nHello<|im_end|>"]


ARGUMENTS = {"text": "say add <|im_end|><|eot_id|></s>"}  # spells ends of turns


@pytest.mark.parametrize(
    "name, empty, full",
    [
        (
            "qwen2.5",
            '<tool_call>\n{"name": "add", "arguments": ARGS}\n</tool_call><|im_end|>',
            'add\n<tool_call>\n{"name": "add", "arguments": ARGS}\n</tool_call><|im_end|>',
        ),
        (
            "qwen3",
            '<tool_call>\n{"name": "add", "arguments": ARGS}\n</tool_call><|im_end|>',
            'add\n<tool_call>\n{"name": "add", "arguments": ARGS}\n</tool_call><|im_end|>',
        ),
        (
            "llama3.1",
            '{"name": "add", "parameters": ARGS}<|eot_id|>',
            '{"name": "add", "parameters": ARGS}<|eot_id|>',
        ),
        (
            "llama3.2",
            '{"name": "add", "parameters": ARGS}<|eot_id|>',
            '{"name": "add", "parameters": ARGS}<|eot_id|>',
        ),
        (
            "mistral_nemo_2407",
            '[TOOL_CALLS][{"name": "add", "arguments": ARGS, "id": "abcdefghi"}]</s>',
            '[TOOL_CALLS][{"name": "add", "arguments": ARGS, "id": "abcdefghi"}]</s>',
        ),
        (
            "gpt_oss",
            *[
                "<|channel|>analysis<|message|>CONTENT<|end|><|start|>assistant to=functions.add"
                "<|channel|>commentary json<|message|>ARGS<|end|>".replace("CONTENT", c)
                for c in ("", "add")
            ],
        ),
    ],
)
def test_masks_of_tool_calls(shared, name, empty, full):
    tokenizer, expected = golden(shared, name)
    calling = (
        call("add", ARGUMENTS, id="abcdefghi")
        if name != "gpt_oss"
        else {"name": "add", "arguments": ARGUMENTS}
    )
    tool = {"role": "tool", "name": "add", "content": "add", "tool_call_id": "abcdefghi"}
    messages = [
        user("add"),
        answer("", tool_calls=[calling]),
        tool,
        answer("2"),
        user("add"),
        answer("add", tool_calls=[calling]),
        tool,
        answer("2"),
    ]
    wanted = [empty, expected("2", False), full, expected("2", True)]
    wanted = [text.replace("ARGS", json.dumps(ARGUMENTS)) for text in wanted]
    assert trained(tokenizer, {"messages": messages, "tools": TOOLS}) == wanted
    assert trained(tokenizer, {"messages": messages, "tools": json.dumps(TOOLS)}) == wanted
    if name != "qwen3":  # a call at the end, where qwen3 thinks
        assert trained(tokenizer, messages[:6]) == wanted[:3]
    if (
        name == "llama3.1"
    ):  # tools that the model has built in are called otherwise, and end in <|eom_id|>
        row = {"messages": messages[:4], "chat_template_kwargs": {"builtin_tools": ["add"]}}
        called = '<|python_tag|>add.call(text="say add <|im_end|><|eot_id|></s>")<|eom_id|>'
        assert trained(tokenizer, row) == [called, wanted[1]]


CALLS = CHATML.replace("m.content + '", "(m.content or '') + CALLS + '").replace(
    "CALLS",
    "(m.tool_calls | map(attribute='function') | map('tojson') | map('replace', '{', '<|call|>{') | "
    "join('<|/call|>') + '<|/call|>' if m.tool_calls else '')",
)


def test_calls_train_up_to_the_end_of_the_turn_though_special_tokens_stand_before_it():
    tokenizer = make(CALLS, [*SPECIAL, "<|call|>", "<|/call|>"], eos="<|im_end|>")
    shown = [
        '<|call|>{"name": "add", "arguments": <|call|>{"a": 1}}<|/call|>',
        '<|call|>{"name": "sub", "arguments": <|call|>{"b": "<|im_end|>\\n"}}<|/call|>',
    ]
    calls = [call(), call("sub", {"b": "<|im_end|>\n"})]
    tool = {"role": "tool", "content": shown[1] + "<|im_end|>"}
    messages = [
        user(shown[0]),
        answer(None, tool_calls=calls),
        tool,
        answer("add", tool_calls=calls),
        tool,
    ]
    both = "".join(shown) + "<|im_end|>"
    assert trained(tokenizer, [*messages, answer("sub")]) == [both, f"add{both}", "sub<|im_end|>"]
    assert trained(tokenizer, messages[:4]) == [both, f"add{both}"]


def test_calls_whose_end_is_another_one_in_the_middle_are_refused_even_if_a_later_turn_is_the_same():
    end = "('<|return|>' if loop.last else '<|end|>')"
    tokenizer = make(CALLS.replace("'<|im_end|>\n'", end), [*SPECIAL, "<|call|>", "<|/call|>"])
    messages = [
        user("x"),
        answer("", tool_calls=[call()]),
        user("x"),
        answer("", tool_calls=[call()]),
    ]
    assert len(trained(tokenizer, messages[:2])) == 1
    with pytest.raises(InputError, match="message 1 ends in the text cannot be found"):
        tokenizer.example({"messages": messages})


@pytest.mark.parametrize("name", ["llama3", "smollm3", "phi3.5_mini", "deepseek_r1_distill_qwen"])
def test_templates_that_leave_calls_or_tools_out_are_refused(shared, name):
    tokenizer, _ = golden(shared, name)
    with pytest.raises(InputError, match="leaves out some of the 1 tool calls"):
        tokenizer.example({"messages": [user("1"), answer("add", tool_calls=[call()])]})
    if name != "smollm3":
        with pytest.raises(InputError, match="leaves the tools out"):
            tokenizer.example({"messages": [user("add"), answer("2")], "tools": TOOLS})


def test_masks_equal_those_of_trls_training_templates(frozen_clock):
    """TRL carries twins of many templates, with {% generation %} tags: spans found by trial equal its marked ones."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    compared = 0
    for family, eos in (
        ("qwen2_5", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("qwen3_instruct_2507", "<|im_end|>"),
        ("lfm2", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("gemma3", "<end_of_turn>"),
        ("gptoss", "<|return|>"),
        ("cohere", "<|END_OF_TURN_TOKEN|>"),
        ("cohere2", "<|END_OF_TURN_TOKEN|>"),
        ("deepseekv3", "<｜end▁of▁sentence｜>"),
    ):
        special = [
            *SPECIAL,
            "<bos>",
            "<|start|>",
            "<|message|>",
            "<|channel|>",
            "<|call|>",
            "<end_of_turn>",
            "<start_of_turn>",
            "<|eot_id|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|END_RESPONSE|>",
            "<|START_RESPONSE|>",
            "<｜end▁of▁sentence｜>",
        ]
        plain, marked = (
            make((folder / f"{family}{kind}.jinja").read_text(), special, "<s>", eos)
            for kind in ("", "_training")
        )
        conversations = [
            [(user, answer)[i % 2](content) for i, content in enumerate(d)] for d in DIALOGUES
        ]
        conversations += CONVERSATIONS.values()
        for messages in conversations:
            try:
                same = plain.render(messages) == marked.render(messages)
            except InputError:
                continue
            if same and not any(m.get("tool_calls") for m in messages):
                assert trained(plain, messages) == trained(marked, messages), family
                compared += 1
    assert compared > 100


@pytest.mark.parametrize(
    "template", [TAGS_END_INSIDE, TAGS.replace("INSIDE", "").replace("OUTSIDE", "\n")]
)
def test_tags_give_the_mask_of_transformers(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": template,
    }
    folder = folder_of(tmp_path, raw_bytes(SPECIAL), config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for messages in (
        [user("Hi"), answer("é🤖 "), user("?"), answer("\nHello")],
        [user("Hi"), answer("")],
    ):
        expected = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        example = Tokenizer.load(folder).example({"messages": messages})
        assert example.mask.tolist() == [bool(m) for m in expected["assistant_masks"]]


def test_several_tags_in_a_turn_belong_to_it():
    template = TAGS_END_INSIDE.replace(
        "{%- generation %}{{ m.content }}",
        "{%- generation %}{{ m.content[:1] }}{% endgeneration %}|"
        "{% generation %}{{ m.content[1:] }}",
    )
    tokenizer = make(template, SPECIAL, eos="<|im_end|>")
    messages = [user("Hi"), answer("ab"), user("?"), answer("cd")]
    assert trained(tokenizer, messages) == ["a", "b<|im_end|>", "c", "d<|im_end|>"]
    assert trained(tokenizer, messages, "last") == ["c", "d<|im_end|>"]


@pytest.mark.parametrize(
    "template, said",
    [
        (
            CHATML.replace("m.content", "(m.content if m.role == 'user' else '')"),
            "ends in the text cannot be found",
        ),
        (
            CHATML.replace("m.content", "(m.content | length | string)"),
            "in the text cannot be found",
        ),
        (CHATML.replace("m.content +", "m.content + m.content +"), "in the text cannot be found"),
        (
            TAGS_END_INSIDE.replace("{%- for", "{%- set x %}{% for").replace(
                "{% endfor %}", "{% endfor %}{% endset %}{{ x | trim | length }}"
            ),
            "change what it writes",
        ),
    ],
)
def test_what_cannot_be_found_is_refused_with_the_row_and_the_way_out(template, said):
    tokenizer = make(template, SPECIAL, eos="<|im_end|>")
    with pytest.raises(InputError, match=said) as caught:
        tokenizer.example({"messages": [user("Hi"), answer("Hello")], "__line__": "a.jsonl:3"})
    assert str(caught.value).startswith("a.jsonl:3: ") and "generation" in str(caught.value)


def test_a_text_with_the_probe_is_refused():
    with pytest.raises(InputError, match="U\\+F5A5A"):
        make(CHATML, SPECIAL).example({"messages": [user(PROBE), answer("Hello")]})


def test_an_answer_without_a_question_is_found():
    tokenizer = make(TRIMS, SPECIAL, bos="<s>", eos="<|eot|>")
    messages = [answer(" Hi "), user("a"), answer("b"), answer("c")]
    assert trained(tokenizer, messages) == ["Hi<|eot|>", "b<|eot|>", "c<|eot|>"]
    assert trained(tokenizer, [system("a"), answer("b")]) == ["b<|eot|>"]


# ------------------------------------------------------------------------------------------------------- kinds of rows
def test_train_on_chooses_turns():
    tokenizer = make(CHATML, SPECIAL, eos="<|im_end|>")
    messages = [user("a"), answer("1"), user("b"), answer("2"), answer("3")]
    ends = ["1<|im_end|>", "2<|im_end|>", "3<|im_end|>"]
    assert trained(tokenizer, messages) == ends
    assert trained(tokenizer, messages, "last") == ends[2:]
    assert trained(tokenizer, messages, "completion") == ends[1:]
    assert tokenizer.example({"messages": messages}, "all").mask.all()
    row = {"prompt": messages[:2] + messages[2:3], "completion": messages[3:]}
    for train_on, expected in (
        ("assistant", ends[1:]),
        ("completion", ends[1:]),
        ("last", ends[2:]),
    ):
        assert trained(tokenizer, row, train_on) == expected
    assert (
        tokenizer.example(row).ids.tolist()
        == tokenizer.example({"messages": messages}).ids.tolist()
    )
    assert trained(tokenizer, [user("a"), answer("1"), user("b")], "completion") == []


def test_text_is_trained_whole_with_one_bos_and_one_eos():
    tokenizer = make(None, SPECIAL, bos="<s>", eos="</s>", adds_bos=True)
    for text in ("ab", "<s>ab", "ab</s>", "<s>ab</s>"):
        example = tokenizer.example({"text": text})
        assert tokenizer.decode(example.ids) == "<s>ab</s>"
        assert example.mask.tolist() == [False, True, True, True]  # nobody predicts BOS
    assert tokenizer.example({"text": "ab"}, "all").mask.all()
    assert (
        tokenizer.decode(make(None, SPECIAL, bos="<s>", eos="</s>").example({"text": "ab"}).ids)
        == "ab</s>"
    )


@pytest.mark.parametrize("template", [None, CHATML])
def test_plain_completions_are_trained_with_eos_and_their_prompts_are_those_of_rollouts(template):
    tokenizer = make(
        template, SPECIAL, bos="<s>", eos="</s>", adds_bos=True, merges=[("a", "b"), ("Ġ", "b")]
    )
    for prompt, completion, ids in (
        ("xa", "bc", ["<s>", "x", "a", "b", "c", "</s>"]),  # "ab" would reach across
        ("xa", " bc", ["<s>", "x", "a", " b", "c", "</s>"]),
        ("x ", "bc", ["<s>", "x", " ", "b", "c", "</s>"]),
        ("", "ab", ["<s>", "ab", "</s>"]),
        ("<s>x", "ab</s>", ["<s>", "x", "ab", "</s>"]),
    ):
        example = tokenizer.example({"prompt": prompt, "completion": completion})
        assert [tokenizer.decode([i]) for i in example.ids] == ids
        given = (~example.mask).sum()
        assert (
            tokenizer.prompt_ids(prompt)
            == example.ids[~example.mask].tolist()
            == example.ids[:given].tolist()
        )


def test_a_completion_gets_no_space_from_sentencepiece():
    raw = Raw(
        models.BPE(
            {t: i for i, t in enumerate(["<unk>", "</s>", "▁", *"abcdx:"])}, [], unk_token="<unk>"
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(raw, {"eos_token": "</s>"}, None)
    example = tokenizer.example({"prompt": "x:", "completion": "ab"})
    assert [raw.id_to_token(i) for i in example.ids] == ["▁", "x", ":", "a", "b", "</s>"]


def test_a_base_model_names_the_flag_that_supplies_a_template():
    row = {"messages": [user("a"), answer("b")], "__line__": "f:1"}
    for use in (lambda t: t.example(row), lambda t: t.prompt_ids([user("a")])):
        with pytest.raises(InputError, match="--chat_template FILE"):
            use(make(None))


def test_prompts_are_what_examples_begin_with():
    unlike = {
        "long generation prompt",
        "header, no generation prompt",
        "prompt with other spaces",
        "no generation prompt",
    }  # the last shows the system message beside the last question alone
    for name in TEMPLATES.keys() - unlike:
        tokenizer = make(TEMPLATES[name][0], SPECIAL, bos="<s>", eos="</s>")
        messages = [system("s"), user("Hi"), answer("Hello"), user("?")]
        prompt = tokenizer.prompt_ids(messages)
        example = tokenizer.example({"prompt": messages, "completion": [answer("Bye")]})
        assert prompt == example.ids[: example.mask.argmax()].tolist(), name
        assert tokenizer.doubts() == (
            [] if name != "no end-of-turn token" else tokenizer.doubts()[:1]
        )


def test_a_template_without_a_generation_prompt_cannot_start_rollouts():
    tokenizer = make(HEADER_ALONE, SPECIAL, eos="<|im_end|>")
    with pytest.raises(InputError, match="no generation prompt.*<|im_start|>assistant"):
        tokenizer.prompt_ids([user("Hi")])
    make(NO_PROMPT, SPECIAL, "<s>", "</s>").prompt_ids(
        [user("Hi")]
    )  # its answers have no header either


@pytest.mark.parametrize(
    "name, stops",
    [("qwen2.5", [151645]), ("llama3.1", [128009]), ("gpt2", [50256]), ("minimind", [2])],
)
def test_stop_ids(real, name, stops):
    assert real(name)[0].stop_ids == {*stops}


def test_stop_ids_are_those_of_every_source(tmp_path):
    folder = folder_of(
        tmp_path,
        raw_bytes(SPECIAL),
        {"eos_token": "</s>", "chat_template": CHATML},
        generation_config={"eos_token_id": [1, 15]},
    )
    assert Tokenizer.load(folder).stop_ids == {1, 15, SPECIAL.index("<|im_end|>")}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 16}')
    assert Tokenizer.load(folder).stop_ids == {1, 16, SPECIAL.index("<|im_end|>")}


# ------------------------------------------------------------------------------------------------- report and identity
def test_report_says_what_there_is_and_marks_what_is_trained():
    tokenizer = make(TRIMS, SPECIAL, bos="<s>", eos="<|eot|>", adds_bos=True)
    rows = [
        {"messages": [user("Hi"), answer("Hello")], "__line__": "f:1"},
        {"messages": [user("a" * 50), answer("b")]},
    ]
    text = report([tokenizer.example(row) for row in rows], tokenizer, rows)
    for said in ("2 rows", "1 to 1 BOS", "a stop token trained in 100.0%"):
        assert said in text
    assert "doubtful" not in text
    assert f"longest row: {len(tokenizer.example(rows[1]))} tokens (row 1)" in text
    assert text.endswith("<s><|h|>user<|/h|>\n\nHi<|eot|><|h|>assistant<|/h|>\n\n»Hello<|eot|>«")


def test_report_stops_at_what_is_surely_wrong():
    tokenizer = make(TRIMS, SPECIAL, bos="<s>", eos="<|eot|>")
    with pytest.raises(InputError, match=r"1 of 2 rows \(row 1\) begin with BOS twice"):
        report([Example([0, 5], [0, 1]), Example([0, 0, 5], [0, 0, 1])], tokenizer)
    with pytest.raises(InputError, match="not one of 2 rows"):
        report([Example([0, 5], [1, 0])] * 2, tokenizer)


def test_report_says_what_is_doubtful():
    tokenizer = make(OTHER_SPACES, SPECIAL, bos="<s>", eos="</s>", adds_bos=True)
    rows = [
        {"messages": m, "__line__": f"f:{i}"}
        for i, m in enumerate([[user("a"), answer("b")], [user("a")]])
    ]
    examples = [tokenizer.example(row) for row in rows]
    examples.append(Example([*examples[0].ids[:-2], 0], [*examples[0].mask[:-2], 0]))
    text = report(examples, tokenizer, [*rows, {"__line__": "f:9"}])
    for said in (
        "1 of 3 rows (f:1) train nothing",
        "2 of 3 rows (f:1, f:9) train no stop token",
        "3 of 3 rows (f:0, f:1, f:9) begin without",
        "1 of 3 rows (f:9) have a BOS further on",
        "the template's prompt goes on with",
    ):
        assert said in text
    for template, said in (
        (HEADER_ALONE, "no generation prompt"),
        (NO_END, "no end-of-turn token"),
        (CHATML + "{{ strftime_now('%d') }}", "date"),
        (LONG_PROMPT, "goes on with"),
        (NO_PROMPT, "leaves a system message out"),
    ):
        assert said in "".join(make(template, SPECIAL, "<s>", "</s>").doubts())
    assert "no end-of-sequence token" in make(None, []).doubts()[0]
    assert "no BOS declared" in report(
        [make(CHATML, SPECIAL).example(rows[0])], make(CHATML, SPECIAL)
    )


def test_tokens_spelled_out_in_a_message_are_seen_in_the_report():
    tokenizer = make("{{ bos_token + messages[0].content }}", SPECIAL, bos="<s>", eos="</s>")
    with pytest.raises(InputError, match="BOS twice"):
        report([tokenizer.example({"messages": [user("<s>a")]}, "all")], tokenizer)


def test_what_ends_an_answer_here_ends_one_in_transformers_too(tmp_path):
    """A base model, whose folder knows its EOS alone, trained with a template that ends turns with another token."""
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path, raw_bytes(SPECIAL), {"eos_token": "</s>"})
    (tmp_path / "chatml.jinja").write_text(CHATML)
    end, turn_end = SPECIAL.index("</s>"), SPECIAL.index("<|im_end|>")

    def generation(template):
        return tokenizer_files(folder, Tokenizer.load(folder, template))["generation_config.json"]

    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": end}))
    assert generation(None) is None
    for before, after in (
        ({}, {}),
        ({"eos_token_id": end, "top_k": 20}, {"top_k": 20}),
        ({"eos_token_id": [end, 9]}, {"eos_token_id": [end, 9, turn_end]}),
    ):
        if before:
            (tmp_path / "generation_config.json").write_text(json.dumps(before))
        written = json.loads(generation(tmp_path / "chatml.jinja"))
        assert written == {"eos_token_id": [end, turn_end], **after}
        assert (
            transformers.GenerationConfig.from_dict(written).eos_token_id == written["eos_token_id"]
        )
    (
        tmp_path / "generation_config.json"
    ).unlink()  # and a token that ends nothing in training does not get there
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [end, 7, 99999]}))
    assert json.loads(generation(tmp_path / "chatml.jinja")) == {"eos_token_id": [end, turn_end]}
    (tmp_path / "generation_config.json").write_text(
        known := json.dumps({"eos_token_id": [turn_end, end]})
    )
    assert generation(tmp_path / "chatml.jinja") == known.encode()


def test_files_beside_a_checkpoint_load_in_transformers_with_the_template_in_force(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, out = tmp_path / "a", tmp_path / "b"
    folder.mkdir(), out.mkdir()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "chat_template": CHATML,
    }
    folder_of(folder, raw_bytes(SPECIAL), config, generation_config={"eos_token_id": 1})
    (tmp_path / "other.jinja").write_text(TRIMS)
    tokenizer = Tokenizer.load(folder, tmp_path / "other.jinja")
    for name, content in tokenizer_files(folder, tokenizer).items():
        if content is not None:
            (out / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert {p.name for p in out.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "nanopost.json",
    }
    again, theirs = Tokenizer.load(out), transformers.AutoTokenizer.from_pretrained(out)
    assert again.template == theirs.chat_template == TRIMS
    assert (
        fingerprint(again)
        == fingerprint(tokenizer)
        == json.loads((out / "nanopost.json").read_text())
    )
    assert check_stage(out, again) == "" == check_stage(folder, tokenizer)
    (tmp_path / "other.jinja").write_text(CHATML)
    assert "another template than" in check_stage(
        out, Tokenizer.load(out, tmp_path / "other.jinja")
    )
    folder_of(out, raw_bytes([*SPECIAL, "<new>"]), {"eos_token": "</s>"})
    assert "another tokenizer than" in check_stage(out, Tokenizer.load(out))


def test_templates_come_from_every_place(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = folder_of(tmp_path, raw_bytes(SPECIAL), {"chat_template": named})
    assert Tokenizer.load(folder).render([user("a")]) == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(folder).render([user("a")]) == "J"
    (tmp_path / "f.jinja").write_text("F")
    assert Tokenizer.load(folder, str(tmp_path / "f.jinja")).render([user("a")]) == "F"


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizers .* cannot read it"),
        (lambda d: (d / "tokenizer_config.json").write_text("{"), "not valid JSON"),
        (
            lambda d: (d / "tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}'),
            "names '<nowhere>' as eos_token",
        ),
        (
            lambda d: (d / "tokenizer_config.json").write_text(
                '{"added_tokens_decoder": {"9000": {"content": "<new>", "special": true}}}'
            ),
            "'<new>' has the id 9000 in tokenizer_config.json",
        ),
    ],
)
def test_a_folder_that_does_not_do_is_refused_by_name(tmp_path, spoil, said):
    spoil(folder_of(tmp_path, raw_bytes(SPECIAL)))
    with pytest.raises(InputError, match=said) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_or_template_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="hf download Qwen/Qwen2.5-0.5B"):
        Tokenizer.load("Qwen/Qwen2.5-0.5B")
    with pytest.raises(InputError, match="--chat_template nowhere.jinja"):
        Tokenizer.load(folder_of(tmp_path, raw_bytes(SPECIAL)), "nowhere.jinja")


# ----------------------------------------------------------------------------------------------------------- real rows
@pytest.mark.parametrize(
    "name, end", [("qwen2.5", "<|im_end|>"), ("qwen3", "<|im_end|>"), ("tiny_llama3", "<|eot_id|>")]
)
def test_real_rows_train_their_answers_and_nothing_else(shared, real, name, end):
    tokenizer = real(name)[0]
    with gzip.open(shared / "sft/messages.jsonl.gz", "rt", encoding="utf8") as file:
        rows = [json.loads(line) for line in file]
    rows = rows[::7] + rows[-100:]
    trim = str.strip if name == "tiny_llama3" else str
    for row in rows:
        answers = [trim(m["content"]) + end for m in row["messages"] if m["role"] == "assistant"]
        if name == "qwen3":
            answers[-1] = "<think>\n\n</think>\n\n" + answers[-1].lstrip("\n")
        example = tokenizer.example(row)
        cuts = np.flatnonzero(np.diff(example.mask)) + 1
        pieces = zip(np.split(example.ids, cuts), np.split(example.mask, cuts))
        parts = [tokenizer.decode(ids) for ids, mask in pieces if mask[0]]
        assert parts == answers
        assert example.ids.tolist().count(tokenizer.bos_id) == (name == "tiny_llama3")
