"""python -m nanopost.page: one page that shows a run, or compares several, opened from a file.

    out/grpo                                      writes out/grpo/page.html
    out/grpo out/ppo                              both in one page, out/page.html
    out/grpo --steps 40:60 --rollouts 0 --max_mb 100
                                                  every rollout of these steps

Curves come from metrics.jsonl; rollouts token by token from records/ (--record), or else as text
from samples.jsonl; alarms from alarms.jsonl. The page loads nothing: page.html draws it, and its
data is compressed inside it, a piece for each step, which the browser unpacks when it is looked at.
Data is base64 in the file and becomes text nodes alone, so none of it is ever read as markup. What
does not fit is left out, counted, and said here and in the page.

Shapes: T tokens of one sequence.
"""

import argparse
import base64
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanopost import InputError, hf
from nanopost.cli import Parser, above, at_least, command
from nanopost.plot import place
from nanopost.run import starts_of
from nanopost.terminal import say
from nanopost.tokenizer import Tokenizer

TEMPLATE = Path(__file__).with_name("page.html")
LINE = 2**26  # bytes: longer lines are not read
POINTS = 20_000  # lines of metrics.jsonl that become curves
METRICS = 500  # curves
WORDS = 20_000  # characters of one text of run.json, of an alarm, ...
ITEMS = 1000  # of one list there
OF_ROWS = ("rewards", "minibatch", "micro_batch")  # lists that may be as long as a row's ids
PAIRED = ("train_dpo.py", "train_kto.py", "train_rm.py")


@dataclass
class Limits:
    """steps: the first and the last whose rollouts are shown. rollouts: of a step; 0: all. tokens:
    of a prompt (its last) and of an answer (its first). size: bytes of the page."""

    steps: tuple[float, float] = (-math.inf, math.inf)
    rollouts: int = 64
    tokens: int = 1024
    size: float = 32e6


@dataclass
class Row:
    """One sequence of a step. Records have tokens, samples.jsonl has texts.

    prompt: tokens before the first one that the policy wrote. cut: tokens, or characters, left out
    at the beginning and at the end. about: JSON: finish, reward, ...
    """

    about: dict
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # int32 [T]
    mask: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # bool [T]: trained
    columns: dict = field(default_factory=dict)  # name -> float32 [T], NaN where there is none
    prompt: int = 0
    cut: tuple[int, int] = (0, 0)
    texts: tuple[str, str] | None = None  # prompt and completion
    rank: int = 0

    @property
    def key(self):
        """Rows of one prompt have the same."""
        prompt = self.texts[0] if self.texts else self.ids[: self.prompt].tobytes()
        return self.rank, self.about.get("serial"), prompt


# -------------------------------------------------------------------------------------------- files
def objects(path: Path, left_out: Counter) -> Iterator[dict]:
    """The objects of a JSONL file. Damaged lines, such as one that a kill cut short, and lines of
    more than LINE bytes are counted and left out."""
    name = "records/" if path.parent.name == "records" else path.name
    with _opened(path) as file:
        while line := file.readline(LINE):
            if len(line) == LINE and not line.endswith(b"\n"):
                while (rest := file.readline(LINE)) and not rest.endswith(b"\n"):
                    pass
                left_out[f"lines of {name} over {LINE >> 20} MiB"] += 1
                continue
            found = _parsed(line)
            if found is None:
                left_out[f"damaged lines of {name}"] += 1
            else:
                yield found


def _opened(path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error


def _parsed(line) -> dict | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def metrics_of(folder: Path, left_out: Counter) -> tuple[np.ndarray, dict, dict]:
    """metrics.jsonl -> (step of each line, name -> values, NaN where a line has none, name -> steps
    at which it was logged as infinite or NaN). All float64. InputError without a whole line."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{folder} has no metrics.jsonl: give the --out of a run.")
    lines = [line for line in objects(path, left_out) if math.isfinite(float_of(line.get("step")))]
    if not lines:
        raise InputError(f"{path} has no whole line yet: wait for the run's first step.")
    lines.sort(key=lambda line: line["step"])
    if len(lines) > POINTS:
        lines = _thinned(lines, left_out)
    names = list(dict.fromkeys(name for line in lines for name in line if name != "step"))
    if len(names) > METRICS:
        left_out[f"metrics ({len(names):,} in all)"] += len(names) - METRICS
    columns, broken = {}, {}
    for name in names[:METRICS]:
        column = np.array([float_of(line.get(name)) for line in lines])
        given = [line for line in lines if line.get(name) is not None]
        numbers = [line for line in given if is_number(line[name])]
        if len(numbers) < len(given):
            left_out["values of metrics.jsonl that are no numbers"] += len(given) - len(numbers)
        if numbers:
            columns[name] = np.where(np.isfinite(column), column, np.nan)
        steps = [line["step"] for line in numbers if not math.isfinite(float_of(line[name]))]
        if steps:
            broken[name] = steps
    return np.array([float_of(line["step"]) for line in lines]), columns, broken


def _thinned(lines, left_out) -> list[dict]:
    """About POINTS lines, evenly spread, with the last one and all held-out numbers."""
    every = math.ceil(len(lines) / POINTS)
    kept = []
    for i, line in enumerate(lines):
        held_out = any(name.startswith("eval/") for name in line)
        if i % every == 0 or held_out or i == len(lines) - 1:
            kept.append(line)
    left_out[f"lines of metrics.jsonl ({len(lines):,} in all)"] += len(lines) - len(kept)
    return kept


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def float_of(value) -> float:
    """NaN for what is no number, infinite for an int beyond float64."""
    try:
        return float(value) if is_number(value) else math.nan
    except OverflowError:
        return math.inf


def alarms_of(folder: Path, left_out: Counter) -> list[dict]:
    path = folder / "alarms.jsonl"
    found = objects(path, left_out) if path.is_file() else []
    return [shortened(alarm) for alarm in found if math.isfinite(float_of(alarm.get("step")))]


def shortened(value, depth: int = 10):
    """JSON for the page: texts of at most WORDS characters, lists of at most ITEMS, each saying how
    many more there were; null for infinite numbers and NaN."""
    if isinstance(value, (dict, list)) and not depth:
        return "..."
    if isinstance(value, dict):
        return {shortened(name): shortened(part, depth - 1) for name, part in value.items()}
    if isinstance(value, list):
        rest = [f"... and {len(value) - ITEMS:,} more"] if len(value) > ITEMS else []
        return [shortened(part, depth - 1) for part in value[:ITEMS]] + rest
    if isinstance(value, str) and len(value) > WORDS:
        return f"{value[:WORDS]} ... and {len(value) - WORDS:,} more characters"
    return None if is_number(value) and not math.isfinite(float_of(value)) else value


# --------------------------------------------------------------------------------------------- rows
def row_of(line: dict, arguments: dict) -> Row | None:
    """A line of a record; None if it is damaged. arguments: the run's flags."""
    try:
        ids, mask = np.array(line["ids"], np.int32), np.array(line["mask"], bool)
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    if ids.ndim != 1 or ids.shape != mask.shape or not len(ids):
        return None
    about, columns = {}, {}
    for name, value in line.items():
        if name in ("ids", "mask", "rank", "routes"):
            continue
        if name == "kept":
            value = _sizes(value)
        column = None if name in OF_ROWS else _column(value, len(ids))
        if column is None:
            about[name] = shortened(value)
        else:
            columns[name] = column
    about |= _total(line.get("rewards"), arguments)
    written = mask | (columns.get("version", np.full(len(ids), -1)) >= 0)
    prompt = int(written.argmax()) if written.any() else len(ids)
    return Row(about, ids, mask, columns, prompt, rank=line.get("rank"))


def _column(value, length) -> np.ndarray | None:
    """None for what is not one number (or null) per token."""
    if not isinstance(value, list) or len(value) != length:
        return None
    try:
        with np.errstate(over="ignore"):
            column = np.array(value, np.float32)
    except (ValueError, TypeError, OverflowError):
        return None
    return column if column.ndim == 1 else None


def _sizes(kept):
    """The number of ids that a cut kept for each token."""
    if not isinstance(kept, list):
        return kept
    return [len(ids) if isinstance(ids, list) else None for ids in kept]


def _total(rewards, arguments) -> dict:
    """The weighted sum of those that apply, as in rewards.total, and each by its name."""
    if not isinstance(rewards, list) or not all(r is None or is_number(r) for r in rewards):
        return {}
    weights = arguments.get("reward_weights")
    if not isinstance(weights, list) or not all(map(is_number, weights)):
        weights = [1.0] * len(rewards)
    given = [(w, r) for w, r in zip(weights, rewards) if is_number(r) and math.isfinite(r)]
    found = {"reward": sum(w * r for w, r in given) if given else None}
    names = arguments.get("reward")
    if len(rewards) > 1 and isinstance(names, list):
        found |= dict(zip(map(str, names), rewards))
    return {name: shortened(value) for name, value in found.items()}


def sample_of(line: dict) -> Row | None:
    """A line of samples.jsonl."""
    texts = line.get("prompt"), line.get("completion")
    if not all(isinstance(text, str) for text in texts):
        return None
    about = {n: shortened(v) for n, v in line.items() if n not in ("prompt", "completion", "step")}
    return Row(about, texts=texts)


def cut(row: Row, tokens: int) -> Row:
    """The last of its prompt and the first of its answer: so many tokens of each, or four times as
    many characters."""
    if row.texts:
        prompt, completion = row.texts
        row.cut = max(0, len(prompt) - 4 * tokens), max(0, len(completion) - 4 * tokens)
        row.texts = prompt[row.cut[0] :], completion[: 4 * tokens]
        return row
    row.cut = max(0, row.prompt - tokens), max(0, len(row.ids) - row.prompt - tokens)
    part = slice(row.cut[0], len(row.ids) - row.cut[1])
    row.ids, row.mask, row.prompt = row.ids[part], row.mask[part], row.prompt - row.cut[0]
    row.columns = {name: column[part] for name, column in row.columns.items()}
    return row


def grouped(rows: list[Row], size: int) -> list[list[Row]]:
    """Neighbours of one prompt, at most `size` of them."""
    groups = []
    for row in rows:
        if groups and len(groups[-1]) < size and groups[-1][0].key == row.key:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def paired(rows: list[Row]) -> list[list[Row]]:
    """Of a preference script, which records one of a pair after the other."""
    groups = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    for group in groups:  # what both begin with, before anything is trained
        ids = min((row.ids[: row.prompt] for row in group), key=len)
        same = [row.ids[: len(ids)] == ids for row in group]
        shared = np.logical_and.reduce(same)
        for row in group:
            row.prompt = int(shared.argmin()) if not shared.all() else len(ids)
    return groups


# ------------------------------------------------------------------------------------------ packing
def pack(head: dict, arrays: list[np.ndarray]) -> str:
    """base64 of zlib of: the length of JSON, JSON padded to 8 bytes, and arrays, little-endian."""
    text = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-(len(text) + 4) % 8)
    data = [np.uint32(len(text)).tobytes(), text, *(array.tobytes() for array in arrays)]
    return base64.b64encode(zlib.compress(b"".join(data), 6)).decode()


def packed_groups(groups: list[list[Row]], about: dict) -> str:
    """Ids, then each column once, even if two names have the same, then masks."""
    rows = [row for group in groups for row in group]
    names = dict.fromkeys(name for row in rows for name in row.columns)
    arrays, places = [np.concatenate([row.ids for row in rows])], {}
    for name in names:
        parts = [row.columns.get(name, np.full(len(row.ids), np.nan, np.float32)) for row in rows]
        column = np.concatenate(parts)
        same = [i for i in range(1, len(arrays)) if arrays[i].tobytes() == column.tobytes()]
        places[name] = same[0] if same else len(arrays)
        if not same:
            arrays.append(column)
    head = {"about": about, "columns": places, "groups": list(map(len, groups)), "rows": []}
    for row in rows:
        shown = {"tokens": len(row.ids), "prompt": row.prompt, "cut": row.cut, "about": row.about}
        if row.texts:
            shown["texts"] = row.texts
        head["rows"].append(shown)
    return pack(head, [*arrays, np.concatenate([row.mask for row in rows]).astype(np.uint8)])


def spread(items: list) -> list:
    """In an order in which the first few, however many, are spread evenly: both ends, the middle,
    the quarters, ..."""
    last = len(items) - 1
    order = list(dict.fromkeys([0, last])) if items else []
    spans = [(0, last)]
    for low, high in spans:  # it grows
        middle = (low + high) // 2
        if low < middle < high:
            order.append(middle)
            spans += [(low, middle), (middle, high)]
    return [items[i] for i in order]


class Steps:
    """The rollouts of one run: which steps have some, and one step's, packed."""

    def __init__(self, folder: Path, start: dict, limits: Limits, left_out: Counter):
        self.start, self.limits, self.left_out = start, limits, left_out
        self.records, self.samples = {}, {}  # step -> file, rows
        self.ids = set()  # of all tokens packed
        outside = set()
        for path in folder.glob("records/*.jsonl"):
            if path.stem.isdecimal():
                if self._asked(int(path.stem)):
                    self.records[int(path.stem)] = path
                else:
                    outside.add(int(path.stem))
        path = folder / "samples.jsonl"
        for line in objects(path, left_out) if path.is_file() else []:
            step, row = line.get("step"), sample_of(line)
            if row is None or type(step) is not int:
                left_out["damaged lines of samples.jsonl"] += 1
            elif not self._asked(step):
                outside.add(step)
            elif step not in self.records:
                self.samples.setdefault(step, []).append(cut(row, limits.tokens))
        self.all = sorted({*self.records, *self.samples})
        self.outside = len(outside)

    def _asked(self, step):
        first, last = self.limits.steps
        return first <= step <= last

    def packed(self, step: int) -> tuple[str, Counter]:
        """-> (data, numbers of rollouts: shown, total, cut); "" if nothing of it can be read."""
        arguments, about = self.start["args"], {}
        damage = self.left_out.total()
        rows = self.samples.get(step, [])
        for line in objects(self.records[step], self.left_out) if step in self.records else []:
            if "ids" not in line:
                about = shortened(line)
            elif row := row_of(line, arguments):
                rows.append(row)
            else:
                self.left_out["damaged rows of records/"] += 1
        size = arguments.get("group")
        damage = self.left_out.total() - damage
        if script_of(self.start) in PAIRED and step in self.records:
            # Without one of them, whose partner is whose is not known.
            groups = [[row] for row in rows] if damage else paired(rows)
        else:
            groups = grouped(rows, size if is_number(size) else 1)
        kept = []
        for group in groups:
            if kept and 0 < self.limits.rollouts < sum(map(len, kept)) + len(group):
                break
            kept.append(group)
        shown = [row for group in kept for row in group]
        for row in shown:
            if not row.texts:
                cut(row, self.limits.tokens)
            self.ids.update(row.ids.tolist())
        count = Counter(shown=len(shown), total=len(rows), cut=sum(any(row.cut) for row in shown))
        return packed_groups(kept, about) if kept else "", count


def script_of(start: dict) -> str:
    return Path(str(start.get("command", "")).partition(" ")[0]).name


# -------------------------------------------------------------------------------------------- texts
def tokenizer_of(folder: Path, start: dict) -> Tokenizer | None:
    """That of the trained model, or else of the model that the run began with."""
    for source in (folder, start["args"].get("model")):
        try:
            return Tokenizer.load(str(source))
        except InputError:
            continue
    return None


def texts_of(tokenizer: Tokenizer, ids: set[int]) -> dict[int, str]:
    """What each token adds to a text. One that holds a part of a character is named by its bytes,
    <E2 80>; one that the tokenizer lacks has no entry."""
    before = tokenizer.encode("a")  # some decoders drop a space at the beginning
    start = tokenizer.decode(before)
    letters = byte_letters()
    texts = {}
    for i in sorted(ids):
        name = tokenizer.raw.id_to_token(i) if i >= 0 else None
        if name is None:
            continue
        text = tokenizer.decode([*before, i]).removeprefix(start)
        if "\ufffd" in text and all(letter in letters for letter in name):
            text = f"<{bytes(letters[letter] for letter in name).hex(' ').upper()}>"
        texts[i] = shortened(text)
    return texts


def byte_letters() -> dict[str, int]:
    """The letter by which byte-level BPE writes each byte, as in GPT-2: printable ones write
    themselves, and the others, in order, U+0100 and the letters after it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    named = {chr(byte): byte for byte in printable}
    return named | {chr(256 + i): byte for i, byte in enumerate(others)}


# --------------------------------------------------------------------------------------------- page
def scripts_of(folder: Path, index: int, limits: Limits) -> tuple[dict, list[str], list[str]]:
    """One run -> (what the page says about it, the data elements of its metrics and rollouts,
    sentences about what was left out). limits.size: bytes of this run."""
    starts = starts_of(folder)
    if not starts or not isinstance(starts[-1]["args"], dict):
        hint = hf.inside(folder, "run.json") or "give the --out of a run"
        raise InputError(f"{folder} holds no run: it has no run.json that can be read; {hint}.")
    start, left_out = starts[-1], Counter()
    steps, columns, broken = metrics_of(folder, left_out)
    run = {"name": str(folder), "script": script_of(start), "starts": len(starts)}
    run |= {
        "lines": len(steps),
        "start": shortened(start),
        "alarms": alarms_of(folder, left_out),
        "broken": broken,
    }
    metrics = pack({"metrics": list(columns)}, [steps, *columns.values()])
    elements = [element(f"metrics-{index}", metrics)]
    rollouts = Steps(folder, start, limits, left_out)
    used, shown, count, reached = len(metrics), [], Counter(), False
    for step in spread(rollouts.all):
        data, found = rollouts.packed(step)
        reached = used + len(data) > limits.size and bool(shown)
        if reached:
            break
        if data:
            used += len(data)
            shown.append(step)
            count += found
            elements.append(element(f"step-{index}-{step}", data))
    tokenizer = tokenizer_of(folder, start) if rollouts.ids else None
    sentences = [f"{what}, left out: {count:,}" for what, count in left_out.items()]
    if rollouts.ids and not tokenizer:
        sentences.append(
            f"neither {folder} nor {start['args'].get('model')} has a tokenizer that can be read: "
            "tokens are shown by their ids"
        )
    if reached:
        sentences.append(
            f"{len(shown):,} of {len(rollouts.all):,} steps have their rollouts in this page of "
            f"{limits.size / 1e6:g} MB (--steps A:B chooses them, --max_mb allows more)"
        )
    if rollouts.outside:
        sentences.append(f"{rollouts.outside:,} steps outside --steps have rollouts, too")
    if count["shown"] < count["total"]:
        sentences.append(
            f"{count['shown']:,} of {count['total']:,} rollouts of these steps are in it "
            f"(--rollouts {limits.rollouts}; 0: all)"
        )
    if count["cut"]:
        sentences.append(
            f"{count['cut']:,} rollouts are cut to {limits.tokens:,} tokens of their prompt "
            "and of their answer (--max_tokens)"
        )
    run |= {"steps": sorted(shown), "left_out": sentences}
    texts = texts_of(tokenizer, rollouts.ids) if tokenizer else {}
    run |= {"texts": texts, "special": sorted(tokenizer.special.values()) if tokenizer else []}
    return run, elements, sentences


def element(name: str, data: str) -> str:
    return f'<script type="text/plain" id="{name}">{data}</script>\n'


def page(folders: list[Path], limits: Limits) -> tuple[str, list[str]]:
    """-> (HTML, sentences about what was left out). limits.size is shared by the runs. InputError
    for a folder without a run."""
    share = Limits(limits.steps, limits.rollouts, limits.tokens, limits.size / len(folders))
    runs, elements, sentences = [], [], []
    for index, folder in enumerate(folders):
        run, found, left_out = scripts_of(folder, index, share)
        runs.append(run)
        elements += found
        sentences += [f"{folder}: {sentence}" for sentence in left_out]
    elements.append(element("page", pack({"runs": runs}, [])))
    html = TEMPLATE.read_text(encoding="utf-8")
    for kind in ("style", "script"):  # the page may run these, and nothing else
        (text,) = re.findall(f"<{kind}>(.*?)</{kind}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        html = html.replace(f"{kind.upper()}_HASH", f"sha256-{digest}")
    return html.replace("<!-- data -->\n", "".join(elements)), sentences


# ------------------------------------------------------------------------------------------ command
def span(text: str) -> tuple[float, float]:
    """An argparse type: A:B, A:, :B or A -> the first and the last step."""
    first, colon, last = text.partition(":")
    try:
        low = int(first) if first or not colon else -math.inf
        high = int(last) if last else math.inf if colon else low
    except ValueError:
        high, low = 0, 1
    if high < low:
        raise argparse.ArgumentTypeError(f"{text}: give steps as A:B, A:, :B or A")
    return low, high


def parsed(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder, its --out")
    add(
        "--out",
        metavar="FILE",
        help="default: page.html in RUN; of several, in the folder of all",
    )
    add(
        "--steps",
        type=span,
        default=(-math.inf, math.inf),
        metavar="A:B",
        help="steps whose rollouts are shown; default: all that fit",
    )
    add("--rollouts", type=at_least(0), default=64, help="rollouts of a step, whole groups; 0: all")
    add("--max_tokens", type=at_least(1), default=1024, help="of a prompt, and of an answer")
    add("--max_mb", type=above(0.0), default=32.0, help="size of the page, about")
    return parser.parse_args(arguments)


def _begins_with(path, start) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(start)) == start
    except OSError:  # a folder
        return False


def main(arguments=None):
    args = parsed(arguments)
    folders = [Path(folder) for folder in dict.fromkeys(args.runs)]
    out = Path(args.out or place(folders, "page.html"))
    first = TEMPLATE.read_text(encoding="utf-8").partition("\n")[0]
    if out.exists() and not _begins_with(out, first.encode()):
        raise InputError(f"--out {out} exists and is no page of a run: choose another.")
    limits = Limits(args.steps, args.rollouts, args.max_tokens, args.max_mb * 1e6)
    html, sentences = page(folders, limits)
    if out.exists() and (args.out or len(folders) > 1):
        say(f"replaces {out}, which was there")
    try:
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}: choose another.") from error
    say("\n".join(sentences))
    say(f"{out}: {len(html) / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    command(main)
