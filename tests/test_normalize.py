"""normalize.py: other formats, JSON text and Arrow's nulls train the same tokens as TRL's rows."""

import json

import pytest
from chats import SPECIAL, answer, call, make, trained, user

from nanopost import InputError
from nanopost.normalize import normalize
from nanopost.rows import guess, pair, prompt, read_files, read_rows, sft, unpaired


def only(row, renamed=(), **how):
    """One row normalized, without its place."""
    (found,), _ = normalize([row], dict(renamed), **how)
    return found


def said(rows, renamed=()):
    return normalize(rows, dict(renamed))[1]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------- JSON
def tool(name="look", **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ARGUMENTS = {"where": "Łódź", "deep": {"n": [1, None]}}


@pytest.mark.parametrize("form", ["function", "flat", "text"])
def test_json_text_of_calls_and_tools_is_the_object_that_it_says(form):
    flat = {"name": "look", "arguments": json.dumps(ARGUMENTS)}
    calls = {"function": [{"type": "function", "function": flat}], "flat": [flat]}
    calls["text"] = json.dumps(calls["function"])
    wanted = {"name": "look", "arguments": ARGUMENTS}
    tools = [tool(where={"type": "string"})]
    row = {"messages": [user("x"), answer("", tool_calls=calls[form])], "tools": json.dumps(tools)}
    found = only(row)
    expected = wanted if form == "flat" else {"type": "function", "function": wanted}
    assert found["messages"][1]["tool_calls"] == [expected]
    assert found["tools"] == tools
    inner = {"name": "look", "parameters": json.dumps({"type": "object"})}
    as_text = [json.dumps({"type": "function", "function": inner})]
    assert only({**row, "tools": as_text})["tools"][0]["function"]["parameters"] == {
        "type": "object"
    }
    assert only({"tools": " ", "chat_template_kwargs": '{"a": null}'}) == {
        "tools": None,
        "chat_template_kwargs": {"a": None},
    }
    nothing = {"name": "look", "arguments": ""}
    message = only({"messages": [answer("", tool_calls=[nothing])]})["messages"][0]
    assert message["tool_calls"] == [{"name": "look", "arguments": {}}]


@pytest.mark.parametrize(
    "row, what",
    [
        ({"tools": "f()"}, "tools is text, but not JSON .*: make it a list"),
        ({"tools": 7}, "tools is 7: make it a list"),
        ({"tools": "{}"}, "tools is {}: make it a list"),
        ({"tools": [3]}, r"tools\[0\] is 3: make it an object"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\] is .*: give it a name"),
        ({"chat_template_kwargs": [1]}, r"chat_template_kwargs is \[1\]: make it an object"),
        (
            {"chat_template_kwargs": {"marks": 1, "tools": []}},
            "chat_template_kwargs has marks, tools",
        ),
        ({"messages": [answer("", tool_calls="f()")]}, r"tool_calls of messages\[0\] is text"),
        ({"prompt": [answer("", tool_calls=[3])]}, r"a tool call of prompt\[0\] is 3"),
        (
            {"chosen": [user("x"), answer("", tool_calls=[{"function": "f"}])]},
            r"a tool call of chosen\[1\] is .*: give it a name",
        ),
        (
            {"messages": [answer("", tool_calls=[{"name": "f", "arguments": "[1]"}])]},
            r"the arguments of f in messages\[0\] is \[1\]: make it an object",
        ),
        (
            {"messages": [answer("", tool_calls=[{"name": "f", "arguments": "[" * 99999}])]},
            "the arguments of f .* is text, but not JSON",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            r"the function_call conversations\[0\] is text, but not JSON",
        ),
    ],
)
def test_what_is_neither_an_object_nor_its_text_is_named_with_its_row(row, what):
    with pytest.raises(InputError, match=f"^f:3: {what}"):
        only({**row, "__line__": "f:3"})


# ------------------------------------------------------------------------------------------ Arrow
LOOK, ADD = tool("look", where={"type": "string"}), tool("add", a={"type": "integer"})
CALLED = [
    {"messages": [user("look"), answer("", tool_calls=[call("look", {"where": "here"})])]},
    {"messages": [user("add"), answer("", tool_calls=[call("add", {"a": 1, "b": 2})])]},
    {"messages": [user("hi"), answer("ho")]},
]
CALLED = [{**row, "tools": [LOOK, ADD]} for row in CALLED]


def tokens_of(path):
    tokenizer = make("{{ tools }}{{ messages }}<|im_end|>", SPECIAL, eos="<|im_end|>")
    return [tokenizer.example(row, "all").ids.tolist() for row in read_rows(path, (), sft)]


def test_parquet_and_jsonl_exported_from_it_train_the_tokens_of_the_jsonl(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    plain = write(tmp_path / "plain.jsonl", CALLED)
    table = pa.Table.from_pylist(CALLED)
    parquet.write_table(table, tmp_path / "rows.parquet")
    exported = write(tmp_path / "exported.jsonl", table.to_pylist())
    assert "null" in exported.read_text()
    wanted = tokens_of(plain)
    assert capsys.readouterr().out == ""
    for path in (tmp_path / "rows.parquet", exported):
        assert tokens_of(path) == wanted
        assert "3 rows had null keys, as Arrow fills them in" in capsys.readouterr().out


def test_nulls_that_the_author_wrote_stay():
    calls = [call("look", {"where": None, "unit": "m"}), call("look", {"where": "x", "unit": None})]
    rows = [{"messages": [user("look"), answer("", tool_calls=[c])]} for c in calls]
    found, sentences = normalize(rows, {})
    assert found == rows and not sentences
    # Every tool alike, and the key null in all of them: nothing that Arrow would have filled in.
    optional = tool("look", where={"type": "string", "default": None})
    rows = [{"messages": [user("x"), answer("y")], "tools": [optional]}] * 2
    assert normalize(rows, {})[0] == rows
    # In the text of JSON, whatever the file
    text = json.dumps({"where": None})
    row = {"messages": [answer("", tool_calls=[{"name": "look", "arguments": text}])]}
    calls = only(row, from_arrow=True)["messages"][0]["tool_calls"]
    assert calls == [{"name": "look", "arguments": {"where": None}}]
    # In lists, which Arrow does not fill
    row = {"messages": [answer("", tool_calls=[call("look", {"a": [None, 1]})])]}
    assert only(row, from_arrow=True) == row


# ---------------------------------------------------------------------------------------- formats
ALPACA = [
    {"instruction": "Translate.", "input": "Hund", "output": "dog"},
    {"instruction": "Greet.", "input": "", "output": "Hi"},
]
ALPACA_READ = [
    {"prompt": "Translate.\n\nHund", "completion": "dog"},
    {"prompt": "Greet.", "completion": "Hi"},
]


def test_alpaca_keeps_its_input_also_where_it_is_renamed():
    found, sentences = normalize(ALPACA, {})
    assert found == ALPACA_READ
    assert sentences == [
        "2 rows read as Alpaca: instruction and input are the prompt, output is the completion",
        "1 of them have an input",
    ]
    renamed = [
        {"prompt": row["instruction"], "input": row["input"], "completion": row["output"]}
        for row in ALPACA
    ]
    names = {"instruction": "prompt", "output": "completion"}
    assert normalize(renamed, names)[0] == ALPACA_READ
    # An input of somebody else's prompt is not Alpaca's.
    own = {"prompt": "q", "input": "x", "completion": "a"}
    assert only(own) == own
    pairs = {**ALPACA[0], "chosen": "dog", "rejected": "cat"}
    assert pair(only(pairs))["prompt"] == "Translate.\n\nHund"
    assert prompt(only({"instruction": "Go.", "input": "x"}))["prompt"] == "Go.\n\nx"
    codegen = {"instruction": "Go.", "input": "", "response": "ok"}
    assert only(codegen) == {"prompt": "Go.", "completion": "ok"}


def test_text_becomes_messages_if_asked():
    assert only(ALPACA[0], to_messages=True) == {
        "prompt": [user("Translate.\n\nHund")],
        "completion": [answer("dog")],
    }
    row = {"prompt": "q", "chosen": [answer("a")], "rejected": "b", "text": "t"}
    assert only(row, to_messages=True) == {
        "prompt": [user("q")],
        "chosen": [answer("a")],
        "rejected": [answer("b")],
        "text": "t",
    }


def turn(speaker, text):
    return {"from": speaker, "value": text}


def test_sharegpt_is_read_with_its_system_text_tools_and_calls():
    row = {
        "conversations": [
            turn("human", "Look."),
            turn("function_call", json.dumps({"name": "look", "arguments": {"where": "x"}})),
            turn("observation", "a dog"),
            turn("gpt", "A dog."),
        ],
        "system": "Be brief.",
        "tools": json.dumps([LOOK["function"]]),
    }
    found = sft(only(row))
    assert found == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            user("Look."),
            answer("", tool_calls=[call("look", {"where": "x"})]),
            {"role": "tool", "content": "a dog"},
            answer("A dog."),
        ],
        "tools": [LOOK],
    }
    assert said([row]) == ["1 rows read as ShareGPT: from and value are role and content"]
    several = json.dumps([{"name": "a", "arguments": "{}"}, {"name": "b", "arguments": {}}])
    calls = only({"conversations": [turn("function_call", several)]})["messages"][0]["tool_calls"]
    assert [c["function"] for c in calls] == [
        {"name": "a", "arguments": {}},
        {"name": "b", "arguments": {}},
    ]
    plain = {"conversations": [user("a"), answer("b")]}
    assert only(plain) == {"messages": [user("a"), answer("b")]} and not said([plain])


def test_pairs_of_sharegpt_turns_are_pairs():
    row = {
        "conversations": [turn("system", "s"), turn("human", "q")],
        "chosen": turn("gpt", "a"),
        "rejected": turn("gpt", "b"),
    }
    assert pair(only(row)) == {
        "prompt": [{"role": "system", "content": "s"}, user("q")],
        "chosen": [answer("a")],
        "rejected": [answer("b")],
    }
    assert prompt(only({"prompt": [turn("human", "q")]}))["prompt"] == [user("q")]


def test_a_prompt_that_both_conversations_hold_is_read_from_them():
    row = {
        "prompt": "q",
        "chosen": [user("q"), answer("a")],
        "rejected": [user("q"), answer("b")],
        "score_chosen": 8.0,
    }
    want = {"prompt": [user("q")], "chosen": [answer("a")], "rejected": [answer("b")]}
    want["score_chosen"] = 8.0
    assert pair(only(row)) == unpaired(only(row)) == want
    assert said([row, row])[0].startswith("2 rows read as UltraFeedback")
    with pytest.raises(InputError, match="partly text and partly messages.*--to_messages"):
        pair(only({**row, "prompt": "something else"}))


# ------------------------------------------------------------------------------------- real files
def test_real_files_in_foreign_formats_train_what_they_say(shared, real, capsys):
    tokenizer = real("qwen2.5")[0]
    rows = read_rows(shared / "sft/rasbt_instruction.json", (), sft)
    assert sum("\n\n" in row["prompt"] for row in rows) >= 325
    assert "325 of them have an input" in capsys.readouterr().out
    names = ["instruction=prompt", "output=completion"]
    assert read_rows(shared / "sft/rasbt_instruction.json", names, sft) == rows
    rows = read_rows(shared / "sft/glaive_toolcall_en.json.gz", (), sft)
    assert len(rows) == 300
    for row in rows[:40]:
        calls = [m["tool_calls"] for m in row["messages"] if m.get("tool_calls")]
        answers = trained(tokenizer, row)
        assert len(answers) == sum(m["role"] == "assistant" for m in row["messages"])
        shown = [a for a in answers if a.startswith("<tool_call>\n")]
        called = [json.loads(a.split("\n")[1]) for a in shown]
        assert called == [c[0]["function"] for c in calls]
    for row in read_rows(shared / "preference/llamafactory_dpo_en.json.gz", (), pair)[:20]:
        chosen, rejected = tokenizer.pair(row)
        assert tokenizer.decode(chosen.ids[chosen.mask]) == row["chosen"][0]["content"] + (
            "<|im_end|>"
        )


def test_the_small_cases_have_their_right_values(shared, real):
    folder = shared.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}")
    tokenizer = real("qwen2.5")[0]

    def ids(name):
        return [tokenizer.example(row).ids.tolist() for row in read_rows(folder / name, (), sft)]

    assert ids("01_arguments_as_text.jsonl") == ids("01_arguments_as_object.jsonl")
    tools = ids("02_tools.jsonl")
    assert tools == ids("02_tools.parquet") == ids("02_tools_exported_by_datasets.jsonl")
    for row in read_rows(folder / "06_prompt_text_conversations.jsonl", (), pair):
        assert len(tokenizer.pair(row)) == 2


# ------------------------------------------------------------------------------- judges and trees
def judged(*votes, one="a", two="b"):
    names = {f"annotator{i}": vote for i, vote in enumerate(votes, 1)}
    return {"instruction": "q", "input": "x", "response1": one, "response2": two, **names}


def test_what_most_judges_say_is_chosen():
    better = judged(2, 1, 2)
    want = {"prompt": "q\n\nx", "chosen": "b", "rejected": "a"}
    assert pair(only(better)) == want
    found, _ = normalize([judged(1, 1, 0), better], {})
    assert [pair(row)["chosen"] for row in found] == ["a", "b"]
    chat = pair(only(better, to_messages=True))
    assert chat == {"prompt": [user("q\n\nx")], "chosen": [answer("b")], "rejected": [answer("a")]}
    rows = [better, judged(1, 2), judged(1, 0, 0), judged(0, 0, 0), judged(1, 1, two=True)]
    assert only(judged(1, 1))["chosen"] == "a"
    assert "1 rows are judged, all 1: if that is an index" in said([judged(1, 1)])[0]
    found, sentences = normalize(rows, {})
    assert found == [want]
    assert "3 of them are left out: no majority is for one of the answers" in sentences
    assert sentences[-1] == "1 of them are left out: an answer is not text"
    assert said([better])[-1] == (
        "1 rows read as judged: of response1 and response2, what most of annotator1, annotator2, "
        "annotator3 name is chosen"
    )


def test_a_benchmark_of_judges_has_its_prompt_in_input():
    row = {"input": "q", "output_1": "a", "output_2": "b", "label": 2, "subset": "s"}
    want = {"prompt": "q", "chosen": "b", "rejected": "a", "subset": "s"}
    assert pair(only(row)) == unpaired(only(row)) == want
    assert said([row]) == [
        "1 rows read as judged: of output_1 and output_2, what label names is chosen"
    ]
    assert pair(only({**row, "prompt": "mine"}))["prompt"] == "mine"
    # Without a verdict, or with another one, they are somebody's columns.
    for other in ({**row, "label": "b"}, {k: v for k, v in row.items() if k != "label"}):
        assert only(other) == other


def benchmark(*labels):
    return [{"input": "q", "output_1": "a", "output_2": "b", "label": vote} for vote in labels]


def test_votes_that_may_be_an_index_are_refused(tmp_path, capsys):
    """0 and 1 for the first and the second: half of them would be ties, the others reversed."""
    path = write(tmp_path / "index.jsonl", benchmark(1, 0, 1))
    for form in (pair, unpaired, None):
        with pytest.raises(InputError, match="index.jsonl:1: in this file label holds 0 but never"):
            read_rows(path, (), form)
    assert guess(read_files(path)) == "pairs"
    with pytest.raises(InputError, match="1 is read as output_1 being better.*add 1"):
        read_rows(path)
    for rows in ([judged(0, 0), judged(1, 0)], benchmark(0, 0)):
        with pytest.raises(InputError, match="as an index does"):
            normalize(rows, {})
    for rows in (benchmark(2, True), benchmark(False), [judged(1, 2, True)]):
        with pytest.raises(InputError, match="is (True|False): 1 is read as"):
            normalize(rows, {})
    # Both ways out
    better = write(tmp_path / "better.jsonl", benchmark(2, 1, 2))
    assert [row["chosen"] for row in read_rows(better, (), pair)] == ["b", "a", "b"]
    names = ["input=prompt", "output_1=chosen", "output_2=rejected"]
    assert [row["chosen"] for row in read_rows(path, names, pair)] == ["a"] * 3


def reply(role, text, *replies, **more):
    return {"role": role, "text": text, "replies": list(replies), **more}


TREE = {
    "tree": 1,
    "prompt": reply(
        "prompter",
        "q",
        reply("assistant", "low", rank=2),
        reply("assistant", "high", reply("prompter", "?", reply("assistant", "end")), rank=0),
        reply("assistant", "mid", reply("prompter", "unanswered"), rank=1),
        reply("assistant", "gone", reply("prompter", "?"), rank=3, deleted=True),
    ),
}


def test_a_tree_is_conversations_pairs_or_prompts():
    def found(kind):
        return normalize([TREE], {}, kind=kind)

    rows, sentences = found("sft")
    assert [row["messages"] for row in rows] == [
        [user("q"), answer("low")],
        [user("q"), answer("high"), user("?"), answer("end")],
        [user("q"), answer("mid")],
    ]
    assert all(sft(row)["tree"] == 1 for row in rows)
    assert sentences == [
        "1 rows read as trees of Open Assistant",
        "1 deleted messages in them are left out, with their replies",
        "1 questions in them are left out: nobody answered",
        "3 conversations in them, each up to a last answer",
    ]
    rows, sentences = found("pairs")
    sides = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert sides == [("high", "mid"), ("high", "low"), ("mid", "low")]
    assert all(pair(row)["prompt"] == [user("q")] for row in rows)
    assert "1 answers in them are in no pair: no rank, or no other answer beside them" in sentences
    rows, sentences = found("prompts")
    assert [prompt(row)["prompt"][-1]["content"] for row in rows] == ["q", "?", "unanswered"]
    assert [len(row["prompt"]) for row in rows] == [1, 3, 3]


@pytest.mark.parametrize("kind", ["sft", "pairs", "prompts"])
def test_a_deleted_root_is_counted_as_any_deleted_message(kind):
    gone = {"prompt": reply("prompter", "q", reply("assistant", "a"), deleted=True)}
    rows, sentences = normalize([gone, TREE], {}, kind=kind)
    assert len(rows) == 3
    assert "2 deleted messages in them are left out, with their replies" in sentences


@pytest.mark.parametrize("rank", ["1", True, [1], {"a": 1}, float("nan")])
def test_a_rank_that_is_no_number_is_named_with_its_row(rank):
    answers = [reply("assistant", "a", rank=0), reply("assistant", "b", rank=rank)]
    row = {"prompt": reply("prompter", "q", *answers), "__line__": "f:3"}
    with pytest.raises(InputError, match="f:3: a rank of the tree is .*: make it a number, or nul"):
        normalize([row], {}, kind="pairs")
    with pytest.raises(InputError, match=r"f:3: a message of the tree has the role \['x'\]"):
        normalize([{**row, "prompt": reply(["x"], "q")}], {})


def test_equal_ranks_give_no_pair():
    answers = [reply("assistant", text, rank=rank) for text, rank in (("a", 1), ("b", 0), ("c", 1))]
    rows, _ = normalize([{"prompt": reply("prompter", "q", *answers)}], {}, kind="pairs")
    sides = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert sides == [("b", "a"), ("b", "c")]


def test_trees_are_read_as_what_the_form_is_for(tmp_path, capsys):
    path = write(tmp_path / "trees.jsonl", [TREE])
    counts = {form: len(read_rows(path, (), form)) for form in (None, sft, pair, unpaired, prompt)}
    assert counts == {None: 3, sft: 3, pair: 3, unpaired: 3, prompt: 3}
    assert all("chosen" in row for row in read_rows(path, (), unpaired))
    assert all(row["__line__"].endswith("trees.jsonl:1") for row in read_rows(path, (), sft))
    with pytest.raises(InputError, match=r"f:3: a message of the tree has the role 'judge'"):
        only({"prompt": reply("judge", "q"), "__line__": "f:3"})
    with pytest.raises(InputError, match="f:3: replies of the tree are 'none': make them a list"):
        only({"prompt": {**reply("prompter", "q"), "replies": "none"}, "__line__": "f:3"})


def test_a_file_of_which_no_row_is_left_is_refused(tmp_path, capsys):
    path = write(tmp_path / "ties.jsonl", [judged(0, 1, 2)] * 2)
    with pytest.raises(InputError, match="ties.jsonl: none of its 2 rows is left"):
        read_rows(path, (), pair)
    assert "2 of them are left out: no majority" in capsys.readouterr().out
