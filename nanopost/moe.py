"""What a block has after its attention: an MLP, or a mixture of many of them, the experts.

A router scores the experts for each token. The token takes the best A of E, and gets the sum of
what they make of it, weighted by the scores (1701.06538, equations 1 and 3, without noise). In
Qwen3.5 one more expert is shared by all tokens, behind a gate of its own.

The auxiliary losses that make routers use their experts evenly in pretraining (2101.03961, equation
4) are left out: over the few tokens of a fine-tuning step they would work against the data.
load_metrics tells how evenly the experts are used.

Shapes: N tokens, E experts, A of them active for a token, R = N A rows, sorted by expert, D width,
F width of an expert, I and O inputs and outputs of a matrix, L mixtures of a model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nanopost import InputError
from nanopost.attention import repeat
from nanopost.config import Config

ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


class MLP(nn.Module):
    def __init__(self, c: Config, width: int):
        super().__init__()
        self.activation = ACTIVATIONS[c.activation]
        self.gate_proj = nn.Linear(c.width, width, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.width, width, bias=c.mlp_bias)
        self.down_proj = nn.Linear(width, c.width, bias=c.mlp_bias)

    def forward(self, x_ND):
        return self.down_proj(self.activation(self.gate_proj(x_ND)) * self.up_proj(x_ND))


class MoE(nn.Module):
    """A mixture of experts. Names and shapes of its parameters are those of transformers 5."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.sizes = c.experts
        self.number = sum(block.experts for block in c.blocks[:layer])  # of this mixture
        self.gate = Router(c)
        self.experts = Experts(c)
        if self.sizes.shared:
            self.shared_expert = MLP(c, self.sizes.shared)
            self.shared_expert_gate = nn.Linear(c.width, 1, bias=False)

    @torch.compiler.disable  # how many tokens an expert has is known to the device alone
    def forward(self, x_ND, routes: "Routes"):
        """-> out_ND. The router learns from the weights of the experts, whoever has chosen them."""
        score_NE = self.gate(x_ND)
        expert_NA = routes.choose(self.number, score_NE, self.sizes.active)
        weight_NA = score_NE.gather(1, expert_NA)
        if self.sizes.normalized:
            weight_NA = weight_NA / weight_NA.sum(-1, keepdim=True)
        out_ND = self.experts(x_ND, expert_NA, weight_NA.to(x_ND.dtype))
        if self.sizes.shared:
            share_N1 = self.shared_expert_gate(x_ND).sigmoid()
            out_ND = out_ND + share_N1 * self.shared_expert(x_ND)
        return out_ND


class Router(nn.Module):
    """softmax(x W^T), the softmax in fp32. It is no nn.Linear: it gets no adapter, and is never
    quantised."""

    def __init__(self, c: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(c.experts.count, c.width))

    def forward(self, x_ND):
        precision = torch.promote_types(x_ND.dtype, torch.float32)
        return F.linear(x_ND, self.weight).softmax(-1, dtype=precision)


class Experts(nn.Module):
    """MLPs of one size: down(act(gate x) * up x), the matrices of all experts in one tensor."""

    def __init__(self, c: Config):
        super().__init__()
        count, width = c.experts.count, c.experts.width
        self.activation = ACTIVATIONS[c.activation]
        self.gate_up_proj = nn.Parameter(torch.zeros(count, 2 * width, c.width))
        self.down_proj = nn.Parameter(torch.zeros(count, c.width, width))

    def forward(self, x_ND, expert_NA, weight_NA):
        """The sum over a token's experts, always in the same order: -> out_ND."""
        active = expert_NA.shape[1]
        sorted_R, order_R = expert_NA.flatten().sort(stable=True)
        number_E = torch.arange(len(self.down_proj), device=sorted_R.device)
        end_E = torch.searchsorted(sorted_R, number_E, right=True)
        multiply = grouped if is_grouped(self.down_proj) else one_by_one
        x_RD = repeat(x_ND, order_R // active)
        gate_RF, up_RF = multiply(x_RD, self.gate_up_proj, end_E).chunk(2, -1)
        out_RD = multiply(self.activation(gate_RF) * up_RF, self.down_proj, end_E)
        place_R = order_R.argsort()  # of each token's rows among those sorted by expert
        out_NAD = repeat(out_RD, place_R).unflatten(0, (-1, active))
        return (out_NAD * weight_NA[..., None]).sum(1)


def one_by_one(x_RI, weight_EOI, end_E):
    """Each row times the matrix of its expert -> [R, O]. The rows of expert e end before end_E[e].

    An expert without a row gets a gradient of zeros.
    """
    counts = end_E.diff(prepend=end_E.new_zeros(1)).tolist()
    parts = []
    for x, weight_OI in zip(x_RI.split(counts), weight_EOI.unbind()):
        if len(x):
            parts.append(F.linear(x, weight_OI))
    return torch.cat(parts)


def grouped(x_RI, weight_EOI, end_E):
    """The same as one kernel: the host waits for no count, so a CUDA graph can repeat it."""
    return F.grouped_mm(x_RI, weight_EOI.mT, offs=end_E.int())


def is_grouped(weight_EDF) -> bool:
    """Whether `grouped` is one kernel: on a GPU of the Hopper generation or later, in bf16, for
    widths that are multiples of 8."""
    if not weight_EDF.is_cuda or weight_EDF.dtype != torch.bfloat16:
        return False
    aligned = all(width % 8 == 0 for width in weight_EDF.shape[1:])
    return aligned and torch.cuda.get_device_capability(weight_EDF.device) >= (9, 0)


def needs_no_host(model) -> bool:
    """Whether a pass through a model never waits for the host."""
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    return all(is_grouped(experts.down_proj) for experts in mixtures)


# ------------------------------------------------------------------------------------------- routes
class Routes:
    """Which experts the tokens of one pass take, in each of a model's mixtures.

    A block that is computed again for its backward pass takes the same.
    """

    def __init__(self, given_NLA=None):
        """given_NLA: int, experts to take, where not negative, in place of the best (router replay,
        2510.11370, section 4)."""
        self.given_NLA = given_NLA
        self.taken = {}  # number of a mixture -> expert_NA
        self.replayed_2 = 0  # of the experts given: those that are not among the best, and all

    def check(self, c: Config):
        """InputError if what is given cannot be of a model of this config."""
        if self.given_NLA is None:
            return
        _, layers, active = self.given_NLA.shape
        # On a GPU the host would wait for the largest number.
        last = -1 if self.given_NLA.is_cuda else int(self.given_NLA.max())
        if (layers, active) != (c.mixtures, c.experts.active) or last >= c.experts.count:
            raise InputError(
                f"the rollouts name {active} experts of {layers} layers, up to number {last}, and "
                f"the model takes {c.experts.active} of {c.experts.count} in {c.mixtures}: they "
                "are of another model; record (--replay) or serve (--vllm) this one."
            )

    def choose(self, number: int, score_NE, active: int):
        """-> expert_NA, int64."""
        if number not in self.taken:
            expert_NA = score_NE.detach().topk(active).indices
            if self.given_NLA is not None:
                given_NA = self.given_NLA[:, number].long()
                named_NA = given_NA >= 0
                other_NA = named_NA & ~(given_NA[:, :, None] == expert_NA[:, None]).any(2)
                self.replayed_2 = self.replayed_2 + torch.stack([other_NA.sum(), named_NA.sum()])
                expert_NA = given_NA.where(named_NA, expert_NA)
            self.taken[number] = expert_NA
        return self.taken[number]

    def taken_NLA(self):
        """-> int16: what all mixtures of a model have taken."""
        return torch.stack([self.taken[i] for i in range(len(self.taken))], 1).short()

    def count_LE(self, experts: int):
        """How many tokens each expert has -> int64."""
        expert_LM = self.taken_NLA().long().transpose(0, 1).flatten(1)
        count_LE = expert_LM.new_zeros(len(expert_LM), experts)
        return count_LE.scatter_add_(1, expert_LM, torch.ones_like(expert_LM))


def load_metrics(model) -> dict[str, float]:
    """How the passes since the last call, of all ranks, have used the experts; {} without any. A
    collective if the model has experts.

    experts/max_violation: how many more tokens than the mean the busiest expert of a mixture has,
    as a share of the mean (MaxVio, 2408.15664, section 4.1). experts/unused_ratio: the share of
    experts that no token has taken. Both are means over mixtures, of training.
    experts/replay_changed: of the experts that the engine named for what was trained on, the share
    that the policy's router would not have taken.
    """
    violations, unused = [], []
    changed, named = _replayed_by_all(model)
    for decoder in _decoders(model):
        c, used_LE = decoder.config, decoder.used_LE
        if c.experts is None:
            continue
        if used_LE is None:
            used_LE = torch.zeros(c.mixtures, c.experts.count, dtype=torch.long)
        used_LE = used_LE.cpu()
        torch.distributed.all_reduce(used_LE)
        decoder.used_LE = None
        if used_LE.any():
            used_LE = used_LE.double()
            violations += (used_LE.amax(1) / used_LE.mean(1) - 1).tolist()
            unused += (used_LE == 0).double().mean(1).tolist()
    if not violations:
        return {}
    metrics = {
        "experts/max_violation": sum(violations) / len(violations),
        "experts/unused_ratio": sum(unused) / len(unused),
    }
    if named:
        metrics["experts/replay_changed"] = changed / named
    return metrics


def replayed(model) -> torch.Tensor:
    """int64 [2] of this rank, on the CPU: of the experts that were given in training since
    load_metrics, those that the router would not have taken, and all."""
    found_2 = torch.zeros(2, dtype=torch.long)
    for decoder in _decoders(model):
        found_2 += torch.as_tensor(decoder.replayed_2).cpu()
    return found_2


@contextmanager
def counted(model) -> Iterator[list[int]]:
    """Yields a list that gets the same of the passes inside, with or without gradients; what
    training has counted stays as it is."""
    decoders, found = _decoders(model), []
    kept = [decoder.replayed_2 for decoder in decoders]
    for decoder in decoders:
        decoder.replayed_2, decoder.counting = 0, True
    try:
        yield found
        found += replayed(model).tolist()
    finally:
        for decoder, before in zip(decoders, kept):
            decoder.replayed_2, decoder.counting = before, False


def _replayed_by_all(model) -> list[int]:
    found_2 = replayed(model)
    for decoder in _decoders(model):
        decoder.replayed_2 = 0
    if any(decoder.config.experts is not None for decoder in _decoders(model)):
        torch.distributed.all_reduce(found_2)
    return found_2.tolist()


def _decoders(model) -> list:
    return [module for module in model.modules() if hasattr(module, "used_LE")]


def no_auxiliary_loss(model) -> str:
    """A sentence, for a model whose config.json asks for an auxiliary loss; else ""."""
    for decoder in _decoders(model):
        if decoder.config.experts is None:
            continue
        text = decoder.config.text
        weight = text.get("router_aux_loss_coef")
        if weight and text.get("output_router_logits"):
            return (
                f"router_aux_loss_coef {weight:g} of config.json is not used: no auxiliary loss "
                "makes the router use its experts evenly; experts/* in the metrics say whether it "
                "does"
            )
    return ""
