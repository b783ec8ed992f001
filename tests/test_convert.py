"""nanopost.convert: what it writes trains the ids and masks of what it read."""

import gzip
import json
from collections import Counter
from itertools import combinations

import pytest
from chats import CHATML, SPECIAL, TOOLS, answer, call, make, user

from nanopost import InputError
from nanopost import rows as rows_module
from nanopost.convert import main
from nanopost.rows import FORMS, read_rows, take_pairs_apart

TOKENIZER = make(CHATML, SPECIAL, eos="<|im_end|>")
WHOLE = make("{{ tools }}{{ messages }}<|im_end|>", SPECIAL, eos="<|im_end|>")  # every key of a row


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sequences(rows, kind, tokenizer=TOKENIZER):
    """Ids and masks of each row."""
    found = []
    for row in rows:
        if kind == "prompts":
            found.append(tokenizer.prompt_ids(row["prompt"]))
        elif kind == "pairs":
            found.append([(e.ids.tolist(), e.mask.tolist()) for e in tokenizer.pair(row)])
        elif tokenizer is TOKENIZER and "tool_calls" in str(row):  # which this template drops
            found.append(WHOLE.example(row, "all").ids.tolist())
        else:
            e = tokenizer.example(row)
            found.append((e.ids.tolist(), e.mask.tolist(), row.get("label")))
    return found


def converted(files, out, kind, *flags, tokenizer=TOKENIZER, some=20):
    """The rows that are written, of which the first ones are seen to train what the files train."""
    main([*map(str, files), str(out), "--kind", kind, "--overwrite", *flags])
    to_messages = "--to_messages" in flags
    original = read_rows(files, (), FORMS[kind], to_messages)[:some]
    original = take_pairs_apart(original) if kind == "labelled" else original
    again = read_rows(out, (), FORMS[kind])[:some]
    assert sequences(original, kind, tokenizer) == sequences(again, kind, tokenizer)
    return read(out)


def turn(speaker, text):
    return {"from": speaker, "value": text}


def message(role, text, *replies, rank=None):
    return {"role": role, "text": text, "rank": rank, "replies": list(replies)}


TREE = {
    "message_tree_id": "t",
    "prompt": message(
        "prompter",
        "q",
        message("assistant", "worse", rank=1),
        message(
            "assistant",
            "better",
            message("prompter", "and?", message("assistant", "so")),
            message("prompter", "unanswered"),
            rank=0,
        ),
        message("assistant", "unranked"),
    ),
}
JUDGED = {"instruction": "Say.", "input": "x", "response1": "one", "response2": "two"}
TEXT = {
    "alpaca": ("sft", [{"instruction": "Say.", "input": "x", "output": "y", "source": 3}], 1),
    "text": ("sft", [{"text": "once é"}], 1),
    "labelled": ("labelled", [{"prompt": "q", "completion": "a", "label": True}], 1),
    "judged": (
        "pairs",
        [
            {**JUDGED, "annotator1": 2, "annotator2": 2, "annotator3": 0},
            {**JUDGED, "annotator1": 0, "annotator2": 1, "annotator3": 0},
            {**JUDGED, "response1": True, "annotator1": 1, "annotator2": 1, "annotator3": 1},
        ],
        1,
    ),
    "benchmark": ("pairs", [{"input": "q", "output_1": "a", "output_2": "b", "label": 1}], 1),
}
CHATS = {
    "sharegpt": (
        "sft",
        [
            {
                "system": "Be brief.",
                "conversations": [
                    turn("human", "look"),
                    turn("function_call", '{"name": "look", "arguments": {"at": null}}'),
                    turn("observation", "[1]"),
                    turn("gpt", "é"),
                ],
                "tools": json.dumps([tool["function"] for tool in TOOLS]),
            }
        ],
        1,
    ),
    "pairs": (
        "pairs",
        [
            {
                "conversations": [turn("human", "q")],
                "chosen": turn("gpt", "a"),
                "rejected": turn("gpt", "b"),
            }
        ],
        1,
    ),
    "whole": (
        "pairs",
        [{"chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]}],
        1,
    ),
    "trees": ("sft", [TREE], 3),
    "ranks": ("pairs", [TREE], 1),
    "questions": ("prompts", [TREE], 3),
}


@pytest.mark.parametrize("name", [*TEXT, *CHATS])
def test_what_is_written_trains_what_was_read(tmp_path, capsys, name):
    kind, rows, count = {**TEXT, **CHATS}[name]
    file, out = write(tmp_path / "in.json", rows), tmp_path / "out.jsonl"
    assert len(converted([file], out, kind)) == count
    assert f"out.jsonl: {count} rows of {kind} written" in capsys.readouterr().out
    if name in TEXT and name != "text":
        plain = out.read_bytes()
        found = converted([file], out, kind, "--to_messages")
        assert plain != out.read_bytes() and isinstance(found[0]["prompt"], list)
    (tmp_path / "again.jsonl").unlink(missing_ok=True)
    main([str(out), str(tmp_path / "again.jsonl"), "--kind", kind])
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()  # it is in our form


def test_rows_are_written_in_our_form(tmp_path, capsys):
    file, out = write(tmp_path / "in.json", TEXT["judged"][1]), tmp_path / "out.jsonl"
    assert converted([file], out, "pairs") == [
        {"prompt": "Say.\n\nx", "chosen": "two", "rejected": "one"}
    ]
    said = capsys.readouterr().out
    assert "1 of them are left out: no majority is for one of the answers" in said
    assert "1 of them are left out: an answer is not text" in said
    assert converted([write(file, [TREE])], out, "pairs") == [
        {
            "prompt": [user("q")],
            "chosen": [answer("better")],
            "rejected": [answer("worse")],
            "message_tree_id": "t",
        }
    ]
    said = capsys.readouterr().out
    assert "2 answers in them are in no pair: no rank, or no other answer beside them" in said


def test_nulls_of_calls_stay_where_they_would_look_like_those_of_arrow(tmp_path, capsys):
    """As objects, these arguments would have the same keys everywhere, some of them null: in a file
    that is read again the nulls would go."""
    calls = [{"at": None, "n": 1}, {"at": "x", "n": None}]
    texts = [call("look", json.dumps(arguments)) for arguments in calls]
    rows = [{"prompt": [user("q")], "completion": [answer("", tool_calls=[c])]} for c in texts]
    converted([write(tmp_path / "in.json", rows)], tmp_path / "out.jsonl", "sft")
    again = read_rows(tmp_path / "out.jsonl", (), FORMS["sft"])
    found = [row["completion"][0]["tool_calls"][0]["function"]["arguments"] for row in again]
    assert found == calls


def test_files_that_would_be_read_otherwise_together_are_refused(tmp_path, capsys):
    rows = [{"messages": [user("q"), answer("a")], "chat_template_kwargs": {"think": None}}]
    other = [{"messages": [user("q"), answer("a")], "chat_template_kwargs": {"think": True}}]
    files = [write(tmp_path / "a.json", rows), write(tmp_path / "b.json", other)]
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="a.json: row 1: in one file with the other rows"):
        main([*map(str, files), str(out)])
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_the_kind_is_guessed_and_columns_are_renamed(tmp_path, capsys):
    file, out = write(tmp_path / "in.json", [{"q": "x", "a": "y"}]), tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="the columns are q, a; it needs messages"):
        main([str(file), str(out)])
    main([str(file), str(out), "--rename", "q=prompt", "a=completion"])
    assert read(out) == [{"prompt": "x", "completion": "y"}]
    with pytest.raises(InputError, match="out.jsonl exists: name another file, or --overwrite"):
        main([str(file), str(out), "--rename", "q=prompt"])
    main([str(file), str(out), "--rename", "q=prompt", "--overwrite"])
    assert read(out) == [{"prompt": "x", "a": "y"}]


def test_trees_and_pairs_are_written_as_labelled_rows(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    found = converted([write(tmp_path / "in.json", [TREE])], out, "labelled")
    assert "out.jsonl: 2 rows of labelled written" in capsys.readouterr().out
    assert [(row["completion"][0]["content"], row["label"]) for row in found] == [
        ("better", True),
        ("worse", False),
    ]
    assert not any({"chosen", "rejected"} & row.keys() for row in found)
    alike = write(tmp_path / "alike.json", [{"prompt": "q", "chosen": "a", "rejected": "a"}])
    with pytest.raises(InputError, match="none of the rows of .*alike.json is left"):
        main([str(alike), str(out), "--kind", "labelled", "--overwrite"])
    assert read(out) == found


def test_the_name_says_what_is_written(tmp_path, capsys):
    file, out = write(tmp_path / "in.json", [{"text": "é" * 999}]), tmp_path / "out.jsonl"
    main([str(file), str(out)])
    main([str(file), str(out) + ".gz"])
    zipped = (tmp_path / "out.jsonl.gz").read_bytes()
    assert gzip.decompress(zipped) == out.read_bytes() and len(zipped) < 200
    for name in ("x.json", "x.json.gz", "x.parquet", "x.csv", "x"):
        with pytest.raises(InputError, match=r"x.*: JSONL is written: give a name that ends in"):
            main([str(file), str(tmp_path / name), "--overwrite"])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match="folder.jsonl is no file"):
        main([str(file), str(tmp_path / "folder.jsonl"), "--overwrite"])


def test_files_are_read_once(tmp_path, capsys, monkeypatch):
    reads, read_file = [], rows_module._read_file
    monkeypatch.setattr(
        rows_module, "_read_file", lambda path: reads.append(path.name) or read_file(path)
    )
    files = [write(tmp_path / name, [{"text": name}]) for name in ("a.json", "b.json")]
    main([*map(str, files), str(tmp_path / "out.jsonl")])
    assert reads == ["a.json", "b.json", "out.jsonl.part"]


def test_nothing_that_is_read_is_overwritten(tmp_path, capsys):
    file = write(tmp_path / "in.json", [{"text": "x"}])
    with pytest.raises(InputError, match="is read, so it cannot be written"):
        main([str(file), str(file), "--overwrite"])
    with pytest.raises(InputError, match="there is no folder"):
        main([str(file), str(tmp_path / "no" / "out.jsonl")])
    with pytest.raises(InputError, match="in.json: row 1: the columns are text; it needs chosen"):
        main([str(file), str(tmp_path / "out.jsonl"), "--kind", "pairs"])
    assert [*tmp_path.iterdir()] == [file]


# -------------------------------------------------------------------------------------- real files
def plain(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        text = file.read()
    return json.loads(text) if text.startswith("[") else [*map(json.loads, text.splitlines())]


def walk(message, depth=0):
    yield message
    for reply in message["replies"]:
        yield from walk(reply)


def verdict(row):
    votes = Counter(row[f"annotator{i}"] for i in (1, 2, 3))
    return next((vote for vote in (1, 2) if votes[vote] >= 2), None)


def test_real_alpaca(shared, real, tmp_path, capsys):
    tokenizer = real("minimind")[0]
    for name, reply in (
        ("sft/rasbt_instruction.json", "output"),
        ("sft/gpteacher_codegen.json.gz", "response"),
    ):
        rows = plain(shared / name)
        found = converted(
            [shared / name], tmp_path / "out.jsonl", "sft", "--to_messages", tokenizer=tokenizer
        )
        assert len(found) == len(rows)
        for row, ours in zip(rows, found):
            question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
            assert ours["prompt"] == [user(question)]
            assert ours["completion"] == [answer(row[reply])]


def test_real_sharegpt_with_tools(shared, real, tmp_path, capsys):
    name = shared / "sft/glaive_toolcall_en.json.gz"
    rows = plain(name)
    found = converted([name], tmp_path / "out.jsonl", "sft", tokenizer=real("qwen2.5")[0])
    assert len(found) == len(rows) == 300
    said = Counter(turn["from"] for row in rows for turn in row["conversations"])
    roles = Counter(m["role"] for row in found for m in row["messages"])
    assert roles == {
        "user": said["human"],
        "assistant": said["gpt"] + said["function_call"],
        "tool": said["observation"],
    }
    calls = sum("tool_calls" in m for row in found for m in row["messages"])
    assert calls == said["function_call"]
    assert sum(bool(row.get("tools")) for row in found) == sum(
        bool(json.loads(row["tools"] or "[]")) for row in rows
    )


def test_real_pairs(shared, real, tmp_path, capsys):
    out, tokenizer = tmp_path / "out.jsonl", real("minimind")[0]
    name = shared / "preference/llamafactory_dpo_en.json.gz"
    rows = plain(name)
    found = converted([name], out, "pairs", tokenizer=tokenizer)
    assert [row["chosen"][0]["content"] for row in found] == [r["chosen"]["value"] for r in rows]
    assert [len(row["prompt"]) for row in found] == [len(r["conversations"]) for r in rows]
    assert len(found) == 299
    name = shared / "preference/pandalm_testset.json.gz"
    rows = plain(name)
    texts = [all(isinstance(row[f"response{i}"], str) for i in (1, 2)) for row in rows]
    kept = [row for row, text in zip(rows, texts) if text and verdict(row)]
    found = converted([name], out, "pairs", "--to_messages", tokenizer=tokenizer)
    assert [row["chosen"][0]["content"] for row in found] == [
        row[f"response{verdict(row)}"] for row in kept
    ]
    said = capsys.readouterr().out
    ties = sum(verdict(row) is None for row in rows)
    assert f"{ties} of them are left out: no majority" in said and ties == 105
    assert f"{len(rows) - ties - len(kept)} of them are left out: an answer is not text" in said
    assert len(found) == 885
    name = shared / "preference/llmbar.jsonl"
    rows = plain(name)
    found = converted([name], out, "pairs", tokenizer=tokenizer)
    assert found == [
        {
            "prompt": row["input"],
            "chosen": row[f"output_{row['label']}"],
            "rejected": row[f"output_{3 - row['label']}"],
            "subset": row["subset"],
        }
        for row in rows
    ]


def test_real_trees(shared, real, tmp_path, capsys):
    """The rows of these trees in shared/data's own sets, made by other code."""
    name, out = shared / "sft/oasst_en_100_tree.jsonl.gz", tmp_path / "out.jsonl"
    messages = [m for row in plain(name) for m in walk(row["prompt"])]
    tokenizer = real("minimind")[0]
    found = converted([name], out, "sft", tokenizer=tokenizer)
    theirs = [r for r in plain(shared / "sft/messages.jsonl.gz") if r["source"] == "oasst"]
    assert sorted(json.dumps(row["messages"]) for row in found) == sorted(
        json.dumps(row["messages"]) for row in theirs
    )
    asked = [m for m in messages if m["role"] == "prompter"]
    unanswered = sum(not m["replies"] for m in asked)
    assert f"{unanswered} questions in them are left out" in capsys.readouterr().out
    found = converted([name], out, "pairs", tokenizer=tokenizer)
    theirs = [r for r in plain(shared / "preference/pairs.jsonl.gz") if r["source"] == "oasst"]
    names = ("prompt", "chosen", "rejected")
    assert sorted(json.dumps([row[n] for n in names]) for row in found) == sorted(
        json.dumps([row[n] for n in names]) for row in theirs
    )
    ranks = [[r.get("rank") for r in m["replies"]] for m in asked]
    ordered = [(a, b) for rank in ranks for a, b in combinations(rank, 2) if None not in (a, b)]
    assert len(found) == sum(a != b for a, b in ordered) == 719
    assert len(converted([name], out, "prompts", tokenizer=tokenizer)) == len(asked) == 467
