"""Files -> rows, in TRL's formats, and their checks.

A row is a dict from a file."""

import gzip
import json
import zlib
from pathlib import Path

from nanopost import InputError
from nanopost.packing import order

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"  # how such files begin


ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")


# ------------------------------------------------------------------------------------------------------------ files
def read_rows(path, rename: dict[str, str] | list[str] = ()) -> list[dict]:
    """Rows of JSONL, JSON (one list), both gzipped or not, or Parquet: told apart by content, not by name.

    rename: {theirs: ours}, or ["theirs=ours", ...] as --rename takes them. A row's "__line__" is its place
    "file:line", for errors about it. InputError names file, line and reason.
    """
    path = Path(path)
    if not path.is_file():
        hub = "no such file (export a data set of a hub to JSONL first)"
        raise InputError(f"{path}: {'a folder; give a file in it' if path.is_dir() else hub}.")
    with open(path, "rb") as file:
        start = file.read(4)
    rows = (
        _read_parquet(path)
        if start == PARQUET
        else _read_json(path, gzip.open if start[:2] == GZIP else open)
    )
    if not rows:
        raise InputError(f"{path}: no rows in it; give a file with one JSON object a line.")
    return _renamed(rows, rename) if rename else rows


def load(path, eval_path, holdout: int, rename) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and rows held out: those of eval_path, or else `holdout` random rows of `path`.

    Which ones does not depend on a run's seed: what one stage held out, the next one must not train on.
    """
    rows = read_rows(path, rename)
    if eval_path:
        return rows, read_rows(eval_path, rename)
    if not 0 <= holdout < len(rows):
        raise InputError(
            f"--holdout {holdout} of the {len(rows)} rows of {path} leaves none to train on: give at most "
            f"{len(rows) - 1}, or --eval_data."
        )
    held_out = {*order(len(rows), 0, 0)[:holdout].tolist()}
    return [r for i, r in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def check_sft_row(row: dict):
    """{"messages"}, {"prompt", "completion"} (strings, or lists of messages) or {"text"}; else InputError."""
    if "messages" in row:
        check_messages(row, "messages")
    elif "prompt" in row or "completion" in row:
        if not row.keys() >= {"prompt", "completion"}:
            raise InputError(
                f"{_place(row)}: the columns are {_names(row)}; prompt and completion go together: "
                "--rename theirs=ours."
            )
        if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
            check_messages(row, "prompt")
            check_messages(row, "completion")
    elif not isinstance(row.get("text"), str):
        raise InputError(
            f"{_place(row)}: the columns are {_names(row)}; it needs messages, or prompt and completion, "
            "or text (a string): --rename theirs=ours."
        )


def check_prompt_row(row: dict):
    """{"prompt", ...}: a string that is not empty, or a list of messages; else InputError."""
    if "prompt" not in row:
        raise InputError(
            f"{_place(row)}: the columns are {_names(row)}; it needs prompt: --rename theirs=prompt."
        )
    if not isinstance(row["prompt"], str) or not row["prompt"]:
        check_messages(row, "prompt")
        if row["prompt"][-1]["role"] == "assistant":
            raise InputError(
                f"{_place(row)}: prompt ends with an assistant's message, and a rollout begins another "
                "one: take it away."
            )


def check_pair_row(row: dict):
    """{"prompt", "chosen", "rejected"} (strings, or lists of messages), or chosen and rejected as whole conversations
    that begin alike; else InputError."""
    if "chosen" not in row or "rejected" not in row:
        raise InputError(
            f"{_place(row)}: the columns are {_names(row)}; it needs chosen and rejected, and prompt: "
            "--rename theirs=ours."
        )
    texts = [isinstance(row[name], str) for name in ("prompt", "chosen", "rejected") if name in row]
    if all(texts) and "prompt" in row:
        return
    if any(texts):
        raise InputError(
            f"{_place(row)}: prompt, chosen and rejected are partly text and partly messages: make all of "
            "them text, or all lists of messages."
        )
    for name in ("prompt", "chosen", "rejected"):
        if name in row:
            check_messages(row, name)
    if "prompt" not in row and not all(
        split_prompt(row)[name] for name in ("prompt", "chosen", "rejected")
    ):
        raise InputError(
            f"{_place(row)}: chosen and rejected have no prompt in common, or nothing but it: begin both "
            "with the same messages and end them differently."
        )


def split_prompt(row: dict) -> dict:
    """A row whose chosen and rejected are whole conversations, with the messages they share as its prompt."""
    if "prompt" in row:
        return row
    pairs = zip(row["chosen"], row["rejected"])
    shared = next(
        (k for k, (a, b) in enumerate(pairs) if a != b),
        min(len(row["chosen"]), len(row["rejected"])),
    )
    return {
        **row,
        "prompt": row["chosen"][:shared],
        "chosen": row["chosen"][shared:],
        "rejected": row["rejected"][shared:],
    }


def number(row: dict, name: str, default: float) -> float:
    """A column that is a number, or the default where a row has none."""
    value = row.get(name)
    if value is not None and not isinstance(value, (int, float)):
        raise InputError(f"{_place(row)}: {name} is {value!r:.60}: make it a number.")
    return default if value is None else float(value)


def check_unpaired_row(row: dict):
    """{"prompt", "completion", "label"}: label true (or 1) for a desirable completion; else InputError."""
    if not {"prompt", "completion", "label"} <= row.keys():
        raise InputError(
            f"{_place(row)}: the columns are {_names(row)}; it needs prompt, completion and label: "
            "--rename theirs=ours."
        )
    if row["label"] not in (0, 1):
        raise InputError(f"{_place(row)}: label is {row['label']!r}: make it true or false.")
    check_sft_row(row)


def check_messages(row: dict, column: str):
    """[{"role", "content"}, ...]: a role of ROLES; text, which only tool_calls may replace; else InputError."""
    place, messages = f"{_place(row)}: {column}", row[column]
    if not isinstance(messages, list) or not messages:
        what = (
            "messages" if column == "messages" else "messages, or prompt and completion both text"
        )
        raise InputError(f"{place} is {messages!r:.60}: make it a list of {what}, not empty.")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in ROLES:
            raise InputError(
                f'{place}[{i}] is {m!r:.60}: make it {{"role": ..., "content": ...}} with a role of '
                f"{', '.join(ROLES)}."
            )
        if not isinstance(m.get("content"), str) and (
            m.get("content") is not None or not m.get("tool_calls")
        ):
            raise InputError(
                f"{place}[{i}] has the content {m.get('content')!r:.60}: make it a string (only beside "
                "tool_calls may it be missing)."
            )


def _read_json(path, opener):
    try:
        with opener(path, "rb") as file:
            first = next((line for line in file if line.strip()), b"")
            file.seek(0)
            if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                return [
                    _row(v, f"{path}: row {i}")
                    for i, v in enumerate(_json(file.read(), path, 1), 1)
                ]
            return [
                _row(_json(line.rstrip(), path, i), f"{path}:{i}")
                for i, line in enumerate(file, 1)
                if line.strip()
            ]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: a damaged gzip file ({error}): copy it again.") from error


def _json(raw, path, line):
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}:{line}: not UTF-8 text: give JSONL or JSON in UTF-8, or Parquet."
        ) from error
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise InputError(
            f"{path}:{line}: not valid JSON ({error.msg}, column {error.colno}): write one object a line, "
            "or one list in the whole file (CSV is not read)."
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
    return [_row(v, f"{path}: row {i}") for i, v in enumerate(values, 1)]


def _row(value, place):
    if not isinstance(value, dict):
        raise InputError(
            f'{place}: a row is {value!r:.60}: make it an object, {{"column": value, ...}}.'
        )
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:  # no tokenizer takes it
        raise InputError(
            f"{place}: text with half a character, {error.object[error.start]!a}, as of an emoji cut in "
            "two: remove it."
        ) from error
    return {**value, "__line__": place}


def _renamed(rows, rename):
    ours = dict(
        rename.items()
        if isinstance(rename, dict)
        else (pair.partition("=")[::2] for pair in rename)
    )
    if not all(ours.keys()) or not all(ours.values()):
        raise InputError(
            f"--rename {' '.join(rename)}: write it as theirs=ours, such as question=prompt."
        )
    for row in rows:
        if missing := ours.keys() - row.keys():
            raise InputError(
                f"{_place(row)}: the columns are {_names(row)}; --rename asks for "
                f"{', '.join(sorted(missing))}."
            )
        if len({ours.get(name, name) for name in row}) < len(row):
            raise InputError(
                f"{_place(row)}: the columns are {_names(row)}; --rename gives two of them one name."
            )
    return [{ours.get(name, name): value for name, value in row.items()} for row in rows]


def _place(row):
    return row.get("__line__", "row")


def _names(row):
    return ", ".join(name for name in row if name != "__line__") or "none"


def unpaired(rows: list[dict]) -> list[dict]:
    """Rows {"prompt", "chosen", "rejected"} as two each, {"prompt", "completion", "label"}; others as they are."""
    out = []
    for row in rows:
        if "chosen" not in row:
            out.append(row)
            continue
        check_pair_row(row)
        row = split_prompt(row)
        rest = {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
        out += [
            {**rest, "completion": row["chosen"], "label": True},
            {**rest, "completion": row["rejected"], "label": False},
        ]
    return out
