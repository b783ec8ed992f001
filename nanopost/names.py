"""What folders call the weights that model.py computes with.

A decoder inside a larger model has a longer prefix there, and each expert's matrices may be tensors
of their own, where model.py has them stacked. A Form says how a folder does both.

Shapes: E experts, R rows and C columns of a matrix.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch

DECODER, HEAD = "model.", "lm_head."  # what names here begin with
# Prefix of the decoder in a folder -> of its head there.
HEADS = {
    "model.": "lm_head.",
    "model.language_model.": "lm_head.",
    "language_model.model.": "language_model.lm_head.",
}
# A stacked parameter [E, R, C] -> the matrices of an expert, one below the other in it.
MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")
SINGLE = re.compile(r".+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Form:
    """How a folder names the weights of its decoder."""

    prefix: str = DECODER
    split: bool = False  # each expert's matrices are tensors of their own
    fp32: frozenset[str] = frozenset()  # parameters in fp32 there, where the others are not

    @classmethod
    def of(cls, names: Collection[str], prefixes: Iterable[str], usual: "Form") -> "Form":
        """The form of a folder with tensors of these names. prefixes: that its decoder may have.
        usual: where the names do not say."""
        found = [prefix for prefix in prefixes if f"{prefix}embed_tokens.weight" in names]
        prefix = found[0] if found else usual.prefix
        experts = [n for n in names if n.startswith(prefix) and ".mlp.experts." in n]
        split = any(SINGLE.fullmatch(name) for name in experts) if experts else usual.split
        return cls(prefix, split)

    def there(self, name: str) -> str:
        """A parameter's name -> the folder's, for a parameter that is one tensor there."""
        if name.startswith(DECODER):
            return self.prefix + name.removeprefix(DECODER)
        if name.startswith(HEAD):
            return HEADS[self.prefix] + name.removeprefix(HEAD)
        return name

    def is_split(self, name: str) -> bool:
        """Whether a parameter consists of several tensors in the folder."""
        return self.split and STACKED.fullmatch(name) is not None

    def matrices(self, name: str, experts: int) -> list[list[str]]:
        """The folder's names of what a split parameter consists of: of each expert's matrices."""
        path, kind = STACKED.fullmatch(self.there(name)).groups()
        return [
            [f"{path}.{expert}.{matrix}.weight" for matrix in MATRICES[kind]]
            for expert in range(experts)
        ]

    def all_there(self, name: str, shape: Iterable[int]) -> list[str]:
        """The folder's names of all tensors that a parameter of this shape consists of."""
        if not self.is_split(name):
            return [self.there(name)]
        found = []
        for matrices in self.matrices(name, list(shape)[0]):
            found += matrices
        return found

    def published(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters under their names here -> tensors under the folder's, which are views."""
        for name, tensor in named_tensors:
            if not self.is_split(name):
                yield self.there(name), tensor
                continue
            names_of = self.matrices(name, len(tensor))
            for matrix_RC, names in zip(tensor, names_of):
                yield from zip(names, matrix_RC.chunk(len(names)))


@dataclass(frozen=True)
class Carried:
    """Tensors of a folder that the decoder does not use: they are saved with it, as they are."""

    folder: str
    names: tuple[str, ...]  # in the folder


def ours(name: str, prefixes: Iterable[str]) -> str:
    """A name that begins with one of these prefixes of a decoder -> that of a parameter here."""
    for prefix in sorted(prefixes, key=len, reverse=True):
        if name.startswith(prefix):
            return DECODER + name.removeprefix(prefix)
    return name
