"""Tools: schemas against transformers', and calls read as templates write them."""

import json
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from nanopost import InputError, tools
from nanopost.template import Template

trl = pytest.importorskip("trl")
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[TOOL_CALLS]"]


def template_of(source):
    return Template(source, {"bos_token": "<s>", "eos_token": "</s>"}, SPECIAL, ["</s>"])


# ----------------------------------------------------------------------------------------- schemas
def area(width: float, height: float = 1.0, unit: Literal["m", "ft"] = "m") -> float:
    """The area of a rectangle.

    It is not that of an ellipse.

    Args:
        width: Along the wall,
            in units.
        height: Up.
        unit: What lengths are in (choices: ["m", "ft"])

    Returns:
        The area, squared units.

    Raises:
        ValueError: never
    """


def look_up(
    keys: list[str],
    depth: int | None,
    where: dict[str, list[int]],
    pair: tuple[int, str],
    either: int | str,
    mixed: Union[list[int], str, None],  # noqa: UP007
    any_value: Any,
    flags: Optional[bool] = None,  # noqa: UP045
    bare: list = (),
):
    """
    Looks keys up.

    Args:
        keys: The keys: all of them
        depth: How deep
        where: Index of the pages
        pair: Two things
        either: A number or a text
        mixed: One of three
        any_value: Whatever it is
        flags: Or not
        bare: Rest
    """


def now():
    """The time."""


class Shelf:
    def take(self, book: str) -> str:
        """Takes a book.

        Args:
            book: Its title
        """


@pytest.mark.parametrize("function", [area, look_up, now, Shelf().take], ids=lambda f: f.__name__)
def test_a_schema_is_transformers(function):
    from transformers.utils import get_json_schema

    assert tools.schema(function) == get_json_schema(function)


def untyped(x):
    """A tool.

    Args:
        x: A number
    """


def undescribed(x: int):
    """A tool of x."""


def of_a_path(x: Path):
    """A tool.

    Args:
        x: A path
    """


def silent(x: int):
    pass


@pytest.mark.parametrize(
    "function, sentence",
    [
        (untyped, "the argument x of the tool untyped has no type: add one"),
        (undescribed, "the argument x of the tool undescribed has no description under Args:"),
        (of_a_path, "the tool of_a_path has an argument or a result of the type"),
        (silent, "the tool silent has no docstring: say there what it does"),
    ],
)
def test_a_method_that_does_not_describe_itself_gets_one_sentence(function, sentence):
    with pytest.raises(InputError, match=sentence):
        tools.schema(function)


# ------------------------------------------------------------------------------------------- calls
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Searches.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "What for"},
                    "pages": {"type": "array", "description": "Where"},
                    "exact": {"type": "boolean", "description": "Only whole words"},
                    "limits": {"type": "object", "description": "Bounds"},
                    "most": {"type": "integer", "description": "At most"},
                },
                "required": ["query"],
            },
        },
    }
]
GIVEN = [
    {"query": 'she said "no"\n<b>é</b> {"a": 1} </tool_', "pages": [1, 2.5], "exact": True},
    {"query": "75001", "limits": {"a": {"b": [None, "x"]}}, "most": -3},
    {},
]
# Which form each template with tools has; None: none that nanopost reads.
HERMES, MISTRAL, LLAMA3, TAGS = tools.FORMS.values()
OURS = {
    "llama3.1": LLAMA3,
    "llama3.2": LLAMA3,
    "mistral_nemo_2407": MISTRAL,
    "qwen2.5": HERMES,
    "qwen3": HERMES,
    "gpt_oss": None,
}
TRLS = {
    **dict.fromkeys(["llama3_1", "llama3_2"], LLAMA3),
    **dict.fromkeys(["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"], HERMES),
    **dict.fromkeys(["qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"], TAGS),
    **dict.fromkeys(["nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super"], TAGS),
    "nemotron_3_ultra": TAGS,
    **dict.fromkeys(["deepseekv3", "diffusion_gemma", "glm4moe", "gptoss", "muse_glimmer"]),
    **dict.fromkeys(["gemma4", *(f"gemma4_v{i}" for i in range(2, 6))]),
    **dict.fromkeys(["lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2"]),
}


def rendered(source, calls) -> str:
    """A conversation with these calls as transformers renders it, or "" where refused."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "?"}]
    messages.append({"role": "assistant", "content": "", "tool_calls": calls})
    try:
        ((text,), _) = render_jinja_template(
            conversations=[messages],
            tools=TOOLS,
            chat_template=source,
            bos_token="<s>",
            eos_token="</s>",
        )
    except Exception:  # a template may raise anything
        return ""
    return text


def check_form(source, expected):
    """The form that is found for a template reads back what transformers renders of calls."""
    if expected is None:
        with pytest.raises(InputError, match="writes no tool calls in a form that nanopost reads"):
            tools.parser_of(template_of(source))
        return
    parse = tools.parser_of(template_of(source))
    assert parse is expected
    calls = [tools.call("search", arguments, i) for i, arguments in enumerate(GIVEN)]
    for some in [calls[:1], calls[1:2], calls[2:], calls]:
        text = rendered(source, some)
        if not text and len(some) > 1:  # Llama's: one call at a time
            continue
        answer = text[text.rindex("?") + 1 :]
        header = template_of(source).trial.prompt
        _, found = parse(answer.removeprefix(header).strip().removesuffix("<|eot_id|>"), TOOLS)
        assert [call["function"] for call in found] == [call["function"] for call in some]


def test_every_template_here_that_writes_calls_is_read_or_refused(shared):
    sources = {p.stem: p.read_text() for p in (shared / "chat_templates").glob("*.jinja")}
    for name, source in sources.items():
        check_form(source, OURS.get(name))


def test_every_template_of_trl_that_writes_calls_is_read_or_refused():
    folder = Path(trl.__file__).parent / "chat_templates"
    sources = {p.stem: p.read_text() for p in folder.glob("*.jinja")}
    assert TRLS.keys() <= sources.keys()
    for name, source in sources.items():
        check_form(source, TRLS.get(name.removesuffix("_training")))


GOOD = '<tool_call>\n{"name": "search", "arguments": {"query": "a"}}\n</tool_call>'


@pytest.mark.parametrize(
    "form, text, content, expected",
    [
        (HERMES, "So.", "So.", []),
        (HERMES, f"Let me see.\n{GOOD}\n{GOOD}", "Let me see.", [{"query": "a"}] * 2),
        (HERMES, GOOD.replace("\n", ""), "", [{"query": "a"}]),
        (HERMES, GOOD.removesuffix("</tool_call>"), "", ["does not end with </tool_call>"]),
        (HERMES, f"{GOOD}<tool_call>{{'name'", "", [{"query": "a"}, "is not JSON"]),
        (HERMES, "<tool_call>[1]</tool_call>", "", ["has no name"]),
        (HERMES, '<tool_call>{"name": 3}</tool_call>', "", ["has no name"]),
        (HERMES, GOOD.replace('{"query": "a"}', '"a"'), "", ["arguments of a call of search are"]),
        (HERMES, "<tool_call>" + "[" * 99999, "", ["nested too deeply"]),
        (HERMES, f"<think>No <tool_call> yet.</think>{GOOD}", None, [{"query": "a"}]),
        (HERMES, GOOD.replace('"a"', '"</tool_call>"'), "", [{"query": "</tool_call>"}]),
        (MISTRAL, "So.", "So.", []),
        (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]', "", [{"x": 1}]),
        (MISTRAL, '[TOOL_CALLS]{"name": "f"}', "", ["are not a list"]),
        (MISTRAL, "[TOOL_CALLS][", "", ["are not JSON"]),
        (LLAMA3, 'The {"name": "f"} is it.', None, []),
        (LLAMA3, '{"answer": 3}', None, []),
        (LLAMA3, ' {"name": "f", "parameters": {"x": "1"}}\n', "", [{"x": "1"}]),
        (LLAMA3, '{"name": "f", "parameters": {}} or so', "", ["is followed by text"]),
        (LLAMA3, '{"name": "f", "parameters": {', "", ["is not JSON"]),
        (TAGS, "So.", "So.", []),
        (TAGS, "<tool_call>\n<function=f>\n", "", ["is not <function=...> to </function>"]),
        (
            TAGS,
            "<tool_call><function=search><parameter=query>\n1\n</parameter>\n<parameter=most>\n2\n"
            "</parameter>\n<parameter=exact>\nFalse\n</parameter><parameter=pages>all</parameter>"
            "</function></tool_call>",
            "",
            [{"query": "1", "most": 2, "exact": False, "pages": "all"}],
        ),
    ],
)
def test_calls_are_read_and_malformed_ones_say_why(form, text, content, expected):
    found, calls = form(text, TOOLS)
    assert found == (text if content is None else content) or "</think>" in text
    assert len(calls) == len(expected)
    for call, wanted in zip(calls, expected):
        if isinstance(wanted, str):
            assert wanted in call
        else:
            assert call["function"]["arguments"] == wanted


def test_an_id_is_what_the_model_wrote_if_templates_can_render_it():
    """Templates of Mistral refuse any other than nine letters or digits."""
    for given, expected in [("aB3456789", "aB3456789"), ("a", "call00001"), (7, "call00001")]:
        calls = json.dumps(
            [{"name": "e", "arguments": {}}, {"name": "f", "arguments": {}, "id": given}]
        )
        assert MISTRAL(f"[TOOL_CALLS]{calls}", TOOLS)[1][1]["id"] == expected
