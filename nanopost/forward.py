"""Log-probs, scores and values of many examples, over micro-batches and ranks.

Shapes: N packed tokens."""

import numpy as np
import torch

from nanopost.batch import Example, batch_of
from nanopost.dist import even
from nanopost.packing import pack


def logprobs_of(model, examples: list, tokens: int, temperature: float, device) -> list[np.ndarray]:
    """Log-prob of each trained token of each Example under a model -> one fp32 array each, as per_token gives them."""
    return per_token(lambda batch: model(batch, temperature)[0], examples, tokens, device)


@torch.no_grad()
def per_token(forward, examples: list, tokens: int, device) -> list[np.ndarray]:
    """forward(batch) -> x_N, 0 where no target is; one fp32 array for each Example, aligned with its ids.

    A collective: every rank calls it, and runs as many micro-batches as the rank with most.
    """
    out = [None] * len(examples)
    for part in even(pack([len(e) for e in examples], tokens)):
        batch = batch_of([Example(examples[i].ids, examples[i].mask) for i in part], device)
        # Back from targets to the tokens themselves: what belongs to a token stands one place before it.
        x_N = forward(batch).roll(1).cpu().numpy()
        cuts = batch.cu_seqlens.tolist()
        for i, start, end in zip(part, cuts, cuts[1:]):
            out[i] = x_N[start:end]
    return out


@torch.no_grad()
def scores_of(model, examples: list[Example], tokens: int, device) -> list[float]:
    """What a reward model gives each sequence: its value at the last token."""
    out = [0.0] * len(examples)
    for part in pack([len(e) for e in examples], max(tokens, *map(len, examples))):
        batch = batch_of([examples[i] for i in part], device)
        for i, score in zip(part, model(batch)[batch.cu_seqlens[1:].long() - 1].tolist()):
            out[i] = score
    return out
