"""Hugging Face folders: config.json and sharded safetensors, in and out.

Reading streams tensor by tensor, and of each only this rank's slice. Writing streams too, and is atomic: at any instant
the folder holds one complete model, the old one or the new one.
"""
import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nanopost import InputError
from nanopost.model import CausalLM, Config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder) -> Config:
    """The Config of a checkpoint folder. InputError for a hub name, another kind of folder, or an unknown model."""
    folder = Path(folder)
    path = folder / "config.json"
    if path.is_file():
        try:
            return Config.of(json.loads(path.read_text()), str(path))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not valid JSON (line {error.lineno}: {error.msg}).") from error
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} holds a LoRA adapter, not a model: merge it into its base model first.")
    if folder.is_dir():
        raise InputError(f"{folder} has no config.json: it is not a Hugging Face checkpoint.")
    name = str(folder)
    if name.count("/") == 1 and not name.startswith((".", "/")):
        local = name.split("/")[1]
        raise InputError(f"{name} is no folder here; if it is a hub name, run 'hf download {name} --local-dir {local}' "
                         f"and pass --model {local}.")
    raise InputError(f"there is no folder {name}: make it (python train_sft.py writes out/sft) or mend --model.")


def load_model(folder, device="cpu", dtype=torch.float32) -> CausalLM:
    """A whole model on one device."""
    with torch.device("meta"):
        model = CausalLM(read_config(folder)).to(dtype)
    model = model.to_empty(device=device)
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: CausalLM, folder):
    """Fill the model's parameters, plain tensors or FSDP2 shards, from a folder, cast to the parameters' dtype.

    Names and shapes must be those of the model; a head beside a tied embedding and rotary buffers are passed over.
    """
    folder = Path(folder)
    file_of = _weight_files(folder)
    wanted = dict(model.named_parameters())
    passed_over = {"lm_head.weight"} if model.config.tied else set()
    extra = {n for n in file_of if n not in wanted and n not in passed_over and not n.endswith("rotary_emb.inv_freq")}
    missing = set(wanted) - set(file_of)
    if missing or extra:
        tie = " (config.json says the head is not tied to the embedding)" if "lm_head.weight" in missing else ""
        raise InputError(f"{folder}: the weights do not match config.json{tie}; missing: {_some(missing)}; "
                         f"unexpected: {_some(extra)}.")
    for path in sorted(set(file_of.values())):
        with _opened(path) as file:
            for name in (n for n in wanted if file_of[n] == path):
                _fill(wanted[name], file.get_slice(name), name, path)


def _fill(p, source, name, path):
    if list(p.shape) != source.get_shape():
        raise InputError(f"{path}: {name} has shape {source.get_shape()} and config.json wants {list(p.shape)}.")
    if isinstance(p, DTensor):
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        p.to_local().copy_(source[tuple(slice(o, o + s) for o, s in zip(offset, shape))])
    else:
        p.copy_(source[:])


def _weight_files(folder) -> dict[str, Path]:
    """name -> file. A single model.safetensors goes before an index, as in transformers."""
    if (folder / SINGLE).is_file():
        with _opened(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if not (folder / INDEX).is_file():
        other = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".gguf", ".pth", ".pt"))
        there = f"only {_some(other)}; convert it to safetensors" if other else "no weights at all"
        raise InputError(f"{folder}: neither {SINGLE} nor {INDEX}, {there}.")
    file_of = {n: folder / f for n, f in json.loads((folder / INDEX).read_text())["weight_map"].items()}
    gone = sorted({p.name for p in file_of.values() if not p.is_file()})
    if gone:
        raise InputError(f"{folder}: {INDEX} names {_some(gone)}, which is not there; copy the folder again.")
    return file_of


def _opened(path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or incomplete ({error}); copy it again.") from error


def _some(names):
    names = sorted(names)
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none"


def save_model(folder, named_tensors: Iterable[tuple[str, torch.Tensor]], config: Config,
               files: dict[str, str | bytes] | None = None, dtype: torch.dtype | None = None,
               max_shard_bytes: int = 5 * 2**30, write: bool = True):
    """Write a folder that transformers and vLLM load: weights, config.json, and `files` (name -> content) beside them.

    named_tensors is consumed one by one and held up to max_shard_bytes; dtype casts. Every rank must call this when the
    tensors come out of shards; only the one with write=True writes. A kill leaves the old model or the new one: shards
    get names of their own, then one rename makes them the model, then the old ones go.
    """
    folder = Path(folder)
    beside = folder / ".saving"
    if write:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    try:
        shards, names, size, saved_dtype, total = [], {}, 0, None, 0
        for name, tensor in named_tensors:
            if not write:
                continue
            tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            saved_dtype = tensor.dtype
            if names and size + tensor.nbytes > max_shard_bytes:
                shards.append(_write_shard(beside, len(shards), names))
                names, size = {}, 0
            names[name] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
        if write:
            shards.append(_write_shard(beside, len(shards), names))
            kind = str(saved_dtype).removeprefix("torch.")
            written = json.dumps({**config.hf, "dtype": kind, "torch_dtype": kind}, indent=2) + "\n"
            _install(folder, beside, shards, {**(files or {}), "config.json": written}, total)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        shutil.rmtree(beside, ignore_errors=True)
        raise InputError(f"{folder}: the disk is full; the last complete checkpoint is untouched: make room and "
                         "--resume.") from error


def _write_shard(beside, number, tensors):
    path = beside / f"{number}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    _to_disk(path)
    return path, list(tensors)


def _install(folder, beside, shards, texts, total):
    for name, content in texts.items():
        path = beside / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        _to_disk(path)
        os.replace(path, folder / name)
    old = {p for p in folder.glob("model*.safetensors")}
    if len(shards) == 1:
        os.replace(shards[0][0], folder / SINGLE)
        (folder / INDEX).unlink(missing_ok=True)
        new = {folder / SINGLE}
    else:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        if any((folder / n).exists() for n in names):  # never write into a shard of the model that is there
            names = [n.replace("model-", f"model-{os.urandom(4).hex()}-") for n in names]
        new = {folder / n for n in names}
        weight_map = {}
        for (path, held), name in zip(shards, names):
            os.replace(path, folder / name)
            weight_map.update(dict.fromkeys(held, name))
        index = beside / INDEX
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
        _to_disk(index)
        os.replace(index, folder / INDEX)
    for path in old - new:
        path.unlink()
    shutil.rmtree(beside)
    _to_disk(folder)


def _to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
