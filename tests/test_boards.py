"""TensorBoard and W&B, read by their own readers: every metric with its value at its step."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from scripts import ROOT, metrics, parser_of
from test_run import begun, finish, signals  # noqa: F401

from nanopost import InputError, cli
from nanopost.boards import STEP, Boards, name_of
from nanopost.dist import World
from nanopost.run import Run

pytestmark = pytest.mark.usefixtures("alone", "signals")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def shown(out):
    """{(name there, step): value} of what metrics.jsonl holds."""
    return {
        (name_of(name), line["step"]): value
        for line in metrics(out)
        for name, value in line.items()
        if name != "step"
    }


def on_tensorboard(out):
    """-> ({(tag, step): value}, {(tag of text, step): text})."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = event_accumulator.EventAccumulator(
        str(out / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    ).Reload()
    scalars = [(tag, e) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    texts = [(tag, e) for tag in events.Tags()["tensors"] for e in events.Tensors(tag)]
    assert len({(tag, e.step) for tag, e in scalars}) == len(scalars)  # none is there twice
    return (
        {(tag, e.step): e.value for tag, e in scalars},
        {(tag, e.step): e.tensor_proto.string_val[0].decode() for tag, e in texts},
    )


def records(path) -> list:
    """What an offline file holds, once its run has ended: W&B's process writes it."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    for _ in range(100):
        store, found = DataStore(), []
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(data)
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} does not end")


def on_wandb(out):
    """-> ({(name, step): value}, configuration) of the one offline run in a folder."""
    pytest.importorskip("wandb")
    (path,) = (out / "wandb").glob("offline-run-*/*.wandb")
    kinds = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        kinds.setdefault(kind, []).append(getattr(record, kind))
    (run,) = kinds["run"]
    assert (run.run_id, run.project) == ((out / "wandb/id").read_text(), "toy")
    found = {}
    for history in kinds["history"]:
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in history.item}
        assert row[STEP] == row["_step"] == history.step.num
        names = [name for name in row if name != STEP and not name.startswith("_")]
        found |= {(name, row[STEP]): row[name] for name in names}
    return found, {item.key: json.loads(item.value_json) for item in run.config.update}


def close(found, expected, rel):
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=rel, nan_ok=True)


def started(out, resume=False, on=("tensorboard",), **flags):
    """A run with boards, as in test_run."""
    boards = Boards(out, "tensorboard" in on, "toy" if "wandb" in on else None)
    return begun(out, resume=resume, boards=boards, **flags)


def log(run, steps, factor=1.0):
    for step in steps:
        line = {"reward": factor * step / 3, "rewards/chosen": -1e-9 * step, "num_tokens": 7 * step}
        if step % 2 == 0:
            line["eval/rewards/accuracies"] = factor / (step + 1)
        run.log(step, line)


# ------------------------------------------------------------------------------------- every metric
@pytest.mark.parametrize(
    "board, read, rel", [("tensorboard", on_tensorboard, 1e-7), ("wandb", on_wandb, 1e-15)]
)
def test_every_metric_is_shown_and_after_a_resume_as_if_there_was_none(
    tmp_path, monkeypatch, board, read, rel
):
    run, state, trained = started(tmp_path, on=[board], lr=1e-3)
    log(run, range(5))
    run.save(4, *trained, {**state, "step": 4})
    log(run, range(5, 8), factor=99.0)  # killed here: what was shown of these steps is wrong
    run.boards.close()
    close(read(tmp_path)[0], shown(tmp_path), rel)
    run, _, _ = started(tmp_path, resume=True, on=[board], lr=1e-3)
    log(run, range(5, 7))
    finish(run, monkeypatch)
    assert max(step for _, step in shown(tmp_path)) == 6
    close(read(tmp_path)[0], shown(tmp_path), rel)
    if board == "wandb":
        assert read(tmp_path)[1]["lr"] == 1e-3


def test_a_board_asked_for_at_a_resume_has_the_run_from_its_beginning(tmp_path):
    run, state, trained = started(tmp_path, on=[])
    log(run, range(4))
    run.save(3, *trained, {**state, "step": 3})
    assert not (tmp_path / "tensorboard").exists() and not (tmp_path / "wandb").exists()
    run, _, _ = started(tmp_path, resume=True, on=["tensorboard", "wandb"])
    log(run, [4])
    run.boards.close()
    close(on_tensorboard(tmp_path)[0], shown(tmp_path), 1e-7)
    close(on_wandb(tmp_path)[0], shown(tmp_path), 1e-15)


def test_a_board_that_was_off_for_a_while_has_the_steps_in_between(tmp_path):
    """And the alarms."""
    both = ["tensorboard", "wandb"]
    for on, steps in ((both, range(4)), ([], range(4, 8)), (both, range(8, 11))):
        run, state, trained = started(tmp_path, resume=steps[0] > 0, on=on, steps=99)
        log(run, steps[:-1])
        run.log(steps[-1], {"loss": float("nan") if steps[0] == 4 else 1.0})
        run.save(steps[-1], *trained, {**state, "step": steps[-1]})
        run.boards.close()
    assert {step for _, step in shown(tmp_path)} == set(range(11))
    numbers, texts = on_tensorboard(tmp_path)
    close(numbers, shown(tmp_path), 1e-7)
    assert list(texts) == [("alarms/not_finite/text_summary", 7)]
    close(on_wandb(tmp_path)[0], shown(tmp_path), 1e-15)
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    alerts = [x.alert for x in records(path) if x.WhichOneof("record_type") == "alert"]
    assert [x.title for x in alerts] == ["not_finite"] and alerts[0].text.startswith("step 7: ")


class Online:
    """A run on W&B, as wandb.init gives it, that has steps up to 3: there is no server here."""

    id, url, dir, offline, step = "a1b2", "https://there", "wandb/run-1/files", False, 4

    def __init__(self):
        self.logged, self.alerts = [], []

    def define_metric(self, *_, **__):
        pass

    def log(self, values, step):
        self.logged.append((step, values["train/loss"]))

    def alert(self, title, text, wait_duration):
        self.alerts.append(text)


def test_a_run_that_goes_on_online_gets_the_steps_that_wandb_lacks(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/id").write_text("a1b2")
    given, run = {}, Online()
    monkeypatch.setattr(wandb, "init", lambda **flags: given.update(flags) or run)
    boards = Boards(tmp_path, project="toy")
    boards.connect({}, resumed=True)
    alarms = [{"step": step, "alarm": "a", "message": "b"} for step in (2, 5)]
    assert boards.start([{"step": step, "loss": step / 2} for step in range(7)], alarms) == ""
    assert given["id"] == "a1b2"
    assert run.logged == [(4, 2.0), (5, 2.5), (6, 3.0)] and run.alerts == ["step 5: b"]


def test_a_run_that_replaces_another_shows_none_of_it(tmp_path):
    run, _, _ = started(tmp_path)
    log(run, range(9))
    run.boards.close()
    run, _, _ = started(tmp_path, overwrite=True)
    log(run, range(2))
    run.boards.close()
    close(on_tensorboard(tmp_path)[0], shown(tmp_path), 1e-7)


def test_alarms_are_texts_and_numbers_may_be_no_numbers(tmp_path):
    run, _, _ = started(tmp_path)
    run.log(3, {"loss": float("nan"), "reward": float("inf")})
    run.boards.close()
    numbers, texts = on_tensorboard(tmp_path)
    assert numbers["train/loss", 3] != numbers["train/loss", 3]
    assert numbers["train/reward", 3] == float("inf")
    (line,) = (tmp_path / "alarms.jsonl").read_text().splitlines()
    assert texts == {("alarms/not_finite/text_summary", 3): json.loads(line)["message"]}


def test_names_are_those_of_transformers():
    integrations = pytest.importorskip("transformers.integrations.integration_utils")
    for name in ("reward", "rewards/chosen", "completions/mean_length", "grad_norm", "evaluations"):
        assert [name_of(name)] == list(integrations.rewrite_logs({name: 1.0}))
        theirs = integrations.rewrite_logs({f"eval_{name}": 1.0})
        assert [name_of(f"eval/{name}")] == list(theirs)


# ----------------------------------------------------------------------------------------- failures
@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(InputError, match=f"--{package} needs the package {package}: pip install"):
        Boards(tmp_path, tensorboard=package == "tensorboard", project="p" * (package == "wandb"))
    Boards(tmp_path)


def in_a_process(code, *arguments, **environment):
    """Run code; without the W&B process of this one."""
    ours = ("WANDB_SERV", "WANDB_API")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | environment
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


NO_LOGIN = """
import sys
from nanopost import InputError
from nanopost.boards import Boards
try:
    Boards(sys.argv[1], project="toy").connect({}, False)
except InputError as error:
    print(error)
"""


def test_wandb_that_does_not_start_is_one_sentence(tmp_path):
    pytest.importorskip("wandb")
    done = in_a_process(NO_LOGIN, tmp_path, WANDB_MODE="online", HOME=tmp_path, NETRC="none")
    said = done.stdout.splitlines()[-1]
    assert said.startswith("--wandb toy: wandb does not start (")
    assert said.endswith("): run `wandb login`, or set WANDB_MODE=offline.")
    assert not list(tmp_path.glob("wandb"))  # which the next start would take for another's


REPLACES = """
import sys
import torch
sys.path.insert(0, "tests")
from nanopost import InputError
from test_boards import Boards, begun
torch.distributed.init_process_group(
    "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
)
try:
    begun(sys.argv[1], overwrite=True, boards=Boards(sys.argv[1], project="toy"))
except InputError as error:
    print(error)
"""


def test_a_run_is_not_replaced_by_one_whose_wandb_does_not_start(tmp_path):
    pytest.importorskip("wandb")
    run, state, trained = started(tmp_path, on=["tensorboard", "wandb"])
    log(run, range(5))
    run.save(4, *trained, {**state, "step": 4})
    run.boards.close()
    run.hashing.join()
    run.lock.close()
    on_board = on_wandb(tmp_path)
    logs = tmp_path / "wandb", tmp_path / ".lock"  # W&B's process may still write its own
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    paths = [path for path in paths if not any(map(path.is_relative_to, logs))]
    before = {path: path.read_bytes() for path in paths}
    done = in_a_process(REPLACES, tmp_path, WANDB_MODE="online", WANDB_API_KEY="no key")
    assert "--wandb toy: wandb does not start (" in done.stdout, done.stderr
    assert {path: path.read_bytes() for path in paths} == before
    assert on_wandb(tmp_path) == on_board
    assert not [path for path in tmp_path.glob("wandb/*run-*") if path.name < "offline"]
    run, _, _ = started(tmp_path, overwrite=True, on=["wandb"])  # and with another it is
    log(run, range(2))
    run.boards.close()
    close(on_wandb(tmp_path)[0], shown(tmp_path), 1e-15)
    assert not (tmp_path / "tensorboard").exists()


def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    """W&B itself makes wandb/ where it is run."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(InputError, match="--wandb needs the package wandb: pip install wandb"):
        Boards(tmp_path, project="toy")


def test_a_tensorboard_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch):
    saved, _, _ = started(tmp_path, on=[])
    log(saved, range(3))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="--tensorboard: the package tensorboard cannot be impor"):
        started(tmp_path, overwrite=True)
    assert len(metrics(tmp_path)) == 3


DIES = """
import os, signal, sys
from pathlib import Path
from nanopost.boards import Boards
boards = Boards(sys.argv[1], project="toy")
boards.connect({}, False)
boards.start([], [])
children = [int(pid) for path in Path("/proc/self/task").glob("*/children")
            for pid in path.read_text().split()]
(core,) = [pid for pid in children if "wandb" in Path(f"/proc/{pid}/comm").read_text()]
os.kill(core, signal.SIGKILL)
os.waitpid(core, 0)
for step in range(5):
    print(step, boards.log(step, {"loss": 1.0}))
print(boards.alarm(5, "name", "text"), boards.close(), "trained")
"""


def test_wandb_that_dies_is_told_once_and_the_run_goes_on(tmp_path):
    """In a process of its own, whose W&B is killed."""
    pytest.importorskip("wandb")
    done = in_a_process(DIES, tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("trained\n")
    assert done.stdout.count("warning: W&B has failed and is left out from here on") == 1


def test_an_error_still_prints_one_sentence(tmp_path):
    pytest.importorskip("wandb")
    hook = sys.excepthook
    run, _, _ = started(tmp_path, on=["wandb"])
    assert sys.excepthook is hook
    run.boards.close(failed=True)


def test_other_ranks_open_no_board(tmp_path):
    boards = Boards(tmp_path, tensorboard=True)
    world = World(1, 1, torch.device("cpu"), torch.float32)
    run = Run(tmp_path, world, 9, {}, [], boards=boards)
    run.log(1, {"loss": 1.0})
    assert boards.open == [] and not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    "flags, found", [("", (False, None)), ("--tensorboard --wandb p", (True, "p"))]
)
def test_the_flags_of_a_script_reach_its_run(flags, found, tmp_path):
    words = f"--model m --data d --steps 7 --keep 5 --alarms stop --out {tmp_path} {flags}"
    args = parser_of("train_sft.py").parse_args(words.split())
    run = cli.run(args, World(0, 1, torch.device("cpu"), torch.float32), ["loss"])
    assert (run.boards.tensorboard, run.boards.project) == found
    assert (run.keep, run.on_alarm, run.steps, run.show) == (5, "stop", 7, ["loss"])
    assert run.arguments == vars(args) and run.boards.out == run.out == tmp_path
