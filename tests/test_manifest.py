import shutil
import subprocess
import sys
from pathlib import Path

import torch
from scripts import ENVIRONMENT, ROOT, weights

from nanopost import hf, manifest
from nanopost.manifest import named_files
from nanopost.run import starts_of
from runs import toy


def write_toy(folder) -> Path:
    toy.write_model(folder / "model")
    rows = [
        {"messages": [*row["prompt"], {"role": "assistant", "content": row["answer"]}]}
        for row in toy.prompt_rows(held_out=False)[:40]
    ]
    toy.write_rows(folder / "chats.jsonl", rows)
    return folder


def test_run_json_starts_the_same_run_again(tmp_path):
    place = write_toy(tmp_path)
    script = tmp_path / "my fork.py"  # which git does not know
    shutil.copy(ROOT / "train_sft.py", script)
    flags = f"--model {place}/model --data {place}/chats.jsonl --holdout 8 --out {place}/out"
    flags += " --steps 3 --rows 8 --lr 1e-2 --warmup 0 --device cpu"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--standalone", "--nproc_per_node", "1", script, *flags.split()]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    (start,) = starts_of(place / "out")
    first = weights(place / "out")
    hashes = start["hashes"]
    assert hashes[f"{place}/model"] == hf.content_hash(place / "model")
    assert f"{place}/chats.jsonl" in hashes
    assert f"+{script.read_text().splitlines()[0]}" in start["diff"]
    del environment["OMP_NUM_THREADS"]  # the line has it
    environment["PATH"] = f"{torchrun.parent}:{environment['PATH']}"
    again = f"{start['again']} --overwrite"
    subprocess.run(["bash", "-c", again], env=environment, check=True, capture_output=True)
    assert weights(place / "out") == first
    assert starts_of(place / "out")[0]["threads"] == 2


def test_the_command_of_a_run_on_several_nodes_leaves_the_address_to_the_reader(monkeypatch):
    for name, value in (
        ("TORCHELASTIC_RUN_ID", "x"),
        ("LOCAL_WORLD_SIZE", "8"),
        ("GROUP_WORLD_SIZE", "4"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--stop", "two words"])
    assert manifest.launch_command().endswith(
        f"OMP_NUM_THREADS={torch.get_num_threads()} torchrun --nnodes 4 "
        "--rdzv_endpoint HOST:PORT --nproc_per_node 8 train_sft.py --stop 'two words'"
    )


def test_changes_to_the_code_are_a_patch_of_the_commit(tmp_path, monkeypatch):
    """git apply gives the same files again, whatever bytes they hold and however git is set up."""
    repository, other = tmp_path / "one", tmp_path / "two"
    before = {
        "a.py": b"one\n",
        "windows.py": b"x\r\n",
        "latin.txt": b"\xe4\n",
        "b.bin": b"\0\1",
    }
    after = {
        "a.py": b"two\n",
        "windows.py": b"y\r\n",
        "latin.txt": b"\xf6\n",
        "b.bin": b"\0\2",
    }
    repository.mkdir()
    git(repository, "init", "-q")
    for name, value in (("core.autocrlf", "false"), ("color.ui", "always"), ("diff.noprefix", "1")):
        git(repository, "config", name, value)
    write(repository, before)
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "first")
    git(tmp_path, "clone", "-q", "one", "two")
    monkeypatch.setattr(manifest, "__file__", str(repository / "manifest.py"))
    monkeypatch.setattr(sys, "argv", [str(repository / "a.py")])
    assert manifest.code_changes() == ""
    write(repository, after)
    git(repository, "add", "a.py")  # not yet committed
    changes = manifest.code_changes()
    git(other, "apply", "-", input=changes.encode(errors="surrogateescape"))
    assert {name: (other / name).read_bytes() for name in after} == after

    monkeypatch.setattr(sys, "argv", [str(repository / "new.py")])
    write(repository, {"new.py": b"new\n"})
    with_script = manifest.code_changes()
    assert with_script.startswith(changes) and "+new\n" in with_script
    monkeypatch.setattr(manifest, "LARGEST_DIFF", 5)
    assert manifest.code_changes() == f"left out: {len(with_script):,} characters"


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)


def git(folder, *words, **more):
    named = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *named, *words], cwd=folder, check=True, **more)


def test_files_are_named_by_flags_in_any_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text("")
    Path("folder").mkdir()
    flags = {"reward": ["exact", "reward.py:f", "model:folder"], "data": Path("none"), "n": 3}
    assert named_files(flags) == ["reward.py", "folder"]


def test_a_folder_without_weights_has_no_hash_and_ends_no_run(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (found,) = manifest.model_hashes({"model": str(tmp_path / "model")}, tmp_path, {}).values()
    assert found.startswith("unknown: ") and "no weights at all" in found
    assert manifest.model_hashes({"out": str(tmp_path / "model")}, tmp_path / "model", {}) == {}
