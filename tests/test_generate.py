"""nanopost.generate: greedy answers are those of transformers; a chat keeps its turns."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from chats import user
from scripts import ENVIRONMENT, ROOT

from nanopost import InputError, dist, hf
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.generate import Chat, main, parsed
from nanopost.rows import read_rows, sft
from nanopost.tokenizer import Tokenizer
from runs import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that is not trained: its answers hold broken UTF-8 and control characters."""
    path = tmp_path_factory.mktemp("generate") / "model"
    toy.write_model(path)
    return path


@pytest.fixture
def here(monkeypatch):
    """main, in this process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(*arguments, typed=None):
        if typed is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        main([*map(str, arguments), "--device", "cpu"])

    yield run
    torch.set_flush_denormal(False)


def chat_of(folder, most=24, seed=0, **sampling):
    tokenizer, model = Tokenizer.load(folder), hf.load_model(folder)
    engine = Engine.of(model, tokenizer)
    return Chat(engine, tokenizer, Sampling(most, **sampling), model.config.max_positions, seed)


def ask(chat, question):
    pieces = []
    return chat.answer(question, pieces.append), pieces


def greedy(folder, ids, most):
    """transformers' own greedy continuation."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=most,
        do_sample=False,
    )
    return out[0, len(ids) :].tolist()


# --------------------------------------------------------------------------------------------- chat
def test_a_greedy_chat_is_transformers_greedy_generation_in_every_turn(folder):
    chat = chat_of(folder, temperature=0.0)
    tokenizer = chat.tokenizer
    for question in ("12+34=?", "and é?"):
        ids = tokenizer.prompt_ids([*chat.messages, user(question)])
        wanted = greedy(folder, ids, 24)
        finish, pieces = ask(chat, question)
        assert finish == "length" and len(wanted) == 24
        assert "".join(pieces) == tokenizer.decode(wanted)
        assert len([piece for piece in pieces if piece]) > 8  # it came bit by bit
        assert chat.messages[-1] == {"role": "assistant", "content": tokenizer.decode(wanted)}
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_a_sampled_chat_is_the_engines_rollout_and_stops_are_not_shown(folder):
    chat = chat_of(folder, most=300, seed=3, temperature=1.5)
    tokenizer = chat.tokenizer
    for turn in range(2):
        ids = tokenizer.prompt_ids([*chat.messages, user("Hi")])
        sampling = Sampling(min(300, 512 - len(ids)), 1.5)
        ((rollout,),) = chat.engine.generate([ids], 1, sampling, [prompt_seed(3, turn)])
        finish, pieces = ask(chat, "Hi")
        assert finish == rollout.finish
        kept = [i for i in rollout.ids if i not in tokenizer.stop_ids]
        assert len(kept) == len(rollout.ids) - (finish == "stop")
        assert "".join(pieces) == tokenizer.decode(kept)


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(folder, request):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    chat, pieces = chat_of(folder, temperature=0.0), []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 9:
            os.kill(os.getpid(), signal.SIGINT)

    assert chat.answer("12+34=?", write) == "interrupt"
    assert "".join(pieces) == chat.messages[-1]["content"] and 9 <= len(pieces) < 20
    assert ask(chat, "go on")[0] == "length" and len(chat.messages) == 4

    def at_once(piece):
        raise KeyboardInterrupt

    before = list(chat.messages)
    chat.tokenizer.decode = lambda ids: ""  # nothing is said yet
    assert chat.answer("go on", at_once) == "interrupt" and chat.messages == before


def test_answers_have_the_room_that_the_model_has_left(folder):
    chat = chat_of(folder, most=1000, temperature=1.0)
    finish, pieces = ask(chat, "a" * 500)
    room = 512 - len(chat.tokenizer.prompt_ids([user("a" * 500)]))
    assert finish == "length" and len(pieces) == room + 1 > 2
    with pytest.raises(InputError, match="the conversation has .* tokens, and the model 512 pos"):
        ask(chat, "more")
    assert len(chat.messages) == 2


def test_a_chat_in_a_terminal(folder, here, capsys):
    typed = "12+34=?\n\n  \n/clear\n12+34=?\nagain\n/quit\nnever\n"
    flags = ("--model", folder, "--temperature", 0, "--max_new_tokens", 20)
    here(*flags, typed=typed)
    printed = capsys.readouterr().out
    assert printed.startswith(
        "Ctrl-C ends an answer, /clear forgets earlier turns, /quit or Ctrl-D leaves\n"
        "answers are greedy; earlier turns are part of the prompt\n"
    )
    said = [text for text in printed.split("> ")[1:] if text.strip()]
    answers = [text for text in said if text != "(cleared)\n"]
    assert len(answers) == 3 == len(said) - 1 and answers[0] == answers[1] != answers[2]
    assert all(text.endswith(" [length]\n") for text in answers)
    here(*flags, "--system", "Add.", typed="12+34=?\n")  # the end of the input is Ctrl-D
    other = capsys.readouterr().out
    assert other.split("> ")[1] != answers[0] and other.endswith("> \n")
    here("--model", folder, typed="b" * 600 + "\n/quit\n")
    printed = capsys.readouterr().out
    assert "answers are sampled at temperature 1 (--temperature 0: greedy)" in printed
    assert "error: the conversation has " in printed


def test_a_command_that_is_none_is_not_asked(folder, here, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(Chat, "answer", lambda chat, text, write: asked.append(text) or "stop")
    here("--model", folder, typed="/help\n/ \n /clear\n  /a b\n/clear it\n c\n/quit \n")
    assert asked == ["/clear", "  /a b", " c"]
    printed = capsys.readouterr().out
    line = (
        "> no such command: Ctrl-C ends an answer, /clear forgets earlier turns, /quit or Ctrl-D "
    )
    assert printed.count(f"{line}leaves; to send such a line, put a space before it\n") == 3
    assert "(cleared)" not in printed


def test_what_a_model_says_cannot_steer_a_terminal(folder, here, capsys):
    """Sampled bytes: control characters are written out, and no character is cut."""
    here("--model", folder, "--max_new_tokens", 400, "--temperature", 2, typed="a\n")
    printed = capsys.readouterr().out
    assert "\\x1b" in printed or "\\x00" in printed or "\\x0" in printed
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in printed)
    assert any(ord(c) > 127 and c != "\ufffd" for c in printed)


def test_ctrl_c_in_a_real_chat(folder):
    """The signal comes while an answer is sampled; the chat goes on."""
    command = [sys.executable, "-m", "nanopost.generate", "--model", str(folder), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--max_new_tokens", "500", "--temperature", "3"],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"Hi\n")
    process.stdin.flush()
    seen = b""
    while len(seen) < 240:  # what it says of itself, and some of the answer
        seen += os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(b"/quit\n", timeout=60)
    assert process.returncode == 0 and not errors, errors
    assert b" [interrupt]\n> " in rest or b" [length]\n> " in rest


def test_a_model_without_a_template_says_so(folder, tmp_path, here, capsys):
    shutil.copytree(folder, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": None}))
    with pytest.raises(InputError, match="messages need a chat template, and this model has none"):
        here("--model", tmp_path / "base", typed="Hi\n")
    dist.finish()
    (tmp_path / "own.jinja").write_text(toy.TEMPLATE)
    flags = ("--chat_template", tmp_path / "own.jinja", "--max_new_tokens", 2)
    here("--model", tmp_path / "base", *flags, typed="Hi\n")
    assert "[length]" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- a file
def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_answers_to_a_file_are_the_engines_and_rows_of_sft(folder, tmp_path, here, capsys):
    rows = [{"prompt": [user(f"{a}+7=?")], "answer": str(a + 7)} for a in range(5)]
    rows.append({"prompt": "plain"})
    toy.write_rows(tmp_path / "prompts.jsonl", rows)
    flags = ("--model", folder, "--data", tmp_path / "prompts.jsonl", "--max_new_tokens", 12)
    flags += ("--n", 3, "--seed", 5, "--top_k", 40, "--engine_rows", 6, "--stop", "a", "9")
    here(*flags, "--out", tmp_path / "out.jsonl")
    said = capsys.readouterr().out
    assert "out.jsonl: 18 answers written" in said
    assert "1 of 6 prompts are plain text, which gets no chat template" in said
    tokenizer, model = Tokenizer.load(folder), hf.load_model(folder)
    prompts = [tokenizer.prompt_ids(row["prompt"]) for row in rows]
    sampling = Sampling(12, 1.0, 40, 1.0, 0.0, ("a", "9"))
    seeds = [prompt_seed(5, i) for i in range(6)]
    groups = Engine.of(model, tokenizer).generate(prompts, 3, sampling, seeds)
    found = iter(read(tmp_path / "out.jsonl"))
    for row, group in zip(rows, groups):
        for rollout in group:
            ids = [i for i in rollout.ids if i not in tokenizer.stop_ids]
            text, is_chat = tokenizer.decode(ids), isinstance(row["prompt"], list)
            said = [{"role": "assistant", "content": text}] if is_chat else text
            expected = {"completion": said, "finish": rollout.finish, "tokens": len(rollout.ids)}
            assert next(found) == row | expected
    assert next(found, None) is None
    assert {r.finish for group in groups for r in group} == {"stop", "length"}
    assert len(read_rows(tmp_path / "out.jsonl", (), sft)) == 18
    here(*flags)  # in the terminal
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert len(lines) == 18


def test_greedy_answers_to_a_file_are_those_of_transformers(folder, tmp_path, here, capsys):
    toy.write_rows(tmp_path / "p.jsonl", [{"q": "1+1"}, {"q": "a longer question"}])
    flags = ("--data", tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl", "--rename", "q=prompt")
    here("--model", folder, *flags, "--to_messages", "--temperature", 0, "--max_new_tokens", 16)
    tokenizer = Tokenizer.load(folder)
    for row in read(tmp_path / "o.jsonl"):
        wanted = greedy(folder, tokenizer.prompt_ids(row["prompt"]), 16)
        assert row["completion"][0]["content"] == tokenizer.decode(wanted)


def test_an_adapters_folder_answers_as_pefts_model_does(folder, tmp_path, here, capsys):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    draw = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=draw) / 8)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    toy.write_rows(tmp_path / "p.jsonl", [{"prompt": [user("1+1")]}])
    here(
        *("--model", tmp_path / "adapter", "--data", tmp_path / "p.jsonl"),
        *("--temperature", 0, "--max_new_tokens", 16, "--out", tmp_path / "o.jsonl"),
    )
    tokenizer = Tokenizer.load(folder)
    ids = torch.tensor([tokenizer.prompt_ids([user("1+1")])])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
    )
    wanted = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    (row,) = read(tmp_path / "o.jsonl")
    assert (
        row["completion"][0]["content"]
        == wanted
        != tokenizer.decode(greedy(folder, ids[0].tolist(), 16))
    )


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--out x", "--out is about a file of prompts: give --data"),
        ("--n 2", "--n is about a file of prompts"),
        ("--to_messages", "--to_messages is about a file of prompts"),
        ("--overwrite", "--overwrite is about a file of prompts"),
        ("--data p.jsonl --overwrite", "--overwrite is about --out"),
        ("--data p.jsonl --out there.jsonl", "there.jsonl exists: name another file, or --overw"),
        ("--data p.jsonl --out part.jsonl", "part.jsonl.part holds the answers of a run that end"),
        ("--data p.jsonl --out o.jsonl.gz", "o.jsonl.gz: JSONL is written: give a name that ends"),
        ("--data p.jsonl --out o.json", "o.json: JSONL is written"),
        ("--data p.jsonl --out d.jsonl --overwrite", "d.jsonl is no file"),
        ("--data bad.jsonl --out there.jsonl --overwrite", "bad.jsonl:1: prompt is 7"),
        ("--data p.jsonl --system s", "--system is of a chat"),
        ("--data p.jsonl --n 2 --temperature 0", "--n 2 answers would all be equal"),
        ("--data p.jsonl --out p.jsonl", "--out p.jsonl would replace what is read, p.jsonl"),
        ("--data p.jsonl --out no/o.jsonl", "there is no folder"),
        ("--data p.jsonl --max_new_tokens 600", "p.jsonl:1: a prompt of 4 tokens and 600 new"),
    ],
)
def test_flags_that_do_not_go_together_say_so(folder, tmp_path, monkeypatch, here, flags, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": [{"role": "user", "content": "ab"}]}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": 7}')
    for name in ("there.jsonl", "part.jsonl.part"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "d.jsonl").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=sentence):
        here("--model", folder, *flags.split())
    dist.finish()
    assert "ab" in (tmp_path / "p.jsonl").read_text()
    assert {(tmp_path / name).read_text() for name in ("there.jsonl", "part.jsonl.part")} == {
        "kept"
    }
    assert sorted(tmp_path.iterdir()) == before


def test_answers_take_the_place_of_a_file_when_they_are_complete(
    folder, tmp_path, here, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    toy.write_rows(tmp_path / "p.jsonl", [{"prompt": "ab"}, {"prompt": "cd"}])
    (tmp_path / "o.jsonl").write_text("old")
    # A value of a flag may name a path: the folder that --out is in, say.
    flags = (
        "--model",
        folder,
        "--data",
        "p.jsonl",
        "--out",
        "o.jsonl",
        "--stop",
        ".",
        "--overwrite",
    )
    flags += ("--max_new_tokens", 4, "--engine_rows", 1)

    calls, generate = [], Engine.generate

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "generate", interrupted)
        here(*flags)
    dist.finish()
    assert (tmp_path / "o.jsonl").read_text() == "old"
    assert len(read(tmp_path / "o.jsonl.part")) == 1
    assert "o.jsonl.part holds the answers so far" in capsys.readouterr().out
    here(*flags)
    assert len(read(tmp_path / "o.jsonl")) == 2
    assert not (tmp_path / "o.jsonl.part").exists()


def test_answers_in_the_terminal_are_json_whatever_is_in_them(folder, tmp_path, here, capsys):
    rows = [{"prompt": "é\x7f\x85\u202e字\x1b", "answer": "\x9b🤖"}]
    toy.write_rows(tmp_path / "p.jsonl", rows)
    flags = ("--model", folder, "--data", tmp_path / "p.jsonl", "--max_new_tokens", 200)
    here(*flags, "--temperature", 2)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    found = json.loads(line)
    assert found["prompt"] == rows[0]["prompt"] and found["answer"] == rows[0]["answer"]
    here(*flags, "--temperature", 2, "--out", tmp_path / "o.jsonl")
    assert read(tmp_path / "o.jsonl") == [found]
    assert "字" in (tmp_path / "o.jsonl").read_text(encoding="utf-8")


def test_columns_that_an_answer_replaces_are_counted(folder, tmp_path, here, capsys):
    """With its own messages a row would train these, not the answer."""
    own = {"completion": "mine", "finish": "never", "messages": [user("x")], "answer": "4"}
    toy.write_rows(tmp_path / "p.jsonl", [{"prompt": "ab", **own}, {"prompt": "cd", "tokens": -1}])
    flags = ("--data", tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl", "--max_new_tokens", 4)
    here("--model", folder, *flags)
    said = capsys.readouterr().out
    for name in ("completion", "finish", "tokens", "messages"):
        assert f"1 rows have a column {name}: it is not kept" in said
    one, other = read(tmp_path / "o.jsonl")
    assert one["answer"] == "4" and "messages" not in one and other["tokens"] > 0
    assert one["completion"] != "mine" and one["finish"] in ("stop", "length")


def test_flags_are_bounded(capsys):
    for flags in ("--temperature -1", "--top_p 2", "--max_new_tokens 0", "--n 0"):
        with pytest.raises(SystemExit):
            parsed(["--model", "x", *flags.split()])
        assert f"error: {flags.split()[0]}: " in capsys.readouterr().err
