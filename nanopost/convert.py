r"""python -m nanopost.convert: rows in a foreign form, written as the JSONL that training reads.

    python -m nanopost.convert alpaca.json sharegpt.json sft.jsonl
    python -m nanopost.convert trees.jsonl.gz pairs.jsonl --kind pairs

It reads as the training scripts do (rows.py, normalize.py), so what it writes trains the same
tokens; what the reading took for what, and what it left out, is said.
"""

import gzip
import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

from nanopost import InputError
from nanopost.cli import Parser, command
from nanopost.rows import (
    FORMS,
    check_out,
    guess,
    named,
    place,
    read_files,
    read_rows,
    take_pairs_apart,
)
from nanopost.terminal import say

OURS = ("messages", "prompt", "completion", "chosen", "rejected", "label", "text", "tools")


def written(row: dict) -> str:
    """A row as a line of JSONL, without its place.

    Tools, and the arguments of calls, are written as JSON text, as in OpenAI's files: as objects
    they could look like Arrow's, whose nulls are dropped when they are read (normalize.py).
    """
    names = [name for name in OURS if name in row]
    names += [name for name in row if name not in (*OURS, "__line__")]
    row = {name: row[name] for name in names}
    for name, value in row.items():
        if isinstance(value, list) and name != "tools":
            row[name] = [_with_text(message) for message in value]
    if row.get("tools"):
        row["tools"] = json.dumps(row["tools"], ensure_ascii=False)
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _with_text(message):
    if not isinstance(message, dict) or not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function", call)
        if "arguments" in inner:
            text = json.dumps(inner["arguments"], ensure_ascii=False)
            inner = {**inner, "arguments": text}
        calls.append({**call, "function": inner} if "function" in call else inner)
    return {**message, "tool_calls": calls}


def parsed(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="JSONL, .jsonl.gz, .json lists or Parquet")
    add("out", metavar="OUT.jsonl", help="what is written; or OUT.jsonl.gz")
    add("--kind", choices=list(FORMS), help="what the rows become; default: what the columns say")
    add("--rename", nargs="*", default=[], metavar="THEIRS=OURS", help="question=prompt")
    add(
        "--to_messages",
        action="store_true",
        help="make messages of plain-text prompts and answers",
    )
    add("--overwrite", action="store_true", help="replace OUT.jsonl")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parsed(arguments)
    out = Path(args.out)
    if any(out.resolve() == Path(file).resolve() for file in args.files):
        raise InputError(f"{out} is read, so it cannot be written: name another file.")
    check_out(out, args.overwrite)
    files = read_files(args.files)
    kind = args.kind or guess(files, args.rename, args.to_messages)
    rows = read_rows(files, args.rename, FORMS[kind], args.to_messages)
    if kind == "labelled":
        rows = take_pairs_apart(rows)
    if not rows:
        raise InputError(f"none of the rows of {named(files)} is left: give other rows.")
    lines = "".join(map(written, rows)).encode()
    part = out.with_name(out.name + ".part")
    try:
        part.write_bytes(gzip.compress(lines, mtime=0) if out.suffix == ".gz" else lines)
        _check_read_alike(part, rows, kind)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    say(f"{out}: {len(rows):,} rows of {kind} written")


def _check_read_alike(path, rows, kind):
    """InputError if what was written is read as anything but the rows."""
    with redirect_stdout(io.StringIO()):  # it has been said
        again = read_rows(path, (), FORMS[kind])
    for row, other in zip(rows, again, strict=True):
        if written(row) != written(other):
            raise InputError(
                f"{place(row)}: in one file with the other rows it would be read differently: "
                "convert each file by itself."
            )


if __name__ == "__main__":
    command(main)
