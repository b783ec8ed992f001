"""An Example is one sequence of tokens; a Batch is several in one packed stream, without padding.

Shapes: N packed tokens, S sequences, T tokens of one sequence, E pairs of a target and an id that
the cut of its distribution kept, L layers with experts, A experts of a token in each.

Targets are shifted where a Batch is built, and shifted back in Batch.split. Nothing else shifts:
code outside this file works on examples, whose masks and columns are aligned with their ids, or on
batches, where everything is aligned with the position that predicts it.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from nanopost import InputError, StepError

IGNORED = -100
# A sequence shares its beginning if that is at least this part of it and a few tokens more: less
# costs more, in pieces of attention, than it saves. Above 1, nothing is shared.
SHARED = 1 / 16
FEW = 4


@dataclass
class Example:
    """One sequence of at least one token. Masks and per-token columns are aligned with ids."""

    ids: np.ndarray  # int32 [T]
    mask: np.ndarray  # bool [T]: this token is trained, or is an action
    columns: dict = field(default_factory=dict)  # name -> array [T], or a number
    # [T] of int32 arrays: the ids that top-k, top-p or min-p kept, of which this token was drawn;
    # not read where mask is False. None: nothing was cut.
    kept: list[np.ndarray] | None = None
    # int16 [T, L, A]: the experts that the engine took for each token, which a policy takes again
    # (moe.py); -1: those that it finds best. None: that for all of them.
    routes: np.ndarray | None = None

    def __post_init__(self):
        self.ids, self.mask = np.asarray(self.ids, np.int32), np.asarray(self.mask, bool)
        if not len(self.ids) == len(self.mask) > 0:
            raise InputError(
                f"an example has {len(self.ids)} tokens and a mask of {len(self.mask)}: give it at "
                "least one token, and a mask of the same length."
            )
        if self.kept is not None and len(self.kept) != len(self.ids):
            raise InputError(
                f"an example has {len(self.ids)} tokens and kept ids for {len(self.kept)}: give it "
                "a set for each token, or none."
            )
        if self.routes is not None and len(self.routes) != len(self.ids):
            raise InputError(
                f"an example has {len(self.ids)} tokens and the experts of {len(self.routes)}: "
                "give those of each token, or none."
            )

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Example":
        columns = {k: v[part] if np.ndim(v) else v for k, v in self.columns.items()}
        kept = None if self.kept is None else self.kept[part]
        routes = None if self.routes is None else self.routes[part]
        return Example(self.ids[part], self.mask[part], columns, kept, routes)

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first trained one; 0 if none is."""
        return int(self.mask.argmax())

    @property
    def num_targets(self) -> int:
        """Trained tokens that something predicts: the first token of a sequence is not a target."""
        return int(self.mask[1:].sum())

    def ended(self) -> "Example":
        """Cut after the last trained token (dropping a template's newline), where rollouts end."""
        return self[: len(self) - self.mask[::-1].argmax()]


class Prefixes(NamedTuple):
    """Which tokens of a stream are computed, where sequences begin alike.

    A sequence takes what it has in common with the one before it from there, and computes its last
    tokens, one at least. U: tokens that are computed, in their order in the stream.
    """

    index_N: torch.Tensor  # int64: which of the U tokens each token is
    first_U: torch.Tensor  # int64: the token that computes each of the U
    target_M: torch.Tensor  # int64: the tokens that have a target
    cu_own: torch.Tensor  # int32 [S+1]: sequence s computes U tokens cu_own[s] to cu_own[s+1] - 1
    max_own: int


class Sequences(NamedTuple):
    """Which sequence each packed token belongs to, and which tokens are trained."""

    mask_N: torch.Tensor  # bool
    index_N: torch.Tensor  # int64, from 0 to count - 1
    count: int

    def sum(self, x_N: torch.Tensor) -> torch.Tensor:
        """Sum of x over each sequence, masked tokens included -> [S]."""
        return x_N.new_zeros(self.count).index_add(0, self.index_N, x_N)

    def spread(self, x_S: torch.Tensor) -> torch.Tensor:
        """Each sequence's x at all of its tokens -> [N]."""
        return x_S.index_select(0, self.index_N)

    def length_S(self) -> torch.Tensor:
        """Trained tokens of each sequence, at least 1 -> int64 [S]."""
        return self.sum(self.mask_N.long()).clamp(min=1)


@dataclass
class Batch:
    """Sequences in one stream, cut by cu_seqlens. batch["name"] is a column.

    Every sequence is there as a whole. Where neighbours begin alike the model computes that once
    (prefixes): the same numbers for less work, and nobody else needs to know.
    """

    token_N: torch.Tensor  # int64
    position_N: torch.Tensor  # int64, from 0 in each sequence
    target_N: torch.Tensor  # int64: the next token of the same sequence; -100 where mask_N is False
    mask_N: torch.Tensor  # bool: the target is trained
    cu_seqlens: torch.Tensor  # int32 [S+1]
    max_seqlen: int
    columns: dict[str, torch.Tensor]  # float32 [N] (shifted like the targets) or [S]
    num_targets: int = 0
    dummy: bool = False  # stands in for an empty batch: every column is 0
    # token_E and id_E, int32: the kept ids of each target, at the position that predicts it
    kept: tuple[torch.Tensor, torch.Tensor] | None = None
    examples: list[Example] = field(default_factory=list)  # none in a dummy
    prefixes: Prefixes | None = None  # None: no sequence shares anything
    routes_NLA: torch.Tensor | None = None  # int16, of each token itself: see Example

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_examples(self) -> int:
        """Sequences that are examples: 0 for a dummy."""
        return len(self.examples)

    @cached_property
    def sequences(self) -> Sequences:
        index_S = torch.arange(self.num_sequences, device=self.token_N.device)
        lengths = self.cu_seqlens.diff()
        index_N = index_S.repeat_interleave(lengths, output_size=len(self.token_N))
        return Sequences(self.mask_N, index_N, self.num_sequences)

    @property
    def last_S(self) -> torch.Tensor:
        """int64: the index of each sequence's last token."""
        return self.cu_seqlens[1:].long() - 1

    @property
    def routes_ULA(self) -> torch.Tensor | None:
        """Those of the tokens that are computed."""
        if self.prefixes is None or self.routes_NLA is None:
            return self.routes_NLA
        return self.routes_NLA[self.prefixes.first_U]

    @property
    def at_M(self) -> torch.Tensor:
        """int64: the tokens that have a target."""
        return self.mask_N.nonzero()[:, 0] if self.prefixes is None else self.prefixes.target_M

    def spread(self, x_M: torch.Tensor) -> torch.Tensor:
        """A number of each target -> of each token [N], 0 where there is no target."""
        return x_M.new_zeros(len(self.token_N)).index_copy(0, self.at_M, x_M)

    def __getitem__(self, name: str) -> torch.Tensor:
        if self.dummy:
            return torch.zeros_like(self.token_N, dtype=torch.float32)
        return self.columns[name]

    def split(self, x_N: torch.Tensor) -> list[np.ndarray]:
        """Move each target's number back to the token itself -> an array for each sequence, aligned
        with its ids. The first token is not a target: it gets 0 if masked targets have 0."""
        shifted_back_N = x_N.roll(1).cpu().numpy()
        return np.split(shifted_back_N, self.cu_seqlens[1:-1].tolist())

    def to(self, device) -> "Batch":
        """The same batch on a device; copies overlap with computation if memory is pinned."""
        names = ("token_N", "position_N", "target_N", "mask_N", "cu_seqlens")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        columns = {k: v.to(device, non_blocking=True) for k, v in self.columns.items()}
        if self.kept is not None:
            moved["kept"] = tuple(x.to(device, non_blocking=True) for x in self.kept)
        if self.routes_NLA is not None:
            moved["routes_NLA"] = self.routes_NLA.to(device, non_blocking=True)
        if self.prefixes is not None:
            *tensors, max_own = self.prefixes
            on_device = [x.to(device, non_blocking=True) for x in tensors]
            moved["prefixes"] = Prefixes(*on_device, max_own)
        return replace(self, columns=columns, **moved)


def batch_of(examples: list[Example], device="cpu") -> Batch:
    """Lay examples end to end and shift targets, mask, kept ids and per-token columns.

    Without examples it is a dummy, which has no targets: a rank that has run out of data runs it
    through the same forward and backward passes, and so the same collectives, as the other ranks.
    The dummy is two sequences of one token, so N equals S and a column of zeros fits either way.
    InputError if columns differ between examples, or in length from their tokens. StepError if a
    target is not among the ids that its cut kept.
    """
    given = examples
    examples = examples or [Example([0], [False])] * 2
    length_S = np.array([len(e) for e in examples])
    end_S = length_S.cumsum()
    token_N = np.concatenate([e.ids for e in examples]).astype(np.int64)
    position_N = np.arange(len(token_N)) - np.repeat(end_S - length_S, length_S)
    mask_N = _shift(np.concatenate([e.mask for e in examples]), end_S)
    target_N = np.where(mask_N, _shift(token_N, end_S), IGNORED)
    cu_seqlens = np.concatenate([[0], end_S]).astype(np.int32)
    tensors = map(torch.from_numpy, (token_N, position_N, target_N, mask_N, cu_seqlens))
    columns = {k: torch.from_numpy(v) for k, v in _columns(examples, length_S, end_S).items()}
    return Batch(
        *tensors,
        int(length_S.max()),
        columns,
        num_targets=int(mask_N.sum()),
        dummy=not given,
        kept=_kept(examples, target_N),
        examples=given,
        prefixes=_prefixes(examples, length_S, mask_N),
        routes_NLA=_routes(examples),
    ).to(device)


def worth_sharing(count: int, example: Example) -> int:
    """The count, or 0 if so few of its first tokens are not worth sharing."""
    return count if count >= SHARED * len(example) + FEW else 0


def shared(examples: list[Example]) -> list[int]:
    """How many of its first tokens each example takes from the one before it, if worth sharing.

    What they have in common, but the last token of an example is its own. Where that is the prompt
    and a little more, it is the prompt: completions then share one prefix, not one each.
    """
    counts = [0] * len(examples)
    for s, (before, e) in enumerate(pairwise(examples), 1):
        counts[s] = common(before, e, len(e) - 1)
        if e.prompt_length <= counts[s] <= e.prompt_length * 9 // 8:
            counts[s] = e.prompt_length
        counts[s] = worth_sharing(counts[s], e)
    return counts


def common(a: Example, b: Example, most: int) -> int:
    """The number of first tokens that two examples have in common, at most `most`: the same ids,
    and the same experts."""
    length = min(len(a), len(b), most)
    differs = a.ids[:length] != b.ids[:length]
    if a.routes is not None and b.routes is not None:
        differs |= (a.routes[:length] != b.routes[:length]).any((1, 2))
    elif a.routes is not b.routes:
        return 0
    return int(differs.argmax()) if differs.any() else length


def _prefixes(examples, length_S, mask_N):
    """-> Prefixes, or None where no example begins as the one before it."""
    shared_S = np.array(shared(examples))
    if not shared_S.any():
        return None
    own_S = length_S - shared_S
    start_S, cu_own = length_S.cumsum() - length_S, np.concatenate([[0], own_S.cumsum()])
    index_N = np.empty(length_S.sum(), np.int64)
    for s, (start, count) in enumerate(zip(start_S, shared_S)):
        # A prefix is where the sequence before has it, which may be in the one before that.
        index_N[start : start + count] = index_N[start_S[s - 1] : start_S[s - 1] + count]
        index_N[start + count : start + length_S[s]] = np.arange(cu_own[s], cu_own[s + 1])
    first_U = np.arange(cu_own[-1]) + np.repeat(start_S + shared_S - cu_own[:-1], own_S)
    arrays = index_N, first_U, mask_N.nonzero()[0], cu_own.astype(np.int32)
    return Prefixes(*map(torch.from_numpy, arrays), int(own_S.max()))


def padded(examples: list[Example], name: str) -> torch.Tensor:
    """A column at the trained tokens of each example, then zeros -> float64 [B, T], on the CPU."""
    longest = max((int(e.mask.sum()) for e in examples), default=0)
    out_BT = torch.zeros(len(examples), longest, dtype=torch.float64)
    for out_T, e in zip(out_BT, examples):
        out_T[: e.mask.sum()] = torch.from_numpy(e.columns[name][e.mask])
    return out_BT


def add_column(examples: list[Example], name: str, x_BT: torch.Tensor):
    """Undo padded: give each example a column with its row of x at trained tokens, 0 elsewhere."""
    for e, x_T in zip(examples, x_BT.numpy()):
        e.columns[name] = np.zeros(len(e), np.float32)
        e.columns[name][e.mask] = x_T[: e.mask.sum()]


def _columns(examples, length_S, end_S):
    names, columns = examples[0].columns.keys(), {}
    if other := next((e for e in examples if e.columns.keys() != names), None):
        raise InputError(
            f"examples in one batch have the columns {', '.join(names) or 'none'} and "
            f"{', '.join(other.columns) or 'none'}: give all of them the same."
        )
    for name in names:
        values = [e.columns[name] for e in examples]
        if not np.ndim(values[0]):
            columns[name] = np.array(values, np.float32)
        elif [len(v) for v in values] == length_S.tolist():
            columns[name] = _shift(np.concatenate(values).astype(np.float32), end_S)
        else:
            raise InputError(
                f"column {name} needs a value for each token of its example, or one number."
            )
    return columns


def _kept(examples, target_N):
    """-> (token_E, id_E), or None where nothing was cut."""
    if all(e.kept is None for e in examples):
        return None
    if any(e.kept is None for e in examples):
        raise InputError(
            "of the examples in one batch some have kept ids and some have none: sample all of "
            "them with the same --top_k, --top_p and --min_p."
        )
    lengths = np.array([len(ids) for e in examples for ids in e.kept])
    token_E = np.arange(len(target_N)).repeat(lengths) - 1  # a token is predicted one before it
    id_E = np.concatenate([ids for e in examples for ids in e.kept]).astype(np.int32)
    # Not of what is masked, nor of the first token of a sequence, which has the end of another
    # before it: neither is a target.
    of_target_E = (target_N != IGNORED)[token_E]
    token_E, id_E = token_E[of_target_E], id_E[of_target_E]
    found_N = np.bincount(token_E[id_E == target_N[token_E]], minlength=len(target_N))
    if (lost_N := (target_N != IGNORED) & (found_N != 1)).any():
        first = int(lost_N.argmax())
        raise StepError(
            f"{int(lost_N.sum())} sampled tokens, token {target_N[first]} the first of them, are "
            f"not once among the ids that top-k, top-p or min-p kept (there are "
            f"{int((token_E == first).sum())}): the engine tells of another cut than it sampled "
            "from."
        )
    return torch.from_numpy(token_E.astype(np.int32)), torch.from_numpy(id_E)


def _routes(examples):
    """-> int16 [N, L, A], or None where no example names experts."""
    shapes = {e.routes.shape[1:] for e in examples if e.routes is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise InputError(
            "the examples in one batch name experts of different models: sample all of them with "
            "one model."
        )
    (shape,) = shapes
    own = [
        np.full((len(e), *shape), -1, np.int16) if e.routes is None else e.routes for e in examples
    ]
    return torch.from_numpy(np.concatenate(own).astype(np.int16))


def _shift(value_N, end_S):
    """Give each token the value of the next one; 0 or False at the end of each sequence."""
    shifted_N = np.roll(value_N, -1)
    shifted_N[end_S - 1] = 0
    return shifted_N
