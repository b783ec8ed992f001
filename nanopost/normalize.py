"""Rows as people have them -> rows in TRL's formats, in the form that chat templates expect.

Everything between reading a file and rendering a row is here. JSON text becomes objects, the nulls
that Arrow fills in go, and foreign formats are recognised by their columns:

    Alpaca         instruction, input, output       -> prompt, completion (text)
    ShareGPT       conversations of from and value  -> messages, or the prompt of a pair
    LLaMA-Factory  chosen and rejected as one message instead of a list
    UltraFeedback  prompt as text beside whole conversations: they hold it, so it goes
    PandaLM        instruction, input, response1, response2, annotator1, ...  -> a pair (text)
    LLMBar         input, output_1, output_2, label                           -> a pair (text)
    OASST          prompt as a tree of ranked replies  -> conversations, pairs or prompts

What was taken for what, and what was left out, is said once per file.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import combinations

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
JUDGED = (("response1", "response2"), ("output_1", "output_2"))  # PandaLM, LLMBar
OASST = {"prompter": "user", "assistant": "assistant"}


def normalize(
    rows: list[dict],
    renamed: dict[str, str],
    from_arrow: bool = False,
    to_messages: bool = False,
    kind: str = "sft",
) -> tuple[list[dict], list[str]]:
    """The rows of one file -> (rows in TRL's formats, what to say about them).

    renamed: {theirs: ours}, already applied. from_arrow: the file is Parquet, where structs have
    every key that any row has; JSONL exported from Arrow is recognised. to_messages: text of
    prompts and answers becomes messages. kind: what trees are for: sft, pairs or prompts.
    InputError names the row.
    """
    counts = Counter()
    if from_arrow or _looks_filled_in(rows):
        rows = [_without_nulls(row, counts) for row in rows]
    _check_judged(rows, counts)
    found = []
    for row in rows:
        found += _normalized(row, renamed, to_messages, kind, counts)
    return found, [f"{n:,} {sentence}" for sentence, n in counts.items()]


def first(rows: Iterable[dict], renamed: dict[str, str], to_messages: bool = False) -> dict | None:
    """The first row that normalize would give; None if it leaves all of them out."""
    for row in rows:
        if found := _normalized(row, renamed, to_messages, "sft", Counter()):
            return found[0]
    return None


def _normalized(row, renamed, to_messages, kind, counts) -> list[dict]:
    """One row, or the rows of a tree; none if it is left out."""
    row = dict(row)
    if isinstance(row.get("tools"), str) and not row["tools"].strip():
        row["tools"] = None
    try:
        if isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]:
            return _from_oasst(row, kind, counts)
        _from_alpaca(row, renamed, counts)
        if not _from_judged(row, counts):
            return []
        _from_sharegpt(row, counts)
        _from_ultrafeedback(row, counts)
        if to_messages:
            _to_messages(row)
        _parse_json(row)
    except InputError as error:
        raise InputError(f"{row.get('__line__', 'row')}: {error}") from error
    return [row]


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


def _votes(row):
    """-> (the columns of two answers, {judge: 0, 1 or 2}), or None of a row that is not judged."""
    names = next((names for names in JUDGED if {*names} <= row.keys()), None)
    votes = {name: row[name] for name in row if re.fullmatch(r"label|annotator\d+", name)}
    if names is None or not votes or any(vote not in (0, 1, 2) for vote in votes.values()):
        return None
    return names, votes


def _check_judged(rows, counts):
    """InputError if the votes of a file may be meant otherwise: an index is 0 or 1, and would be
    read reversed."""
    judged = [(row, *found) for row in rows if (found := _votes(row))]
    for row, names, votes in judged:
        for judge, vote in votes.items():
            if isinstance(vote, bool):
                raise InputError(f"{row.get('__line__', 'row')}: {judge} is {vote}: {_way(names)}")
    cast = {vote for _, _, votes in judged for vote in votes.values()}
    if 0 in cast and 2 not in cast:
        row, names, votes = judged[0]
        raise InputError(
            f"{row.get('__line__', 'row')}: in this file {', '.join(votes)} holds 0 but never 2, "
            f"as an index does: {_way(names)}"
        )
    if cast == {1}:
        counts["rows are judged, all 1: if that is an index, give 2, or they are reversed"] = len(
            judged
        )


def _way(names):
    one, two = names
    return (
        f"1 is read as {one} being better, 2 as {two}, 0 as a tie. Write it so (to an index, add "
        f"1), or if one column always holds the better answer, --rename {one}=chosen "
        f"{two}=rejected, or the other way round."
    )


def _from_judged(row, counts) -> bool:
    """Two answers and what judges say of them: 1 or 2 is better, 0 a tie. False: leave it out."""
    if not (found := _votes(row)):
        return True
    names, by_judge = found
    judges, votes = [*by_judge], [*by_judge.values()]
    if "prompt" not in row:
        row["prompt"] = row.pop("input", None)
    answers = [row.pop(name) for name in names]
    for name in judges:
        del row[name]
    verdict = f"{judges[0]} names" if len(judges) == 1 else f"most of {', '.join(judges)} name"
    counts[f"rows read as judged: of {' and '.join(names)}, what {verdict} is chosen"] += 1
    better = next((one for one in (1, 2) if votes.count(one) > len(votes) / 2), None)
    if better is None:
        counts["of them are left out: no majority is for one of the answers"] += 1
        return False
    if not all(isinstance(answer, str) for answer in answers):
        counts["of them are left out: an answer is not text"] += 1
        return False
    row["chosen"], row["rejected"] = answers if better == 1 else reversed(answers)
    return True


def _from_oasst(row, kind, counts) -> list[dict]:
    """A tree of messages, each with its replies, best rank first.

    sft: the conversations up to each answer that no other one follows. pairs: two answers to the
    same message, where both have a rank. prompts: the conversation up to each question.
    """
    columns = {name: value for name, value in row.items() if name != "prompt"}
    counts["rows read as trees of Open Assistant"] += 1
    rows, todo = [], [(reply, []) for reply in _replies({"replies": [row["prompt"]]}, counts)]
    while todo:
        message, before = todo.pop()
        replies = _replies(message, counts)
        path = [*before, _oasst_message(message)]
        answers = [reply for reply in replies if reply.get("role") == "assistant"]
        is_question = path[-1]["role"] == "user"
        if kind == "prompts":
            rows += [{**columns, "prompt": path}] * is_question
        elif kind == "pairs":
            rows += [{**columns, **pair} for pair in _ranked_pairs(path, answers, counts)]
        elif is_question and not answers:
            counts["questions in them are left out: nobody answered"] += 1
        elif not is_question and not any(_is_answered(reply) for reply in replies):
            rows.append({**columns, "messages": path})
        todo += [(reply, path) for reply in reversed(replies)]
    taken = {
        "sft": "conversations in them, each up to a last answer",
        "pairs": "pairs in them: of two answers, the one of better rank is chosen",
        "prompts": "prompts in them, each up to a question",
    }
    counts[taken[kind]] += len(rows)
    return rows


def _replies(message, counts):
    """The replies to a message that are not deleted."""
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise InputError(f"replies of the tree are {replies!r:.60}: make them a list of messages.")
    kept = [reply for reply in replies if not reply.get("deleted")]
    if len(kept) < len(replies):
        left_out = "deleted messages in them are left out, with their replies"
        counts[left_out] += len(replies) - len(kept)
    return kept


def _oasst_message(message):
    speaker, text = message.get("role"), message.get("text")
    if speaker not in [*OASST] or not isinstance(text, str):
        raise InputError(
            f"a message of the tree has the role {speaker!r:.60} and the text {text!r:.60}: make "
            "them prompter or assistant, and text."
        )
    return {"role": OASST[speaker], "content": text}


def _is_answered(message):
    return any(reply.get("role") == "assistant" for reply in _replies(message, Counter()))


def _ranked_pairs(prompt, answers, counts):
    ranked = [answer for answer in answers if answer.get("rank") is not None]
    for rank in (answer["rank"] for answer in ranked):
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank != rank:
            raise InputError(f"a rank of the tree is {rank!r:.60}: make it a number, or null.")
    ranked.sort(key=lambda answer: answer["rank"])
    pairs = [(one, two) for one, two in combinations(ranked, 2) if one["rank"] < two["rank"]]
    alone = len(answers) - len({id(answer) for pair in pairs for answer in pair})
    if alone:
        counts["answers in them are in no pair: no rank, or no other answer beside them"] += alone
    for better, worse in pairs:
        chosen, rejected = [_oasst_message(better)], [_oasst_message(worse)]
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


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
