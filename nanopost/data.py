"""Files -> rows -> examples -> packed batches, in an order that can be taken up anywhere.

Shapes: N packed tokens, S sequences, T tokens of one sequence.

A row is a dict from a file, an Example one sequence of tokens, a Batch several in one stream without padding. Targets
are shifted where a Batch is built and nowhere else.

What an optimizer step holds is a function of the seed and of what was consumed before it, so a run is taken up again
from one number. There are two ways to fill a step:

by_rows  a stated number of rows, shuffled anew in each epoch, packed into micro-batches within the step. The batch is
         that many examples, and its gradient the same, whatever --tokens and the number of ranks. The better default.
by_bins  a stated number of bins out of a best-fit packing of the whole epoch. Each bin is as full as can be, so a
         step is a nearly constant number of tokens, from however many rows.
"""

import gzip
import heapq
import json
import math
import zlib
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from nanopost import InputError

IGNORED = -100
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"  # how such files begin
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")


@dataclass
class Example:
    """One sequence of at least one token. Mask and per-token columns are aligned with ids, not shifted."""

    ids: np.ndarray  # int32 [T]
    mask: np.ndarray  # bool [T]: this token is trained, or is an action
    columns: dict = field(default_factory=dict)  # name -> array [T], or a number

    def __post_init__(self):
        self.ids, self.mask = np.asarray(self.ids, np.int32), np.asarray(self.mask, bool)
        if not len(self.ids) == len(self.mask) > 0:
            raise InputError(
                f"an example has {len(self.ids)} tokens and a mask of {len(self.mask)}: give it at least "
                "one token, and a mask as long."
            )

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Example":
        columns = {k: v[part] if np.ndim(v) else v for k, v in self.columns.items()}
        return Example(self.ids[part], self.mask[part], columns)

    def ended(self) -> "Example":
        """Without what follows the last trained token (a template's newline): rollouts end there too."""
        return self[: len(self) - self.mask[::-1].argmax()]


@dataclass
class Batch:
    """Sequences in one stream, cut by cu_seqlens. batch["name"] is a column."""

    token_N: torch.Tensor  # int64
    position_N: torch.Tensor  # int64, from 0 in each sequence
    target_N: torch.Tensor  # int64: the next token of the same sequence; -100 where mask_N is False
    mask_N: torch.Tensor  # bool: the target is trained
    cu_seqlens: torch.Tensor  # int32 [S+1]
    max_seqlen: int
    columns: dict[str, torch.Tensor]  # float32 [N] (shifted like the targets) or [S]
    dummy: bool = False  # stands in for no sequences: every column is 0

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @cached_property
    def seq_N(self) -> torch.Tensor:
        """int64: index of the sequence that a token belongs to."""
        index_S = torch.arange(self.num_sequences, device=self.token_N.device)
        return index_S.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.token_N))

    def __getitem__(self, name: str) -> torch.Tensor:
        return (
            torch.zeros_like(self.token_N, dtype=torch.float32)
            if self.dummy
            else self.columns[name]
        )

    def to(self, device) -> "Batch":
        def move(value):
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        return Batch(*(move(getattr(self, f.name)) for f in fields(self)))


def batch_of(examples: list[Example], device="cpu") -> Batch:
    """Lay examples end to end and shift targets, mask and per-token columns: the only place that does.

    No examples give a dummy without a target, with which a rank that has run out of data runs the same forward and
    backward passes, and the collectives in them, as the others. It is two sequences of one token: N equals S, so a
    column of zeros fits either way. InputError if columns differ between examples, or in length from their tokens.
    """
    dummy, examples = not examples, examples or [Example([0], [False])] * 2
    length_S = np.array([len(e) for e in examples])
    end_S = length_S.cumsum()
    token_N = np.concatenate([e.ids for e in examples]).astype(np.int64)
    position_N = np.arange(len(token_N)) - np.repeat(end_S - length_S, length_S)
    mask_N = _shift(np.concatenate([e.mask for e in examples]), end_S)
    target_N = np.where(mask_N, _shift(token_N, end_S), IGNORED)
    cu_seqlens = np.concatenate([[0], end_S]).astype(np.int32)
    tensors = map(torch.from_numpy, (token_N, position_N, target_N, mask_N, cu_seqlens))
    columns = {k: torch.from_numpy(v) for k, v in _columns(examples, length_S, end_S).items()}
    return Batch(*tensors, int(length_S.max()), columns, dummy).to(device)


def padded(examples: list[Example], name: str) -> torch.Tensor:
    """A column at the trained tokens of each example, zeros behind shorter ones -> float64 [B, T], on the CPU."""
    longest = max((int(e.mask.sum()) for e in examples), default=0)
    out_BT = torch.zeros(len(examples), longest, dtype=torch.float64)
    for out_T, e in zip(out_BT, examples):
        out_T[: e.mask.sum()] = torch.from_numpy(e.columns[name][e.mask])
    return out_BT


def add_column(examples: list[Example], name: str, x_BT: torch.Tensor):
    """What padded takes apart, put back: a column with 0 at tokens that are not trained."""
    for e, x_T in zip(examples, x_BT.numpy()):
        e.columns[name] = np.zeros(len(e), np.float32)
        e.columns[name][e.mask] = x_T[: e.mask.sum()]


def _columns(examples, length_S, end_S):
    names, columns = examples[0].columns.keys(), {}
    if other := next((e for e in examples if e.columns.keys() != names), None):
        raise InputError(
            f"examples of one batch have the columns {', '.join(names) or 'none'} and "
            f"{', '.join(other.columns) or 'none'}: give all of them the same."
        )
    for name in names:
        values = [e.columns[name] for e in examples]
        if not np.ndim(values[0]):
            columns[name] = np.array(values, np.float32)
        elif [len(v) for v in values] == length_S.tolist():
            columns[name] = _shift(np.concatenate(values).astype(np.float32), end_S)
        else:
            raise InputError(
                f"column {name} needs a value for each token of its example, or one number."
            )
    return columns


def _shift(value_N, end_S):
    """At each token what belongs to the next one; 0 or False at the last of each sequence."""
    shifted_N = np.roll(value_N, -1)
    shifted_N[end_S - 1] = 0
    return shifted_N


# ------------------------------------------------------------------------------------------------ order and packing
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n rows in an epoch -> int64 [n]."""
    return _random(seed, epoch).permutation(n)


def take(n: int, seed: int, consumed: int, count: int) -> list[int]:
    """The `count` row indices that come after `consumed` of them, epoch after epoch."""
    if count < 1:
        raise InputError(f"a step of {count} rows: give --rows or --prompts 1 or more.")
    epochs = {e: order(n, seed, e) for e in range(consumed // n, (consumed + count - 1) // n + 1)}
    return [int(epochs[i // n][i % n]) for i in range(consumed, consumed + count)]


def pack(lengths, budget: int) -> list[list[int]]:
    """Best-fit decreasing (2404.10830): each length, longest first, into the fullest bin that has room for it.

    -> the indices in each bin. Over all lengths at once, in O(n log n). InputError if one is above the budget.
    """
    lengths = np.asarray(lengths).tolist()
    if max(lengths, default=0) > budget:
        raise InputError(
            f"a sequence of {max(lengths)} tokens does not fit into --tokens {budget}: raise --tokens, "
            "or shorten the sequences (--max_length, --max_new_tokens)."
        )
    bins, rooms, bins_with = (
        [],
        [],
        defaultdict(list),
    )  # rooms: the numbers of slots free in some bin, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[i])
        if at == len(rooms):
            room, chosen = budget, []
            bins.append(chosen)
        else:
            room = rooms[at]
            chosen = bins_with[room].pop()
            if not bins_with[room]:
                del rooms[at]
        chosen.append(i)
        room -= lengths[i]
        if not bins_with[room]:
            insort(rooms, room)
        bins_with[room].append(chosen)
    return bins


def packed_epoch(lengths, budget: int, seed: int, epoch: int) -> list[list[int]]:
    """All rows of an epoch in bins, in random order -> the row indices in each.

    Rows of equal length trade places from epoch to epoch, so the number of bins is the same in all of them.
    """
    rng = _random(seed, epoch)
    shuffled = rng.permutation(len(lengths))
    bins = pack(np.asarray(lengths)[shuffled], budget)
    return [shuffled[bins[b]].tolist() for b in rng.permutation(len(bins))]


def _random(seed, epoch):
    if seed < 0:
        raise InputError(f"--seed {seed}: give 0 or more.")
    return np.random.default_rng((seed, epoch))


def fill_rate(lengths, bins: list[list[int]], budget: int) -> float:
    """Share of the slots of all bins that hold a token."""
    return sum(lengths[i] for i in chain(*bins)) / (len(bins) * budget)


def micro_batches(lengths, tokens: int, ranks: int = 1) -> list[list[int]]:
    """Micro-batches of at most `tokens` tokens -> the indices in each, in order; some may be empty.

    As few as best fit finds, and a multiple of ranks; filled evenly if that fits, which lowers the peak of memory and
    spares ranks waiting for each other. InputError if one length is above `tokens`.
    """
    bins = pack(lengths, tokens)
    bins += [[] for _ in range(-len(bins) % ranks)]
    even, filled = [[] for _ in bins], [(0, b) for b in range(len(bins))]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, b = filled[0]
        even[b].append(i)
        heapq.heapreplace(filled, (total + lengths[i], b))
    fits = max(filled, default=(0,))[0] <= tokens
    return [sorted(b) for b in (even if fits else bins)]


def by_rows(lengths, tokens: int, seed: int):
    """-> rows in an epoch, and f(consumed, count, rank, size): the rank's micro-batches of the next `count` rows.

    f gives lists of row indices, as many on each rank; an empty one is for batch_of([]).
    """

    def of_step(consumed, count, rank=0, size=1):
        rows = take(len(lengths), seed, consumed, count)
        bins = micro_batches([lengths[i] for i in rows], tokens, size)
        return [[rows[i] for i in b] for b in bins[rank::size]]

    return len(lengths), of_step


def by_bins(lengths, tokens: int, seed: int):
    """-> bins in an epoch, and f as that of by_rows, of the next `count` bins, of which each is a micro-batch."""
    epoch_bins = lru_cache(2)(lambda epoch: packed_epoch(lengths, tokens, seed, epoch))
    num_bins = len(epoch_bins(0))

    def of_step(consumed, count, rank=0, size=1):
        bins = [epoch_bins(i // num_bins)[i % num_bins] for i in range(consumed, consumed + count)]
        bins += [[] for _ in range(-count % size)]
        return bins[rank::size]

    return num_bins, of_step


def overlong(
    examples: list[Example], max_length: int, how: str
) -> tuple[list[Example], dict[str, int]]:
    """Bring every example to at most max_length tokens -> (examples, counts for the log).

    how: truncate (cut the end off), split (into pieces, each a sequence by itself, whose
    first token is the last of the one before: so none loses its target) or drop. What has no trained token
    is left out as well, and counted apart: examples that had none before, and pieces that have none after a cut.
    InputError if nothing is left of any.
    """
    if max_length < 2:
        raise InputError(
            f"--max_length {max_length}: give 2 or more, since the first token is nobody's target."
        )
    kept, counts = (
        [],
        dict.fromkeys(
            (
                "overlong",
                "pieces",
                "tokens_cut",
                "answers_without_their_end",
                "untrained_after",
                "untrained_before",
            ),
            0,
        ),
    )
    for e in examples:
        if not e.mask[1:].any():
            counts["untrained_before"] += 1
            continue
        pieces = [e]
        if len(e) > max_length:
            starts = {"truncate": [0], "split": range(0, len(e) - 1, max_length - 1), "drop": []}[
                how
            ]
            pieces = [e[i : i + max_length] for i in starts]
            counts["overlong"] += 1
            counts["answers_without_their_end"] += int(
                how == "truncate" and e.mask[max_length:].any()
            )
            counts["pieces"] += len(pieces)
            counts["tokens_cut"] += 0 if how == "split" else len(e) - sum(map(len, pieces))
        trained = [p for p in pieces if p.mask[1:].any()]
        counts["untrained_after"] += len(pieces) - len(trained)
        kept += trained
    if examples and not kept:
        raise InputError(
            f"none of {len(examples)} examples has a trained token within --max_length {max_length} "
            f"(--overlong {how}), and {counts['untrained_before']} had none before: see --train_on."
        )
    return kept, counts


def check_divides(name: str, value: int, **parts: int):
    """InputError if --name does not divide into, say, 2 ranks x 3 minibatches; it names the nearest that would."""
    share = math.prod(parts.values())
    if value % share:
        fits = " or ".join(
            str(n) for n in (value // share * share, value // share * share + share) if n
        )
        into = " x ".join(f"{n} {part}" for part, n in parts.items())
        raise InputError(f"--{name} {value} does not divide into {into}: {fits} would.")


def counted(counts: dict[str, int]) -> str:
    """Counts above zero in words."""
    return ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n) or "none"


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
