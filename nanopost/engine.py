"""The native engine: sampling from the policy over a KV cache.

Shapes: P prompts, B rows (n per prompt), A rows still alive, T sampled positions, V vocabulary.

An engine has three calls: generate, sync_weights, close. Tokens in, tokens out. The log-prob of
each sampled token is that of the distribution it was drawn from, in fp32. Each row draws its own
random numbers, from its own seed. So a rollout depends on weights, prompt, sampling and seed, but
not on its neighbours, the number of ranks, or the order in which rows finish.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from nanopost import InputError, hf
from nanopost.attention import Cache
from nanopost.rollout import Rollout


@dataclass(frozen=True)
class Sampling:
    """How to sample. Temperature 0 is greedy: all mass on one token, log-prob 0.

    stop: strings that end a completion. top_k, top_p and min_p cut the distribution and
    renormalise it, for evaluation and chat. The trainer's distribution is not cut, so the training
    scripts have no such flags.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


class Engine:
    """Samples with a CausalLM in this process. The model may be the trainer's own."""

    def __init__(
        self,
        model,
        stop_ids: Iterable[int],
        decode: Callable[[list[int]], str] | None = None,
        rows: int = 512,
    ):
        """stop_ids end a completion. decode: token ids to text, which stop strings need.

        rows: maximum completions sampled at once.
        """
        self.model = model
        self.decode = decode
        self.rows = rows
        self.version = 0
        self.stop_ids = torch.tensor(
            sorted(stop_ids), dtype=torch.long, device=model.head_weight.device
        )

    @classmethod
    def beside(cls, model, folder, world, tokenizer, rows: int = 512) -> "Engine":
        """The engine of a training script. model: its policy, loaded from the checkpoint `folder`.

        With one process in fp32 the engine samples with the trainer's own tensors. Otherwise those
        are shards or fp32 master weights, and the engine gets a full copy in world.dtype.
        """
        if world.size > 1 or world.dtype != torch.float32:
            model = hf.load_model(folder, world.device, world.dtype)
        return cls(model, tokenizer.stop_ids, tokenizer.decode, rows)

    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int):
        """Copy full weights, under their checkpoint names, into the engine's model.

        A tensor that the engine shares with the trainer is skipped.
        """
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named_tensors:
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        self.version = version

    def close(self):
        """Nothing to release: a cache lives only as long as its call to generate."""

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Rollout]]:
        """n rollouts of each prompt (token ids). Sample i of prompt p draws from seed seeds[p] + i.

        InputError for an empty prompt, an empty stop string, or more tokens than model positions.
        """
        lengths = [len(prompt) for prompt in prompts]
        if 0 in lengths:
            raise InputError(f"prompt {lengths.index(0)} has no tokens to continue from.")
        if "" in sampling.stop:
            raise InputError("--stop: an empty string would end every completion at once.")
        positions = self.model.config.hf.get("max_position_embeddings", 2**31)
        longest = max(lengths, default=0)
        if longest + sampling.max_tokens > positions:
            raise InputError(
                f"a prompt of {longest} tokens and {sampling.max_tokens} new ones exceed the "
                f"model's {positions} positions: lower --max_new_tokens or drop long prompts."
            )
        seeds = seeds or [0] * len(prompts)
        at_once = max(1, self.rows // n)
        groups = []
        for i in range(0, len(prompts), at_once):
            groups += self._generate(prompts[i : i + at_once], n, sampling, seeds[i : i + at_once])
        return groups

    def _generate(self, prompts, n, sampling, seeds):
        rows = len(prompts) * n
        device = self.stop_ids.device
        uniforms = [_uniforms(seed + i, sampling.max_tokens) for seed in seeds for i in range(n)]
        uniform_BT = torch.stack(uniforms).to(device)
        token_BT = torch.zeros(rows, sampling.max_tokens, dtype=torch.long, device=device)
        logp_BT = torch.zeros(rows, sampling.max_tokens, device=device)
        length_B = torch.full((rows,), sampling.max_tokens, device=device)
        stopped_B = torch.zeros(rows, dtype=torch.bool, device=device)

        logits_AV, cache = self._prefill(prompts, n, sampling.max_tokens)
        row_A = torch.arange(rows, device=device)
        for t in range(sampling.max_tokens):
            token_A, logp_A = sample(logits_AV, uniform_BT[row_A, t], sampling)
            token_BT[row_A, t] = token_A
            logp_BT[row_A, t] = logp_A
            ended_A = torch.isin(token_A, self.stop_ids)
            if sampling.stop:
                ended_A |= self._has_stop_string(token_BT[row_A, : t + 1], sampling.stop)
            ended_A &= ~stopped_B[row_A]
            length_B[row_A[ended_A]] = t + 1
            stopped_B[row_A[ended_A]] = True
            living_A = ~stopped_B[row_A]
            if t + 1 == sampling.max_tokens or not living_A.any():
                break
            # Dropping finished rows copies the cache, so it waits until an eighth have finished.
            if living_A.sum() <= len(row_A) * 7 // 8:
                cache.keep(living_A.nonzero()[:, 0])
                row_A = row_A[living_A]
                token_A = token_A[living_A]
            logits_AV = self.model.logits(self.model.decode(token_A, cache))

        token_BT = token_BT.cpu().numpy()
        logp_BT = logp_BT.cpu().numpy()
        length_B = length_B.tolist()
        stopped_B = stopped_B.tolist()
        rollouts = []
        for b in range(rows):
            ids = token_BT[b, : length_B[b]].tolist()
            logp = logp_BT[b, : length_B[b]].copy()
            finish = "stop" if stopped_B[b] else "length"
            rollouts.append(Rollout(prompts[b // n], ids, logp, finish, self.version))
        return [rollouts[i : i + n] for i in range(0, rows, n)]

    def _prefill(self, prompts, n, max_tokens):
        """-> logits_BV of the first sampled token, and the cache; each prompt is computed once."""
        model = self.model
        config = model.config
        token_N, position_N, cu_seqlens, longest = _packed(prompts, self.stop_ids.device)
        cache = Cache(
            config.layers,
            len(prompts) * n,
            n,
            config.kv_heads,
            longest + max_tokens,
            config.head_dim,
            model.head_weight.dtype,
            self.stop_ids.device,
        )
        logits_PV = model.logits(model.prefill(token_N, position_N, cu_seqlens, longest, cache))
        return logits_PV.repeat_interleave(n, 0), cache

    def _has_stop_string(self, token_AT, stop):
        texts = [self.decode(ids) for ids in token_AT.tolist()]
        found = [any(string in text for string in stop) for text in texts]
        return torch.tensor(found, device=token_AT.device)


def sample(logits_BV, uniform_B, sampling: Sampling):
    """Draw one token per row -> (token_B, logp_B in fp32).

    Inverts the cumulative distribution at uniform_B in [0, 1).
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1), torch.zeros(len(logits_BV), device=logits_BV.device)
    log_p_BV = (logits_BV / sampling.temperature).log_softmax(-1)
    if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
        log_p_BV = cut(log_p_BV, sampling.top_k, sampling.top_p, sampling.min_p)
    cdf_BV = log_p_BV.exp().double().cumsum(-1)
    token_B1 = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)
    token_B1 = token_B1.clamp_(max=cdf_BV.shape[1] - 1)
    return token_B1[:, 0], log_p_BV.gather(1, token_B1)[:, 0]


def cut(log_p_BV, top_k: int, top_p: float, min_p: float):
    """Cut the distribution and renormalise it; 0, 1.0 and 0.0 switch the three cuts off.

    It keeps the top_k likeliest tokens; of these, the fewest that hold top_p of the mass; of these,
    the ones at least min_p times as likely as the likeliest.
    """
    if top_k and top_k < log_p_BV.shape[1]:
        least = log_p_BV.topk(top_k).values[:, -1:]
        log_p_BV = log_p_BV.masked_fill(log_p_BV < least, -torch.inf).log_softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = log_p_BV.sort(-1, descending=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool)
        dropped_BV.scatter_(1, order_BV, before_BV >= top_p)
        log_p_BV = log_p_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(-1)
    if min_p:
        least = log_p_BV.max(-1, keepdim=True).values + float(np.log(min_p))
        log_p_BV = log_p_BV.masked_fill(log_p_BV < least, -torch.inf)
    return log_p_BV.log_softmax(-1)


def prompt_seed(seed: int, serial: int) -> int:
    """The seed of a run's serial-th prompt, the same on any rank; sample i adds i to it."""
    return int(np.random.SeedSequence((seed, serial)).generate_state(1, np.uint64)[0] >> 2)


def _uniforms(seed, count):
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _packed(prompts, device):
    """Prompts as one stream -> token_N, position_N, cu_seqlens, longest; no targets, no shift."""
    lengths = np.array([len(prompt) for prompt in prompts])
    cu_seqlens = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    position_N = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    token_N = np.concatenate([np.asarray(prompt) for prompt in prompts]).astype(np.int64)
    arrays = [token_N, position_N, cu_seqlens]
    token_N, position_N, cu_seqlens = [torch.from_numpy(x).to(device) for x in arrays]
    return token_N, position_N, cu_seqlens, int(lengths.max())
