"""Hugging Face folders: config.json and sharded safetensors, in and out.

A folder with a LoRA adapter in peft's format reads as its base model with the adapter merged in. A
model that bitsandbytes has quantised to NF4 reads as its dequantised one. Of a folder with images
beside the text (Gemma 3, Qwen3.5) the decoder is read, and the rest of it is carried: copied bit
for bit into the folder that is written, which has the names and files of the one that was read.

Reading streams tensor by tensor, and only this rank's slice of each. Writing streams too, and is
atomic: anything slow or fallible (a full disk) happens in FOLDER/.saving, and only renames follow.
A save that changes only the weights (every save of a run after its first) is one rename: killed at
any moment, it leaves the old model or the new one, whole. If config.json or a tokenizer file
changes too, config.json is removed first and restored last: killed in between, the folder is
visibly incomplete, never a mixture. Other files in it stay.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nanopost import InputError, lora, nf4
from nanopost.config import Config
from nanopost.model import ActorCritic, CausalLM, ScalarModel
from nanopost.names import DECODER, Carried, Form, ours

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"
QUANTISED = ".quant_state.bitsandbytes__nf4"  # after the name of a matrix
PROCESSOR = (  # files of a folder with images beside the text
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors


# ------------------------------------------------------------------------------------------ reading
def read_config(folder) -> Config:
    """The Config of a model folder. InputError for a hub name, another folder, an unknown model."""
    folder = Path(folder)
    if lora.is_adapter_folder(folder):
        config = read_config(lora.base_folder(folder))
        if lora.read(folder).scalar and not config.scalar:
            return config.with_scalar_head(config.hf.get("pad_token_id"))
        return config
    if (folder / "config.json").is_file():
        return Config.of(read_json(folder / "config.json"), str(folder / "config.json"))
    check_is_model(folder)
    if folder.is_dir():
        raise InputError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    hint = ""
    if str(folder).count("/") == 1 and not str(folder).startswith((".", "/", "out/")):
        hint = (
            f"; if it is a hub name, run 'hf download {folder} --local-dir {folder.name}' and pass "
            f"{folder.name}"
        )
    raise InputError(
        f"{folder} is not a folder: correct the path, or create it first (python train_sft.py "
        f"writes out/sft){hint}."
    )


def check_is_model(folder):
    """InputError for a folder without config.json that is known to be something else."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return
    if (folder / ".saving").is_dir():
        raise InputError(
            f"{folder} has no config.json: a save was cut off here; --resume the run that wrote it."
        )
    if (folder / "state.json").is_file():
        raise InputError(
            f"{folder} is a run's checkpoint, not a model: --resume the run, which writes its "
            "model at the end (at once, if --steps is the checkpoint's step)."
        )
    if (folder / "run.json").is_file():
        log = folder / "metrics.jsonl"
        text = log.read_text(encoding="utf-8") if log.is_file() else ""
        steps = re.findall(r'^{"step": (\d+).*\n', text, re.M) or [0]  # of whole lines
        raise InputError(
            f"the run in {folder} is at step {steps[-1]} and has not written its model, which it "
            "does at its end: --resume it if it has stopped."
        )
    if holders := inside(folder, "config.json", lora.CONFIG):
        raise InputError(f"{folder} holds no model; {holders}: name one of them.")


def inside(folder, *names: str) -> str:
    """The folders in `folder` that hold such a file, or else those in them, as the end of a
    sentence: "out/a and out/b do"; "" if there are none."""
    for depth in ("*", "*/*"):
        paths = [path for name in names for path in Path(folder).glob(f"{depth}/{name}")]
        found = sorted({str(path.parent) for path in paths})
        if found:
            *first, last = [*found[:5], f"{len(found) - 5} more"] if len(found) > 5 else found
            return f"{', '.join(first)} and {last} do" if first else f"{last} does"
    return ""


def load_model(
    folder, device="cpu", dtype: torch.dtype = torch.float32, shard=lambda model: model
) -> CausalLM:
    """The language model in a folder. shard: applied while it holds no memory yet (dist.shard)."""
    config = _config_and_dtype(folder, device)
    if config.scalar:
        raise InputError(
            f"{folder} is a reward model and writes no text: pass it as --reward model:{folder} "
            f"(nanopost.eval: --reward_model {folder})."
        )
    model = _empty(lambda: CausalLM(config), device, dtype, shard)
    load_weights(model, folder)
    return model


def load_scalar_model(
    folder,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    shard=lambda model: model,
    new_head: bool = False,
    pad_id: int | None = None,
) -> ScalarModel:
    """A reward model. new_head: also take a language model, and replace its head with a new one.

    Of a folder with images beside the text it is the decoder alone, and is saved so, as a model of
    text: nothing is carried.
    """
    config = _config_and_dtype(folder, device)
    if not config.scalar and not new_head:
        raise InputError(
            f"{folder} is a language model and scores nothing: train a reward model from it "
            "with train_rm.py."
        )
    config = config.with_scalar_head(pad_id)
    model = _empty(lambda: ScalarModel(config), device, dtype, shard)
    load_weights(model, folder)
    return model


def load_actor_critic(
    folder, value_folder=None, device="cpu", shard=lambda model: model, pad_id: int | None = None
) -> ActorCritic:
    """A policy and its value function, in fp32.

    value_folder: a reward model, or a language model that gets a new head; None: the value function
    is a head on the policy's hidden states, initialised to 0.
    """
    config = _config_and_dtype(folder, device)
    if config.scalar:
        raise InputError(
            f"{folder} is a reward model and writes no text: pass it as --value_model or "
            f"model:{folder}."
        )
    value_config = None
    if value_folder:
        value_config = _config_and_dtype(value_folder, device).with_scalar_head(pad_id)
    model = _empty(lambda: ActorCritic(config, value_config), device, torch.float32, shard)
    load_weights(model.policy, folder)
    model.config = model.policy.config
    if value_folder:
        load_weights(model.value, value_folder)
    else:
        torch.nn.init.zeros_(model.value.weight)
    return model


def _config_and_dtype(folder, device) -> Config:
    """read_config, with the dtype that the weights have: what config.json says may be wrong. On the
    meta device there need not be any."""
    config = read_config(folder)
    if torch.device(device).type == "meta":
        return config
    file_of = _weight_files(lora.base_folder(folder))
    embedding = Form.of(file_of, config.prefixes, config.form).there(EMBEDDING)
    if embedding in file_of:
        with _opened(file_of[embedding]) as file:
            stored = DTYPES.get(file.get_slice(embedding).get_dtype(), torch.float32)
        kind = str(stored).removeprefix("torch.")
        config.hf.update(dtype=kind, torch_dtype=kind)
    return config


def _empty(make, device, dtype, shard):
    with torch.device("meta"):
        model = make().to(dtype)
    model = shard(model)
    return model.to_empty(device=getattr(model, "held_on", device))


@torch.no_grad()
def load_weights(model: CausalLM | ScalarModel, folder):
    """Fill the parameters, plain tensors or FSDP2 shards, from a folder, cast to their dtype.

    Names and shapes must match the model. A tied head's copy and rotary buffers are skipped, and so
    is a language model's head if a scalar model needs a new one, which is normal with variance
    1 / (width + 1), as in 2403.17031. An adapter in the folder is merged; the model's own adapters
    begin anew. The model's config then says what names the folder has, and what else is in it that
    is saved with the model. On the meta device nothing is read; a folder need not have weights, but
    no index of files that are not there.
    """
    folder = Path(folder)
    model.folder = str(folder)
    if next(model.parameters()).is_meta:
        if (lora.base_folder(folder) / INDEX).is_file():
            _weight_files(lora.base_folder(folder))
        return
    config, source = model.config, _Source(folder, model.config)
    form, file_of = source.form, source.file_of
    wanted = {
        name: p
        for name, p in model.named_parameters()
        if not lora.is_adapter(name) and not nf4.is_scale(name)
    }
    packed_layers = {
        f"{name}.weight": layer for name, layer in model.named_modules() if nf4.is_packed(layer)
    }
    shapes = {name: list(p.shape) for name, p in wanted.items()}
    for name, layer in packed_layers.items():
        shapes[name] = [layer.out_features, layer.in_features]
    if source.adapter:
        _check_adapter(source, shapes)
    if config.scalar and SCORE not in file_of:
        _new_head(wanted.pop(SCORE))
        file_of.pop(form.there(HEAD), None)
    carried = tuple(sorted(name for name in file_of if name.startswith(config.traits.carried)))
    for name in carried:
        del file_of[name]
    tensors_of = {name: form.all_there(name, shapes[name]) for name in wanted}
    _check_names(source.base, tensors_of, file_of, form.there(HEAD) if config.tied else "")
    split = [name for name in wanted if form.is_split(name)]
    there = {name: form.there(name) for name in wanted if name not in split}
    if config.dtype != torch.float32:
        form = replace(form, fp32=_in_fp32(file_of, there))
    model.config = _as_read(config, form, source.base, carried)

    matrices = {f"{name}.weight" for name in lora.linear_layers(model)}
    for path in sorted({file_of[stored_name] for stored_name in there.values()}):
        with _opened(path) as file:
            for name, stored_name in there.items():
                if file_of[stored_name] != path:
                    continue
                tensor = _Tensor(source, file, path, stored_name, name in matrices)
                factors = source.factors.get(name)
                if name in packed_layers:
                    _fill_layer(packed_layers[name], tensor, factors)
                else:
                    _fill(wanted[name], tensor, factors)
    for name in split:
        with _experts(source, form.matrices(name, len(wanted[name])), shapes[name]) as stack:
            _copy(wanted[name], stack)
    for name, head in (source.adapter.heads if source.adapter else {}).items():
        _copy(model.get_parameter(name), head)
    for layer in lora.layers(model).values():
        _copy(layer.lora_A, layer.first_A())
        layer.lora_B.zero_()
    found = {name: _local(p) for name, p in wanted.items()}
    for name, layer in packed_layers.items():  # where a block is not finite, its scale is not
        found[name] = _local(layer.weight_nested).view(torch.float32)
    _check_finite(folder, found)
    if config.tied:
        _check_tied(source, form, config)


class _Source:
    """Where the weights of a folder are; of one with an adapter, those of its base model."""

    def __init__(self, folder: Path, config: Config):
        self.folder = folder
        self.adapter = lora.read(folder) if lora.is_adapter_folder(folder) else None
        self.base = self.adapter.base if self.adapter else folder
        self.stored = _weight_files(self.base)  # name of a tensor -> its file
        self.quantised = _quantised_names(self.stored)
        self.file_of = {  # without what bitsandbytes stores beside a matrix
            name: path for name, path in self.stored.items() if not _is_beside(name, self.quantised)
        }
        self.form = Form.of(self.file_of, config.prefixes, config.form)
        factors = self.adapter.factors if self.adapter else {}
        self.factors = {ours(name, config.prefixes): x for name, x in factors.items()}


class _Tensor(NamedTuple):
    """One tensor of a source. is_matrix: of a layer that may have an adapter."""

    source: _Source
    file: safe_open
    path: Path
    name: str
    is_matrix: bool

    def read(self):
        """-> a slice of the file, of which only what is asked for is read, or a tensor."""
        adapter = self.source.adapter
        if self.name in self.source.quantised:
            return _dequantised(self.source.stored, self.name)
        found = self.file.get_slice(self.name)
        if adapter and adapter.nf4 and self.is_matrix:
            dense = found[:]  # the adapter belongs to what NF4 makes of it
            return nf4.dequantize(nf4.quantize(dense), dense.shape[1], dense.dtype)
        return found


def _fill(p, tensor: _Tensor, factors=None):
    """factors: A, B and scale of an adapter to merge."""
    found = tensor.read()
    _check_shape(found, tensor.name, tensor.path, list(p.shape))
    if factors is None:
        _copy(p, found)
        return
    a, b, scale = factors
    rows = _mine(p)[0]
    _local(p).copy_(lora.merged(found[rows], a, b[rows], scale))


def _fill_layer(layer, tensor: _Tensor, factors=None):
    """Fill a layer in NF4, from the same bits if the folder has them."""
    if tensor.name in tensor.source.quantised and factors is None:
        _fill_packed(layer, *_quantised(tensor.source.stored, tensor.name))
        return
    dense = torch.empty(layer.out_features, layer.in_features)
    _fill(dense, tensor, factors)
    dense = dense.to(layer.weight.device, layer.stored_dtype)
    _fill_packed(layer, nf4.quantize(dense), dense.shape, dense.dtype)


def _check_tied(source, form, config):
    """InputError if the folder has a head that is another than the embedding."""
    head, embedding = form.there(HEAD), form.there(EMBEDDING)
    if head not in source.file_of:
        return
    if not torch.equal(_whole(source.file_of, head), _whole(source.file_of, embedding)):
        place = "config.json (not in its text_config)" if config.is_inside else "config.json"
        raise InputError(
            f"{source.base}: config.json ties the head to the embedding, but the weights hold a "
            f"{head} that differs from it: set tie_word_embeddings to false in {place} to use it."
        )


def _in_fp32(file_of, there) -> frozenset[str]:
    """The parameters that are so in the folder: Qwen3.5 has decays in fp32 among bf16. there:
    parameter -> its name in the folder."""
    found = set()
    for path in {file_of[stored_name] for stored_name in there.values()}:
        with _opened(path) as file:
            for name, stored_name in there.items():
                if file_of[stored_name] == path and stored_name in file.keys():
                    if file.get_slice(stored_name).get_dtype() == "F32":
                        found.add(name)
    return frozenset(found)


def _as_read(config, form, folder, carried) -> Config:
    """The Config of a model that has been read from a folder of this form."""
    if not config.is_inside:  # a model of text alone: transformers' and vLLM's own names
        form = replace(form, prefix=DECODER)
    if config.scalar or not carried:
        return replace(config, form=form, carried=None)
    return replace(config, form=form, carried=Carried(str(folder), carried))


def content_hash(folder) -> str:
    """Hash of a folder's config.json and weights, whatever the names of the weight files."""
    if lora.is_adapter_folder(folder):
        both = lora.file_hash(folder) + content_hash(lora.base_folder(folder))
        return hashlib.sha256(both.encode()).hexdigest()[:16]
    digest = hashlib.sha256(Path(folder, "config.json").read_bytes())
    for path in sorted(set(_weight_files(Path(folder)).values())):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def read_json(path: Path):
    """The content of a JSON file; InputError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); copy it again.") from error


def _check_finite(folder, tensors):
    """InputError for weights that are NaN or infinite: a model like that scores and learns nothing.
    Of each rank's shards."""
    finite = [x.isfinite().all() for x in tensors.values()]
    bad = [name for name, ok in zip(tensors, torch.stack(finite).tolist()) if not ok]
    if bad:
        raise InputError(
            f"{folder}: not all weights are finite ({_some(bad)}): the run that wrote it had "
            "diverged; take an earlier model, or train it again with a lower --lr."
        )


def _local(p):
    return p.to_local() if isinstance(p, DTensor) else p


def is_own(path) -> bool:
    """Whether a file of a model folder is in it, or is a link within it. The hub's cache, where
    snapshots/HASH/ links to blobs/, counts as one folder."""
    path = Path(path)
    folder, target = path.parent.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs"
    return target.is_file() and (target.is_relative_to(folder) or target.parent == blobs)


def _new_head(p):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(p.shape, generator=generator) / (p.shape[1] + 1) ** 0.5
    _copy(p, head)


def _check_names(folder, there, file_of, copy):
    """there: parameter -> the names of its tensors in the folder. copy: a tied head's, or ""."""
    wanted = set()
    for names in there.values():
        wanted.update(names)
    extra = {
        name
        for name in set(file_of) - wanted
        if not name.endswith("rotary_emb.inv_freq") and name != copy
    }
    missing = wanted - set(file_of)
    if not missing and not extra:
        return
    untied = ""
    if not missing.isdisjoint(there.get(HEAD, [])):
        untied = " (config.json says the head is not tied to the embedding)"
    raise InputError(
        f"{folder}: the weights do not match config.json{untied}; missing: {_some(missing)}; "
        f"unexpected: {_some(extra)}."
    )


def _check_adapter(source, shapes):
    """InputError for an adapter of another model, or of layers that have none here."""
    folder, adapter = source.folder, source.adapter
    if adapter.base_hash not in ("", content_hash(source.base)):
        raise InputError(
            f"{folder}: its base model, {source.base}, has other weights than it was trained "
            "beside: restore that folder, or give the merged model of the run that wrote the "
            "adapter."
        )
    for name, (a, b, _) in source.factors.items():
        shape = [len(b), a.shape[1]]
        if shapes.get(name) != shape:
            here = shapes.get(name, "not there")
            raise InputError(
                f"{folder}: the adapter changes {name} {shape}, which in the base model "
                f"{adapter.base} is {here}: is base_model_name_or_path right?"
            )
    for name in adapter.heads.keys() - shapes.keys():
        raise InputError(
            f"{folder}: the adapter has a {name}, as a reward model has, but its task_type is not "
            "SEQ_CLS."
        )


def _check_shape(source, name, path, wanted):
    shape = list(source.shape) if isinstance(source, torch.Tensor) else source.get_shape()
    if shape != wanted:
        raise InputError(f"{path}: {name} has shape {shape}, but config.json wants {wanted}.")


class _Stack:
    """A parameter [E, R, C] whose experts' matrices are tensors of their own, or slices of files:
    only what is asked for is read."""

    def __init__(self, matrices: list[list], shape):
        self.matrices, self.shape = matrices, shape

    def __getitem__(self, index):
        experts, rows, columns = index
        _, height, width = self.shape
        stacked = [torch.empty(0, height, width)[:, rows, columns]]
        for parts in self.matrices[experts]:
            matrix_RC = torch.cat([part[:] for part in parts])
            stacked.append(matrix_RC[rows, columns][None])
        return torch.cat(stacked)


@contextmanager
def _experts(source, names, shape):
    """A _Stack of the tensors with these names, of each expert's matrices."""
    stored = source.stored
    rows, columns = shape[1] // len(names[0]), shape[2]
    with ExitStack() as files:
        paths = {stored[name] for parts in names for name in parts}
        file_of = {path: files.enter_context(_opened(path)) for path in sorted(paths)}
        matrices = []
        for parts in names:
            found = []
            for name in parts:
                tensor = _Tensor(source, file_of[stored[name]], stored[name], name, False)
                found.append(tensor.read())
                _check_shape(found[-1], name, stored[name], [rows, columns])
            matrices.append(found)
        yield _Stack(matrices, shape)


def _fill_packed(layer, packed, shape, dtype):
    layer.stored_dtype = dtype
    for part, tensor in zip(nf4.PARTS, packed):
        _copy(getattr(layer, part), tensor)


def _quantised_names(stored) -> set[str]:
    """The matrices that bitsandbytes has quantised."""
    return {name.removesuffix(QUANTISED) for name in stored if name.endswith(QUANTISED)}


def _is_beside(name, quantised) -> bool:
    """Whether a tensor is one that bitsandbytes stores beside X.weight: X.weight.absmax, say."""
    return name.rpartition(".weight.")[0] + ".weight" in quantised


def _dequantised(file_of, name) -> torch.Tensor:
    packed, shape, dtype = _quantised(file_of, name)
    return nf4.dequantize(packed, shape[1], dtype)


def _quantised(file_of, name) -> tuple[nf4.Packed, list[int], torch.dtype]:
    """A matrix that bitsandbytes has quantised, its shape and its dtype before."""
    state = json.loads(bytes(_whole(file_of, name + QUANTISED).tolist()))
    maps = {"quant_map": nf4.codebook(), "nested_quant_map": nf4.dynamic_map()}
    known = state["blocksize"] == nf4.BLOCK and state.get("nested_blocksize") == nf4.NESTED_BLOCK
    for kind, values in maps.items():
        known = known and torch.equal(_whole(file_of, f"{name}.{kind}"), values)
    if not known:
        raise InputError(
            f"{file_of[name]}: {name} is quantised in another way than NF4 with double "
            f"quantisation, in blocks of {nf4.BLOCK} and {nf4.NESTED_BLOCK}: take the unquantised "
            "model."
        )
    mean = torch.tensor([state["nested_offset"]])
    nested = torch.cat([_whole(file_of, f"{name}.nested_absmax"), mean]).view(torch.int32)
    packed = nf4.Packed(_whole(file_of, name).flatten(), _whole(file_of, f"{name}.absmax"), nested)
    return packed, state["shape"], getattr(torch, state["dtype"])


def _copy(p, source):
    _local(p).copy_(source[_mine(p)])


def _mine(p) -> tuple[slice, ...]:
    """Which part of a whole tensor this rank holds."""
    if not isinstance(p, DTensor):
        return (slice(None),) * p.ndim
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))


def _whole(file_of, name):
    with _opened(file_of[name]) as file:
        return file.get_tensor(name)


def _weight_files(folder) -> dict[str, Path]:
    """name -> file. A single model.safetensors takes priority over an index, as in transformers."""
    if (folder / SINGLE).is_file():
        with _opened(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if not (folder / INDEX).is_file():
        there = "no weights at all"
        formats = (".bin", ".gguf", ".pth", ".pt")
        if other := [path.name for path in folder.iterdir() if path.suffix in formats]:
            there = f"only {_some(other)}; convert it to safetensors"
        raise InputError(f"{folder}: neither {SINGLE} nor {INDEX}, {there}.")
    weight_map = read_json(folder / INDEX)["weight_map"]
    file_of = {name: folder / file for name, file in weight_map.items()}
    missing = {path.name for path in file_of.values() if not path.is_file()}
    if missing:
        raise InputError(
            f"{folder}: {INDEX} names {_some(missing)}, which is not there; copy the folder again."
        )
    return file_of


@contextmanager
def _opened(path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or incomplete ({error}); copy it again.") from error


def _some(names):
    if not names:
        return "none"
    names = sorted(names)
    shown = ", ".join(names[:4])
    if len(names) > 4:
        shown += f" and {len(names) - 4} more"
    return shown


# ------------------------------------------------------------------------------------------ writing
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
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True)
    try:
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
    except (OSError, SafetensorError, InputError) as error:
        shutil.rmtree(saving, ignore_errors=True)
        if _full_disk(error):
            raise InputError(
                f"{folder}: the disk is full; the model that was there is untouched: free some "
                "disk space, then --resume from the last checkpoint."
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
        stored = _weight_files(folder)
    except (InputError, OSError):
        stored = {}
    if missing := set(names) - set(stored):
        raise InputError(
            f"{folder}: weights beside its language model, which are saved with it, are no longer "
            f"there ({_some(missing)}): restore that folder, then --resume."
        )
    quantised = _quantised_names(stored)
    for path in sorted({stored[name] for name in names}):
        with _opened(path) as file:
            for name in names:
                if stored[name] != path:
                    continue
                is_quantised = name in quantised
                yield name, _dequantised(stored, name) if is_quantised else file.get_tensor(name)


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
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True)
    try:
        save_file(tensors, saving / lora.WEIGHTS, metadata={"format": "pt"})
        _write_files(saving, {**(files or {}), lora.CONFIG: json.dumps(config, indent=2) + "\n"})
        (saving / lora.WEIGHTS).chmod((saving / lora.CONFIG).stat().st_mode)
        for path in (*saving.iterdir(), saving):
            to_disk(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(saving, ignore_errors=True)
        if _full_disk(error):
            raise InputError(
                f"{folder}: the disk is full: free some disk space, then --resume from the last "
                "checkpoint."
            ) from error
        raise
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
