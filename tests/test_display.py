"""display.py: tokens as a person sees them lose nothing, and nothing in them acts."""

import base64
import hashlib
import html.parser
import re
import shutil
import subprocess

import numpy as np
import pytest
from chats import SPECIAL, make

from nanopost.batch import Example
from nanopost.display import COLUMNS, SHOWN, cut_to, escaped, inline, page, spans, table, tokens_of

TOKENIZER = make(special=SPECIAL, bos="<s>", eos="</s>")
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=alert(1)>\x1b[31m\x1b]0;t\x07"
    "\u202eevil\"'></span></div></body>&amp;\x00\r\x9b"
)


def example_of(text, trained=slice(0, 0)):
    ids = TOKENIZER.encode(text)
    mask = np.zeros(len(ids), bool)
    mask[trained] = True
    return Example(ids, mask)


def shown(text, trained=slice(0, 0), colour=False):
    return inline(tokens_of(example_of(text, trained), TOKENIZER), colour)


# ----------------------------------------------------------------------------------------- terminal
def test_trained_tokens_are_between_marks_and_tokens_apart():
    assert shown("<s>ab\nc</s>", slice(2, 4)) == ["<s>·a»b·\\n", "«c·</s>"]
    assert shown("ab", slice(1, 2)) == ["a»b«"]
    assert shown("ab", slice(0, 2)) == ["»a·b«"]
    assert shown("aé\t字") == ["a··é·\\t···字"]  # a character is the text of its last token


def test_a_character_and_its_spelling_look_different():
    r"""A newline and the two characters \\n, say: what is written reads back as one text."""
    for character in "\n\t\x1b\x07\x85\u202e\\":
        spelt = character.encode("unicode_escape").decode()
        texts = {character, spelt, f"{spelt}\n", f"\\{character}"}
        assert len({"".join(shown(text)) for text in texts}) == len(texts)
        for text in (character, spelt):
            row = table(tokens_of(example_of(text), TOKENIZER), TOKENIZER)[1:]
            cells = "".join(re.search("'(.*)'", line)[1] for line in row if "'" in line)
            assert cells.encode().decode("unicode_escape") == text
    assert shown("a\\nb") == ["a·\\\\·n·b"]  # no line ends here


def test_colours_say_the_same_as_marks():
    """32: trained. 35: special. 1: trained too. 4: every other token."""
    (line,) = shown("<s>ab</s>", slice(2, 4), colour=True)
    assert line == "\x1b[35m<s>\x1b[0m\x1b[4ma\x1b[0m\x1b[32;1mb\x1b[0m\x1b[35;1;4m</s>\x1b[0m"


@pytest.mark.parametrize("text", ["word " * 200, "字" * 300, "e\u0301" * 200, "x" * 500, "\n" * 5])
@pytest.mark.parametrize("colour", [False, True])
def test_lines_fit_and_hold_all_the_text(text, colour):
    lines = shown(text, slice(3, 50), colour)
    bare = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]
    letters = "".join(bare)
    for mark in "·»«":
        letters = letters.replace(mark, "")
    assert letters == text.replace("\n", "\\n")
    widths = [sum(2 if c == "字" else c != "\u0301" for c in line) for line in bare]
    assert max(widths) <= COLUMNS - 4


@pytest.mark.parametrize("colour", [False, True])
def test_no_control_character_of_data_reaches_a_terminal(colour):
    example = example_of(HOSTILE, slice(3, 9))
    tokens = tokens_of(example, TOKENIZER)
    text = "\n".join([*inline(tokens, colour), *table(tokens, TOKENIZER)])
    bare = re.sub(r"\x1b\[[\d;]*m", "", text) if colour else text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", bare)
    assert all(part in bare for part in ("\\x1b", "\\x07", "\\u202e", "\\x00", "\\x0d"))


def test_a_table_names_each_token():
    lines = table(
        tokens_of(example_of("<s>a'é\n<|im_end|></s>", slice(1, 2)), TOKENIZER), TOKENIZER
    )
    ids = TOKENIZER.encode("<s>a'é\n<|im_end|></s>")
    assert [line.split()[:2] for line in lines[1:]] == [[str(i), str(x)] for i, x in enumerate(ids)]
    assert lines[1].endswith("'<s>'  BOS") and lines[-1].endswith("'</s>'  EOS")
    assert "»" in lines[2] and lines[2].endswith("'a'") and lines[3].endswith("'''")
    assert lines[4].endswith("(part of a character)") and lines[5].endswith("'é'")
    assert lines[6].endswith("'\\n'") and lines[7].endswith("'<|im_end|>'  special")


def test_of_a_long_sequence_its_start_and_its_end_are_shown():
    text = "".join(chr(97 + i % 26) for i in range(50_000))
    tokens = tokens_of(example_of(text), TOKENIZER)
    assert len(tokens) == SHOWN + 1 and tokens.count(None) == 1
    assert all(t is None or t.text == text[t.index] for t in tokens)
    assert tokens[-1].index == 49_999
    assert any("left out" in line for line in inline(tokens, False))
    assert "left out" in spans(tokens, TOKENIZER) and "   ..." in table(tokens, TOKENIZER)


def test_cut_to_is_as_wide_as_it_says():
    assert cut_to("abc", 5) == "abc  " and cut_to("abcdef", 5) == "abcd~"
    assert cut_to("字字字", 5) == "字字~" and cut_to("字字字", 4) == "字~ "
    assert cut_to("", 2) == "  "


# --------------------------------------------------------------------------------------------- page
class Reader(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def page_of(text, trained=slice(0, 0)):
    block = spans(tokens_of(example_of(text, trained), TOKENIZER), TOKENIZER)
    return page(text, [("rows", [text, "  ###"]), (text, ["a"])], [(text, block)])


def test_a_page_loads_nothing_and_runs_nothing():
    text = page_of(HOSTILE, slice(2, 30))
    reader = Reader(text)
    tags = {tag for tag, _ in reader.elements}
    assert tags == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "dl", "dt", "dd", "div"),
        *("pre", "p", "span"),
    }
    assert {name for _, found in reader.elements for name in found} == {
        *("lang", "charset", "http-equiv", "content", "name", "class", "title")
    }
    assert not re.search(r"url\(|@import|https?:|[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    (policy,) = [found["content"] for _, found in reader.elements if "http-equiv" in found]
    (style,) = re.findall("<style>(.*?)</style>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_a_page_shows_every_token_with_its_id():
    text = "<s>aé\n <|im_end|></s>"
    found = Reader(page_of(text, slice(1, 3)))
    tokens = [attributes for tag, attributes in found.elements if tag == "span"]
    ids = TOKENIZER.encode(text)
    assert [t["title"].split()[:2] for t in tokens] == [
        [f"{i}:", str(x)] for i, x in enumerate(ids)
    ]
    assert [t.get("class") for t in tokens] == ["s", "t", "t", None, None, None, "s", "s"]
    assert "<s>aé" in "".join(found.texts).replace("◌", "")
    assert tokens[0]["title"].endswith("<s> BOS")


def test_what_is_escaped_reads_as_it_was():
    harmless = "<b a='1' c=\"2\">&lt; é"
    assert "".join(Reader(escaped(harmless)).texts) == harmless
    assert escaped("\x1b") == "\\x1b"


def test_a_browser_renders_it_and_runs_none_of_it(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here")
    (tmp_path / "page.html").write_text(page_of(HOSTILE, slice(2, 30)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    flags.append(f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run(
        [chromium, *flags, "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr  # nor a style that the policy refuses
    found = Reader(done.stdout)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout, re.S)
    assert title.startswith("&lt;script&gt;")  # "owned", had it run
    assert not {"script", "img"} & {tag for tag, _ in found.elements}
