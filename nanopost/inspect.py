r"""python -m nanopost.inspect: rows as a model will see them, before anything is trained.

    --model DIR --data chats.jsonl                    what training will read, and the first rows
    --model DIR --data chats.jsonl --row 17           one row, token by token
    --model DIR --data pairs.jsonl --eval_data held_out.jsonl --html rows.html
    --model DIR --data chats.jsonl --diff old.jinja new.jinja
                                                      two templates, or the tokenizers of two
                                                      folders, side by side
    --model DIR --data chats.jsonl --kind prompts     what a rollout would start from

DIR needs its tokenizer's files and config.json, no weights. Rows are read and encoded by the calls
of the training scripts, with the same flags.

In a terminal, what is trained is green, special tokens are magenta, and every other token is
underlined. Elsewhere, and with NO_COLOR, what is trained is between » and «, and · is between
tokens.
"""

import hashlib
import math
import os
import sys
import textwrap
from collections import Counter
from os.path import basename
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanopost import InputError, hf, lora, packing, pairs, rows
from nanopost.batch import Example
from nanopost.cli import Parser, at_least, command
from nanopost.display import (
    COLUMNS,
    Facts,
    cut_to,
    escaped,
    inline,
    names_of,
    page,
    shown,
    spans,
    table,
    tokens_of,
)
from nanopost.report import check, doubts
from nanopost.rows import FORMS, place
from nanopost.terminal import progress, say
from nanopost.tokenizer import Tokenizer, check_stage

NO_LIMIT = 2**31  # positions, where no config.json says
SIDES = {"pairs": ("chosen", "rejected")}


# --------------------------------------------------------------------------------------------- rows
class Encoded(NamedTuple):
    """Rows of one kind, and each row's sequences: one, or chosen and rejected."""

    rows: list[dict]
    sequences: list[tuple[Example, ...]]
    report: str = ""  # of prompts that were dropped

    @property
    def examples(self) -> list[Example]:
        return [e for examples in self.sequences for e in examples]

    @property
    def places(self) -> list[dict]:
        """The row of each example."""
        return [row for row, examples in zip(self.rows, self.sequences) for _ in examples]


def encoded(args, kind: str, given: list[dict], tokenizer: Tokenizer, positions: int) -> Encoded:
    """Rows as the training script of their kind encodes them, before anything is cut."""
    if not given:
        return Encoded([], [])
    if kind == "pairs":
        return Encoded(given, [tokenizer.pair(row) for row in progress(given, "pairs encoded")])
    if kind == "prompts":
        (kept,), report = tokenizer.with_prompts(
            (given,), args.max_prompt, args.max_new_tokens, args.tokens, positions
        )
        found = [(Example(row["prompt_ids"], [False] * len(row["prompt_ids"])),) for row in kept]
        return Encoded(kept, found, report.splitlines()[0].partition(";")[0])
    train_on = "completion" if kind == "labelled" else args.train_on
    found = [(tokenizer.example(row, train_on),) for row in progress(given, "rows encoded")]
    return Encoded(given, found)


def fitted(args, kind: str, data: Encoded, positions: int) -> tuple[list[int], str]:
    """What training keeps -> (the length of each row, what is cut or dropped)."""
    most = args.max_length or (args.tokens if kind == "sft" else args.tokens // 2)
    most = min(most, args.tokens, positions)
    if kind == "pairs":
        kept, counts = pairs.fit_to(data.sequences, most, args.overlong)
        lengths = [len(chosen) + len(rejected) for chosen, rejected in kept]
    else:
        kept, counts = packing.fit_to(data.examples, most, args.overlong)
        lengths = [len(e) for e in kept]
    return lengths, f"at {most:,} tokens: {packing.counted(counts)}"


# -------------------------------------------------------------------------------------------- facts
def facts_of(
    args, kind: str, tokenizer: Tokenizer, positions: int, data: Encoded, held_out: Encoded
) -> Facts:
    """What there is to know about the rows, by name; the last is what is doubtful."""
    examples = data.examples
    facts = [
        ("rows", [f"{len(data.rows):,} of {', '.join(map(basename, args.data))}, read as {kind}"]),
        ("files", [f"{hash_of(path)}  {path}" for path in args.data + (args.eval_data or [])]),
        ("tokenizer", about(tokenizer)),
        ("special", special_counts(examples, tokenizer)),
        ("per row", per_row(data, tokenizer)),
        ("in all", [token_counts(examples)]),
        ("length", lengths_of(data)),
    ]
    found = []
    if kind == "prompts":
        facts.append(("left out", [data.report]))
    else:
        try:
            check(examples, tokenizer, data.places)
            lengths, cut = fitted(args, kind, data, positions)
            facts += [("cut", [cut]), ("packing", [packed(lengths, args.tokens)])]
        except InputError as error:
            found.append(f"training would stop here: {error}")
        found += empty_answers(data, tokenizer)
    facts.append(("repeated", repeated(data)))
    if held_out.rows:
        facts.append(("held out", leaked(data, held_out)))
    if positions == NO_LIMIT:
        found.append(f"{args.model} has no config.json: the model's longest row is not known.")
    found += check_stage(args.model, tokenizer).splitlines()
    if kind == "prompts":
        found += tokenizer.warnings()
    else:
        found += doubts(examples, tokenizer, data.places)
    found += tokenizer.doubts(data.rows).splitlines()
    found = [sentence.removeprefix("warning: ").removeprefix("WARNING: ") for sentence in found]
    return [*facts, ("doubts", found or ["none"])]


def hash_of(path) -> str:
    """The first 16 digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def about(tokenizer: Tokenizer) -> list[str]:
    """Hashes and special tokens of a tokenizer, and how its template's answers are found."""
    named = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id, "PAD": tokenizer.pad_id}
    tokens = [f"{name} {_named(i, tokenizer)}" for name, i in named.items()]
    stops = ", ".join(_named(i, tokenizer) for i in sorted(tokenizer.stop_ids)) or "none"
    lines = [
        f"{tokenizer.hash}  {tokenizer.vocab_size:,} tokens; {', '.join(tokens)}",
        f"completions end at {stops}",
    ]
    template = tokenizer.template
    if template.source is None:
        return [*lines, "no chat template"]
    how = "its {% generation %} blocks" if template.marks_answers else "trial: no generation blocks"
    return [*lines, f"chat template {template.hash}; answers are found by {how}"]


def _named(token_id, tokenizer):
    return "none" if token_id is None else f"{tokenizer.raw.id_to_token(token_id)} ({token_id})"


def special_counts(examples: list[Example], tokenizer: Tokenizer) -> list[str]:
    counts, trained = Counter(), Counter()
    special = list(tokenizer.special.values())
    for e in examples:
        at = np.isin(e.ids, special)
        counts.update(e.ids[at].tolist())
        trained.update(e.ids[at & e.mask].tolist())
    lines = []
    for token_id, count in counts.most_common():
        names = names_of(token_id, tokenizer).replace("special", "")
        names = f" = {names}" if names else ""
        name = _named(token_id, tokenizer)
        line = f"{name}{names}: {count:,}"
        lines.append(line + (f", {trained[token_id]:,} of them trained" if trained else ""))
    return lines or ["none occurs"]


def per_row(data: Encoded, tokenizer: Tokenizer) -> list[str]:
    stops = sorted(tokenizer.stop_ids)
    lines = []
    for name, token_id in (("BOS", tokenizer.bos_id), ("EOS", tokenizer.eos_id)):
        if token_id is None:
            lines.append(f"{name}: none declared")
        else:
            counts = [int((e.ids == token_id).sum()) for e in data.examples]
            lines.append(f"{name}: {spread(counts)}")
    counts = [int(np.isin(e.ids[e.mask], stops).sum()) for e in data.examples]
    if any(e.mask.any() for e in data.examples):
        lines.append(f"trained stop tokens: {spread(counts)}")
    return lines


def spread(counts: list[int]) -> str:
    """[1, 1, 2] -> "1 in 2, 2 in 1"."""
    found = sorted(Counter(counts).items())
    if len(found) == 1:
        return f"{found[0][0]} in each"
    parts = [f"{count} in {n:,}" for count, n in found[:6]]
    if rest := sum(n for _, n in found[6:]):
        parts.append(f"more in {rest:,}")
    return ", ".join(parts)


def token_counts(examples: list[Example]) -> str:
    total, trained = sum(map(len, examples)), sum(int(e.mask.sum()) for e in examples)
    if not trained:
        return f"{total:,} tokens"
    return f"{total:,} tokens, {trained:,} of them trained ({trained / total:.1%})"


def lengths_of(data: Encoded) -> list[str]:
    lengths = np.array([len(e) for e in data.examples])
    longest = int(lengths.argmax())
    middle, high = np.quantile(lengths, [0.5, 0.95], method="inverted_cdf").tolist()
    line = f"median {middle:,}, 95% {high:,}, longest {lengths[longest]:,} tokens "
    return [line + f"({where(data.places[longest])})", *histogram(lengths)]


def histogram(lengths: np.ndarray, width: int = 40) -> list[str]:
    """A line for each power of two between the shortest and the longest: how many, and a bar."""
    counts = Counter(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int).tolist())
    most = max(counts.values())
    lines = []
    for power in range(min(counts), max(counts) + 1):
        low, high, count = 2**power // 2 + 1, 2**power, counts[power]
        bar = "#" * math.ceil(width * count / most)
        lines.append((f"{low:,} to {high:,}", f"{count:,}", bar))
    left, right = (max(len(line[i]) for line in lines) for i in (0, 1))
    return [f"  {label:>{left}}  {n:>{right}}  {bar}".rstrip() for label, n, bar in lines]


def packed(lengths: list[int], tokens: int) -> str:
    bins = packing.pack(lengths, tokens)
    fill = packing.fill_rate(lengths, bins, tokens)
    return f"{len(bins):,} micro-batches of --tokens {tokens:,}, {fill:.1%} full"


def empty_answers(data: Encoded, tokenizer: Tokenizer) -> list[str]:
    """A sentence about answers of stop tokens and whitespace alone."""
    found = []
    for row, e in zip(data.places, data.examples):
        ids = [i for i in e.ids[e.mask].tolist() if i not in tokenizer.stop_ids]
        if e.mask.any() and len(ids) < 8 and not tokenizer.decode(ids).strip():
            found.append(where(row))
    if not found:
        return []
    return [f"{len(found):,} answers are empty ({some(found)})."]


def some(places: list[str], most: int = 3) -> str:
    return ", ".join([*places[:most], *["..."] * (len(places) > most)])


# --------------------------------------------------------------------------------------- duplicates
def key_of(examples: tuple[Example, ...]) -> tuple:
    """Equal for rows that train the same tokens."""
    return tuple((e.ids.tobytes(), e.mask.tobytes()) for e in examples)


def prompt_of(examples: tuple[Example, ...]) -> bytes:
    """The tokens before the first trained one; all of them if none is."""
    e = examples[0]
    return (e.ids[: e.mask.argmax()] if e.mask.any() else e.ids).tobytes()


def where(row: dict) -> str:
    """The place of a row, without its folder."""
    return basename(place(row))


def repeated(data: Encoded) -> list[str]:
    lines = []
    for what, key in (("rows", key_of), ("prompts", prompt_of)):
        first, found = {}, []
        for row, examples in zip(data.rows, data.sequences):
            k = key(examples)
            if not k:  # text that is trained from its first token on has no prompt
                continue
            if k in first:
                found.append(f"{where(row)} as {where(first[k])}")
            first.setdefault(k, row)
        lines.append(f"{len(found):,} {what}" + (f" ({some(found, 1)})" if found else ""))
    return lines


def leaked(data: Encoded, held_out: Encoded) -> list[str]:
    lines = []
    for what, key in (("rows", key_of), ("prompts", prompt_of)):
        trained = {key(examples) for examples in data.sequences} - {b""}
        pairs_of = zip(held_out.rows, held_out.sequences)
        found = [where(row) for row, examples in pairs_of if key(examples) in trained]
        line = f"{len(found):,} of {len(held_out.rows):,} {what} are also trained on"
        lines.append(line + (f" ({some(found)})" if found else ""))
    return lines


# --------------------------------------------------------------------------------------------- diff
class Side(NamedTuple):
    """One of the two that --diff compares. sequences: None for a row that it refuses."""

    name: str
    tokenizer: Tokenizer
    sequences: list[tuple[Example, ...] | None]
    refusals: list[str]


def side(args, kind: str, given: list[dict], name: str) -> Side:
    """name: a folder, or a Jinja file for the tokenizer of --model."""
    if Path(name).is_dir():
        tokenizer = Tokenizer.load(name, args.chat_template)
    elif not args.model:
        raise InputError(f"--diff {name} is a template: give the tokenizer too, --model DIR.")
    else:
        tokenizer = Tokenizer.load(args.model, name)
    sequences, refusals = [], []
    for row in progress(given, f"rows encoded by {name}"):
        try:
            sequences += encoded(args, kind, [row], tokenizer, NO_LIMIT).sequences
        except InputError as error:
            sequences.append(None)
            refusals.append(str(error))
    return Side(name, tokenizer, sequences, refusals)


def difference(one: Example, other: Example) -> int | None:
    """The first token that differs in its id or in whether it is trained."""
    size = min(len(one), len(other))
    same = (one.ids[:size] == other.ids[:size]) & (one.mask[:size] == other.mask[:size])
    if not same.all():
        return int(same.argmin())
    return size if len(one) != len(other) else None


def compared(args, kind: str, given: list[dict]) -> tuple[Facts, list[tuple[str, list[str]]]]:
    """-> (facts, (title, lines) of each sequence that is shown)."""
    one, other = (side(args, kind, given, name) for name in args.diff)
    both, differing, blocks = 0, 0, []
    for row, ours, theirs in zip(given, one.sequences, other.sequences):
        if ours is None or theirs is None:
            continue
        both += 1
        places = [difference(a, b) for a, b in zip(ours, theirs)]
        differs = any(at is not None for at in places)
        differing += differs
        if not args.row and not (differs and differing <= args.rows):
            continue
        for name, a, b, at in zip(SIDES.get(kind, ("",)), ours, theirs, places):
            lines = [first_difference(one, other, a, b, at)]
            if args.row:
                lines += side_by_side(one, other, a, b, range(max(len(a), len(b))))
            elif at is not None:
                lines += side_by_side(one, other, a, b, range(max(0, at - 6), at + 10))
            blocks.append((f"{where(row)} {name}".rstrip(), lines))
    facts = []
    for s in (one, other):
        total = sum(len(e) for examples in s.sequences if examples for e in examples)
        lines = [*about(s.tokenizer), f"{total:,} tokens"]
        if s.refusals:
            lines.append(f"refuses {len(s.refusals):,} rows, first of all {s.refusals[0]}")
        facts.append((s.name, lines))
    facts.append(("rows", [f"{differing:,} of {both:,} rows of {kind} differ"]))
    return facts, blocks


def first_difference(one: Side, other: Side, a: Example, b: Example, at: int | None) -> str:
    if at is None:
        return "the same ids, and the same of them trained"
    said = []
    for s, example in ((one, a), (other, b)):
        if at >= len(example):
            said.append("the end")
            continue
        token = tokens_of(example[max(0, at - 3) : at + 1], s.tokenizer)[-1]
        trained = ", trained" if token.trained else ""
        said.append(f"{token.id} '{shown(token.text)}'{trained}")
    return f"token {at} is the first that differs: {said[0]} and {said[1]}"


def side_by_side(one: Side, other: Side, a: Example, b: Example, indices: range) -> list[str]:
    """A line for each index, with the token of either side; ! where they differ."""
    half = (COLUMNS - 12) // 2
    found = []
    for s, example in ((one, a), (other, b)):
        tokens = tokens_of(example[: indices.stop], s.tokenizer)
        found.append({token.index: token for token in tokens if token is not None})
    names = [cut_to(shown(s.name[-half:]), half) for s in (one, other)]
    lines = [f"        {'  '.join(names)}".rstrip()]
    for i in indices:
        tokens = [at.get(i) for at in found]
        if tokens == [None, None]:  # of a long sequence's middle
            lines += ["   ..."] * (lines[-1] != "   ...")
            continue
        same = None not in tokens and tokens[0].id == tokens[1].id
        same = same and tokens[0].trained == tokens[1].trained
        cells = [cut_to(_cell(token), half) for token in tokens]
        lines.append(f"{i:6}{' ' if same else '!'} {'  '.join(cells)}".rstrip())
    return lines


def _cell(token):
    if token is None:
        return ""
    return f"{'»' if token.trained else ' '} {token.id:7} {shown(token.text)}"


# ------------------------------------------------------------------------------------- command line
def parsed(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="folder with a tokenizer's files and config.json")
    add("--data", nargs="+", required=True, help="rows: JSONL, .jsonl.gz, .json lists or Parquet")
    add("--eval_data", nargs="+", help="held-out rows: are they trained on, too?")
    add("--holdout", type=at_least(0), default=0, help="rows of --data to hold out, as a run does")
    add("--kind", choices=list(FORMS), help="what the rows are; default: what the columns say")
    add("--rows", type=at_least(0), default=3, help="rows to show, from the first on")
    add("--row", type=at_least(1), metavar="K", help="show the K-th row alone, token by token")
    add("--rename", nargs="*", default=[], metavar="THEIRS=OURS", help="question=prompt")
    add(
        "--to_messages",
        action="store_true",
        help="put plain-text prompts and answers into the chat template, as messages",
    )
    add("--chat_template", help="a Jinja file that replaces the model's own template")
    add(
        "--train_on",
        default="assistant",
        choices=["assistant", "last", "completion", "all"],
        help="sft: which tokens are targets",
    )
    add("--tokens", type=at_least(2), default=8192, help="maximum tokens per micro-batch")
    add(
        "--max_length",
        type=at_least(2),
        help="maximum tokens per row; default: --tokens, or half of it for pairs and labelled rows",
    )
    add(
        "--overlong",
        default="truncate",
        choices=["truncate", "split", "drop"],
        help="what to do with longer rows",
    )
    add("--max_prompt", type=at_least(1), help="prompts: drop longer ones (tokens)")
    add("--max_new_tokens", type=at_least(1), default=512, help="prompts: room for a completion")
    add("--diff", nargs=2, metavar=("A", "B"), help="two folders or Jinja files to compare")
    add("--html", metavar="FILE", help="write a page instead of showing rows here")
    return parser.parse_args(arguments)


def checked(args, kind: str):
    """InputError for flags that do not go together, or with the data."""
    if not args.model and not args.diff:
        raise InputError("give --model, the folder of a tokenizer, or --diff two of them.")
    if args.diff and (args.eval_data or args.holdout):
        raise InputError("--diff compares the rows of --data: leave out --eval_data and --holdout.")
    if args.train_on != "assistant" and kind != "sft":
        raise InputError(f"--train_on is about sft, and these rows are {kind}: leave it out.")
    if args.overlong == "split" and kind != "sft":
        raise InputError(f"--overlong split is for sft, and these rows are {kind}: drop them.")
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise InputError(f"--html {args.html}: there is no such folder: create it first.")
    for read in [*args.data, *(args.eval_data or [])]:
        if args.html and Path(args.html).resolve() == Path(read).resolve():
            raise InputError(f"--html {args.html} would replace what is read: choose another.")


def positions_of(folder) -> int:
    """The model's positions; NO_LIMIT where the folder has no config.json."""
    if lora.is_adapter_folder(folder) or (Path(folder) / "config.json").is_file():
        return hf.read_config(folder).max_positions
    return NO_LIMIT


def in_colour() -> bool:
    dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not dumb


def say_facts(facts: Facts):
    width = min(12, max(len(name) for name, _ in facts)) + 2
    for name, lines in facts:
        if len(name) > 12:
            say(name)
            name = ""
        for line in lines:
            room = COLUMNS - width
            indent = {"subsequent_indent": "  ", "break_on_hyphens": False}
            wrapped = textwrap.wrap(shown(line), room, **indent) or [""]
            for text in [line] if line.startswith("  ") else wrapped:
                say(f"{name:{width}}{text}".rstrip())
                name = ""


def chosen(args, items: list) -> list:
    """What --row or --rows asks for."""
    if not args.row:
        return items[: args.rows]
    if args.row > len(items):
        raise InputError(f"--row {args.row}: there are {len(items):,} rows.")
    return [items[args.row - 1]]


def main(arguments=None):
    args = parsed(arguments)
    files = rows.read_files(args.data)
    kind = args.kind or rows.guess(files, args.rename, args.to_messages)
    given, held_out = rows.load(
        files, args.eval_data, args.holdout, args.rename, FORMS[kind], args.to_messages
    )
    checked(args, kind)
    if kind == "labelled":
        given, held_out = rows.take_pairs_apart(given), rows.take_pairs_apart(held_out)
    if not given:
        raise InputError(f"none of the rows of {rows.named(args.data)} is left to show.")
    title = f"{rows.named(args.data)}, read as {kind}"
    blocks = []
    if args.diff:
        facts, texts = compared(args, kind, chosen(args, given) if args.row else given)
        title += f": {args.diff[0]} and {args.diff[1]}"
        for heading, lines in texts:
            blocks.append((heading, f"<pre>{escaped(chr(10).join(lines))}</pre>", lines))
    else:
        tokenizer = Tokenizer.load(args.model, args.chat_template)
        positions = positions_of(args.model)
        data = encoded(args, kind, given, tokenizer, positions)
        held_out = encoded(args, kind, held_out, tokenizer, positions)
        facts = facts_of(args, kind, tokenizer, positions, data, held_out)
        for row, examples in chosen(args, list(zip(data.rows, data.sequences))):
            for name, e in zip(SIDES.get(kind, ("",)), examples):
                tokens = tokens_of(e, tokenizer)
                heading = f"{where(row)} {name}".rstrip() + f": {token_counts([e])}"
                lines = inline(tokens, in_colour())
                if args.row:
                    lines += table(tokens, tokenizer)
                blocks.append((heading, spans(tokens, tokenizer), lines))
    say_facts(facts)
    if args.html:
        text = page(title, facts, [(heading, block) for heading, block, _ in blocks])
        Path(args.html).write_text(text, encoding="utf-8")
        say(f"{args.html}: written")
        return
    for heading, _, lines in blocks:
        say(f"\n{heading}")
        for line in lines:
            print(f"  {line}")


if __name__ == "__main__":
    command(main)
