"""The tensors of a model folder, as its safetensors files hold them: sharded, quantised to NF4 by
bitsandbytes, or beside an adapter. Only what is asked for is read. And its JSON files.

Shapes: E experts, R rows and C columns of a matrix.
"""

import json
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nanopost import InputError, lora, nf4
from nanopost.config import Config
from nanopost.names import Form, ours

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUANTISED = ".quant_state.bitsandbytes__nf4"  # after the name of a matrix


class Source:
    """Where the weights of a folder are; of one with an adapter, those of its base model."""

    def __init__(self, folder: Path, config: Config):
        self.folder = folder
        self.adapter = lora.read(folder) if lora.is_adapter_folder(folder) else None
        self.base = self.adapter.base if self.adapter else folder
        self.stored = weight_files(self.base)  # name of a tensor -> its file
        self.quantised = quantised_names(self.stored)
        self.file_of = {  # without what bitsandbytes stores beside a matrix
            name: path for name, path in self.stored.items() if not _is_beside(name, self.quantised)
        }
        self.form = Form.of(self.file_of, config.prefixes, config.form)
        factors = self.adapter.factors if self.adapter else {}
        self.factors = {ours(name, config.prefixes): x for name, x in factors.items()}


class Tensor(NamedTuple):
    """One tensor of a source. is_matrix: of a layer that may have an adapter."""

    source: Source
    file: safe_open
    path: Path
    name: str
    is_matrix: bool

    def read(self):
        """-> a slice of the file, of which only what is asked for is read, or a tensor."""
        adapter = self.source.adapter
        if self.name in self.source.quantised:
            return dequantised(self.source.stored, self.name)
        found = self.file.get_slice(self.name)
        if adapter and adapter.nf4 and self.is_matrix:
            dense = found[:]  # the adapter belongs to what NF4 makes of it
            return nf4.dequantize(nf4.quantize(dense), dense.shape[1], dense.dtype)
        return found


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
def experts(source, names, shape):
    """A _Stack of the tensors with these names, of each expert's matrices."""
    stored = source.stored
    rows, columns = shape[1] // len(names[0]), shape[2]
    with ExitStack() as files:
        paths = {stored[name] for parts in names for name in parts}
        file_of = {path: files.enter_context(opened(path)) for path in sorted(paths)}
        matrices = []
        for parts in names:
            found = []
            for name in parts:
                tensor = Tensor(source, file_of[stored[name]], stored[name], name, False)
                found.append(tensor.read())
                check_shape(found[-1], name, stored[name], [rows, columns])
            matrices.append(found)
        yield _Stack(matrices, shape)


def check_shape(source, name, path, wanted):
    shape = list(source.shape) if isinstance(source, torch.Tensor) else source.get_shape()
    if shape != wanted:
        raise InputError(f"{path}: {name} has shape {shape}, but config.json wants {wanted}.")


def weight_files(folder) -> dict[str, Path]:
    """name -> file. A single model.safetensors takes priority over an index, as in transformers."""
    if (folder / SINGLE).is_file():
        with opened(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if not (folder / INDEX).is_file():
        there = "no weights at all"
        formats = (".bin", ".gguf", ".pth", ".pt")
        if other := [path.name for path in folder.iterdir() if path.suffix in formats]:
            there = f"only {some(other)}; convert it to safetensors"
        raise InputError(f"{folder}: neither {SINGLE} nor {INDEX}, {there}.")
    weight_map = read_json(folder / INDEX)["weight_map"]
    file_of = {name: folder / file for name, file in weight_map.items()}
    missing = {path.name for path in file_of.values() if not path.is_file()}
    if missing:
        raise InputError(
            f"{folder}: {INDEX} names {some(missing)}, which is not there; copy the folder again."
        )
    return file_of


@contextmanager
def opened(path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or incomplete ({error}); copy it again.") from error


def whole(file_of, name):
    with opened(file_of[name]) as file:
        return file.get_tensor(name)


def quantised_names(stored) -> set[str]:
    """The matrices that bitsandbytes has quantised."""
    return {name.removesuffix(QUANTISED) for name in stored if name.endswith(QUANTISED)}


def _is_beside(name, quantised) -> bool:
    """Whether a tensor is one that bitsandbytes stores beside X.weight: X.weight.absmax, say."""
    return name.rpartition(".weight.")[0] + ".weight" in quantised


def dequantised(file_of, name) -> torch.Tensor:
    packed, shape, dtype = quantised(file_of, name)
    return nf4.dequantize(packed, shape[1], dtype)


def quantised(file_of, name) -> tuple[nf4.Packed, list[int], torch.dtype]:
    """A matrix that bitsandbytes has quantised, its shape and its dtype before."""
    state = json.loads(bytes(whole(file_of, name + QUANTISED).tolist()))
    maps = {"quant_map": nf4.codebook(), "nested_quant_map": nf4.dynamic_map()}
    known = state["blocksize"] == nf4.BLOCK and state.get("nested_blocksize") == nf4.NESTED_BLOCK
    for kind, values in maps.items():
        known = known and torch.equal(whole(file_of, f"{name}.{kind}"), values)
    if not known:
        raise InputError(
            f"{file_of[name]}: {name} is quantised in another way than NF4 with double "
            f"quantisation, in blocks of {nf4.BLOCK} and {nf4.NESTED_BLOCK}: take the unquantised "
            "model."
        )
    mean = torch.tensor([state["nested_offset"]])
    nested = torch.cat([whole(file_of, f"{name}.nested_absmax"), mean]).view(torch.int32)
    packed = nf4.Packed(whole(file_of, name).flatten(), whole(file_of, f"{name}.absmax"), nested)
    return packed, state["shape"], getattr(torch, state["dtype"])


def read_json(path: Path):
    """The content of a JSON file; InputError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); copy it again.") from error


def some(names):
    if not names:
        return "none"
    names = sorted(names)
    shown = ", ".join(names[:4])
    if len(names) > 4:
        shown += f" and {len(names) - 4} more"
    return shown
