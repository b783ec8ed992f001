"""What a run leaves and resumes from: checkpoints, the log, folders that another run has used."""

import json
import os
import pickle
import random

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from small import small_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nanopost import InputError, checkpoint, hf, optim
from nanopost.save import save_model
from nanopost.tokenizer import Tokenizer, tokenizer_files
from runs import toy

pytestmark = pytest.mark.usefixtures("alone")


# -------------------------------------------------------------------------------------- checkpoints
def adamw(model, weight_decay=0.01, betas=(0.9, 0.95)):
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices(model), "weight_decay": weight_decay, "rate": 1.0},
        {"params": vectors, "weight_decay": 0.0, "rate": 5.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=betas, fused=True)


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


OPTIMIZERS = {
    "adamw": adamw,
    "adamw_looped": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda model: torch.optim.Muon(matrices(model), lr=1e-2)


def fresh(seed=0, make=adamw):
    model = small_model(seed)
    return model, make(model)


def gradient(p, seed):
    whole = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    if isinstance(p, DTensor):
        return distribute_tensor(whole, p.device_mesh, p.placements)
    return whole


def learn(model, optimizer, steps, some=None):
    """Steps on random gradients that depend on the step alone; some: of the first parameters."""
    for step in steps:
        for i, p in enumerate([*model.parameters()][:some]):
            p.grad = gradient(p, 1000 * step + i)
        optimizer.step()
        optimizer.zero_grad()


def full(value):
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        value = value.detach().clone()
    return value


def everything(model, optimizer):
    """Weights and optimizer state by name, gathered and copied."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = full(p)
        for entry, value in optimizer.state.get(p, {}).items():
            found[f"{name} {entry}"] = full(value)
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is type(value), name
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("saved_after", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saving_changes_nothing_and_loading_continues_from_there(tmp_path, name, saved_after):
    untouched = fresh(make=OPTIMIZERS[name])
    learn(*untouched, range(4))
    expected = everything(*untouched)
    saved = fresh(make=OPTIMIZERS[name])
    learn(*saved, range(saved_after))
    checkpoint.save(tmp_path, saved_after, *saved, {"consumed": 7})
    learn(*saved, range(saved_after, 4))
    assert_equal(everything(*saved), expected)
    resumed = fresh(1, OPTIMIZERS[name])
    learn(*resumed, range(50, 51))  # a state of its own, which goes
    state = checkpoint.load(checkpoint.latest(tmp_path), *resumed)
    assert state == {"consumed": 7, "step": saved_after, "ranks": 1}
    learn(*resumed, range(saved_after, 4))
    assert_equal(everything(*resumed), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_that_have_not_learnt_yet_have_no_state_and_get_none(tmp_path, name):
    untouched = fresh(make=OPTIMIZERS[name])
    learn(*untouched, range(1), some=3)
    learn(*untouched, range(1, 3))
    saved = fresh(make=OPTIMIZERS[name])
    learn(*saved, range(1), some=3)
    before = everything(*saved)
    checkpoint.save(tmp_path, 1, *saved, {})
    assert_equal(everything(*saved), before)
    resumed = fresh(1, OPTIMIZERS[name])
    learn(*resumed, range(50, 51))
    checkpoint.load(checkpoint.latest(tmp_path), *resumed)
    assert_equal(everything(*resumed), before)
    learn(*resumed, range(1, 3))
    assert_equal(everything(*resumed), everything(*untouched))


def test_hyperparameters_are_those_of_the_optimizer_given(tmp_path):
    model, optimizer = fresh()
    learn(model, optimizer, range(1))
    optimizer.state[model.model.norm.weight]["count"] = 3  # an optimizer may keep plain numbers
    checkpoint.save(tmp_path, 1, model, optimizer, {})
    other = small_model(1)
    given = adamw(other, 0.5, (0.5, 0.6))
    checkpoint.load(checkpoint.latest(tmp_path), other, given)
    assert [(g["weight_decay"], g["betas"], g["rate"]) for g in given.param_groups] == [
        (0.5, (0.5, 0.6), 1.0),
        (0.0, (0.5, 0.6), 5.0),
    ]
    assert_equal(everything(other, given), everything(model, optimizer))
    assert given.state[other.model.norm.weight]["count"] == 3


def test_further_models_are_stored_under_their_names(tmp_path):
    reference = small_model(2)
    checkpoint.save(tmp_path, 1, *fresh(), {}, reference=reference)
    found, path = small_model(3), checkpoint.latest(tmp_path)
    checkpoint.load(path, *fresh(1), reference=found)
    for p, q in zip(found.parameters(), reference.parameters()):
        assert torch.equal(p, q)
    with pytest.raises(
        InputError, match="belongs to another teacher .0 tensors there, 25 here.: resume"
    ):
        checkpoint.load(path, *fresh(1), teacher=found)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    saved = fresh()
    learn(*saved, range(1))
    checkpoint.save(tmp_path, 1, *saved, {})
    path = checkpoint.latest(tmp_path)
    model = small_model(num_hidden_layers=1)
    with pytest.raises(InputError, match="belongs to another model"):
        checkpoint.load(path, model, adamw(model))
    model = small_model(intermediate_size=50)
    with pytest.raises(InputError, match="does not fit this model or is damaged .*resume with the"):
        checkpoint.load(path, model, adamw(model))
    model = small_model()
    with pytest.raises(InputError, match="state for .*norm.weight, which this run does not train"):
        checkpoint.load(path, model, torch.optim.SGD(matrices(model)))


def test_only_the_newest_checkpoint_stays_whatever_its_number(tmp_path):
    for step in (9, 3):
        checkpoint.save(tmp_path, step, *fresh(), {})
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{step:06d}"]


def test_the_random_state_is_restored_to_the_last_draw(tmp_path):
    random.gauss(0, 1), np.random.normal()  # each keeps a second number for the next call
    checkpoint.save(tmp_path, 1, *fresh(), {})
    drawn = [(random.gauss(0, 1), np.random.normal(), float(torch.randn(1))) for _ in range(3)]
    checkpoint.load(checkpoint.latest(tmp_path), *fresh(1))
    again = [(random.gauss(0, 1), np.random.normal(), float(torch.randn(1))) for _ in range(3)]
    assert again == drawn
    json.loads((checkpoint.latest(tmp_path) / "random-0.json").read_text())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_a_checkpoint_runs_no_code_of_its_metadata(tmp_path):
    checkpoint.save(tmp_path, 1, *fresh(), {})
    path = checkpoint.latest(tmp_path)
    dcp = b"ctorch.distributed.checkpoint.metadata\n"  # the module has dataclass, which runs text
    for evil in (pickle.dumps(Evil(tmp_path / "ran")), b"cos.path\njoin\n.", dcp + b"dataclass\n."):
        (path / ".metadata").write_bytes(evil)
        with pytest.raises(InputError, match="is damaged, or was written by no script here"):
            checkpoint.load(path, *fresh(1))
    assert not (tmp_path / "ran").exists()


def test_loading_a_checkpoint_runs_no_code_of_a_pickled_object_in_it(tmp_path):
    """torch.distributed.checkpoint would unpickle it where the model has a tensor of that name."""
    checkpoint.save(tmp_path, 1, *fresh(), {})
    path = checkpoint.latest(tmp_path)
    model, optimizer = fresh()
    names = [f"model.{name}" for name in model.state_dict()]
    (path / ".metadata").unlink()
    dcp.save(dict.fromkeys(names, Evil(tmp_path / "ran")), checkpoint_id=path)
    with pytest.raises(InputError, match="holds pickled objects"):
        checkpoint.load(path, model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_what_a_kill_left_of_a_save_or_a_deletion_goes_with_the_next_save(tmp_path):
    for name in ("step-000001", "step-000003", "step-000003.tmp", "step-000002.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "__0_0.distcp").write_text("")
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 3, *fresh(), {}, keep=5)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    assert checkpoint.damage(checkpoint.latest(tmp_path)) == ""


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001):
        checkpoint.save(tmp_path, step, *fresh(), {}, keep=2)
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)] == [
        1_000_000,
        1_000_001,
    ]


def _rank(rank, size, folder, name, task):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / task}", rank=rank, world_size=size
    )
    torch.set_num_threads(1)
    model = small_model(0 if task == "save" else 1)
    if size > 1:
        mesh = torch.distributed.init_device_mesh("cpu", (size,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
    run = model, OPTIMIZERS[name](model)
    if task == "save":
        learn(*run, range(1), some=5)
        learn(*run, range(1, 2), some=12)
        checkpoint.save(folder, 2, *run, {})
        torch.manual_seed(rank)
    else:
        checkpoint.load(checkpoint.latest(folder), *run)
    at_once = everything(*run)
    if task == "reload":  # for the other number of ranks
        checkpoint.save(folder / "again", 2, *run, {})
    learn(*run, range(2, 4))
    at_last = everything(*run)  # a collective
    if rank == 0:
        torch.save((at_once, at_last), folder / f"{task}.pt")
    torch.distributed.destroy_process_group()


def ranks(size, folder, name, task):
    mp.start_processes(_rank, (size, folder, name, task), nprocs=size, start_method="fork")
    return torch.load(folder / f"{task}.pt")


@pytest.mark.parametrize("alone", [None])  # no process group here: each worker joins its own
@pytest.mark.parametrize("name", ["adamw", "momentum", "muon"])
def test_two_ranks_resume_exactly_and_another_number_loads_the_same(tmp_path, name):
    if name not in OPTIMIZERS:
        pytest.skip(f"this torch has no {name}")
    saved, expected = ranks(2, tmp_path, name, "save")
    assert len(expected) > len(saved) > len([*small_model().parameters()])
    loaded, resumed = ranks(2, tmp_path, name, "load")
    assert_equal(loaded, saved)
    assert_equal(resumed, expected)
    loaded, _ = ranks(1, tmp_path, name, "reload")
    assert_equal(loaded, saved)
    (tmp_path / "checkpoints").rename(tmp_path / "kept")
    (tmp_path / "again" / "checkpoints").rename(tmp_path / "checkpoints")
    loaded, resumed = ranks(2, tmp_path, name, "back")
    assert_equal(loaded, saved)
    assert_equal(resumed, expected)


def test_the_rate_rises_to_its_peak_and_falls_to_one_step_above_zero():
    rates = [optim.learning_rate(step, 8, 1.0, 2) for step in range(1, 9)]
    assert rates == pytest.approx([1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_a_run_shorter_than_its_warmup_still_reaches_its_rate():
    rates = [optim.learning_rate(step, 6, 1.0, 20) for step in range(1, 7)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 2 / 3, 1 / 3])
    assert optim.learning_rate(1, 1, 1.0, 20) == 1.0


def test_a_folder_that_another_model_used_holds_the_new_one_alone(tmp_path):
    toy.write_model(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 7}')
    toy.write_model(tmp_path / "b")
    tokenizer, model = Tokenizer.load(tmp_path / "b"), hf.load_model(tmp_path / "b")
    base = Tokenizer(tokenizer.raw, {"eos_token": "<|end|>"}, None)
    for source, t in (
        ("a", Tokenizer.load(tmp_path / "a")),
        ("b", tokenizer),
        ("b", base),
        ("b", base),
    ):
        files = tokenizer_files(tmp_path / source, t)
        save_model(tmp_path / "out", model.state_dict().items(), model.config, files)
        assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert 7 not in Tokenizer.load(tmp_path / "out").stop_ids
