"""The page of a run: what it holds, what it leaves out, and how it behaves in a browser.

Its data is read back by a few lines of struct and zlib, written from the format in page.py's
docstrings. What a browser does is tested in Chromium where there is one.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import struct
import sys
import tomllib
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser
from chats import make, raw_bytes
from scripts import ROOT
from small import small_model
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers

from nanopost import InputError, dist, optim
from nanopost import page as pages
from nanopost.batch import Example
from nanopost.dist import World
from nanopost.page import Limits, main, page, span, spread, texts_of
from nanopost.rollout import Rollout, sample_records
from nanopost.run import Run
from nanopost.tape import Tape
from nanopost.tokenizer import Tokenizer

EVIL = (
    "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
    "<!-- <svg onload=alert(3)> --> \x1b[31m\u202egnp.exe\u2066 ${window.ran = 4} &lt;b&gt;"
)


# --------------------------------------------------------------------------------- runs, as written
@pytest.fixture
def begin(alone, tmp_path, monkeypatch):
    """name, script, flags -> a real Run that has begun in tmp_path / name."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    runs = []

    def start(name, script="train_grpo.py", **flags):
        out = tmp_path / name
        monkeypatch.setattr(sys, "argv", [script, "--out", str(out)])
        arguments = {"model": "nowhere", "seed": 7, "group": 2, "out": str(out), **flags}
        run = Run(out, World(0, 1, torch.device("cpu"), torch.float32), 9, arguments, [])
        model = small_model(0)
        run.start(model, optim.adamw(model, 0.0), {"step": 0}, False, False, {})
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.lock.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    dist.last_words = None


def rollouts(step, prompts=2, group=2, length=5):
    """Groups of one prompt each."""
    draw = np.random.default_rng(step)
    found = []
    for _ in range(prompts):
        prompt = draw.integers(3, 200, 4).tolist()
        for _ in range(group):
            ids = draw.integers(3, 200, length).tolist()
            logp = -draw.random(length).astype(np.float32)
            found.append(Rollout(prompt, ids, logp, "stop", step - 1))
    return found


def examples_of(rolled, seed=0):
    draw = np.random.default_rng(seed)
    """With the columns that a trainer adds, of random numbers."""
    found = [rollout.example() for rollout in rolled]
    for e in found:
        e.columns["old_logp"] = e.columns["engine_logp"]
        noise = draw.normal(0, 0.1, len(e)).astype(np.float32)
        e.columns["logp"] = (e.columns["old_logp"] + noise) * e.mask
        e.columns["entropy"] = draw.random(len(e)).astype(np.float32) * e.mask
        e.columns["adv"] = float(draw.normal()) * e.mask
    return found


def grpo(begin, name="grpo", steps=4, tokenizer=True, **flags):
    """-> (folder, step -> its examples)."""
    run = begin(name, reward=["exact"], **flags)
    run.log(0, {"eval/accuracy": 0.25})
    written = {}
    for step in range(1, steps + 1):
        numbers = {"reward": step / 2, "kl": 0.1 * step, "time/train": 1.0}
        run.log(step, numbers | ({"eval/accuracy": 0.5} if step == steps else {}))
        rolled = rollouts(step)
        written[step] = examples_of(rolled, step)
        rewards = [[float(i)] for i in range(len(rolled))]
        finish = ["length", *["stop"] * (len(rolled) - 1)]
        run.record(
            step, written[step], {"divisors": [3.0]}, Tape(False), rewards=rewards, finish=finish
        )
    if tokenizer:
        raw_bytes(("<|user|>", "<|end|>")).save(str(run.out / "tokenizer.json"))
        (run.out / "tokenizer_config.json").write_text("{}")
    return run.out, written


# ------------------------------------------------------------------------------------ read it back
def elements(html) -> dict[str, str]:
    return dict(re.findall(r'<script type="text/plain" id="([\w-]+)">([\w+/=]*)</script>', html))


def read(html, name) -> tuple[dict, bytes]:
    raw = zlib.decompress(base64.b64decode(elements(html)[name]))
    (size,) = struct.unpack_from("<I", raw)
    return json.loads(raw[4 : 4 + size]), raw[4 + size :]


def read_step(html, run, step):
    """-> (head, ids of all rows, columns by name, mask)."""
    head, body = read(html, f"step-{run}-{step}")
    total = sum(row["tokens"] for row in head["rows"])
    count = len(set(head["columns"].values())) + 1
    ids = np.frombuffer(body, "<i4", total)
    floats = np.frombuffer(body, "<f4", count * total).reshape(count, total)
    columns = {name: floats[place] for name, place in head["columns"].items()}
    return head, ids, columns, np.frombuffer(body, "u1", total, 4 * count * total)


def about(html, run=0):
    return read(html, "page")[0]["runs"][run]


def test_the_template_is_shipped_with_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["package-data"]["nanopost"] == [pages.TEMPLATE.name]
    assert pages.TEMPLATE.is_file()


# ------------------------------------------------------------------------------------ what it holds
def test_the_page_holds_every_number_of_metrics_and_records(begin):
    folder, written = grpo(begin)
    html, sentences = page([folder], Limits())
    assert sentences == []
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    head, body = read(html, "metrics-0")
    table = np.frombuffer(body, "<f8").reshape(1 + len(head["metrics"]), len(lines))
    assert table[0].tolist() == [line["step"] for line in lines]
    assert set(head["metrics"]) == {"eval/accuracy", "reward", "kl", "time/train", "time/elapsed"}
    for name, row in zip(head["metrics"], table[1:]):
        for value, line in zip(row.tolist(), lines):
            assert value == line[name] if name in line else np.isnan(value)
    for step, examples in written.items():
        head, ids, columns, mask = read_step(html, 0, step)
        assert head["groups"] == [2, 2] and head["about"]["divisors"] == [3.0]
        assert ids.tolist() == np.concatenate([e.ids for e in examples]).tolist()
        assert mask.tolist() == np.concatenate([e.mask for e in examples]).tolist()
        assert columns.keys() == examples[0].columns.keys()
        for name, column in columns.items():
            expected = np.concatenate([e.columns[name] for e in examples]).astype(np.float32)
            assert column.tobytes() == expected.tobytes(), name
        assert [row["prompt"] for row in head["rows"]] == [4] * 4
        assert [row["about"]["reward"] for row in head["rows"]] == [0.0, 1.0, 2.0, 3.0]
        assert head["rows"][0]["about"]["finish"] == "length"
    assert head["columns"]["old_logp"] == head["columns"]["engine_logp"]  # held once


def test_it_says_what_ran(begin):
    folder, _ = grpo(begin, lr=0.25)
    (folder / "alarms.jsonl").write_text(
        '{"step": 3, "alarm": "kl", "since": 2, "message": "it explodes"}\n'
    )
    found = about(page([folder], Limits())[0])
    assert found["script"] == "train_grpo.py" and found["start"]["ranks"] == 1
    assert found["start"]["args"]["lr"] == 0.25 and found["start"]["torch"] == torch.__version__
    assert found["alarms"] == [{"step": 3, "alarm": "kl", "since": 2, "message": "it explodes"}]
    assert found["steps"] == [1, 2, 3, 4]


def test_rewards_are_named_and_weighed(begin):
    run = begin("weighed", reward=["exact", "format"], reward_weights=[1.0, 0.5])
    run.log(1, {"reward": 1.0})
    rewards = [[1.0, 1.0], [1.0, float("nan")], [float("nan")] * 2, [0.0, 1.0]]
    run.record(1, examples_of(rollouts(1)), {}, Tape(False), rewards=rewards)
    rows = read_step(page([run.out], Limits())[0], 0, 1)[0]["rows"]
    assert [row["about"]["reward"] for row in rows] == [1.5, 1.0, None, 0.5]
    assert [row["about"]["format"] for row in rows] == [1.0, None, None, 1.0]


def test_neighbours_of_one_prompt_are_a_group_of_at_most_group(begin):
    run = begin("groups", group=2)
    run.log(1, {"reward": 1.0})
    one, other = rollouts(1, 1, 3), rollouts(2, 1, 1)
    run.record(1, [r.example() for r in [*one, *other, one[0]]], {}, Tape(False))
    assert read_step(page([run.out], Limits())[0], 0, 1)[0]["groups"] == [2, 1, 1, 1]


@pytest.mark.parametrize("script", ["train_dpo.py", "train_rm.py", "train_kto.py"])
def test_pairs_are_side_by_side_after_what_both_begin_with(begin, script):
    run = begin("pairs", script)
    run.log(1, {"loss": 1.0})
    chosen = Example([5, 6, 7, 8, 9], [0, 0, 0, 1, 1], {"weight": np.ones(5)})
    rejected = Example([5, 6, 7, 8], [0, 0, 1, 1], {"weight": np.ones(4)})
    run.record(1, [chosen, rejected, rejected, chosen], {}, Tape(False), score=[4.0, 3.0, 2.0, 1.0])
    head, ids, _, _ = read_step(page([run.out], Limits())[0], 0, 1)
    assert head["groups"] == [2, 2] and ids.tolist() == [5, 6, 7, 8, 9, 5, 6, 7, 8] + [
        *[5, 6, 7, 8],
        *[5, 6, 7, 8, 9],
    ]
    assert [row["prompt"] for row in head["rows"]] == [2, 2, 2, 2]
    assert [row["about"]["score"] for row in head["rows"]] == [4.0, 3.0, 2.0, 1.0]
    # Without one of them the others are no pairs.
    path = run.out / "records/000001.jsonl"
    first, one, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, one[:20] + "\n", *others]))
    assert read_step(page([run.out], Limits())[0], 0, 1)[0]["groups"] == [1, 1, 1]


def test_a_token_without_a_number_has_none(begin):
    run = begin("null")
    run.log(1, {"reward": 1.0})
    (rollout, skipped) = examples_of(rollouts(1, 1, 2, 2), 1)
    skipped.columns["logp"] = np.array([None] * 6)
    run.record(1, [rollout, skipped], {}, Tape(False))
    _, _, columns, _ = read_step(page([run.out], Limits())[0], 0, 1)
    assert np.isnan(columns["logp"]).tolist() == [False] * 6 + [True] * 6


def test_a_list_of_a_row_is_no_column_even_if_it_is_as_long(begin):
    run = begin("lists")
    run.log(1, {"loss": 1.0})
    lists = {"rewards": [[1.0, 2.0]], "minibatch": [[0, 3]], "micro_batch": [[0, 1]]}
    run.record(1, [Example([5, 6], [0, 1], {"weight": np.ones(2)})], {}, Tape(False), **lists)
    head, *_ = read_step(page([run.out], Limits())[0], 0, 1)
    assert head["columns"].keys() == {"weight"}
    assert head["rows"][0]["about"]["minibatch"] == [0, 3]


def test_turns_of_the_environment_are_part_of_the_answer(begin):
    run = begin("turns")
    run.log(1, {"reward": 1.0})
    (rollout, second) = rollouts(1, 1, 2, 3)
    rollout.extend([70, 71], second)
    run.record(1, [rollout.example()], {}, Tape(False))
    head, _, _, mask = read_step(page([run.out], Limits())[0], 0, 1)
    assert mask.tolist() == [0] * 4 + [1] * 3 + [0] * 2 + [1] * 3 and head["rows"][0]["prompt"] == 4


def test_without_records_samples_are_shown_as_text(begin):
    run, tokenizer = begin("texts"), make()
    for step in (1, 2):
        run.log(step, {"reward": 1.0})
        numbers = {"reward": torch.tensor([0.5, float("nan")])}
        run.samples(step, sample_records(tokenizer.decode, rollouts(step, 1), **numbers))
    html, sentences = page([run.out], Limits())
    head, _ = read(html, "step-0-2")
    assert sentences == [] and head["groups"] == [2]
    expected = rollouts(2, 1)
    texts = [[tokenizer.decode(r.prompt), tokenizer.decode(r.ids)] for r in expected]
    assert [row["texts"] for row in head["rows"]] == texts
    assert [row["about"] for row in head["rows"]] == [
        {"finish": "stop", "reward": 0.5},
        {"finish": "stop", "reward": None},
    ]


# ------------------------------------------------------------------------------------------- tokens
def metaspace():
    """Like Llama 2: a space begins a word, and the first is stripped; bytes stand for the rest."""
    pieces = ["<unk>", "▁", "▁a", "▁ab", "b", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw = Raw(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], 0, True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return Tokenizer(raw, {}, None)


TEXT = "ab a ba  a\tb\n\nab <|end|> a"


def check_texts(tokenizer, text):
    ids = tokenizer.encode(text)
    texts = texts_of(tokenizer, set(ids))
    assert "".join(texts[i] for i in ids).removeprefix(" ") == tokenizer.decode(ids).lstrip(" ")


@pytest.mark.parametrize("tokenizer", [make(merges=[("Ġ", "a"), ("Ċ", "Ċ")]), metaspace()])
def test_the_texts_of_tokens_are_together_the_text(tokenizer):
    check_texts(tokenizer, TEXT.replace("\t", "").replace("\n", "") if tokenizer.eos_id else TEXT)


@pytest.mark.parametrize("name", ["qwen2.5", "gpt2", "tiny_llama3", "minimind"])
def test_the_texts_of_real_tokens_are_together_the_text(real, name):
    check_texts(real(name)[0], TEXT + " Natalia sold 48/2 = <<48/2=24>>24 clips, isn't it?")


def test_a_part_of_a_character_is_named_by_its_bytes():
    tokenizer = make()
    ids = tokenizer.encode("é🎉")
    texts = texts_of(tokenizer, {*ids, 10**6, -1})
    parts = " ".join(f"<{byte:02X}>" for byte in "é🎉".encode())
    assert " ".join(texts[i] for i in ids) == parts and texts.keys() == set(ids)


def test_without_a_tokenizer_it_says_that_ids_are_shown(begin):
    folder, _ = grpo(begin, tokenizer=False)
    html, sentences = page([folder], Limits())
    assert len(sentences) == 1 and "nowhere has a tokenizer" in sentences[0]
    assert about(html)["texts"] == {}


def test_the_tokenizer_is_that_of_the_model_until_the_run_has_ended(begin, tmp_path):
    raw_bytes().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    folder, written = grpo(begin, tokenizer=False, model=str(tmp_path))
    html, sentences = page([folder], Limits())
    expected = {int(i) for examples in written.values() for e in examples for i in e.ids}
    assert sentences == [] and {int(i) for i in about(html)["texts"]} == expected


# ------------------------------------------------------------------------------------------- limits
def test_what_is_left_out_is_counted_and_said(begin):
    folder, _ = grpo(begin)
    html, sentences = page([folder], Limits(rollouts=2, tokens=3))
    assert ["8 of 16 rollouts" in s or "8 rollouts are cut to 3" in s for s in sentences] == [
        True,
        True,
    ]
    head, ids, columns, mask = read_step(html, 0, 1)
    (first, second) = examples_of(rollouts(1), 1)[:2]
    assert head["groups"] == [2] and [row["cut"] for row in head["rows"]] == [[1, 2], [1, 2]]
    assert ids.tolist() == [*first.ids[1:7], *second.ids[1:7]]  # 3 of the prompt, 3 of the answer
    assert mask.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert columns["logp"][:6].tolist() == first.columns["logp"][1:7].tolist()


def test_steps_are_chosen(begin):
    folder, _ = grpo(begin)
    html, sentences = page([folder], Limits(steps=span("2:3")))
    assert about(html)["steps"] == [2, 3] and len(read(html, "metrics-0")[0]["metrics"]) == 5
    assert [s.partition(": ")[2] for s in sentences] == [
        "2 steps outside --steps have rollouts, too"
    ]


def test_the_page_keeps_to_its_size_and_says_how_many_steps_fit(begin):
    folder, _ = grpo(begin, steps=9)
    whole, _ = page([folder], Limits())
    fixed = len(elements(whole)["metrics-0"])
    step = max(len(data) for name, data in elements(whole).items() if name.startswith("step"))
    html, sentences = page([folder], Limits(size=fixed + 3 * step))
    assert about(html)["steps"] == [1, 5, 9] and "3 of 9 steps" in sentences[0]
    assert len(sentences) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 100])
def test_the_first_few_of_any_number_are_spread_evenly(count):
    order = spread(list(range(count)))
    assert sorted(order) == list(range(count))
    for few in (2, 3, 5, 9, 17, 33):
        gaps = np.diff(sorted(order[:few]))
        assert few > count or gaps.max() <= 2 * gaps.min() + 1


@pytest.mark.parametrize(
    "text, expected",
    [("3:5", (3, 5)), ("3:", (3, np.inf)), (":5", (-np.inf, 5)), ("4", (4, 4))],
)
def test_a_span_of_steps(text, expected):
    assert span(text) == expected


def test_long_metrics_are_thinned_and_keep_the_held_out_numbers(begin, monkeypatch):
    monkeypatch.setattr(pages, "POINTS", 10)
    run = begin("long")
    rows = [{"step": i, "loss": i} | ({"eval/loss": i} if i % 7 == 0 else {}) for i in range(100)]
    (run.out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html, sentences = page([run.out], Limits())
    kept = {i for i in range(100) if i % 10 == 0 or i % 7 == 0} | {99}
    steps = np.frombuffer(read(html, "metrics-0")[1], "<f8")[: len(kept)].tolist()
    assert steps == sorted(kept)
    assert f"lines of metrics.jsonl (100 in all), left out: {100 - len(kept)}" in sentences[0]


# ------------------------------------------------------------------------------------------- damage
def test_damaged_lines_are_counted(begin, monkeypatch):
    monkeypatch.setattr(pages, "LINE", 2000)
    folder, _ = grpo(begin)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"step": "x"}\n{"step": 5, "reward": NaN, "kl": "high"}\n{"step": 6, "rew')
    with open(folder / "records/000002.jsonl", "a") as file:
        file.write('{"ids": [1, 2], "mask": [1]}\n{"ids": "1", "mask": [1]}\n')
        file.write('{"ids": [99999999999], "mask": [1]}\n' + '{"ids": "' + "x" * 9000 + '"}\n')
    (folder / "records/000003.jsonl").write_bytes(b"\xff\xfe" + b"[" * 1500 + b"\n\n")
    html, sentences = page([folder], Limits())
    assert sorted(s.partition(": ")[2] for s in sentences) == [
        "damaged lines of metrics.jsonl, left out: 2",
        "damaged lines of records/, left out: 2",
        "damaged rows of records/, left out: 3",
        "lines of records/ over 0 MiB, left out: 1",
        "values of metrics.jsonl that are no numbers, left out: 1",
    ]
    assert about(html)["steps"] == [1, 2, 4] and about(html)["broken"] == {"reward": [5]}
    assert read_step(html, 0, 2)[0]["groups"] == [2, 2]


def test_each_mistake_gets_a_sentence(begin, tmp_path):
    folder, _ = grpo(begin)
    other = begin("other").out
    with pytest.raises(InputError, match="no whole line yet"):
        main([str(other)])
    (other / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="has no metrics.jsonl"):
        main([str(other)])
    with pytest.raises(InputError, match=f"holds no run.*; {folder} and {other} do.$"):
        main([str(tmp_path)])
    with pytest.raises(InputError, match="holds no run.*; give the --out of a run.$"):
        main([str(folder), str(tmp_path / "nowhere")])
    (other / "run.json").write_text('[{"args": 3}]')
    with pytest.raises(InputError, match="holds no run"):
        main([str(other)])
    for out in (folder / "run.json", folder):
        with pytest.raises(InputError, match="is no page of a run: choose another"):
            main([str(folder), "--out", str(out)])
    with pytest.raises(InputError, match="No such file or directory"):
        main([str(folder), "--out", str(tmp_path / "no/page.html")])
    for bad in ("5:3", "a", ":"[1:] + "3:b"):
        with pytest.raises(SystemExit):
            main([str(folder), "--steps", bad])
    assert not list(folder.glob("*.html"))


def names_in(page):
    return [run["name"] for run in read(page.read_text(), "page")[0]["runs"]]


def test_the_page_of_a_run_is_in_it_and_that_of_several_in_the_folder_of_all(begin, capsys):
    folder, _ = grpo(begin, "one\x1b[31m")
    other, _ = grpo(begin, "two")
    for _ in range(2):  # again over its own page
        main([str(folder), "--rollouts", "1"])
        said = capsys.readouterr().out
        assert "\x1b" not in said and "8 of 16 rollouts" in said
        assert "page.html: 0.1 MB" in said and "replaces" not in said
    both = folder.parent / "page.html"
    for again in (False, True):
        main([str(folder), str(other), str(folder)])
        replaced = f"replaces {both}, which was there\n" in capsys.readouterr().out
        assert replaced == again
    assert names_in(folder / "page.html") == [str(folder)]
    assert names_in(both) == [str(folder), str(other)]
    main([str(other), "--out", str(folder / "page.html")])
    assert "page.html, which was there\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- safety
def hostile(begin):
    """A run whose every text is hostile."""
    run = begin("evil", reward=[EVIL], chat_template=EVIL)
    run.log(1, {"reward": 1.0, EVIL: 2.0, "constructor": 1.0, "__proto__": 1.0})
    run.record(
        1,
        examples_of(rollouts(1)),
        {EVIL: EVIL},
        Tape(False),
        finish=[EVIL] * 4,
        **{EVIL: [1.0] * 4},
    )
    run.log(2, {"reward": 1.0, EVIL: 3.0})
    row = {"prompt": EVIL, "completion": EVIL, "finish": EVIL, EVIL: 1.0}
    run.samples(2, [row, row])
    alarm = {"step": 1, "alarm": EVIL, "since": 0, "message": EVIL + "\ud800"}
    (run.out / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    raw = raw_bytes((EVIL, "\u202e", "<|end|>"))
    raw.save(str(run.out / "tokenizer.json"))
    (run.out / "tokenizer_config.json").write_text("{}")
    starts = json.loads((run.out / "run.json").read_text())
    starts[-1]["git"] = EVIL
    (run.out / "run.json").write_text(json.dumps(starts))
    return run.out


def test_nothing_of_a_run_is_in_the_markup_and_the_policy_allows_the_page_alone(begin):
    html, _ = page([hostile(begin)], Limits())
    bare = re.sub(r'<script type="text/plain" id="[\w-]+">[\w+/=]*</script>\n', "", html)
    template = (Path(pages.__file__).parent / "page.html").read_text()
    for kind in ("style", "script"):
        (text,) = re.findall(f"<{kind}>(.*?)</{kind}>", template, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        template = template.replace(f"{kind.upper()}_HASH", f"sha256-{digest}")
    assert bare == template.replace("<!-- data -->\n", "")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', bare)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "*" not in policy and "HASH" not in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", bare)
    assert not re.search(r"\son\w+=|style=|src=|https?://(?!www\.w3\.org/2000/svg)", bare)


def test_gigabytes_are_cut(begin):
    run = begin("long")
    run.log(1, {"reward": 1.0})
    run.samples(1, [{"prompt": "a" * 5_000_000 + "end", "completion": "b" * 5_000_000}] * 3)
    (run.out / "alarms.jsonl").write_text(json.dumps({"step": 1, "message": "c" * 5_000_000}))
    html, sentences = page([run.out], Limits())
    row = read(html, "step-0-1")[0]["rows"][0]
    assert row["cut"] == [5_000_003 - 4096, 5_000_000 - 4096]
    assert row["texts"] == ["a" * 4093 + "end", "b" * 4096] and len(html) < 2e5
    assert "3 rollouts are cut" in sentences[0] and "4,980,000 more" in str(about(html)["alarms"])


# ---------------------------------------------------------------------------------------- a browser
needs_chromium = pytest.mark.skipif(
    not os.path.exists(CHROMIUM), reason=f"no Chromium at {CHROMIUM}"
)
SIZES = {"desktop": (1440, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def written(folders, path, limits=None):
    path.write_text(page(folders, limits or Limits())[0], encoding="utf-8")
    return path


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_renders_without_a_problem_at_any_width(begin, chrome, tmp_path, size, dark):
    runs = [grpo(begin, name)[0] for name in ("one", "two")]
    chrome.open(written(runs, tmp_path / "page.html"), *SIZES[size], dark)
    assert chrome.problems() == []
    assert chrome.run("document.documentElement.scrollWidth") == SIZES[size][0]
    assert chrome.run("document.querySelectorAll('svg path.curve').length") == 6
    assert chrome.run("document.querySelectorAll('.card').length") == 4
    background = chrome.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark


@needs_chromium
def test_a_thousand_steps_and_ten_thousand_rollouts_take_less_than_two_seconds(
    begin, chrome, tmp_path
):
    run = begin("long")
    draw = np.random.default_rng(0)
    walk = draw.normal(0, 1, (1000, 30)).cumsum(0)
    with open(run.out / "metrics.jsonl", "w") as file:
        for step, row in enumerate(walk.tolist(), 1):
            names = ["reward", "kl", "entropy", *(f"other/{i}" for i in range(27))]
            file.write(json.dumps({"step": step, **dict(zip(names, row))}) + "\n")
    for step in range(1, 5):
        run.record(
            step, examples_of(rollouts(step, 5, 2, 40), step), {}, Tape(False), rewards=[[1.0]] * 10
        )
    for step in range(5, 1001):
        shutil.copy(
            run.out / f"records/{step % 4 + 1:06d}.jsonl", run.out / f"records/{step:06d}.jsonl"
        )
    path = written([run.out], tmp_path / "page.html")
    assert len(about(path.read_text())["steps"]) == 1000
    assert chrome.open(path) < 2
    ready = chrome.run("performance.getEntriesByName('ready')[0].startTime")
    assert ready < 2000 and chrome.problems() == []
    # An answer is drawn: another step, a colour, smoothing and all curves.
    act = """(async () => {
        const began = performance.now();
        await %s;
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
        return performance.now() - began; })()"""
    unfold = "document.querySelectorAll('details').forEach(each => each.open = true)"
    smooth = "(state.smoothing = .9, drawCharts())"
    for action in ("select(500)", "move(-10)", unfold, smooth, "hover(300)"):
        assert chrome.run(act % action) < 2000, action
    assert chrome.run("state.step") == 490
    assert chrome.run("document.querySelectorAll('svg path.curve').length") == 30


@needs_chromium
def test_planted_markup_is_text(begin, chrome, tmp_path):
    path = written([hostile(begin)], tmp_path / "page.html")
    chrome.open(path, *SIZES["phone"])
    assert chrome.run("document.documentElement.scrollWidth") == SIZES["phone"][0]
    for step in (1, 2):
        chrome.run(f"select({step})")
        chrome.run("document.querySelectorAll('details').forEach(each => each.open = true)")
        hosts = "document.querySelectorAll('img, script:not([type]), iframe, b:not(.head b)')"
        assert chrome.run(f"{hosts}.length") == 1  # the page's own script
        text = chrome.run("document.body.innerText")
        assert "<img src=x onerror='window.ran = 2'>" in text
        assert "\\u{1b}[31m\\u{202e}gnp.exe\\u{2066}" in text
        assert not re.search("[\x1b\u202e\u2066]", text)
    assert "\\u{1b}" in chrome.run("document.body.textContent")
    assert chrome.problems() == [] and chrome.run("typeof window.ran") == "undefined"
    # Even markup that got in would not run.
    planted = '<img src=x onerror="window.ran = 5"><script>window.ran = 6</script>'
    chrome.run(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(planted)})")
    chrome.run("new Promise(done => setTimeout(done, 100))")
    assert chrome.run("typeof window.ran") == "undefined"
    assert any("Content Security Policy" in problem for problem in chrome.problems())


def centre(chrome, selector, index=0):
    chrome.run(f"document.querySelectorAll('{selector}')[{index}].scrollIntoView()")
    x, y, width, height = chrome.run(
        f"(box => [box.x, box.y, box.width, box.height])"
        f"(document.querySelectorAll('{selector}')[{index}].getBoundingClientRect())"
    )
    return x + width / 2, y + height / 2


@needs_chromium
def test_pointer_and_keys(begin, chrome, tmp_path):
    runs = [grpo(begin, name, group=2)[0] for name in ("one", "two")]
    examples = examples_of(rollouts(4), 4)
    chrome.open(written(runs, tmp_path / "page.html"))
    shown = "document.getElementById('step').textContent"
    assert chrome.run(shown) == "step 4"
    for key, step in [("ArrowLeft", 3), ("Home", 1), ("ArrowLeft", 1), ("End", 4)]:
        chrome.key(key)
        assert chrome.run(shown) == f"step {step}"
    chrome.click(*centre(chrome, "svg"))  # the middle of steps 0 to 4, and of a margin
    assert chrome.run(shown) == "step 2"
    chrome.key("End")
    # In an answer, arrows go from token to token.
    chrome.run("document.querySelector('.card .tokens').focus()")
    for _ in range(3):
        chrome.key("ArrowRight")
    assert chrome.run("pointed === document.querySelectorAll('.card .t')[2]")
    assert chrome.run(shown) == "step 4"
    chrome.key("Escape")
    assert chrome.run("document.getElementById('inspector').hidden")
    # A hovered token shows its numbers.
    chrome.mouse("mouseMoved", *centre(chrome, ".card .t", 2))
    text = chrome.run("document.getElementById('inspector').innerText")
    e = examples[0]
    numbers = dict(zip(text.split("\n")[1::2], text.split("\n")[2::2]))
    numbers = {name: value.replace("−", "-") for name, value in numbers.items()}
    assert numbers["id"] == str(e.ids[6]) and numbers["position"] == "6"
    ratio = np.exp(e.columns["logp"][6] - e.columns["old_logp"][6])
    drift = e.columns["logp"][6] - e.columns["engine_logp"][6]
    expected = {"logp": e.columns["logp"][6], "entropy": e.columns["entropy"][6]}
    for name, value in {**expected, "ratio": ratio, "logp − engine_logp": drift}.items():
        assert float(numbers[name]) == pytest.approx(float(value), abs=6e-4), name
    # Only trained tokens are coloured; above 1, the ratio is blue, and below it orange.
    chrome.run("(state.colour = 'ratio', showColours(), repaint())")
    colours = chrome.run("[...document.querySelectorAll('.t')].map(t => t.style.backgroundColor)")
    masked = chrome.run("[...document.querySelectorAll('.t')].map(t => t.matches('.masked'))")
    assert masked == ([True] * 4 + [False] * 10) * 2
    ratios = np.concatenate(
        [np.exp(e.columns["logp"] - e.columns["old_logp"])[4:] for e in examples]
    )
    found = [colour for colour, is_masked in zip(colours, masked) if not is_masked]
    for colour, ratio in zip(found, ratios):
        red, _, blue = map(int, re.findall(r"\d+", colour)[:3])
        assert (blue > red) == (ratio > 1)
    assert not any(colour for colour, is_masked in zip(colours, masked) if is_masked)
    # A run is switched off by its legend.
    chrome.click(*centre(chrome, ".chip"))
    assert chrome.run("document.querySelectorAll('svg path.curve').length") == 3
    assert chrome.problems() == []


@needs_chromium
def test_only_flags_that_may_change_the_result_differ(begin, chrome, tmp_path):
    runs = []
    for name, device, lr in [("one", "auto", 1.0), ("two", "cpu", 2.0)]:
        silent = {"overwrite": name == "one", "save_every": len(runs), "record": name == "two"}
        runs.append(grpo(begin, name, device=device, lr=lr, **silent)[0])
    path = runs[0] / "run.json"
    starts = json.loads(path.read_text())
    starts[-1]["hardware"].pop("gpu", None)
    path.write_text(json.dumps(starts))
    cells = "[...document.querySelectorAll('#differences td')].map(each => each.textContent)"
    chrome.open(written(runs, tmp_path / "page.html"))
    named = ["", *map(str, runs)]
    assert chrome.run(cells) == [*named, "--lr", "1", "2"]
    starts[-1]["hardware"]["gpu"] = "H100"
    path.write_text(json.dumps(starts))
    chrome.open(written(runs, tmp_path / "page.html"))
    assert chrome.run(cells) == [*named, "--device", "cuda", "cpu", "--lr", "1", "2"]


@needs_chromium
def test_without_rollouts_there_is_no_slider_and_a_sentence(begin, chrome, tmp_path):
    run = begin("sft", "train_sft.py")
    for step in (1, 2):
        run.log(step, {"loss": 1.0 / step})
    chrome.open(written([run.out], tmp_path / "page.html"))
    assert chrome.run("document.getElementById('slider').checkVisibility()") is False
    assert "--record" in chrome.run("document.getElementById('groups').innerText")
    other, _ = grpo(begin)
    chrome.open(written([run.out, other], tmp_path / "page.html"))
    assert chrome.run("document.getElementById('slider').checkVisibility()") is True
    assert chrome.problems() == []


@needs_chromium
@pytest.mark.parametrize("group", [1, 2])
def test_rollouts_have_the_answer_of_their_row(begin, chrome, tmp_path, group):
    run = begin("answers", group=group)
    run.log(1, {"reward": 1.0})
    rolled = rollouts(1, 1, 2)
    for rollout in rolled:
        rollout.answer = f"95 {EVIL}"
    run.samples(1, sample_records(make().decode, rolled))
    chrome.open(written([run.out], tmp_path / "page.html"))
    shown = "[...document.querySelectorAll('.expected')].map(each => each.textContent)"
    found = chrome.run(shown)
    assert len(found) == 3 - group and all(x.startswith("expected 95 </script>") for x in found)
    assert chrome.problems() == []
