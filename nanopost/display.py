"""Tokens as a person sees them: in a terminal, and on a page that loads nothing and runs nothing.

Data may hold anything: control characters are written out, and on a page everything is escaped.
"""

import base64
import hashlib
import html
import unicodedata
from itertools import groupby
from typing import NamedTuple

from nanopost.batch import Example
from nanopost.terminal import harmless, printable
from nanopost.tokenizer import Pieces, Tokenizer

SHOWN = 2000  # tokens of a sequence: of a longer one, its start and its end
COLUMNS = 100
Facts = list[tuple[str, list[str]]]  # a name, and lines about it


# ------------------------------------------------------------------------------------------- tokens
class Token(NamedTuple):
    """A token to show. text: what it completes, see Pieces."""

    index: int
    id: int
    text: str
    trained: bool
    special: bool


def tokens_of(example: Example, tokenizer: Tokenizer, most: int = SHOWN) -> list[Token | None]:
    """The tokens of a sequence; of one longer than `most`, its start, None, and its end."""
    if len(example) > most:
        start = tokens_of(example[: most // 2], tokenizer, most)
        first = len(example) - most // 2
        end = tokens_of(example[first:], tokenizer, most)
        return [*start, None, *(token._replace(index=first + token.index) for token in end)]
    special = set(tokenizer.special.values())
    pieces, tokens = Pieces(tokenizer.decode), []
    for index, (token_id, trained) in enumerate(zip(example.ids.tolist(), example.mask.tolist())):
        text = pieces.push(token_id)
        if index == len(example) - 1:
            text += pieces.rest()
        tokens.append(Token(index, token_id, text, trained, token_id in special))
    return tokens


def shown(text: str) -> str:
    r"""On one line: newlines and tabs are written out (\n), as all control characters are; a
    backslash of the text is two (\\)."""
    text = harmless(text.replace("\\", "\\\\"))
    return text.replace("\n", "\\n").replace("\t", "\\t")


def inline(tokens: list[Token | None], colour: bool) -> list[str]:
    """The tokens as running text, in lines of at most COLUMNS columns."""
    words = []  # one a token, of cells: (style, character); at "\n" a line ends
    before = None
    for token in tokens:
        if token is None:
            words.append([("", c) for c in "\n... tokens are left out here ...\n"])
            continue
        style, marks = "", ""
        if colour:
            codes = ["35"] if token.special else ["32"] if token.trained else []
            codes += ["1"] if token.trained else []
            codes += ["4"] if token.index % 2 else []
            style = ";".join(codes)
        else:
            marks = _marks(before, token)
        text = printable("\\n\n".join(map(shown, token.text.split("\n"))))
        words.append([("", c) for c in printable(marks)] + [(style, c) for c in text])
        before = token
    if not colour and before is not None and before.trained:
        words.append([("", c) for c in printable("«")])
    return [_painted(line) for line in _broken(words)]


def _marks(before, token):
    """What goes between two tokens."""
    was_trained = before is not None and before.trained
    if was_trained == token.trained:
        return "·" if before is not None else ""
    return "»" if token.trained else "«"


def _broken(words):
    """Words, each a list of cells -> lines of cells, broken between words where they fit."""
    room = COLUMNS - 4
    lines, line, width = [], [], 0
    for word in words:
        if width + sum(_width(character) for _, character in word) > room and width:
            lines.append(line)
            line, width = [], 0
        for style, character in word:
            wide = _width(character)
            if character == "\n" or width + wide > room:
                lines.append(line)
                line, width = [], 0
            if character != "\n":
                line.append((style, character))
                width += wide
    return [*lines, line] if line else lines


def _width(character):
    if character == "\n":
        return 0
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _painted(line):
    text = ""
    for style, run in groupby(line, key=lambda cell: cell[0]):
        letters = "".join(character for _, character in run)
        text += f"\x1b[{style}m{letters}\x1b[0m" if style else letters
    return text


def cut_to(text: str, width: int) -> str:
    """The text in exactly this many columns; ~ stands for what is cut off."""
    if sum(map(_width, text)) > width:
        kept, room = "", width - 1
        for character in text:
            room -= _width(character)
            if room < 0:
                break
            kept += character
        text = kept + "~"
    return text + " " * (width - sum(map(_width, text)))


def table(tokens: list[Token | None], tokenizer: Tokenizer) -> list[str]:
    """A line for each token: its index, id, text, and what it is."""
    lines = [" index       id  trained  text"]
    for token in tokens:
        if token is None:
            lines.append("   ...")
            continue
        mark = "»" if token.trained else ""
        text = f"'{shown(token.text)}'" if token.text else "(part of a character)"
        names = names_of(token.id, tokenizer)
        line = f"{token.index:6}  {token.id:7}  {mark:^7}  {text}"
        lines.append(cut_to(f"{line}  {names}", COLUMNS).rstrip())
    return lines


def names_of(token_id: int, tokenizer: Tokenizer) -> str:
    """What a token is to the tokenizer: BOS, EOS, PAD, stop, special; or ""."""
    ids = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id, "PAD": tokenizer.pad_id}
    names = [name for name, named in ids.items() if named == token_id]
    if token_id in tokenizer.stop_ids and "EOS" not in names:
        names.append("stop")
    if not names and token_id in tokenizer.special.values():
        names.append("special")
    return ", ".join(names)


# --------------------------------------------------------------------------------------------- page
STYLE = """
:root { color-scheme: light dark; --line: #ccc; --trained: #c8f0d0; --special: #a000a0;
  --soft: #666; --odd: #0000000d; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --trained: #14532d; --special: #f0a0f0; --soft: #999; --odd: #ffffff14; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
h1, h2, dd { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; }
pre { margin: 0; font: 12px/1.4 ui-monospace, monospace; overflow-x: auto; }
.row { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
.row span:nth-child(odd) { background: var(--odd); }
.row .t, .row .t:nth-child(odd) { background: var(--trained); }
.row .t:nth-child(odd) { box-shadow: inset 0 -2px var(--line); }
.row .s { color: var(--special); }
.note { color: var(--soft); }
@media (max-width: 40rem) { dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .5rem; } }
"""


def page(title: str, facts: Facts, blocks: list[tuple[str, str]]) -> str:
    """A page that loads nothing and runs nothing. blocks: (heading, HTML)."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    found = []
    for name, lines in facts:
        bars = [line for line in lines if line.startswith("  ")]
        plain = [f"<div>{escaped(line)}</div>" for line in lines if line not in bars]
        if bars:
            plain.append("<pre>" + escaped("\n".join(bars)) + "</pre>")
        found.append(f"<dt>{escaped(name)}</dt><dd>{''.join(plain)}</dd>")
    body = [f"<h2>{escaped(heading)}</h2>\n{block}" for heading, block in blocks]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<h1>{escaped(title)}</h1>\n<dl>\n" + "\n".join(found) + "\n</dl>\n"
        '<p class="note">Trained tokens have a coloured background, special tokens coloured '
        "letters; point at one for its id.</p>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def escaped(text: str) -> str:
    return html.escape(harmless(text))


def spans(tokens: list[Token | None], tokenizer: Tokenizer) -> str:
    """The tokens as HTML; each names its index, id and text."""
    parts = []
    for token in tokens:
        if token is None:
            parts.append('</div><p class="note">... tokens are left out here ...</p>')
            parts.append('<div class="row">')
            continue
        classes = " ".join("t" * token.trained + "s" * token.special)
        name = tokenizer.raw.id_to_token(token.id) or ""
        title = f"{token.index}: {token.id} {name} {names_of(token.id, tokenizer)}".rstrip()
        text = escaped(token.text).replace("\n", "↵\n")
        named = f' class="{classes}"' if classes else ""
        parts.append(f'<span{named} title="{escaped(title)}">{text or "◌"}</span>')
    return f'<div class="row">{"".join(parts)}</div>'
