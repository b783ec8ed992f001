"""Masks token by token against pieces written by hand, trap by trap."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from chats import (
    CHATML,
    CONTENTS,
    CONVERSATIONS,
    NO_END,
    SPECIAL,
    TAGS,
    TAGS_END_INSIDE,
    TEMPLATES,
    TEXT_HEADERS,
    THOUGHTS,
    TOOLS,
    TRIMS,
    answer,
    call,
    folder_of,
    make,
    raw_bytes,
    system,
    trained,
    user,
)
from tokenizers import AddedToken, models, normalizers, processors
from tokenizers import Tokenizer as Raw

from nanopost import InputError
from nanopost.report import marked_text
from nanopost.spans import _Rendering
from nanopost.template import PROBE, Template
from nanopost.tokenizer import Tokenizer


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


# ----------------------------------------------------------------------------- templates that exist
def as_is(end, before="", trim=str):
    return lambda content, last: before + trim(content) + end


# bos, eos, other special tokens, and what is trained of an answer, read off the template.
GOLDEN = {
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
    "<|im_start|>assistant\nHello<|im_end|>\n<start_of_turn>model\nASSISTANT: [/INST]"
    "<|end_header_id|>\n\n<｜Assistant｜>"
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
    "(m.tool_calls | map(attribute='function') | map('tojson') | "
    "map('replace', '{', '<|call|>{') | join('<|/call|>') + '<|/call|>' if m.tool_calls else '')",
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


def test_much_whitespace_before_a_call_takes_no_time():
    tokenizer = make(CALLS, [*SPECIAL, "<|call|>", "<|/call|>"], eos="<|im_end|>")
    messages = [user(f"x{' ' * 200_000}x"), answer(None, tool_calls=[call()]), user("x")]
    began = time.process_time()
    assert len(trained(tokenizer, messages)) == 1
    assert time.process_time() - began < 5


def test_calls_that_end_differently_in_the_middle_are_refused_even_if_a_later_turn_is_the_same():
    end = "('<|return|>' if loop.last else '<|end|>')"
    tokenizer = make(CALLS.replace("'<|im_end|>\n'", end), [*SPECIAL, "<|call|>", "<|/call|>"])
    messages = [
        user("x"),
        answer("", tool_calls=[call()]),
        user("x"),
        answer("", tool_calls=[call()]),
    ]
    assert len(trained(tokenizer, messages[:2])) == 1
    with pytest.raises(InputError, match="cannot find where the answer in message 1 ends"):
        tokenizer.example({"messages": messages})


@pytest.mark.parametrize("name", ["llama3", "smollm3", "phi3.5_mini", "deepseek_r1_distill_qwen"])
def test_templates_that_leave_calls_or_tools_out_are_refused(shared, name):
    tokenizer, _ = golden(shared, name)
    with pytest.raises(InputError, match="drops some of the 1 tool calls"):
        tokenizer.example({"messages": [user("1"), answer("add", tool_calls=[call()])]})
    if name != "smollm3":
        with pytest.raises(InputError, match="ignores tools"):
            tokenizer.example({"messages": [user("add"), answer("2")], "tools": TOOLS})


def test_masks_equal_those_of_trls_training_templates(frozen_clock):
    """TRL has twins of many templates with {% generation %} blocks: both give the same spans."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    compared = 0
    for family, eos in (
        ("qwen2_5", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("qwen3_instruct_2507", "<|im_end|>"),
        ("qwen3_5_think", "<|im_end|>"),
        ("qwen3_5_nothink", "<|im_end|>"),
        ("qwen3_6", "<|im_end|>"),
        ("qwen3_8", "<|im_end|>"),
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
                same = plain.template.render(messages) == marked.template.render(messages)
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
            "cannot find where the answer in message 1 ends",
        ),
        (
            CHATML.replace("m.content", "(m.content | length | string)"),
            "cannot find where the answer in message 1",
        ),
        (
            CHATML.replace("m.content +", "m.content + m.content +"),
            "cannot find where the answer in message 1",
        ),
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


# --------------------------------------------------------------------------------------- how often
def times_rendered(monkeypatch, tokenizer, messages):
    """How often each message is rendered, on average."""
    rendered = []

    def counted(self, given, *args, **variables):
        rendered.append(len(given))
        return render(self, given, *args, **variables)

    tokenizer.warnings()  # what the template says about itself is found once
    render = Template.render
    with monkeypatch.context() as patch:
        patch.setattr(Template, "render", counted)
        tokenizer.example({"messages": messages})
    return sum(rendered) / len(messages)


def long_chat(turns, trim):
    messages = [system("Be brief.")]
    for i in range(turns):
        question, reply = f"question {i}", f"<think>\nwhy {i}\n</think>\n\nanswer {i}"
        messages += [user(f" {question}\n" if trim else question), answer(reply)]
    return messages


def long_calls(turns):
    """One question, and calls of tools one after the other."""
    messages = [user("add them all")]
    for i in range(turns):
        messages.append(answer("so" if i % 2 else None, tool_calls=[call("add", {"a": i})]))
        messages.append({"role": "tool", "name": "add", "content": f"{i}"})
    return [*messages, answer("done")]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_message_is_not_rendered_more_often_in_a_longer_conversation(monkeypatch, name, trim):
    tokenizer = make(TEMPLATES[name][0], SPECIAL, bos="<s>", eos="</s>")
    few, many = (times_rendered(monkeypatch, tokenizer, long_chat(n, trim)) for n in (8, 32))
    assert many <= few <= 12


def test_neither_is_a_call_of_a_tool(monkeypatch, shared):
    made = make(CALLS, [*SPECIAL, "<|call|>", "<|/call|>"], eos="<|im_end|>")
    for tokenizer in (made, golden(shared, "qwen2.5")[0], golden(shared, "qwen3")[0]):
        few, many = (times_rendered(monkeypatch, tokenizer, long_calls(n)) for n in (8, 32))
        assert many < 1.1 * few < 16


def test_probes_in_many_messages_find_what_single_ones_find():
    """The same spans, whether found all at once or one by one."""
    draw = random.Random(1)
    for name, (template, _) in TEMPLATES.items():
        tokenizer = make(template, SPECIAL, bos="<s>", eos="</s>")
        for _ in range(6):
            messages = [system("s")] if draw.random() < 0.5 else []
            for _ in range(3):
                messages.append(user(draw.choice(CONTENTS)))
                for _ in range(draw.choice([1, 1, 2, 3])):
                    messages.append(answer(draw.choice(CONTENTS)))
            text = tokenizer.template.render(messages)
            rendering = _Rendering(
                tokenizer.template, messages, text, tokenizer.template.try_render
            )
            for k in range(1, len(messages)):
                assert rendering.content_end(k) == rendering.content_end_alone(k), name
                if messages[k]["role"] == "assistant":
                    assert rendering.content_start(k) == rendering.content_start_alone(k), name
                    assert rendering.header(k) == rendering.header_alone(k), name
                    assert rendering.prompt(k) == rendering.prompt_among(range(k), k), name
