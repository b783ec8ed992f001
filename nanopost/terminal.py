"""What reaches the terminal: text of data without its control characters, and progress."""

import os
import sys
import time
import unicodedata
from collections.abc import Iterator

SECONDS = 10  # between two lines of progress
# They reorder the text around them, so a line may read otherwise than it is.
BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""The text with control characters, such as those of escape sequences, written out (\x1b).

    Newlines and tabs stay. So does any character that stdout's encoding has; others are written out
    as well, so that no locale ends a run.
    """
    text = harmless(text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def harmless(text: str) -> str:
    r"""The text with control characters written out (\x1b); newlines, tabs and all letters stay."""
    return "".join(map(_written_out, text))


def _written_out(character):
    if character in "\n\t" or " " <= character <= "~":
        return character
    if unicodedata.category(character) == "Cc" or character in BIDI:
        return f"\\u{ord(character):04x}" if character in BIDI else f"\\x{ord(character):02x}"
    return character


def say(text: str):
    """Print on the first rank alone, made printable."""
    if text and os.environ.get("RANK", "0") == "0":
        print(printable(text), flush=True)


def progress(items: list, what: str) -> Iterator:
    """The items, with a line every SECONDS: how many of them are done."""
    last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= SECONDS:
            say(f"{what}: {done:,} of {len(items):,}")
            last = now
        yield item
