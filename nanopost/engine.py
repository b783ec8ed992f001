"""The Rollout record, and the native engine: sampling from the policy over a KV cache.

Shapes: P prompts, B living rows (n to a prompt), T sampled positions, V vocabulary, D width.

An engine has four calls: generate, sync_weights, sleep and wake, close. Tokens in, tokens out. The log-prob of each
sampled token is that of the distribution it was drawn from, in fp32. Each row draws from random numbers of its own,
made from its seed, so a rollout depends on weights, prompt, sampling and seed and not on its neighbours, on the
number of ranks, or on the order in which rows finish.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from nanopost import InputError
from nanopost.attention import Cache
from nanopost.rollout import Rollout


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy (its distribution is a point, its log-probs 0). stop: strings that end a completion.

    top_k, top_p and min_p cut the distribution and renormalise it: for evaluation and chat. In training the trainer's
    distribution would not be cut, so the training scripts have no such flag.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


class Engine:
    """Samples with a CausalLM in this process. The model may be the trainer's own: then weights are shared."""

    def __init__(
        self,
        model,
        stop_ids: Iterable[int],
        decode: Callable[[list[int]], str] | None = None,
        rows: int = 512,
    ):
        """stop_ids end a completion. decode: tokens to text, needed for stop strings. rows: sampled at once at most."""
        self.model, self.decode, self.rows, self.version = model, decode, rows, 0
        self.stop_ids = torch.tensor(
            sorted(stop_ids), dtype=torch.long, device=model.head_weight.device
        )

    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int):
        """Copy full weights (checkpoint names) into the engine's model; its own tensors are recognised and skipped."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named_tensors:
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        self.version = version

    def sleep(self):
        """Nothing to give back: the cache lives only as long as a call of generate."""

    def wake(self):
        """See sleep."""

    def close(self):
        """See sleep."""

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Rollout]]:
        """n rollouts of each prompt (token ids). Sample i of prompt p draws from seed seeds[p] + i."""
        if any(len(p) == 0 for p in prompts):
            raise InputError(
                f"prompt {[len(p) for p in prompts].index(0)} has no tokens to continue from."
            )
        if "" in sampling.stop:
            raise InputError("--stop: an empty string would end every completion at once.")
        room = self.model.config.hf.get("max_position_embeddings", 2**31)
        longest = max((len(p) for p in prompts), default=0)
        if longest + sampling.max_tokens > room:
            raise InputError(
                f"a prompt of {longest} tokens and {sampling.max_tokens} new ones exceed the model's "
                f"{room} positions: lower --max_new_tokens, or leave long prompts out."
            )
        seeds = seeds or [0] * len(prompts)
        at_once, out = max(1, self.rows // n), []
        for i in range(0, len(prompts), at_once):
            out += self._generate(prompts[i : i + at_once], n, sampling, seeds[i : i + at_once])
        return out

    def _generate(self, prompts, n, sampling, seeds):
        model, device, rows = self.model, self.stop_ids.device, len(prompts) * n
        uniform_BT = torch.stack(
            [_uniforms(s + i, sampling.max_tokens) for s in seeds for i in range(n)]
        ).to(device)
        token_BT = torch.zeros(rows, sampling.max_tokens, dtype=torch.long, device=device)
        logp_BT = torch.zeros(rows, sampling.max_tokens, device=device)
        length_B = torch.full((rows,), sampling.max_tokens, device=device)
        stopped_B = torch.zeros(rows, dtype=torch.bool, device=device)

        token_N, position_N, cu_seqlens, longest = _packed(prompts, device)
        c = model.config
        cache = Cache(
            c.layers,
            rows,
            n,
            c.kv_heads,
            longest + sampling.max_tokens,
            c.head_dim,
            model.head_weight.dtype,
            device,
        )
        logits_PV = model.logits(model.prefill(token_N, position_N, cu_seqlens, longest, cache))
        logits_AV = logits_PV.repeat_interleave(n, 0)
        row_A = torch.arange(rows, device=device)  # the living rows
        for t in range(sampling.max_tokens):
            token_A, logp_A = sample(logits_AV, uniform_BT[row_A, t], sampling)
            token_BT[row_A, t], logp_BT[row_A, t] = token_A, logp_A
            ended_A = torch.isin(token_A, self.stop_ids) | self._stop_strings(
                token_BT[row_A, : t + 1], sampling.stop
            )
            ended_A &= ~stopped_B[row_A]
            length_B[row_A[ended_A]] = t + 1
            stopped_B[row_A[ended_A]] = True
            living_A = ~stopped_B[row_A]
            if t + 1 == sampling.max_tokens or not living_A.any():
                break
            # Copying the cache costs too: finished rows leave in batches of an eighth.
            if living_A.sum() <= len(row_A) * 7 // 8:
                cache.keep(living_A.nonzero()[:, 0])
                row_A, token_A = row_A[living_A], token_A[living_A]
            logits_AV = model.logits(model.decode(token_A, cache))
        token, logp, length, stopped = (
            x.cpu().numpy() for x in (token_BT, logp_BT, length_B, stopped_B)
        )
        flat = [
            Rollout(
                prompts[b // n],
                token[b, : length[b]].tolist(),
                logp[b, : length[b]].copy(),
                "stop" if stopped[b] else "length",
                self.version,
            )
            for b in range(rows)
        ]
        return [flat[i : i + n] for i in range(0, rows, n)]

    def _stop_strings(self, token_AT, stop):
        if not stop:
            return torch.zeros(len(token_AT), dtype=torch.bool, device=token_AT.device)
        texts = [self.decode(ids) for ids in token_AT.tolist()]
        return torch.tensor(
            [any(s in text for s in stop) for text in texts], device=token_AT.device
        )


def sample(logits_BV, uniform_B, sampling: Sampling):
    """Draw a token a row by inverting its distribution function at uniform_B in [0, 1) -> (token_B, logp_B fp32)."""
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
    """Keep the top_k likeliest tokens, of these the fewest that hold top_p of the mass, and those at least min_p times
    as likely as the likeliest; renormalise. 0, 1.0 and 0.0 switch each one off."""
    if top_k and top_k < log_p_BV.shape[1]:
        least = log_p_BV.topk(top_k).values[:, -1:]
        log_p_BV = log_p_BV.masked_fill(log_p_BV < least, -torch.inf).log_softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = log_p_BV.sort(-1, descending=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(
            1, order_BV, before_BV >= top_p
        )
        log_p_BV = log_p_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(-1)
    if min_p:
        least = log_p_BV.max(-1, keepdim=True).values + float(np.log(min_p))
        log_p_BV = log_p_BV.masked_fill(log_p_BV < least, -torch.inf)
    return log_p_BV.log_softmax(-1)


def prompt_seed(seed: int, serial: int) -> int:
    """The seed of a run's serial-th prompt; its samples take the numbers that follow. The same on any rank."""
    return int(np.random.SeedSequence((seed, serial)).generate_state(1, np.uint64)[0] >> 2)


def _uniforms(seed, count):
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _packed(prompts, device):
    """Prompts as one stream -> token_N, position_N, cu_seqlens, longest. Nothing is shifted: there are no targets."""
    lengths = np.array([len(p) for p in prompts])
    cu = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    position = np.arange(cu[-1]) - np.repeat(cu[:-1], lengths)
    token = np.concatenate([np.asarray(p) for p in prompts]).astype(np.int64)
    return (*(torch.from_numpy(x).to(device) for x in (token, position, cu)), int(lengths.max()))
