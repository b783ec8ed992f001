"""One decoder for Llama (2, 3, 3.1, 3.2), Mistral, Qwen2, Qwen2.5 and Qwen3, on packed tokens.

Shapes: N packed tokens, U those that are computed (N, a shared prefix once), M those with a target,
S documents, B rows of a cache, P prompts, D model width, H query heads, G key/value heads, K width
of a head, V vocabulary.

Parameter names are the checkpoint's. The head and the log-probability lie inside the root module's
forward, `model(batch) -> logp_N, entropy_N`: outside it, under FSDP2, the head's weight is a shard
before the first forward and stale after a backward. Sharding, compilation and checkpointing are
applied from outside (dist.py).
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from nanopost import InputError
from nanopost.attention import (
    Cache,
    Packing,
    cached_attention,
    packed_attention,
    repeat,
    seen,
)
from nanopost.logprob import logprob, matmul_fp32
from nanopost.rope import read_rope, rope_frequencies, rotate

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


# ------------------------------------------------------------------------------------------- config
@dataclass(frozen=True)
class Config:
    """What the decoder needs from a config.json; `hf` is that file, kept for writing."""

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
        """Read the content of a config.json. InputError for what this decoder does not support."""
        _check(hf, source)
        hf = {key: value for key, value in hf.items() if key != "quantization_config"}
        family = hf["model_type"]
        heads = hf["num_attention_heads"]
        head_dim = hf.get("head_dim")
        if not head_dim:
            head_dim = 128 if family == "qwen3" else hf["hidden_size"] // heads
        bias = bool(hf.get("attention_bias", False))
        return cls(
            hf=hf,
            vocab_size=hf["vocab_size"],
            width=hf["hidden_size"],
            mlp_width=hf["intermediate_size"],
            layers=hf["num_hidden_layers"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tied=bool(hf.get("tie_word_embeddings", False)),
            rope=read_rope(hf, source),
            windows=_windows(hf, family),
            qkv_bias=family == "qwen2" or bias,
            out_bias=bias and family in ("llama", "qwen3"),
            mlp_bias=bool(hf.get("mlp_bias", False)) and family == "llama",
            qk_norm=family == "qwen3",
            scalar=_architecture(hf) == scalar_architecture(family),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in the folder that the model was loaded from; fp32 if it names none."""
        kind = self.hf.get("dtype") or self.hf.get("torch_dtype")
        return getattr(torch, kind) if kind in ("bfloat16", "float16") else torch.float32

    @property
    def max_positions(self) -> int:
        return self.hf.get("max_position_embeddings") or 2**31

    def with_scalar_head(self, pad_id: int | None) -> "Config":
        """The same decoder as a reward model.

        pad_id: transformers scores the last token that is not this one.
        """
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


def _architecture(hf):
    if hf.get("architectures"):
        return hf["architectures"][0]
    return FAMILIES.get(hf.get("model_type"))


def _check(hf, source):
    """InputError for a config.json of another model, or of one that is incomplete or quantized."""
    family, architecture = hf.get("model_type"), _architecture(hf)
    computed = ()
    if family in FAMILIES:
        computed = FAMILIES[family], scalar_architecture(family)
    if architecture not in computed:
        raise InputError(
            f"{source}: architecture {architecture} (model_type {family}) is not supported, "
            f"only {', '.join(FAMILIES.values())}, and ...ForSequenceClassification "
            "of the same families."
        )
    labels = hf.get("num_labels") or len(hf.get("id2label") or "01")
    if architecture == scalar_architecture(family) and labels != 1:
        raise InputError(
            f"{source}: a classifier with {labels} labels; a reward model has one (num_labels 1)."
        )
    if not _is_nf4(hf.get("quantization_config")):
        method = hf["quantization_config"].get("quant_method")
        raise InputError(
            f"{source}: the weights are quantized ({method}), and not by bitsandbytes to NF4 with "
            "double quantization; take the unquantized checkpoint of this model."
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"{source}: activation {hf['hidden_act']!r} is not supported, only 'silu'."
        )
    missing = [key for key in REQUIRED if hf.get(key) is None]
    if missing:
        raise InputError(
            f"{source}: {', '.join(missing)} missing; this is not a complete config.json."
        )


def _is_nf4(quantised: dict | None) -> bool:
    """Whether weights are not quantised, or so that hf.py reads them: by bitsandbytes to NF4."""
    if not quantised:
        return True
    by = quantised.get("quant_method"), quantised.get("bnb_4bit_quant_type")
    twice = quantised.get("bnb_4bit_use_double_quant")
    return by == ("bitsandbytes", "nf4") and bool(quantised.get("load_in_4bit") and twice)


def _windows(hf, family):
    """The sliding window of each layer, or None."""
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window", 4096)
    if family == "llama" or (family != "mistral" and not hf.get("use_sliding_window", False)):
        return (None,) * layers
    if kinds := hf.get("layer_types"):
        slides = [kind == "sliding_attention" for kind in kinds]
    elif family == "mistral":
        slides = [True] * layers
    else:
        slides = [layer >= hf.get("max_window_layers", 28) for layer in range(layers)]
    return tuple(window if slide else None for slide in slides)


# ------------------------------------------------------------------------------------------ decoder
class RMSNorm(nn.Module):
    """x / rms(x) * weight, the quotient in fp32 (1910.07467)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

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
        q_NHK = rearrange(self.q_proj(x_ND), "n (h k) -> n h k", k=self.head_dim)
        k_NGK = rearrange(self.k_proj(x_ND), "n (g k) -> n g k", k=self.head_dim)
        v_NGK = rearrange(self.v_proj(x_ND), "n (g k) -> n g k", k=self.head_dim)
        q_NHK = rotate(self.q_norm(q_NHK), cos_NK, sin_NK)
        k_NGK = rotate(self.k_norm(k_NGK), cos_NK, sin_NK)
        return self.o_proj(attend(q_NHK, k_NGK, v_NGK, self.window).flatten(1))


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
        self.self_attn = Attention(c, layer)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.width, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps)

    def forward(self, x_ND, cos_NK, sin_NK, attend):
        x_ND = x_ND + self.self_attn(self.input_layernorm(x_ND), cos_NK, sin_NK, attend)
        return x_ND + self.mlp(self.post_attention_layernorm(x_ND))


def _keep_products(context, operator, *args, **kwargs):
    if operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# --checkpointing -> what a block keeps for its backward pass, beside its input: nothing, or the
# products of its matrices, which cost the most to compute again.
KEEP = {
    "full": noop_context_fn,
    "selective": partial(create_selective_checkpoint_contexts, _keep_products),
}


class Decoder(nn.Module):
    """Embedding, blocks, final norm: everything under `model.` in a checkpoint."""

    def __init__(self, c: Config):
        super().__init__()
        self.config, self.checkpointing = c, "none"
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps)

    def forward(self, token_N, position_N, attend):
        """-> hidden_ND after the final norm.

        attend(layer, q_NHK, k_NGK, v_NGK, window) -> out_NHK says which token sees which.
        """
        x_ND = self.embed_tokens(token_N)
        freq, magnitude = rope_frequencies(self.config.rope, self.config.head_dim, token_N.device)
        angle_NK = position_N[:, None].float() * freq
        cos_NK, sin_NK = angle_NK.cos() * magnitude, angle_NK.sin() * magnitude
        for layer, block in enumerate(self.layers):
            inputs = (x_ND, cos_NK, sin_NK, partial(attend, layer))
            if self.checkpointing == "none" or not torch.is_grad_enabled():
                x_ND = block(*inputs)
            else:
                contexts = KEEP[self.checkpointing]
                x_ND = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
        return self.norm(x_ND)

    def packed(self, token_N, position_N, cu_seqlens, max_seqlen, prefixes=None):
        """Packed documents -> hidden_ND; with batch.Prefixes hidden_UD, of what is computed."""
        packing = Packing(cu_seqlens, max_seqlen, prefixes)

        def attend(layer, q, k, v, window):
            return packed_attention(q, k, v, packing, window)

        if prefixes is not None:
            token_N, position_N = token_N[prefixes.first_U], position_N[prefixes.first_U]
        return self(token_N, position_N, attend)


# ------------------------------------------------------------------------------------------- models
class CausalLM(nn.Module):
    """A language model. kernels: which ones its log-probs may use (see logprob)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.model, self.kernels = config, Decoder(config), "auto"
        self.folder = ""  # from which its weights were loaded
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def forward(self, batch, temperature: float = 1.0, head=None):
        """A Batch -> (logp_N, entropy_N), fp32: log-prob of each target, over its kept ids if there
        are any, and entropy of the whole distribution; 0 where there is no target.

        head: what to compute in their place from (hidden_MD of the M targets, head_weight). The
        weight is whole here alone.
        """
        hidden_UD = _hidden(self.model, batch)
        if head is not None:
            return head(_at_targets(hidden_UD, batch), self.head_weight)
        return self.head(hidden_UD, batch, temperature)

    def head(self, hidden_UD, batch, temperature):
        head = partial(logprob, temperature=temperature, kernels=self.kernels)
        if batch.prefixes is None:
            return head(hidden_UD, self.head_weight, batch.target_N, kept=batch.kept)
        kept = batch.kept
        if kept is not None:
            token_E, id_E = kept
            kept = (batch.mask_N.cumsum(0) - 1)[token_E].int(), id_E
        hidden_MD, target_M = _at_targets(hidden_UD, batch), batch.target_N[batch.at_M]
        found_M = head(hidden_MD, self.head_weight, target_M, kept=kept)
        return tuple(map(batch.spread, found_M))

    def logits(self, hidden_ND):
        """-> fp32 [N, V], all of them: for a few rows only."""
        return matmul_fp32(hidden_ND, self.head_weight.T)

    def prefill(self, token_N, position_N, cu_seqlens, max_seqlen, write):
        """Packed prompts -> hidden_PD of their last tokens.

        write(layer, k_NGK, v_NGK) gets their keys and values, for a cache.
        """
        packing = Packing(cu_seqlens, max_seqlen)

        def attend(layer, q, k, v, window):
            write(layer, k, v)
            return packed_attention(q, k, v, packing, window)

        return self.model(token_N, position_N, attend)[cu_seqlens[1:].long() - 1]

    def decode(self, token_B, cache: Cache):
        """One more token for each row -> hidden_BD. The cache is changed in place; its `longest` is
        above all lengths."""
        seen_by = {}  # window -> what each row sees

        def attend(layer, q, k, v, window):
            keys, values = cache.append(layer, k, v)
            if window not in seen_by:
                seen_by[window] = seen(cache.length_B + 1, cache.longest, window, q.dtype)
            return cached_attention(q, keys, values, seen_by[window])

        hidden_BD = self.model(token_B, cache.length_B, attend)
        cache.length_B.add_(1)
        return hidden_BD

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Matrices normal with the config's initializer_range, norms 1, biases 0; returns self."""
        generator = torch.Generator(device=self.head_weight.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                p.normal_(0.0, self.config.hf.get("initializer_range", 0.02), generator=generator)
            elif name.endswith("bias"):
                p.fill_(0.0)
            else:
                p.fill_(1.0)
        return self


class ScalarModel(nn.Module):
    """A decoder with one number per token: a reward model's score is the one at the last token."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.model = config, Decoder(config)
        self.folder = ""  # from which its weights were loaded
        self.score = nn.Linear(config.width, 1, bias=False)

    def forward(self, batch):
        """A Batch -> fp32 value_N."""
        return whole(scalar_head(_hidden(self.model, batch), self.score.weight), batch)


class ActorCritic(nn.Module):
    """A policy and its value function under one root: one forward gives both, also under FSDP2.

    value_config: that of a separate value model; None: a linear head on the policy's
    hidden states.
    """

    def __init__(self, config: Config, value_config: Config | None):
        super().__init__()
        self.config, self.policy = config, CausalLM(config)
        if value_config:
            self.value = ScalarModel(value_config)
        else:
            self.value = nn.Linear(config.width, 1, bias=False)

    def forward(self, batch, temperature: float = 1.0, value_alone: bool = False):
        """A Batch -> logp_N and entropy_N of the policy, and fp32 value_N of the state in which
        each target was chosen, 0 where there is no target.

        value_alone: returns None for the first two, and gives the policy no gradient.
        """
        shared = isinstance(self.value, nn.Linear)
        hidden_UD = logp_N = entropy_N = None
        if shared or not value_alone:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not value_alone):
                hidden_UD = _hidden(self.policy.model, batch)
        if not value_alone:
            logp_N, entropy_N = self.policy.head(hidden_UD, batch, temperature)
        if shared:
            value_N = whole(scalar_head(hidden_UD, self.value.weight), batch)
        else:
            value_N = self.value(batch)
        return logp_N, entropy_N, value_N.where(batch.mask_N, 0.0)


def scalar_head(hidden_ND, weight_1D):
    """hidden weight^T, one fp32 (or fp64) number for each token.

    Differentiable, unlike matmul_fp32, whose product has no derivative on CUDA in bf16.
    """
    precision = torch.promote_types(hidden_ND.dtype, torch.float32)
    return hidden_ND.to(precision) @ weight_1D[0].to(precision)


def whole(x_U, batch):
    """A number of each token that is computed -> of each token [N]."""
    return x_U if batch.prefixes is None else repeat(x_U, batch.prefixes.index_N)


def _at_targets(hidden_UD, batch):
    """-> hidden_MD. The last token of a prompt has a target in each completion."""
    if batch.prefixes is None:
        return hidden_UD[batch.at_M]
    return repeat(hidden_UD, batch.prefixes.index_N[batch.at_M])


def _hidden(decoder, batch):
    """-> hidden_UD, of the tokens that are computed."""
    where = batch.position_N, batch.cu_seqlens, batch.max_seqlen, batch.prefixes
    return decoder.packed(batch.token_N, *where)
