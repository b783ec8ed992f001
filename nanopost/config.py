"""What the decoder needs to know of a config.json, and which families of models it computes.

A family is a `model_type`: how it differs from Llama stands in FAMILIES, what a folder says in its
Config. A folder with images or speech beside the text (Gemma 3, Qwen3.5) has the decoder's
description under "text_config", and its weights under another prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from nanopost import InputError
from nanopost.names import DECODER, Carried, Form
from nanopost.rope import read_ropes

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
)
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Family:
    """How the models of one model_type differ from Llama's. defaults: of a config.json, which may
    leave out what its family has by default."""

    causal: str  # the architecture of a language model
    scalar: str = ""  # and of a classifier, if transformers has one
    qk_norm: bool = False
    qkv_bias: bool = False
    norm_offset: float = 0.0  # a norm multiplies by this + its weight
    post_norms: bool = False  # norms after attention and MLP too, before they are added
    scaled_embedding: bool = False  # by sqrt(width)
    gated_attention: bool = False  # its output is multiplied by a sigmoid of the input
    experts: bool = False
    around: tuple[str, str] = ()  # model_type and architecture of a folder with more than text
    inside: tuple[str, ...] = ()  # prefixes of the decoder's names in it, the first for a new one
    carried: tuple[str, ...] = ()  # of the tensors that the decoder does not use
    split: bool = False  # each expert's matrices are tensors of their own (names.py)
    defaults: dict = field(default_factory=dict)


def _llama(name: str, **more) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}ForSequenceClassification", **more)


GEMMA3 = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
QWEN3_5 = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
}
QWEN3_5_TRAITS = {
    "qk_norm": True,
    "norm_offset": 1.0,
    "gated_attention": True,
    "inside": ("model.language_model.",),
    "carried": ("model.visual.", "mtp."),  # images; heads that guess several tokens ahead
}
FAMILIES = {
    "llama": _llama("Llama"),
    "mistral": _llama("Mistral", defaults={"sliding_window": 4096}),
    "qwen2": _llama("Qwen2", qkv_bias=True, defaults={"sliding_window": 4096}),
    "qwen3": _llama("Qwen3", qk_norm=True, defaults={"head_dim": 128, "sliding_window": 4096}),
    "smollm3": _llama(
        "SmolLM3",
        defaults={"no_rope_layer_interval": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        qk_norm=True,
        norm_offset=1.0,
        post_norms=True,
        scaled_embedding=True,
        around=("gemma3", "Gemma3ForConditionalGeneration"),
        inside=("language_model.model.", "model.language_model."),
        carried=(
            "vision_tower.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        ),
        defaults=GEMMA3,
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextForSequenceClassification",
        around=("qwen3_5", "Qwen3_5ForConditionalGeneration"),
        defaults=QWEN3_5,
        **QWEN3_5_TRAITS,
    ),
    "qwen3_moe": _llama(
        "Qwen3Moe",
        qk_norm=True,
        experts=True,
        split=True,
        defaults={
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        experts=True,
        around=("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
        defaults=QWEN3_5
        | {
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": True,
        },
        **QWEN3_5_TRAITS,
    ),
}
AROUND = {family.around[0]: name for name, family in FAMILIES.items() if family.around}


class Layer(NamedTuple):
    """What differs from layer to layer."""

    kind: str  # FULL, SLIDING or LINEAR
    window: int | None  # how many keys a query sees, its own included; None: all
    rope: str | None  # which of Config.ropes; None: no positions (2305.19466)
    experts: bool  # a mixture of experts in place of the MLP


class DeltaSizes(NamedTuple):
    """Of a gated DeltaNet layer (deltanet.py)."""

    key_heads: int
    value_heads: int
    key_dim: int  # of a head
    value_dim: int
    kernel: int  # tokens that the convolution sees, its own included


class ExpertSizes(NamedTuple):
    """Of a mixture of experts (moe.py)."""

    count: int
    active: int  # experts of a token
    width: int  # of an expert's MLP
    normalized: bool  # the weights of a token's experts are made to add up to 1
    shared: int  # width of the expert that every token has; 0: none


@dataclass(frozen=True)
class Config:
    """What the decoder needs from a config.json; `hf` is that file, kept for writing."""

    hf: dict
    family: str  # a key of FAMILIES
    vocab_size: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    blocks: tuple[Layer, ...]
    ropes: dict[str, dict]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    activation: str  # one of ACTIVATIONS
    query_scale: float  # queries are multiplied by it, before the usual 1 / sqrt(head_dim)
    scalar: bool
    delta: DeltaSizes | None
    experts: ExpertSizes | None
    form: Form  # of the names in the folder that it is read from, or is to be saved as
    carried: Carried | None = None  # what else is saved with it

    @classmethod
    def of(cls, hf: dict, source: str = "config.json") -> "Config":
        """Read the content of a config.json. InputError for what this decoder does not support."""
        hf = dict(hf)
        if hf.get("text_config", 0) is None:
            hf.pop("text_config")
        family = _check(hf, source)
        hf.pop("quantization_config", None)
        text = text_of(hf, family)
        heads, bias = text["num_attention_heads"], bool(text.get("attention_bias", False))
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
        blocks, ropes = _blocks(text, family, source), read_ropes(text, source)
        _check_ropes(ropes, family, source)
        prefix = FAMILIES[family].inside[0] if "text_config" in hf else DECODER
        query_scale = 1.0
        if family == "gemma3_text":
            query_scale = (head_dim / text["query_pre_attn_scalar"]) ** 0.5
        return cls(
            hf=hf,
            family=family,
            vocab_size=text["vocab_size"],
            width=text["hidden_size"],
            mlp_width=text.get("intermediate_size") or 0,
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            norm_eps=text.get("rms_norm_eps", 1e-6),
            tied=_tied(hf, family),
            blocks=blocks,
            ropes=ropes,
            qkv_bias=FAMILIES[family].qkv_bias or bias,
            out_bias=bias and family not in ("mistral", "qwen2"),
            mlp_bias=bool(text.get("mlp_bias", False)) and family in ("llama", "smollm3"),
            activation=_activation(text),
            query_scale=query_scale,
            scalar=_architecture(hf) == (FAMILIES[family].scalar or None),
            delta=_delta(text, source) if any(b.kind == LINEAR for b in blocks) else None,
            experts=_experts(text, source) if any(b.experts for b in blocks) else None,
            form=Form(prefix, FAMILIES[family].split),
        )

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def mixtures(self) -> int:
        """Layers with experts."""
        return sum(block.experts for block in self.blocks)

    @property
    def text(self) -> dict:
        """What config.json says of the decoder."""
        return text_of(self.hf, self.family)

    @property
    def architecture(self) -> str:
        """What transformers and vLLM call the model."""
        return _architecture(self.hf)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """That the decoder's names may have in a folder."""
        return (DECODER, *self.traits.inside)

    @property
    def is_inside(self) -> bool:
        """Whether the folder has more than text (images, say), of which this is the decoder."""
        return "text_config" in self.hf

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in the folder that the model was loaded from; fp32 if it names none."""
        said = [part.get(key) for part in (self.hf, self.text) for key in ("dtype", "torch_dtype")]
        kind = next(filter(None, said), None)
        return getattr(torch, kind) if kind in ("bfloat16", "float16") else torch.float32

    @property
    def max_positions(self) -> int:
        return self.text.get("max_position_embeddings") or 2**31

    def with_scalar_head(self, pad_id: int | None) -> "Config":
        """The same decoder as a text-only reward model.

        pad_id: transformers scores the last token that is not this one.
        """
        if not self.traits.scalar:
            raise InputError(
                f"{self.traits.causal} has no ...ForSequenceClassification in transformers, so no "
                "reward or value model: take one of another family (train_ppo.py: --value_model "
                "head)."
            )
        kept = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id")
        around = {key: self.hf[key] for key in kept if key in self.hf}
        text = self.hf if "text_config" not in self.hf else {**self.hf["text_config"], **around}
        names = {
            "model_type": self.family,
            "architectures": [self.traits.scalar],
            "tie_word_embeddings": self.tied,
            "pad_token_id": pad_id,
            "num_labels": 1,
            "id2label": {"0": "reward"},
            "label2id": {"reward": 0},
        }
        form = replace(self.form, prefix=DECODER)
        return replace(self, hf={**text, **names}, scalar=True, form=form, carried=None)


def text_of(hf: dict, family: str) -> dict:
    """The part of a config.json that describes the decoder, with the family's defaults."""
    given = hf.get("text_config", hf)
    renamed = {}
    if "num_local_experts" in given:  # as transformers 5 writes it
        renamed = {"num_experts": given["num_local_experts"]}
    defaults = FAMILIES[family].defaults
    said = {key: value for key, value in given.items() if value is not None or key not in defaults}
    return defaults | renamed | said


def _tied(hf, family) -> bool:
    """As in transformers: of a folder with more than text, what its text_config says of it does not
    count."""
    usual = FAMILIES[family].defaults.get("tie_word_embeddings", False)
    return bool(hf.get("tie_word_embeddings", usual))


def _architecture(hf):
    if hf.get("architectures"):
        return hf["architectures"][0]
    family = AROUND.get(hf.get("model_type"), hf.get("model_type"))
    if family not in FAMILIES:
        return None
    return FAMILIES[family].around[1] if hf.get("text_config") else FAMILIES[family].causal


def _check(hf, source) -> str:
    """The family of a config.json; InputError for another model, or one that is incomplete or
    quantised."""
    model_type, architecture = hf.get("model_type"), _architecture(hf)
    family = AROUND.get(model_type, model_type)
    computed = ()
    if family in FAMILIES:
        traits = FAMILIES[family]
        computed = (traits.causal, traits.scalar or traits.causal, *traits.around[1:])
    if architecture not in computed:
        causal = ", ".join(family.causal for family in FAMILIES.values())
        larger = " and ".join(f.around[1] for f in FAMILIES.values() if f.around)
        raise InputError(
            f"{source}: architecture {architecture} (model_type {model_type}) is not supported, "
            f"only {causal}, ...ForSequenceClassification of the same families, and the text of "
            f"{larger}: take one of these, or add it as forks/olmo2.diff does."
        )
    if (family == model_type) == ("text_config" in hf):
        there = "has no" if family != model_type else "has a"
        raise InputError(
            f"{source}: model_type {model_type} {there} text_config; copy the model's own "
            "config.json."
        )
    labels = hf.get("num_labels") or len(hf.get("id2label") or "01")
    if architecture == traits.scalar and labels != 1:
        raise InputError(
            f"{source}: a classifier with {labels} labels; a reward model has one (num_labels 1)."
        )
    if not _is_nf4(hf.get("quantization_config")):
        method = hf["quantization_config"].get("quant_method")
        raise InputError(
            f"{source}: the weights are quantised ({method}), and not by bitsandbytes to NF4 with "
            "double quantisation; take the unquantised checkpoint of this model."
        )
    text = text_of(hf, family)
    if _activation(text) not in ACTIVATIONS:
        raise InputError(
            f"{source}: activation {_activation(text)!r} is not supported, only "
            f"{' and '.join(map(repr, ACTIVATIONS))}."
        )
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if text.get(key):
            raise InputError(
                f"{source}: {key} {text[key]:g}, as Gemma 2 has, is not supported; Gemma 3 has "
                "none."
            )
    if traits.gated_attention and not text.get("attn_output_gate", True):
        raise InputError(
            f"{source}: attn_output_gate false is not supported: in Qwen3.5 attention has a gate."
        )
    if text.get("use_bidirectional_attention"):
        raise InputError(
            f"{source}: use_bidirectional_attention, as of an embedding model, is not supported: "
            "a language model sees what came before alone."
        )
    missing = [key for key in REQUIRED if text.get(key) is None]
    if not text.get("intermediate_size") and not traits.experts:
        missing.append("intermediate_size")
    if missing:
        raise InputError(
            f"{source}: {', '.join(missing)} missing; this is not a complete config.json."
        )
    return family


def _check_ropes(ropes, family, source):
    """InputError if a part of each head turns in a family where transformers turns all of it."""
    partial = min(rope["partial_rotary_factor"] for rope in ropes.values())
    if partial != 1.0 and "partial_rotary_factor" not in FAMILIES[family].defaults:
        raise InputError(
            f"{source}: a partial_rotary_factor of {partial:g} is not supported in this family, "
            "only in Qwen3.5."
        )


def _activation(text):
    return text.get("hidden_activation") or text.get("hidden_act", "silu")


def _is_nf4(quantised: dict | None) -> bool:
    """Whether weights are not quantised, or as storage.py reads them: by bitsandbytes to NF4."""
    if not quantised:
        return True
    by = quantised.get("quant_method"), quantised.get("bnb_4bit_quant_type")
    twice = quantised.get("bnb_4bit_use_double_quant")
    return by == ("bitsandbytes", "nf4") and bool(quantised.get("load_in_4bit") and twice)


def _blocks(text, family, source) -> tuple[Layer, ...]:
    layers, window = text["num_hidden_layers"], text.get("sliding_window")
    for name in ("layer_types", "no_rope_layers"):
        if text.get(name) and len(text[name]) < layers:
            raise InputError(
                f"{source}: {name} has {len(text[name])} entries for {layers} layers "
                "(num_hidden_layers); copy the model's own config.json."
            )
    kinds = text.get("layer_types") or _kinds(text, family)
    known = (FULL, LINEAR) if "full_attention_interval" in text else (FULL, SLIDING)
    if other := [kind for kind in kinds if kind not in known]:
        raise InputError(
            f"{source}: layer_types has {other[0]!r}; of this family only {' and '.join(known)} "
            "are supported."
        )
    slides = window is not None and (
        family in ("mistral", "gemma3_text") or text.get("use_sliding_window", False)
    )
    blocks = []
    for i, kind in enumerate(kinds[:layers]):
        if kind == SLIDING and not slides:
            kind = FULL
        rope = kind if family == "gemma3_text" else FULL
        if kind == LINEAR or (family == "smollm3" and not _has_rope(text, i)):
            rope = None
        blocks.append(
            Layer(kind, window if kind == SLIDING else None, rope, _sparse(text, family, i))
        )
    return tuple(blocks)


def _kinds(text, family) -> Sequence[str]:
    """The layers' kinds where config.json has no layer_types."""
    layers = text["num_hidden_layers"]
    if family == "mistral":
        return [SLIDING] * layers
    if family == "gemma3_text":
        pattern = text.get("sliding_window_pattern") or 6
        return [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(layers)]
    if "full_attention_interval" in text:
        every = text["full_attention_interval"]
        return [FULL if (i + 1) % every == 0 else LINEAR for i in range(layers)]
    if family == "smollm3":
        return [FULL if _has_rope(text, i) else SLIDING for i in range(layers)]
    if family in ("qwen2", "qwen3"):
        first = text.get("max_window_layers", 28)
        return [SLIDING if i >= first else FULL for i in range(layers)]
    return [SLIDING if family == "qwen3_moe" else FULL] * layers


def _has_rope(text, layer) -> bool:
    if text.get("no_rope_layers"):
        return bool(text["no_rope_layers"][layer])
    return (layer + 1) % text["no_rope_layer_interval"] != 0


def _sparse(text, family, layer) -> bool:
    """Whether a layer has experts."""
    if not FAMILIES[family].experts or not text["num_experts"]:
        return False
    if layer in (text.get("mlp_only_layers") or ()):
        return False
    return (layer + 1) % text.get("decoder_sparse_step", 1) == 0


def _delta(text, source) -> DeltaSizes:
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    kernel = text["linear_conv_kernel_dim"]
    if values % keys or kernel < 2:
        raise InputError(
            f"{source}: linear attention with {values} value heads for {keys} key heads, and a "
            f"convolution over {kernel} tokens, is not supported: the first must be a multiple of "
            "the second, and the last at least 2."
        )
    return DeltaSizes(
        keys, values, text["linear_key_head_dim"], text["linear_value_head_dim"], kernel
    )


def _experts(text, source) -> ExpertSizes:
    count, active = text["num_experts"], text["num_experts_per_tok"]
    if not 0 < active <= count:
        raise InputError(
            f"{source}: num_experts_per_tok {active} of num_experts {count}: copy the model's own "
            "config.json."
        )
    return ExpertSizes(
        count,
        active,
        text["moe_intermediate_size"],
        bool(text.get("norm_topk_prob", False)),
        text.get("shared_expert_intermediate_size") or 0,
    )
