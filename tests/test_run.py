"""The run's folder: what it says of a run, what it never replaces, and what --resume continues."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from small import small_model
from test_names import is_carried, rewrite, weights, write_whole

from nanopost import InputError, checkpoint, dist, hf, optim
from nanopost.batch import Example, batch_of
from nanopost.dist import World
from nanopost.run import ALARM, Run, changed_arguments, starts_of, step_text
from nanopost.save import save_model
from nanopost.tape import Tape
from nanopost.tokenizer import Tokenizer, check_stage, tokenizer_files
from runs import toy

pytestmark = pytest.mark.usefixtures("alone", "signals")


@pytest.fixture
def signals():
    """What a run changes in its process, and a test must not leave behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    dist.last_words = None


ABOUT = {"template_hash": "abc"}
DATA = {"model": "elsewhere", "data": "rows.jsonl", "steps": 9}


def new_run(out, rank=0, steps=9, show=(), alarms="warn", boards=None, **flags):
    """A run that has not begun. flags: what its script was told, besides DATA and --out."""
    arguments = {**DATA, "out": str(out), **flags}
    world = World(rank, 1, torch.device("cpu"), torch.float32)
    return Run(out, world, steps, arguments, list(show), alarms=alarms, boards=boards)


def model_and_optimizer(seed=0):
    model = small_model(seed)
    return model, optim.adamw(model, 0.01)


def begun(out, resume=False, overwrite=False, **flags):
    """-> (a run that has begun, the state it begins from, its model and optimizer)."""
    run = new_run(out, resume=resume, overwrite=overwrite, **flags)
    trained = model_and_optimizer()
    state = run.start(*trained, {"step": 0, "consumed": 0}, resume, overwrite, ABOUT)
    return run, state, trained


def saved(out, step, **flags):
    """A run that was killed after its checkpoint of `step`, which has logged two more steps."""
    run, state, trained = begun(out, **flags)
    for s in range(step + 3):
        run.log(s, {"loss": float(s)})
        run.samples(s, [{"completion": f"text {s}"}])
        if s == step:
            run.save(s, *trained, {**state, "step": s, "consumed": 10 * s})
    return run


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def steps_of(path):
    return [line["step"] for line in lines(path)]


# ---------------------------------------------------------------------------------------- manifest
def test_the_manifest_says_what_the_run_was(tmp_path):
    run, state, _ = begun(tmp_path / "run", lr=1e-3, betas=(0.9, 0.95), reward=["exact"])
    assert state == {"step": 0, "consumed": 0} and not run.resumed
    (start,) = lines_of_manifest = starts_of(tmp_path / "run")
    assert lines_of_manifest == json.loads((tmp_path / "run" / "run.json").read_text())
    assert start["args"]["lr"] == 1e-3 and start["args"]["reward"] == ["exact"]
    assert start["resumed_at"] is None and start["template_hash"] == "abc"
    assert start["torch"] == torch.__version__ and start["python"].startswith("3.")
    assert {"command", "git", "cuda", "started"} <= start.keys()
    assert start["ranks"] == 1 and start["threads"] == torch.get_num_threads()
    assert not [*(tmp_path / "run").glob("*.tmp")]


def test_the_manifest_has_each_start_of_a_resumed_run_and_none_of_a_replaced_one(tmp_path):
    saved(tmp_path, 4)
    begun(tmp_path, resume=True)
    begun(tmp_path, resume=True)
    assert [start["resumed_at"] for start in starts_of(tmp_path)] == [None, 4, 4]
    begun(tmp_path, overwrite=True)
    assert [start["resumed_at"] for start in starts_of(tmp_path)] == [None]


def test_a_resume_with_other_threads_says_that_rounding_differs(tmp_path, monkeypatch, capsys):
    saved(tmp_path, 4)
    begun(tmp_path, resume=True)
    assert "threads" not in capsys.readouterr().out
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    begun(tmp_path, resume=True)
    said = "resumed with 7 threads per rank, not 1: rounding differs (OMP_NUM_THREADS=1"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{}", "[1]", "no JSON", '[{"no": "args"}]'])
def test_a_manifest_that_no_script_wrote_has_no_starts(tmp_path, content):
    if content:
        (tmp_path / "run.json").write_text(content)
    assert starts_of(tmp_path) == []


# ------------------------------------------------------------------------------------ replacing it
def test_a_new_run_keeps_nothing_of_the_one_it_replaces(tmp_path):
    saved(tmp_path, 4)
    for folder in ("value", "checkpoints/step-000009.tmp"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config.json").write_text("{}")
    logged = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="already holds a run: add --resume to continue it"):
        begun(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == logged and checkpoint.latest(tmp_path)
    begun(tmp_path, overwrite=True)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    logs = {"metrics.jsonl", "samples.jsonl", "alarms.jsonl"}
    assert found.keys() == {"run.json", ".lock", *logs}
    assert {found[name] for name in logs} == {""}


def test_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        begun(tmp_path / "file")


@pytest.mark.parametrize(
    "reads",
    [
        {"model": "run"},
        {"reference_model": "run"},
        {"value_model": "run/value"},
        {"model": "run/value/kept"},
        {"data": "run/samples.jsonl"},
        {"eval_data": "run/checkpoints/x"},
        {"reward": ["exact", "model:run"]},
        {"reward": ["model:run/value"]},
        {"chat_template": "run/run.json"},
        {"a_flag_of_a_fork": "run"},
        {"several_of_a_fork": ("elsewhere", "run/metrics.jsonl")},
        {"model": "link"},
    ],
    ids=str,
)
def test_what_a_run_reads_is_never_replaced(tmp_path, monkeypatch, reads):
    """Whatever the flag, a fork's own too, and by whatever path."""
    monkeypatch.chdir(tmp_path)
    out = Path("run")
    begun(out)
    for folder in ("value/kept", "checkpoints/x"):
        (out / folder).mkdir(parents=True)
    Path("link").symlink_to("run")
    before = sorted(path for path in out.glob("**/*"))
    for flags in (reads, {name: _absolute(value, tmp_path) for name, value in reads.items()}):
        for given in (out, tmp_path / "run", Path("run/../run")):
            with pytest.raises(InputError, match="this run reads .*, which would be overwritten"):
                begun(given, overwrite=True, **flags)
    assert sorted(path for path in out.glob("**/*")) == before


def _absolute(value, folder):
    if isinstance(value, str):
        prefix = "model:" if value.startswith("model:") else ""
        return f"{prefix}{folder / value.removeprefix('model:')}"
    return [_absolute(text, folder) if "run" in text else text for text in value]


def test_what_stays_in_the_folder_may_be_read_from_it(tmp_path):
    out = tmp_path / "run"
    begun(out)
    (out / "rows.jsonl").write_text("{}\n")
    (tmp_path / "other").mkdir()
    flags = {"data": str(out / "rows.jsonl"), "model": str(out / ".." / "other")}
    begun(out, overwrite=True, **flags)
    assert (out / "rows.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("manifest", [None, "{}", "[1]", "no JSON"])
@pytest.mark.parametrize(
    "kept",
    [
        "config.json",
        "checkpoints/mine",
        "value/mine",
        "model-00001.safetensors",
        "tokenizer.json",
    ],
)
def test_what_no_run_wrote_is_never_replaced(tmp_path, kept, manifest):
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).write_text("mine")
    if manifest:
        (tmp_path / "run.json").write_text(manifest)
    with pytest.raises(InputError, match="holds files that no run of these scripts wrote"):
        begun(tmp_path, overwrite=True)
    assert (tmp_path / kept).read_text() == "mine"


def test_a_folder_that_another_model_used_holds_the_new_one_alone(tmp_path):
    toy.write_model(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 7}')
    toy.write_model(tmp_path / "b")
    tokenizer, model = Tokenizer.load(tmp_path / "b"), hf.load_model(tmp_path / "b")
    base = Tokenizer(tokenizer.raw, {"eos_token": "<|end|>"}, None)
    run, _, _ = begun(tmp_path / "out")
    for source, t in (
        ("a", Tokenizer.load(tmp_path / "a")),
        ("b", tokenizer),
        ("b", base),
        ("b", base),
    ):
        files = tokenizer_files(tmp_path / source, t)
        run.export(model.state_dict().items(), model.config, files)
        assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert 7 not in Tokenizer.load(tmp_path / "out").stop_ids


def test_links_to_elsewhere_in_a_model_folder_are_not_copied(tmp_path):
    toy.write_model(tmp_path / "in")
    (tmp_path / "secret.json").write_text('{"key": 1}')
    (tmp_path / "in" / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    (tmp_path / "in" / "tokenizer.json").rename(tmp_path / "base.json")
    (tmp_path / "in" / "tokenizer.json").symlink_to("../base.json")
    tokenizer = Tokenizer.load(tmp_path / "in")
    files = tokenizer_files(tmp_path / "in", tokenizer)
    said = check_stage(tmp_path / "in", tokenizer)
    assert "in: special_tokens_map.json: links to elsewhere, which are not copied" in said
    assert files["special_tokens_map.json"] is None
    assert files["tokenizer.json"] == (tmp_path / "base.json").read_bytes()


# ---------------------------------------------------------------------------------------- resuming
def test_a_resume_says_what_it_does_again(tmp_path, capsys):
    saved(tmp_path, 4)
    begun(tmp_path, resume=True)
    said = "resumed at step 4; what was logged after it, to step 6, is done again\n"
    assert said in capsys.readouterr().out


def test_a_resumed_run_begins_from_its_checkpoint(tmp_path, capsys):
    _, state, (model, optimizer) = begun(tmp_path, lr=1e-3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    run = new_run(tmp_path, lr=1e-3)
    run.save(4, model, optimizer, {**state, "step": 4, "consumed": 40, "sums": [1, 2.5]})
    resumed = new_run(tmp_path, lr=1e-3, resume=True)
    again = model_and_optimizer(1)
    fresh = {"step": 0, "consumed": 0, "sums": [0, 0.0], "newer": 3}
    state = resumed.start(*again, fresh, resume=True, overwrite=False, about=ABOUT)
    assert resumed.resumed and "resumed at step 4" in capsys.readouterr().out
    assert "args" not in state
    assert {name: state[name] for name in fresh} == {
        "step": 4,
        "consumed": 40,
        "sums": [1, 2.5],
        "newer": 3,
    }
    assert all(map(torch.equal, again[0].parameters(), model.parameters()))


def test_a_resumed_log_has_every_step_once_whatever_was_sampled(tmp_path):
    saved(tmp_path, 2)
    run = new_run(tmp_path)
    run.samples(2, [{"completion": "line\u2028separator\x85 and int f(){}"}])
    for name in ("samples.jsonl", "metrics.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 2, "completion": "cut off in int f(){}')
    assert steps_of(tmp_path / "metrics.jsonl") == [0, 1, 2, 3, 4]
    begun(tmp_path, resume=True)
    assert steps_of(tmp_path / "metrics.jsonl") == [0, 1, 2]
    assert steps_of(tmp_path / "samples.jsonl") == [0, 1, 2, 2]
    assert lines(tmp_path / "samples.jsonl")[-1]["completion"].startswith("line\u2028separator\x85")


@pytest.mark.parametrize("what_is_there", ["nothing", "a young run"])
def test_without_a_checkpoint_the_run_starts_from_the_beginning_and_says_so(
    tmp_path, capsys, what_is_there
):
    """A run killed before its first checkpoint needs no --overwrite."""
    if what_is_there == "a young run":
        run, _, _ = begun(tmp_path)
        run.log(1, {"loss": 1.0})
        with pytest.raises(InputError, match="already holds a run"):
            begun(tmp_path)
    run, state, _ = begun(tmp_path, resume=True)
    assert not run.resumed and state["step"] == 0
    assert f"no checkpoint in {tmp_path}, so the run starts" in capsys.readouterr().out
    assert steps_of(tmp_path / "metrics.jsonl") == []


def test_what_cannot_be_resumed_says_so(tmp_path):
    saved(tmp_path / "run", 4, bins=0)
    for flags, sentence in (
        ({"steps": 3, "bins": 0}, "step-000004 is past --steps 3: give 4 or more"),
        (
            {"bins": 0, "overwrite": True},
            "--resume continues and --overwrite starts over: choose one",
        ),
        ({}, "step-000004 is another script's .with --bins.: choose another --out"),
    ):
        with pytest.raises(InputError, match=sentence):
            begun(tmp_path / "run", resume=True, **flags)
    assert steps_of(tmp_path / "run" / "metrics.jsonl") == [0, 1, 2, 3, 4, 5, 6]
    _, state, _ = begun(tmp_path / "run", resume=True, bins=0, newer=1)
    assert state["step"] == 4

    begun(tmp_path / "young", bins=0)
    with pytest.raises(InputError, match="young is another script's .with --bins."):
        begun(tmp_path / "young", resume=True)
    begun(tmp_path / "young", resume=True, bins=0)

    begun(tmp_path / "ended")
    (tmp_path / "ended" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="a run that ended and left no checkpoint"):
        begun(tmp_path / "ended", resume=True)


def test_arguments_that_changed_are_named_and_no_others():
    before = json.loads(json.dumps({"lr": 1e-3, "clip": [0.1, 0.2], "resume": False, "old": 1}))
    now = {"lr": 1e-4, "clip": [0.1, 0.2], "resume": True, "overwrite": False, "new": 2}
    expected = ["lr: 0.001 -> 0.0001", "old: 1 -> None", "new: None -> 2"]
    assert changed_arguments(before, now) == expected


def test_a_run_that_is_resumed_with_other_flags_says_which(tmp_path, capsys):
    saved(tmp_path, 4, lr=1e-3, clip=[0.1, 0.2], rows=8)
    capsys.readouterr()
    begun(tmp_path, resume=True, lr=1e-4, clip=[0.1, 0.3], rows=8)
    said = [x for x in capsys.readouterr().out.splitlines() if "different" in x]
    assert said == [
        "resumed with a different lr: 0.001 -> 0.0001",
        "resumed with a different clip: [0.1, 0.2] -> [0.1, 0.3]",
    ]
    begun(tmp_path, resume=True, lr=1e-3, clip=[0.1, 0.2], rows=8)
    assert "different" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------- in the loop
@pytest.mark.parametrize(
    "every, steps", [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (0, [7]), (10, [7])]
)
def test_due_every_so_many_steps_and_at_the_last(tmp_path, every, steps):
    run = new_run(tmp_path, steps=7)
    assert [step for step in range(1, 8) if run.due(step, every)] == steps


def test_a_step_is_a_line_in_the_file_and_one_for_the_reader(tmp_path, capsys):
    run = new_run(tmp_path, steps=4, show=["loss", "missing"])
    run.start(*model_and_optimizer(), {"step": 0}, False, False, ABOUT)
    run.log(0, {"eval/loss": 2.5})
    run.log(1, {"loss": 1.0})
    run.log(2, {"loss": 1234.5, "eval/loss": 0.001234, "hidden": 1.0})
    logged = lines(tmp_path / "metrics.jsonl")
    seconds = [line.pop("time/elapsed") for line in logged]
    assert 0 <= seconds[0] <= seconds[1] <= seconds[2] < 60
    assert logged == [
        {"step": 0, "eval/loss": 2.5},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1234.5, "eval/loss": 0.001234, "hidden": 1.0},
    ]
    *_, first, second, third = capsys.readouterr().out.splitlines()
    assert first == "step 0/4  eval/loss 2.500"
    assert second == "step 1/4  loss 1.000"  # a first step tells no time left
    assert third == "step 2/4  loss 1,234  eval/loss 0.00123  left 0m00s"


@pytest.mark.parametrize("first", [0, 600])  # 600: a resumed run, which logs no step 600
def test_the_time_left_is_by_the_mean_of_the_last_steps(tmp_path, capsys, monkeypatch, first):
    """Evaluations count as often as they come. This process's first step does not."""
    run = new_run(tmp_path, steps=1000)
    run.start(*model_and_optimizer(), {"step": 0}, False, False, ABOUT)
    now, left = [100.0], {}
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        if not first:
            run.log(0, {})
        for step in range(first + 1, 901):
            now[0] += 60.0 if step == first + 1 else 2.0 if step < 800 else 1.0
            now[0] += 20.0 * (step % 10 == 0)
            capsys.readouterr()
            run.log(step, {})
            left[step] = re.findall("left (.+)", capsys.readouterr().out)
    assert left[first + 1] == []
    assert left[first + 3] == ["33m14s" if not first else "13m14s"]  # 997 or 397 steps of 2 s
    assert left[760] == ["16m00s"]  # 240 steps of 2 s, and 24 evaluations of 20 s
    assert left[900] == ["5m00s"]  # 100 steps of 1 s, and 10 evaluations


@pytest.mark.parametrize("seed", range(20))
def test_no_line_of_a_step_is_wider_than_100_columns(seed):
    """Of the shown metrics the first ones that fit are there; of the held-out ones all, whole."""
    draw = random.Random(seed)
    names = ["x" * draw.randrange(2, 40) + f"{i}" for i in range(14)]
    texts = [f"{name} {draw.uniform(0, 1):.3f}" for name in names]
    shown, held_out, left = texts[:8], texts[8:], draw.choice(["", "left 12h05m"])
    first, *others = step_text("step 12/100", shown, held_out, left).split("\n")
    assert all(len(line) <= 100 for line in (first, *others))
    assert all(line.startswith("    ") for line in others)
    assert first.startswith("step 12/100  ") and first.endswith(left)
    fitting, room = [], 100 - len("step 12/100") - len(left) - 2
    for text in shown:
        if len(text) + 2 <= room:
            fitting.append(text)
            room -= len(text) + 2
    words = "  ".join([first.removesuffix(left), *(line[4:] for line in others)]).split("  ")
    assert [word for word in words if word] == ["step 12/100", *fitting, *held_out]


def test_a_text_longer_than_a_line_keeps_its_number():
    long = f"eval/accuracy/regex:{'a' * 200} 0.125"
    (first, second) = step_text("step 1/9", [long], [long], "left 0m01s").split("\n")
    assert first == "step 1/9  left 0m01s"
    assert second.startswith("    eval/accuracy/regex:aaa") and second.endswith("aaa 0.125")
    assert len(second) <= 100


def test_a_run_says_what_trains_and_where_it_writes(tmp_path, capsys):
    run = new_run(tmp_path)
    model, optimizer = model_and_optimizer()
    model.folder = "out/sft"
    model.model.embed_tokens.weight.requires_grad_(False)
    run.start(model, optimizer, {"step": 0}, False, False, ABOUT)
    first, second = capsys.readouterr().out.splitlines()
    size = sum(p.numel() for p in model.parameters())
    trained = size - 61 * 32
    assert first.startswith(
        f"out/sft: {size:,} parameters, {trained:,} of them trained, in float32 on 1 rank on cpu; "
    )
    assert re.search(r"; \d+\.\d GiB in use$", first)
    assert second == (
        f"writes to {tmp_path}: metrics, samples and alarms (.jsonl), checkpoints/, the model"
    )


# -------------------------------------------------------------------------------------- alarms
def unrewarded(run, steps):
    for step in steps:
        run.log(step, {"reward": 0.1 * (step % 3), "completions/unrewarded": float(step > 10)})


def alarms_of(out):
    return [(line["alarm"], line["step"], line["since"]) for line in lines(out / "alarms.jsonl")]


def test_an_alarm_is_said_and_written_once(tmp_path, capsys):
    run, _, _ = begun(tmp_path)
    unrewarded(run, range(1, 40))
    assert alarms_of(tmp_path) == [("unrewarded", 15, 6)]
    (said,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("ALARM")]
    assert said.startswith(
        "ALARM unrewarded, step 15: over the last 10 steps, completions/unrewarded is 0.5,"
    )
    (line,) = lines(tmp_path / "alarms.jsonl")
    assert said == f"ALARM unrewarded, step 15: {line['message']}" and len(line) == 4
    assert run.due_save(39, 0, 0) is False


def test_alarms_that_are_off_say_nothing(tmp_path, capsys):
    run = new_run(tmp_path, alarms="off")
    run.start(*model_and_optimizer(), {"step": 0}, False, False, ABOUT)
    unrewarded(run, range(1, 40))
    assert alarms_of(tmp_path) == [] and "ALARM" not in capsys.readouterr().out


def test_alarms_that_are_off_are_not_computed_of_what_was_logged(tmp_path, monkeypatch):
    saved(tmp_path, 4)
    looked = []
    monkeypatch.setattr("nanopost.run.Alarms.add", lambda self, line: looked.append(line) or [])
    for alarms, expected in (("off", 0), ("warn", 5)):
        run = new_run(tmp_path, alarms=alarms, resume=True, overwrite=False)
        run.start(*model_and_optimizer(), {"step": 0, "consumed": 0}, True, False, ABOUT)
        assert len(looked) == expected


@pytest.mark.parametrize("step, again", [(12, [("unrewarded", 15, 6)]), (20, [])])
def test_a_resumed_run_says_the_alarms_after_its_checkpoint_alone(tmp_path, capsys, step, again):
    run, state, trained = begun(tmp_path, steps=99)
    unrewarded(run, range(1, step + 1))
    run.save(step, *trained, {**state, "step": step})
    unrewarded(run, range(step + 1, 25))  # then it is killed
    assert alarms_of(tmp_path) == [("unrewarded", 15, 6)]
    capsys.readouterr()
    resumed, _, _ = begun(tmp_path, resume=True, steps=99)
    assert alarms_of(tmp_path) == [("unrewarded", 15, 6)][len(again) :]
    unrewarded(resumed, range(step + 1, 40))
    assert alarms_of(tmp_path) == [("unrewarded", 15, 6)]
    assert ("ALARM" in capsys.readouterr().out) == bool(again)


def test_a_run_that_replaces_another_has_none_of_its_alarms(tmp_path):
    run, _, _ = begun(tmp_path)
    unrewarded(run, range(1, 20))
    assert alarms_of(tmp_path)
    run, _, _ = begun(tmp_path, overwrite=True)
    unrewarded(run, range(1, 9))
    assert alarms_of(tmp_path) == []


def test_an_alarm_that_stops_a_run_saves_it_first(tmp_path, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr("nanopost.dist.finish", ended.append)
    run = new_run(tmp_path, steps=99, alarms="stop")
    trained = model_and_optimizer()
    state = run.start(*trained, {"step": 0}, False, False, ABOUT)
    for step in range(1, 17):
        unrewarded(run, [step])
        if run.due_save(step, 0, 0):
            run.save(step, *trained, {**state, "step": step})
    assert ended[0] == 3 and checkpoint.complete(tmp_path)[0].name == "step-000015"
    said = "stopped by an alarm (--alarms stop): --resume continues after step 15"
    assert said in capsys.readouterr().out


def test_samples_are_a_line_each_and_keep_their_letters(tmp_path):
    run, _, _ = begun(tmp_path)
    run.samples(3, [{"completion": "é\n→", "reward": 0.5}, {"completion": "b", "reward": 1.0}])
    raw = (tmp_path / "samples.jsonl").read_text()
    assert "é\\n→" in raw
    assert [(x["step"], x["reward"]) for x in lines(tmp_path / "samples.jsonl")] == [
        (3, 0.5),
        (3, 1.0),
    ]


def test_a_checkpoint_has_the_flags_and_the_last_step_has_none(tmp_path):
    run, state, trained = begun(tmp_path, lr=1e-3)
    run.save(9, *trained, state)
    assert checkpoint.latest(tmp_path) is None
    run.save(8, *trained, state)
    stored = json.loads((checkpoint.latest(tmp_path) / "state.json").read_text())
    assert stored["step"] == 8 and stored["args"]["lr"] == 1e-3
    assert "args" not in state


# -------------------------------------------------------------------------------------------- end
def finish(run, monkeypatch):
    ended = []
    monkeypatch.setattr("nanopost.dist.finish", lambda: ended.append(True))
    run.finish()
    assert ended == [True]


def test_the_last_line_is_what_became_of_held_out_metrics(tmp_path, monkeypatch, capsys):
    run, _, _ = begun(tmp_path)
    run.log(0, {"eval/loss": 2.0, "eval/only_first": 1.0})
    run.log(1, {"loss": 9.0})
    run.log(2, {"eval/loss": 1.5})
    run.log(3, {"loss": 8.0, "eval/loss": 1.25})
    capsys.readouterr()
    finish(run, monkeypatch)
    assert capsys.readouterr().out.splitlines() == [
        f"curves: python -m nanopost.plot {tmp_path}",
        "held out, before and after: eval/loss 2.000 -> 1.250",
    ]


@pytest.mark.parametrize("evaluated", [[], [0]])
def test_without_two_evaluations_there_is_no_change_to_tell(
    tmp_path, monkeypatch, capsys, evaluated
):
    run, _, _ = begun(tmp_path)
    for step in range(3):
        run.log(step, {"eval/loss": 2.0} if step in evaluated else {"loss": 1.0})
    capsys.readouterr()
    finish(run, monkeypatch)
    assert "held out" not in capsys.readouterr().out


def test_the_model_is_written_where_it_belongs(tmp_path, capsys):
    run, _, (model, _) = begun(tmp_path)
    for part in ("", "value"):
        run.export(model.state_dict().items(), model.config, {"a.txt": "text"}, part=part)
        assert (tmp_path / part / "a.txt").read_text() == "text"
        assert f"the model is in {tmp_path / part}\n" in capsys.readouterr().out
        found = dict(hf.load_model(tmp_path / part).named_parameters())
        assert all(torch.equal(p, found[name]) for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------------- ranks
def test_rank_0_alone_writes_and_speaks(tmp_path, monkeypatch, capsys):
    run = new_run(tmp_path / "out", rank=1)
    model, optimizer = model_and_optimizer()
    state = run.start(model, optimizer, {"step": 0}, False, False, ABOUT)
    assert state == {"step": 0}
    run.log(1, {"eval/loss": 1.0})
    run.samples(1, [{"completion": "a"}])
    run.say("text")
    run.export(model.state_dict().items(), model.config, {"a.txt": "text"})
    finish(run, monkeypatch)
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_a_rank_that_does_not_write_resumes_and_refuses_like_the_others(tmp_path, capsys):
    saved(tmp_path, 4)
    written = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    capsys.readouterr()
    for steps in (9, 3):
        run = new_run(tmp_path, rank=1, steps=steps, resume=True, overwrite=False)
        if steps == 3:
            with pytest.raises(InputError, match="past --steps 3"):
                run.start(*model_and_optimizer(), {"step": 0}, True, False, ABOUT)
        else:
            state = run.start(*model_and_optimizer(1), {"step": 0}, True, False, ABOUT)
            assert state["step"] == 4 and state["consumed"] == 40 and run.resumed
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json*")} == written
    assert capsys.readouterr().out == ""


def test_a_flag_that_reads_like_the_folder_names_nothing_in_it(tmp_path, monkeypatch):
    """--loss ipo --out ipo, resumed or overwritten; and a value too long for a file name."""
    monkeypatch.chdir(tmp_path)
    begun(Path("ipo"), loss=["ipo"], reward=["regex:" + "a" * 5000])
    begun(Path("ipo"), overwrite=True, loss=["ipo"], reward=["regex:" + "a" * 5000])
    with pytest.raises(InputError, match="this run reads ipo"):
        begun(Path("ipo"), overwrite=True, loss=["ipo"], model="ipo")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "metrics.jsonl", "run.json"])
@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_a_file_that_no_script_wrote_is_never_replaced(tmp_path, name, how):
    (tmp_path / name).write_text("theirs")
    with pytest.raises(InputError, match="holds files that no run"):
        begun(tmp_path, **how)
    assert (tmp_path / name).read_text() == "theirs"


def test_a_record_holds_all_numbers_of_a_step_and_is_gone_with_its_run(tmp_path):
    run, _, _ = begun(tmp_path / "run")
    columns = {"old_logp": np.float32([0, -0.1, -1 / 3]), "weight": 2.0}
    kept = [np.int32(ids) for ids in ([], [6], [9, 7])]
    examples = [Example([5, 6, 7], [False, True, True], columns, kept), Example([8], [True])]
    run.record(12, examples, {"divisors": [3.0, 4.0]}, Tape(False), finish=["stop", "length"])
    about, first, second = lines(tmp_path / "run/records/000012.jsonl")
    assert about == {"step": 12, "divisors": [3.0, 4.0], "updates": []}
    assert np.float32(first.pop("old_logp")).tolist() == columns["old_logp"].tolist()
    assert first.pop("kept") == [[], [6], [9, 7]]
    expected = {"rank": 0, "ids": [5, 6, 7], "mask": [0, 1, 1], "weight": 2.0, "finish": "stop"}
    assert first == expected
    assert second == {"rank": 0, "ids": [8], "mask": [1], "finish": "length"}
    begun(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run/records").exists()


# --------------------------------------------------------------------------- what else is protected
@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "config.json", "model-00001-of-2.safetensors"]
)
def test_a_file_of_the_model_that_a_run_writes_is_not_read_by_it(tmp_path, name):
    begun(tmp_path)
    (tmp_path / name).write_text("old")
    with pytest.raises(InputError, match=f"this run reads .*{name}, which would be overwritten"):
        begun(tmp_path, overwrite=True, a_flag_of_a_fork=str(tmp_path / name))
    assert (tmp_path / name).read_text() == "old"


def test_a_run_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    begun(tmp_path / "run")
    assert starts_of(tmp_path / "run")[0]["git"] is None


def test_a_run_that_failed_in_its_first_step_does_not_block_its_folder(tmp_path):
    run, _, _ = begun(tmp_path)
    run.log(0, {"eval/loss": 2.0})
    run, _, _ = begun(tmp_path, lr=2.0)
    assert lines(tmp_path / "metrics.jsonl") == []
    run.log(1, {"loss": 2.0})
    with pytest.raises(InputError, match="already holds a run"):
        begun(tmp_path)


# ----------------------------------------------------------------------------------------- the lock
def _hold(out, begins, ends):
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    begun(out)
    begins.set()
    ends.wait(60)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_the_folder_is_refused_until_the_first_one_is_gone(tmp_path, resume):
    context = mp.get_context("spawn")
    begins, ends = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, begins, ends))
    other.start()
    assert begins.wait(60)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(InputError, match=f"process {other.pid} on .* is running in it: wait for"):
        begun(tmp_path, resume=resume, overwrite=not resume)
    assert (tmp_path / "run.json").read_bytes() == before
    other.kill()
    other.join()
    begun(tmp_path, resume=resume, overwrite=not resume)


def test_what_a_reward_forks_holds_no_lock(tmp_path):
    """A process that outlives its run, and would hold an inherited lock."""
    run, _, _ = begun(tmp_path)
    child = mp.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    run.lock.close()
    try:
        probe = (
            "import fcntl,sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        )
        subprocess.run([sys.executable, "-c", probe, tmp_path / ".lock"], check=True)
    finally:
        child.kill()
        child.join()


# -------------------------------------------------------------------------- when it is time to save
def test_a_save_is_due_by_steps_by_time_and_at_the_last_step(tmp_path, monkeypatch):
    run, state, trained = begun(tmp_path)
    now = time.monotonic()
    monkeypatch.setattr("nanopost.run.time.monotonic", lambda: now)
    run.saved_at = now
    assert [step for step in range(1, 10) if run.due_save(step, 4, 15)] == [4, 8, 9]
    now += 15 * 60 + 1
    assert run.due_save(5, 0, 15) and not run.due_save(5, 0, 15.1) and not run.due_save(5, 0, 0)
    run.save(5, *trained, state)
    assert not run.due_save(6, 0, 15)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_ends_the_run(tmp_path, capfd, monkeypatch, number):
    finished = []
    monkeypatch.setattr("nanopost.dist.finish", finished.append)
    run, state, trained = begun(tmp_path)
    assert not run.due_save(3, 0, 0)
    os.kill(os.getpid(), number)
    assert "saves and stops after this step; again: stops now" in capfd.readouterr().err
    assert run.due_save(4, 0, 0)
    run.save(4, *trained, state)
    assert finished == [128 + number]
    assert checkpoint.step_of(checkpoint.latest(tmp_path)) == 4
    said = f"stopped by {number.name}: --resume continues after step 4\n"
    assert capfd.readouterr().out.endswith(said)


def test_a_second_signal_ends_the_run_at_once_unless_it_is_the_same_one(tmp_path, monkeypatch):
    begun(tmp_path)
    now = time.monotonic()
    monkeypatch.setattr("nanopost.run.time.monotonic", lambda: now)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    now += 3
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path, monkeypatch):
    monkeypatch.setattr("nanopost.dist.finish", lambda code: pytest.fail("ended"))
    run, state, trained = begun(tmp_path)
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.due_save(9, 0, 0)
    run.save(9, *trained, state)
    assert checkpoint.latest(tmp_path) is None


# ----------------------------------------------------------------------------------- after an error
def step_of_training(model, optimizer):
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()


def test_after_an_error_before_the_update_the_last_step_is_saved_as_it_was(tmp_path):
    run, state, trained = begun(tmp_path)
    step_of_training(*trained)
    state["consumed"] += 10
    run.log(1, {"loss": 1.0})
    assert not run.due_save(1, 0, 0)
    expected = torch.get_rng_state(), [p.detach().clone() for p in trained[0].parameters()]
    state["consumed"] += 10  # the next step begins, draws, and fails
    torch.rand(3)
    assert dist.last_words() == "--resume continues after step 1"
    _, state, (model, _) = begun(tmp_path, resume=True)
    assert (state["step"], state["consumed"]) == (1, 10)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert all(map(torch.equal, model.parameters(), expected[1]))


class Slow:
    """A board whose end takes so long that a person presses Ctrl-C again."""

    name = "slow"

    def log(self, *_):
        pass

    def close(self, failed):
        raise KeyboardInterrupt


def test_a_second_ctrl_c_while_boards_close_loses_nothing(tmp_path):
    run, _, _ = begun(tmp_path)
    run.boards.open = [Slow()]
    run.log(1, {"loss": 1.0})
    run.due_save(1, 0, 0)
    assert dist.last_words() == "--resume continues after step 1"
    assert checkpoint.step_of(checkpoint.latest(tmp_path)) == 1


def test_after_an_error_in_the_middle_of_the_update_nothing_is_saved_and_it_says_so(tmp_path):
    run, state, trained = begun(tmp_path)
    step_of_training(*trained)
    assert dist.last_words().startswith("nothing was trained yet: correct it, then run the same")
    run.log(1, {"loss": 1.0})
    assert not run.due_save(1, 0, 0)
    step_of_training(*trained)
    assert dist.last_words() == "no checkpoint was written yet: --resume starts from the beginning"
    assert run.due_save(2, 2, 0)
    run.save(2, *trained, state)
    run.due_save(3, 2, 0)
    step_of_training(*trained)
    assert dist.last_words() == "--resume continues after step 2"


def test_an_error_amid_a_sharded_forward_saves_the_shards_and_not_what_was_gathered(tmp_path):
    """FSDP2 in a group of one, in bf16: whole weights lie there in bf16 when a forward fails."""
    model = dist.shard(small_model(), World(0, 1, torch.device("cpu"), torch.bfloat16))
    optimizer = optim.adamw(model, 0.01)
    run = new_run(tmp_path)
    run.start(model, optimizer, {"step": 0}, False, False, ABOUT)
    step_of_training(model, optimizer)
    expected = {name: p.clone() for name, p in dist.full_weights(model)}
    run.log(1, {"loss": 1.0})
    run.due_save(1, 0, 0)

    def fail(*_):
        raise ZeroDivisionError

    model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(batch_of([Example([1, 2, 3], [True] * 3)]))
    assert dist.last_words() == "--resume continues after step 1"
    plain, optimizer = model_and_optimizer(1)
    checkpoint.load(checkpoint.latest(tmp_path), plain, optimizer)
    for name, p in plain.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_a_save_that_fails_is_said_and_not_repeated(tmp_path, monkeypatch):
    run, state, trained = begun(tmp_path)
    run.log(1, {"loss": 1.0})
    run.due_save(1, 1, 0)

    def full(*_, **__):
        raise InputError("the disk is full.")

    monkeypatch.setattr("nanopost.checkpoint.save", full)
    said = "step 1 could not be saved (the disk is full.); no checkpoint was written yet"
    assert dist.last_words().startswith(said)
    with pytest.raises(InputError):
        run.save(1, *trained, state)
    assert dist.last_words().startswith("no checkpoint was written yet")


# ------------------------------------------------------------------------------ several checkpoints
def test_as_many_checkpoints_as_asked_are_kept_and_others_folders_stay(tmp_path):
    run, state, trained = begun(tmp_path)
    run.keep = 3
    theirs = ["step-best", "step-000001-backup", "notes", "step-2"]
    for name in theirs:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    for step in range(1, 7):
        run.save(step, *trained, state)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == sorted([*theirs, "step-000004", "step-000005", "step-000006"])
    begun(tmp_path, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(theirs)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
@pytest.mark.parametrize(
    "name", ["__0_0.distcp", ".metadata", "state.json", "random-0.json", "checksums.json"]
)
def test_a_damaged_checkpoint_is_skipped_aloud_and_the_one_before_it_taken(
    tmp_path, capsys, name, harm
):
    run, state, trained = begun(tmp_path)
    for step in (2, 4):
        run.log(step, {"loss": 1.0})
        run.save(step, *trained, state)
    harm(tmp_path / "checkpoints" / "step-000004" / name)
    run, state, _ = begun(tmp_path, resume=True)
    assert state["step"] == 2 and steps_of(tmp_path / "metrics.jsonl") == [2]
    if (name, harm) != ("state.json", Path.unlink):  # a deletion that was cut off
        said = capsys.readouterr().out
        assert "WARNING: --resume skips" in said and "step-000004: " in said
        assert (tmp_path / "checkpoints" / "step-000004.damaged").is_dir()
    run.save(4, *trained, state)  # its place is free
    assert checkpoint.damage(checkpoint.latest(tmp_path)) == ""
    assert begun(tmp_path, resume=True)[1]["step"] == 4


def test_without_a_sound_checkpoint_nothing_is_begun_anew_unasked(tmp_path):
    run, state, trained = begun(tmp_path)
    run.log(2, {"loss": 1.0})
    run.save(2, *trained, state)
    flip(tmp_path / "checkpoints" / "step-000002" / "__0_0.distcp")
    for _ in range(2):
        with pytest.raises(
            InputError, match="every checkpoint in .* is damaged: --overwrite starts"
        ):
            begun(tmp_path, resume=True)
    assert steps_of(tmp_path / "metrics.jsonl") == [2]


@pytest.mark.parametrize("content", ["", "[{"])
def test_a_manifest_that_is_cut_off_does_not_strand_a_good_checkpoint(tmp_path, capsys, content):
    saved(tmp_path, 4, lr=1e-3)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="already holds a run"):
        begun(tmp_path)
    _, state, _ = begun(tmp_path, resume=True, lr=1e-3)
    assert state["step"] == 4 and "run.json is missing or cut off" in capsys.readouterr().out
    assert [start["resumed_at"] for start in starts_of(tmp_path)] == [4]


# --------------------------------------------------------------------------------- what has changed
def test_other_content_of_a_file_that_a_flag_names_is_said(tmp_path, capsys):
    for name in ("a.jsonl", "b.jsonl", "reward.py"):
        (tmp_path / name).write_text("one")
    flags = {"data": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]}
    flags["reward"] = [f"{tmp_path}/reward.py:f"]
    saved(tmp_path / "run", 4, **flags)
    begun(tmp_path / "run", resume=True, **flags)
    assert "changed" not in capsys.readouterr().out
    for name in ("b.jsonl", "reward.py"):
        (tmp_path / name).write_text("two")
    begun(tmp_path / "run", resume=True, **flags)
    said = [line for line in capsys.readouterr().out.splitlines() if "changed" in line]
    assert said == [
        f"WARNING: {tmp_path}/{name} has changed since the run started"
        for name in ("b.jsonl", "reward.py")
    ]


def test_the_seconds_of_a_resumed_run_go_on(tmp_path, monkeypatch):
    saved(tmp_path, 4)
    log = tmp_path / "metrics.jsonl"
    old = [line | {"time/elapsed": 100.0 * line["step"]} for line in lines(log)]
    log.write_text("".join(json.dumps(line) + "\n" for line in old))
    run, _, _ = begun(tmp_path, resume=True)
    run.log(5, {"loss": 1.0})
    assert 400 <= lines(log)[-1]["time/elapsed"] < 460


# --------------------------------------------------------------------------------- dtype of a model
@pytest.mark.parametrize(
    "read, flag, written, said",
    [
        ("float32", "auto", "float32", ""),
        ("bfloat16", "auto", "bfloat16", " in bfloat16, rounded from fp32 (--save_dtype fp32"),
        ("bfloat16", "fp32", "float32", " in float32, though it was read in bfloat16 (--save_d"),
        ("float32", "bf16", "bfloat16", " in bfloat16, though it was read in float32 (--save_d"),
        ("float16", "auto", "float16", " in float16, rounded from fp32 (--save_dtype fp32"),
    ],
)
def test_a_model_is_written_in_the_dtype_asked_for_and_a_change_is_said(
    tmp_path, capsys, read, flag, written, said
):
    model = small_model()
    save_model(tmp_path / "in", model.state_dict().items(), model.config, {}, getattr(torch, read))
    lying = json.loads((tmp_path / "in" / "config.json").read_text())
    lying["dtype"] = lying["torch_dtype"] = "float64"  # the weights themselves decide
    (tmp_path / "in" / "config.json").write_text(json.dumps(lying))
    loaded = hf.load_model(tmp_path / "in")
    run, _, _ = begun(tmp_path / "out")
    run.export(loaded.state_dict().items(), loaded.config, {}, flag)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == written
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {f"torch.{written}"}
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"the model is in {tmp_path / 'out'}{said}")
    assert bool(said) == ("--save_dtype" in line)


# ------------------------------------------------------------------------------- ranks apart
def _apart(rank, folder, shared, stop=None):
    os.chdir(folder / ("shared" if shared else str(rank)))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    world = World(rank, 2, torch.device("cpu"), torch.float32)
    run, began = Run("run", world, 9, DATA, []), time.monotonic()
    try:
        run.start(*model_and_optimizer(), {"step": 0}, False, False, ABOUT)
        if stop and rank == stop[0]:
            setattr(run, *stop[1:])
        stops = run.due_save(1, 0, 0), run.stop
        text = str(stops)
    except InputError as error:
        text = f"{error} after {time.monotonic() - began:.0f}s"
    (folder / f"said-{rank}").write_text(text)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("alone", [None])  # no process group here: each worker joins its own
def test_ranks_that_do_not_see_the_same_folder_say_so_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr("nanopost.run.SEEN_WITHIN", 0.3)
    for name in ("0", "1", "shared"):
        (tmp_path / name).mkdir()
    mp.start_processes(_apart, (tmp_path, False), nprocs=2, start_method="fork")
    for rank in (0, 1):
        said = (tmp_path / f"said-{rank}").read_text()
        assert re.match(r"--out run: rank 1 on .* cannot see what rank 0 writes there", said)
        assert int(re.search(r"after (\d+)s", said)[1]) < 5


@pytest.mark.parametrize("alone", [None])
@pytest.mark.parametrize("stop", [(1, "signal", 15), (0, "alarmed", ALARM)])
def test_a_signal_or_alarm_of_one_rank_stops_all_of_them(tmp_path, stop):
    (tmp_path / "shared").mkdir()
    mp.start_processes(_apart, (tmp_path, True, stop), nprocs=2, start_method="fork")
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    assert said == [f"(True, {stop[2]})"] * 2


def test_a_process_that_a_reward_forks_ends_when_it_is_told_to_and_saves_nothing(tmp_path):
    run, _, _ = begun(tmp_path)
    run.log(1, {"loss": 1.0})
    run.due_save(1, 0, 0)
    child = mp.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join(10)
    assert child.exitcode == -signal.SIGTERM
    assert checkpoint.latest(tmp_path) is None and run.signal == 0


def test_what_a_model_carries_is_watched_from_the_start_of_a_run_to_its_end(tmp_path, capsys):
    out, source = tmp_path / "out", tmp_path / "whole"
    write_whole(source)
    held = weights(source)

    def begin(**flags):
        run, model = new_run(out, **flags), hf.load_model(source)
        trained = model, optim.adamw(model, 0.01)
        state = run.start(*trained, {"step": 0}, "resume" in flags, False, ABOUT)
        return run, state, trained

    run, state, trained = begin()
    run.save(3, *trained, {**state, "step": 3})
    rewrite(source, held | {"mtp.norm.weight": held["mtp.norm.weight"] + 1})
    with pytest.raises(InputError, match="--resume: the weights beside the language model, which"):
        begin(resume=True)
    rewrite(source, {name: held[name] for name in reversed(held)})
    run, state, (model, _) = begin(resume=True)
    rewrite(source, held | {"mtp.norm.weight": held["mtp.norm.weight"] + 1})
    with pytest.raises(InputError, match="have changed since the run began"):
        run.export(dist.full_weights(model), model.config, {})
    rewrite(source, held)
    run.export(dist.full_weights(model), model.config, {})
    saved = weights(out)
    assert saved.keys() == held.keys()
    assert all(torch.equal(saved[name], held[name]) for name in held if is_carried(name))
    assert (
        f"2 tensors beside the language model, as they are in {source}" in capsys.readouterr().out
    )
