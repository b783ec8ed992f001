"""One decoder for the families of config.py, Llama to Qwen3.5 and Gemma 3, on packed tokens.

Shapes: N packed tokens, U those that are computed (N, a shared prefix once), M those with a target,
S documents, B rows of a cache, P prompts, D model width, H query heads, G key/value heads, K width
of a head, V vocabulary; C, H and V in linear attention as in deltanet.py.

Parameter names are the checkpoint's. The head and the log-probability lie inside the root module's
forward, `model(batch) -> logp_N, entropy_N`: outside it, under FSDP2, the head's weight is a shard
before the first forward and stale after a backward. Sharding, compilation and checkpointing are
applied from outside (dist.py).
"""

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

from nanopost import deltanet
from nanopost.attention import (
    ROUTES,
    Cache,
    Packing,
    cached_attention,
    of_documents,
    packed_attention,
    repeat,
    seen,
)
from nanopost.config import LINEAR, Config
from nanopost.logprob import logprob, matmul_fp32
from nanopost.moe import MLP, MoE, Routes
from nanopost.rope import rope_frequencies, rotate


# ------------------------------------------------------------------------------------------ decoder
class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), the quotient in fp32 (1910.07467)."""

    def __init__(self, width: int, c: Config):
        super().__init__()
        self.offset, self.eps = c.traits.norm_offset, c.norm_eps
        self.weight = nn.Parameter(torch.full((width,), 1 - self.offset))

    def forward(self, x):
        if not self.offset:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        precision = torch.promote_types(x.dtype, torch.float32)
        weight = self.offset + self.weight.to(precision)
        return F.rms_norm(x.to(precision), weight.shape, weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.heads, self.head_dim, self.window = c.heads, c.head_dim, c.blocks[layer].window
        self.gated, self.query_scale = c.traits.gated_attention, c.query_scale
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.width, queries * (2 if self.gated else 1), bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.width, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c) if c.traits.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c) if c.traits.qk_norm else nn.Identity()

    def forward(self, x_ND, cos_NR, sin_NR, attend):
        q_NHK = rearrange(self.q_proj(x_ND), "n (h k) -> n h k", h=self.heads)
        k_NGK = rearrange(self.k_proj(x_ND), "n (g k) -> n g k", k=self.head_dim)
        v_NGK = rearrange(self.v_proj(x_ND), "n (g k) -> n g k", k=self.head_dim)
        if self.gated:
            q_NHK, gate_NHK = q_NHK.chunk(2, -1)
        q_NHK = rotate(self.q_norm(q_NHK), cos_NR, sin_NR)
        k_NGK = rotate(self.k_norm(k_NGK), cos_NR, sin_NR)
        if self.query_scale != 1:
            q_NHK = q_NHK * self.query_scale
        out_NHK = attend(q_NHK, k_NGK, v_NGK, self.window)
        if self.gated:
            out_NHK = out_NHK * gate_NHK.sigmoid()
        return self.o_proj(out_NHK.flatten(1))


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.linear, self.post_norms = c.blocks[layer].kind == LINEAR, c.traits.post_norms
        if self.linear:
            self.linear_attn = deltanet.DeltaNet(c)
        else:
            self.self_attn = Attention(c, layer)
        self.mixture = c.blocks[layer].experts
        self.mlp = MoE(c, layer) if self.mixture else MLP(c, c.mlp_width)
        self.input_layernorm = RMSNorm(c.width, c)
        self.post_attention_layernorm = RMSNorm(c.width, c)
        if self.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(c.width, c)
            self.post_feedforward_layernorm = RMSNorm(c.width, c)

    def forward(self, x_ND, cos_NR, sin_NR, mixer):
        if self.linear:
            mixed_ND = self.linear_attn(self.input_layernorm(x_ND), mixer.recur)
        else:
            mixed_ND = self.self_attn(self.input_layernorm(x_ND), cos_NR, sin_NR, mixer.attend)
        if self.post_norms:
            x_ND = x_ND + self.post_attention_layernorm(mixed_ND)
            fed_ND = self._feed(self.pre_feedforward_layernorm(x_ND), mixer)
            return x_ND + self.post_feedforward_layernorm(fed_ND)
        x_ND = x_ND + mixed_ND
        return x_ND + self._feed(self.post_attention_layernorm(x_ND), mixer)

    def _feed(self, x_ND, mixer):
        return self.mlp(x_ND, mixer.routes) if self.mixture else self.mlp(x_ND)


PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._grouped_mm.default,
)


def _keep_products(context, operator, *args, **kwargs):
    if operator in PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# --checkpointing -> what a block keeps for its backward pass, beside its input: nothing, or the
# products of its matrices, which cost the most to compute again.
KEEP = {
    "full": noop_context_fn,
    "selective": partial(create_selective_checkpoint_contexts, _keep_products),
}


class Decoder(nn.Module):
    """Embedding, blocks, final norm: everything under `model.` in a checkpoint.

    replays: whether it takes the experts that a batch names (moe.Routes): the policy, which sampled
    with them, does; a reference, a teacher or a value model chooses its own. Until moe.load_metrics
    has read them, used_LE: how many tokens each expert has had in training; replayed_2: how many of
    the experts named there its router would not have taken, and all. counting: passes without
    gradients count too (moe.counted).
    """

    def __init__(self, c: Config):
        super().__init__()
        self.config, self.checkpointing = c, "none"
        self.replays, self.used_LE, self.replayed_2 = False, None, 0
        self.counting = False
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.width, c)

    def forward(self, token_N, position_N, mixer):
        """-> hidden_ND after the final norm. mixer: which token sees which (see Documents)."""
        c = self.config
        x_ND = self.embed_tokens(token_N)
        if c.traits.scaled_embedding:  # by a factor that is rounded as the embedding is
            x_ND = x_ND * torch.tensor(c.width**0.5, dtype=x_ND.dtype)
        rotary = {name: self._rotary(rope, position_N) for name, rope in c.ropes.items()}
        rotary[None] = 2 * (x_ND.new_zeros(len(x_ND), 0),)  # nothing turns
        for layer, block in enumerate(self.layers):
            inputs = (x_ND, *rotary[c.blocks[layer].rope], mixer.of_layer(layer))
            if self.checkpointing == "none" or not torch.is_grad_enabled():
                x_ND = block(*inputs)
            else:
                contexts = KEEP[self.checkpointing]
                x_ND = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
        return self.norm(x_ND)

    def _rotary(self, rope, position_N):
        """-> cos_NR, sin_NR, fp32."""
        freq_R, magnitude = rope_frequencies(rope, self.config.head_dim, position_N.device)
        angle_NR = position_N[:, None].float() * freq_R
        return angle_NR.cos() * magnitude, angle_NR.sin() * magnitude

    def packed(
        self,
        token_N,
        position_N,
        cu_seqlens,
        max_seqlen,
        prefixes=None,
        routes: Routes | None = None,
    ):
        """Packed documents -> hidden_ND; with batch.Prefixes hidden_UD, of what is computed.

        routes: of what is computed, too; None: each token takes its best experts."""
        documents = Documents(Packing(cu_seqlens, max_seqlen, prefixes), routes)
        if prefixes is not None:
            token_N, position_N = token_N[prefixes.first_U], position_N[prefixes.first_U]
        return self(token_N, position_N, documents)


# ------------------------------------------------------------------------- which token sees which
class Documents:
    """A mixer: packed documents, which do not see each other.

    A mixer has what the blocks of a decoder need to know of other tokens: attend, recur (in linear
    attention), and routes (which experts the tokens take). Decoder takes it with of_layer. What
    depends on the layer's number is not compiled: it would be compiled anew for each layer.
    """

    def __init__(self, packing: Packing, routes: Routes | None = None):
        self.packing, self.routes = packing, routes or Routes()
        self.chunks = {}  # tokens that a convolution sees -> Chunks, made once for all layers

    def of_layer(self, layer: int):
        return self

    def attend(self, q_NHK, k_NGK, v_NGK, window):
        return packed_attention(q_NHK, k_NGK, v_NGK, self.packing, window)

    @torch.compiler.disable
    def recur(self, qkv_NC, decay_NH, beta_NH, weight_CJ, sizes):
        return self._recur(qkv_NC, decay_NH, beta_NH, weight_CJ, sizes)[0]

    def _recur(self, qkv_NC, decay_NH, beta_NH, weight_CJ, sizes):
        if sizes.kernel not in self.chunks:
            self.chunks[sizes.kernel] = deltanet.Chunks.of(self.packing, sizes.kernel)
        chunks = self.chunks[sizes.kernel]
        return deltanet.packed(qkv_NC, decay_NH, beta_NH, weight_CJ, sizes, chunks)


class Prompts(Documents):
    """The mixer of prompts that are written to a cache: write(layer, *new), as
    Cache.write_prompts."""

    def __init__(self, packing: Packing, write):
        super().__init__(packing)
        self.write, self.layer = write, 0

    def of_layer(self, layer: int):
        self.layer = layer
        return self

    @torch.compiler.disable
    def attend(self, q_NHK, k_NGK, v_NGK, window):
        self.write(self.layer, *(of_documents(x, self.packing) for x in (k_NGK, v_NGK)))
        return super().attend(q_NHK, k_NGK, v_NGK, window)

    @torch.compiler.disable
    def recur(self, qkv_NC, decay_NH, beta_NH, weight_CJ, sizes):
        out_NHV, states = self._recur(qkv_NC, decay_NH, beta_NH, weight_CJ, sizes)
        kept = deltanet.states_of_prompts(qkv_NC, states, self.chunks[sizes.kernel])
        self.write(self.layer, *kept)
        return out_NHV


class NextTokens:
    """The mixer of one more token for each row of a cache, which is changed in place."""

    def __init__(self, cache: Cache):
        self.cache, self.layer, self.routes = cache, 0, Routes()
        self.seen = {}  # window -> what each row sees

    def of_layer(self, layer: int):
        self.layer = layer
        return self

    @torch.compiler.disable
    def attend(self, q_BHK, k_BGK, v_BGK, window):
        keys, values = self.cache.append(self.layer, k_BGK, v_BGK)
        if window not in self.seen:
            length_B, longest = self.cache.length_B + 1, self.cache.longest
            self.seen[window] = seen(length_B, longest, window, q_BHK.dtype)
        return cached_attention(q_BHK, keys, values, self.seen[window])

    @torch.compiler.disable
    def recur(self, qkv_BC, decay_BH, beta_BH, weight_CJ, sizes):
        held = self.cache.held[self.layer]
        return deltanet.step(qkv_BC, decay_BH, beta_BH, weight_CJ, sizes, *held)


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

    def cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache of the weights' dtype, where they are."""
        c, like = self.config, {"dtype": self.head_weight.dtype, "device": self.head_weight.device}
        keys = rows, c.kv_heads, capacity, c.head_dim
        held = []
        for block in c.blocks:
            if block.kind == LINEAR:
                held.append(deltanet.empty_states(c.delta, rows, **like))
            else:
                held.append([torch.zeros(keys, **like), torch.zeros(keys, **like)])
        if c.experts is not None:
            routes = rows, c.mixtures, capacity, c.experts.active
            held.append([torch.zeros(routes, dtype=torch.int16, device=like["device"])])
        return Cache(held, rows, capacity, like["device"])

    def prefill(self, token_N, position_N, cu_seqlens, max_seqlen, write):
        """Packed prompts -> hidden_PD of their last tokens. write: see Prompts."""
        prompts = Prompts(Packing(cu_seqlens, max_seqlen), write)
        hidden_ND = self.model(token_N, position_N, prompts)
        if self.config.experts is not None:
            write(ROUTES, of_documents(prompts.routes.taken_NLA(), prompts.packing))
        return hidden_ND[cu_seqlens[1:].long() - 1]

    def decode(self, token_B, cache: Cache):
        """One more token for each row -> hidden_BD. The cache is changed in place; its `longest` is
        above all lengths."""
        next_tokens = NextTokens(cache)
        hidden_BD = self.model(token_B, cache.length_B, next_tokens)
        if self.config.experts is not None:
            cache.append(ROUTES, next_tokens.routes.taken_NLA())
        cache.length_B.add_(1)
        return hidden_BD

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Matrices normal with the config's initializer_range, norms multiply by 1, biases 0; the
        decay of linear attention as in transformers. Returns self."""
        generator = torch.Generator(device=self.head_weight.device).manual_seed(seed)
        std = self.config.text.get("initializer_range", 0.02)
        for p in self.parameters():
            if p.ndim > 1:
                p.normal_(0.0, std, generator=generator)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1 - module.offset)
            elif isinstance(module, deltanet.GatedNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, deltanet.DeltaNet):
                module.dt_bias.fill_(1.0)
                module.A_log.uniform_(0.01, 16, generator=generator).log_()
            elif getattr(module, "bias", None) is not None:
                module.bias.fill_(0.0)
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
    if decoder.config.experts is None:
        return decoder.packed(batch.token_N, *where)
    routes = Routes(batch.routes_ULA if decoder.replays else None)
    routes.check(decoder.config)
    hidden_UD = decoder.packed(batch.token_N, *where, routes)
    trains = torch.is_grad_enabled() and not batch.dummy
    if trains or decoder.counting:
        decoder.replayed_2 = decoder.replayed_2 + routes.replayed_2
    if trains:
        count_LE = routes.count_LE(decoder.config.experts.count)
        decoder.used_LE = count_LE if decoder.used_LE is None else decoder.used_LE + count_LE
    return hidden_UD
