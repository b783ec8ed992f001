"""Checks and a summary of the examples before training."""

import numpy as np

from nanopost import InputError
from nanopost.batch import Example
from nanopost.tokenizer import Tokenizer


def report(
    examples: list[Example], tokenizer: Tokenizer, rows: list[dict] | None = None, shown: int = 800
) -> str:
    """A summary of the examples, warnings, and the shortest of them with its trained tokens marked.

    rows: where the examples come from, to name them by file and line. shown: maximum characters of
    the example. InputError for anything certainly wrong.
    """
    check(examples, tokenizer, rows)
    lines = [_summary(examples, tokenizer, rows)]
    lines += [f"warning: {sentence}" for sentence in doubts(examples, tokenizer, rows)]
    lines += filter(None, [tokenizer.doubts(rows or [])])
    lines.append("trained tokens are between » and «:")
    text = marked_text(min((e for e in examples if e.num_targets), key=len), tokenizer)
    if len(text) > shown:
        text = f"{text[: shown // 2]} ... {text[-shown // 2 :]}"
    return "\n".join([*lines, text])


def marked_text(example: Example, tokenizer: Tokenizer) -> str:
    """An example decoded, with » and « around what is trained."""
    cuts = np.flatnonzero(np.diff(example.mask)) + 1
    text = ""
    for ids, mask in zip(np.split(example.ids, cuts), np.split(example.mask, cuts)):
        piece = tokenizer.decode(ids)
        text += f"»{piece}«" if mask[0] else piece
    return text


def check(examples: list[Example], tokenizer: Tokenizer, rows: list[dict] | None = None):
    """InputError for what is certainly wrong: two BOS, or nothing to train. rows: see report."""
    bos = tokenizer.bos_id
    doubled = [i for i, e in enumerate(examples) if e.ids[:2].tolist() == [bos, bos]]
    if doubled:
        raise InputError(
            f"{_count(doubled, examples, rows)} begin with BOS twice: the tokenizer or the "
            "template adds one; remove it from the text."
        )
    if not any(e.num_targets for e in examples):
        raise InputError(
            f"none of {len(examples):,} rows has a token to train: check --train_on and the "
            "chat template."
        )


def _summary(examples, tokenizer, rows):
    tokens = sum(len(e) for e in examples)
    trained = sum(int(e.mask.sum()) for e in examples)
    stopping = len(examples) - len(_unended(examples, tokenizer))
    bos = "no BOS declared"
    if tokenizer.bos_id is not None:
        counts = [int((e.ids == tokenizer.bos_id).sum()) for e in examples]
        bos = f"{min(counts)} to {max(counts)} BOS per row"
    longest = max(range(len(examples)), key=lambda i: len(examples[i]))
    return (
        f"{len(examples):,} rows, {tokens:,} tokens, {trained / tokens:.1%} of them trained; "
        f"{stopping / len(examples):.1%} of rows train a stop token; {bos}; "
        f"longest row: {len(examples[longest]):,} tokens ({_place(longest, rows)})"
    )


def doubts(
    examples: list[Example], tokenizer: Tokenizer, rows: list[dict] | None = None
) -> list[str]:
    """What looks wrong with tokenizer, template and examples: one sentence each. rows: see
    report."""
    bos = tokenizer.bos_id
    prefix = tokenizer.prefix
    untrained = [i for i, e in enumerate(examples) if not e.num_targets]
    bare = [i for i, e in enumerate(examples) if e.ids[: len(prefix)].tolist() != prefix]
    found = {
        "train nothing": untrained,
        "train no stop token, so their answers never end": _unended(examples, tokenizer),
        "begin without the BOS that this tokenizer adds to text": bare,
    }
    # A BOS that is also a stop token, or that every row repeats, is the template's intention.
    if bos is not None and bos not in tokenizer.stop_ids:
        counts = [int((e.ids == bos).sum()) for e in examples]
        if min(counts) < 2:
            later = [i for i, e in enumerate(examples) if (e.ids[1:] == bos).any()]
            found["have a BOS after their first token"] = later
    found = {what: some for what, some in found.items() if some}
    sentences = [f"{_count(some, examples, rows)} {what}." for what, some in found.items()]
    return tokenizer.warnings() + sentences


def _unended(examples, tokenizer):
    stops = tokenizer.stop_ids
    return [i for i, e in enumerate(examples) if stops.isdisjoint(e.ids[e.mask].tolist())]


def _count(some, examples, rows):
    places = [_place(i, rows) for i in some[:5]]
    if len(some) > 5:
        places.append("...")
    return f"{len(some):,} of {len(examples):,} rows ({', '.join(places)})"


def _place(i, rows):
    return rows[i].get("__line__", f"row {i}") if rows else f"row {i}"
