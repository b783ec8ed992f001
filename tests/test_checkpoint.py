"""What a run leaves behind and takes up again: checkpoints, the log, and folders that another run has used before."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from small import small_config, small_model

from nanopost import InputError, checkpoint, hf, optim
from nanopost.cli import check_numbers
from nanopost.run import Logger
from nanopost.tokenizer import Tokenizer, tokenizer_files
from runs import toy

pytestmark = pytest.mark.usefixtures("alone")


def trained(model, optimizer, steps):
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        optim.set_learning_rate(optimizer, 1e-2)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fresh(seed=0):
    model = small_model(seed)
    return model, optim.adamw(model, 0.01, (0.9, 0.95))


@pytest.mark.parametrize("saved_after", [0, 2])
def test_saving_changes_nothing_and_loading_goes_on_from_there(tmp_path, saved_after):
    expected = trained(*fresh(), 4)
    model, optimizer = fresh()
    for step in range(4):
        if step == saved_after:
            checkpoint.save(tmp_path, step, model, optimizer, {"consumed": 7})
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        optim.set_learning_rate(optimizer, 1e-2)
        optimizer.step()
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), expected)
    model, optimizer = fresh(1)
    state = checkpoint.load(checkpoint.latest(tmp_path), model, optimizer)
    assert (state["step"], state["consumed"]) == (saved_after, 7)
    for step in range(saved_after, 4):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        optim.set_learning_rate(optimizer, 1e-2)
        optimizer.step()
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), expected)


def test_a_part_that_has_not_learnt_yet_is_saved_too_and_the_flags_of_now_stay(tmp_path):
    model, optimizer = fresh()
    for p in [*model.parameters()][:3]:
        p.grad = torch.full_like(p, 0.1)
    optim.set_learning_rate(optimizer, 1e-2)
    optimizer.step()
    checkpoint.save(tmp_path, 1, model, optimizer, {})
    other = small_model(1)
    found = optim.adamw(other, 0.5, (0.5, 0.6))
    checkpoint.load(checkpoint.latest(tmp_path), other, found)
    assert {(g["weight_decay"], g["betas"], g["rate"]) for g in found.param_groups} == {
        (0.5, (0.5, 0.6), 1.0),
        (0.0, (0.5, 0.6), 1.0),
    }
    assert [int(found.state[p]["step"]) for p in other.parameters()][:4] == [1, 1, 1, 0]
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q) and torch.equal(
            found.state[q]["exp_avg"], optimizer.state[p]["exp_avg"]
        )


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, *fresh(), {})
    model = small_model(num_hidden_layers=1)
    with pytest.raises(InputError, match="is of another model"):
        checkpoint.load(checkpoint.latest(tmp_path), model, optim.adamw(model, 0.0, (0.9, 0.95)))


def test_only_the_newest_checkpoint_stays_whatever_its_number(tmp_path):
    for step in (9, 3):
        checkpoint.save(tmp_path, step, *fresh(), {})
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{step:06d}"]


def test_what_cannot_be_resumed_says_so(tmp_path):
    def to_resume(out, steps, **flags):
        return checkpoint.to_resume(
            SimpleNamespace(out=str(out), steps=steps, **{"overwrite": False, **flags})
        )

    assert to_resume(tmp_path, 5) is None
    checkpoint.save(tmp_path, 4, *fresh(), {"args": {"steps": 5, "bins": 0}})
    assert to_resume(tmp_path, 5, bins=0, newer=1).name == "step-000004"
    for flags, sentence in (
        ({"steps": 3, "bins": 0}, "past --steps 3: give 4 or more"),
        ({"steps": 5, "bins": 0, "overwrite": True}, "give one of them"),
        ({"steps": 5}, "of another script .with --bins.: choose another --out"),
    ):
        with pytest.raises(InputError, match=sentence):
            to_resume(tmp_path, **flags)
    (tmp_path / "young").mkdir()  # killed before its first checkpoint
    (tmp_path / "young" / "run.json").write_text('[{"args": {"steps": 5, "bins": 0}}]')
    assert to_resume(tmp_path / "young", 5, bins=0) is None
    with pytest.raises(InputError, match="young is of another script .with --bins."):
        to_resume(tmp_path / "young", 5)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="ended and left no checkpoint"):
        to_resume(tmp_path / "done", 5)


@pytest.mark.parametrize("schedule, last", [("constant", 1.0), ("linear", 1 / 3), ("cosine", 0.25)])
def test_a_run_shorter_than_its_warmup_still_reaches_its_rate(schedule, last):
    rates = [optim.learning_rate(step, 6, 1.0, 20, schedule) for step in range(1, 7)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0]) and rates[-1] == pytest.approx(last)
    assert optim.learning_rate(1, 1, 1.0, 20, schedule) == 1.0


def test_arguments_that_changed_are_told_and_no_others():
    saved = json.loads(json.dumps({"lr": 1e-3, "betas": [0.9, 0.95], "resume": False}))
    now = {"lr": 1e-4, "betas": [0.9, 0.95], "resume": True}
    assert checkpoint.changed_arguments(saved, now) == ["lr: 0.001 -> 0.0001"]


def opened(out, resumed_at=None, overwrite=False, **args):
    logger = Logger(out, 0, 9, [])
    logger.open(resumed_at, overwrite, {"args": {"model": "elsewhere", **args}})
    return logger


def test_a_new_run_keeps_nothing_of_the_one_it_replaces(tmp_path):
    opened(tmp_path).log(1, {})
    checkpoint.save(tmp_path, 40, *fresh(), {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="already holds a run"):
        opened(tmp_path)
    opened(tmp_path, overwrite=True)
    assert checkpoint.latest(tmp_path) is None and not (tmp_path / "config.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no folder can be made"):
        opened(tmp_path / "file")


def test_what_a_run_reads_or_no_run_wrote_is_never_replaced(tmp_path):
    run, foreign = tmp_path / "run", tmp_path / "foreign"
    opened(run)
    for reads in (
        {"model": run},
        {"reference_model": run},
        {"value_model": run / "value"},
        {"model": run / "value" / "kept"},
        {"data": str(run / "samples.jsonl")},
        {"eval_data": run / "checkpoints" / "x"},
        {"reward": ["exact", f"model:{run}"]},
    ):
        with pytest.raises(
            InputError, match=f"--out {run}: this run reads {run}.*, which would be overwritten"
        ):
            opened(run, overwrite=True, **reads)
    opened(
        run, overwrite=True, data=str(run / "rows.jsonl"), model=str(run / ".." / "other")
    )  # which stay
    for kept in (
        "config.json",
        "checkpoints/mine",
        "value/mine",
        "model-00001.safetensors",
        "tokenizer.json",
    ):
        for theirs in (None, "{}", "[1]", "no JSON"):
            (foreign / kept).parent.mkdir(parents=True, exist_ok=True)
            (foreign / kept).write_text("{}")
            if theirs:
                (foreign / "run.json").write_text(theirs)
            with pytest.raises(InputError, match="holds what no run of these scripts wrote"):
                opened(foreign, overwrite=True)
            assert (foreign / kept).exists()
        shutil.rmtree(foreign)


def test_resuming_where_nothing_is_says_that_the_run_begins_anew(tmp_path, capsys):
    opened(tmp_path, resume=True)
    assert "no checkpoint is in" in capsys.readouterr().out


def test_a_resumed_log_has_every_step_once_whatever_was_sampled(tmp_path):
    logger = opened(tmp_path)
    for step in (1, 2, 3):
        logger.samples(step, [{"completion": "line\u2028separator\x85 and int f(){}"}])
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"step": 2, "completion": "cut off in int f(){}')
    opened(tmp_path, resumed_at=2)
    lines = (tmp_path / "samples.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


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
        hf.save_model(tmp_path / "out", model.state_dict().items(), model.config, files)
        assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert 7 not in Tokenizer.load(tmp_path / "out").stop_ids


@pytest.mark.parametrize(
    "name, value", [("steps", 0), ("group", -2), ("tokens", 1), ("lr", -1.0), ("save_every", -1)]
)
def test_numbers_that_mean_nothing_are_refused(name, value):
    with pytest.raises(InputError, match=f"--{name} {value}: give"):
        check_numbers({name: value})
    check_numbers({"lr": 0.0, "eval_every": 0, "max_length": None})


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    toy.write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "vocab_size": small_config().vocab_size})
    )
    with pytest.raises(InputError, match="last id is 262, .* vocab_size of 61"):
        Tokenizer.load(tmp_path)


# ------------------------------------------------------------------------------------------------- prompts of a run
def prompts(tokenizer, rows, max_prompt=None, max_new=4, tokens=200, positions=50):
    (kept,), said = tokenizer.with_prompts((rows,), max_prompt, max_new, tokens, positions)
    return kept, said


def test_prompts_are_encoded_checked_and_counted_before_a_run(tmp_path):
    toy.write_model(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)

    def row(text, **more):
        return {
            "prompt": [{"role": "user", "content": text}],
            "__line__": f"p.jsonl:{len(text)}",
            **more,
        }

    kept, said = prompts(tokenizer, [row("1+1=?", answer="2"), row("2+2=?")])
    texts = [tokenizer.decode(r["prompt_ids"]) for r in kept]
    assert texts == ["<|user|>1+1=?<|assistant|>", "<|user|>2+2=?<|assistant|>"]
    assert [r["answer"] for r in kept] == ["2", None] and "doubtful" not in said
    with pytest.raises(
        InputError,
        match="p.jsonl:60: a prompt of 62 tokens and 4 new ones are more than the model's",
    ):
        prompts(tokenizer, [row("x"), row("x" * 60)])
    with pytest.raises(InputError, match="more than --tokens 9: .*or raise --tokens"):
        prompts(tokenizer, [row("x" * 5)], tokens=9)
    kept, said = prompts(tokenizer, [row("x"), row("x" * 60)], max_prompt=20)
    assert len(kept) == 1 and said == "1 left out by --max_prompt"
    with pytest.raises(InputError, match="none of 1 prompts is left within"):
        prompts(tokenizer, [row("x" * 60)], max_prompt=20)
    _, said = prompts(tokenizer, [{"prompt": "1+1=?"}])
    assert "1 prompts are plain text, and the model has a chat template" in said
    with pytest.raises(InputError, match="ends with an assistant's message"):
        prompts(
            tokenizer,
            [{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        )


def test_tools_and_template_variables_of_a_row_reach_its_prompt(tmp_path):
    toy.write_model(tmp_path)
    template = (
        "{{ tools | length if tools else 0 }}{{ mood }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + "
        "m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = Tokenizer(Tokenizer.load(tmp_path).raw, {"eos_token": "<|end|>"}, template)
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"mood": "!"},
    }
    kept, _ = prompts(tokenizer, [row])
    assert tokenizer.decode(kept[0]["prompt_ids"]) == "1!<|user|>a<|assistant|>"
