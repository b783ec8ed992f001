"""rows.py: files and their mistakes, and the forms of rows."""

import gzip
import json

import pytest

from nanopost import InputError, packing
from nanopost.rows import (
    answered,
    guess,
    load,
    number,
    pair,
    prompt,
    read_files,
    read_rows,
    sft,
    take_pairs_apart,
    unpaired,
)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# -------------------------------------------------------------------------------------------- files
# A blank line in between, and U+2028, which ends no line.
GOOD = b'{"prompt": "a", "n": 1}\n\n{"prompt": "\xc3\xa9\xe2\x80\xa8x", "n": 2}'
# No time of day: it would get into the tests' names, which xdist's workers must agree on.
ZIPPED = gzip.compress(GOOD, mtime=0)
WANT = [{"prompt": "a", "n": 1}, {"prompt": "é\u2028x", "n": 2}]


def bare(rows):
    return [{k: v for k, v in row.items() if k != "__line__"} for row in rows]


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl", GOOD),
        ("crlf.jsonl", GOOD.replace(b"\n", b"\r\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + GOOD),
        ("rows.jsonl.gz", ZIPPED),
        ("gzip_without_its_name.jsonl", ZIPPED),
        ("plain_with_its_name.jsonl.gz", GOOD),
        ("list.json", json.dumps(WANT, indent=1).encode()),
        ("list.json.gz", gzip.compress(b"\xef\xbb\xbf " + json.dumps(WANT).encode(), mtime=0)),
    ],
)
def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path, name, content):
    rows = read_rows(write(tmp_path / name, content))
    assert bare(rows) == WANT
    places = (": row 1", ": row 2") if name.startswith("list") else (":1", ":3")
    assert [r["__line__"] for r in rows] == [f"{tmp_path / name}{p}" for p in places]


def test_parquet_gives_the_rows_that_were_written(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    chats = [
        {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
            "id": i,
        }
        for i in range(3)
    ]
    parquet.write_table(pa.Table.from_pylist(chats), tmp_path / "chats.parquet")
    rows = read_rows(tmp_path / "chats.parquet")
    assert bare(rows) == chats and rows[2]["__line__"].endswith("chats.parquet: row 3")
    for row in rows:
        sft(row)
    write(tmp_path / "cut.parquet", (tmp_path / "chats.parquet").read_bytes()[:-9])
    with pytest.raises(InputError, match="cut.parquet: a damaged Parquet file"):
        read_rows(tmp_path / "cut.parquet")


BAD_FILES = [
    (
        "cut.jsonl",
        b'{"a": 1}\n\n{"a": 2',
        r":3: not valid JSON .*column \d+\): write one object per line",
    ),
    ("cut_within.jsonl", b'{"a": 1}\n{"a": 2\n{"a": 3}', r":2: not valid JSON"),
    ("comma.jsonl", b'{"a": 1},\n{"a": 2}', ":1: not valid JSON"),
    ("pretty.json", b'{\n "a": 1\n}', ":1: not valid JSON"),
    ("list.json", b'[{"a": 1},\n {"a": 2},\n {"a" 3}]', ":3: not valid JSON"),
    ("number.jsonl", b'{"a": 1}\n17', ":2: a row is 17: make it an object"),
    ("strings.json", b'[{"a": 1}, "b"]', ": row 2: a row is 'b'"),
    ("empty.jsonl", b"", ": no rows in it"),
    ("blank.jsonl", b"\n \n", ": no rows in it"),
    ("empty_list.json", b"[]", ": no rows in it"),
    ("empty.jsonl.gz", gzip.compress(b"", mtime=0), ": no rows in it"),
    ("cut.jsonl.gz", ZIPPED[:-5], ": a damaged gzip file"),
    ("damaged.jsonl.gz", ZIPPED[:14] + b"\x00" + ZIPPED[15:], ": a damaged gzip file"),
    ("only_two_bytes.gz", b"\x1f\x8b\x00\x00", ": a damaged gzip file"),
    ("deep.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 100000, ":2: JSON that cannot be read"),
    ("endless.jsonl", b'{"a": 1}\n{"a": ' + b"7" * 9999, ":2: JSON that cannot be read"),
    ("binary.jsonl", b'{"a": 1}\n\x80\x81\xff', ":2: not UTF-8"),
    (
        "latin1.jsonl.gz",
        gzip.compress('{"a": 1}\n{"a": 2}\n{"a": "é"}'.encode("latin-1"), mtime=0),
        ":3: not UTF-8",
    ),
    ("latin1.json", '[{"a": 1},\n{"a": "é"}]'.encode("latin-1"), ":2: not UTF-8"),
    (
        "half.jsonl",
        rb'{"a": "\ud83d\ude00"}' + b"\n" + rb'{"a": ["\ud83d"]}',
        r":2: an unpaired surrogate, '\\ud83d'",
    ),
]


@pytest.mark.parametrize("name, content, said", BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, said):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    caught.match(f"{name}{said}")


def test_a_path_that_is_no_file_says_so(tmp_path):
    with pytest.raises(InputError, match="nowhere.jsonl: no such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="is a folder: give a file in it"):
        read_rows(tmp_path)


def test_rename_maps_their_columns_to_ours(tmp_path):
    path = write(tmp_path / "qa.jsonl", '{"question": "q", "answer": "a", "id": 7}')
    want = [{"prompt": "q", "completion": "a", "id": 7}]
    assert bare(read_rows(path, ["question=prompt", "answer=completion"])) == want
    assert bare(read_rows(path, {"question": "prompt", "answer": "completion"})) == want
    assert bare(read_rows(path, ["question=answer", "answer=question"])) == [
        {"answer": "q", "question": "a", "id": 7}
    ]
    assert read_rows(path, ["id=n"])[0]["__line__"] == f"{path}:1"


@pytest.mark.parametrize(
    "rename, said",
    [
        (["query=prompt"], "qa.jsonl:1: the columns are question, answer; --rename asks for query"),
        (["question=prompt", "answer=prompt"], "qa.jsonl:1: .* gives two of them the same name"),
        (["question=answer"], "qa.jsonl:1: .* gives two of them the same name"),
        (["question"], "--rename question: write it as theirs=ours"),
        (["=prompt"], "--rename =prompt: write it as theirs=ours"),
        (["extra=e"], "qa.jsonl:2: the columns are question, answer; --rename asks for extra"),
    ],
)
def test_a_rename_that_does_not_fit_names_the_columns(tmp_path, rename, said):
    first = '{"question": "q", "answer": "a"%s}\n' % (
        ', "extra": 1' if rename == ["extra=e"] else ""
    )
    path = write(tmp_path / "qa.jsonl", first + '{"question": "q", "answer": "a"}')
    with pytest.raises(InputError, match=said):
        read_rows(path, rename)


def test_several_files_are_read_in_order_and_each_row_names_its_own(tmp_path):
    one = write(tmp_path / "one.jsonl", '{"q": "a"}\n{"q": "b"}')
    two = write(tmp_path / "two.json", '[{"q": "c"}]')
    rows = read_rows([one, str(two)], ["q=prompt"], prompt)
    assert [row["prompt"] for row in rows] == ["a", "b", "c"]
    assert [row["__line__"] for row in rows] == [f"{one}:1", f"{one}:2", f"{two}: row 1"]
    train_rows, eval_rows = load([one, two], [two, one], 0, ["q=prompt"], prompt)
    assert [row["prompt"] for row in train_rows + eval_rows] == [*"abc", *"cab"]
    with pytest.raises(InputError, match=r"--holdout 3 of the 3 rows of \S+one.jsonl \S+two.json"):
        load([one, two], None, 3, ["q=prompt"], prompt)


def test_columns_that_no_form_reads_are_named_once_with_their_counts(tmp_path, capsys):
    rows = [
        {"prompt": "q", "completion": "a", "source": "x", "id": i, "input": "" if i else "y"}
        for i in range(3)
    ]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    said = f"{path.name}: columns not read: "
    read_rows(path, (), sft)
    assert capsys.readouterr().out == f"{said}source (3 rows), id (3 rows), input (1 rows)\n"
    read_rows(path, (), prompt)  # rewards read them
    assert capsys.readouterr().out == ""
    tools = [{"name": "f"}]
    for row, form, unread in (
        ({"messages": [USER, BOT], "prompt": "hi", "tools": tools}, sft, "prompt"),
        ({"prompt": "hi", "completion": "ho", "tools": tools}, sft, "tools"),
        ({"text": "hi", "tools": tools}, sft, "tools"),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [BOT], "id": 3}, pair, "id"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": tools}, pair, "tools"),
        ({"prompt": "q", "completion": "a", "label": True, "weight": 2}, unpaired, "weight"),
    ):
        read_rows(write(path, json.dumps(row)), (), form)
        assert capsys.readouterr().out == f"{said}{unread} (1 rows)\n"
    for row in ({"chosen": [USER, BOT], "rejected": [USER, CALL], "tools": tools}, {"text": "a"}):
        read_rows(write(path, json.dumps(row)), (), pair if "chosen" in row else sft)
        assert capsys.readouterr().out == ""


def ids_of(parts):
    return [[row["id"] for row in part] for part in parts]


def test_load_holds_rows_out_without_losing_one(tmp_path):
    lines = [json.dumps({"text": "a", "id": i}) for i in range(20)]
    path = write(tmp_path / "rows.jsonl", "\n".join(lines))
    train_ids, eval_ids = ids_of(load(path, None, 6, [], sft))
    # Those of runs before this one: what one stage held out, no later one may train on.
    assert eval_ids == [2, 4, 6, 13, 16, 19]
    assert train_ids == [i for i in range(20) if i not in [2, 4, 6, 13, 16, 19]]
    assert ids_of(load(path, path, 6, [], sft)) == [list(range(20))] * 2
    assert ids_of(load(path, None, 0, [], sft)) == [list(range(20)), []]
    with pytest.raises(
        InputError, match="--holdout 20 of the 20 rows .* at most 19, or --eval_data"
    ):
        load(path, None, 20, [], sft)


def test_load_checks_every_row_of_both_files_by_its_form(tmp_path):
    good = write(tmp_path / "good.jsonl", '{"prompt": "a"}\n' * 3)
    bad = write(tmp_path / "bad.jsonl", '{"prompt": "a"}\n{"prompt": ""}')
    for files in ((bad, None), (bad, good), (good, bad)):
        with pytest.raises(InputError, match="bad.jsonl:2: prompt is ''"):
            load(*files, 1, [], prompt)
    chats = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"chosen": chats, "rejected": [chats[0], {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "pairs.jsonl", json.dumps(row))
    assert load(path, path, 0, [], pair)[1][0]["prompt"] == chats[:1]


# -------------------------------------------------------------------------------------------- forms
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": ""}, USER, BOT]},
        {"messages": [USER, CALL, {"role": "tool", "content": "3"}, BOT]},
        {"messages": [USER, CALL | {"content": None}]},
        {"prompt": "", "completion": "x"},
        {"prompt": [USER], "completion": [BOT]},
        {"text": "x", "id": 3},
    ],
)
def test_sft_rows_in_the_known_formats_are_taken_as_they_are(row):
    assert sft(row) is row


BAD_ROWS = [
    (
        {"question": "q", "answer": "a"},
        r": the columns are question, answer; it needs messages.*--rename",
    ),
    ({"text": 5}, ": the columns are text; it needs .* text \\(a string\\)"),
    ({}, ": the columns are none;"),
    ({"prompt": "q"}, ": the columns are prompt; prompt and completion go together"),
    (
        {"prompt": "q", "completion": [BOT]},
        ": prompt is 'q' and completion is .* make both text, or both non-empty lists of messages",
    ),
    ({"prompt": [USER], "completion": "a"}, ": prompt is .* and completion is 'a': make both text"),
    ({"prompt": "q", "completion": None}, ": prompt is 'q' and completion is None"),
    ({"prompt": [USER], "completion": []}, r": completion is \[\]: make it a non-empty list"),
    ({"messages": []}, r": messages is \[\]: make it a non-empty list of messages"),
    ({"messages": "hi"}, ": messages is 'hi'"),
    ({"messages": [USER, "ho"]}, r": messages\[1\] is 'ho': make it {"),
    (
        {"messages": [{"from": "bing", "value": "hi"}]},
        r": messages\[0\] is {'role': 'bing'.* with a role of system",
    ),
    ({"messages": [USER, {"role": "bot", "content": "ho"}]}, r": messages\[1\] is {'role': 'bot'"),
    ({"messages": [USER, {"role": ["assistant"], "content": "ho"}]}, r": messages\[1\] is "),
    (
        {"messages": [USER, {"role": "assistant"}]},
        r": messages\[1\] has the content None: make it a string",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]},
        r": messages\[1\] has the content None",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]},
        r": messages\[1\] has the content \[{'type'",
    ),
    ({"messages": [CALL | {"content": 3}]}, r": messages\[0\] has the content 3"),
]


@pytest.mark.parametrize("row, said", BAD_ROWS)
def test_a_bad_sft_row_is_named_with_file_and_line(tmp_path, row, said):
    path = write(tmp_path / "rows.jsonl", json.dumps({"text": "fine"}) + "\n" + json.dumps(row))
    good, bad = read_rows(path)
    sft(good)
    with pytest.raises(InputError) as caught:
        sft(bad)
    caught.match(f"^{path}:2{said}")
    assert "\n" not in str(caught.value) and "__line__" not in str(caught.value)


@pytest.mark.parametrize(
    "row, said",
    [
        (
            {"question": "q"},
            "row: the columns are question; it needs prompt: --rename theirs=prompt",
        ),
        ({"prompt": ""}, "row: prompt is '': make it non-empty text or a non-empty list"),
        ({"prompt": 3}, "row: prompt is 3"),
        ({"prompt": []}, r"prompt is \[\]"),
        ({"prompt": [{"role": "user"}]}, r"prompt\[0\] has the content None"),
        ({"prompt": [USER, BOT]}, "ends with an assistant message"),
    ],
)
def test_a_bad_prompt_row_is_refused(row, said):
    with pytest.raises(InputError, match=said):
        prompt(row)


def test_prompt_rows_may_be_text_or_messages():
    for row in ({"prompt": "q", "answer": 3}, {"prompt": [USER, BOT, USER]}):
        assert prompt(row) is row


def test_a_pair_gets_the_messages_that_both_sides_begin_with_as_its_prompt():
    other = {**BOT, "content": "hey"}
    whole = {"chosen": [USER, BOT, USER, BOT], "rejected": [USER, BOT, USER, other], "margin": 2}
    want = {"prompt": [USER, BOT, USER], "chosen": [BOT], "rejected": [other], "margin": 2}
    assert pair(whole) == want
    longer = {"chosen": [USER, BOT], "rejected": [USER, other, USER, BOT]}
    assert pair(longer) == {"prompt": [USER], "chosen": [BOT], "rejected": [other, USER, BOT]}
    for row in (want, {"prompt": "q", "chosen": "a", "rejected": "b"}):
        assert pair(row) is row


def test_sides_that_begin_alike_to_the_end_of_one_keep_a_message_each():
    """As explicit pairs do: what cannot be trained is counted where pairs are fitted."""
    for chosen, rejected in (
        ([USER, BOT], [USER, BOT]),
        ([USER, BOT], [USER, BOT, USER, BOT]),
        ([USER, BOT, USER, BOT], [USER, BOT]),
        ([USER, BOT], [USER]),
    ):
        row = pair({"chosen": chosen, "rejected": rejected})
        assert row["chosen"] and row["rejected"]
        assert row["prompt"] + row["chosen"] == chosen
        assert row["prompt"] + row["rejected"] == rejected


BAD_PAIRS = [
    (
        {"prompt": "a", "chosen": "b"},
        "the columns are prompt, chosen; it needs chosen and rejected",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": [BOT]}, "partly text and partly messages"),
    (
        {"prompt": [USER], "chosen": "b", "rejected": "c"},
        "prompt, chosen, rejected are partly text",
    ),
    ({"chosen": "b", "rejected": "c"}, "chosen and rejected are text, so it needs prompt"),
    ({"chosen": [BOT], "rejected": [USER]}, "share no prompt"),
    ({"prompt": [USER], "chosen": [BOT], "rejected": []}, r"rejected is \[\]: make it a non-empty"),
    ({"prompt": [], "chosen": [BOT], "rejected": [BOT]}, r"prompt is \[\]: make it a non-empty"),
]


@pytest.mark.parametrize("row, said", BAD_PAIRS)
@pytest.mark.parametrize("form", [pair, unpaired])
def test_a_bad_pair_is_refused(row, said, form):
    with pytest.raises(InputError, match=f"^f:3: .*{said}"):
        form({**row, "__line__": "f:3"})


def test_unpaired_rows_have_a_label_or_are_pairs():
    for label in (True, False, 1, 0):
        row = {"prompt": "q", "completion": "a", "label": label}
        assert unpaired(row) == row
    # what the label is about is trained, and not the messages of another column
    assert "messages" not in unpaired({**row, "messages": [USER, BOT]})
    whole = {"chosen": [USER, BOT], "rejected": [USER, CALL]}
    assert unpaired(whole) == pair(whole)


@pytest.mark.parametrize(
    "row, said",
    [
        (
            {"prompt": "q", "completion": "a"},
            "the columns are prompt, completion; it needs .*label",
        ),
        ({"prompt": "q", "completion": "a", "label": "good"}, "label is 'good': make it true"),
        ({"prompt": "q", "completion": "a", "label": None}, "label is None: make it true"),
        ({"prompt": "q", "completion": [BOT], "label": 1}, "prompt is 'q' and completion is"),
    ],
)
def test_a_bad_unpaired_row_is_refused(row, said):
    with pytest.raises(InputError, match=f"^f:3: .*{said}"):
        unpaired({**row, "__line__": "f:3"})


def test_take_pairs_apart_makes_two_labelled_rows_of_each_pair_in_place():
    labelled = {"prompt": "p", "completion": "c", "label": 1}
    one = {"prompt": "q", "chosen": "a", "rejected": "b", "id": 7, "__line__": "f:3"}
    rest = {"prompt": "q", "id": 7, "__line__": "f:3"}
    assert take_pairs_apart([labelled, one, labelled]) == [
        labelled,
        {**rest, "completion": "a", "label": True},
        {**rest, "completion": "b", "label": False},
        labelled,
    ]


def test_pairs_of_equal_sides_give_no_labelled_rows(capsys):
    alike = {"prompt": "q", "chosen": "a", "rejected": "a"}
    assert len(take_pairs_apart([alike, {**alike, "chosen": "b"}, alike])) == 2
    assert capsys.readouterr().out.startswith("2 pairs are left out")


def test_a_number_is_read_as_one_or_refused_with_its_row():
    assert [number(row, "m", 0.5) for row in ({}, {"m": None}, {"m": 3})] == [0.5, 0.5, 3.0]
    with pytest.raises(InputError, match="^f:3: m is 'high': make it a number"):
        number({"m": "high", "__line__": "f:3"}, "m", 0.5)


# --------------------------------------------------------------------------------------- real files
def test_real_chats_read_check_and_pack(shared):
    rows = read_rows(shared / "sft/messages.jsonl.gz")
    for row in rows:
        sft(row)
    assert len(rows) == 2051 and rows[-1]["__line__"].endswith("messages.jsonl.gz:2051")
    lengths = [2 + sum(len(m["content"]) for m in row["messages"]) // 4 for row in rows]
    fitting = [n for n in lengths if n <= 2048]
    assert packing.fill_rate(fitting, packing.pack(fitting, 2048), 2048) > 0.99


def test_real_gsm8k_reads_with_its_columns_renamed(shared):
    for name, n in (("train.jsonl.gz", 7473), ("test.jsonl", 1319)):
        rows = read_rows(shared / "gsm8k" / name, ["question=prompt", "answer=completion"])
        assert len(rows) == n and set(rows[0]) == {"prompt", "completion", "__line__"}
        for row in rows:
            sft(row)
            prompt(row)
    with pytest.raises(
        InputError, match=r"test.jsonl:1: the columns are question, answer; it needs messages"
    ):
        sft(read_rows(shared / "gsm8k/test.jsonl")[0])


def test_every_real_json_file_reads(shared):
    paths = [
        p
        for p in shared.rglob("*")
        if p.parent.name in ("sft", "preference", "tasks", "gsm8k") and ".json" in p.name
    ]
    assert len(paths) >= 18
    for path in paths:
        assert read_rows(path)


def test_messages_that_others_would_not_train_are_a_warning(tmp_path, capsys):
    said = [{"role": "assistant", "content": "no", "weight": 0}, {**BOT, "weight": 1}]
    rows = [
        {"messages": [USER, said[0], USER, said[1]]},
        {"messages": [USER, {**BOT, "train": False}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_rows(path, form=sft)
    assert "WARNING: 2 messages say weight 0, train false or the like" in capsys.readouterr().out
    path.write_text(json.dumps({"messages": [USER, {**BOT, "weight": 1, "train": True}]}))
    read_rows(path, form=sft)
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_a_side_that_asks_again_does_not_answer_the_prompt(name):
    row = {"prompt": [USER], "chosen": [BOT], "rejected": [BOT]}
    with pytest.raises(
        InputError, match=f"ends with a user message and {name} begins with another"
    ):
        pair({**row, name: [USER, BOT]})


def test_a_file_that_may_not_be_read_is_a_sentence(tmp_path, monkeypatch):
    def refused(*given):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(InputError, match="rows.jsonl cannot be read: Permission denied."):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"messages": []}, "sft"),
        ({"text": "a"}, "sft"),
        ({"prompt": "q", "completion": "a"}, "sft"),
        ({"prompt": "q", "completion": "a", "label": True}, "labelled"),
        ({"prompt": "q", "answer": "4"}, "prompts"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "label": 1}, "pairs"),
        ({"chosen": [], "rejected": [], "messages": []}, "pairs"),
        ({"instruction": "q", "input": "", "output": "a"}, "sft"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "sft"),
    ],
)
def test_what_rows_are_is_guessed_from_the_columns_of_the_first(tmp_path, capsys, row, kind):
    path = write(tmp_path / "rows.jsonl", json.dumps(row))
    assert guess(read_files([path])) == kind and guess(read_files(path)) == kind
    assert capsys.readouterr().out == ""
    path = write(tmp_path / "rows.jsonl", json.dumps({"question": "q"}))
    assert guess(read_files(path), ["question=prompt"]) == "prompts"
    with pytest.raises(InputError, match="rows.jsonl:1: the columns are question; it needs"):
        guess(read_files(path))


def test_a_guess_looks_at_no_more_rows_than_it_takes(tmp_path):
    """The first one that is not left out; the second has JSON text that nobody could read."""
    judged = {"input": "q", "output_1": "a", "output_2": "b"}
    rows = [{**judged, "label": 0}, {**judged, "label": 2}, {"prompt": "q", "tools": "{"}]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    assert guess(read_files(path)) == "pairs"
    path = write(tmp_path / "ties.jsonl", json.dumps(rows[0]))
    with pytest.raises(InputError, match="ties.jsonl: none of its 1 rows is left"):
        guess(read_files(path))


def test_files_that_were_read_give_the_rows_of_their_paths(tmp_path, capsys):
    one = write(tmp_path / "a.jsonl", '{"q": "x"}')
    two = write(tmp_path / "b.jsonl", '{"q": "y"}\n{"q": "z"}')
    files = read_files([one, two])
    for path in (one, two):
        path.unlink()
    assert [row["prompt"] for row in read_rows(files, ["q=prompt"], prompt)] == ["x", "y", "z"]
    assert [row["prompt"] for row in read_rows(files, ["q=prompt"], prompt)] == ["x", "y", "z"]
    with pytest.raises(InputError, match="--holdout 3 of the 3 rows of .*a.jsonl .*b.jsonl leaves"):
        load(files, None, 3, ["q=prompt"], prompt)


def test_what_is_said_of_a_file_does_not_name_its_folders(tmp_path, capsys):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    path = write(folder / "a.json", '[{"instruction": "q", "input": "", "output": "a"}]')
    read_rows(path, (), sft)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("a.json: 1 rows read as Alpaca") and len(line) <= 100


# ----------------------------------------------------------------------------------------- answered
def test_the_last_answer_of_a_conversation_is_its_completion():
    said = [{"role": r, "content": c} for r, c in (("user", "1"), ("assistant", "2"))]
    more = [{"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}]
    row = {"messages": said + more, "source": "here", "__line__": ("f", 1)}
    found = answered(row)
    assert found == {
        "source": "here",
        "__line__": ("f", 1),
        "prompt": [*said, more[0]],
        "completion": [more[1]],
    }
    own = {"prompt": "a", "completion": "b"}
    assert answered(own) == answered({**own, "messages": said}) == own
    for messages in (said[1:], [*said, more[0]]):
        with pytest.raises(InputError, match="make them a prompt and an answer"):
            answered({"messages": messages})
