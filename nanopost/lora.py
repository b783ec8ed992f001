"""LoRA (2106.09685): adapters of low rank beside frozen weights, in peft's format on disk.

    y = x W^T + b + scale (x A^T) B^T      scale = alpha / r, or alpha / sqrt(r): rsLoRA, 2312.03732

W and b keep their checkpoint names. Only A, B and a scalar head train. B begins at 0, so training
begins from the base. With adapters off the model is the base: a reference that costs no memory.
Merged weights, W + scale B A, are made anew from W each time: nothing is ever added to W itself,
so nothing drifts. Adapters are beside linear layers, as peft's "all-linear": of a mixture of
experts, beside the one that all tokens share; the others and their router stay as they are.

Shapes: N tokens, I inputs and O outputs of a layer, r rank: A [r, I], B [O, r].
"""

import hashlib
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nanopost import InputError, nf4
from nanopost.names import Form

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ABOUT = "nanopost.json"  # what a run here says beside peft's two files
PREFIX = "base_model.model."  # of peft's tensor names
INSIDE = "model.language_model."  # in transformers, of a decoder beside a vision tower
HEADS = ("score.weight", "value.weight", "value.score.weight")  # they train in full


# ------------------------------------------------------------------------------------------- layers
class LoRALinear(nf4.FrozenLinear):
    """A linear layer with an adapter. Made on the meta device; hf.load_weights fills it."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, rslora: bool, seed: tuple):
        """seed: (of the run, number of the layer)."""
        super().__init__(base)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device="meta"))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device="meta"))
        self.rank, self.alpha, self.rslora, self.seed = rank, alpha, rslora, seed
        self.active = True

    @property
    def scale(self) -> float:
        return scale(self.alpha, self.rank, self.rslora)

    def forward(self, x_NI):
        y_NO = super().forward(x_NI)
        if not self.active:
            return y_NO
        # FSDP2 has cast them already; a single process in bf16 does it here.
        a, b = self.lora_A.to(x_NI.dtype), self.lora_B.to(x_NI.dtype)
        return torch.addmm(y_NO, x_NI @ a.T, b.T, alpha=self.scale)

    def first_A(self) -> torch.Tensor:
        """A before training: uniform in +- 1 / sqrt(I), as peft's; the same on any number of
        ranks."""
        seed = np.random.SeedSequence(self.seed).generate_state(1, np.uint64)[0] >> 2
        generator = torch.Generator().manual_seed(int(seed))
        draw = torch.rand(self.rank, self.in_features, generator=generator)
        return (2 * draw - 1) * self.in_features**-0.5


def scale(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def merged(weight, a, b, scale: float):
    """W + scale B A, in fp32: a new tensor."""
    precision = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(precision) + scale * (b.to(precision) @ a.to(precision))


def apply(
    model: nn.Module,
    rank: int,
    alpha: float = 32.0,
    rslora: bool = False,
    targets: list[str] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Give linear layers of the blocks adapters, and freeze everything but these and scalar heads
    -> the model, of model.py and on the meta device, not sharded yet.

    targets: names of layers, such as q_proj; None: all of them, peft's "all-linear". InputError for
    a name that no layer has, or a rank above the width of every layer.
    """
    linear = linear_layers(model)
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    for target in targets or ():
        if target not in kinds:
            raise InputError(
                f"--lora_targets {target}: no linear layer of the blocks has this name; they are "
                f"{' '.join(kinds)}."
            )
    chosen = [name for name in linear if name.rpartition(".")[2] in (targets or kinds)]
    widest = max(min(linear[name].weight.shape) for name in chosen)
    if rank > widest:
        raise InputError(
            f"--lora {rank}: no layer is more than {widest} wide, so adapters would hold more than "
            "the layers themselves: lower the rank, or train all weights (--lora 0)."
        )
    for number, name in enumerate(chosen):
        _replace(model, name, LoRALinear(linear[name], rank, alpha, rslora, (seed, number)))
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name))
    return model


def linear_layers(model):
    """{name: layer} of the blocks."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and ".layers." in name}


def _replace(model, name, layer):
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def quantize(model: nn.Module) -> nn.Module:
    """Hold the matrices of the blocks in NF4 (QLoRA) -> the model. After `apply`, before it is
    sharded."""
    for part in _parts(model):
        for name, layer in linear_layers(part).items():
            if not isinstance(layer, LoRALinear):
                layer = nf4.FrozenLinear(layer)
                _replace(part, name, layer)
            nf4.pack(layer, name, part.config.dtype)
    return model


def is_quantized(model) -> bool:
    """Whether a model, or the one that a Reference is of, holds weights in NF4."""
    if isinstance(model, Reference):
        model = model.model
    return any(map(nf4.is_packed, model.modules()))


def meaning(model) -> dict:
    """The flags that give numbers in a model's adapters their meaning; {} without adapters."""
    adapted = layers(model)
    if not adapted:
        return {}
    layer = next(iter(adapted.values()))
    return {
        "lora": layer.rank,
        "lora_alpha": layer.alpha,
        "rslora": layer.rslora,
        "lora_targets": sorted({name.rpartition(".")[2] for name in adapted}),
        "quantize": "nf4" if is_quantized(model) else "none",
    }


def hold_in_stored_dtype(model: nn.Module):
    """Hold what is frozen in the dtype of the folder it comes from: it needs no fp32 master
    weights."""
    for part in _parts(model):
        for name, p in part.named_parameters():
            if not is_trained(name) and not is_exact(name) and p.is_floating_point():
                p.data = p.data.to(part.config.dtype)


def _parts(model):
    """The CausalLM and ScalarModels in a model: what is loaded from a folder."""
    return [module for module in model.modules() if hasattr(module, "folder")]


def is_exact(name: str) -> bool:
    """Of a parameter: Qwen3.5's folders have it in fp32 among bf16."""
    return name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))


def is_adapter(name: str) -> bool:
    """Of a parameter."""
    return name.endswith((".lora_A", ".lora_B"))


def is_trained(name: str) -> bool:
    """Of a parameter of a model with adapters: one of these or of a scalar head."""
    return is_adapter(name) or name in HEADS


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """{name of the layer: layer}; {} for a model without adapters."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def summary(model: nn.Module) -> str:
    """What trains, for a person; "" for a model without adapters."""
    adapted = layers(model)
    if not adapted:
        return ""
    trained = [p for name, p in model.named_parameters() if is_trained(name)]
    frozen = [p for name, p in model.named_parameters() if not is_trained(name)]
    packed = ""
    if is_quantized(model):
        packed = ", of which the blocks' matrices in NF4"
    (rank,) = {layer.rank for layer in adapted.values()}
    return (
        f"LoRA of rank {rank} on {len(adapted)} layers: {sum(p.numel() for p in trained):,} "
        f"parameters train beside {sum(p.nbytes for p in frozen) / 2**20:,.1f} MiB of frozen "
        f"weights{packed}"
    )


# ---------------------------------------------------------------------------------------- reference
@contextmanager
def off(model: nn.Module):
    """Inside, the model is its base: adapters are left out, and it chooses its own experts. A
    scalar head is not left out."""
    adapted = layers(model).values()
    replaying = [module for module in model.modules() if getattr(module, "replays", False)]
    for layer in adapted:
        layer.active = False
    for decoder in replaying:
        decoder.replays = False
    try:
        yield
    finally:
        for layer in adapted:
            layer.active = True
        for decoder in replaying:
            decoder.replays = True


class Reference:
    """A model with its adapters off, called as the model is, without gradients: it holds nothing of
    its own."""

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        with off(self.model):
            return self.model(*args, **kwargs)


# ------------------------------------------------------------------------------------ peft's format
def peft_name(name: str, inside: bool = False) -> str:
    """A parameter's name -> its name in adapter_model.safetensors. inside: of a model with more
    than text (Config.is_inside), whose modules transformers names otherwise than the hub."""
    if inside:
        name = Form(INSIDE).there(name)
    return PREFIX + (f"{name}.weight" if is_adapter(name) else name)


def peft_config(model: nn.Module) -> dict:
    """adapter_config.json of a CausalLM or a ScalarModel."""
    adapted = layers(model)
    layer = next(iter(adapted.values()))
    scalar = model.config.scalar
    alpha = layer.alpha
    targets = sorted({name.rpartition(".")[2] for name in adapted})
    if model.config.is_inside:  # a vision tower has a q_proj too
        targets = rf".*\.language_model\..*\.({'|'.join(targets)})"
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": str(Path(model.folder).resolve()),
        "r": layer.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": layer.rslora,
        "target_modules": targets,
        "modules_to_save": ["score"] if scalar else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


@dataclass(frozen=True)
class Adapter:
    """What a folder in peft's format holds."""

    base: Path  # folder of the base model
    scalar: bool  # a reward model's
    factors: dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # name of a weight -> A, B, scale
    heads: dict[str, torch.Tensor]  # score.weight
    base_hash: str = ""  # hf.content_hash of the base that it was trained beside, if a run says so
    nf4: bool = False  # that base was in NF4


def is_adapter_folder(folder) -> bool:
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_folder(folder) -> Path:
    """The folder of a model's config.json and weights: that of its base, for an adapter's folder;
    else the folder itself."""
    folder = Path(folder)
    if not is_adapter_folder(folder):
        return folder
    named = _config(folder).get("base_model_name_or_path")
    if not named or not Path(named, "config.json").is_file():
        raise InputError(
            f"{folder / CONFIG}: its base model, {named}, is no model folder here: download it, "
            "and write its path to base_model_name_or_path."
        )
    return Path(named)


# Fields that change what an adapter computes, and the values with which this code computes it.
# rank_pattern is not among them: the rank of each layer is that of its tensors.
COMPUTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
    # Others change the base's weights too.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def read(folder) -> Adapter:
    """An adapter in peft's format. InputError for what is not computed here."""
    folder = Path(folder)
    config = _config(folder)
    for field, values in COMPUTED.items():
        found = config.get(field, values[0])
        if found not in values:
            raise InputError(
                f"{folder / CONFIG}: {field} {json.dumps(found)} is not supported: merge the "
                "adapter into its base with peft (merge_and_unload), and give the merged model."
            )
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{folder} has no {WEIGHTS}: save the adapter with peft as safetensors.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise InputError(f"{path}: damaged or incomplete ({error}); copy it again.") from error
    a_of, b_of, heads, foreign = {}, {}, {}, []
    for full, tensor in tensors.items():
        name = full.removeprefix(PREFIX)
        if name.endswith(".lora_A.weight"):
            a_of[name.removesuffix(".lora_A.weight")] = tensor
        elif name.endswith(".lora_B.weight"):
            b_of[name.removesuffix(".lora_B.weight")] = tensor
        elif name == "score.weight":
            heads[name] = tensor
        else:
            foreign.append(full)
    if foreign or a_of.keys() != b_of.keys():
        odd = foreign or sorted(a_of.keys() ^ b_of.keys())
        raise InputError(
            f"{path}: {odd[0]} ({len(odd)} such tensors) is not of a plain LoRA adapter: merge it "
            "into its base with peft (merge_and_unload), and give the merged model."
        )
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise InputError(f"{folder / CONFIG}: lora_alpha is missing; copy the folder again.")
    alpha, rslora = config["lora_alpha"], config.get("use_rslora", False)
    odd = [name for name, a in a_of.items() if len(a) != config.get("r")]
    if odd and not config.get("rank_pattern"):
        raise InputError(
            f"{folder}: {CONFIG} says rank {config.get('r')}, but {odd[0]} has "
            f"{len(a_of[odd[0]])}: copy the folder again."
        )
    factors = {
        f"{name}.weight": (a, b_of[name], scale(alpha, len(a), rslora)) for name, a in a_of.items()
    }
    about = {}
    if (folder / ABOUT).is_file():
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    scalar, nf4_base = config.get("task_type") == "SEQ_CLS", about.get("base_nf4", False)
    return Adapter(base_folder(folder), scalar, factors, heads, about.get("base", ""), nf4_base)


def file_hash(folder) -> str:
    """SHA-256 of an adapter's two files."""
    folder = Path(folder)
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    digest.update((folder / WEIGHTS).read_bytes())
    return digest.hexdigest()


def _config(folder):
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / CONFIG}: not valid JSON ({error}); copy it again.") from error
