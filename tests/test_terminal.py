"""What reaches the terminal: no control character of data, no character that it cannot show."""

import io

import pytest

from nanopost import InputError, terminal
from nanopost.terminal import printable, progress, say


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\tb\nc é 字 🤖 «»", "a\tb\nc é 字 🤖 «»"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("over\rwritten\x08\x00\x7f", r"over\x0dwritten\x08\x00\x7f"),
        ("\x9b31m", r"\x9b31m"),  # a C1 control begins an escape sequence too
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_control_characters_are_written_out_and_text_stays(text, shown):
    assert printable(text) == shown
    assert str(InputError(f"row: {text}")) == f"row: {shown}"


def test_a_terminal_of_another_encoding_gets_what_it_can_show(monkeypatch):
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", latin)
    say("é 字")
    latin.seek(0)
    assert latin.read() == "é \\u5b57\n"


def test_the_first_rank_alone_speaks(monkeypatch, capsys):
    say("\x1bone")
    say("")
    monkeypatch.setenv("RANK", "1")
    say("two")
    assert capsys.readouterr().out == "\\x1bone\n"


def test_progress_is_said_while_there_is_time_to_read_it(monkeypatch, capsys):
    times = iter([0.0, 1.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(times))
    assert list(progress([*"abcd"], "rows encoded")) == [*"abcd"]
    assert capsys.readouterr().out == "rows encoded: 1 of 4\nrows encoded: 3 of 4\n"
