"""Hugging Face folders: config.json and sharded safetensors, in and out.

Reading streams tensor by tensor, and of each only this rank's slice. Writing streams too, and is atomic: whatever takes
long or can fail (a full disk) happens in FOLDER/.saving, and only renames follow. A save that changes the weights alone
(each of a run after its first) is one rename: killed at any instant, the folder holds the old model or the new one,
whole. Where config.json or a tokenizer file changes as well, config.json leaves first and comes back last: killed
between these renames, the folder says that it is not complete, and is never a mixture. Other files in it stay.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nanopost import InputError
from nanopost.model import FAMILIES, ActorCritic, CausalLM, Config, ScalarModel

SINGLE, INDEX, SHARDS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
EMBEDDING = "model.embed_tokens.weight"


def read_config(folder) -> Config:
    """The Config of a checkpoint folder. InputError for a hub name, another kind of folder, or an unknown model."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return Config.of(_read_json(folder / "config.json"), str(folder / "config.json"))
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds a LoRA adapter, not a model: merge it into its base model first."
        )
    if (folder / ".saving").is_dir():
        raise InputError(
            f"{folder} has no config.json: a save was cut off here; --resume the run that wrote it."
        )
    if folder.is_dir():
        raise InputError(f"{folder} has no config.json: it is not a Hugging Face checkpoint.")
    sentence = f"{folder} is no folder: mend the path, or make it first (python train_sft.py writes out/sft)"
    if str(folder).count("/") == 1 and not str(folder).startswith((".", "/", "out/")):
        sentence += (
            f"; if it is a hub name, run 'hf download {folder} --local-dir {folder.name}' and pass "
            f"{folder.name}"
        )
    raise InputError(sentence + ".")


def load_model(
    folder, device="cpu", dtype: torch.dtype = torch.float32, shard=lambda model: model
) -> CausalLM:
    """The model of a checkpoint folder. shard: applied to it while it holds no memory yet (dist.shard)."""
    config = read_config(folder)
    if config.scalar:
        raise InputError(
            f"{folder} is a reward model and writes no text: pass it as --reward model:{folder} "
            f"(nanopost.eval: --reward_model {folder})."
        )
    return _loaded(CausalLM, config, folder, device, dtype, shard)


def load_scalar_model(
    folder,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    shard=lambda model: model,
    new_head: bool = False,
    pad_id: int | None = None,
) -> ScalarModel:
    """A reward model. new_head: the folder may be that of a language model, whose head gives way to a new one."""
    config = read_config(folder)
    if not config.scalar and not new_head:
        raise InputError(
            f"{folder} is a language model and scores nothing: train_rm.py makes a reward model of it."
        )
    return _loaded(ScalarModel, config.with_scalar_head(pad_id), folder, device, dtype, shard)


def load_actor_critic(
    folder, value_folder=None, device="cpu", shard=lambda model: model, pad_id: int | None = None
) -> ActorCritic:
    """A policy with a value model begun from a reward model or a language model (with a new head), or, for None, with a
    head on its own hidden states that is 0 everywhere."""
    config = read_config(folder)
    if config.scalar:
        raise InputError(
            f"{folder} is a reward model and writes no text: pass it as --value_model or model:{folder}."
        )
    value_config = read_config(value_folder).with_scalar_head(pad_id) if value_folder else None
    with torch.device("meta"):
        model = ActorCritic(config, value_config).to(torch.float32)
    model = shard(model).to_empty(device=device)
    load_weights(model.policy, folder)
    if value_folder:
        load_weights(model.value, value_folder)
    else:
        torch.nn.init.zeros_(model.value.weight)
    return model


def _loaded(kind, config, folder, device, dtype, shard):
    with torch.device("meta"):
        model = kind(config).to(dtype)
    model = shard(model).to_empty(device=device)
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: CausalLM | ScalarModel, folder):
    """Fill the model's parameters, plain tensors or FSDP2 shards, from a folder, cast to the parameters' dtype.

    Names and shapes must be those of the model. A tied head's copy and rotary buffers are passed over, and so is a
    language model's head by a scalar model, whose new head is normal with variance 1 / (width + 1), as in 2403.17031.
    """
    folder, wanted = Path(folder), dict(model.named_parameters())
    file_of = _weight_files(folder)
    redundant = {"lm_head.weight"} if model.config.tied else set()
    if model.config.scalar and "score.weight" not in file_of:
        p = wanted.pop("score.weight")
        head = (
            torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
            / (p.shape[1] + 1) ** 0.5
        )
        _copy(p, head)
        file_of.pop("lm_head.weight", None)
    extra = {
        n
        for n in file_of
        if n not in wanted and n not in redundant and not n.endswith("rotary_emb.inv_freq")
    }
    missing = set(wanted) - set(file_of)
    if missing or extra:
        tie = (
            " (config.json says the head is not tied to the embedding)"
            if "lm_head.weight" in missing
            else ""
        )
        raise InputError(
            f"{folder}: the weights do not match config.json{tie}; missing: {_some(missing)}; "
            f"unexpected: {_some(extra)}."
        )
    for path in sorted({file_of[n] for n in wanted}):
        with _opened(path) as file:
            for name in (n for n in wanted if file_of[n] == path):
                _fill(wanted[name], file.get_slice(name), name, path)
    if redundant & set(file_of) and not torch.equal(
        _whole(file_of, "lm_head.weight"), _whole(file_of, EMBEDDING)
    ):
        raise InputError(
            f"{folder}: config.json ties the head to the embedding and the weights hold a lm_head.weight "
            "that differs from it: set tie_word_embeddings to false in config.json to use it."
        )


def content_hash(folder) -> str:
    """Of a checkpoint's config.json and weights, whatever their files are called."""
    digest = hashlib.sha256(Path(folder, "config.json").read_bytes())
    for path in sorted({*_weight_files(Path(folder)).values()}):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _fill(p, source, name, path):
    if list(p.shape) != source.get_shape():
        raise InputError(
            f"{path}: {name} has shape {source.get_shape()} and config.json wants {list(p.shape)}."
        )
    _copy(p, source)


def _copy(p, source):
    if isinstance(p, DTensor):
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        p.to_local().copy_(source[tuple(slice(o, o + s) for o, s in zip(offset, shape))])
    else:
        p.copy_(source[:])


def _whole(file_of, name):
    with _opened(file_of[name]) as file:
        return file.get_tensor(name)


def _weight_files(folder) -> dict[str, Path]:
    """name -> file. A single model.safetensors goes before an index, as in transformers."""
    if (folder / SINGLE).is_file():
        with _opened(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if not (folder / INDEX).is_file():
        other = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".gguf", ".pth", ".pt")
        )
        there = f"only {_some(other)}; convert it to safetensors" if other else "no weights at all"
        raise InputError(f"{folder}: neither {SINGLE} nor {INDEX}, {there}.")
    file_of = {n: folder / f for n, f in _read_json(folder / INDEX)["weight_map"].items()}
    gone = {p.name for p in file_of.values() if not p.is_file()}
    if gone:
        raise InputError(
            f"{folder}: {INDEX} names {_some(gone)}, which is not there; copy the folder again."
        )
    return file_of


@contextmanager
def _opened(path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or incomplete ({error}); copy it again.") from error


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); copy it again.") from error


def _some(names):
    names = sorted(names)
    return (
        ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    ) or "none"


def save_model(
    folder,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    config: Config,
    files: dict[str, str | bytes | None] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    write: bool = True,
):
    """Write a folder that transformers and vLLM load: weights, config.json, and `files` beside them: name -> content,
    or None for one that is to go, because another model left it here.

    named_tensors is consumed one by one and held up to max_shard_bytes; dtype casts. Every rank must call this when the
    tensors come out of shards; only the one with write=True writes. What a kill or a full disk leaves: see above.
    """
    if not write:
        for _ in named_tensors:  # each is a collective
            pass
        return
    beside = Path(folder) / ".saving"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        shards, kind = [], None
        for tensors in _shards(named_tensors, dtype, max_shard_bytes):
            path = beside / f"{len(shards)}.safetensors"
            save_file(tensors, path, metadata={"format": "pt"})
            shards.append((path, {n: t.nbytes for n, t in tensors.items()}))
            kind = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        # torch_dtype is what transformers 4 reads, dtype what 5 does.
        hf = {
            "architectures": [FAMILIES[config.hf["model_type"]]],
            **config.hf,
            "dtype": kind,
            "torch_dtype": kind,
        }
        _install(
            Path(folder),
            beside,
            shards,
            {**(files or {}), "config.json": json.dumps(hf, indent=2) + "\n"},
        )
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        if _full_disk(error):
            raise InputError(
                f"{folder}: the disk is full; the model that was there is untouched: make room, then "
                "--resume from the last checkpoint."
            ) from error
        raise


def _shards(named_tensors, dtype, max_bytes) -> Iterator[dict[str, torch.Tensor]]:
    shard, size = {}, 0
    for name, tensor in named_tensors:
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _install(folder, beside, shards, files):
    """Make the shards the folder's model: everything reaches the disk in `beside`, then it is moved."""
    names, index = _names(folder, shards)
    if index:
        files = {**files, INDEX: index}
    stale = [
        name for name, content in files.items() if content is None and (folder / name).exists()
    ]
    files = {name: content for name, content in files.items() if content is not None}
    for name, content in files.items():
        (beside / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for path in beside.iterdir():
        _to_disk(path)
    changed = [n for n in files if n != INDEX and not _same(folder / n, beside / n)]
    if changed or stale:
        (folder / "config.json").unlink(missing_ok=True)
        changed = list(dict.fromkeys([*changed, "config.json"]))
    for name in stale:
        (folder / name).unlink()
    for (path, _), name in zip(shards, names):
        os.replace(path, folder / name)  # a single shard: this is the instant of change
    if index:
        os.replace(beside / INDEX, folder / INDEX)  # ... several: this is; or, where there was one,
    _to_disk(folder)
    for name in (SINGLE, INDEX, *(p.name for p in folder.glob(SHARDS))):
        if name not in names and not (index and name == INDEX):
            (folder / name).unlink(missing_ok=True)  # ... the unlinking of this file
    for name in sorted(changed, key="config.json".__eq__):
        os.replace(beside / name, folder / name)
    shutil.rmtree(beside)
    _to_disk(folder)


def _names(folder, shards):
    """File names for the shards, and the index's text if there are several. Never those of the model that is there."""
    if len(shards) == 1:
        return [SINGLE], None
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if any((folder / n).exists() for n in names):
        tag = os.urandom(4).hex()
        names = [n.replace("model-", f"model-{tag}-") for n in names]
    weight_map = {tensor: name for (_, sizes), name in zip(shards, names) for tensor in sizes}
    total = sum(sum(sizes.values()) for _, sizes in shards)
    return names, json.dumps(
        {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2
    ) + "\n"


def _same(path, other):
    return path.is_file() and path.read_bytes() == other.read_bytes()


def _full_disk(error):
    """safetensors reports the operating system's errors as text."""
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
