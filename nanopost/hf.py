"""Read Hugging Face folders: config.json and safetensors.

A folder with a LoRA adapter in peft's format reads as its base model with the adapter merged in. A
model that bitsandbytes has quantised to NF4 reads as its dequantised one. Of a folder with images
beside the text (Gemma 3, Qwen3.5) the decoder is read, and the rest of it is carried: save.py
copies it into the folder that is written, which has the names and files of the one that was read.

Reading streams tensor by tensor, and only this rank's slice of each.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nanopost import InputError, lora, nf4, storage
from nanopost.config import Config
from nanopost.model import ActorCritic, CausalLM, ScalarModel
from nanopost.names import DECODER, Carried, Form
from nanopost.storage import INDEX, read_json, some

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors


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


def content_hash(folder) -> str:
    """Hash of a folder's config.json and weights, whatever the names of the weight files."""
    if lora.is_adapter_folder(folder):
        both = lora.file_hash(folder) + content_hash(lora.base_folder(folder))
        return hashlib.sha256(both.encode()).hexdigest()[:16]
    digest = hashlib.sha256(Path(folder, "config.json").read_bytes())
    for path in sorted(set(storage.weight_files(Path(folder)).values())):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def is_own(path) -> bool:
    """Whether a file of a model folder is in it, or is a link within it. The hub's cache, where
    snapshots/HASH/ links to blobs/, counts as one folder."""
    path = Path(path)
    folder, target = path.parent.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs"
    return target.is_file() and (target.is_relative_to(folder) or target.parent == blobs)


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
    file_of = storage.weight_files(lora.base_folder(folder))
    embedding = Form.of(file_of, config.prefixes, config.form).there(EMBEDDING)
    if embedding in file_of:
        with storage.opened(file_of[embedding]) as file:
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
            storage.weight_files(lora.base_folder(folder))
        return
    config, source = model.config, storage.Source(folder, model.config)
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
        with storage.opened(path) as file:
            for name, stored_name in there.items():
                if file_of[stored_name] != path:
                    continue
                tensor = storage.Tensor(source, file, path, stored_name, name in matrices)
                factors = source.factors.get(name)
                if name in packed_layers:
                    _fill_layer(packed_layers[name], tensor, factors)
                else:
                    _fill(wanted[name], tensor, factors)
    for name in split:
        with storage.experts(source, form.matrices(name, len(wanted[name])), shapes[name]) as stack:
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
        f"{folder}: the weights do not match config.json{untied}; missing: {some(missing)}; "
        f"unexpected: {some(extra)}."
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


def _check_tied(source, form, config):
    """InputError if the folder has a head that is another than the embedding."""
    head, embedding = form.there(HEAD), form.there(EMBEDDING)
    if head not in source.file_of:
        return
    one, other = (storage.whole(source.file_of, name) for name in (head, embedding))
    if not torch.equal(one, other):
        place = "config.json (not in its text_config)" if config.is_inside else "config.json"
        raise InputError(
            f"{source.base}: config.json ties the head to the embedding, but the weights hold a "
            f"{head} that differs from it: set tie_word_embeddings to false in {place} to use it."
        )


def _check_finite(folder, tensors):
    """InputError for weights that are NaN or infinite: a model like that scores and learns nothing.
    Of each rank's shards."""
    finite = [x.isfinite().all() for x in tensors.values()]
    bad = [name for name, ok in zip(tensors, torch.stack(finite).tolist()) if not ok]
    if bad:
        raise InputError(
            f"{folder}: not all weights are finite ({some(bad)}): the run that wrote it had "
            "diverged; take an earlier model, or train it again with a lower --lr."
        )


def _in_fp32(file_of, there) -> frozenset[str]:
    """The parameters that are so in the folder: Qwen3.5 has decays in fp32 among bf16. there:
    parameter -> its name in the folder."""
    found = set()
    for path in {file_of[stored_name] for stored_name in there.values()}:
        with storage.opened(path) as file:
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


def _new_head(p):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(p.shape, generator=generator) / (p.shape[1] + 1) ** 0.5
    _copy(p, head)


def _fill(p, tensor: storage.Tensor, factors=None):
    """factors: A, B and scale of an adapter to merge."""
    found = tensor.read()
    storage.check_shape(found, tensor.name, tensor.path, list(p.shape))
    if factors is None:
        _copy(p, found)
        return
    a, b, scale = factors
    rows = _mine(p)[0]
    _local(p).copy_(lora.merged(found[rows], a, b[rows], scale))


def _fill_layer(layer, tensor: storage.Tensor, factors=None):
    """Fill a layer in NF4, from the same bits if the folder has them."""
    if tensor.name in tensor.source.quantised and factors is None:
        _fill_packed(layer, *storage.quantised(tensor.source.stored, tensor.name))
        return
    dense = torch.empty(layer.out_features, layer.in_features)
    _fill(dense, tensor, factors)
    dense = dense.to(layer.weight.device, layer.stored_dtype)
    _fill_packed(layer, nf4.quantize(dense), dense.shape, dense.dtype)


def _fill_packed(layer, packed, shape, dtype):
    layer.stored_dtype = dtype
    for part, tensor in zip(nf4.PARTS, packed):
        _copy(getattr(layer, part), tensor)


def _copy(p, source):
    _local(p).copy_(source[_mine(p)])


def _mine(p) -> tuple[slice, ...]:
    """Which part of a whole tensor this rank holds."""
    if not isinstance(p, DTensor):
        return (slice(None),) * p.ndim
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))


def _local(p):
    return p.to_local() if isinstance(p, DTensor) else p
