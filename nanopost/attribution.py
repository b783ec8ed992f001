"""Why a server's numbers are not the trainer's: the first explanation that gives the same numbers.

`why` has a print of each tensor (probe.py) and explains tensor by tensor. `search` has scores alone
and tries changes of the trainer's own weights.

Shapes: I inputs and O outputs of a matrix.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from nanopost.hf import EMBEDDING, HEAD
from nanopost.probe import (
    CACHED,
    CHANGED,
    CUT,
    PLAIN,
    PRINT,
    SCORE,
    TOP_P,
    Answer,
    Ours,
    cut_gap,
    differing,
    distance,
    gap,
    own_name,
    print_limit,
    print_of,
    vector,
    wrong,
)


# --------------------------------------------------------------------------------- tensor by tensor
def rotary_orders(config, part: str) -> dict[str, np.ndarray]:
    """Orders of the rows of q_proj or k_proj, or of the columns of o_proj: row i is row order[i] of
    Hugging Face's layout, which has the halves of each head's rotation one after the other; the
    original has them in pairs. part: q, k, v or o."""
    heads = config.kv_heads if part in "kv" else config.heads
    width = config.head_dim
    if part == "q" and config.traits.gated_attention:  # the gate, which does not turn, is below
        width *= 2
    turned = int(config.head_dim * config.ropes["full_attention"]["partial_rotary_factor"])
    texts = {
        "in the original rotary order (pairs side by side)": (2, turned // 2),
        "converted to Hugging Face's rotary order twice": (turned // 2, 2),
    }
    orders = {}
    for text, shape in texts.items():
        rows = np.arange(heads * width).reshape(heads, width)
        first = rows[:, :turned].reshape(heads, *shape)
        rows[:, :turned] = first.swapaxes(1, 2).reshape(heads, turned)
        orders[text] = rows.ravel()
    return orders


def cause_of(
    name: str,
    x_O: np.ndarray,
    now: dict[str, np.ndarray],
    before: dict[str, np.ndarray] | None,
    config,
    limit: float,
    weight: torch.Tensor | None = None,
) -> str:
    """Why a server's print of one tensor is wrong: the first explanation that gives the same print.

    weight: the trainer's tensor, for explanations that need more than its print.
    """

    def same(y_O):
        return distance(x_O, y_O) <= limit

    own = own_name(name, now)
    y_O = now[own]
    if x_O.shape != y_O.shape:
        return f"has {len(x_O)} rows instead of {len(y_O)}"
    if not np.isfinite(x_O).all():
        return "is not finite"
    if before is not None and distance(before[own], y_O) > limit:
        if same(before[own]):
            return "is that of the version before"
        scale = limit * max(np.sqrt(np.square(y_O).mean()), 1e-30)
        old_O = np.abs(x_O - y_O) > scale
        if (np.abs(x_O - before[own])[old_O] <= scale).all():
            rows = old_O.nonzero()[0]
            return f"has rows {rows[0]} to {rows[-1]} of the version before ({len(rows)} rows)"
    if not x_O.any():
        return "is zero"
    for other, z_O in now.items():
        if other != own and same(z_O) and not same(y_O):
            return f"is {other}"
    if weight is not None and same(print_of(weight.bfloat16())):
        return "is rounded to bfloat16"
    if weight is not None and weight.ndim == 2:
        x_I = vector(weight.shape[1])
        if weight.shape[0] == weight.shape[1] and same((weight.float().T @ x_I).numpy()):
            return "is transposed"
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
    heads = heads.get(name.split(".")[-2])
    if heads:
        for text, order in rotary_orders(config, name.split(".")[-2][0]).items():
            if same(y_O[order]):
                return f"has its rows {text}"
        from_H = [
            min(range(heads), key=lambda h: distance(part, y_O.reshape(heads, -1)[h]))
            for part in x_O.reshape(heads, -1)
        ]
        if same(y_O.reshape(heads, -1)[from_H].ravel()):
            return f"has its heads in the order {' '.join(map(str, from_H))}"
    if name.endswith("o_proj.weight") and weight is not None:
        x_I = vector(weight.shape[1])
        for text, order in rotary_orders(config, "o").items():
            if same((weight[:, order].float() @ x_I).numpy()):
                return f"has its columns {text}"
    if distance(np.sort(x_O), np.sort(y_O)) <= limit:
        return "has its rows in another order"
    scale = float(x_O @ y_O / max(y_O @ y_O, 1e-30))
    if abs(scale) > 1e-3 and distance(x_O, scale * y_O) <= limit:
        return f"is scaled by {scale:.4g}"
    if distance(x_O, y_O) <= PRINT[torch.bfloat16]:
        return "differs a little, as by a small update: compare with the weights before (--before)"
    return "holds other numbers" + ("" if before is None else ", neither the new nor the old ones")


def some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def of_several(cause: str) -> str:
    """A cause of one tensor as one of several: "is zero" -> "are zero"."""
    if cause.startswith("is that"):
        return cause.replace("is that", "are those", 1)
    verb, _, rest = cause.partition(" ")
    verb = {"is": "are", "has": "have", "holds": "hold", "differs": "differ"}[verb]
    return f"{verb} {rest}".replace(" its ", " their ")


def conclusion(causes: dict[str, str], names: list[str], changed: list[str]) -> str:
    """One clause for the causes of all wrong tensors. names: all tensors, in the order in which
    they were sent. changed: those that the last update has changed."""
    old = [name for name, cause in causes.items() if cause == "is that of the version before"]
    if old and old == [*causes]:
        if set(changed) <= set(old):
            return "stale weights: every tensor is that of the version before"
        if old == [HEAD] and HEAD not in names:
            return (
                "a stale tied head: the embedding is new, but the server's packed copy of it, the "
                "head, is that of the version before"
            )
        part = [name for name in changed if name in old]
        first = changed.index(part[0])
        if len(part) > 1 and changed[first : first + len(part)] == part:
            return (
                f"a partial update: a bucket of weights is missing, {part[0]} to {part[-1]} "
                f"({len(part)} of {len(changed)} tensors) are those of the version before"
            )
        return f"a partial update: {some(old)} of the version before"
    if all(".up_proj" in c or ".gate_proj" in c for c in causes.values()):
        layers = sorted({name.split(".mlp.")[0] for name in causes})
        return f"gate and up are swapped in {some(layers)}"
    rounded = [name for name, cause in causes.items() if cause == "is rounded to bfloat16"]
    if len(rounded) == len(causes) and len(rounded) > len(names) / 3:
        return "low precision: all weights are rounded to bfloat16, and nothing else differs"
    kinds = {}
    for name, cause in causes.items():
        kinds.setdefault(cause, []).append(name)
    clauses = []
    for cause, members in kinds.items():
        clauses.append(f"{some(members)} {of_several(cause) if len(members) > 1 else cause}")
    more = f"; and {len(clauses) - 3} more" if len(clauses) > 3 else ""
    return "; ".join(clauses[:3]) + more


OTHER_EXPERTS = (
    "its tokens take other experts than the trainer's router would choose: another order of the "
    "experts, groups of them, or a bias of the router"
)


def why(
    answer: Answer, ours: Ours, dtype, config, weights: Iterable[tuple[str, torch.Tensor]]
) -> str:
    """The cause, as one clause. weights: the trainer's, read once if a tensor differs."""
    limit, bound = SCORE[dtype], print_limit(answer, dtype)
    names = [*ours.prints]
    changed = names
    if ours.before is not None:
        changed = [n for n in names if distance(ours.before[n], ours.prints[n]) > bound] or names

    bad = wrong(answer.prints, ours.prints, bound) if answer.prints is not None else []
    causes = {}
    for name, tensor in weights if bad else ():
        for other in bad:
            if other == name or (other not in names and name == EMBEDDING):
                about = (answer.prints[other], ours.prints, ours.before, config, bound)
                causes[other] = cause_of(other, *about, weight=tensor.cpu())
    if causes:
        return conclusion({name: causes[name] for name in bad}, names, changed)

    found = gap(answer.scores, ours.scores)
    if not found <= limit:
        if not np.isfinite(found):
            return "log-probs that are missing or not finite"
        if ours.scores_before is not None and gap(answer.scores, ours.scores_before) <= limit:
            return "stale weights: its log-probs are those of the version before"
        if answer.about.get("dtype", "float32") != str(dtype).removeprefix("torch."):
            return (
                f"low precision: it computes in {answer.about['dtype']} and the trainer in "
                f"{str(dtype).removeprefix('torch.')}; all {len(names)} tensors are the trainer's"
            )
        if answer.prints is not None and config.experts is not None and not answer.routes:
            return (
                "it does not name its experts: rounding may have chosen others than the trainer's, "
                "or they are not the trainer's; start it with --enable-return-routed-experts (GPUs "
                "only)"
            )
        if answer.prints is not None and config.experts is not None:
            return (
                "not the tensors that were compared, which are all the trainer's: its experts, "
                "which were not, or what it computes with them"
            )
        if answer.prints is not None:
            return (
                "not the weights, which are all the trainer's: it computes something else with "
                "them (config.json, say rope_theta; a quantised cache; an attention kernel)"
            )
        return ""
    if ours.changed is not None and ours.changed > CHANGED:
        return OTHER_EXPERTS
    off = {
        name: np.abs(logp_T - ours.sampled[name]) for name, (_, logp_T) in answer.sampled.items()
    }
    off = {name: float(x.mean()) for name, x in off.items()}
    if np.abs(answer.sampled[PLAIN][1] - ours.raw).mean() <= limit < off[PLAIN]:
        return (
            "its log-probs are those before temperature and cuts: start it with --logprobs-mode "
            "processed_logprobs"
        )
    if off[PLAIN] <= limit < off[CACHED]:
        return (
            "stale keys and values: a prompt that it has seen before the update is answered from "
            "its prefix cache; reset that after each update (/reset_prefix_cache)"
        )
    if off[PLAIN] <= limit and off[CUT] <= limit < cut_gap(
        answer.sampled[CUT][1], ours.sampled[CUT], TOP_P
    ):
        return "its log-probs do not contain the cut (top_p), only the temperature"
    if differ := differing(answer, ours):
        return f"the bytes of {some(differ)} differ, by less than the other comparisons show"
    return ""


# ---------------------------------------------------------------------------------- by scores alone
class Edited(nn.Module):
    """A model with some of its tensors replaced for a while. head: a head for a tied model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    @contextmanager
    def tensors(self, edit: dict[str, torch.Tensor]):
        model, own = self.model, dict(self.model.named_parameters())
        kept = {name: own[name].detach().clone() for name in edit if name in own}
        with torch.no_grad():
            for name in kept:
                own[name].copy_(edit[name])
            if HEAD in edit and HEAD not in own:
                head = nn.Linear(*edit[HEAD].shape[::-1], bias=False, device="meta")
                head.weight = nn.Parameter(edit[HEAD], requires_grad=False)
                model.lm_head = head
            try:
                yield
            finally:
                for name, tensor in kept.items():
                    own[name].copy_(tensor)
                if HEAD not in own:
                    model.lm_head = None


def search(
    model, scores: list[np.ndarray], score: Callable, before: dict | None, limit: float
) -> str:
    """Which change of the trainer's weights gives a server's scores -> a clause, or "".

    A forward pass for each hypothesis. score() -> the model's scores.
    """
    edited = Edited(model)
    own = {name: p.detach() for name, p in model.named_parameters()}
    first = score()
    start = gap(scores, first)

    def explains(edit):
        with edited.tensors(edit):
            found = gap(scores, score())
        return found <= limit and found < start / 4

    for group in hypotheses(own, before, model.config):
        # Scores alone cannot tell a zero gate from a zero up_proj.
        if found := [clause for clause, edit in group if explains(edit)]:
            return " or ".join(found[:3])
    if before is None:
        return ""
    # Several tensors of the version before: to first order their effects add up.
    changed = [name for name in own if not torch.equal(own[name], before[name])]
    effects = []
    for name in changed:
        with edited.tensors({name: before[name]}):
            effects.append(_flat(score()) - _flat(first))
    matrix, rest = np.stack(effects, 1), _flat(scores) - _flat(first)
    share, *_ = np.linalg.lstsq(matrix, rest, rcond=None)
    guesses = [[name for name, s in zip(changed, share) if s > 0.5]]
    for i in range(1, len(changed)):  # a bucket, at the end or at the beginning
        guesses += [changed[i:], changed[:i]]
    for names in guesses:
        if names and explains({name: before[name] for name in names}):
            causes = dict.fromkeys(names, "is that of the version before")
            return conclusion(causes, [*own], changed)
    return ""


def _flat(scores):
    return np.concatenate([x[1:] for x in scores]).astype(np.float64)


def hypotheses(own: dict, before: dict | None, config) -> Iterator[Iterable[tuple[str, dict]]]:
    """Groups of (clause, the tensors that a server would then have), the commonest first."""
    blocks = dict.fromkeys(name.split(".", 3)[2] for name in own if ".layers." in name)
    layers = [f"model.layers.{number}" for number in blocks]
    orders, key_orders = rotary_orders(config, "q"), rotary_orders(config, "k")

    def rotary(layers, text):
        edit = {}
        for layer in layers:
            for part, order in (("q", orders[text]), ("k", key_orders[text])):
                for kind in ("weight", "bias"):
                    if (name := f"{layer}.self_attn.{part}_proj.{kind}") in own:
                        edit[name] = own[name][order]
        return edit

    def swapped(layers):
        edit = {}
        for layer in layers:
            gate, up = (f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up"))
            if gate in own:
                edit |= {gate: own[up].clone(), up: own[gate].clone()}
        return edit

    def layouts(layers, where):
        for text in orders:
            if edit := rotary(layers, text):
                yield f"q_proj and k_proj of {where} have their rows {text}", edit
        if edit := swapped(layers):
            yield f"gate and up are swapped in {where}", edit

    if before is not None:
        yield [("stale weights: every tensor is that of the version before", before)]
        if HEAD not in own:
            clause = "a stale tied head: the embedding is new, the head that of the version before"
            yield [(clause, {HEAD: before[EMBEDDING]})]
        one = "a partial update: {} is that of the version before"
        yield ((one.format(name), {name: before[name]}) for name in own)
    yield layouts(layers, "all layers")
    for layer in layers:
        yield layouts([layer], layer)
    square = {name: x for name, x in own.items() if x.ndim == 2 and x.shape[0] == x.shape[1]}
    yield ((f"{name} is transposed", {name: x.T.clone()}) for name, x in square.items())
    for scale in (0.0, 0.5, 2.0):
        clause = f"is scaled by {scale:g}" if scale else "is zero"
        yield ((f"{name} {clause}", {name: scale * x}) for name, x in own.items())
