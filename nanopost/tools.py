"""Tools: how a method describes itself to a model, and the calls that a model writes.

A call is what a message holds in tool_calls, {"type": "function", "id": ..., "function": {"name":
..., "arguments": {...}}}, or, where it is malformed, a text that says why.
"""

import ast
import inspect
import json
import re
import types
import typing
from collections.abc import Callable

from nanopost import InputError
from nanopost.template import OPEN, Template

Calls = list[dict | str]
TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
PARTS = r"\s*(Args:|Returns:|Raises:|\Z)"  # of a docstring in Google's style


# ----------------------------------------------------------------------------------------- schemas
def schema(function: Callable) -> dict:
    """What a chat template tells of a function: name, docstring, types and descriptions of its
    arguments, as transformers.utils.get_json_schema says it.

    InputError for an argument without a type or a description (an Args: block in Google's style).
    """
    name, doc = function.__name__, (inspect.getdoc(function) or "").strip()
    if not doc:
        raise InputError(f"the tool {name} has no docstring: say there what it does.")
    hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
    said = _said_of_arguments(doc)
    properties = {}
    for argument in parameters:
        if argument not in hints or argument not in said:
            what = "type" if argument not in hints else "description under Args: in its docstring"
            raise InputError(f"the argument {argument} of the tool {name} has no {what}: add one.")
        properties[argument] = _described(_type(hints[argument], name), said[argument])
    found = {"type": "object", "properties": properties}
    if needed := [x.name for x in parameters.values() if x.default is x.empty]:
        found["required"] = needed
    about = re.match(rf"(.*?){PARTS}", doc, re.DOTALL)[1].strip()
    function = {"name": name, "description": about, "parameters": found}
    if "return" in hints:
        function["return"] = _type(hints["return"], name)
        if returned := re.search(rf"\n\s*Returns:\n\s*(.*?){PARTS}", doc, re.DOTALL):
            function["return"]["description"] = returned[1].strip()
    return {"type": "function", "function": function}


def _said_of_arguments(doc) -> dict[str, str]:
    """The Args: block of a docstring. Lines that are indented deeper continue a description."""
    block = re.search(rf"\n\s*Args:\n(.*?){PARTS}", doc, re.DOTALL)
    found, name, first = {}, None, None
    for line in block[1].splitlines() if block else ():
        indent = len(line) - len(line.lstrip())
        begins = re.match(r"\s*(\w+):\s*(.*)", line)
        if begins and (first is None or indent <= first):
            first, name = indent, begins[1]
            found[name] = begins[2].strip()
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _described(kind, text) -> dict:
    """A type and its description, whose end may list choices as JSON: (choices: ["a", "b"])."""
    if choices := re.search(r"\(choices:\s*(.*?)\)\s*$", text, re.IGNORECASE):
        kind = {**kind, "enum": json.loads(choices[1])}
        text = text[: choices.start()].strip()
    return {**kind, "description": text}


def _type(hint, tool) -> dict:
    """A type as JSON Schema has it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return {}
    if hint in TYPES:
        return {"type": TYPES[hint]}
    if hint in (list, tuple) or origin is list:
        return {"type": "array", **({"items": _type(parts[0], tool)} if parts else {})}
    if hint is dict or origin is dict:
        return {
            "type": "object",
            **({"additionalProperties": _type(parts[1], tool)} if parts else {}),
        }
    if origin is tuple and ... not in parts:
        return {"type": "array", "prefixItems": [_type(part, tool) for part in parts]}
    if origin is typing.Literal and all(type(part) in TYPES for part in parts):
        kinds = list(dict.fromkeys(TYPES[type(part)] for part in parts))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(parts)}
    if origin in (typing.Union, types.UnionType):
        return _union(parts, tool)
    raise InputError(
        f"the tool {tool} has an argument or a result of the type {hint}: make it of int, float, "
        "str, bool, list, dict, tuple, Literal and unions of these."
    )


def _union(parts, tool) -> dict:
    kinds = [_type(part, tool) for part in parts if part is not type(None)]
    if len(kinds) == 1:
        found = dict(kinds[0])
    elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        found = {"type": names[0] if len(names) == 1 else names}
    else:
        found = {"anyOf": kinds}
    return found | ({"nullable": True} if type(None) in parts else {})


# ------------------------------------------------------------------------------------------- calls
def call(name: str, arguments: dict, number: int, given=None) -> dict:
    """The number-th tool call of an answer. Its id is the one that was given, if that is one:
    templates of Mistral take nine letters and digits."""
    if not isinstance(given, str) or not re.fullmatch(r"[a-zA-Z0-9]{9}", given):
        given = f"call{number:05d}"
    return {"type": "function", "id": given, "function": {"name": name, "arguments": arguments}}


def parser_of(template: Template) -> Callable[[str, list[dict]], tuple[str, Calls]]:
    """How to read the calls that models of a template write: f(answer, schemas) -> (the text before
    the first call, the calls).

    It is the form that reads, in what the template writes for a call, that call. InputError if
    there is none.
    """
    tool = {"name": "probe_tool", "description": "Probes.", "parameters": PROBED}
    tools = [{"type": "function", "function": tool}]
    asked = call("probe_tool", {"text": 'a "b"\n<c>', "number": -7}, 0)
    for schemas in (tools, None):  # some templates refuse tools, but not calls
        text = written(template, [asked], schemas)
        for form in FORMS.values():
            _, found = form(text, tools)
            if [x["function"] for x in found if isinstance(x, dict)] == [asked["function"]]:
                return form
    raise InputError(
        "the chat template writes no tool calls in a form that nanopost reads "
        f"({', '.join(FORMS)}): give one that does (--chat_template FILE)."
    )


PROBED = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "A text."},
        "number": {"type": "integer", "description": "A number."},
    },
    "required": ["text", "number"],
}


def written(template: Template, calls: list[dict], tools: list[dict] | None) -> str:
    """An answer of these calls as the template writes it, or "" if it does not."""
    question = {"role": "user", "content": OPEN}
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    text = template.try_render([question, answer], tools).rpartition(OPEN)[2]
    text = text.removeprefix(template.trial.prompt)
    return text[: template.closing(text)]


# Each form: (answer, schemas of the tools) -> (the text before the first call, the calls).
def _hermes(text, tools):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them."""
    start = text.find("<tool_call>", _reasoning(text))
    content, calls = text if start < 0 else text[:start], []
    while start >= 0:
        try:
            value, end = _json(text, start + len("<tool_call>"))
        except ValueError as error:
            return content.strip(), [*calls, f"a tool call is not JSON: {error}"]
        if not text[end:].lstrip().startswith("</tool_call>"):
            return content.strip(), [*calls, "a tool call does not end with </tool_call>"]
        calls.append(_named(value, "arguments", len(calls)))
        start = text.find("<tool_call>", end)
    return content.strip(), calls


def _mistral(text, tools):
    """[TOOL_CALLS][{"name": ..., "arguments": {...}, "id": ...}, ...]"""
    content, begins, rest = text.partition("[TOOL_CALLS]")
    if not begins:
        return content, []
    try:
        values, _ = _json(rest, 0)
    except ValueError as error:
        return content.strip(), [f"the tool calls are not JSON: {error}"]
    if not isinstance(values, list):
        return content.strip(), ["the tool calls are not a list"]
    return content.strip(), [_named(value, "arguments", i) for i, value in enumerate(values)]


def _llama3(text, tools):
    """{"name": ..., "parameters": {...}}: a call is all of an answer."""
    if not re.match(r'\s*\{\s*"name"', text):
        return text, []
    try:
        value, end = _json(text, 0)
    except ValueError as error:
        return "", [f"a tool call is not JSON: {error}"]
    if text[end:].strip():
        return "", ["a tool call is followed by text"]
    return "", [_named(value, "parameters", 0)]


def _tags(text, tools):
    """<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>"""
    begin = _reasoning(text)
    content, *pieces = text[begin:].split("<tool_call>")
    content, calls = text[:begin] + content, []
    for piece in pieces:
        found = re.match(
            r"\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>", piece, re.DOTALL
        )
        if not found:
            calls.append("a tool call is not <function=...> to </function> and </tool_call>")
            continue
        name, body = found.groups()
        values = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
        kinds = _types_of(name, tools)
        arguments = {key: _value(value, kinds.get(key)) for key, value in values}
        calls.append(call(name, arguments, len(calls)))
    return content.strip() if pieces else content, calls


FORMS = {
    "<tool_call>{...}</tool_call> as Qwen's": _hermes,
    "[TOOL_CALLS] as Mistral's": _mistral,
    '{"name": ..., "parameters": ...} as Llama 3\'s': _llama3,
    "<function=...> as Qwen3.5's": _tags,
}


def _reasoning(text) -> int:
    """Where an answer's reasoning ends, which may speak of calls: 0 if it has none."""
    return text.find("</think>") + 1


def _json(text, start):
    """The JSON value that begins at `start`, and where it ends. ValueError if there is none."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _named(value, arguments, number) -> dict | str:
    """JSON of a call -> the call."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return "a tool call has no name"
    given = value.get(arguments, {})
    if not isinstance(given, dict):
        return f"the {arguments} of a call of {value['name']} are no object"
    return call(value["name"], given, number, value.get("id"))


def _types_of(name, tools) -> dict:
    for tool in tools:
        if tool["function"]["name"] == name:
            properties = tool["function"]["parameters"]["properties"]
            return {key: kind.get("type") for key, kind in properties.items()}
    return {}


def _value(text, kind):
    """A value that is written as text: JSON, or Python's (True, None), unless the tool takes a
    string."""
    if kind in ("string", None):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text
