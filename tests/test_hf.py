"""Model folders (hf.py, save.py, storage.py): transformers and back, shards, ranks, saves that are
killed or out of room."""

import json
import os
import resource
import shutil
import sys

import pytest
import torch
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import random_ids, small_model
from torch.distributed.fsdp import fully_shard

from nanopost import InputError, hf
from nanopost.model import CausalLM
from nanopost.save import SHARDS, save_model
from nanopost.storage import INDEX, SINGLE, weight_files
from nanopost.tokenizer import Tokenizer

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 256,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "rope_theta": 5e5,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": None}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 5, "pad_token_id": None}),
    "qwen3_5": ("Qwen3_5Text", {"head_dim": 16, **DELTA}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, **EXPERTS}),
    "qwen3_5_moe": (
        "Qwen3_5MoeText",
        {"head_dim": 16, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 24},
    ),
}


def oracle(family):
    transformers = pytest.importorskip("transformers")
    name, given = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**SMALL, **given, initializer_range=0.2)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.3)
    return model


@torch.no_grad()
def logits(model, ids):
    ids = torch.tensor(ids)
    if not isinstance(model, CausalLM):
        return model(ids[None]).logits[0]
    cu = torch.tensor([0, len(ids)], dtype=torch.int32)
    return model.logits(model.model.packed(ids, torch.arange(len(ids)), cu, len(ids)))


def tensors(model):
    return {n: p.detach() for n, p in model.named_parameters()}


def equal(model, other):
    a, b = tensors(model), other if isinstance(other, dict) else tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def save(folder, model, **given):
    save_model(folder, model.state_dict().items(), model.config, **given)


# ----------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize("shard_size", ["5GB", "50KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read_and_it_reads_what_we_write_with_no_key_amiss(
    tmp_path, family, shard_size
):
    theirs, ids = oracle(family), random_ids(90, 0)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    ours = hf.load_model(tmp_path / "theirs")
    assert (tmp_path / "theirs" / INDEX).exists() == (shard_size == "50KB")
    assert (logits(ours, ids) - logits(theirs, ids)).abs().max() <= 1e-4
    save(tmp_path / "ours", ours, max_shard_bytes=50_000 if shard_size == "50KB" else 2**30)
    assert (tmp_path / "ours" / INDEX).exists() == (shard_size == "50KB")
    again, report = type(theirs).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(
        report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    assert again.dtype == torch.float32 and torch.equal(logits(again, ids), logits(theirs, ids))
    names = [set(weight_files(tmp_path / folder)) for folder in ("theirs", "ours")]
    assert names[0] == names[1]
    assert equal(hf.load_model(tmp_path / "ours"), ours)


def test_the_written_folder_says_what_is_in_it(tmp_path):
    model = small_model(tie_word_embeddings=True, my_own_key=[1, 2])
    save(
        tmp_path,
        model,
        files={"tokenizer.json": "{}", "generation_config.json": b'{"eos_token_id": 7}'},
        dtype=torch.bfloat16,
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and config["my_own_key"] == [1, 2]
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["tie_word_embeddings"] is True
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(tensors(model))
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        SINGLE,
        "tokenizer.json",
    ]
    assert (tmp_path / "generation_config.json").read_bytes() == b'{"eos_token_id": 7}'
    rounded = {n: p.to(torch.bfloat16).float() for n, p in tensors(model).items()}
    assert equal(hf.load_model(tmp_path), rounded)
    assert hf.load_model(tmp_path, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


def test_the_index_counts_bytes_and_no_shard_is_larger_than_asked(tmp_path):
    model = small_model()
    save(tmp_path, model, max_shard_bytes=10_000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in tensors(model).values())
    for name in set(index["weight_map"].values()):
        held = load_file(tmp_path / name)
        assert sum(t.nbytes for t in held.values()) <= 10_000
        assert all(index["weight_map"][n] == name for n in held)


def test_tensors_are_taken_one_by_one(tmp_path):
    """No more than a shard is alive at a time: it is freed before the next tensor is made."""
    model, made = small_model(), []

    def stream():
        for name, p in model.state_dict().items():
            written = len(list((tmp_path / ".saving").iterdir()))
            assert len(made) - 2 <= written <= len(made)
            made.append(name)
            yield name, p

    save_model(tmp_path, stream(), model.config, max_shard_bytes=1)
    assert equal(hf.load_model(tmp_path), model)


def test_a_rank_that_does_not_write_still_takes_every_tensor(tmp_path):
    model, taken = small_model(), []
    stream = (taken.append(n) or (n, p) for n, p in model.state_dict().items())
    save_model(tmp_path, stream, model.config, write=False)
    assert taken == list(tensors(model)) and not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- ranks
def _rank(rank, folder, store, size):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size
    )
    torch.set_num_threads(1)
    mesh = torch.distributed.init_device_mesh("cpu", (size,))
    with torch.device("meta"):
        model = CausalLM(hf.read_config(folder))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    hf.load_weights(model.to_empty(device="cpu"), folder)
    local = {n: tuple(p.to_local().shape) for n, p in model.named_parameters()}
    torch.save(local, folder / f"local-{rank}.pt")
    full = ((n, p.full_tensor()) for n, p in model.state_dict().items())
    save_model(folder / "again", full, model.config, max_shard_bytes=4_000, write=rank == 0)
    torch.distributed.destroy_process_group()


MIXTURE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    **EXPERTS,
}


@pytest.mark.parametrize("shard_bytes, more", [(2**30, {}), (4_000, {}), (4_000, MIXTURE)])
def test_ranks_read_their_uneven_slices_and_write_the_whole_again(tmp_path, shard_bytes, more):
    model = small_model(head_dim=2, intermediate_size=50, **more)
    save(tmp_path, model, max_shard_bytes=shard_bytes)
    mp.start_processes(_rank, (tmp_path, tmp_path / "store", 3), nprocs=3, start_method="fork")
    local = [torch.load(tmp_path / f"local-{rank}.pt") for rank in range(3)]
    assert [shapes["model.embed_tokens.weight"][0] for shapes in local] == [21, 21, 19]
    assert [shapes["model.layers.0.self_attn.q_norm.weight"][0] for shapes in local] == [1, 1, 0]
    if more:
        name = "model.layers.0.mlp.experts.down_proj"
        assert [shapes[name][0] for shapes in local] == [2, 2, 0]
    assert equal(hf.load_model(tmp_path / "again"), model)


# ----------------------------------------------------------------------------------------- mistakes
@pytest.fixture
def folder(tmp_path):
    save(tmp_path, small_model(), max_shard_bytes=10_000)
    return tmp_path


def refused(folder, *words):
    with pytest.raises(InputError) as caught:
        hf.load_model(folder)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    for word in words:
        assert word in sentence
    return sentence


def test_a_hub_name_is_answered_with_the_command_that_downloads_it():
    refused(
        "Qwen/Qwen2.5-0.5B",
        "hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B",
        "and pass Qwen2.5-0.5B.",
    )
    assert "hf download" not in refused("/nowhere/at/all", "/nowhere/at/all is not a folder")


def test_a_folder_that_holds_models_and_a_run_without_one_say_what_they_are(tmp_path):
    """In the same words wherever a model is loaded: its weights, its tokenizer."""
    holder, run = tmp_path / "toy", tmp_path / "run"
    for name in ("sft", "model"):
        (holder / name).mkdir(parents=True)
        (holder / name / "config.json").write_text("{}")
    (holder / "grpo").mkdir()
    (holder / "grpo/adapter_config.json").write_text("{}")
    (run / "checkpoints/000003").mkdir(parents=True)
    (run / "checkpoints/000003/state.json").write_text("{}")
    (run / "run.json").write_text("[]")
    begun = f"the run in {run} is at step 0 and has not written its model, which it does at its end"
    names = f"{holder}/grpo, {holder}/model and {holder}/sft do: name one of them."
    cases = {holder: f"{holder} holds no model; {names}", run: begun}
    cases[tmp_path] = f"{tmp_path} holds no model; {names}"
    cases[run / "checkpoints/000003"] = "is a run's checkpoint, not a model: --resume the run"
    for folder, sentence in cases.items():
        refused(folder, sentence)
        with pytest.raises(InputError) as error:
            Tokenizer.load(folder)
        assert sentence in str(error.value)
    (run / "metrics.jsonl").write_text('{"step": 2, "x": 1}\n{"step": 13, "x": 2}\n{"ste')
    refused(run, "is at step 13 and has not", ": --resume it if it has stopped.")
    (run / "metrics.jsonl").write_text('{"step": 13, "x": 2}\n{"step": 14, "x": 0.')
    refused(run, "is at step 13 and has not")
    for i in range(9):
        (holder / f"a{i}").mkdir()
        (holder / f"a{i}/config.json").write_text("{}")
    refused(holder, f"{holder}/a4 and 7 more do: name")


def test_folders_that_are_something_else_say_so(tmp_path):
    refused(tmp_path, "no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter_config.json", "its base model, None, is no model folder here")
    (tmp_path / "config.json").write_text(json.dumps(small_model().config.hf))
    refused(tmp_path, "no weights at all")
    for name in ("pytorch_model.bin", "model.Q4_K_M.gguf"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path, name, "convert it to safetensors")
    (tmp_path / "config.json").write_text('{"model_type": ')
    refused(tmp_path, "config.json: not valid JSON")


def change(folder, edit):
    """Rewrite the weights as one file after edit(tensors)."""
    weights = tensors(hf.load_model(folder))
    for path in [*folder.glob(SHARDS), folder / INDEX]:
        path.unlink(missing_ok=True)
    edit(weights)
    save_file(weights, folder / SINGLE)


def test_missing_unexpected_and_misshapen_weights_are_named(folder):
    change(folder, lambda w: w.update({"model.norm.bias": w.pop("model.norm.weight")}))
    refused(folder, "missing: model.norm.weight", "unexpected: model.norm.bias")
    change_back = tensors(small_model())
    change_back["model.embed_tokens.weight"] = torch.zeros(60, 32)
    save_file(change_back, folder / SINGLE)
    refused(folder, SINGLE, "model.embed_tokens.weight", "[60, 32]", "[61, 32]")


def test_an_untied_config_without_a_head_says_so(folder):
    change(folder, lambda w: w.pop("lm_head.weight"))
    refused(folder, "missing: lm_head.weight", "not tied")


def tie(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


def test_a_tied_heads_copy_and_old_rotary_buffers_are_passed_over(folder):
    change(
        folder,
        lambda w: w.update(
            {
                "lm_head.weight": w["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    tie(folder)
    assert hf.load_model(folder).lm_head is None


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(folder):
    tie(folder)
    refused(folder, "tie_word_embeddings", "differs")


def test_damaged_files_are_named(folder):
    first = folder / json.loads((folder / INDEX).read_text())["weight_map"]["model.norm.weight"]
    whole = first.read_bytes()
    for content in (
        b"",
        whole[:5],
        whole[:-1],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ):
        first.write_bytes(content)
        refused(folder, first.name, "damaged or incomplete")
    save_file({"other": torch.zeros(1)}, first)
    refused(folder, first.name, "does not contain tensor model.layers.1.mlp.down_proj.weight")
    first.unlink()
    refused(folder, INDEX, first.name, "not there")
    (folder / INDEX).write_text("{")
    refused(folder, INDEX, "not valid JSON")


# --------------------------------------------------------------------------------- kills, full disk
def in_child(function):
    """Run in a forked process -> its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(event):
    """Let this process die at its event-th open, rename, unlinking, mkdir or rmdir."""
    left = [event]

    def hook(name, _):
        if name in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    sys.addaudithook(hook)


def killed_saves(tmp_path, old, new, old_bytes, new_bytes, old_files, new_files):
    """A folder for each instant at which a save can be killed, and the finished one last."""
    save(tmp_path / "old", old, max_shard_bytes=old_bytes, files=old_files)
    (tmp_path / "old" / "metrics.jsonl").write_text("kept\n")
    (tmp_path / "old" / "checkpoints").mkdir()
    for event in range(1, 1000):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        code = in_child(
            lambda: (kill_at(event), save(folder, new, max_shard_bytes=new_bytes, files=new_files))  # noqa: B023
        )
        assert (folder / "metrics.jsonl").read_text() == "kept\n" and (
            folder / "checkpoints"
        ).is_dir()
        yield folder
        if code == 0:
            return
        assert code == 9


@pytest.mark.parametrize(
    "old_bytes, new_bytes", [(2**30, 2**30), (2**30, 20_000), (20_000, 20_000), (20_000, 2**30)]
)
def test_a_save_killed_at_any_instant_leaves_the_old_model_or_the_new_one(
    tmp_path, old_bytes, new_bytes
):
    old, new, files = small_model(0), small_model(1), {"tokenizer.json": "{}"}
    states = []
    for folder in killed_saves(tmp_path, old, new, old_bytes, new_bytes, files, files):
        loaded = hf.load_model(folder)
        assert equal(loaded, old) or equal(loaded, new)
        states.append("old" if equal(loaded, old) else "new")
        if len(states) % 7 == 0:  # the next save finds its way through what a killed one left
            save(folder, old, max_shard_bytes=new_bytes, files=files)
            assert equal(hf.load_model(folder), old)
            assert not (folder / ".saving").exists()
            assert len({*folder.glob("*.safetensors")}) == len({*weight_files(folder).values()})
    assert states == sorted(states, reverse=True) and states[0] == "old" and states[-1] == "new"
    assert len(states) > 8 and states.count("new") > 1
    assert not (folder / ".saving").exists()
    assert {*folder.glob("*.safetensors")} == {*weight_files(folder).values()}


@pytest.mark.parametrize("old_bytes, new_bytes", [(2**30, 2**30), (20_000, 20_000)])
def test_where_other_files_change_too_a_killed_save_is_whole_or_says_that_it_is_not(
    tmp_path, old_bytes, new_bytes
):
    old, new = small_model(0), small_model(1, rope_theta=5e5)
    old_files, new_files, seen = {"tokenizer.json": "old"}, {"tokenizer.json": "new"}, set()
    for folder in killed_saves(tmp_path, old, new, old_bytes, new_bytes, old_files, new_files):
        if not (folder / "config.json").exists():
            refused(folder, "cut off")
            continue
        loaded = hf.load_model(folder)
        seen.add(state := (folder / "tokenizer.json").read_text())
        assert equal(loaded, {"old": old, "new": new}[state])
        assert (
            loaded.config.ropes["full_attention"]["rope_theta"]
            == {"old": 10000.0, "new": 5e5}[state]
        )
    assert seen == {"old", "new"} and state == "new"


def test_transformers_and_we_read_the_same_of_two_models_in_one_folder(tmp_path):
    """What a save killed between the new index and the end of the old single file leaves."""
    transformers = pytest.importorskip("transformers")
    old, new = small_model(0), small_model(1)
    save(tmp_path, new, max_shard_bytes=20_000)
    save(tmp_path / "old", old)
    shutil.copy(tmp_path / "old" / SINGLE, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert equal(hf.load_model(tmp_path), old) and torch.equal(
        theirs.lm_head.weight, old.lm_head.weight
    )


@pytest.mark.parametrize("room", [5_000, 500])
def test_a_full_disk_leaves_the_old_model_and_one_sentence(tmp_path, room):
    """A limit on file sizes acts as a full disk: it stops the weights, or already config.json."""
    old = small_model(0)
    save(tmp_path, old)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def save_without_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with pytest.raises(
            InputError, match=r"disk is full; the model that was there is untouched.*--resume.*[.]$"
        ):
            save(
                tmp_path,
                small_model(1),
                files={"tokenizer.json": "x" * 100_000},
                max_shard_bytes=4_000,
            )

    assert in_child(save_without_room) == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert equal(hf.load_model(tmp_path), old)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_the_umask_decides_who_may_read_every_file(tmp_path, mask, mode, shard_bytes):
    model = small_model()
    before = os.umask(mask)
    try:
        save_model(
            tmp_path,
            model.state_dict().items(),
            model.config,
            {"a.txt": "text"},
            max_shard_bytes=shard_bytes,
        )
    finally:
        os.umask(before)
    assert len([*tmp_path.iterdir()]) >= 3
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == mode, path.name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(folder, value, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda weights: weights[name][3, 4].fill_(value))
    with pytest.raises(
        InputError, match=f"not all weights are finite .{name}.: the run that wrote"
    ):
        hf.load_model(folder, dtype=dtype)


def test_a_file_is_a_folders_own_unless_it_is_a_link_to_elsewhere(tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1a", tmp_path / "hub" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for path in (tmp_path / "secret", blobs / "2b", snapshot / "plain"):
        path.write_text("text")
    (snapshot / "cached").symlink_to("../../blobs/2b")
    (snapshot / "within").symlink_to("plain")
    (snapshot / "leak").symlink_to(tmp_path / "secret")
    (snapshot / "dangling").symlink_to("nowhere")
    own = [name for name in sorted(os.listdir(snapshot)) if hf.is_own(snapshot / name)]
    assert own == ["cached", "plain", "within"]
    (tmp_path / "link").symlink_to(snapshot)  # the folder itself may be one
    assert hf.is_own(tmp_path / "link" / "plain") and not hf.is_own(tmp_path / "link" / "leak")


def test_an_index_of_files_that_are_not_there_is_refused_by_a_dry_run_too(tmp_path):
    model = small_model()
    tensors = model.state_dict().items()
    save_model(tmp_path, tensors, model.config, max_shard_bytes=20_000)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    for device in ("cpu", "meta"):
        with pytest.raises(InputError, match=f"names {gone.name}, which is not there; copy the"):
            hf.load_model(tmp_path, device)
    (tmp_path / INDEX).unlink()
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    hf.load_model(tmp_path, "meta")  # config.json is enough for --dry_run
