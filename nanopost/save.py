"""Write Hugging Face folders: config.json, sharded safetensors and files beside them.

Writing streams tensor by tensor and is atomic: anything slow or fallible (a full disk) happens in
FOLDER/.saving, and only renames follow. A save that changes only the weights (every save of a run
after its first) is one rename: killed at any moment, it leaves the old model or the new one, whole.
If config.json or a tokenizer file changes too, config.json is removed first and restored last:
killed in between, the folder is visibly incomplete, never a mixture. Other files in it stay.

What a model carries, the rest of a folder with images beside the text, is copied bit for bit from
the folder that was read.
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
from safetensors import SafetensorError
from safetensors.torch import save_file

from nanopost import InputError, lora, storage
from nanopost.config import Config
from nanopost.storage import INDEX, SINGLE, some

SHARDS = "model-*-of-*.safetensors"
PROCESSOR = (  # files of a folder with images beside the text
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def save_model(
    folder,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    config: Config,
    files: dict[str, str | bytes | None] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    write: bool = True,
    carried: str = "",
):
    """Write a folder that transformers and vLLM load: weights, config.json, and `files`.

    named_tensors is consumed one by one and held up to max_shard_bytes; dtype casts all but the few
    that the model's folder has in fp32 among bf16. What the model carries (config.carried) is read
    from that folder, one by one, and keeps its dtype; InputError if it is not there any more, or if
    its carried_hash is not `carried`. files: name -> content, or None to delete what another model
    left there. If the tensors are gathered from shards, every rank must call this; only the one
    with write=True writes. After a kill or a full disk, the folder is as the module docstring says.
    """
    if not write:
        for _ in named_tensors:  # each is a collective
            pass
        return
    folder = Path(folder)
    saving = folder / ".saving"
    with _new_folder(saving, f"{folder}: the disk is full; the model that was there is untouched"):
        paths, sizes_of, saved_as, sums = [], [], None, {}
        weights = _to_save(named_tensors, config, dtype, sums)
        for tensors in _shards(weights, max_shard_bytes):
            paths.append(saving / f"{len(paths)}.safetensors")
            save_file(tensors, paths[-1], metadata={"format": "pt"})
            sizes_of.append({name: tensor.nbytes for name, tensor in tensors.items()})
            saved_as = saved_as or next(iter(tensors.values())).dtype  # the decoder's come first
        if carried and _hash_of(sums) != carried:
            raise InputError(
                f"{config.carried.folder}: the weights beside its language model have changed "
                f"since the run began, and are saved with it: restore that folder, then --resume."
            )
        files = {**_files_of(config, files or {}), "config.json": _config_text(config, saved_as)}
        _install(folder, saving, paths, sizes_of, files)


@contextmanager
def _new_folder(saving, full):
    """A new folder, removed if what is written to it fails. full: what is said if the disk is."""
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True)
    try:
        yield
    except (OSError, SafetensorError, InputError) as error:
        shutil.rmtree(saving, ignore_errors=True)
        if _full_disk(error):
            raise InputError(
                f"{full}: free some disk space, then --resume from the last checkpoint."
            ) from error
        raise


def _to_save(named_tensors, config, dtype, sums) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a folder, under their names there. sums: gets those of what is carried."""
    cast = _cast(named_tensors, dtype, config.form.fp32)
    for name, tensor in config.form.published(cast):
        yield name, tensor.contiguous()
    for name, tensor in carried_tensors(config):
        sums[name] = _sum(tensor)
        yield name, tensor


def _cast(named_tensors, dtype, fp32):
    """On the CPU. fp32: the names of those that keep it."""
    for name, tensor in named_tensors:
        tensor = tensor.detach().cpu()
        if dtype and not (name in fp32 and tensor.dtype == torch.float32):
            tensor = tensor.to(dtype)
        yield name, tensor


def _files_of(config, files):
    """The files of a folder; a model of text alone has none for images."""
    if config.is_inside:
        return files
    return {name: None if name in PROCESSOR else content for name, content in files.items()}


def carried_tensors(config: Config) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what a model carries, from the folder that it was loaded from. As it is
    there, but for matrices in NF4, which are dequantised. InputError if it is gone."""
    if config.carried is None:
        return
    folder, names = Path(config.carried.folder), config.carried.names
    try:
        stored = storage.weight_files(folder)
    except (InputError, OSError):
        stored = {}
    if missing := set(names) - set(stored):
        raise InputError(
            f"{folder}: weights beside its language model, which are saved with it, are no longer "
            f"there ({some(missing)}): restore that folder, then --resume."
        )
    quantised = storage.quantised_names(stored)
    for path in sorted({stored[name] for name in names}):
        with storage.opened(path) as file:
            for name in names:
                if stored[name] != path:
                    continue
                if name in quantised:
                    yield name, storage.dequantised(stored, name)
                else:
                    yield name, file.get_tensor(name)


def carried_hash(config: Config) -> str:
    """Hash of what a model carries; "" for nothing. It is read whole: about a second per GB."""
    if config.carried is None:
        return ""
    return _hash_of({name: _sum(tensor) for name, tensor in carried_tensors(config)})


def _sum(tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_of(sums) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def save_adapter(
    folder,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    config: dict,
    files: dict[str, str | bytes | None] | None = None,
    write: bool = True,
):
    """Write a folder with an adapter in peft's format, and `files`; killed at any moment, it is the
    old one, the new one or not there. Arguments and collective as save_model's."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in named_tensors}
    if not write:
        return
    folder = Path(folder)
    saving = folder.with_name(f".{folder.name}")
    with _new_folder(saving, f"{folder}: the disk is full"):
        save_file(tensors, saving / lora.WEIGHTS, metadata={"format": "pt"})
        _write_files(saving, {**(files or {}), lora.CONFIG: json.dumps(config, indent=2) + "\n"})
        (saving / lora.WEIGHTS).chmod((saving / lora.CONFIG).stat().st_mode)
        for path in (*saving.iterdir(), saving):
            to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    saving.rename(folder)
    to_disk(folder.parent)


def to_disk(path):
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shards(named_tensors, max_bytes) -> Iterator[dict[str, torch.Tensor]]:
    shard, size = {}, 0
    for name, tensor in named_tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _config_text(config, dtype):
    """config.json. transformers 4 reads torch_dtype, transformers 5 dtype."""
    kind = str(dtype).removeprefix("torch.")
    hf = {"architectures": [config.architecture], **config.hf, "dtype": kind, "torch_dtype": kind}
    if config.is_inside:
        # Of the two places where it is said whether the head is tied, transformers reads this one
        # and vLLM the one in text_config.
        hf["tie_word_embeddings"] = config.tied
        text = hf["text_config"] | {"tie_word_embeddings": config.tied}
        written = {key: kind for key in ("dtype", "torch_dtype") if key in text}
        hf["text_config"] = text | written
    return json.dumps(hf, indent=2) + "\n"


def _install(folder, saving, paths, sizes_of, files):
    """Make the shards in `saving` the folder's model: first all reach the disk, then they move."""
    names = _shard_names(folder, len(paths))
    several = len(names) > 1
    if several:
        files = {**files, INDEX: _index_text(names, sizes_of)}
    stale = [name for name, content in files.items() if content is None]
    stale = [name for name in stale if (folder / name).exists()]
    files = _write_files(saving, files)
    mode = (saving / "config.json").stat().st_mode
    for path in paths:
        path.chmod(mode)  # safetensors would keep it from all other users
    for path in saving.iterdir():
        to_disk(path)

    changed = [name for name in files if not _same(folder / name, saving / name)]
    changed = [name for name in changed if name not in (INDEX, "config.json")]
    replace_config = changed or stale or not _same(folder / "config.json", saving / "config.json")
    if replace_config:
        (folder / "config.json").unlink(missing_ok=True)
    for name in stale:
        (folder / name).unlink()
    for path, name in zip(paths, names):
        os.replace(path, folder / name)  # one shard: this switches the model
    if several:
        os.replace(saving / INDEX, folder / INDEX)  # several replace several: this does
    to_disk(folder)
    # Where several shards replace a single file, which readers prefer, this switches the model.
    for name in (SINGLE, INDEX, *(path.name for path in folder.glob(SHARDS))):
        if name not in names and not (several and name == INDEX):
            (folder / name).unlink(missing_ok=True)
    for name in changed:
        os.replace(saving / name, folder / name)
    if replace_config:
        os.replace(saving / "config.json", folder / "config.json")
    shutil.rmtree(saving)
    to_disk(folder)


def _write_files(saving, files):
    """Write those that have a content -> these."""
    files = {name: content for name, content in files.items() if content is not None}
    for name, content in files.items():
        if isinstance(content, str):
            content = content.encode()
        (saving / name).write_bytes(content)
    return files


def _shard_names(folder, count):
    """File names for the shards: never those of the existing model, unless it is a single file."""
    if count == 1:
        return [SINGLE]
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if any((folder / name).exists() for name in names):
        tag = os.urandom(4).hex()
        names = [name.replace("model-", f"model-{tag}-") for name in names]
    return names


def _index_text(names, sizes_of):
    weight_map, total = {}, 0
    for name, sizes in zip(names, sizes_of):
        weight_map |= dict.fromkeys(sizes, name)
        total += sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2) + "\n"


def _same(path, other):
    return path.is_file() and path.read_bytes() == other.read_bytes()


def _full_disk(error):
    """safetensors reports the operating system's errors as text."""
    number = getattr(error, "errno", None)
    if found := re.search(r"os error (\d+)", str(error)):
        number = int(found[1])
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
