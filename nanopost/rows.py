"""Files -> rows, in TRL's formats.

A row is a dict. Its "__line__" says where it comes from, "file:line", for error messages. Rows of
other formats become TRL's in normalize.py. A form (sft, prompt, answered, pair, unpaired) checks a
row and returns it in the shape that the tokenizer reads.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from nanopost import InputError
from nanopost.normalize import first, normalize
from nanopost.packing import order
from nanopost.terminal import say

GZIP, PARQUET, BOM = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"  # first bytes of files
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
MESSAGES = "a non-empty list of messages"

Form = Callable[[dict], dict]


class File(NamedTuple):
    """A file that has been read. rows: as they are in it."""

    path: Path
    rows: list[dict]
    is_parquet: bool

    def __str__(self):
        return str(self.path)


def load(
    paths, eval_paths, holdout: int, rename, form: Form, to_messages: bool = False
) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and held-out rows: those of eval_paths, or else `holdout` rows of `paths`.

    The held-out rows are drawn at random but do not depend on a run's seed: a later stage must not
    train on what an earlier one held out. paths, eval_paths, rename, to_messages: see read_rows.
    """
    rows = read_rows(paths, rename, form, to_messages)
    if eval_paths:
        return rows, read_rows(eval_paths, rename, form, to_messages)
    if not 0 <= holdout < len(rows):
        raise InputError(
            f"--holdout {holdout} of the {len(rows)} rows of {named(paths)} leaves none to train "
            f"on: give at most {len(rows) - 1}, or --eval_data."
        )
    held_out = set(order(len(rows), 0, 0)[:holdout].tolist())
    train_rows = [row for i, row in enumerate(rows) if i not in held_out]
    eval_rows = [rows[i] for i in sorted(held_out)]
    return train_rows, eval_rows


def read_rows(
    paths,
    rename: dict[str, str] | list[str] = (),
    form: Form | None = None,
    to_messages: bool = False,
) -> list[dict]:
    """Rows of one file or of several, in order: JSONL, JSON (one list) or Parquet; the first two
    may be gzipped. paths may be Files (read_files) instead.

    The format is read from the content, not the name. rename: {theirs: ours}, or
    ["theirs=ours", ...] as --rename takes them. to_messages: text of prompts and answers becomes
    messages. What is read as another format, and what is not read, is said. InputError names file,
    line and reason.
    """
    ours = _renames(rename)
    rows = []
    for file in _each(paths):
        path, raw, is_parquet = file if isinstance(file, File) else _read_file(Path(file))
        if ours:
            raw = [_renamed(row, ours) for row in raw]
        marked = _marked_untrained(raw)
        found, sentences = normalize(raw, ours, is_parquet, to_messages, OF_TREES.get(form, "sft"))
        for sentence in [*marked, *sentences, *_unread(found, form)]:
            say(f"{path.name}: {sentence}")
        if not found:
            raise InputError(_none_left(path, raw))
        rows += found if form is None else [form(row) for row in found]
    return rows


def read_files(paths) -> list[File]:
    """Each file, read once: for guess, and then for read_rows or load."""
    return [_read_file(Path(path)) for path in _each(paths)]


def guess(files: list[File], rename=(), to_messages: bool = False) -> str:
    """What the first row of the first file is, by its columns: a key of FORMS."""
    path, raw, _ = files[0]
    ours = _renames(rename)
    row = first((_renamed(row, ours) for row in raw), ours, to_messages)
    if row is None:
        raise InputError(_none_left(path, raw))
    if "chosen" in row and "rejected" in row:
        return "pairs"
    if "completion" in row and "label" in row:
        return "labelled"
    if {"messages", "completion", "text"} & row.keys():
        return "sft"
    if "prompt" in row:
        return "prompts"
    raise InputError(
        f"{place(row)}: the columns are {_columns(row)}; it needs messages, or prompt and "
        "completion, or text, or prompt, chosen and rejected, or prompt: --rename theirs=ours."
    )


def named(paths) -> str:
    """The files of --data, for a sentence."""
    return " ".join(map(str, _each(paths)))


def _each(paths):
    return [paths] if isinstance(paths, (str, Path)) else paths


def _none_left(path, raw):
    return f"{path}: none of its {len(raw):,} rows is left: give other rows."


def _read_file(path):
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a file in it.")
    if not path.is_file():
        raise InputError(f"{path}: no such file (export a hub data set to JSONL first).")
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if start == PARQUET:
        rows = _read_parquet(path)
    elif start.startswith(GZIP):
        rows = _read_json(path, gzip.open)
    else:
        rows = _read_json(path, open)
    if not rows:
        raise InputError(f"{path}: no rows in it; give a file with one JSON object per line.")
    return File(path, rows, start == PARQUET)


def _unread(rows, form):
    """A sentence about the columns that a form does not read, if there are any."""
    if form not in READ:
        return []
    counts = Counter()
    for row in rows:
        read = READ[form]
        if form is sft and "messages" in row:
            read = ("messages",)
        elif form is sft and "prompt" not in row:
            read = ("text",)
        if any(isinstance(row.get(name), list) for name in read):
            read += ("tools", "chat_template_kwargs")  # of the template
        for name, value in row.items():
            if name not in read and name != "__line__" and value not in (None, "", [], {}):
                counts[name] += 1
    if not counts:
        return []
    return ["columns not read: " + ", ".join(f"{name} ({n:,} rows)" for name, n in counts.items())]


def _marked_untrained(rows):
    """A sentence about messages that other trainers would not train, if there are any."""
    count = 0
    for row in rows:
        for messages in filter(lambda value: isinstance(value, list), row.values()):
            for message in (m for m in messages if isinstance(m, dict)):
                count += any(message.get(name) == 0 for name in ("weight", "train", "loss"))
    if not count:
        return []
    return [
        f"WARNING: {count:,} messages say weight 0, train false or the like, which is not read: "
        "remove these rows, or --train_on last"
    ]


def place(row: dict) -> str:
    """Where a row comes from, for error messages."""
    return row.get("__line__", "row")


@contextmanager
def errors_at(row: dict):
    """Prefix the sentence of an InputError with the row's place."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place(row)}: {error}") from error


# ------------------------------------------------------------------------------------------- forms
def sft(row: dict) -> dict:
    """{"messages"}, {"prompt", "completion"} (both text or both lists of messages) or {"text"}."""
    if "messages" in row:
        _check_messages(row, "messages")
    elif "prompt" in row or "completion" in row:
        _check_completion(row)
    elif not isinstance(row.get("text"), str):
        raise InputError(
            f"{place(row)}: the columns are {_columns(row)}; it needs messages, or prompt and "
            "completion, or text (a string): --rename theirs=ours."
        )
    return row


def prompt(row: dict) -> dict:
    """{"prompt", ...}: non-empty text, or a list of messages that a rollout answers."""
    if "prompt" not in row:
        raise InputError(
            f"{place(row)}: the columns are {_columns(row)}; it needs prompt: --rename "
            "theirs=prompt."
        )
    if isinstance(row["prompt"], str) and row["prompt"]:
        return row
    _check_messages(row, "prompt", f"non-empty text or {MESSAGES}")
    if row["prompt"][-1]["role"] == "assistant":
        raise InputError(
            f"{place(row)}: prompt ends with an assistant message, but a rollout begins another: "
            "remove it."
        )
    return row


def answered(row: dict) -> dict:
    """As prompt, or {"messages"}, of which the last answer becomes the completion. Beside a prompt,
    messages are not read."""
    if "messages" in row and "prompt" in row:
        row = {name: value for name, value in row.items() if name != "messages"}
    if "messages" in row:
        _check_messages(row, "messages")
        *before, last = row["messages"]
        if not before or last["role"] != "assistant":
            raise InputError(
                f"{place(row)}: messages end with a {last['role']} message after {len(before)} "
                "others: make them a prompt and an answer, or rename them (--rename "
                "messages=prompt)."
            )
        row = {name: value for name, value in row.items() if name != "messages"}
        row |= {"prompt": before, "completion": [last]}
    return prompt(row)


def pair(row: dict) -> dict:
    """{"prompt", "chosen", "rejected"}, all text or all lists of messages.

    Without prompt, chosen and rejected are whole conversations: the messages with which both begin
    become the prompt.
    """
    if "chosen" not in row or "rejected" not in row:
        raise InputError(
            f"{place(row)}: the columns are {_columns(row)}; it needs chosen and rejected, and "
            "prompt: --rename theirs=ours."
        )
    names = [name for name in ("prompt", "chosen", "rejected") if name in row]
    texts = [isinstance(row[name], str) for name in names]
    if all(texts) and "prompt" in row:
        return row
    if all(texts):
        raise InputError(
            f"{place(row)}: chosen and rejected are text, so it needs prompt, the text before "
            "them: --rename theirs=prompt, or cut it off both and write it there."
        )
    if any(texts):
        raise InputError(
            f"{place(row)}: {', '.join(names)} are partly text and partly messages: make all of "
            "them text, or all lists of messages (--to_messages does)."
        )
    for name in names:
        _check_messages(row, name)
    if "prompt" not in row:
        return _split_at_shared_prefix(row)
    for name in ("chosen", "rejected"):
        asks_again = row["prompt"][-1]["role"] == row[name][0]["role"] == "user"
        if asks_again and len(row[name]) > 1:
            raise InputError(
                f"{place(row)}: prompt ends with a user message and {name} begins with another: "
                "make it what answers the prompt, or remove prompt if both sides hold it."
            )
    return row


def unpaired(row: dict) -> dict:
    """{"prompt", "completion", "label"}, label true (or 1) for a good completion; or a pair."""
    if "chosen" in row:
        return pair(row)
    if not {"prompt", "completion", "label"} <= row.keys():
        raise InputError(
            f"{place(row)}: the columns are {_columns(row)}; it needs prompt, completion and "
            "label: --rename theirs=ours."
        )
    if row["label"] not in (0, 1):
        raise InputError(f"{place(row)}: label is {row['label']!r}: make it true or false.")
    # A column messages would be trained in place of the completion that the label is about.
    return sft({name: row[name] for name in row if name != "messages"})


def take_pairs_apart(rows: list[dict]) -> list[dict]:
    """Rows of the form unpaired, with each pair as two labelled rows: chosen, then rejected.

    A pair of equal sides, whose answer would be good and bad, is left out, and the number is said.
    """
    flat, alike = [], 0
    for row in rows:
        if "chosen" not in row:
            flat.append(row)
            continue
        if row["chosen"] == row["rejected"]:
            alike += 1
            continue
        own = ("chosen", "rejected", "messages")
        shared = {name: row[name] for name in row if name not in own}
        flat.append({**shared, "completion": row["chosen"], "label": True})
        flat.append({**shared, "completion": row["rejected"], "label": False})
    if alike:
        say(f"{alike:,} pairs are left out: their chosen and rejected are the same")
    return flat


def number(row: dict, name: str, default: float) -> float:
    """A column that is a number; the default where a row has none."""
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float)):
        raise InputError(f"{place(row)}: {name} is {value!r:.60}: make it a number.")
    return float(value)


FORMS = {"sft": sft, "pairs": pair, "labelled": unpaired, "prompts": prompt}
# What a tree of answers is read as (normalize.py).
OF_TREES = {pair: "pairs", unpaired: "pairs", prompt: "prompts"}
# The columns that a form reads. Rewards read every column of a prompt.
READ = {
    sft: ("prompt", "completion"),
    pair: ("prompt", "chosen", "rejected", "margin"),
    unpaired: ("prompt", "completion", "label", "chosen", "rejected"),
}


def _check_completion(row):
    if "prompt" not in row or "completion" not in row:
        raise InputError(
            f"{place(row)}: the columns are {_columns(row)}; prompt and completion go together: "
            "--rename theirs=ours."
        )
    texts = [isinstance(row[name], str) for name in ("prompt", "completion")]
    if all(texts):
        return
    if any(texts):
        raise InputError(
            f"{place(row)}: prompt is {row['prompt']!r:.60} and completion is "
            f"{row['completion']!r:.60}: make both text, or both non-empty lists of messages "
            "(--to_messages does)."
        )
    _check_messages(row, "prompt")
    _check_messages(row, "completion")


def _check_messages(row, column, expected=MESSAGES):
    """[{"role", "content"}, ...]: content is text, and only tool_calls may stand in for it."""
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place(row)}: {column} is {messages!r:.60}: make it {expected}.")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(
                f"{place(row)}: {column}[{i}] is {message!r:.60}: make it "
                f'{{"role": ..., "content": ...}} with a role of {", ".join(ROLES)}.'
            )
        content = message.get("content")
        calls_alone = content is None and message.get("tool_calls")
        if not isinstance(content, str) and not calls_alone:
            raise InputError(
                f"{place(row)}: {column}[{i}] has the content {content!r:.60}: make it a string "
                "(only a message with tool_calls may have none)."
            )


def _split_at_shared_prefix(row):
    chosen, rejected = row["chosen"], row["rejected"]
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise InputError(
            f"{place(row)}: chosen and rejected share no prompt: begin both with the same messages."
        )
    # Sides that are equal, or one of which begins the other, keep an answer: pairs.fit_to leaves
    # such pairs out, and counts them.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    parts = {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return {**row, **parts}


def _columns(row):
    return ", ".join(name for name in row if name != "__line__") or "none"


# ------------------------------------------------------------------------------------------- files
def check_out(out: Path, overwrite: bool, zips: bool = True):
    """InputError if rows cannot be written to this file as JSONL, or, with zips, as .jsonl.gz."""
    ends = (".jsonl", ".jsonl.gz") if zips else (".jsonl",)
    if not out.name.endswith(ends):
        raise InputError(f"{out}: JSONL is written: give a name that ends in {' or '.join(ends)}.")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.absolute().parent}: create it first.")
    if out.exists() and not out.is_file():
        raise InputError(f"{out} is no file: name another.")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists: name another file, or --overwrite it.")


def _read_json(path, opener):
    """One list if the file begins with [, else one object per line."""
    try:
        with opener(path, "rb") as file:
            first = next((line for line in file if line.strip()), b"")
            file.seek(0)
            if first.removeprefix(BOM).lstrip().startswith(b"["):
                values = _parsed(file.read(), path, 1)
                return [_row(value, f"{path}: row {i}") for i, value in enumerate(values, 1)]
            lines = ((i, line.rstrip()) for i, line in enumerate(file, 1))
            return [_row(_parsed(line, path, i), f"{path}:{i}") for i, line in lines if line]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: a damaged gzip file ({error}): copy it again.") from error


def _parsed(raw, path, line):
    """The JSON value in bytes that begin in this line of the file."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}:{line}: not UTF-8 text: give JSONL or JSON in UTF-8, or Parquet."
        ) from error
    except (RecursionError, ValueError) as error:
        if not isinstance(error, json.JSONDecodeError):  # nested too deep, or an endless number
            raise InputError(f"{path}:{line}: JSON that cannot be read ({error}).") from error
        line += error.lineno - 1
        raise InputError(
            f"{path}:{line}: not valid JSON ({error.msg}, column {error.colno}): write one object "
            "per line, or one list in the whole file (CSV is not supported)."
        ) from error


def _read_parquet(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs pyarrow: pip install pyarrow.") from error
    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: a damaged Parquet file ({error}): copy it again.") from error
    return [_row(value, f"{path}: row {i}") for i, value in enumerate(values, 1)]


def _row(value, where):
    if not isinstance(value, dict):
        raise InputError(
            f'{where}: a row is {value!r:.60}: make it an object, {{"column": value, ...}}.'
        )
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:  # no tokenizer accepts it
        raise InputError(
            f"{where}: an unpaired surrogate, {error.object[error.start]!a}, such as half of an "
            "emoji: remove it."
        ) from error
    return {**value, "__line__": where}


def _renames(rename):
    """--rename as {theirs: ours}."""
    pairs = rename.items() if isinstance(rename, dict) else [p.partition("=")[::2] for p in rename]
    ours = dict(pairs)
    if not all(ours.keys()) or not all(ours.values()):
        raise InputError(
            f"--rename {' '.join(rename)}: write it as theirs=ours, such as question=prompt."
        )
    return ours


def _renamed(row, ours):
    if missing := ours.keys() - row.keys():
        raise InputError(
            f"{place(row)}: the columns are {_columns(row)}; --rename asks for "
            f"{', '.join(sorted(missing))}."
        )
    if len({ours.get(name, name) for name in row}) < len(row):
        raise InputError(
            f"{place(row)}: the columns are {_columns(row)}; --rename gives two of them the same "
            "name."
        )
    return {ours.get(name, name): value for name, value in row.items()}
