"""Log-probs, values and scores of many examples, over micro-batches and ranks.

Shapes: N packed tokens, S sequences.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from nanopost import StepError
from nanopost.batch import Batch, Example, batch_of
from nanopost.dist import even, gather
from nanopost.packing import micro_batches, pack


def batches(items: list, tokens: int, device) -> Iterator[Batch]:
    """Micro-batches of at most `tokens` tokens, on the device, equally many on every rank.

    items: examples, or tuples of examples that stay together (a pair). At least one batch, a
    dummy if a rank has nothing: each forward and backward pass is a collective.
    """
    units = [(item,) if isinstance(item, Example) else item for item in items]
    lengths = [sum(len(e) for e in unit) for unit in units]
    for part in even(micro_batches(lengths, tokens) or [[]]):
        yield batch_of([e for i in part for e in units[i]], device)


def logprobs(model, examples: list[Example], tokens: int, temperature: float, device):
    """Log-probs of the trained tokens under a model -> list of fp32 [T], as from per_token.

    Those of examples with kept ids are renormalised over them, whatever the model: so are both
    sides of a ratio or of a KL, which is then finite and that of the two cut distributions.
    """
    return per_token(lambda batch: model(batch, temperature)[0], examples, tokens, device)


def add_logprobs(
    examples: list[Example], name: str, model, tokens: int, temperature: float, device
):
    """Give each example a column of its log-probs under a model. A collective."""
    for e, logp in zip(examples, logprobs(model, examples, tokens, temperature, device)):
        e.columns[name] = logp


def add_values(examples: list[Example], model, tokens: int, device):
    """The column value: an ActorCritic's value of the state in which each trained token was chosen.
    A collective."""
    values = per_token(lambda batch: model(batch, value_alone=True)[2], examples, tokens, device)
    for e, value in zip(examples, values):
        e.columns["value"] = value


@torch.no_grad()
def per_token(forward: Callable, examples: list[Example], tokens: int, device) -> list[np.ndarray]:
    """forward(batch) -> x_N, 0 where there is no target; returns fp32 [T] for each example.

    A collective: every rank calls it, and runs as many micro-batches as the rank with the most.
    """
    out = [None] * len(examples)
    for part in even(pack([len(e) for e in examples], tokens)):
        chosen = [examples[i] for i in part]
        batch = batch_of([Example(e.ids, e.mask, kept=e.kept) for e in chosen], device)
        x_N = forward(batch)
        for i, x_T in zip(part, batch.split(x_N)):
            out[i] = x_T
    return out


def gather_pairs(
    model, pairs: list[tuple[Example, Example]], tokens: int, device
) -> tuple[dict[str, torch.Tensor], slice]:
    """Numbers for the sequences of all ranks' pairs under the current model, without gradients
    -> ({name: float64 [S]}, which sequences are this rank's). A collective.

    logp: log-prob summed with the column weight. nll: - log-prob summed over all targets. ref_logp,
    length, label (1 if there is none): the columns. targets: the number of targets.
    """
    examples = [e for pair in pairs for e in pair]
    mine = []
    for e, logp in zip(examples, logprobs(model, examples, tokens, 1.0, device)):
        mine.append(
            {
                "logp": float((logp * e.columns["weight"]).sum()),
                "nll": float(-logp.sum()),
                "ref_logp": e.columns["ref_logp"],
                "length": e.columns["length"],
                "label": e.columns.get("label", 1.0),
                "targets": e.num_targets,
            }
        )
    before = sum(gather([len(mine)])[: torch.distributed.get_rank()])
    every = gather(mine)
    sequences = {
        name: torch.tensor([row[name] for row in every], dtype=torch.float64) for name in every[0]
    }
    return sequences, slice(before, before + len(mine))


@torch.no_grad()
def scores(model, examples: list[Example], tokens: int, device) -> list[float]:
    """A reward model's score of each sequence: its number at the last token."""
    out = [0.0] * len(examples)
    for part in pack([len(e) for e in examples], max(tokens, *map(len, examples))):
        batch = batch_of([examples[i] for i in part], device)
        score_S = model(batch)[batch.last_S]
        for i, score in zip(part, score_S.tolist()):
            out[i] = score
    return out


@torch.no_grad()
def check_finite(grad_norm: float, step: int, model, examples: list[Example], decode: Callable):
    """StepError for a gradient norm that is inf or nan, before the optimizer spreads it.

    It names the first example of this optimizer step whose columns or model outputs are not finite.
    A collective if the norm, which is that of all ranks, is not finite.
    """
    if math.isfinite(grad_norm):
        return
    device = next(model.parameters()).device
    found = []
    for part in even([[e] for e in examples]):
        batch = batch_of(part, device)
        outputs = model(batch)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        checked = batch.columns | {"the model's output": torch.stack(outputs)}
        bad = [name for name, x in checked.items() if not x.isfinite().all()]
        if part and bad:
            found.append(f"{' and '.join(bad)} of {decode(part[0].ids)[:200]!r}")
    found = gather(found)
    cause = "no single example gives one: the loss overflows, or its backward pass does"
    if found:
        cause = f"not finite: {found[0]} (the first of {len(found)} such examples)"
    raise StepError(
        f"step {step}: the gradient norm is {grad_norm}; {cause}. The weights are still finite, "
        "as of the last optimizer step."
    )
