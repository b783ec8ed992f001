"""nanopost.inspect: its numbers against plain counting, its tokens against transformers."""

import contextlib
import json
import os
import pty
import re
import sys
import threading

import numpy as np
import pytest
from chats import CHATML, NO_PROMPT, SPECIAL, answer, folder_of, raw_bytes, system, user

from nanopost import InputError, rows
from nanopost.inspect import histogram, main
from nanopost.tokenizer import Tokenizer
from runs import toy


@pytest.fixture
def folder(tmp_path):
    config = {"eos_token": "<|im_end|>", "bos_token": "<s>", "chat_template": CHATML}
    path = tmp_path / "model"
    path.mkdir()
    return folder_of(path, raw_bytes(SPECIAL), config)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def inspected(folder, tmp_path, capsys):
    """(rows, flags) -> what is printed."""

    def run(rows, *flags, model=folder):
        path = write(tmp_path / "rows.jsonl", rows)
        main(["--model", str(model), "--data", str(path), *map(str, flags)])
        return capsys.readouterr().out

    return run


def fact(text, name):
    """The lines of a fact, joined."""
    found = re.search(rf"^{name} +(.*(?:\n +.*)*)", text, re.M)
    return re.sub(r"\s+", " ", found[1])


CHATS = [
    {"messages": [user("Hi"), answer("Hello"), user("And?"), answer("Bye")]},
    {"messages": [user("Hi"), answer("Hello")]},
    {"messages": [user("Hi"), answer("Hey")]},
    {"messages": [user("Hi"), answer("Hello")]},
    {"messages": [system("S" * 300), user("x"), answer(" ")]},
]


# -------------------------------------------------------------------------------------------- facts
def test_the_numbers_of_conversations_are_those_of_plain_counting(inspected, folder):
    text = inspected(CHATS, "--tokens", 500, "--rows", 0)
    tokenizer = Tokenizer.load(folder)
    rendered = [tokenizer.template.render(row["messages"]) for row in CHATS]
    ids = [tokenizer.encode(t) for t in rendered]
    answers = [[m["content"] for m in r["messages"] if m["role"] == "assistant"] for r in CHATS]
    trained = sum(len(tokenizer.encode(t + "<|im_end|>")) for found in answers for t in found)
    total = sum(map(len, ids))
    assert fact(text, "in all") == (
        f"{total:,} tokens, {trained:,} of them trained ({trained / total:.1%})"
    )
    assert fact(text, "per row") == (
        "BOS: 0 in each EOS: 2 in 3, 3 in 1, 4 in 1 trained stop tokens: 1 in 4, 2 in 1"
    )
    assert f"<|im_end|> ({tokenizer.eos_id}) = EOS: 13, 6 of them trained" in text
    assert f"<|im_start|> ({tokenizer.raw.token_to_id('<|im_start|>')}): 13, 0 of them" in text
    lengths = sorted(map(len, ids))
    longest = f"median {lengths[2]}, 95% {lengths[4]}, longest {lengths[4]} tokens (rows.jsonl:5)"
    assert fact(text, "length").startswith(longest)
    assert f"{total / 500:.1%} full" in fact(text, "packing")
    assert fact(text, "packing").startswith("1 micro-batches of --tokens 500")
    assert fact(text, "repeated") == (
        "1 rows (rows.jsonl:4 as rows.jsonl:2) 3 prompts (rows.jsonl:2 as rows.jsonl:1, ...)"
    )
    assert "1 answers are empty (rows.jsonl:5)" in fact(text, "doubts")
    assert fact(text, "rows").endswith("rows.jsonl, read as sft")
    assert f"{tokenizer.hash}" in text and tokenizer.template.hash in text


def test_what_is_cut_is_what_training_cuts(inspected):
    text = inspected(CHATS, "--max_length", 60, "--rows", 0)
    assert fact(text, "cut").startswith("at 60 tokens: 1 overlong, 1 pieces")
    assert "1 overlong" in inspected(CHATS, "--max_length", 200, "--overlong", "drop")
    text = inspected(CHATS[4:], "--max_length", 60, "--overlong", "drop")
    assert "training would stop here: none of 1 examples has a trained token" in text
    text = inspected(CHATS, "--train_on", "last", "--rows", 0)
    assert "trained stop tokens: 1 in each" in text


def test_pairs_labelled_rows_and_prompts(inspected):
    pair = {"prompt": [user("q")], "chosen": [answer("yes")], "rejected": [answer("no")]}
    alike = {**pair, "rejected": pair["chosen"]}
    text = inspected([pair, alike, pair], "--rows", 1)
    assert "read as pairs" in text and "cut        at 4,096 tokens: 1 alike" in text
    assert "rows.jsonl:1 chosen:" in text and "rows.jsonl:1 rejected:" in text
    assert "1 rows (rows.jsonl:3 as rows.jsonl:1)" in text
    labelled = {"prompt": [user("q")], "completion": [answer("yes")], "label": False}
    text = inspected([labelled], "--rows", 1)
    assert "read as labelled" in text and "»yes" not in text and "»y·e·s·<|im_end|>«" in text
    text = inspected([pair, alike], "--kind", "labelled")
    assert "1 pairs are left out" in text and "\nrows       2 of" in text
    prompts = [{"prompt": [user(text)], "answer": "4"} for text in ("1+1", "1+1", "x" * 99)]
    text = inspected(prompts, "--max_prompt", 60)
    assert "read as prompts" in text and fact(text, "left out") == "1 dropped by --max_prompt"
    assert "1 prompts (rows.jsonl:2 as rows.jsonl:1)" in text and "trained" not in text
    assert "\n  ·<|im_start|>·a·s·s·i·s·t·a·n·t·\\n" in text  # where a rollout begins


def test_held_out_rows_that_are_trained_on_are_found(inspected, tmp_path):
    other = write(tmp_path / "eval.jsonl", [CHATS[1], {"messages": [user("Hi"), answer("New")]}])
    text = inspected(CHATS, "--eval_data", other)
    assert fact(text, "held out") == (
        "1 of 2 rows are also trained on (eval.jsonl:1) "
        "2 of 2 prompts are also trained on (eval.jsonl:1, eval.jsonl:2)"
    )
    text = inspected([CHATS[1]] * 4, "--holdout", 2)
    assert "2 of 2 rows are also trained on" in text and text.startswith("rows       2 of")


def test_doubts_are_those_of_the_run_and_more(inspected, folder, tmp_path):
    base = folder_of(tmp_path, raw_bytes(["<s>"]), {"bos_token": "<s>"})
    text = inspected([{"text": "<s><s>a"}], model=base)
    doubts = fact(text, "doubts")
    assert "training would stop here: 1 of 1 rows (" in doubts and "begin with BOS twice" in doubts
    assert "no end-of-sequence token is declared" in doubts and "train no stop token" in doubts
    assert "has no config.json" in doubts
    (tmp_path / "odd.jinja").write_text(NO_PROMPT)
    text = inspected(CHATS[:1], "--chat_template", tmp_path / "odd.jinja")
    assert "drops the system message" in fact(text, "doubts")
    text = inspected([{"prompt": "q", "completion": "a"}])
    assert "1 of 1 prompts are plain text" in fact(text, "doubts")
    toy.write_model(tmp_path / "toy")
    (tmp_path / "toy" / "model.safetensors").unlink()
    text = inspected(CHATS[:1], model=tmp_path / "toy")
    assert fact(text, "doubts") == "none" and "found by trial: no generation blocks" in text
    assert "at 512 tokens" in inspected(CHATS[:1], "--tokens", 600, model=tmp_path / "toy")


def test_a_histogram_counts_every_length_once():
    lengths = np.random.default_rng(0).integers(1, 3000, 500)
    lines = histogram(np.array([*lengths, 1, 2, 64, 65, 4096]))
    total = 0
    for line in lines:
        low, high, count = (int(x.replace(",", "")) for x in re.findall(r"[\d,]+", line))
        numbers = [*lengths.tolist(), 1, 2, 64, 65, 4096]
        assert count == sum(low <= n <= high for n in numbers)
        total += count
    assert total == 505 and max(line.count("#") for line in lines) == 40


# ------------------------------------------------------------------------------------------- tokens
def rows_of_table(text):
    found = re.findall(r"^ +\d+ +(\d+) +(»?) ", text, re.M)
    return [int(token_id) for token_id, _ in found], [mark == "»" for _, mark in found]


def test_a_rows_tokens_are_those_of_training(inspected, folder, tmp_path):
    text = inspected(CHATS, "--row", 1)
    example = Tokenizer.load(folder).example(CHATS[0])
    assert rows_of_table(text) == (example.ids.tolist(), example.mask.tolist())
    assert "»B·y·e·<|im_end|>«" in text and "rows.jsonl:1: " in text
    with pytest.raises(InputError, match="--row 6: there are 5 rows"):
        inspected(CHATS, "--row", 6)


@pytest.mark.parametrize("name", ["minimind", "tiny_llama3"])
def test_tokens_of_real_templates_are_those_of_transformers(real, auto, inspected, name):
    rows = [{"messages": [user("Łódź 12+3?"), answer("15 字\n")]}]
    text = inspected(rows, "--row", 1, model=real(name)[1])
    ids, mask = rows_of_table(text)
    theirs = auto(name).apply_chat_template(rows[0]["messages"], tokenize=True, return_dict=False)
    assert ids == theirs
    trained = auto(name).decode([i for i, m in zip(ids, mask) if m])
    assert trained.startswith("15 字") and len(trained) < 20


# --------------------------------------------------------------------------------------------- diff
def test_two_templates_are_compared_token_by_token(inspected, folder, tmp_path):
    (tmp_path / "a.jinja").write_text(CHATML)
    (tmp_path / "b.jinja").write_text(CHATML.replace("<|im_start|>", "<|im_start|> ", 1))
    a, b = (Tokenizer.load(folder, tmp_path / f"{name}.jinja") for name in "ab")
    text = inspected(CHATS, "--diff", tmp_path / "a.jinja", tmp_path / "b.jinja", "--row", 2)
    ours, theirs = a.example(CHATS[1]), b.example(CHATS[1])
    at = next(i for i in range(99) if ours.ids[i] != theirs.ids[i])
    one, other = ours.ids[at], theirs.ids[at]
    assert f"token {at} is the first that differs: {one} '" in text and f" and {other} '" in text
    found = re.findall(r"^ +(\d+)([ !]) (.{44})  ?(.*)", text, re.M)
    left = [int(re.search(r"\d+", cell)[0]) for _, _, cell, _ in found if cell.strip()]
    right = [int(re.search(r"\d+", cell)[0]) for _, _, _, cell in found if cell.strip()]
    assert left == ours.ids.tolist() and right == theirs.ids.tolist()
    marks = [mark for _, mark, _, _ in found]
    assert marks[:at] == [" "] * at and marks[at] == "!"
    text = inspected(CHATS, "--diff", tmp_path / "a.jinja", tmp_path / "b.jinja", "--rows", 2)
    assert "5 of 5 rows of sft differ" in text and text.count("is the first that differs") == 2
    text = inspected(CHATS, "--diff", tmp_path / "a.jinja", folder, "--row", 1)
    assert "0 of 1 rows of sft differ" in text and "the same ids, and the same of them" in text


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}BEFORE{% endgeneration %}AFTER"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_the_same_ids_trained_otherwise_differ(inspected, folder, tmp_path):
    """One template marks text after the answer as trained, which the other one writes unmarked."""
    end = "{{ ' Yours.<|im_end|>' }}"
    files = {"a.jinja": (end, ""), "b.jinja": ("", end)}
    for name, (before, after) in files.items():
        text = MARKED.replace("BEFORE", before).replace("AFTER", after)
        (tmp_path / name).write_text(text)
    text = inspected(CHATS, "--diff", *(tmp_path / name for name in files), "--row", 2)
    assert text.count("answers are found by its {% generation %} blocks") == 2
    a, b = (Tokenizer.load(folder, tmp_path / name).example(CHATS[1]) for name in files)
    assert a.ids.tolist() == b.ids.tolist()
    at = int((a.mask != b.mask).argmax())
    assert f"token {at} is the first that differs" in text
    assert f": {a.ids[at]} ' ', trained and {a.ids[at]} ' '\n" in text


def test_two_tokenizers_and_what_one_of_them_refuses(tmp_path, capsys):
    folders = []
    for name, template in (("one", CHATML), ("two", "{{ raise_exception('no') }}")):
        path = tmp_path / name
        path.mkdir()
        folder_of(path, raw_bytes(SPECIAL), {"eos_token": "<|im_end|>", "chat_template": template})
        folders.append(str(path))
    data = str(write(tmp_path / "rows.jsonl", CHATS))
    main(["--data", data, "--diff", *folders])
    text = capsys.readouterr().out
    assert "refuses 5 rows, first of all" in text and "0 of 0 rows" in text
    pairs = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ]
    data = str(write(tmp_path / "pairs.jsonl", pairs))
    for kind in ("pairs", "labelled"):
        main(["--data", data, "--diff", *folders, "--kind", kind])
        assert f"0 of {2 if kind == 'pairs' else 4} rows of {kind}" in capsys.readouterr().out
    with pytest.raises(InputError, match="x.jinja is a template: give the tokenizer too, --model"):
        main(["--data", data, "--diff", "x.jinja", folders[0]])


# ------------------------------------------------------------------------------------- command line
def test_a_page_instead_of_rows(inspected, tmp_path):
    text = inspected(CHATS, "--html", tmp_path / "page.html")
    assert "page.html: written" in text and "»" not in text
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="row"') == 3 and "<dt>doubts</dt>" in page
    inspected(CHATS, "--html", tmp_path / "page.html", "--row", 5, "--train_on", "all")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="row"') == 1 and page.count('<span class="t') > 300


def test_colours_are_for_terminals_that_want_them(folder, tmp_path, monkeypatch):
    rows = [{"messages": [user("\x1b[2J"), answer("Hello")]}]
    flags = ["--model", str(folder), "--data", str(write(tmp_path / "rows.jsonl", rows))]

    def printed():
        leader, follower = pty.openpty()
        parts = []

        def read_all():
            with contextlib.suppress(OSError):  # once the other end is closed
                while part := os.read(leader, 4096):
                    parts.append(part)

        reader = threading.Thread(target=read_all)
        reader.start()
        with open(follower, "w", encoding="utf-8") as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            main(flags)
        reader.join(30)
        os.close(leader)
        return b"".join(parts).decode()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured = printed()
    assert "\x1b[32;1;4mH\x1b[0m\x1b[32;1me\x1b[0m" in coloured and "\\x1b" in coloured
    assert not re.search(r"\x1b(?!\[[\d;]*m)", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed()


def test_every_line_fits_into_a_hundred_columns(inspected, tmp_path):
    rows = [{"messages": [user(f"{i} 字" * 90), answer("\x1b\t\u202e" * 40)]} for i in range(3)]
    for flags in (["--rows", 3], ["--row", 2]):
        for line in inspected(rows, *flags).splitlines():
            width = sum(2 if c == "字" else 1 for c in line)
            assert width <= 102 and (width <= 100 or str(tmp_path) in line), line


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--kind pairs", "rows.jsonl:1: the columns are messages; it needs chosen and rejected"),
        ("--rename a=b", "--rename asks for a"),
        ("--kind prompts --train_on last", "the columns are messages; it needs prompt"),
        ("--html no/page.html", "--html no/page.html: there is no such folder"),
        ("--holdout 5", "leaves none to train on"),
    ],
)
def test_a_mistake_is_one_sentence(inspected, flags, sentence):
    with pytest.raises(InputError, match=sentence):
        inspected(CHATS, *flags.split())


def test_flags_of_one_kind_are_refused_for_another(inspected, tmp_path):
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2
    with pytest.raises(InputError, match="--train_on is about sft, and these rows are pairs"):
        inspected(pairs, "--train_on", "last")
    with pytest.raises(InputError, match="--overlong split is for sft"):
        inspected(pairs, "--overlong", "split")
    with pytest.raises(InputError, match="--diff compares the rows of --data: leave out"):
        inspected(pairs, "--diff", tmp_path, tmp_path, "--holdout", 1)
    with pytest.raises(InputError, match="none of the rows of .*rows.jsonl is left to show"):
        inspected([{**pairs[0], "rejected": "a"}], "--kind", "labelled")
    with pytest.raises(InputError, match="give --model, the folder of a tokenizer"):
        main(["--data", str(write(tmp_path / "p.jsonl", pairs))])


# -------------------------------------------------------------------------------------- real files
@pytest.mark.parametrize(
    "name, kind, rows",
    [
        ("sft/rasbt_instruction.json", "sft", 1100),
        ("sft/glaive_toolcall_en.json.gz", "sft", 300),
        ("sft/oasst_en_100_tree.jsonl.gz", "sft", 525),
        ("preference/llamafactory_dpo_en.json.gz", "pairs", 299),
        ("preference/pandalm_testset.json.gz", "pairs", 885),
        ("preference/llmbar.jsonl", "pairs", 418),
    ],
)
def test_real_files_go_through(shared, real, capsys, name, kind, rows):
    """test_convert.py counts these rows by plain json."""
    flags = ["--model", str(real("minimind")[1]), "--data", str(shared / name), "--rows", "1"]
    if "glaive" not in name:  # a template of a few lines, and without tools
        flags += ["--chat_template", str(shared / "chat_templates/chatml.jinja")]
    main(flags)
    text = capsys.readouterr().out
    assert f"rows       {rows:,} of {os.path.basename(name)}, read as {kind}\n" in text
    assert "training would stop" not in text
    assert text.count("·") > 50


def test_a_page_does_not_replace_the_rows(inspected, tmp_path):
    with pytest.raises(InputError, match="--html .*rows.jsonl would replace what is read"):
        inspected(CHATS, "--html", tmp_path / "rows.jsonl")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(CHATS)


def test_rows_are_read_once(inspected, monkeypatch):
    reads, read_file = [], rows._read_file
    monkeypatch.setattr(rows, "_read_file", lambda path: reads.append(path.name) or read_file(path))
    inspected(CHATS, "--rows", 0)
    assert reads == ["rows.jsonl"]
