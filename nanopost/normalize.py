"""Rows as people have them -> rows in TRL's formats, in the form that chat templates expect.

Everything between reading a file and rendering a row is here. JSON text becomes objects, the nulls
that Arrow fills in go, and four foreign formats are recognised by their columns:

    Alpaca         instruction, input, output       -> prompt, completion (text)
    ShareGPT       conversations of from and value  -> messages, or the prompt of a pair
    LLaMA-Factory  chosen and rejected as one message instead of a list
    UltraFeedback  prompt as text beside whole conversations: they hold it, so it goes

What was taken for what is said once per file.
"""

import json
from collections import Counter

from nanopost import InputError

CONVERSATIONS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
OBJECTS = (*CONVERSATIONS, "tools", "chat_template_kwargs")
RESERVED = {"messages", "tools", "add_generation_prompt", "marks", "self"}
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


def normalize(
    rows: list[dict], renamed: dict[str, str], from_arrow: bool = False, to_messages: bool = False
) -> tuple[list[dict], list[str]]:
    """The rows of one file -> (rows in TRL's formats, what to say about them).

    renamed: {theirs: ours}, already applied. from_arrow: the file is Parquet, where structs have
    every key that any row has; JSONL exported from Arrow is recognised. to_messages: text of
    prompts and answers becomes messages. InputError names the row.
    """
    counts = Counter()
    if from_arrow or _looks_filled_in(rows):
        rows = [_without_nulls(row, counts) for row in rows]
    rows = [_normalized(row, renamed, to_messages, counts) for row in rows]
    return rows, [f"{n:,} {sentence}" for sentence, n in counts.items()]


def _normalized(row, renamed, to_messages, counts):
    row = dict(row)
    if isinstance(row.get("tools"), str) and not row["tools"].strip():
        row["tools"] = None
    try:
        _from_alpaca(row, renamed, counts)
        _from_sharegpt(row, counts)
        _from_ultrafeedback(row, counts)
        if to_messages:
            _to_messages(row)
        _parse_json(row)
    except InputError as error:
        raise InputError(f"{row.get('__line__', 'row')}: {error}") from error
    return row


# ------------------------------------------------------------------------------------------- Arrow
def _looks_filled_in(rows):
    """Whether a JSON file was exported from Arrow (by `datasets`, say), which gives all structs in
    one place the same keys, some of them null in one row and not in another."""
    keys, null, given = {}, set(), set()
    for row in rows:
        for path, struct in _structs({k: row[k] for k in OBJECTS if k in row}, ()):
            if not path:
                continue
            if keys.setdefault(path, struct.keys()) != struct.keys():
                return False
            for name, value in struct.items():
                (null if value is None else given).add((path, name))
    return bool(null & given)


def _structs(value, path):
    """Every dict in a value, with where it is: list indices do not count."""
    if isinstance(value, dict):
        yield path, value
        for name, inner in value.items():
            if isinstance(inner, (dict, list)):
                yield from _structs(inner, (*path, name))
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, (dict, list)):
                yield from _structs(inner, path)


def _without_nulls(row, counts):
    """A row whose conversations and tools have no key that is null."""
    clean = {**row, **{name: _dropped(row[name]) for name in OBJECTS if name in row}}
    if clean != row:
        counts["rows had null keys, as Arrow fills them in: the keys are dropped"] += 1
    return clean


def _dropped(value):
    if isinstance(value, dict):
        return {name: _dropped(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_dropped(inner) for inner in value]
    return value


# ----------------------------------------------------------------------------------------- formats
def _from_alpaca(row, renamed, counts):
    """Also where --rename has called the instruction prompt: its input belongs to it."""
    if "instruction" in row and not {"prompt", "messages"} & row.keys():
        question = row["instruction"]
    elif renamed.get("instruction") == "prompt" and "input" in row:
        question = row["prompt"]
    else:
        return
    context = row.get("input") or ""
    if not isinstance(question, str) or not isinstance(context, str):
        return
    row["prompt"] = f"{question}\n\n{context}" if context else question
    answer = next((name for name in ("output", "response") if isinstance(row.get(name), str)), None)
    taken = "instruction and input are the prompt"
    if answer and not {"completion", "chosen"} & row.keys():
        row["completion"] = row.pop(answer)
        taken += f", {answer} is the completion"
    counts[f"rows read as Alpaca: {taken}"] += 1
    row.pop("instruction", None)
    if row.pop("input", None):
        counts["of them have an input"] += 1


def _from_sharegpt(row, counts):
    found = False
    for name in CONVERSATIONS:
        value = row.get(name)
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list) or not value:
            continue
        if all(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in value):
            found = True
            value = [_message(name, i, message) for i, message in enumerate(value)]
        row[name] = value
    if "conversations" in row and not {"messages", "prompt"} & row.keys():
        messages = row.pop("conversations")
        if found and row.get("system"):
            messages = [{"role": "system", "content": row.pop("system")}, *messages]
        row["prompt" if "chosen" in row else "messages"] = messages
    if not found:
        return
    counts["rows read as ShareGPT: from and value are role and content"] += 1
    if row.get("tools"):
        tools = [_parsed(tool, "a tool", dict) for tool in _parsed(row["tools"], "tools", list)]
        row["tools"] = [_as_function(tool) for tool in tools]


def _message(name, i, message):
    speaker, text = message["from"], message["value"]
    role = SHAREGPT.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if speaker != "function_call":
        return {"role": role, "content": text}
    calls = _parsed(text, f"the function_call {name}[{i}]", (dict, list))
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": role, "content": "", "tool_calls": [_as_function(call) for call in calls]}


def _as_function(given):
    """A tool or a call in the form that most templates expect."""
    if not isinstance(given, dict) or "function" in given:
        return given
    return {"type": "function", "function": given}


def _from_ultrafeedback(row, counts):
    """Drop a prompt that both conversations hold as their own message."""
    sides = [row.get("chosen"), row.get("rejected")]
    if not isinstance(row.get("prompt"), str) or not all(isinstance(s, list) for s in sides):
        return
    for side in sides:
        asked = [m for m in side if isinstance(m, dict) and m.get("role") == "user"]
        if not any(str(m.get("content")).strip() == row["prompt"].strip() for m in asked):
            return
    del row["prompt"]
    counts["rows read as UltraFeedback: the prompt is a message of chosen and rejected"] += 1


def _to_messages(row):
    roles = {"prompt": "user", "completion": "assistant"}
    roles |= {"chosen": "assistant", "rejected": "assistant"}
    for name, role in roles.items():
        if isinstance(row.get(name), str):
            row[name] = [{"role": role, "content": row[name]}]


# ------------------------------------------------------------------------------------------- JSON
def _parse_json(row):
    """Replace JSON text by what it says: tools, template variables, arguments of calls."""
    if row.get("tools") is not None:
        tools = _parsed(row["tools"], "tools", list)
        row["tools"] = [_tool(tool, i) for i, tool in enumerate(tools)]
    if row.get("chat_template_kwargs") is not None:
        variables = _parsed(row["chat_template_kwargs"], "chat_template_kwargs", dict)
        if taken := RESERVED & variables.keys():
            raise InputError(
                f"chat_template_kwargs has {', '.join(sorted(taken))}, which is not for it to set."
            )
        row["chat_template_kwargs"] = variables
    for name in CONVERSATIONS:
        if isinstance(row.get(name), list):
            row[name] = [_with_objects(m, f"{name}[{i}]") for i, m in enumerate(row[name])]


def _tool(tool, i):
    tool = _parsed(tool, f"tools[{i}]", dict)
    inner = tool.get("function", tool)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise InputError(f"tools[{i}] is {tool!r:.60}: give it a name.")
    if isinstance(inner.get("parameters"), str):
        parameters = _parsed(inner["parameters"], f"the parameters of tools[{i}]", dict)
        inner = {**inner, "parameters": parameters}
    return {**tool, "function": inner} if "function" in tool else inner


def _with_objects(message, where):
    """A message whose tool calls are objects, and so are their arguments."""
    if not isinstance(message, dict) or not message.get("tool_calls"):
        return message
    calls = _parsed(message["tool_calls"], f"tool_calls of {where}", list)
    return {**message, "tool_calls": [_call(call, where) for call in calls]}


def _call(call, where):
    call = _parsed(call, f"a tool call of {where}", dict)
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise InputError(f"a tool call of {where} is {call!r:.60}: give it a name.")
    if isinstance(inner.get("arguments"), str):
        text = inner["arguments"].strip() or "{}"
        what = f"the arguments of {inner['name']} in {where}"
        inner = {**inner, "arguments": _parsed(text, what, dict)}
    return {**call, "function": inner} if "function" in call else inner


def _parsed(value, what, kind):
    """A value of this kind, or JSON text of one. InputError if it is neither."""
    needed = "a list" if kind is list else "an object"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{what} is text, but not JSON ({error}): make it {needed}, or JSON text of one."
            ) from error
    if not isinstance(value, kind):
        raise InputError(f"{what} is {value!r:.60}: make it {needed}, or JSON text of one.")
    return value
