"""One decoder for Llama (2, 3, 3.1, 3.2), Mistral, Qwen2, Qwen2.5 and Qwen3, on packed tokens.

Shapes: N packed tokens, S documents, B rows of a cache, P prompts, D model width, H query heads, G key/value heads,
K width of a head, V vocabulary.

Parameter names are the checkpoint's. The head and the log-probability lie inside the root module's forward,
`model(batch) -> logp_N, entropy_N`: outside it, under FSDP2, the head's weight is a shard before the first forward
and stale after a backward. Sharding, compilation and checkpointing are applied from outside (dist.py).
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanopost import InputError
from nanopost.attention import Cache, Packing, cached_attention, packed_attention
from nanopost.logprob import logprob, matmul_fp32

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True)
class Config:
    """What the decoder needs to know, read from a checkpoint's config.json; `hf` is that file, kept for writing."""

    hf: dict
    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    rope: dict
    windows: tuple
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    scalar: bool

    @classmethod
    def of(cls, hf: dict, source: str = "config.json") -> "Config":
        """Read the dictionary of a config.json. InputError for whatever this decoder does not compute."""
        family = hf.get("model_type")
        architecture = (hf.get("architectures") or [FAMILIES.get(family)])[0]
        if family not in FAMILIES or architecture not in (
            FAMILIES[family],
            scalar_architecture(family),
        ):
            raise InputError(
                f"{source}: architecture {architecture} (model_type {family}) is not one of those that "
                f"nanopost computes: {', '.join(FAMILIES.values())}, and ...ForSequenceClassification of "
                "the same families."
            )
        scalar = architecture == scalar_architecture(family)
        labels = hf.get("num_labels") or len(hf.get("id2label") or "01")
        if scalar and labels != 1:
            raise InputError(
                f"{source}: a classifier of {labels} labels; a reward model has one (num_labels 1)."
            )
        if hf.get("quantization_config"):
            raise InputError(
                f"{source}: the weights are quantised ({hf['quantization_config'].get('quant_method')}); "
                "take the unquantised checkpoint of this model."
            )
        if hf.get("hidden_act", "silu") != "silu":
            raise InputError(
                f"{source}: activation {hf['hidden_act']!r} is not computed here, only 'silu'."
            )
        missing = [
            k
            for k in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
            if hf.get(k) is None
        ]
        if missing:
            raise InputError(
                f"{source}: {', '.join(missing)} missing; this is not a complete config.json."
            )
        heads = hf["num_attention_heads"]
        bias = bool(hf.get("attention_bias", False))
        return cls(
            hf=hf,
            vocab_size=hf["vocab_size"],
            width=hf["hidden_size"],
            mlp_width=hf["intermediate_size"],
            layers=hf["num_hidden_layers"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim")
            or (128 if family == "qwen3" else hf["hidden_size"] // heads),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tied=bool(hf.get("tie_word_embeddings", False)),
            rope=_rope(hf, source),
            windows=_windows(hf, family),
            qkv_bias=family == "qwen2" or bias,
            out_bias=bias and family in ("llama", "qwen3"),
            mlp_bias=bool(hf.get("mlp_bias", False)) and family == "llama",
            qk_norm=family == "qwen3",
            scalar=scalar,
        )

    @property
    def max_positions(self) -> int:
        return self.hf.get("max_position_embeddings") or 2**31

    def with_scalar_head(self, pad_id: int | None) -> "Config":
        """The same decoder as a reward model. pad_id: transformers scores the last token that is not this one."""
        names = {
            "architectures": [scalar_architecture(self.hf["model_type"])],
            "pad_token_id": pad_id,
            "num_labels": 1,
            "id2label": {"0": "reward"},
            "label2id": {"reward": 0},
        }
        return replace(self, hf={**self.hf, **names}, scalar=True)


def scalar_architecture(family: str) -> str:
    return FAMILIES[family].replace("CausalLM", "SequenceClassification")


def _rope(hf, source):
    """rope_theta and rope_scaling (or transformers 5's rope_parameters) as one dictionary with a `rope_type`."""
    given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope = {
        "rope_theta": hf.get("rope_theta", 10000.0),
        "max": hf.get("max_position_embeddings", 2048),
        **given,
    }
    kind = rope["rope_type"] = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_NEEDS or any(isinstance(v, dict) for v in given.values()):
        kind = "one for each kind of layer" if kind in ROPE_NEEDS else repr(kind)
        raise InputError(f"{source}: rope type {kind} is not one of {', '.join(ROPE_NEEDS)}.")
    missing = [k for k in ROPE_NEEDS[kind] if rope.get(k) is None]
    if missing:
        raise InputError(
            f"{source}: rope type {kind!r} needs {', '.join(missing)} too, and config.json has none."
        )
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"{source}: a partial_rotary_factor other than 1 is not computed here.")
    return rope


def _windows(hf, family):
    """The sliding window of each layer, or None."""
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window", 4096)
    if (
        family == "llama"
        or window is None
        or (family != "mistral" and not hf.get("use_sliding_window", False))
    ):
        return (None,) * layers
    kinds = hf.get("layer_types")
    first = 0 if family == "mistral" else hf.get("max_window_layers", 28)
    sliding = (
        [k == "sliding_attention" for k in kinds] if kinds else [i >= first for i in range(layers)]
    )
    return tuple(window if s else None for s in sliding)


def rope_frequencies(rope: dict, head_dim: int, device=None):
    """Rotary frequencies -> (inv_freq fp32 [K/2], factor of cos and sin). RoFormer 2104.09864, YaRN 2309.00071."""
    base, kind = rope["rope_theta"], rope["rope_type"]
    freq = 1.0 / base ** (
        torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    )
    if kind == "default":
        return freq, 1.0
    factor = rope["factor"]
    original = rope.get("original_max_position_embeddings") or rope["max"]
    if kind == "linear":
        return freq / factor, 1.0
    if kind == "llama3":
        turns = original * freq / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return smooth * freq + (1 - smooth) * freq / factor, 1.0
    magnitude = rope.get("attention_factor")
    if magnitude is None:

        def scale(m):
            return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        magnitude = scale(m) / scale(m_all) if m and m_all else scale(1)

    def dimension(rotations):
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / max(
        high - low, 0.001
    )
    ramp = ramp.clamp(0, 1)
    return freq / factor * ramp + freq * (1 - ramp), magnitude


def rotate(x_NHK, cos_NK, sin_NK):
    """Rotary embedding in the two-halves layout of Hugging Face checkpoints, computed in fp32."""
    a, b = x_NHK.float().chunk(2, -1) if x_NHK.dtype != torch.float64 else x_NHK.chunk(2, -1)
    cos, sin = cos_NK[:, None], sin_NK[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_NHK.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the quotient in fp32 (1910.07467)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.head_dim, self.window = c.head_dim, c.windows[layer]
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x_ND, cos_NK, sin_NK, attend):
        q, k, v = (
            rearrange(project(x_ND), "n (h k) -> n h k", k=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), cos_NK, sin_NK), rotate(self.k_norm(k), cos_NK, sin_NK)
        return self.o_proj(attend(q, k, v, self.window).flatten(1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.mlp_width, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.width, c.mlp_width, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.mlp_width, c.width, bias=c.mlp_bias)

    def forward(self, x_ND):
        return self.down_proj(F.silu(self.gate_proj(x_ND)) * self.up_proj(x_ND))


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.width, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps)

    def forward(self, x_ND, cos_NK, sin_NK, attend):
        x_ND = x_ND + self.self_attn(self.input_layernorm(x_ND), cos_NK, sin_NK, attend)
        return x_ND + self.mlp(self.post_attention_layernorm(x_ND))


class Decoder(nn.Module):
    """Embedding, blocks, final norm: everything under `model.` in a checkpoint."""

    def __init__(self, c: Config):
        super().__init__()
        self.config, self.checkpointing = c, False
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps)

    def forward(self, token_N, position_N, attend):
        """-> hidden_ND. attend(layer, q_NHK, k_NGK, v_NGK, window) -> out_NHK is who sees whom."""
        x_ND = self.embed_tokens(token_N)
        freq, magnitude = rope_frequencies(self.config.rope, self.config.head_dim, token_N.device)
        angle_NK = position_N[:, None].float() * freq
        cos_NK, sin_NK = angle_NK.cos() * magnitude, angle_NK.sin() * magnitude
        for layer, block in enumerate(self.layers):
            inputs = (x_ND, cos_NK, sin_NK, partial(attend, layer))
            if self.checkpointing and torch.is_grad_enabled():
                x_ND = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_ND = block(*inputs)
        return self.norm(x_ND)

    def packed(self, token_N, position_N, cu_seqlens, max_seqlen):
        """Packed documents -> hidden_ND after the final norm."""
        packing = Packing(cu_seqlens, max_seqlen)

        def attend(layer, q, k, v, window):
            return packed_attention(q, k, v, packing, window)

        return self(token_N, position_N, attend)


class CausalLM(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, self.model, self.kernels = config, Decoder(config), "auto"
        self.lm_head = (
            None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        )

    @property
    def head_weight(self):
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, batch, temperature: float = 1.0):
        """A Batch (data.py) -> fp32 log-prob of each target and entropy of its distribution, 0 where no target is."""
        hidden_ND = self.model.packed(
            batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen
        )
        return logprob(
            hidden_ND, self.head_weight, batch.target_N, temperature, kernels=self.kernels
        )

    def logits(self, hidden_ND):
        """-> fp32 [N, V], whole: for a few rows."""
        return matmul_fp32(hidden_ND, self.head_weight.T)

    def prefill(self, token_N, position_N, cu_seqlens, max_seqlen, cache: Cache):
        """Packed prompts [P], each written to the rows of `cache` that it has -> hidden_PD of their last tokens."""
        packing = Packing(cu_seqlens, max_seqlen)

        def attend(layer, q, k, v, window):
            cache.write_prompts(layer, k, v, cu_seqlens, max_seqlen)
            return packed_attention(q, k, v, packing, window)

        return self.model(token_N, position_N, attend)[cu_seqlens[1:].long() - 1]

    def decode(self, token_B, cache: Cache):
        """One further token a row -> hidden_BD; its keys and values join the cache."""

        def attend(layer, q, k, v, window):
            return cached_attention(q, *cache.append(layer, k, v), cache.length_B + 1, window)

        cache.longest += 1
        hidden_BD = self.model(token_B, cache.length_B, attend)
        cache.length_B = cache.length_B + 1
        return hidden_BD

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Fill every parameter afresh: normal with the config's initializer_range, norms 1, biases 0."""
        generator = torch.Generator(device=self.head_weight.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                p.normal_(0.0, self.config.hf.get("initializer_range", 0.02), generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self


def scalar_head(hidden_ND, weight_1D):
    """hidden weight^T, one fp32 (or fp64) number for each token, differentiable: matmul_fp32's product has no
    derivative on CUDA in bf16."""
    precision = torch.promote_types(hidden_ND.dtype, torch.float32)
    return (hidden_ND.to(precision) @ weight_1D.to(precision).T)[:, 0]


class ScalarModel(nn.Module):
    """A decoder with one number for each token: a reward model reads it at the last token of a sequence."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.model = config, Decoder(config)
        self.score = nn.Linear(config.width, 1, bias=False)

    def forward(self, batch):
        """A Batch (data.py) -> fp32 value_N."""
        hidden_ND = self.model.packed(
            batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen
        )
        return scalar_head(hidden_ND, self.score.weight)


class ActorCritic(nn.Module):
    """A policy and its value function under one root, so that under FSDP2, too, one forward gives both.

    value_config: that of a value model with a backbone of its own; None: a linear head on the policy's hidden states.
    """

    def __init__(self, config: Config, value_config: Config | None):
        super().__init__()
        self.config, self.policy = config, CausalLM(config)
        self.value = (
            ScalarModel(value_config) if value_config else nn.Linear(config.width, 1, bias=False)
        )

    def forward(self, batch, temperature: float = 1.0, value_alone: bool = False):
        """A Batch -> logp_N and entropy_N of the policy, and fp32 value_N: of the state in which each target was
        chosen, 0 where there is none. value_alone: None for the first two, and no gradient for the policy."""
        head, logp_N, entropy_N = isinstance(self.value, nn.Linear), None, None
        if head or not value_alone:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not value_alone):
                hidden_ND = self.policy.model.packed(
                    batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen
                )
        if not value_alone:
            logp_N, entropy_N = logprob(
                hidden_ND,
                self.policy.head_weight,
                batch.target_N,
                temperature,
                kernels=self.policy.kernels,
            )
        value_N = scalar_head(hidden_ND, self.value.weight) if head else self.value(batch)
        return logp_N, entropy_N, value_N.where(batch.mask_N, 0.0)
